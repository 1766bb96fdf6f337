"""Folders of a plate on disk, in a zip file or behind a URL, and the arrays in them.

Small files are read through fsspec, local ones directly. Arrays on disk in the layouts that plates use (Zarr format 2
or 3, sharded or not, uncompressed or compressed by zstd or blosc) are decoded here, straight into the output memory:
zarr-python needs 1.3 to 2.8 times the processor time, because of its event loop and a copy of every chunk, and
tensorstore up to 1.1 times ("Decisions" in docs/architecture.md). zarr-python reads all other arrays, behind a guard
that refuses chunks that would decompress to more than their pixels. Part of `cellvim.data.plate`, its only user.
"""

from __future__ import annotations

import atexit
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cellvim.errors import OutputError, PlateError
from cellvim.files import is_url, open_filesystem

METADATA_FILES = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
MAX_METADATA_BYTES = 64 << 20
SLACK_BYTES = 1 << 20  # tolerance for the size of a stored chunk compared with its pixels
CANNOT_LIST = (FileNotFoundError, NotADirectoryError, PermissionError, NotImplementedError)
CANNOT_LIST_STATUS = (401, 403, 404, 405, 501)  # HTTP status of servers that do not list folders
_ABSENT = (1 << 64) - 1  # offset and length of an absent chunk in the index of a shard
_TYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float32", "float64"}


class ChunkError(ValueError):
    """A chunk is damaged or lies outside the plate."""


class ChunkBombError(ChunkError):
    """A chunk would decompress to more than its pixels."""


# ---------------------------------------------------------------------------------------------------------------------
# Folders


class Location:
    """A folder of a plate on an fsspec file system: behind a URL or in a local zip file.

    Parameters
    ----------
    filesystem
        fsspec file system; None in a zip file, which every process opens on its own.
    path
        Path on the file system.
    url
        Path or URL for messages.
    archive
        The zip file.
    """

    def __init__(
        self,
        filesystem: Any,
        path: str,
        url: str,
        *,
        archive: Path | None = None,
        fetched: dict[str, Any] | None = None,
    ) -> None:
        self._filesystem, self.path, self.url, self.archive = filesystem, path.rstrip("/"), url.rstrip("/"), archive
        self.name = PurePosixPath(self.path or self.url.removesuffix(".zip")).name
        self._fetched: dict[str, Any] = {} if fetched is None else fetched  # path -> content or error of `prefetch`

    def __str__(self) -> str:
        return self.url

    @property
    def filesystem(self) -> Any:
        """The fsspec file system."""
        if self.archive is None:
            return self._filesystem
        return _open_zip(self.archive, self.archive.stat().st_mtime_ns, os.getpid())

    def read(self, name: str) -> bytes | None:
        """Return the content of a metadata file, or None if it does not exist.

        Raises
        ------
        PlateError
            It cannot be read, or is too large for metadata.
        """
        path = self._join(name)
        try:
            content = self._fetched.pop(path, None)
            if content is None:
                content = self.filesystem.cat_file(path, start=0, end=MAX_METADATA_BYTES + 1)
            if isinstance(content, Exception):
                raise content
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except Exception as error:  # every file system has its own exceptions
            if "416" in str(error):  # the HTTP status of an empty file: it has no first byte
                return b""
            raise PlateError(
                f"{self.url}/{name} cannot be read ({type(error).__name__}: {str(error)[:200]})."
            ) from error
        if len(content) > MAX_METADATA_BYTES:
            raise PlateError(f"{self.url}/{name} is larger than {MAX_METADATA_BYTES:,} bytes; expected metadata.")
        return content

    def _join(self, relative: str) -> str:
        return f"{self.path}/{relative}" if self.path else relative

    def prefetch(self, names: list[str]) -> None:
        """Fetch metadata files at once; `read` then returns their content or raises their error."""
        paths = [self._join(name) for name in names]
        try:
            contents = self.filesystem.cat_ranges(paths, 0, MAX_METADATA_BYTES + 1, on_error="return")
        except (NotImplementedError, TypeError, OSError):
            return  # not supported, or interrupted: `read` fetches the files one by one
        self._fetched.update(zip(paths, contents, strict=True))

    def child(self, relative: str) -> Location:
        """Return a folder below this one; it need not exist."""
        path, url = self._join(relative), f"{self.url}/{relative}"
        return Location(self._filesystem, path, url, archive=self.archive, fetched=self._fetched)

    def inside(self, relative: str) -> Location | None:
        """Return a folder below this one, or None if the path is empty or leads outside."""
        parts = relative.replace("\\", "/").split("/")
        if not relative or relative == "None" or any(p in ("", ".", "..") or ":" in p or "\x00" in p for p in parts):
            return None
        return self.child("/".join(parts))

    def exists(self) -> bool:
        """Return whether the folder exists."""
        if self.archive is not None:
            return self.filesystem.isdir(self.path)
        return any(self.read(name) is not None for name in METADATA_FILES)

    def folders(self) -> list[str]:
        """Return the names of the folders in it; none if the server does not list them."""
        entries = self._list("ls") or []
        return [PurePosixPath(e["name"].rstrip("/")).name for e in entries if e.get("type") == "directory"]

    def stored_bytes(self) -> int:
        """Return the size of all chunks in it and below; 1 if the server does not list them."""
        found = self._list("find")
        if not found and self.archive is None:
            return 1
        files = (found or {}).items()
        return sum(e.get("size") or 1 for path, e in files if PurePosixPath(path).name not in METADATA_FILES)

    def _list(self, method: str) -> Any:
        """Return the listing of ``ls`` or ``find``, or None if the server does not list folders.

        Raises
        ------
        PlateError
            Listing failed, which must not be mistaken for an empty folder.
        """
        try:
            return getattr(self.filesystem, method)(self.path, detail=True)
        except CANNOT_LIST:
            return None
        except Exception as error:  # every file system has its own exceptions
            statuses = (getattr(error, name, None) for name in ("status", "code", "status_code"))
            if any(status in CANNOT_LIST_STATUS for status in statuses):
                return None
            raise PlateError(f"{self.url} cannot be listed ({type(error).__name__}: {str(error)[:200]}).") from error

    def zarr_store(self) -> tuple[Any, str]:
        """Return the Zarr store, and the path in it."""
        from zarr.storage import FsspecStore, ZipStore

        if self.archive is not None:
            return ZipStore(self.archive, mode="r"), self.path
        return FsspecStore(_asynchronous(self.filesystem), read_only=True, path=self.path), ""


class LocalFolder(Location):
    """A folder on disk. Links that lead out of the plate (``root``) are refused."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self.name, self.url = path, path.name, str(path)
        self.root = path if root is None else root

    def read(self, name: str) -> bytes | None:
        """Return the content of a metadata file, or None if it does not exist."""
        path = self.path / name
        try:
            if path.stat().st_size > MAX_METADATA_BYTES:
                raise PlateError(f"{path} is larger than {MAX_METADATA_BYTES:,} bytes; expected metadata.")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise PlateError(f"{path} cannot be read: {error}.") from error

    def prefetch(self, names: list[str]) -> None:
        """Do nothing: reading one file is fast."""

    def child(self, relative: str) -> LocalFolder:
        """Return a folder below this one; it need not exist."""
        return LocalFolder(self.path.joinpath(*relative.split("/")), self.root)

    def inside(self, relative: str) -> Location | None:
        """Return a folder below this one, or None if the path is empty or leads outside, also through a link."""
        target = super().inside(relative)
        try:
            if target is not None and target.exists() and not target.path.resolve().is_relative_to(self.path.resolve()):
                return None
        except (OSError, RuntimeError):  # the name is too long, or links form a loop
            return None
        return target

    def exists(self) -> bool:
        """Return whether the folder exists."""
        return self.path.is_dir()

    def folders(self) -> list[str]:
        """Return the names of the folders in it."""
        return [p.name for p in self.path.iterdir() if p.is_dir()] if self.path.is_dir() else []

    def stored_bytes(self) -> int:
        """Return the size of all chunks in it and below."""
        files = (p for p in self.path.rglob("*") if p.name not in METADATA_FILES and p.is_file())
        return sum(p.stat().st_size for p in files)

    def zarr_store(self) -> tuple[Any, str]:
        """Return the Zarr store, and the path in it."""
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=True), ""


def locate(path: str | Path, options: dict[str, Any] | None = None) -> Location:
    """Return the location of a plate: a folder, a zip file (its only folder, or its top level), or a URL.

    Raises
    ------
    PlateError
        It does not exist, or the URL cannot be used.
    """
    text = str(path)
    if is_url(text) or "::" in text:
        return _locate_url(text, options or {})
    path = Path(path)
    if not path.exists():
        raise PlateError(f"{path} does not exist; expected the folder of an OME-Zarr plate.")
    if path.is_dir():
        return LocalFolder(path)
    if path.suffix.lower() != ".zip":
        raise PlateError(
            f"{path} is a file; expected the folder of an OME-Zarr plate, or a zip file of it. Convert TIFFs to a "
            "plate with `cellvim import`."
        )
    top = Location(None, "", str(path), archive=path)
    try:
        folders = {"": top} | {name: top.child(name) for name in top.folders()}
        plates = [f for f in folders.values() if any(f.filesystem.isfile(f"{f.path}/{n}") for n in METADATA_FILES)]
    except PlateError as error:
        raise PlateError(f"{path} cannot be read as a zip file: {error}") from error
    return plates[0] if top in plates or len(plates) == 1 else top


@lru_cache(maxsize=8)
def _open_zip(archive: Path, modified_ns: int, process: int) -> Any:
    from fsspec.implementations.zip import ZipFileSystem

    return ZipFileSystem(str(archive))


def _locate_url(url: str, options: dict[str, Any]) -> Location:
    if url.startswith("s3:") and not options:  # public buckets are read without credentials
        credentials = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")
        options = {} if any(name in os.environ for name in credentials) else {"anon": True}
    try:
        filesystem, path = open_filesystem(url, **options)
    except OutputError as error:
        raise PlateError(str(error)) from error
    except Exception as error:  # unknown protocols and wrong options raise exceptions of any kind
        raise PlateError(f"{url} cannot be opened ({type(error).__name__}: {str(error)[:200]}).") from error
    return Location(filesystem, path, url)


_SESSIONS: dict[tuple[int, str], Any] = {}  # (process, file system) -> file system with connections of its own


def _asynchronous(filesystem: Any) -> Any:
    """Return the file system in the form that Zarr's event loop can use."""
    import fsspec
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

    if not filesystem.async_impl:
        return AsyncFileSystemWrapper(filesystem, asynchronous=True)
    if filesystem.asynchronous:
        return filesystem
    key = (os.getpid(), str(hash(filesystem)))
    if key not in _SESSIONS:
        options = {**filesystem.storage_options, "asynchronous": True, "skip_instance_cache": True}
        if not _SESSIONS:
            atexit.register(_close_sessions)
        protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
        _SESSIONS[key] = fsspec.filesystem(protocol, **options)
    return _SESSIONS[key]


def _close_sessions() -> None:
    """Close the connections of this process, which would otherwise warn at exit."""
    from zarr.core.sync import sync

    for (process, _), filesystem in _SESSIONS.items():
        session = getattr(filesystem, "_s3", None) or getattr(filesystem, "_session", None)
        if process == os.getpid() and session is not None:
            with suppress(Exception):
                sync(session.close(), timeout=2)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays on disk


@dataclass(frozen=True)
class ChunkedArray:
    """An array on disk whose chunks are decoded here; see `plan_chunks`."""

    folder: Path
    root: Path  # folder of the plate: a chunk file that is a link out of it is refused
    shape: tuple[int, ...]
    fill: Any  # value of absent chunks
    dtype: np.dtype  # as stored
    chunks: tuple[int, ...]  # shape of a compressed chunk
    shards: tuple[int, ...]  # shape of the pixels in one file: one chunk or several
    codec: str | None  # "zstd", "blosc" or None
    separator: str  # in file names: "/" or "."
    prefix: str = ""  # of file names: "c/"
    index_at_end: bool | None = None  # position of the index in a shard; None without shards

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk's pixels in bytes."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def read(self, ranges: Sequence[tuple[int, int]], out: np.ndarray) -> int:
        """Decode a block, given as (start, stop) for each axis, into ``out``, of its shape and the array's type.

        Returns
        -------
        int
            Number of stored chunks in the block; absent ones are set to the fill value.

        Raises
        ------
        ChunkError, OSError
            A chunk is damaged, larger than its pixels, or cannot be read.
        """
        files = (range(start // n, -(-stop // n)) for (start, stop), n in zip(ranges, self.shards, strict=True))
        return sum(self._read_file(at, ranges, out) for at in itertools.product(*files))

    def _read_file(self, at: tuple[int, ...], ranges: Sequence[tuple[int, int]], out: np.ndarray) -> int:
        """Decode the part of a block that lies in one file; return the number of its stored chunks."""
        name = self.prefix + self.separator.join(map(str, at))
        parts = list(self._parts(at, ranges))
        path = self.folder.joinpath(*name.split("/"))
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            for _, _, target in parts:
                out[target] = self.fill
            return 0
        n_stored = 0
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            refuse_link_out(path, self.root)
            size = os.fstat(descriptor).st_size
            count = math.prod(s // c for s, c in zip(self.shards, self.chunks, strict=True))
            if size > 2 * (count * self.chunk_bytes + SLACK_BYTES):
                raise ChunkBombError(
                    f"chunk {name} is stored in {size:,} bytes, its pixels are {count * self.chunk_bytes:,}"
                )
            if self.index_at_end is None:
                index = np.array([[0, size]], np.uint64)
            else:
                index = self._read_index(file, size, count, name)
            content = _read_bytes(file, 0, size, name) if len(parts) == count else None
            for number, source, target in parts:
                offset, length = map(int, index[number])
                if offset == length == _ABSENT:
                    out[target] = self.fill
                    continue
                if offset + length > size:
                    raise ChunkError(f"chunk {name} has {size:,} bytes, but its index refers to bytes beyond them")
                is_loaded = content is not None
                stored = content[offset : offset + length] if is_loaded else _read_bytes(file, offset, length, name)
                region = out[target]
                if region.shape == self.chunks and region.flags.c_contiguous:  # the usual case: nothing is copied
                    decode_chunk(stored, region.reshape(-1).view(np.uint8), self.codec, name)
                else:
                    scratch = np.empty(self.chunks, self.dtype)
                    decode_chunk(stored, scratch.reshape(-1).view(np.uint8), self.codec, name)
                    out[target] = scratch[source]
                n_stored += 1
        return n_stored

    def _parts(self, at: tuple[int, ...], ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Any, Any]]:
        """Yield the chunks of a file that overlap the block: number, slices of the chunk, slices of the block."""
        axes = []
        for place, shard, chunk, (start, stop) in zip(at, self.shards, self.chunks, ranges, strict=True):
            axis = []
            for i in range(
                max(0, (start - place * shard) // chunk), min(shard, stop - place * shard + chunk - 1) // chunk
            ):
                begin = place * shard + i * chunk
                low, high = max(start, begin), min(stop, begin + chunk)
                axis.append((i, slice(low - begin, high - begin), slice(low - start, high - start)))
            axes.append(axis)
        for chosen in itertools.product(*axes):
            number = 0
            for (i, _, _), shard, chunk in zip(chosen, self.shards, self.chunks, strict=True):
                number = number * (shard // chunk) + i
            yield number, tuple(c[1] for c in chosen), tuple(c[2] for c in chosen)

    def _read_index(self, file: Any, size: int, count: int, name: str) -> np.ndarray:
        """Return the offset and length of each chunk in a shard."""
        from google_crc32c import value as checksum

        length = 16 * count + 4
        if size < length:
            raise ChunkError(f"chunk {name} has {size:,} bytes; its index alone has {length:,}")
        stored = _read_bytes(file, size - length if self.index_at_end else 0, length, name)
        if checksum(stored[:-4].tobytes()) != int.from_bytes(stored[-4:].tobytes(), "little"):
            raise ChunkError(f"the checksum of the index of chunk {name} is wrong: it is damaged")
        return stored[:-4].view("<u8").reshape(count, 2)


def decode_chunk(stored: np.ndarray, out: np.ndarray, codec: str | None, name: str) -> None:
    """Decode a chunk into ``out``, which it must fill exactly, whatever size it declares."""
    if codec is None:
        if stored.nbytes != out.nbytes:
            raise ChunkError(f"chunk {name} has {stored.nbytes:,} bytes, its pixels are {out.nbytes:,}")
        out[:] = stored
        return
    import imagecodecs

    if codec == "blosc" and stored.nbytes >= 16 and (declared := int(stored[4:8].view("<u4")[0])) > out.nbytes:
        raise ChunkBombError(f"chunk {name} would decompress to {declared:,} bytes, its pixels are {out.nbytes:,}")
    try:
        decoded = (imagecodecs.zstd_decode if codec == "zstd" else imagecodecs.blosc_decode)(stored, out=out)
    except Exception as error:  # every codec has its own exceptions
        if "too small" in str(error):
            raise ChunkBombError(
                f"chunk {name} would decompress to more than its {out.nbytes:,} bytes of pixels"
            ) from error
        raise ChunkError(f"chunk {name} is damaged ({str(error)[:120]})") from error
    if len(decoded) != out.nbytes:
        raise ChunkError(f"chunk {name} holds {len(decoded):,} bytes, its pixels are {out.nbytes:,}")


def refuse_link_out(path: Path, root: Path) -> None:
    """Raise `ChunkError` if a chunk file is a link that leads out of the plate."""
    real, top = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, top]) != top:
        raise ChunkError(f"its chunk {path.name} is a link to {real}, outside of the plate")


def _read_bytes(file: Any, offset: int, length: int, name: str) -> np.ndarray:
    file.seek(offset)
    content = np.fromfile(file, np.uint8, length)
    if len(content) < length:
        raise ChunkError(f"chunk {name} ends before its {length:,} bytes")
    return content


def plan_chunks(folder: Path, root: Path, document: dict[str, Any]) -> ChunkedArray | None:
    """Return the array of a metadata document (``zarr.json`` or ``.zarray``), or None if only Zarr can decode it."""
    try:
        layout = _layout_v3(document) if "node_type" in document else _layout_v2(document)
        if layout is None or layout["codec"] not in (None, "zstd", "blosc") or layout["separator"] not in ("/", "."):
            return None
        fill = _fill_value(document["fill_value"], layout["dtype"])
        array = ChunkedArray(folder=folder, root=root, shape=tuple(document["shape"]), fill=fill, **layout)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    sizes = (*array.shape, *array.chunks, *array.shards)
    if (
        not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 40 for n in sizes)
        or not len(array.shape) == len(array.chunks) == len(array.shards)
        or any(s % c for s, c in zip(array.shards, array.chunks, strict=True))
        or math.prod(-(-n // s) for n, s in zip(array.shape, array.shards, strict=True)) > 1 << 20
    ):
        return None
    return array


def _layout_v3(document: dict[str, Any]) -> dict[str, Any] | None:
    grid, naming, codecs = document["chunk_grid"], document["chunk_key_encoding"], document["codecs"]
    chunks = shards = tuple(grid["configuration"]["chunk_shape"])
    index_at_end, index_codecs = None, []
    if [c["name"] for c in codecs] == ["sharding_indexed"]:
        sharding = codecs[0]["configuration"]
        index_at_end = {"end": True, "start": False}[sharding.get("index_location", "end")]
        codecs, index_codecs, chunks = sharding["codecs"], sharding["index_codecs"], tuple(sharding["chunk_shape"])
    separator = naming.get("configuration", {}).get("separator", "/" if naming["name"] == "default" else ".")
    codec = codecs[1]["name"] if len(codecs) == 2 else None
    if (
        document["zarr_format"] != 3
        or document["node_type"] != "array"
        or document.get("storage_transformers")
        or document["data_type"] not in _TYPES
        or grid["name"] != "regular"
        or naming["name"] not in ("default", "v2")
        or len(codecs) > 2
        or codecs[0]["name"] != "bytes"
        or (index_at_end is not None and [c["name"] for c in index_codecs] != ["bytes", "crc32c"])
    ):
        return None
    dtype = np.dtype(document["data_type"]).newbyteorder("<")
    for order, itemsize in ((codecs[0], dtype.itemsize), *((c, 8) for c in index_codecs[:1])):
        if itemsize > 1 and order.get("configuration", {}).get("endian") != "little":
            return None
    layout = {"dtype": dtype, "chunks": chunks, "shards": shards, "codec": codec, "separator": separator}
    return {**layout, "prefix": f"c{separator}" if naming["name"] == "default" else "", "index_at_end": index_at_end}


def _layout_v2(document: dict[str, Any]) -> dict[str, Any] | None:
    dtype, chunks = np.dtype(document["dtype"]), tuple(document["chunks"])
    if (
        document["zarr_format"] != 2
        or document["order"] != "C"
        or document.get("filters")
        or dtype.newbyteorder("=").name not in _TYPES
    ):
        return None
    codec = None if document["compressor"] is None else document["compressor"]["id"]
    separator = document.get("dimension_separator", ".")
    return {"dtype": dtype, "chunks": chunks, "shards": chunks, "codec": codec, "separator": separator}


def _fill_value(value: Any, dtype: np.dtype) -> Any:
    """Return the value of absent chunks; raise `ValueError` unless the type represents it exactly."""
    if not isinstance(value, bool | int | float) or not np.isfinite(value):
        raise ValueError("the fill value is not a number")
    filled = np.array(value).astype(dtype)
    if filled != value:
        raise ValueError("the type does not represent the fill value")
    return filled[()]


# ---------------------------------------------------------------------------------------------------------------------
# All other arrays


def open_array(location: Location) -> Any:
    """Open an array with Zarr for reading; a chunk that would decompress to more than its pixels is refused."""
    import zarr
    from zarr.storage import WrapperStore

    store, path = location.zarr_store()
    is_local = isinstance(location, LocalFolder)
    is_remote = not is_local and location.archive is None

    class GuardedStore(WrapperStore):
        """A store that checks chunks before they are decompressed."""

        limit = 0  # bytes of a chunk's pixels; 0 while the metadata is read
        index: tuple[str, int] | None = None  # of a shard: its position (start or end), and the number of chunks

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            """Return a chunk's bytes after checking them."""
            if not self.limit or key.rpartition("/")[2] in METADATA_FILES:
                return await self._store.get(key, prototype, byte_range)
            if is_local:
                refuse_link_out(location.path / key, location.root)
            if byte_range is None and not is_remote:
                try:
                    size = await self._store.getsize(key)
                except (FileNotFoundError, KeyError):
                    return None
                if size > 2 * (self.limit * (self.index[1] if self.index else 1) + SLACK_BYTES):
                    raise ChunkBombError(f"chunk {key} is stored in {size:,} bytes, its pixels are {self.limit:,}")
            value = await self._store.get(key, prototype, byte_range)
            if value is not None and byte_range is not None and is_remote:
                value = _select_range(value, byte_range)
            if value is not None and len(value):
                for chunk in _split_shard(value.to_bytes(), self.index if byte_range is None else None):
                    _check_decompressed(chunk, self.limit + SLACK_BYTES, key)
            return value

    array = zarr.open_array(store=GuardedStore(store), path=path, mode="r")
    guarded = array.store  # the array keeps the store that it was opened with: its chunks are checked from here on
    if array.shards is not None:
        codec = next((c for c in array.metadata.codecs if hasattr(c, "index_location")), None)
        where = getattr(codec, "index_location", "end")
        guarded.index = str(getattr(where, "value", where)), math.prod(array.shards) // math.prod(array.chunks)
    guarded.limit = math.prod(array.chunks) * array.dtype.itemsize
    return array


def _select_range(value: Any, byte_range: Any) -> Any:
    """Return the requested part of a file where a web server that does not support ranges sent all of it."""
    if hasattr(byte_range, "suffix"):
        return value[len(value) - byte_range.suffix :] if len(value) > byte_range.suffix else value
    if hasattr(byte_range, "end") and len(value) > byte_range.end - byte_range.start:
        return value[byte_range.start : byte_range.end]
    return value


def _split_shard(content: bytes, index: tuple[str, int] | None) -> Iterator[memoryview]:
    """Yield the compressed chunks of a complete shard, or the chunk itself without an index."""
    view = memoryview(content)
    if index is None:
        yield view
        return
    position, count = index
    size = 16 * count
    table = content[:size] if position == "start" else content[-(size + 4) : -4]
    if len(table) < size:
        return
    for offset, length in np.frombuffer(table, "<u8").reshape(-1, 2).tolist():
        if offset + length <= len(view):
            yield view[offset : offset + length]


def _check_decompressed(chunk: memoryview, limit: int, key: str) -> None:
    """Raise `ChunkBombError` if a compressed chunk declares or contains more than ``limit`` bytes."""
    head = bytes(chunk[:18])
    size = 0
    if head[:4] == b"\x28\xb5\x2f\xfd":
        size = _zstd_declared_size(head) or _zstd_size(chunk, limit)
    elif head[:2] == b"\x1f\x8b" or (
        len(head) > 1 and head[0] & 0x0F == 8 and int.from_bytes(head[:2], "big") % 31 == 0
    ):
        size = _inflated_size(chunk, limit)
    elif len(head) >= 16 and head[0] == 2 and int.from_bytes(head[12:16], "little") == len(chunk):  # blosc
        size = int.from_bytes(head[4:8], "little")
    if size > limit:
        raise ChunkBombError(
            f"chunk {key} would decompress to {size:,} bytes or more, its pixels are at most {limit:,}"
        )


def _zstd_declared_size(head: bytes) -> int:
    """Return the content size in the header of a zstd frame, or 0 if there is none (RFC 8878, 3.1.1.1)."""
    size_flag, is_single, dictionary_flag = head[4] >> 6, head[4] >> 5 & 1, head[4] & 3
    start = 5 + (0 if is_single else 1) + (0, 1, 2, 4)[dictionary_flag]
    length = (1 if is_single else 0, 2, 4, 8)[size_flag]
    value = int.from_bytes(head[start : start + length], "little")
    return value + 256 if length == 2 else value


def _zstd_size(chunk: memoryview, limit: int) -> int:
    """Return the decompressed size of a zstd frame, or ``limit`` + 1 if it is larger than the limit."""
    import imagecodecs

    try:
        return len(imagecodecs.zstd_decode(chunk, out=bytearray(limit)))
    except imagecodecs.ZstdError as error:
        return limit + 1 if "too small" in str(error) else 0  # damaged: the decoder reports it


def _inflated_size(chunk: memoryview, limit: int) -> int:
    """Return the size of a gzip or zlib stream, counted in small steps up to the limit."""
    stream = zlib.decompressobj(47)  # either header
    total, rest = 0, bytes(chunk)
    try:
        while rest and total <= limit and not stream.eof:
            total += len(stream.decompress(rest, 1 << 20))
            rest = stream.unconsumed_tail
    except zlib.error:
        return 0  # not such a stream, or damaged: the decoder reports it
    return total
