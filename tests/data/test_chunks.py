"""Decoded chunks equal those that Zarr reads, for every supported layout; damage, bombs and links out are refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from cellvim.data.plate_store import ChunkBombError, ChunkedArray, ChunkError, plan_chunks

SHAPE = (3, 17, 22)


def planned(folder: Path) -> ChunkedArray | None:
    name = "zarr.json" if (folder / "zarr.json").exists() else ".zarray"
    return plan_chunks(folder, folder, json.loads((folder / name).read_text()))


def write(folder: Path, dtype: str = "uint16", **options) -> zarr.Array:
    rng = np.random.default_rng(0)
    array = zarr.create_array(store=str(folder), shape=SHAPE, dtype=dtype, **options)
    values = rng.integers(0, 200, SHAPE)
    values[:, :9, 11:] = 0  # chunks that hold the fill value alone are not stored
    array[:] = values.astype(dtype)
    return array


LAYOUTS = {
    "v3 plain": {"chunks": (1, 8, 11), "compressors": None},
    "v3 zstd": {"chunks": (2, 9, 7), "compressors": ZstdCodec(level=1, checksum=True)},
    "v3 blosc": {"chunks": (3, 17, 22), "compressors": BloscCodec(cname="lz4", shuffle="shuffle", typesize=2)},
    "v3 shards": {"chunks": (1, 9, 11), "shards": (3, 18, 22), "compressors": ZstdCodec()},
    "v3 small shards": {"chunks": (1, 3, 4), "shards": (2, 6, 12), "compressors": BloscCodec(cname="zstd")},
    "v3 dots": {
        "chunks": (1, 8, 11),
        "compressors": ZstdCodec(),
        "chunk_key_encoding": {"name": "default", "separator": "."},
    },
    "v3 keys of v2": {"chunks": (1, 8, 11), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "v2 plain": {"zarr_format": 2, "chunks": (1, 8, 11), "compressors": None},
    "v2 blosc": {"zarr_format": 2, "chunks": (2, 9, 7), "compressors": numcodecs.Blosc(cname="lz4", shuffle=1)},
    "v2 zstd": {
        "zarr_format": 2,
        "chunks": (1, 17, 22),
        "compressors": numcodecs.Zstd(),
        "chunk_key_encoding": {"name": "v2", "separator": "/"},
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "fill"), [("uint16", 0), ("uint8", 0), ("float32", 0.0), (">u2", 0)])
def test_blocks_are_those_that_zarr_reads(tmp_path, name, dtype, fill):
    if dtype == ">u2" and name.startswith("v3"):
        dtype = "int16"
    array = write(tmp_path / "a", dtype, fill_value=fill, **LAYOUTS[name])
    plan = planned(tmp_path / "a")
    assert plan is not None and plan.dtype == np.dtype(dtype)
    ranges = [(0, 3), (0, 1), (2, 3), (1, 3)], [(0, 17), (3, 5), (8, 17)], [(0, 22), (11, 12), (5, 20)]
    for block in itertools.product(*ranges):
        out = np.full([stop - start for start, stop in block], 77, plan.dtype)
        plan.read(block, out)
        np.testing.assert_array_equal(out, array[tuple(slice(*b) for b in block)])


def test_absent_chunks_are_the_fill_value_and_are_counted(tmp_path):
    array = zarr.create_array(store=str(tmp_path / "a"), shape=SHAPE, chunks=(1, 17, 22), dtype="int16", fill_value=-3)
    plan, out = planned(tmp_path / "a"), np.zeros(SHAPE, "int16")
    assert plan.read([(0, 3), (0, 17), (0, 22)], out) == 0 and (out == -3).all()
    array[1] = 5
    assert plan.read([(0, 3), (0, 17), (0, 22)], out) == 1 and (out[1] == 5).all() and (out[2] == -3).all()
    view = np.zeros((3, 34, 44), "int16")[:, ::2, ::2]  # memory that does not lie side by side
    plan.read([(0, 3), (0, 17), (0, 22)], view)
    np.testing.assert_array_equal(view, array[:])


OTHERS = {
    "gzip": {"compressors": GzipCodec()},
    "two codecs": {"compressors": [ZstdCodec(), GzipCodec()]},
    "transposed": {"filters": TransposeCodec(order=(0, 2, 1))},
    "big endian": {"serializer": BytesCodec(endian="big")},
    "index not as usual": {
        "chunks": (3, 17, 22),
        "serializer": ShardingCodec(chunk_shape=(1, 17, 22), index_codecs=[BytesCodec()]),
        "compressors": None,
    },
    "fill of its own": {"dtype": "float32", "fill_value": np.nan},
    "column order": {"zarr_format": 2, "order": "F"},
    "delta": {"zarr_format": 2, "filters": numcodecs.Delta(dtype="<u2"), "compressors": None},
    "zlib": {"zarr_format": 2, "compressors": numcodecs.Zlib()},
    "complex": {"dtype": "complex64"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_are_left_to_zarr(tmp_path, name):
    write(tmp_path / "a", **{"chunks": (1, 17, 22), **OTHERS[name]})
    assert planned(tmp_path / "a") is None


def test_other_metadata_is_left_to_zarr(tmp_path):
    write(tmp_path / "a", chunks=(1, 9, 11), shards=(3, 18, 22))
    document = json.loads((tmp_path / "a/zarr.json").read_text())
    for change in (
        {"shape": [3, -1, 22]},
        {"shape": [3, 17]},
        {"codecs": []},
        {"codecs": None},
        {"data_type": "r16"},
        {"fill_value": "NaN"},
        {"fill_value": -1},
        {"fill_value": None},
        {"chunk_grid": {"name": "rectilinear"}},
        {"storage_transformers": [{"name": "x"}]},
        {"zarr_format": 4},
        {"shape": [2**39, 2**39, 2]},
    ):
        assert plan_chunks(tmp_path, tmp_path, document | change) is None, change
    document["chunk_grid"]["configuration"]["chunk_shape"] = [3, 17, 22]
    assert plan_chunks(tmp_path, tmp_path, document) is None  # shards of chunks that do not divide them


def test_damage_is_refused(tmp_path):
    write(tmp_path / "a", chunks=(1, 9, 11), shards=(3, 18, 22), compressors=ZstdCodec(checksum=True))
    plan, out, file = planned(tmp_path / "a"), np.zeros(SHAPE, "uint16"), tmp_path / "a/c/0/0/0"
    whole = file.read_bytes()
    block = [(0, 3), (0, 17), (0, 22)]
    for content, why in (
        (b"", "index alone"),
        (whole[:40], "index alone"),
        (whole[:-5], "checksum of the index"),
        (whole[:-30] + b"\x01" + whole[-29:], "checksum of the index"),
        (whole[100:], r"lie beyond|damaged|holds"),
        (whole[:20] + b"\x55\xaa\x55" + whole[23:], "damaged"),
    ):
        file.write_bytes(content)
        with pytest.raises(ChunkError, match=why):
            plan.read(block, out)
    file.write_bytes(whole + bytes(8 << 20))
    with pytest.raises(ChunkBombError, match="is stored in"):
        plan.read(block, out)


@pytest.mark.parametrize("codec", ["zstd", "blosc", None])
def test_chunks_of_another_size_are_refused(tmp_path, codec):
    compressor = {"zstd": numcodecs.Zstd(), "blosc": numcodecs.Blosc(), None: None}[codec]
    write(tmp_path / "a", zarr_format=2, chunks=SHAPE, compressors=compressor)
    plan, out = planned(tmp_path / "a"), np.zeros(SHAPE, "uint16")
    for size, kind in ((out.nbytes - 2, ChunkError), (1 << 20, ChunkBombError if codec else ChunkError)):
        content = bytes(size)
        (tmp_path / "a/0.0.0").write_bytes(content if compressor is None else compressor.encode(content))
        with pytest.raises(kind, match=r"its pixels are|bytes of pixels"):
            plan.read([(0, n) for n in SHAPE], out)


def test_links_out_of_the_plate_are_refused(tmp_path):
    write(tmp_path / "plate/a", chunks=(1, 17, 22))
    file = tmp_path / "plate/a/c/1/0/0"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    document = json.loads((tmp_path / "plate/a/zarr.json").read_text())
    block, out = [(0, 3), (0, 17), (0, 22)], np.zeros(SHAPE, "uint16")
    with pytest.raises(ChunkError, match="outside of the plate"):
        plan_chunks(tmp_path / "plate/a", tmp_path / "plate", document).read(block, out)
    (tmp_path / "elsewhere").rename(tmp_path / "plate/kept")
    file.unlink()
    file.symlink_to(tmp_path / "plate/kept")
    assert plan_chunks(tmp_path / "plate/a", tmp_path / "plate", document).read(block, out) == 3
