"""Held-out groups are not used for training, and batch measures equal their definitions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from profile_tables import make_profiles

from cellvim.errors import MetadataError
from cellvim.evaluate.batch_effects import batch_effects, kbet_acceptance
from cellvim.evaluate.classification import classify, split_by_group
from cellvim.evaluate.features import Features


def test_groups_are_never_split_and_every_row_is_predicted_once():
    rng = np.random.default_rng(0)
    groups = pd.Series(rng.integers(0, 12, 300)).astype(str)
    labels = pd.Series(rng.choice(["a", "b", "c"], 300))
    split = split_by_group(labels, groups)
    for train, test in split.folds:
        assert not set(groups.iloc[split.rows[train]]) & set(groups.iloc[split.rows[test]])
    assert sorted(np.concatenate([test for _, test in split.folds])) == list(range(300))


def test_classes_in_one_group_are_omitted_and_recorded():
    labels = pd.Series(["a", "a", "b", "b", "c", "c", None])
    groups = pd.Series(["1", "2", "1", "2", "1", "1", "2"])
    split = split_by_group(labels, groups)
    assert list(split.classes) == ["a", "b"]
    assert split.rows.tolist() == [0, 1, 2, 3]
    assert "one group only" in split.remark and split.remark.endswith(": c.")
    with pytest.raises(MetadataError, match="0 of 3 classes occur in two or more of the 1"):
        split_by_group(labels, pd.Series(["1"] * 7))


def test_effects_are_classified_and_plate_effects_are_not():
    adata = make_profiles(plates=4, effect=8, plate_effect=0)
    treated = (adata.obs["Metadata_pert_type"] == "trt").to_numpy()
    mechanism = adata.obs["Metadata_moa"].astype(str).where(treated)
    plates = adata.obs["Metadata_Plate"].astype(str)
    split = split_by_group(mechanism, plates)
    table = classify(Features("X", np.asarray(adata.X, float)), split).set_index("classifier")
    assert (table["balanced_accuracy"] > 0.9).all()
    assert np.allclose(table["chance"], 1 / 3)
    noise = classify(Features("noise", np.random.default_rng(0).normal(size=adata.shape)), split)
    assert (noise["balanced_accuracy"] < 0.6).all()
    # a label that equals the plate cannot be learnt if plates are held out
    label = pd.Series(np.where(plates.isin(["P0", "P1"]), "x", "y"), index=plates.index)
    alike = make_profiles(plates=4, effect=0, plate_effect=20)
    split = split_by_group(label, plates)
    held_out = classify(Features("X", np.asarray(alike.X, float)), split)["balanced_accuracy"]
    wells = pd.Series(adata.obs_names, index=plates.index)
    by_well = classify(Features("X", np.asarray(alike.X, float)), split_by_group(label, wells))["balanced_accuracy"]
    assert (by_well > 0.95).all()
    assert (held_out < 0.8).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_mixed_batches_score_high_and_separate_batches_low(seed):
    rng = np.random.default_rng(seed)
    batch = pd.Series(np.repeat(["a", "b", "c"], 60))
    mixed = rng.normal(size=(180, 10))
    apart = mixed + 8 * rng.normal(size=(3, 10))[np.repeat([0, 1, 2], 60)]
    good, bad = (
        batch_effects(Features("x", v, "euclidean"), batch).set_index("measure")["value"] for v in (mixed, apart)
    )
    assert good["batch silhouette"] > 0.95
    assert bad["batch silhouette"] < 0.7
    assert good["kBET acceptance"] > 0.85
    assert bad["kBET acceptance"] == 0
    assert good["batch LISI"] > 0.7
    assert bad["batch LISI"] < 0.1


def test_kbet_is_a_chi_squared_test_of_each_neighbourhood():
    from scipy.spatial.distance import cdist
    from scipy.stats import chisquare

    rng = np.random.default_rng(0)
    values, codes = rng.normal(size=(60, 3)), rng.integers(0, 2, 60)
    values[codes == 1] += 0.7
    distance = cdist(values, values)
    np.fill_diagonal(distance, np.inf)
    accepted = []
    for row in distance:
        near = codes[np.argsort(row)[:10]]
        expected = 10 * np.bincount(codes) / 60
        accepted.append(chisquare(np.bincount(near, minlength=2), expected).pvalue >= 0.05)
    assert kbet_acceptance(values, codes, neighbours=10) == pytest.approx(np.mean(accepted))


def test_compact_labels_have_a_high_silhouette():
    rng = np.random.default_rng(0)
    label, batch = pd.Series(np.tile([0, 1], 50)), pd.Series(np.repeat(["a", "b"], 50))
    values = rng.normal(size=(100, 4)) + 6 * np.array(label)[:, None]
    table = batch_effects(Features("x", values, "euclidean"), batch, label=label).set_index("measure")
    assert table.loc["label silhouette", "value"] > 0.8


def test_one_batch_is_an_error():
    with pytest.raises(MetadataError, match="1 batches, 1 of them"):
        batch_effects(Features("x", np.zeros((4, 2))), pd.Series(["a"] * 4))


def test_lisi_of_few_rows_is_nan():
    values = np.random.default_rng(0).normal(size=(5, 3))
    table = batch_effects(Features("x", values, "euclidean"), pd.Series(list("aabba"))).set_index("measure")
    assert np.isnan(table.loc["batch LISI", "value"])
    assert np.isfinite(table.loc["batch silhouette", "value"])
