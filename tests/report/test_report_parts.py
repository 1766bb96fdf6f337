"""The parts of a page, each against its definition: samples, maps, colours, crops, neighbours, charts, tables."""

from __future__ import annotations

import base64

import numpy as np
import pandas as pd
import pytest

from cellvim.errors import InputError
from cellvim.evaluate.features import sample_rows
from cellvim.report.charts import dose_charts, dot_chart
from cellvim.report.coloring import encode_columns
from cellvim.report.crops import choose_crops, crops_in_budget
from cellvim.report.embedding_map import lay_out
from cellvim.report.encoding import pack, quantise
from cellvim.report.neighbours import nearest_perturbations, typical_crops
from cellvim.report.tables import make_table, short


def unpack(packed: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), {"u8": "<u1", "u16": "<u2"}[packed["type"]])


def test_packed_numbers_come_back():
    for kind in (np.uint8, np.uint16):
        values = np.array([0, 1, 200, np.iinfo(kind).max], kind)
        np.testing.assert_array_equal(unpack(pack(values[::-1])), values[::-1])


def test_quantised_numbers_are_right_to_half_a_step():
    values = np.array([-3.5, 0.1, np.nan, 7.25, np.inf, -np.inf])
    for kind in (np.uint8, np.uint16):
        codes, low, high = quantise(values, kind)
        most = np.iinfo(kind).max
        assert (low, high) == (-3.5, 7.25) and (codes[[2, 4, 5]] == most).all()
        back = low + codes[[0, 1, 3]] / (most - 1) * (high - low)
        np.testing.assert_allclose(back, values[[0, 1, 3]], atol=(high - low) / (most - 1) / 2 + 1e-12)
    assert quantise(np.full(3, 2.0))[0].tolist() == [0, 0, 0]
    assert quantise(np.full(2, np.nan))[0].tolist() == [65535, 65535]


def test_a_sample_is_even_over_the_groups():
    groups = np.repeat([0, 1, 2, -1], [1000, 30, 5, 10])
    rows = sample_rows(groups, 60, keep=np.array([3, 1001]), seed=1)
    assert len(rows) == 60 and (np.diff(rows) > 0).all() and {3, 1001} <= set(rows)
    counts = {g: int((groups[rows] == g).sum()) for g in (0, 1, 2, -1)}
    assert counts[2] == 5 and counts[-1] == 10 and abs(counts[0] - counts[1]) <= 3
    assert sample_rows(groups, 10_000).tolist() == list(range(len(groups)))
    np.testing.assert_array_equal(rows, sample_rows(groups, 60, keep=np.array([3, 1001]), seed=1))


def test_few_cells_are_laid_out_by_principal_components():
    values = np.random.default_rng(0).normal(size=(20, 5)) * [9, 5, 1, 1, 1]
    found = lay_out(lambda rows: values[rows], np.zeros(20, int))
    centred = values - values.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found.coordinates), np.abs((u * s)[:, :2]), rtol=1e-4)
    assert found.method == "PCA"


@pytest.mark.slow  # numba compiles UMAP for ten seconds
def test_umap_keeps_groups_apart_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    group = np.arange(300) % 3
    values = rng.normal(size=(300, 20)) + 12 * rng.normal(size=(3, 20))[group]
    found, again = (lay_out(lambda rows: values[rows], np.zeros(300, int)) for _ in range(2))
    np.testing.assert_array_equal(found.coordinates, again.coordinates)
    assert found.method == "UMAP" and found.coordinates.shape == (300, 2)
    centers = np.stack([found.coordinates[group == g].mean(0) for g in range(3)])
    distance = np.linalg.norm(found.coordinates[:, None] - centers, axis=2)
    assert (distance.argmin(1) == group).all()
    same = lay_out(lambda rows: np.ones((len(rows), 4)), np.zeros(100, int))
    assert (same.coordinates == 0).all()


def test_columns_keep_their_values():
    table = pd.DataFrame(
        {
            "text": pd.Categorical(["b", None, "a", "b"]),
            "flag": [True, False, True, True],
            "number": [1.5, np.nan, -2.0, 8.0],
            "whole": [3, 1, 2, 9],
            "nothing": [np.nan] * 4,
        }
    )
    found = encode_columns(table)
    assert [c["name"] for c in found.columns] == ["text", "flag", "number", "whole"]
    assert found.left_out == [("nothing", "no values")]
    text, flag, number, whole = found.columns
    assert text["categories"] == ["a", "b"] and unpack(text["codes"]).tolist() == [1, 255, 0, 1]
    assert flag["categories"] == ["False", "True"] and whole["whole"] and not number["whole"]
    codes = unpack(number["codes"])
    assert codes[1] == 65535
    assert number["low"] + codes[0] / 65534 * (number["high"] - number["low"]) == pytest.approx(1.5, abs=1e-3)


def test_a_column_of_names_is_no_colour():
    found = encode_columns(pd.DataFrame({"id": [f"cell {i}" for i in range(5000)]}))
    assert not found.columns and "4,000 different values" in found.left_out[0][1]


def test_crops_are_spread_over_perturbations_and_wells_from_few_fields():
    rows = [
        ("p", f"A{w:02d}", str(s), "many" if w < 20 else "rare", n % 3 > 0)
        for w in range(1, 22)
        for s in range(5)
        for n in range(12)
    ]
    table = pd.DataFrame(rows, columns=["plate", "well", "site", "perturbation", "good"])
    chosen = choose_crops(table, 42, seed=0)
    assert len(chosen) == 42 and (np.diff(chosen) > 0).all()
    assert table.loc[chosen, "good"].all()  # whole cells first
    assert table.loc[chosen].groupby("well").size().nunique() <= 2  # even over the wells
    few = table.loc[choose_crops(table, 4, seed=0), "perturbation"]
    assert (few == "rare").sum() >= 2  # of 19 and 2 wells
    assert len(choose_crops(table[:0], 9)) == 0
    missing = table.assign(perturbation=None, plate=None)
    assert len(choose_crops(missing, 42)) == 42


def test_more_channels_or_larger_crops_are_fewer():
    counts = [crops_in_budget(c, s) for c, s in ((1, 32), (2, 48), (5, 64), (12, 72))]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 40 and counts[0] == 2000


def test_nearest_perturbations_by_cosine():
    values = np.array([[1.0, 0.0], [1.0, 0.2], [0.9, 0.1], [-1.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    names = np.array(["a", "a", "b", "c", "d", None], dtype=object)
    found, nearest, similarity = nearest_perturbations(names, values)
    assert found == ["a", "b", "c", "d"]
    means = np.array([[1, 0.1], [0.9, 0.1], [-1, 0], [0, 1]])
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    cosine = unit @ unit.T
    for i in range(4):
        expected = sorted((j for j in range(4) if j != i), key=lambda j: -cosine[i, j])
        assert nearest[i].tolist() == expected
        np.testing.assert_allclose(similarity[i], cosine[i, expected], atol=1e-12)
    with pytest.raises(InputError, match="is 1 perturbation"):
        nearest_perturbations(np.array(["a", None], dtype=object), values[:2])
    with pytest.raises(InputError, match="finite"):
        nearest_perturbations(names, np.full((6, 2), np.nan))


def test_typical_crops_are_nearest_to_the_mean():
    embeddings = np.array([[0.0], [1.0], [10.0], [np.nan], [5.0]])
    found = typical_crops(np.array(["a", "a", "a", "a", "b"], dtype=object), embeddings, 2)
    assert found == {"a": [1, 0], "b": [4]}


def test_a_dose_of_zero_and_a_curve_that_failed_are_drawn():
    curves = pd.DataFrame(
        [
            {"perturbation": "x", "n_wells": 5, "bottom": 0.0, "top": 1.0, "ec50": 2.0, "hill": 1.0, "p_value": 0.01,
             "r_squared": 0.9, "in_range": True, "remark": ""},
            {"perturbation": "y", "n_wells": 1, "bottom": np.nan, "top": np.nan, "ec50": np.nan, "hill": np.nan,
             "p_value": np.nan, "r_squared": np.nan, "in_range": False, "remark": "1 doses above 0"},
        ]
    )  # fmt: skip
    points = pd.DataFrame(
        {"perturbation": ["x"] * 4 + ["y"], "dose": [0.0, 1, 10, 100, 3], "mean": [0.0, 0.3, 0.9, 1.0, 0.5]}
    )
    first, second = dose_charts(curves, points)
    xs = [dot["x"] for dot in first["dots"]]
    assert xs == sorted(xs) and len(xs) == 4
    ys = [dot["y"] for dot in first["dots"]]
    assert ys == sorted(ys, reverse=True)  # up is more
    assert "EC50 2" in first["facts"] and first["curve"]
    assert second["facts"] == "1 doses above 0" and not second["curve"]


def test_dots_lie_in_order_on_the_scale():
    chart = dot_chart([("a", 0.9, 0.01), ("b", 0.5, np.nan), ("c", np.nan, 0.1)], label="", zero=0.5)
    a, b = chart["rows"]
    assert a["x"] > b["x"] == chart["zero"] and b["low"] is None and a["low"] < a["x"] < a["high"]


def test_tables_sort_by_numbers_and_say_what_they_leave_out():
    table = make_table("All.", ["name", "value"], [["x", 1234.5], ["y", None], ["z", np.nan], ["w", 1e-9]])
    assert [c["number"] for c in table["columns"]] == [False, True]
    assert [row[1]["value"] for row in table["rows"]] == ["1234.5", "", "", "1e-09"]
    assert [row[1]["text"] for row in table["rows"]] == ["1,234.500", "–", "–", "1.00e-09"]
    long = make_table("All.", ["n"], [[i] for i in range(3000)])
    assert len(long["rows"]) == 2000 and "first 2,000 of 3,000" in long["caption"] and long["search"]
    assert short(True) == "yes" and short("<b>") == "<b>"
