"""Z′, activity and dose response equal their definitions; noise is not separated."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from profile_tables import make_profiles

from cellvim.errors import InputError, MetadataError
from cellvim.evaluate.assay import activity_scores, assay_quality, distance_scores
from cellvim.evaluate.dose_response import dose_response, fit_logistic, logistic
from cellvim.evaluate.features import Features
from cellvim.profiles import find_columns


def _features(adata) -> Features:
    return Features("X", np.asarray(adata.X, dtype=np.float64))


def test_z_prime_of_one_feature_equals_the_textbook():
    """With one feature the line through the controls is the feature itself, up to its scale."""
    rng = np.random.default_rng(0)
    values = np.r_[rng.normal(0, 1, 20), rng.normal(12, 1.5, 10)]
    kinds = np.repeat(["negcon", "poscon"], [20, 10])
    obs = pd.DataFrame({"Metadata_pert_type": kinds, "Metadata_Plate": "P"})
    table = assay_quality(activity_scores(Features("x", values[:, None]), obs, find_columns(obs)))
    low, high = values[:20], values[20:]
    expected = 1 - 3 * (low.std(ddof=1) + high.std(ddof=1)) / abs(high.mean() - low.mean())
    # each control is projected onto the line of the others, which differs slightly
    assert table["z_prime"].item() == pytest.approx(expected, abs=0.05)
    assert table[["n_negative", "n_positive"]].to_numpy().tolist() == [[20, 10]]


def test_many_features_do_not_separate_controls_by_chance():
    """A line through all controls, of 5,000 features of noise, would give them a Z′ near 1."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 5000))
    obs = pd.DataFrame({"Metadata_pert_type": np.repeat(["negcon", "poscon"], 20), "Metadata_Plate": "P"})
    table = assay_quality(activity_scores(Features("noise", values), obs, find_columns(obs)))
    assert not table["z_prime"].item() > 0
    direction = values[20:].mean(0) - values[:20].mean(0)
    naive = values @ direction
    low, high = naive[:20], naive[20:]
    assert 1 - 3 * (low.std(ddof=1) + high.std(ddof=1)) / (high.mean() - low.mean()) > 0.5  # without leaving one out


def test_activity_is_0_at_negative_and_1_at_positive_controls_of_every_plate():
    adata = make_profiles(positives=8, plate_effect=10, effect=8)
    scores = activity_scores(_features(adata), adata.obs, find_columns(adata.obs))
    means = scores.groupby(["plate", "kind"])["activity"].mean()
    for plate in ("P0", "P1", "P2"):
        assert means[plate, "negative"] == pytest.approx(0, abs=0.02)  # each on the line of the others
        assert means[plate, "positive"] == pytest.approx(1, abs=0.02)
    assert scores.index.equals(adata.obs.index)


def test_a_well_halfway_between_the_controls_scores_one_half():
    rng = np.random.default_rng(0)
    values = np.r_[rng.normal(0, 1, (5, 3)), rng.normal(9, 1, (4, 3))]
    middle = (values[:5].mean(0) + values[5:].mean(0)) / 2
    aside = np.cross(values[5:].mean(0) - values[:5].mean(0), [1.0, 0, 0])  # at right angles to the line
    kinds = ["negcon"] * 5 + ["poscon"] * 4 + ["trt"] * 2
    obs = pd.DataFrame({"Metadata_pert_type": kinds, "Metadata_Plate": "P"})
    scores = activity_scores(Features("x", np.r_[values, [middle, middle + aside]]), obs, find_columns(obs))
    np.testing.assert_allclose(scores["activity"][-2:], 0.5)


def test_controls_are_projected_onto_the_line_of_the_others():
    adata = make_profiles(plates=1, positives=5, controls=6)
    found = activity_scores(_features(adata), adata.obs, find_columns(adata.obs))["activity"].to_numpy()
    X, kind = np.asarray(adata.X, float), adata.obs["Metadata_pert_type"].to_numpy()
    for row in np.flatnonzero(kind != "trt"):
        others = np.arange(len(X)) != row
        low, high = (X[others & (kind == k)].mean(0) for k in ("negcon", "poscon"))
        assert found[row] == pytest.approx((X[row] - low) @ (high - low) / ((high - low) ** 2).sum())


def test_a_plate_without_positive_controls_has_no_scores():
    adata = make_profiles(positives=4)
    kept = ~((adata.obs["Metadata_Plate"] == "P1") & (adata.obs["Metadata_pert_type"] == "poscon"))
    adata = adata[kept.to_numpy()].copy()
    scores = activity_scores(_features(adata), adata.obs, find_columns(adata.obs))
    assert scores["activity"].isna().tolist() == (scores["plate"] == "P1").tolist()
    assert assay_quality(scores).set_index("plate")["z_prime"].isna().to_dict() == {
        "P0": False,
        "P1": True,
        "P2": False,
    }
    with pytest.raises(MetadataError, match="No row is a positive control"):
        activity_scores(_features(adata), adata.obs, find_columns(adata.obs, positive="pc"))


def test_distances_are_relative_to_the_spread_of_the_controls():
    adata = make_profiles(effect=10, plate_effect=5, controls=60)
    scores = distance_scores(_features(adata), adata.obs, find_columns(adata.obs))["activity"]
    control = (adata.obs["Metadata_pert_type"] == "negcon").to_numpy()
    assert abs(np.median(scores[control])) < 0.3
    assert np.median(scores[~control]) > 5


@pytest.mark.parametrize(
    "parameters", [(0.0, 1.0, 3.0, 1.0), (1.0, 0.1, 0.5, 2.5), (0.2, 0.9, 30.0, 4.0)], ids=["up", "down", "late"]
)
def test_fit_recovers_the_curve(parameters):
    dose = np.repeat(np.geomspace(0.05, 200, 10), 3)
    response = logistic(dose, *parameters) + np.random.default_rng(0).normal(0, 0.01, len(dose))
    found, error = fit_logistic(dose, response)
    np.testing.assert_allclose(found[:2], parameters[:2], atol=0.03)
    assert np.log10(found[2]) == pytest.approx(np.log10(parameters[2]), abs=4 * error)
    assert 0 < error < 0.05


def test_logistic_equals_its_formula():
    dose = np.array([0, 0.5, 1, 2, 1e9])
    np.testing.assert_allclose(logistic(dose, 0.2, 0.8, 1.0, 2.0)[1:4], 0.2 + 0.6 / (1 + (1 / dose[1:4]) ** 2))
    assert logistic(dose, 0.2, 0.8, 1.0, 2.0)[[0, 4]].tolist() == pytest.approx([0.2, 0.8])


def test_curves_and_remarks():
    adata = make_profiles(compounds=4, doses=(1.0, 2.0, 3.0, 4.0, 5.0), positives=8, effect=10, plate_effect=0)
    few = (adata.obs["Metadata_Compound"] == "compound 2") & (adata.obs["Metadata_Dose"] > 3)
    adata = adata[~few.to_numpy()].copy()
    scores = distance_scores(_features(adata), adata.obs, find_columns(adata.obs))
    scores.loc[(adata.obs["Metadata_Compound"] == "compound 3").to_numpy(), "activity"] = 0.5
    curves, points = dose_response(scores, adata.obs, find_columns(adata.obs, positive="none"))
    curves = curves.set_index("perturbation")
    for name in ("compound 0", "compound 1"):
        assert curves.loc[name, "p_value"] < 1e-4
        assert curves.loc[name, "spearman"] > 0.8
    assert "3 doses above 0" in curves.loc["compound 2", "remark"]
    assert "same at every dose" in curves.loc["compound 3", "remark"]
    assert (points[points["perturbation"] == "compound 0"]["n_wells"] == 6).all()


def test_invalid_doses_raise_errors():
    adata = make_profiles(positives=4)
    scores = distance_scores(_features(adata), adata.obs, find_columns(adata.obs))
    with pytest.raises(MetadataError, match="No perturbation has 4 doses above 0"):
        dose_response(scores, adata.obs, find_columns(adata.obs))
    obs = adata.obs.drop(columns="Metadata_Dose")
    with pytest.raises(MetadataError, match=r"No column of the dose.*--dose"):
        dose_response(scores, obs, find_columns(obs))
    obs = adata.obs.assign(Metadata_Dose="high")
    with pytest.raises(MetadataError, match="No treated row has a dose in 'Metadata_Dose'"):
        dose_response(scores, obs, find_columns(obs))
    with pytest.raises(InputError, match="3 doses above 0"):
        fit_logistic(np.array([0, 1.0, 2, 3]), np.arange(4.0))
