"""From embeddings to files of profiles, and invalid inputs."""

from __future__ import annotations

import numpy as np
import pytest
from profile_tables import make_cells, make_profiles

from cellvim.errors import CellvimError, InputError, MetadataError, OutputError
from cellvim.profiles import aggregate, profile, read_profiles, robust_mad


@pytest.mark.parametrize("suffix", [".zarr", ".h5ad"])
def test_round_trip_through_a_file(tmp_path, suffix):
    made = profile(
        make_profiles(controls=20),
        tmp_path / f"profiles{suffix}",
        statistic=None,
        normalize=["robustmad", "standardize", "spherize", "tvn", "pca", "harmony"],
    )
    found = read_profiles(tmp_path / f"profiles{suffix}")
    assert set(found.layers) == {"robustmad", "standardized", "spherized"}
    assert set(found.obsm) == {"X_tvn", "X_pca", "X_harmony"}
    for name in found.layers:
        np.testing.assert_array_equal(found.layers[name], made.layers[name])
    record = found.uns["cellvim"]["profile"]
    assert record["latest"] == "X_harmony"
    np.testing.assert_array_equal(record["robustmad"]["center"], made.uns["cellvim"]["profile"]["robustmad"]["center"])
    assert [p.name for p in tmp_path.iterdir()] == [f"profiles{suffix}"]  # no temporary files


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".csv.gz", ".tsv"])
def test_tables_contain_the_latest_representation(tmp_path, suffix):
    made = profile(make_cells(), tmp_path / f"profiles{suffix}")
    found = read_profiles(tmp_path / f"profiles{suffix}")
    np.testing.assert_allclose(found.X, made.layers["robustmad"], rtol=1e-6)
    assert found.obs_names.tolist() == made.obs_names.tolist()
    assert list(found.var_names) == list(made.var_names)
    again = profile(tmp_path / f"profiles{suffix}", statistic=None, normalize=["standardize"])
    assert again.layers["standardized"].shape == made.shape


def test_several_files_are_combined(tmp_path):
    cells = make_cells()
    parts = [cells[(cells.obs["Metadata_Plate"] == p).to_numpy()].copy() for p in ("P1", "P0")]
    parts[0].write_h5ad(tmp_path / "one.h5ad")
    parts[1].write_zarr(tmp_path / "two.zarr")
    joined = profile([tmp_path / "one.h5ad", tmp_path / "two.zarr"])
    whole = profile(cells)
    np.testing.assert_array_equal(joined[whole.obs_names].layers["robustmad"], whole.layers["robustmad"])
    assert joined.uns["cellvim"]["profile"]["aggregate"]["rows"] == cells.n_obs
    np.testing.assert_array_equal(profile(tmp_path).layers["robustmad"], joined.layers["robustmad"])  # a folder of them
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="contains no embeddings"):
        profile(tmp_path / "nothing")


def test_incompatible_plates_raise_errors():
    cells = make_cells()
    with pytest.raises(MetadataError, match="10 wells are in more than one input: P0__A01"):
        profile([cells, cells])
    other = make_cells(width=5)
    with pytest.raises(InputError, match="has 5 features and an AnnData 6"):
        profile([cells, other])
    first, second = make_cells(), make_cells()
    first.uns["cellvim"], second.uns["cellvim"] = ({"weights": {"sha256": s * 20}} for s in "ab")
    with pytest.raises(InputError, match="different weights"):
        profile([first, second])


def test_input_of_a_step_can_be_named():
    adata = profile(make_profiles(), statistic=None, normalize=["robustmad", "spherize@X", "pca@robustmad"])
    alone = profile(make_profiles(), statistic=None, normalize=["spherize"])
    np.testing.assert_array_equal(adata.layers["spherized"], alone.layers["spherized"])
    with pytest.raises(MetadataError, match=r"no representation 'nope'.* X"):
        profile(make_profiles(), statistic=None, normalize=["pca@nope"])


def test_features_are_selected_after_scaling():
    adata = make_profiles()
    adata.X[:, 1] = adata.X[:, 0] * 2 + 0.001 * adata.X[:, 2]
    found = profile(adata, statistic=None, select=True)
    assert found.n_vars == 7
    assert found.layers["robustmad"].shape[1] == 7
    with pytest.raises(InputError, match="after robustmad or standardize"):
        profile(adata, statistic=None, normalize=["tvn"], select=True)


def test_the_input_is_not_changed():
    adata = make_profiles()
    profile(adata, statistic=None)
    assert not adata.layers
    assert not adata.uns


def test_existing_files_are_not_overwritten(tmp_path):
    path = tmp_path / "profiles.h5ad"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        profile(make_profiles(), path, statistic=None)
    assert path.read_text() == "mine"
    profile(make_profiles(), path, statistic=None, overwrite=True)
    assert read_profiles(path).n_obs
    with pytest.raises(OutputError, match=r"folder .*nowhere"):
        profile(make_profiles(), tmp_path / "nowhere" / "p.h5ad", statistic=None)
    with pytest.raises(InputError, match="is not supported"):
        profile(make_profiles(), tmp_path / "p.xlsx", statistic=None)


@pytest.mark.parametrize("normalize", [["robust"], ["tvn", ""]])
def test_unknown_methods_fail_early(normalize):
    with pytest.raises(InputError, match="no normalisation"):
        profile("does_not_exist.zarr", normalize=normalize)


def test_zero_rows_are_an_error():
    for source in (make_profiles()[:0], make_cells()[:0]):
        for statistic in (None, "mean"):
            with pytest.raises(CellvimError, match="no rows"):
                profile(source, statistic=statistic)


def test_aggregation_keeps_the_record_of_the_embedding():
    cells = make_cells()
    cells.uns["cellvim"] = {"model": {"name": "m"}, "weights": {"sha256": "0"}}
    wells = aggregate(cells)
    robust_mad(wells, fit_on="all")
    assert wells.uns["cellvim"]["model"]["name"] == "m"
    assert "profile" not in cells.uns["cellvim"]


@pytest.mark.parametrize("suffix", [".zarr", ".h5ad", ".parquet"])
def test_files_without_a_suffix_are_recognised_by_content(tmp_path, suffix):
    named, plain = tmp_path / f"profiles{suffix}", tmp_path / "results"
    made = profile(make_cells(), named)
    named.rename(plain)
    assert list(read_profiles(plain).obs["Metadata_Well"]) == list(made.obs["Metadata_Well"])
    assert profile(plain, statistic=None, normalize=["standardize"]).n_obs == made.n_obs


def test_unsupported_files_raise_an_error(tmp_path):
    (tmp_path / "results").write_text("no embeddings")
    with pytest.raises(InputError, match="is not supported"):
        read_profiles(tmp_path / "results")
