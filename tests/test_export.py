"""AnnDataWriter: the rows of fields, in whatever order they come, become one AnnData that others open."""

from __future__ import annotations

import os

import anndata
import numpy as np
import pandas as pd
import pytest

from cellvim import export
from cellvim.errors import OutputError
from cellvim.export import AnnDataWriter


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


def _rows(field: int, n: int, width: int = 5):
    rng = np.random.default_rng(field)
    objects = pd.DataFrame(
        {
            "Metadata_ObjectNumber": np.arange(1, n + 1),
            "area_um2": rng.uniform(50, 200, n),
            "touches_border": rng.random(n) < 0.5,
        }
    )
    return rng.normal(size=(n, width)).astype(np.float32), objects, rng.uniform(0, 100, (n, 2))


def _write(path, order=(0, 1, 2, 3), counts=(3, 0, 2, 4), **options) -> int:
    with AnnDataWriter(path, _fields(), 5, **options) as writer:
        for field in order:
            writer.append(field, *_rows(field, counts[field]))
        return writer.finish({"cellvim": {"unit": "cell"}})


def test_rows_come_back_with_their_field(tmp_path):
    assert _write(tmp_path / "out.zarr") == 9
    adata = anndata.read_zarr(tmp_path / "out.zarr")
    assert adata.X.dtype == np.float32
    expected = [_rows(field, n) for field, n in ((0, 3), (2, 2), (3, 4))]
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
    _write(tmp_path / "b.zarr", order=(3, 1, 0, 2))
    assert _bytes(tmp_path / "a.zarr") == _bytes(tmp_path / "b.zarr")


def test_many_small_blocks_equal_one(tmp_path, monkeypatch):
    _write(tmp_path / "a.zarr")
    monkeypatch.setattr(export, "ROWS_PER_CHUNK", 2)
    _write(tmp_path / "b.zarr")
    a, b = (anndata.read_zarr(tmp_path / name) for name in ("a.zarr", "b.zarr"))
    np.testing.assert_array_equal(a.X, b.X)
    pd.testing.assert_frame_equal(a.obs, b.obs)


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
    assert _write(tmp_path / "out.zarr", counts=(0, 0, 0, 0)) == 0
    adata = anndata.read_zarr(tmp_path / "out.zarr")
    assert adata.shape == (0, 5)
    assert {"Metadata_Well", "compound", "area_um2"} <= set(adata.obs.columns)


def test_missing_fields_leave_no_rows(tmp_path):
    _write(tmp_path / "out.zarr", order=(3,))
    adata = anndata.read_zarr(tmp_path / "out.zarr")
    assert adata.obs["Metadata_Well"].cat.categories.tolist() == ["B03"]
    assert adata.n_obs == 4


def test_existing_output_is_kept_without_overwrite(tmp_path):
    _write(tmp_path / "out.zarr")
    before = _bytes(tmp_path / "out.zarr")
    with pytest.raises(OutputError, match="--overwrite"):
        _write(tmp_path / "out.zarr", counts=(1, 1, 1, 1))
    assert _bytes(tmp_path / "out.zarr") == before


def test_overwrite_replaces_only_an_anndata(tmp_path):
    _write(tmp_path / "out.zarr")
    assert _write(tmp_path / "out.zarr", counts=(1, 1, 1, 1), overwrite=True) == 4
    assert anndata.read_zarr(tmp_path / "out.zarr").n_obs == 4
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no AnnData store"):
        _write(tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_failure_leaves_the_old_output_and_nothing_half_written(tmp_path):
    _write(tmp_path / "out.zarr")
    before = _bytes(tmp_path / "out.zarr")
    with (
        pytest.raises(KeyboardInterrupt),
        AnnDataWriter(tmp_path / "out.zarr", _fields(), 5, overwrite=True) as writer,
    ):
        writer.append(0, *_rows(0, 3))
        raise KeyboardInterrupt
    assert _bytes(tmp_path / "out.zarr") == before
    assert os.listdir(tmp_path) == ["out.zarr"]


def test_what_a_killed_run_left_is_cleared_but_not_what_others_put_there(tmp_path):
    writer = AnnDataWriter(tmp_path / "out.zarr", _fields(), 5)
    writer.append(0, *_rows(0, 3))  # and then kill -9: no __exit__
    assert _write(tmp_path / "out.zarr", order=(2,)) == 2
    (tmp_path / "other.zarr.partial").mkdir()
    with pytest.raises(OutputError, match="not made by CellVim"):
        _write(tmp_path / "other.zarr")


def test_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(OutputError, match="No space left on device"),
        AnnDataWriter(tmp_path / "out.zarr", _fields(), 5) as writer,
    ):
        monkeypatch.setattr(export.np, "savez", full)
        writer.append(0, *_rows(0, 3))
    assert not os.listdir(tmp_path)


def test_rows_that_do_not_fit_together_are_refused(tmp_path):
    embeddings, objects, spatial = _rows(0, 3)
    with AnnDataWriter(tmp_path / "out.zarr", _fields(), 5) as writer, pytest.raises(ValueError, match="do not fit"):
        writer.append(0, embeddings[:2], objects, spatial)
