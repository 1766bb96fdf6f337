"""Each normalisation fulfils its definition on its reference rows."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from profile_tables import make_profiles

from cellvim.errors import CellvimWarning, InputError, MetadataError
from cellvim.profiles import find_columns, harmony, pca, robust_mad, spherize, standardize, tvn


def _controls(adata, plate: str | None = None) -> np.ndarray:
    rows = (adata.obs["Metadata_pert_type"] == "negcon").to_numpy()
    return rows if plate is None else rows & (adata.obs["Metadata_Plate"] == plate).to_numpy()


def _covariance(values: np.ndarray) -> np.ndarray:
    return np.cov(values.astype(np.float64), rowvar=False)


def _record(adata, key: str) -> dict:
    return adata.uns["cellvim"]["profile"][key]


def test_robust_mad_centres_and_scales_each_plate_on_its_controls():
    adata = make_profiles()
    before = adata.X.copy()
    robust_mad(adata)
    for plate in ("P0", "P1", "P2"):
        controls = adata.layers["robustmad"][_controls(adata, plate)]
        np.testing.assert_allclose(np.median(controls, axis=0), 0, atol=1e-6)
        deviation = np.median(np.abs(controls - np.median(controls, axis=0)), axis=0)
        np.testing.assert_allclose(1.4826 * deviation, 1, rtol=1e-5)
    np.testing.assert_array_equal(adata.X, before)
    assert adata.layers["robustmad"].dtype == np.float32
    assert adata.uns["cellvim"]["profile"]["latest"] == "robustmad"


def test_standardize_centres_and_scales():
    adata = make_profiles()
    standardize(adata, fit_on="all", per="all")
    np.testing.assert_allclose(adata.layers["standardized"].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(adata.layers["standardized"].std(axis=0), 1, rtol=1e-5)


@pytest.mark.parametrize(("method", "ours"), [("mad_robustize", robust_mad), ("standardize", standardize)])
def test_scaling_equals_pycytominer(method, ours):
    import pycytominer

    adata = make_profiles(plates=1)
    ours(adata, key="ours")
    features = list(adata.var_names)
    table = pd.concat([adata.obs.astype(str), adata.to_df().astype(float)], axis=1).reset_index(drop=True)
    expected = pycytominer.normalize(
        table,
        features=features,
        meta_features=[c for c in table if c not in features],
        samples="Metadata_pert_type == 'negcon'",
        method=method,
    )
    np.testing.assert_allclose(adata.layers["ours"], expected[features], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("function", "key"), [(robust_mad, "robustmad"), (standardize, "standardized")])
def test_fitted_parameters_reproduce_the_result(function, key):
    adata = make_profiles()
    function(adata, per="batch")
    record = _record(adata, key)
    assert json.loads(record["settings"])["fit_on"] == "negcon"
    assert record["groups"].tolist() == ["B0", "B1", "B2"]
    group = adata.obs["Metadata_Batch"].str[1:].astype(int).to_numpy()
    again = (adata.X - record["center"][group]) / record["scale"][group]
    np.testing.assert_allclose(adata.layers[key], again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ZCA", "PCA", "ZCA-cor", "PCA-cor"])
def test_spherized_controls_have_covariance_one(method):
    adata = make_profiles(plate_effect=0.3)
    spherize(adata, method=method)
    # epsilon, 1e-6 on singular values of about 8, and float32 results
    np.testing.assert_allclose(_covariance(adata.layers["spherized"][_controls(adata)]), np.eye(8), atol=1e-5)
    record = _record(adata, "spherized")
    again = (adata.X - record["center"][0]) / record["scale"][0] @ record["transform"][0]
    np.testing.assert_allclose(adata.layers["spherized"], again, atol=1e-4)


def test_spherizing_by_plate_fits_each_plate():
    adata = make_profiles(plate_effect=5)
    spherize(adata, per="plate")
    for plate in ("P0", "P1", "P2"):
        controls = adata.layers["spherized"][_controls(adata, plate)]
        np.testing.assert_allclose(_covariance(controls), np.eye(8), atol=1e-5)
        np.testing.assert_allclose(controls.mean(axis=0), 0, atol=1e-5)


def test_spherizing_with_few_controls_is_warned_of_and_white_where_they_vary():
    adata = make_profiles(plates=1, controls=6)
    with pytest.warns(CellvimWarning, match="8 features on 6 rows.*5 directions"):
        spherize(adata)
    values = np.linalg.eigvalsh(_covariance(adata.layers["spherized"][_controls(adata)]))
    np.testing.assert_allclose(np.sort(values), [0, 0, 0, 1, 1, 1, 1, 1], atol=1e-4)


def test_tvn_whitens_all_controls_and_aligns_batches():
    adata = make_profiles(plates=3, controls=40, plate_effect=4)
    stretch = np.array([1, 3, 0.3])[adata.obs["Metadata_Plate"].str[1:].astype(int)]
    adata.X[:, 0] *= stretch  # a batch effect on the covariance
    tvn(adata, per="all", key="white")
    np.testing.assert_allclose(_covariance(adata.obsm["X_white"][_controls(adata)]), np.eye(8), atol=1e-5)
    tvn(adata, shrinkage=0)
    for plate in ("P0", "P1", "P2"):  # without shrinkage each batch's controls are white themselves
        controls = adata.obsm["X_tvn"][_controls(adata, plate)]
        np.testing.assert_allclose(controls.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(_covariance(controls), np.eye(8), atol=1e-4)
    tvn(adata, shrinkage=1.0)
    spread = [_covariance(adata.obsm["X_tvn"][_controls(adata, p)]) for p in ("P0", "P1", "P2")]
    apart = max(np.abs(c - np.eye(8)).max() for c in spread)
    tvn(adata, shrinkage=1e6)  # no alignment of covariances
    spread = [_covariance(adata.obsm["X_tvn"][_controls(adata, p)]) for p in ("P0", "P1", "P2")]
    assert apart < max(np.abs(c - np.eye(8)).max() for c in spread)


def test_tvn_is_coral():
    """The alignment against the published formula: source^(-1/2) target^(1/2), both plus the identity."""
    from scipy.linalg import sqrtm

    adata = make_profiles(plates=2, controls=40)
    tvn(adata)
    record = _record(adata, "tvn")
    group = adata.obs["Metadata_Plate"].str[1:].astype(int).to_numpy()
    white = (adata.X - record["center"][group]) @ record["components"]
    for plate in (0, 1):
        source = _covariance(white[_controls(adata, f"P{plate}")]) + np.eye(8)
        target = 2 * np.eye(8)  # the covariance of all controls, which is the identity, plus the identity
        expected = white[group == plate] @ np.linalg.inv(sqrtm(source)).real @ sqrtm(target).real
        np.testing.assert_allclose(adata.obsm["X_tvn"][group == plate], expected, atol=1e-4)


def test_tvn_works_with_fewer_controls_than_features():
    adata = make_profiles(plates=2, controls=4)
    tvn(adata)
    assert adata.obsm["X_tvn"].shape == (adata.n_obs, 6)  # 8 controls less the mean of each of 2 batches
    with pytest.raises(InputError, match="1 to 6 components"):
        tvn(adata, n_components=7)


def test_principal_components_are_uncorrelated_and_ordered():
    adata = make_profiles()
    pca(adata, n_components=5)
    covariance = _covariance(adata.obsm["X_pca"])
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-5)
    assert (np.diff(np.diag(covariance)) < 0).all()
    record = _record(adata, "pca")
    np.testing.assert_allclose(adata.obsm["X_pca"], (adata.X - record["mean"]) @ record["components"].T, atol=1e-5)


def test_harmony_aligns_batches_and_preserves_common_structure():
    adata = make_profiles(plate_effect=0.5, effect=8)  # harmonypy corrects little if batches are far apart
    harmony(adata)

    def between(values):  # share of the controls' variance that is between plates
        controls = [values[_controls(adata, p)] for p in ("P0", "P1", "P2")]
        means = np.stack([c.mean(axis=0) for c in controls])
        return means.var(axis=0).sum() / np.concatenate(controls).var(axis=0).sum()

    assert between(adata.obsm["X_harmony"]) < between(adata.obsm["X_pca"]) / 3
    moved = adata.obsm["X_harmony"] - adata.obsm["X_pca"]
    assert np.abs(moved).max() < 2  # compounds, 8 apart, stay apart
    assert _record(adata, "harmony")["shift"].shape == (3, 8)
    again = make_profiles(plate_effect=0.5, effect=8)
    harmony(again)
    np.testing.assert_array_equal(adata.obsm["X_harmony"], again.obsm["X_harmony"])  # the same seed
    with pytest.raises(InputError, match="only one batch"):
        harmony(make_profiles(plates=1))


def test_error_without_controls():
    adata = make_profiles()
    adata.obs["Metadata_pert_type"] = "trt"
    with pytest.raises(MetadataError, match=r"never 'negcon'.*trt.*--control COLUMN:VALUE.*--fit-on all"):
        robust_mad(adata)
    del adata.obs["Metadata_pert_type"]
    with pytest.raises(MetadataError, match=r"No column of controls.*Metadata_Plate.*--fit-on all"):
        robust_mad(adata)
    robust_mad(adata, fit_on="all")


def test_error_for_a_plate_with_one_control():
    adata = make_profiles()
    kept = ~_controls(adata, "P1")
    kept[np.flatnonzero(_controls(adata, "P1"))[0]] = True
    adata = adata[kept].copy()
    for function in (robust_mad, standardize):
        with pytest.raises(MetadataError, match=r"1 of 3 groups: P1 \(1\)"):
            function(adata)
        function(adata, per="all")


@pytest.mark.parametrize(("function", "key"), [(robust_mad, "robustmad"), (standardize, "standardized")])
def test_constant_features_are_centred_with_a_warning(function, key):
    adata = make_profiles()
    adata.X[:, 3] = 7
    with pytest.warns(CellvimWarning, match="1 of 8 features are constant.*emb_0003"):
        function(adata)
    assert (adata.layers[key][:, 3] == 0).all()


def test_features_with_nan_are_omitted_if_necessary_with_a_warning():
    adata = make_profiles()
    adata.X[0, 2] = np.nan
    robust_mad(adata)
    assert np.isnan(adata.layers["robustmad"]).sum() == 1
    with pytest.warns(CellvimWarning, match="TVN: 1 of 8 features.*emb_0002"):
        tvn(adata)
    assert adata.obsm["X_tvn"].shape[1] == 7
    with pytest.warns(CellvimWarning, match="Sphering: 1 of 8 features"):
        spherize(adata)
    assert adata.obsm["X_spherized"].shape[1] == 7  # fewer features than X, so not a layer
    assert "spherized" not in adata.layers
    adata.X[:] = np.nan
    with pytest.raises(MetadataError, match="Every feature has values that are not finite"):
        pca(adata)


def test_linearly_dependent_features_cannot_be_spherized():
    adata = make_profiles()
    adata.X[:, 3] = adata.X[:, 4] + adata.X[:, 5]
    with pytest.raises(InputError, match=r"not possible: 8 features, but only 7 .*--select-features"):
        spherize(adata)


def test_controls_are_found_by_another_column_and_as_numbers():
    adata = make_profiles()
    adata.obs["control"] = np.where(_controls(adata), -1.0, 0.0)
    robust_mad(adata, columns=find_columns(adata.obs, negative="control:-1"))
    assert np.abs(np.median(adata.layers["robustmad"][_controls(adata, "P0")], axis=0)).max() < 1e-6
