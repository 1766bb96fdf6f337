"""Decoding the chunks of a local Zarr array straight into the memory that they are wanted in.

Zarr reads any array, by way of an event loop, threads of its own and a copy of every chunk; of a field in one file that
costs as much again as decompressing it. Here are the layouts that plates have (format 2 or 3, sharded or not,
uncompressed or by zstd or blosc); for anything else `plan_chunks` returns None, and Zarr reads. Part of
`cellvim.data.plate`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SLACK_BYTES = 1 << 20  # a stored chunk may be this much larger than its pixels
_ABSENT = (1 << 64) - 1  # in a shard's index
_TYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float32", "float64"}


class ChunkBombError(ValueError):
    """A chunk would decompress to more than its pixels."""


class ChunkError(ValueError):
    """A chunk is damaged, or is not where it should be."""


@dataclass(frozen=True)
class ChunkedArray:
    """An array whose chunks can be decoded here.

    Attributes
    ----------
    folder, root
        Where the array lies, and the plate: a chunk that is a link out of it is refused.
    shape, dtype
        As stored.
    chunks
        Shape of what is compressed as one.
    shards
        Shape of what a file holds: the same, or several chunks.
    codec
        ``zstd``, ``blosc`` or None.
    separator, prefix
        Of the file names: ``c/0/0/0``, ``0.0.0``.
    index_at_end
        Where the index of a shard is; None where there are no shards.
    fill
        What absent chunks hold.
    """

    folder: Path
    root: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    codec: str | None
    separator: str
    prefix: str
    index_at_end: bool | None
    fill: Any

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk's pixels."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def read(self, ranges: Sequence[tuple[int, int]], out: np.ndarray) -> int:
        """Decode a block, given as (start, stop) for each axis, into ``out`` of its shape and the array's type.

        Returns
        -------
        int
            How many of the block's chunks are stored; the others hold the fill value.

        Raises
        ------
        ChunkError, ChunkBombError, OSError
            A chunk is damaged, larger than it says, or cannot be read.
        """
        reach = (range(start // n, -(-stop // n)) for (start, stop), n in zip(ranges, self.shards, strict=True))
        return sum(self._read_file(at, ranges, out) for at in itertools.product(*reach))

    def _read_file(self, at: tuple[int, ...], ranges: Sequence[tuple[int, int]], out: np.ndarray) -> int:
        name = self.prefix + self.separator.join(map(str, at))
        wanted = list(self._wanted(at, ranges))
        descriptor = self._open(name)
        if descriptor is None:
            for _, _, target in wanted:
                out[target] = self.fill
            return 0
        stored_chunks = 0
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            count = math.prod(s // c for s, c in zip(self.shards, self.chunks, strict=True))
            if size > 2 * (count * self.chunk_bytes + SLACK_BYTES):
                raise ChunkBombError(
                    f"chunk {name} is stored in {size:,} bytes, its pixels are {count * self.chunk_bytes:,}"
                )
            if self.index_at_end is None:
                parts = np.array([[0, size]], np.uint64)
            else:
                parts = self._index(file, size, count, name)
            whole = _bytes_of(file, 0, size, name) if len(wanted) == count else None
            for number, source, target in wanted:
                offset, length = map(int, parts[number])
                if offset == length == _ABSENT:
                    out[target] = self.fill
                    continue
                if offset + length > size:
                    raise ChunkError(f"chunk {name} ends after {size:,} bytes, and a part of it should lie beyond")
                stored = _bytes_of(file, offset, length, name) if whole is None else whole[offset : offset + length]
                self._decode(stored, source, out, target, name)
                stored_chunks += 1
        return stored_chunks

    def _wanted(self, at: tuple[int, ...], ranges: Sequence[tuple[int, int]]) -> Any:
        """Yield, for each chunk of a file that is asked for: its number there, which part of it, and where it goes."""
        grids = [s // c for s, c in zip(self.shards, self.chunks, strict=True)]
        axes = []
        for place, shard, chunk, grid, (start, stop) in zip(at, self.shards, self.chunks, grids, ranges, strict=True):
            first = place * shard
            axis = []
            for i in range(max(0, (start - first) // chunk), min(grid, -(-(stop - first) // chunk))):
                begin = first + i * chunk
                low, high = max(start, begin), min(stop, begin + chunk)
                axis.append((i, slice(low - begin, high - begin), slice(low - start, high - start)))
            axes.append(axis)
        for chosen in itertools.product(*axes):
            number = 0
            for (i, _, _), grid in zip(chosen, grids, strict=True):
                number = number * grid + i
            yield number, tuple(c[1] for c in chosen), tuple(c[2] for c in chosen)

    def _open(self, name: str) -> int | None:
        path = self.folder.joinpath(*name.split("/"))
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            return None
        refuse_link_out(path, self.root)
        return descriptor

    def _index(self, file: Any, size: int, count: int, name: str) -> np.ndarray:
        from google_crc32c import value as checksum

        length = 16 * count + 4
        if size < length:
            raise ChunkError(f"chunk {name} is of {size:,} bytes; its index alone would be of {length:,}")
        stored = _bytes_of(file, size - length if self.index_at_end else 0, length, name)
        if checksum(stored[:-4].tobytes()) != int.from_bytes(stored[-4:].tobytes(), "little"):
            raise ChunkError(f"the checksum of the index of chunk {name} is wrong: it is damaged")
        return stored[:-4].view("<u8").reshape(count, 2)

    def _decode(self, stored: np.ndarray, source: Any, out: np.ndarray, target: Any, name: str) -> None:
        region = out[target]
        whole = region.shape == self.chunks
        if whole and region.flags.c_contiguous:  # the usual case: nothing is copied
            decode_chunk(stored, region.reshape(-1).view(np.uint8), self.codec, name)
            return
        scratch = np.empty(self.chunks, self.dtype)
        decode_chunk(stored, scratch.reshape(-1).view(np.uint8), self.codec, name)
        out[target] = scratch[source]


def decode_chunk(stored: np.ndarray, out: np.ndarray, codec: str | None, name: str) -> None:
    """Decode bytes into ``out``, which they must fill; never more than that is written, whatever they declare."""
    if codec is None:
        if stored.nbytes != out.nbytes:
            raise ChunkError(f"chunk {name} is of {stored.nbytes:,} bytes, its pixels are {out.nbytes:,}")
        out[:] = stored
        return
    import imagecodecs

    if codec == "blosc" and stored.nbytes >= 16 and (said := int(stored[4:8].view("<u4")[0])) > out.nbytes:
        raise ChunkBombError(f"chunk {name} would decompress to {said:,} bytes, its pixels are {out.nbytes:,}")
    try:
        if codec == "zstd":
            filled = imagecodecs.zstd_decode(stored, out=out)
        else:
            filled = imagecodecs.blosc_decode(stored, out=out)
    except Exception as error:  # each codec has its own kind
        if "too small" in str(error):
            raise ChunkBombError(
                f"chunk {name} would decompress to more than its {out.nbytes:,} bytes of pixels"
            ) from error
        raise ChunkError(f"chunk {name} is damaged ({str(error)[:120]})") from error
    if len(filled) != out.nbytes:
        raise ChunkError(f"chunk {name} holds {len(filled):,} bytes, its pixels are {out.nbytes:,}")


def refuse_link_out(path: Path, root: Path) -> None:
    """Raise `ChunkError` where a chunk's file is a link that leads out of the plate."""
    real = os.path.realpath(path)
    top = os.path.realpath(root)
    if os.path.commonpath([real, top]) != top:
        raise ChunkError(f"its chunk {path.name} is a link to {real}, outside of the plate")


def _bytes_of(file: Any, offset: int, length: int, name: str) -> np.ndarray:
    content = np.empty(length, np.uint8)
    view, done = memoryview(content), 0
    file.seek(offset)
    while done < length:
        n = file.readinto(view[done:])
        if not n:
            raise ChunkError(f"chunk {name} ends before its {length:,} bytes")
        done += n
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Which arrays.


def plan_chunks(folder: Path, root: Path, document: dict[str, Any]) -> ChunkedArray | None:
    """Return how to decode an array, by its metadata document; None where that is for Zarr to know."""
    try:
        described = _of_v3(document) if "node_type" in document else _of_v2(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    if described is None:
        return None
    array = ChunkedArray(folder=folder, root=root, **described)
    sizes = (*array.shape, *array.chunks, *array.shards)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 40 for n in sizes):
        return None
    if not len(array.shape) == len(array.chunks) == len(array.shards):
        return None
    if any(s % c for s, c in zip(array.shards, array.chunks, strict=True)):
        return None
    if math.prod(-(-n // s) for n, s in zip(array.shape, array.shards, strict=True)) > 1 << 20:
        return None
    return array


def _of_v3(document: dict[str, Any]) -> dict[str, Any] | None:
    if (
        document["zarr_format"] != 3
        or document["node_type"] != "array"
        or document.get("storage_transformers")
        or document["data_type"] not in _TYPES
        or document["chunk_grid"]["name"] != "regular"
    ):
        return None
    dtype = np.dtype(document["data_type"]).newbyteorder("<")
    naming = document["chunk_key_encoding"]
    if naming["name"] not in ("default", "v2"):
        return None
    standard = "/" if naming["name"] == "default" else "."
    separator = naming.get("configuration", {}).get("separator", standard)
    outer = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
    codecs, index_at_end, chunks = document["codecs"], None, outer
    if [c["name"] for c in codecs] == ["sharding_indexed"]:
        inside = codecs[0]["configuration"]
        if [c["name"] for c in inside["index_codecs"]] != ["bytes", "crc32c"] or not _is_little(
            inside["index_codecs"][0], 8
        ):
            return None
        index_at_end = {"end": True, "start": False}[inside.get("index_location", "end")]
        codecs, chunks = inside["codecs"], tuple(inside["chunk_shape"])
    if not codecs or codecs[0]["name"] != "bytes" or not _is_little(codecs[0], dtype.itemsize) or len(codecs) > 2:
        return None
    codec = codecs[1]["name"] if len(codecs) == 2 else None
    if codec not in (None, "zstd", "blosc") or separator not in ("/", "."):
        return None
    return {
        "shape": tuple(document["shape"]),
        "dtype": dtype,
        "chunks": chunks,
        "shards": outer,
        "codec": codec,
        "separator": separator,
        "prefix": f"c{separator}" if naming["name"] == "default" else "",
        "index_at_end": index_at_end,
        "fill": _fill(document["fill_value"], dtype),
    }


def _of_v2(document: dict[str, Any]) -> dict[str, Any] | None:
    compressor = document["compressor"]
    codec = None if compressor is None else compressor["id"]
    dtype = np.dtype(document["dtype"])
    separator = document.get("dimension_separator", ".")
    if (
        document["zarr_format"] != 2
        or document["order"] != "C"
        or document.get("filters")
        or codec not in (None, "zstd", "blosc")
        or separator not in ("/", ".")
        or dtype.newbyteorder("=").name not in _TYPES
    ):
        return None
    chunks = tuple(document["chunks"])
    return {
        "shape": tuple(document["shape"]),
        "dtype": dtype,
        "chunks": chunks,
        "shards": chunks,
        "codec": codec,
        "separator": separator,
        "prefix": "",
        "index_at_end": None,
        "fill": _fill(document["fill_value"], dtype),
    }


def _is_little(codec: dict[str, Any], itemsize: int) -> bool:
    return itemsize == 1 or codec.get("configuration", {}).get("endian") == "little"


def _fill(value: Any, dtype: np.dtype) -> Any:
    """Return the value of absent chunks; only what the type holds exactly, the rest is for Zarr to judge."""
    if not isinstance(value, bool | int | float) or not np.isfinite(value):
        raise ValueError("a fill value of its own kind")
    filled = np.array(value).astype(dtype)
    if filled != value:
        raise ValueError("a fill value that the type does not hold")
    return filled[()]
