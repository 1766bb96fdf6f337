"""Conversion to tables and back preserves all numbers and names."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from profile_tables import make_cells, make_profiles

import cellvim
from cellvim.anndata_io import open_anndata
from cellvim.errors import InputError, MetadataError
from cellvim.profiles import aggregate, read_profiles


def test_round_trip():
    cells = make_cells()
    table = cellvim.to_pycytominer(cells)
    assert table["Metadata_area_um2"].tolist() == cells.obs["area_um2"].tolist()
    again = cellvim.from_pycytominer(table, features=list(cells.var_names))
    np.testing.assert_array_equal(again.X, cells.X)
    assert again.X.dtype == np.float32
    assert again.obs_names.tolist() == cells.obs_names.tolist()  # text, not numbers
    pd.testing.assert_frame_equal(again.obs, cells.obs)
    assert list(again.var_names) == list(cells.var_names)


def test_layers_and_obsm_can_be_converted():
    adata = cellvim.profile(make_profiles(), statistic=None, normalize=["robustmad", "pca"])
    np.testing.assert_array_equal(
        cellvim.to_pycytominer(adata, use="robustmad")[list(adata.var_names)], adata.layers["robustmad"]
    )
    assert "X_pca_0" in cellvim.to_pycytominer(adata, use="X_pca")


def test_features_are_recognised_by_name_and_identifiers_are_not_features():
    table = pd.DataFrame(
        {"Metadata_Well": ["A01", "A02"], "ImageNumber": [1, 2], "Cells_Area": [1.0, 2.0], "age": [3, 4]}
    )
    assert list(cellvim.from_pycytominer(table).var_names) == ["Cells_Area"]
    assert list(cellvim.from_pycytominer(table.drop(columns="Cells_Area")).var_names) == ["age"]
    assert list(cellvim.from_pycytominer(table, features=["age"]).var_names) == ["age"]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (pd.DataFrame({"a": ["x"]}), {}, "no features"),
        (pd.DataFrame({"a": ["x"]}), {"features": ["a"]}, "must be numeric.*: a"),
        (pd.DataFrame({"a": [1.0]}), {"features": ["b"]}, "not have the columns b; it has a"),
        (pd.DataFrame([[1.0, 2.0]], columns=["a", "a"]), {}, "Duplicate columns: a"),
    ],
)
def test_invalid_tables(table, options, message):
    with pytest.raises(MetadataError, match=message):
        cellvim.from_pycytominer(table, **options)


def test_duplicate_columns_raise_an_error():
    adata = make_profiles()
    adata.obs["Well"] = 1
    with pytest.raises(MetadataError, match="two columns Metadata_Well"):
        cellvim.to_pycytominer(adata)


def test_invalid_files(tmp_path):
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"broken.parquet cannot be read as a table"):
        read_profiles(tmp_path / "broken.parquet")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match=r"empty.csv cannot be read as a table"):
        read_profiles(tmp_path / "empty.csv")


def test_parquet_is_read_by_row_groups(tmp_path):
    """Wells that span row groups, renamed columns and text: the same as reading the file into memory."""
    cells = make_cells()
    del cells.obsm["spatial"]
    path = tmp_path / "cells.parquet"
    cellvim.to_pycytominer(cells).to_parquet(path, index=False, row_group_size=7)
    expected = read_profiles(path)
    with open_anndata(path) as stored:
        pd.testing.assert_frame_equal(stored.obs(), expected.obs.reset_index(drop=True))
        np.testing.assert_array_equal(stored.rows(5, 30), cells.X[5:30])
        np.testing.assert_array_equal(stored.rows(30, 31), cells.X[30:31])
        np.testing.assert_array_equal(stored.take(np.array([0, 6, 7, 169])), cells.X[[0, 6, 7, 169]])
    for statistic in ("mean", "median"):
        np.testing.assert_array_equal(aggregate(path, statistic=statistic).X, aggregate(cells, statistic=statistic).X)


def test_fields_are_regions_of_spatialdata():
    cells = make_cells()
    cells.obs["Metadata_Plate"] = cells.obs["Metadata_Plate"].cat.rename_categories({"P0": "<plate> é"})
    table = cellvim.to_spatialdata_table(cells)
    assert table.uns["spatialdata_attrs"]["region_key"] == "region"
    assert set(table.uns["spatialdata_attrs"]["region"]) == set(table.obs["region"])
    assert table.obs["region"].iloc[0] == "_plate____A01_0"
    assert "region" not in cells.obs
    clash = make_cells()
    clash.obs["Metadata_Plate"] = clash.obs["Metadata_Plate"].cat.rename_categories({"P0": "a b", "P1": "a/b"})
    with pytest.raises(MetadataError, match="same name in SpatialData"):
        cellvim.to_spatialdata_table(clash)
