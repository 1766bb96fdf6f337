"""The output: the rows of fields become one AnnData or Parquet file, which other packages can read."""

from __future__ import annotations

import os

import anndata
import numpy as np
import pandas as pd
import pytest

from cellvim.anndata_io import open_embeddings
from cellvim.embedding import output as module
from cellvim.embedding.ledger import Rows
from cellvim.embedding.output import PlateRows, write_embeddings
from cellvim.errors import OutputError


def _fields() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "Metadata_Plate": "P1",
            "Metadata_Well": ["A01", "A01", "B02", "B03"],
            "Metadata_Site": [0, 1, 0, 0],
            "compound": ["dmso", "dmso", None, "tamoxifen"],
            "dose": [0.0, 0.0, np.nan, 3.0],
        }
    )


def _rows(field: int, n: int, width: int = 5) -> Rows:
    rng = np.random.default_rng(field)
    objects = pd.DataFrame(
        {
            "Metadata_ObjectNumber": np.arange(1, n + 1),
            "area_um2": rng.uniform(50, 200, n),
            "touches_border": rng.random(n) < 0.5,
        }
    )
    return Rows(rng.normal(size=(n, width)).astype(np.float32), objects, rng.uniform(0, 100, (n, 2)))


def _plate(counts=(3, 0, 2, 4), fields=None, load=None) -> PlateRows:
    counts = dict(enumerate(counts)) if isinstance(counts, tuple) else counts
    return PlateRows(_fields() if fields is None else fields, counts, load or (lambda f: _rows(f, counts[f])))


def _write(path, *plates, overwrite=False, format="zarr") -> int:
    openers = [lambda plate=plate: plate for plate in plates or (_plate(),)]
    uns = {"cellvim": {"unit": "cell"}}
    return write_embeddings(path, openers, 5, uns, format=format, overwrite=overwrite)


def test_rows_come_back_with_their_field(tmp_path):
    assert _write(tmp_path / "out.zarr") == 9
    adata = anndata.read_zarr(tmp_path / "out.zarr")
    assert adata.X.dtype == np.float32
    rows = [_rows(field, n) for field, n in ((0, 3), (2, 2), (3, 4))]
    expected = [(r.embeddings, r.objects, r.spatial) for r in rows]
    np.testing.assert_array_equal(adata.X, np.concatenate([x for x, _, _ in expected]))
    np.testing.assert_array_equal(adata.obsm["spatial"], np.concatenate([s for _, _, s in expected]))
    for name in ("Metadata_ObjectNumber", "area_um2", "touches_border"):
        np.testing.assert_array_equal(adata.obs[name], np.concatenate([o[name] for _, o, _ in expected]))
        assert adata.obs[name].dtype == expected[0][1][name].dtype
    assert adata.obs["Metadata_Well"].tolist() == ["A01"] * 3 + ["B02"] * 2 + ["B03"] * 4
    assert list(adata.var_names) == [f"emb_{i:04d}" for i in range(5)]
    assert adata.obs_names[:2].tolist() == ["P1__A01__0__1", "P1__A01__0__2"]
    assert adata.obs_names.is_unique
    assert adata.uns["cellvim"]["unit"] == "cell"


def test_text_is_categorical_and_missing_values_stay_missing(tmp_path):
    _write(tmp_path / "out.zarr")
    obs = anndata.read_zarr(tmp_path / "out.zarr").obs
    for name in ("Metadata_Plate", "Metadata_Well", "compound"):
        assert isinstance(obs[name].dtype, pd.CategoricalDtype)
    assert obs["compound"].isna().sum() == 2
    assert list(obs["compound"].cat.categories) == ["dmso", "tamoxifen"]
    assert np.isnan(obs["dose"].to_numpy()[3:5]).all()
    assert obs["Metadata_Site"].dtype == np.int64


def _bytes(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_order_of_fields_does_not_change_a_byte(tmp_path):
    _write(tmp_path / "a.zarr")
    _write(tmp_path / "b.zarr", _plate({3: 4, 1: 0, 0: 3, 2: 2}))
    assert _bytes(tmp_path / "a.zarr") == _bytes(tmp_path / "b.zarr")


@pytest.mark.parametrize("format", ["zarr", "h5ad", "parquet"])
def test_writing_twice_gives_the_same_bytes(tmp_path, format):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    for name in ("1", "2"):
        _write(tmp_path / name / f"out.{format}", format=format)
    assert _bytes(tmp_path / "1") == _bytes(tmp_path / "2")


def test_many_small_blocks_equal_one(tmp_path, monkeypatch):
    _write(tmp_path / "a.zarr")
    monkeypatch.setattr(module, "ROWS_PER_BLOCK", 2)
    _write(tmp_path / "b.zarr")
    a, b = (anndata.read_zarr(tmp_path / name) for name in ("a.zarr", "b.zarr"))
    np.testing.assert_array_equal(a.X, b.X)
    pd.testing.assert_frame_equal(a.obs, b.obs)


def test_hdf5_holds_what_zarr_holds_and_opens_backed(tmp_path):
    _write(tmp_path / "a.zarr")
    _write(tmp_path / "a.h5ad", format="h5ad")
    a, b = anndata.read_zarr(tmp_path / "a.zarr"), anndata.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(a.X, b.X)
    pd.testing.assert_frame_equal(a.obs, b.obs)
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(backed[2:5].X, a.X[2:5])


def test_parquet_is_metadata_then_features(tmp_path):
    _write(tmp_path / "out.parquet", format="parquet")
    table = pd.read_parquet(tmp_path / "out.parquet")
    features = [f"emb_{i:04d}" for i in range(5)]
    assert list(table.columns[-5:]) == features
    assert all(name.startswith("Metadata_") for name in table.columns[:-5])
    assert {"Metadata_compound", "Metadata_area_um2", "Metadata_spatial_x"} <= set(table.columns)
    expected = np.concatenate([_rows(field, n).embeddings for field, n in ((0, 3), (2, 2), (3, 4))])
    np.testing.assert_array_equal(table[features].to_numpy(), expected)


def test_pycytominer_takes_the_parquet(tmp_path):
    pycytominer = pytest.importorskip("pycytominer")
    _write(tmp_path / "out.parquet", format="parquet")
    profiles = pycytominer.aggregate(
        pd.read_parquet(tmp_path / "out.parquet"),
        strata=["Metadata_Plate", "Metadata_Well"],
        features=[f"emb_{i:04d}" for i in range(5)],
    )
    first = np.median(_rows(0, 3).embeddings, axis=0)
    np.testing.assert_allclose(profiles.iloc[0, 2:].to_numpy(float), first, rtol=1e-6)


class TestSeveralPlates:
    """Each with columns of its own."""

    @pytest.fixture
    def adata(self, tmp_path):
        other = _fields().assign(Metadata_Plate="P2", batch=["x", "y", "y", "y"], dose=[1, 2, 3, 4])
        other = other.drop(columns="compound")

        def load(field):
            rows = _rows(10 + field, 2)
            return Rows(rows.embeddings, rows.objects.drop(columns="area_um2"), rows.spatial)

        _write(tmp_path / "out.zarr", _plate(), _plate((2, 2, 2, 2), other, load))
        return anndata.read_zarr(tmp_path / "out.zarr")

    def test_plates_follow_each_other(self, adata):
        assert adata.obs["Metadata_Plate"].tolist() == ["P1"] * 9 + ["P2"] * 8
        np.testing.assert_array_equal(adata.X[:3], _rows(0, 3).embeddings)
        np.testing.assert_array_equal(adata.X[9:11], _rows(10, 2).embeddings)
        assert adata.obs_names.is_unique

    def test_columns_that_a_plate_does_not_have_are_missing(self, adata):
        first, second = (adata.obs["Metadata_Plate"] == p for p in ("P1", "P2"))
        assert adata.obs.loc[second, "compound"].isna().all()
        assert adata.obs.loc[first, "batch"].isna().all()
        assert adata.obs.loc[second, "area_um2"].isna().all() and adata.obs.loc[first, "area_um2"].notna().all()
        assert adata.obs.loc[second, "dose"].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]
        assert adata.obs["touches_border"].dtype == bool

    def test_joined_lazily_from_two_files(self, tmp_path):
        _write(tmp_path / "a.zarr")
        _write(tmp_path / "b.h5ad", _plate((1, 1, 1, 1), _fields().assign(Metadata_Plate="P2")), format="h5ad")
        joined = open_embeddings(tmp_path)
        assert joined.shape == (13, 5)
        some = joined[[0, 9, 12]]
        np.testing.assert_array_equal(some.X[0], _rows(0, 3).embeddings[0])
        assert some.obs["Metadata_Plate"].tolist() == ["P1", "P2", "P2"]
        assert not isinstance(joined.adatas[0].X, np.ndarray)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")  # of anndata, about its own default
def test_reading_gives_what_anndata_itself_would_write(tmp_path):
    _write(tmp_path / "ours.zarr")
    ours = anndata.read_zarr(tmp_path / "ours.zarr")
    ours.write_zarr(tmp_path / "theirs.zarr")
    theirs = anndata.read_zarr(tmp_path / "theirs.zarr")
    pd.testing.assert_frame_equal(ours.obs, theirs.obs)
    ours.write_h5ad(tmp_path / "theirs.h5ad")
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "theirs.h5ad").X, ours.X)


def test_no_rows_at_all_is_still_an_anndata(tmp_path):
    assert _write(tmp_path / "out.zarr", _plate((0, 0, 0, 0))) == 0
    adata = anndata.read_zarr(tmp_path / "out.zarr")
    assert adata.shape == (0, 5)
    assert {"Metadata_Well", "compound", "area_um2"} <= set(adata.obs.columns)


@pytest.mark.parametrize("format", ["h5ad", "parquet"])
def test_no_rows_in_other_formats(tmp_path, format):
    assert _write(tmp_path / f"out.{format}", _plate((0, 0, 0, 0)), format=format) == 0
    if format == "h5ad":
        assert anndata.read_h5ad(tmp_path / "out.h5ad").shape == (0, 5)
    else:
        assert "emb_0004" in pd.read_parquet(tmp_path / "out.parquet")


def test_missing_fields_leave_no_rows(tmp_path):
    _write(tmp_path / "out.zarr", _plate({3: 4}))
    adata = anndata.read_zarr(tmp_path / "out.zarr")
    assert adata.obs["Metadata_Well"].cat.categories.tolist() == ["B03"]
    assert adata.n_obs == 4


def test_existing_output_is_kept_without_overwrite(tmp_path):
    _write(tmp_path / "out.zarr")
    before = _bytes(tmp_path / "out.zarr")
    with pytest.raises(OutputError, match="--overwrite"):
        _write(tmp_path / "out.zarr", _plate((1, 1, 1, 1)))
    assert _bytes(tmp_path / "out.zarr") == before


def test_overwrite_replaces_only_embeddings(tmp_path):
    _write(tmp_path / "out.zarr")
    assert _write(tmp_path / "out.zarr", _plate((1, 1, 1, 1)), overwrite=True) == 4
    assert anndata.read_zarr(tmp_path / "out.zarr").n_obs == 4
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    (tmp_path / "precious.h5ad").write_text("years of work")
    for name in ("precious", "precious.h5ad"):
        with pytest.raises(OutputError, match="not an AnnData"):
            _write(tmp_path / name, overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists() and (tmp_path / "precious.h5ad").exists()


def test_failure_leaves_the_old_output_and_nothing_half_written(tmp_path):
    _write(tmp_path / "out.zarr")
    before = _bytes(tmp_path / "out.zarr")

    def load(field):
        if field == 2:
            raise KeyboardInterrupt
        return _rows(field, 3)

    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "out.zarr", _plate((3, 3, 3, 3), load=load), overwrite=True)
    assert _bytes(tmp_path / "out.zarr") == before
    assert os.listdir(tmp_path) == ["out.zarr"]


def test_rows_that_do_not_fit_together_are_refused(tmp_path):
    rows = _rows(0, 3)
    with pytest.raises(ValueError, match="do not match"):
        _write(tmp_path / "out.zarr", _plate(load=lambda _: Rows(rows.embeddings[:2], rows.objects, rows.spatial)))


def test_through_a_url(tmp_path):
    """fsspec's file system of this machine stands for an object store."""
    _write(tmp_path / "a.zarr")
    _write((tmp_path / "b.zarr").as_uri())
    assert _bytes(tmp_path / "a.zarr") == _bytes(tmp_path / "b.zarr")
    with pytest.raises(OutputError, match="exists already"):
        _write((tmp_path / "b.zarr").as_uri())
