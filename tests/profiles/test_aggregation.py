"""Aggregation equals pandas and scipy, for all kinds of files and chunk sizes."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats
from profile_tables import make_cells

from cellvim.errors import CellvimWarning, InputError, MetadataError
from cellvim.profiles import aggregate, aggregation

WELL = ["Metadata_Plate", "Metadata_Well"]
DEFINITIONS = {
    "mean": lambda x: x.mean(axis=0),
    "median": lambda x: np.median(x, axis=0),
    "robust": lambda x: scipy.stats.trim_mean(x, 0.1, axis=0),
}


def _expected(cells: anndata.AnnData, statistic: str) -> np.ndarray:
    X = np.asarray(cells.X, dtype=np.float64)
    groups = cells.obs.reset_index(drop=True).groupby(WELL, observed=True).indices
    return np.stack([DEFINITIONS[statistic](X[groups[key]]) for key in sorted(groups)])


@pytest.mark.parametrize("statistic", ["mean", "median", "robust"])
@pytest.mark.parametrize("order", ["by well", "shuffled"])
def test_profiles_equal_their_definition(statistic, order, monkeypatch):
    monkeypatch.setattr(aggregation, "CHUNK_BYTES", 8 * 6 * 7)  # 7 rows at once: wells span chunks
    monkeypatch.setattr(aggregation, "WELLS_BYTES", 8 * 6 * 40)  # two wells at once
    cells = make_cells()
    if order == "shuffled":
        cells = cells[np.random.default_rng(1).permutation(cells.n_obs)].copy()
    wells = aggregate(cells, statistic=statistic)
    # float32 result of a float64 computation
    np.testing.assert_allclose(wells.X, _expected(cells, statistic), rtol=0, atol=1e-6)
    assert wells.X.dtype == np.float32
    assert wells.obs_names[:2].tolist() == ["P0__A01", "P0__A02"]
    assert list(wells.var_names) == list(cells.var_names)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_stored_and_in_memory_results_are_equal(statistic, tmp_path):
    cells = make_cells()
    cells.obsm["X_emb_DNA"] = cells.X[:, :2] * 2
    expected = aggregate(cells, statistic=statistic)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    cells.write_zarr(tmp_path / "cells.zarr")
    sparse = cells.copy()
    sparse.X = scipy.sparse.csr_matrix(sparse.X)
    sparse.write_h5ad(tmp_path / "sparse.h5ad")
    for source in ("cells.h5ad", "cells.zarr", "sparse.h5ad"):
        found = aggregate(tmp_path / source, statistic=statistic)
        np.testing.assert_array_equal(found.X, expected.X)
        np.testing.assert_array_equal(found.obsm["X_emb_DNA"], expected.obsm["X_emb_DNA"])
        pd.testing.assert_frame_equal(found.obs, expected.obs)
    np.testing.assert_allclose(expected.obsm["X_emb_DNA"], expected.X[:, :2] * 2, rtol=1e-6)


def test_a_backed_anndata_is_read_by_rows(tmp_path):
    cells = make_cells()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    np.testing.assert_array_equal(aggregate(backed).X, aggregate(cells).X)


def test_aggregation_equals_pycytominer(tmp_path):
    import pycytominer

    cells = make_cells()
    table = pd.concat(
        [cells.obs[WELL].astype(str).reset_index(drop=True), cells.to_df().reset_index(drop=True)], axis=1
    )
    for statistic in ("mean", "median"):
        expected = pycytominer.aggregate(table, strata=WELL, features=list(cells.var_names), operation=statistic)
        found = aggregate(cells, statistic=statistic)
        np.testing.assert_allclose(found.X, expected[list(cells.var_names)], rtol=0, atol=1e-6)


def test_columns_of_wells_are_kept():
    cells = make_cells()
    obs = aggregate(cells).obs
    groups = cells.obs.groupby(WELL, observed=True)
    assert obs["Metadata_Object_Count"].tolist() == groups.size().tolist()
    assert obs["compound"].isna().tolist() == [w == "A02" for w in obs["Metadata_Well"]]
    assert obs.loc["P1__A03", "compound"] == "compound A03"
    assert obs["dose"].tolist() == [1, 2, 3, 4, 5] * 2
    np.testing.assert_allclose(obs["area_um2"], groups["area_um2"].mean())
    np.testing.assert_allclose(obs["touches_border"], groups["touches_border"].mean())  # share of cells
    assert not {"Metadata_Site", "Metadata_ObjectNumber"} & set(obs.columns)  # identifiers are not averaged


def test_values_that_are_not_finite_are_ignored_with_a_warning():
    cells = make_cells()
    cells.X[0, 0], cells.X[1, 0], cells.X[3, 2] = np.nan, np.inf, -np.inf
    X = np.where(np.isfinite(cells.X), cells.X, np.nan).astype(np.float64)
    first = (cells.obs["Metadata_Plate"] == "P0") & (cells.obs["Metadata_Well"] == "A01")
    for statistic, definition in (("mean", np.nanmean), ("median", np.nanmedian)):
        with pytest.warns(CellvimWarning, match="3 values of the AnnData are not finite"):
            wells = aggregate(cells, statistic=statistic)
        np.testing.assert_allclose(wells.X[0], definition(X[first], axis=0), rtol=0, atol=1e-6)
        assert np.isfinite(wells.X).all()


def test_a_well_without_any_finite_value_has_nan():
    cells = make_cells()
    cells.X[(cells.obs["Metadata_Well"] == "A01").to_numpy(), 1] = np.nan
    for statistic in ("mean", "median", "robust"):
        with pytest.warns(CellvimWarning, match="not finite"):
            wells = aggregate(cells, statistic=statistic)
        assert np.isnan(wells.X[:, 1]).tolist() == [w == "A01" for w in wells.obs["Metadata_Well"]]


def test_wells_with_few_cells_are_omitted_with_a_warning():
    with pytest.warns(CellvimWarning, match="4 wells have fewer than 15 cells.*P0__A04"):
        wells = aggregate(make_cells(), min_cells=15)
    assert wells.obs["Metadata_Well"].unique().tolist() == ["A01", "A02", "A03"]
    assert list(wells.uns["cellvim"]["profile"]["aggregate"]["wells_left_out"]) == [
        f"{p}__{w}" for p in ("P0", "P1") for w in ("A04", "A05")
    ]
    with pytest.raises(InputError, match=r"No well .* has 99 cells.* 23"):
        aggregate(make_cells(), min_cells=99)


def test_aggregation_by_other_columns():
    sites = aggregate(make_cells(), by=[*WELL, "Metadata_Site"])
    assert sites.n_obs == 20
    assert sites.obs_names[0] == "P0__A01__0"


def test_invalid_inputs_raise_errors(tmp_path):
    cells = make_cells()
    with pytest.raises(MetadataError, match=r"no column 'plate'.*Metadata_Plate.*--by"):
        aggregate(cells, by=["plate"])
    with pytest.raises(InputError, match="has no rows"):
        aggregate(cells[:0])
    with pytest.raises(InputError, match="'mode'"):
        aggregate(cells, statistic="mode")
    cells.obs["Metadata_Well"] = cells.obs["Metadata_Well"].astype(object)
    cells.obs.iloc[3, 1] = None
    with pytest.raises(MetadataError, match="1 of 170 rows of the AnnData have no Metadata_Well"):
        aggregate(cells)
    with pytest.raises(InputError, match="does not exist"):
        aggregate(tmp_path / "nothing.zarr")
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(InputError, match=r"text.h5ad is not an AnnData"):
        aggregate(tmp_path / "text.h5ad")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(InputError, match=r"empty.zarr is not an AnnData"):
        aggregate(tmp_path / "empty.zarr")


def test_special_characters_in_names_are_preserved(tmp_path):
    cells = make_cells()
    names = {"P0": "<script>alert(1)</script>", "P1": "a/b\\c 'd' \"é\" [bold]"}
    cells.obs["Metadata_Plate"] = cells.obs["Metadata_Plate"].cat.rename_categories(names)
    cells.write_zarr(tmp_path / "cells.zarr")
    wells = aggregate(tmp_path / "cells.zarr")
    assert sorted(wells.obs["Metadata_Plate"].unique()) == sorted(names.values())
