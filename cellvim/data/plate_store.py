"""Where a plate lies: a folder, a zip file or a URL, read alike; and a guard against chunks that would fill memory.

Part of `cellvim.data.plate`, which is the only user: nothing else opens Zarr images.
"""

from __future__ import annotations

import atexit
import os
import zlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

from cellvim.data.chunks import SLACK_BYTES, ChunkBombError, refuse_link_out
from cellvim.errors import PlateError

if TYPE_CHECKING:
    from collections.abc import Iterator

METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
MAX_METADATA_BYTES = 64 << 20
NO_LISTING = (FileNotFoundError, NotADirectoryError, PermissionError, NotImplementedError)
NO_LISTING_STATUS = (401, 403, 404, 405, 501)  # a web server's answer where it lists no folders


class Location:
    """A folder of a plate, wherever it lies. Paths are relative, with ``/``; `inside` refuses those that lead out."""

    name: str

    def read(self, name: str) -> bytes | None:
        """Return a small file's content, or None where there is none.

        Raises
        ------
        PlateError
            It cannot be read, or is too large for metadata.
        """
        raise NotImplementedError

    def prefetch(self, names: list[str]) -> None:
        """Fetch small files, given by their paths from here, all at once, where each takes a while."""

    def child(self, relative: str) -> Location:
        """Return a folder below; it need not exist."""
        raise NotImplementedError

    def inside(self, relative: str) -> Location | None:
        """Return a folder below, or None where the path is empty or leads out of this one."""
        parts = relative.replace("\\", "/").split("/")
        if not relative or relative == "None" or any(p in ("", ".", "..") or ":" in p or "\x00" in p for p in parts):
            return None
        return self.child("/".join(parts))

    def exists(self) -> bool:
        """Return whether the folder is there."""
        raise NotImplementedError

    def folders(self) -> list[str]:
        """Return the names of the folders in it."""
        raise NotImplementedError

    def stored_bytes(self) -> int:
        """Return how many bytes of chunks are stored in it and below."""
        raise NotImplementedError

    def zarr_store(self) -> tuple[Any, str]:
        """Return the Zarr store, and the path in it."""
        raise NotImplementedError


class Folder(Location):
    """A folder of this machine."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self.name = path, path.name
        self.root = path if root is None else root  # of the plate

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes | None:
        """Return a small file's content, or None where there is none."""
        path = self.path / name
        try:
            if path.stat().st_size > MAX_METADATA_BYTES:
                raise PlateError(f"{path} is of {path.stat().st_size:,} bytes; expected metadata.")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise PlateError(f"{path} cannot be read: {error}.") from error

    def child(self, relative: str) -> Folder:
        """Return a folder below; it need not exist."""
        return Folder(self.path.joinpath(*relative.split("/")), self.root)

    def inside(self, relative: str) -> Location | None:
        """Return a folder below, or None where the path is empty or leads out of this one."""
        target = super().inside(relative)
        try:
            if target is not None and target.exists() and not target.path.resolve().is_relative_to(self.path.resolve()):
                return None  # a link out of the plate
        except (OSError, RuntimeError):  # a name that is too long, a loop of links
            return None
        return target

    def exists(self) -> bool:
        """Return whether the folder is there."""
        return self.path.is_dir()

    def folders(self) -> list[str]:
        """Return the names of the folders in it."""
        return [p.name for p in self.path.iterdir() if p.is_dir()] if self.path.is_dir() else []

    def stored_bytes(self) -> int:
        """Return how many bytes of chunks are stored in it and below."""
        files = (p for p in self.path.rglob("*") if p.name not in METADATA and p.is_file())
        return sum(p.stat().st_size for p in files)

    def zarr_store(self) -> tuple[Any, str]:
        """Return the Zarr store, and the path in it."""
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=True), ""


class Zipped(Location):
    """A folder in a zip file."""

    def __init__(self, archive: _Archive, inner: str) -> None:
        self.archive, self.inner = archive, inner
        self.name = PurePosixPath(inner).name or archive.path.name.removesuffix(".zip")

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.inner}".rstrip("/")

    def _key(self, name: str) -> str:
        return f"{self.inner}/{name}" if self.inner else name

    def read(self, name: str) -> bytes | None:
        """Return a small file's content, or None where there is none."""
        return self.archive.read(self._key(name))

    def child(self, relative: str) -> Zipped:
        """Return a folder below; it need not exist."""
        return Zipped(self.archive, self._key(relative))

    def exists(self) -> bool:
        """Return whether the folder is there."""
        return self.inner in self.archive.children

    def folders(self) -> list[str]:
        """Return the names of the folders in it."""
        return [n for n in self.archive.children.get(self.inner, ()) if self._key(n) in self.archive.children]

    def stored_bytes(self) -> int:
        """Return how many bytes of chunks are stored in it and below."""
        return sum(size for key, size in self.archive.below(self.inner) if PurePosixPath(key).name not in METADATA)

    def zarr_store(self) -> tuple[Any, str]:
        """Return the Zarr store, and the path in it."""
        from zarr.storage import ZipStore

        return ZipStore(self.archive.path, mode="r"), self.inner


class _Archive:
    """A zip file's directory, read once; the file is opened anew in each process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with ZipFile(path) as file:
                self.sizes = {i.filename: i.file_size for i in file.infolist() if not i.is_dir()}
        except (BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise PlateError(f"{path} cannot be read as a zip file: {error}.") from error

    @cached_property
    def children(self) -> dict[str, set[str]]:
        """Folder -> names in it."""
        found: dict[str, set[str]] = {"": set()}
        for key in self.sizes:
            parts = key.split("/")
            for i, part in enumerate(parts):
                found.setdefault("/".join(parts[:i]), set()).add(part)
        return found

    def below(self, folder: str) -> Iterator[tuple[str, int]]:
        """Return the entries below a folder, with their sizes."""
        prefix = f"{folder}/" if folder else ""
        return ((key, size) for key, size in self.sizes.items() if key.startswith(prefix))

    def read(self, key: str) -> bytes | None:
        """Return the content of an entry, or None where there is none."""
        if key not in self.sizes:
            return None
        if self.sizes[key] > MAX_METADATA_BYTES:
            raise PlateError(f"{self.path}/{key} is of {self.sizes[key]:,} bytes; expected metadata.")
        try:
            with ZipFile(self.path) as file:
                return file.read(key)
        except (BadZipFile, OSError, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise PlateError(f"{self.path}/{key} cannot be read: {error}.") from error


class Remote(Location):
    """A folder behind a URL, through fsspec: ``s3://``, ``https://``, ``memory://`` and whatever else is installed."""

    def __init__(self, filesystem: Any, path: str, url: str, fetched: dict[str, Any] | None = None) -> None:
        self.filesystem, self.path, self.url = filesystem, path.rstrip("/"), url.rstrip("/")
        self.name = PurePosixPath(self.path).name
        self._fetched: dict[str, Any] = {} if fetched is None else fetched  # path -> content or error, until it is read

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        """Return a small file's content, or None where there is none."""
        try:
            content = self._fetched.pop(f"{self.path}/{name}", None)
            if content is None:
                content = self.filesystem.cat_file(f"{self.path}/{name}", start=0, end=MAX_METADATA_BYTES + 1)
            if isinstance(content, Exception):
                raise content
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except Exception as error:  # each filesystem has its own kinds
            if "416" in str(error):  # an empty file has no first byte
                return b""
            raise PlateError(
                f"{self.url}/{name} cannot be read ({type(error).__name__}: {str(error)[:200]})."
            ) from error
        if len(content) > MAX_METADATA_BYTES:
            raise PlateError(f"{self.url}/{name} is larger than {MAX_METADATA_BYTES:,} bytes; expected metadata.")
        return content

    def child(self, relative: str) -> Remote:
        """Return a folder below; it need not exist."""
        return Remote(self.filesystem, f"{self.path}/{relative}", f"{self.url}/{relative}", self._fetched)

    def prefetch(self, names: list[str]) -> None:
        """Fetch small files all at once; `read` then gives what came of each, an error too."""
        paths = [f"{self.path}/{name}" for name in names]
        try:
            contents = self.filesystem.cat_ranges(paths, 0, MAX_METADATA_BYTES + 1, on_error="return")
        except (NotImplementedError, TypeError, OSError):
            # The filesystem cannot, does not know the arguments, or broke off: each is then read, and may fail, alone.
            return
        self._fetched.update(zip(paths, contents, strict=True))

    def exists(self) -> bool:
        """Return whether the folder is there."""
        return any(self.read(name) is not None for name in METADATA)

    def folders(self) -> list[str]:
        """Return the names of the folders in it; none where the server does not list them."""
        entries = self._listed("ls") or []
        return [PurePosixPath(e["name"].rstrip("/")).name for e in entries if e.get("type") == "directory"]

    def stored_bytes(self) -> int:
        """Return how many bytes of chunks are stored in it and below."""
        found = self._listed("find")
        if not found:  # it cannot be told: then it may be there
            return 1
        return sum(e.get("size") or 1 for k, e in found.items() if PurePosixPath(k).name not in METADATA)

    def _listed(self, how: str) -> Any:
        """Return what the filesystem lists here, None where it lists nothing to us.

        Raises
        ------
        PlateError
            It was to list, and failed: what is there must not be taken for absent.
        """
        try:
            return getattr(self.filesystem, how)(self.path, detail=True)
        except NO_LISTING:
            return None
        except Exception as error:  # each filesystem has its own kinds, not all of them an OSError
            answers = (getattr(error, name, None) for name in ("status", "code", "status_code"))
            if any(answer in NO_LISTING_STATUS for answer in answers):
                return None
            raise PlateError(f"{self.url} cannot be listed ({type(error).__name__}: {str(error)[:200]}).") from error

    def zarr_store(self) -> tuple[Any, str]:
        """Return the Zarr store, and the path in it."""
        from zarr.storage import FsspecStore

        return FsspecStore(_asynchronous(self.filesystem), read_only=True, path=self.path), ""


_SESSIONS: dict[tuple[int, str], Any] = {}  # one a process and filesystem: each has connections of its own


def _asynchronous(filesystem: Any) -> Any:
    """Return the filesystem in the form that Zarr's event loop can use."""
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
        _SESSIONS[key] = fsspec.filesystem(_protocol(filesystem), **options)
    return _SESSIONS[key]


def _close_sessions() -> None:
    """Close the connections of this process, which would otherwise complain as it ends."""
    from zarr.core.sync import sync

    for (process, _), filesystem in _SESSIONS.items():
        session = getattr(filesystem, "_s3", None) or getattr(filesystem, "_session", None)
        if process == os.getpid() and session is not None:
            with suppress(Exception):  # the program is over
                sync(session.close(), timeout=2)


def locate(path: str | Path, options: dict[str, Any] | None = None) -> Location:
    """Return the place of a plate: a folder, a zip file (its only folder, or its top), or a URL.

    Raises
    ------
    PlateError
        It does not exist, or the URL cannot be used.
    """
    text = str(path)
    if "://" in text or "::" in text:
        return _remote(text, options or {})
    path = Path(path)
    if not path.exists():
        raise PlateError(f"{path} does not exist; expected the folder of an OME-Zarr plate.")
    if path.is_dir():
        return Folder(path)
    if path.suffix.lower() == ".zip":
        archive = _Archive(path)
        top = archive.children[""]
        if not top & set(METADATA):
            inner = [n for n in top if set(METADATA) & archive.children.get(n, set())]
            if len(inner) == 1:
                return Zipped(archive, inner[0])
        return Zipped(archive, "")
    raise PlateError(
        f"{path} is a file; expected the folder of an OME-Zarr plate, or a zip of it. Make one from TIFFs with "
        "`cellvim import`."
    )


def _remote(url: str, options: dict[str, Any]) -> Remote:
    import fsspec

    protocol = url.split("://")[0].split("::")[0]
    if protocol == "s3" and not options:
        options = {"anon": True} if not _has_aws_credentials() else {}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise PlateError(f"{url} needs a package that is not here ({error}): pip install 'cellvim[cloud]'.") from error
    except Exception as error:  # unknown protocols and bad options, of any kind
        raise PlateError(f"{url} cannot be opened ({type(error).__name__}: {str(error)[:200]}).") from error
    return Remote(filesystem, path, url)


def _has_aws_credentials() -> bool:
    """Return whether the environment names credentials; public buckets are read without any."""
    return any(name in os.environ for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"))


def _protocol(filesystem: Any) -> str:
    return filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]


def open_array(location: Location) -> Any:
    """Open an array for reading; a chunk that would decompress to more than it declares is refused unread."""
    import zarr
    from zarr.storage import WrapperStore

    store, path = location.zarr_store()

    class Guarded(WrapperStore):
        """A store whose chunks are looked at before they are decompressed."""

        limit = 0
        index: tuple[str, int] | None = None  # of a shard: at its start or end, and how many chunks

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            """Return a chunk's bytes, once they have been looked at."""
            if not self.limit or key.rpartition("/")[2] in METADATA:
                return await self._store.get(key, prototype, byte_range)
            if isinstance(location, Folder):
                refuse_link_out(location.path / key, location.root)
            most = self.limit * (self.index[1] if self.index else 1) + SLACK_BYTES
            if byte_range is None and not isinstance(location, Remote):
                try:
                    size = await self._store.getsize(key)
                except (FileNotFoundError, KeyError):
                    return None
                if size > 2 * most:
                    raise ChunkBombError(f"chunk {key} is stored in {size:,} bytes, its pixels are {self.limit:,}")
            value = await self._store.get(key, prototype, byte_range)
            if value is not None and byte_range is not None and isinstance(location, Remote):
                value = _only(value, byte_range)
            if value is not None and len(value):
                for part in _parts(value.to_bytes(), self.index if byte_range is None else None):
                    _check_decompressed(part, self.limit + SLACK_BYTES, key)
            return value

    guarded = Guarded(store)
    array = zarr.open_array(store=guarded, path=path, mode="r")
    # the array keeps the store that it was opened with: from here on its chunks are looked at
    chunk = array.chunks  # of a shard: the chunks in it
    guarded = array.store
    guarded.index = (
        None if array.shards is None else (_index_location(array), _product(array.shards) // _product(chunk))
    )
    guarded.limit = _product(chunk) * array.dtype.itemsize
    return array


def _only(value: Any, byte_range: Any) -> Any:
    """Return the part that was asked for where a web server, not knowing ranges, sent the whole file."""
    if hasattr(byte_range, "suffix"):
        return value[len(value) - byte_range.suffix :] if len(value) > byte_range.suffix else value
    if hasattr(byte_range, "end") and len(value) > byte_range.end - byte_range.start:
        return value[byte_range.start : byte_range.end]
    return value


def _index_location(array: Any) -> str:
    for codec in getattr(array.metadata, "codecs", ()):
        if hasattr(codec, "index_location"):
            return str(getattr(codec.index_location, "value", codec.index_location))
    return "end"


def _product(values: tuple[int, ...]) -> int:
    import math

    return math.prod(int(v) for v in values)


def _parts(content: bytes, index: tuple[str, int] | None) -> Iterator[memoryview]:
    """Yield the compressed chunks of a whole shard, or the chunk itself."""
    view = memoryview(content)
    if index is None:
        yield view
        return
    import numpy as np

    where, count = index
    size = 16 * count
    table = content[:size] if where == "start" else content[-(size + 4) : -4]
    if len(table) < size:
        return
    for offset, length in np.frombuffer(table, "<u8").reshape(-1, 2).tolist():
        if offset + length <= len(view):
            yield view[offset : offset + length]


def _check_decompressed(chunk: memoryview, limit: int, key: str) -> None:
    """Raise where a compressed chunk says, or shows, that it holds more than ``limit`` bytes."""
    head = bytes(chunk[:18])
    size = 0
    if head[:4] == b"\x28\xb5\x2f\xfd":
        size = _zstd_content_size(head) or _zstd_decompressed_size(chunk, limit)
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


def _zstd_content_size(head: bytes) -> int:
    """Return the size that a zstd frame says it has; 0 where it does not say (RFC 8878, 3.1.1.1)."""
    descriptor = head[4]
    flag, single, dictionary = descriptor >> 6, descriptor >> 5 & 1, descriptor & 3
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[dictionary]
    length = (1 if single else 0, 2, 4, 8)[flag]
    value = int.from_bytes(head[start : start + length], "little")
    return value + 256 if length == 2 else value


def _zstd_decompressed_size(chunk: memoryview, limit: int) -> int:
    """Return ``limit`` + 1 where a frame that does not say its size is larger than the limit."""
    import imagecodecs

    try:
        imagecodecs.zstd_decode(chunk, out=bytearray(limit))
    except imagecodecs.ZstdError as error:
        return limit + 1 if "too small" in str(error) else 0  # damaged: the decoder will say
    return 0


def _inflated_size(chunk: memoryview, limit: int) -> int:
    """Return the size of a gzip or zlib stream, counted in small steps and no further than the limit."""
    stream = zlib.decompressobj(47)  # either header
    total, rest = 0, bytes(chunk)
    try:
        while rest and total <= limit and not stream.eof:
            total += len(stream.decompress(rest, 1 << 20))
            rest = stream.unconsumed_tail
    except zlib.error:
        return 0  # no such stream after all, or a damaged one: the decoder will say
    return total
