"""Retrieval equals copairs; ties and single replicates are not significant."""

from __future__ import annotations

import numpy as np
import pytest
from profile_tables import make_profiles

from cellvim.errors import MetadataError
from cellvim.evaluate.consistency import mean_similarity, random_subsets, replicate_consistency
from cellvim.evaluate.features import Features, feature_sets
from cellvim.evaluate.retrieval import replicate_map
from cellvim.profiles import find_columns


def _features(adata, distance="cosine") -> Features:
    return Features("X", np.asarray(adata.X, dtype=np.float64), distance)


def test_mean_average_precision_equals_copairs():
    from copairs import map as copairs_map
    from copairs.matching import assign_reference_index

    adata = make_profiles(effect=2)
    found = replicate_map(_features(adata), adata.obs, find_columns(adata.obs), null_size=500, seed=3)

    meta = adata.obs.astype(str).reset_index(drop=True)
    meta = assign_reference_index(meta, "Metadata_pert_type == 'negcon'", reference_col="reference", default_value=-1)
    pairs = {
        "pos_sameby": ["Metadata_Compound", "Metadata_Dose", "reference"],
        "pos_diffby": [],
        "neg_sameby": ["Metadata_Plate"],
        "neg_diffby": ["Metadata_Compound", "reference"],
    }
    precision = copairs_map.average_precision(meta, np.asarray(adata.X, dtype=np.float64), progress_bar=False, **pairs)
    precision = precision[precision["Metadata_pert_type"] != "negcon"]
    expected = copairs_map.mean_average_precision(
        precision, ["Metadata_Compound"], null_size=500, threshold=0.05, seed=3, progress_bar=False
    ).set_index("Metadata_Compound")
    found = found.set_index("Metadata_Compound")
    assert set(found.index) == set(expected.index)
    for column in ("mean_average_precision", "mean_normalized_average_precision", "p_value", "corrected_p_value"):
        np.testing.assert_allclose(found[column], expected.loc[found.index, column], rtol=1e-12)
    assert found["active"].tolist() == expected.loc[found.index, "below_corrected_p"].tolist()
    assert (found["n_replicates"] == 6).all()


def test_only_effects_are_significant():
    for effect, active in ((6, 1.0), (0, 0.0)):
        adata = make_profiles(effect=effect, plate_effect=0)
        table = replicate_map(_features(adata), adata.obs, find_columns(adata.obs), null_size=1000)
        assert table["active"].mean() == active


def test_doses_are_separate_treatments():
    adata = make_profiles(doses=(1.0, 3.0))
    table = replicate_map(_features(adata), adata.obs, find_columns(adata.obs), null_size=100)
    assert len(table) == 12
    assert set(table["Metadata_Dose"]) == {1.0, 3.0}
    together = replicate_map(
        _features(adata), adata.obs.drop(columns="Metadata_Dose"), find_columns(adata.obs.drop(columns="Metadata_Dose"))
    )
    assert len(together) == 6


def test_equal_cell_counts_are_not_significant():
    """copairs ranks replicates before controls among ties; all cell counts are equal here."""
    adata = make_profiles()
    adata.obs["Metadata_Object_Count"] = 100
    sets, _ = feature_sets(adata, ["X"])
    count = next(f for f in sets if f.name == "cell count")
    table = replicate_map(count, adata.obs, find_columns(adata.obs), null_size=1000)
    assert not table["active"].any()
    assert table["mean_normalized_average_precision"].mean() < 0.3
    tied = Features("tied", np.full((adata.n_obs, 1), 100.0), "euclidean")
    assert replicate_map(tied, adata.obs, find_columns(adata.obs), null_size=100)["mean_average_precision"].min() == 1


def test_missing_columns_and_replicates_raise_errors():
    adata = make_profiles()
    with pytest.raises(MetadataError, match=r"No column of the perturbation.*Metadata_Well.*--perturbation"):
        obs = adata.obs.drop(columns="Metadata_Compound")
        replicate_map(_features(adata), obs, find_columns(obs))
    with pytest.raises(MetadataError, match="never 'negcon'"):
        obs = adata.obs.assign(Metadata_pert_type="trt")
        replicate_map(_features(adata), obs, find_columns(obs))
    single = make_profiles(plates=1, replicates=1)
    for function in (replicate_map, replicate_consistency):
        with pytest.raises(MetadataError, match="two replicates"):
            function(_features(single), single.obs, find_columns(single.obs))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_similarity_is_the_mean_over_all_pairs(distance):
    from scipy.spatial.distance import pdist

    values = np.random.default_rng(0).normal(size=(3, 5, 4))
    metric = {"cosine": lambda v: 1 - pdist(v, "cosine"), "euclidean": lambda v: -pdist(v, "sqeuclidean")}[distance]
    np.testing.assert_allclose(mean_similarity(values, distance), [metric(v).mean() for v in values])


def test_only_similar_replicates_are_consistent():
    strong = make_profiles(effect=6, plate_effect=0)
    table = replicate_consistency(_features(strong), strong.obs, find_columns(strong.obs), null_size=1000)
    assert table["consistent"].all()
    none = make_profiles(effect=0, plate_effect=0)
    table = replicate_consistency(_features(none), none.obs, find_columns(none.obs), null_size=1000)
    assert not table["consistent"].any()
    assert 0.2 < table["p_value"].mean() < 0.8


@pytest.mark.parametrize(("n", "m"), [(6, 4), (100, 3)])
def test_random_subsets_are_distinct_and_uniform(n, m):
    draws = np.concatenate(list(random_subsets(np.random.default_rng(0), n, m, 3000, width=2)))
    assert draws.shape == (3000, m)
    assert (np.diff(np.sort(draws, axis=1), axis=1) > 0).all()
    counts = np.bincount(draws.ravel(), minlength=n)
    expected = 3000 * m / n
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)  # five standard deviations
