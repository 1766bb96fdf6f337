"""Separation of controls: cells of one well are never in both training and test."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from cellvim.errors import InputError
from cellvim.evaluate.controls import separate_controls, split_wells


def _adata(shift: float, well_effect: float = 0.0, cells: int = 20, wells: int = 12, seed: int = 0) -> anndata.AnnData:
    """Half of the wells are positive; ``shift`` is the effect of being positive, ``well_effect`` that of the well."""
    rng = np.random.default_rng(seed)
    well = np.repeat(np.arange(wells), cells)
    positive = well % 2
    X = rng.normal(size=(len(well), 16)) + well_effect * rng.normal(size=(wells, 16))[well]
    X[:, 0] += shift * positive
    obs = pd.DataFrame(
        {
            "Metadata_Plate": "P",
            "Metadata_Well": [f"A{w + 1:02d}" for w in well],
            "control": np.where(positive, "poscon", "negcon"),
            "number": positive * 2 - 1,
            "mean_intensity_DNA": rng.normal(size=len(well)),
        },
        index=[f"c{i}" for i in range(len(well))],
    )
    return anndata.AnnData(X.astype(np.float32), obs=obs)


def _figures(adata, **options) -> dict[str, float]:
    results = separate_controls(adata, "control", negative="negcon", positive="poscon", **options)
    return {result.features: result.balanced_accuracy for result in results}


@pytest.mark.parametrize("level", ["cell", "well"])
def test_strong_effects_are_separated_and_baselines_are_at_chance(level):
    figures = _figures(_adata(shift=6.0, wells=60, cells=5), level=level)
    assert figures["embedding"] > 0.9
    # of 60 wells or their 300 cells: chance varies by a few times 0.5 / sqrt(60)
    assert abs(figures["mean intensities"] - 0.5) < 0.25
    assert figures["cell count"] <= 0.6  # all wells have as many cells


def test_well_effects_are_not_separated():
    """Cells of one well are similar; a split by cell would detect the well instead of an effect."""
    figures = [_figures(_adata(shift=0.0, well_effect=5.0, seed=seed))["embedding"] for seed in range(5)]
    assert 0.3 < np.mean(figures) < 0.65  # chance; a split by cell gives above 0.9 here


def test_a_split_by_cell_would_separate_well_effects():
    """The previous test can fail: with cells assigned regardless of wells, the same data look separable."""
    adata = _adata(shift=0.0, well_effect=5.0)
    adata.obs["Metadata_Well"] = [f"{c}{i % 5}" for i, c in enumerate(adata.obs["control"])]
    assert _figures(adata)["embedding"] > 0.9


def test_folds_hold_out_wells_of_both_groups():
    groups = np.repeat([f"w{i}" for i in range(10)], 3)
    target = np.repeat([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], 3)
    folds = split_wells(target, groups, 5, seed=0)
    assert len(folds) == 3  # as many as the smaller group has wells
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
        assert set(target[test]) == {0, 1}
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(30))


def test_same_seed_same_results():
    adata = _adata(shift=1.0)
    assert _figures(adata, seed=3) == _figures(adata, seed=3)


@pytest.mark.parametrize("values", [(-1, 1), (-1.0, 1.0), ("-1", "1")])
def test_groups_are_found_as_numbers_or_text(values):
    adata = _adata(shift=6.0)
    negative, positive = values
    assert separate_controls(adata, "number", negative=negative, positive=positive)[0].balanced_accuracy > 0.95
    adata.obs["number"] = pd.Categorical(adata.obs["number"])
    assert separate_controls(adata, "number", negative=negative, positive=positive)[0].n_rows == 240


def test_missing_columns_and_groups_raise_errors():
    adata = _adata(shift=1.0)
    with pytest.raises(InputError, match=r"'pert_type'.*control"):
        separate_controls(adata, "pert_type", negative="negcon", positive="poscon")
    with pytest.raises(InputError, match=r"'trt' in 0 wells.*negcon, poscon"):
        separate_controls(adata, "control", negative="negcon", positive="trt")


def test_intensities_are_optional():
    adata = _adata(shift=1.0)
    del adata.obs["mean_intensity_DNA"]
    assert set(_figures(adata)) == {"embedding", "cell count"}
