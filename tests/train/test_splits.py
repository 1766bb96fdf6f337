"""Splits hold out complete wells, plates or sources, or raise."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from cellvim.errors import InputError, MetadataError
from cellvim.train.splits import split_rows


def table(wells: int = 12, plates: int = 3, cells: int = 5, classes: int = 2) -> pd.DataFrame:
    rows = [
        {
            "Metadata_Source": f"S{p % 2}",
            "Metadata_Plate": f"P{p}",
            "Metadata_Well": f"A{w:02d}",
            "label": f"class {w % classes}",
        }
        for p in range(plates)
        for w in range(wells)
        for _ in range(cells)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        ("well", ["Metadata_Plate", "Metadata_Well"]),
        ("plate", ["Metadata_Plate"]),
        ("source", ["Metadata_Source"]),
    ],
)
def test_groups_belong_to_one_part(by, keys):
    rows = table(plates=6)
    parts = split_rows(rows, by, val=0.0 if by == "source" else 0.2, test=0.3)
    seen = {part: set(map(tuple, rows[keys].iloc[chosen].to_numpy())) for part, chosen in parts.items()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(rows)))
    assert len(parts["test"])


def test_the_split_depends_on_the_seed():
    rows = table()
    first, again, other = (split_rows(rows, "well", seed=s)["test"].tolist() for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_test_part_does_not_depend_on_the_validation_fraction():
    rows = table()
    tests = [split_rows(rows, "well", val=v)["test"].tolist() for v in (0.0, 0.1, 0.3)]
    assert tests[0] == tests[1] == tests[2]


def test_every_class_is_in_every_part_when_wells_have_one_class():
    """Also if a class has three of many wells."""
    rows = table(wells=20, plates=1)
    rows.loc[rows["Metadata_Well"].isin(["A03", "A07", "A11"]), "label"] = "rare"
    for seed in range(5):
        for chosen in split_rows(rows, "well", seed=seed).values():
            assert set(rows["label"].iloc[chosen]) == {"class 0", "class 1", "rare"}


def test_the_random_split_warns_that_it_leaks():
    with pytest.warns(UserWarning, match="leaks"):
        parts = split_rows(table(), "random_by_cell", val=0.0, test=0.2)
    assert len(parts["test"]) == pytest.approx(0.2 * len(table()), rel=0.1)


def test_plates_of_many_classes_are_balanced():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"Metadata_Plate": rng.integers(0, 20, 1000), "label": rng.integers(0, 5, 1000).astype(str)})
    parts = split_rows(rows, "plate", val=0.0, test=0.25)
    shares = rows["label"].iloc[parts["test"]].value_counts(normalize=True)
    assert len(parts["test"]) == pytest.approx(250, abs=60)
    assert shares.min() > 0.1


def test_a_column_can_define_the_split():
    rows = table().assign(part=lambda t: np.where(t["Metadata_Plate"] == "P0", "Test", "train"))
    parts = split_rows(rows, "part")
    assert set(rows["Metadata_Plate"].iloc[parts["test"]]) == {"P0"}
    with pytest.raises(MetadataError, match="train, val or test"):
        split_rows(rows, "Metadata_Plate2") if "Metadata_Plate2" in rows else split_rows(rows.assign(part="x"), "part")


@pytest.mark.parametrize(
    ("rows", "by", "message"),
    [
        (table(wells=2, plates=1), "well", "2 wells; a split by well requires at least 3"),
        (table(plates=1), "plate", "1 plate; a split by plate requires at least 3"),
        (table().drop(columns="Metadata_Source"), "source", "requires Metadata_Source"),
        (table(wells=6, plates=1, classes=6), "well", "lies in one well only"),
    ],
)
def test_impossible_splits_raise(rows, by, message):
    with pytest.raises(MetadataError, match=message):
        split_rows(rows, by, where="plate.zarr")


def test_unknown_splits_and_fractions_raise():
    with pytest.raises(InputError, match=r"no split by 'wel'.*Did you mean well"):
        split_rows(table(), "wel")
    with pytest.raises(InputError, match="fraction val"):
        split_rows(table(), "well", val=1.5)


def test_missing_classes_of_a_part_give_a_warning():
    rows = table(wells=12, plates=1)
    rows.loc[rows["Metadata_Well"] == "A05", "label"] = "lonely"
    with pytest.warns(UserWarning, match="lonely"):
        split_rows(rows, "well")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_rows(table(), "well")
