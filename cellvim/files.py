"""Local paths and URLs, and files that are written atomically.

A file written here either has its complete content or is not there at all, whatever interrupts the process. Functions
take local paths and, where stated, URLs of any kind that fsspec knows (``s3://``, ``gs://``, ``file://``).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from cellvim.errors import OutputError


def is_url(path: str | Path) -> bool:
    """Return whether a path is a URL."""
    return "://" in str(path)


def open_filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path on it.

    Raises
    ------
    OutputError
        The package for this kind of URL is not installed, or the URL or its options are not valid.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise OutputError(f"{url} cannot be opened: {error}. pip install 'cellvim[cloud]'") from error


def exists(path: str | Path) -> bool:
    """Return whether there is a file, folder or link at a path or URL."""
    return Storage(str(path)).exists() if is_url(path) else os.path.lexists(path)


def read_bytes(path: str | Path) -> bytes | None:
    """Return the content of a file at a path or URL, or None if there is no such file."""
    storage, name = _place(path)
    return storage.read(name)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file at a path or URL atomically, replacing an existing file.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_url(path):
        storage, name = _place(path)
        storage.write(name, content)
    else:
        with atomic_path(path) as partial:
            partial.write_bytes(content)


def remove(path: str | Path) -> None:
    """Remove a file, a folder with its content, or a link, if it exists; of URLs, files only."""
    if is_url(path):
        storage, name = _place(path)
        storage.remove(name)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``, and rename what was written there to ``target`` at the end.

    The block may write a file or a folder. The temporary name has the suffix of ``target``. When the block raises, the
    temporary file or folder is removed and an existing ``target`` is left as it was.

    Raises
    ------
    OutputError
        An `OSError` was raised in the block or by renaming: the target cannot be written.
    """
    target = Path(target)
    partial = target.with_name(f".{target.stem}.{os.getpid()}-{uuid4().hex[:8]}.partial{target.suffix}")
    try:
        yield partial
        if partial.is_file():  # else a loss of power could leave the name without its content
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        replace_path(partial, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            remove(partial)


def replace_path(source: str | Path, target: str | Path, *, aside: str | Path | None = None) -> None:
    """Rename a file or folder, replacing an existing ``target``.

    A file replaces a file, never a folder, in one step. A folder cannot replace anything in one step: the existing
    target is first renamed to ``aside`` (by default a hidden name beside it), and is removed at the end.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir() or not os.path.lexists(target):
        os.replace(source, target)
        return
    aside = target.with_name(f".{target.name}.{uuid4().hex[:8]}.replaced") if aside is None else Path(aside)
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(aside, target)
        raise
    with suppress(OSError):
        remove(aside)


def check_folder_writable(folder: str | Path, *, hint: str = "Choose another --output.") -> None:
    """Check that a local folder can be written, or created if it does not exist.

    Raises
    ------
    OutputError
        It cannot.
    """
    existing = folder = Path(folder).absolute()
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        verb = "written" if existing == folder else "created"
        raise OutputError(f"The folder {folder} cannot be {verb}: {error.strerror or error}. {hint}") from error


def upload(local: Path, url: str) -> None:
    """Copy a file or a Zarr store to a URL, replacing what is there.

    The metadata in the root of a store are copied last: until then the store cannot be opened.

    Raises
    ------
    OutputError
        The target cannot be written.
    """
    filesystem, path = open_filesystem(url)
    try:
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)
        files = [local] if local.is_file() else [p for p in sorted(local.rglob("*")) if p.is_file()]
        files.sort(key=lambda p: p.parent == local and local.is_dir())
        for file in files:
            target = path if file == local else f"{path}/{file.relative_to(local).as_posix()}"
            _make_parent(filesystem, target)
            filesystem.put_file(str(file), target)
    except Exception as error:  # each file system has its own exceptions
        raise OutputError(f"{url} cannot be written ({type(error).__name__}: {str(error)[:200]}).") from error


def storage_at(path: str | Path) -> Storage:
    """Return the storage below a local folder or a URL."""
    return Storage(str(path)) if is_url(path) else LocalStorage(path)


class Storage:
    """Small files below a URL, by relative name such as ``"sessions/1.json"``. See `LocalStorage` for local folders.

    Attributes
    ----------
    name
        The URL, or the path as it was given.
    path
        The local folder; None for a URL.
    """

    path: Path | None = None

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._opened: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # connections are not shared between processes

    def _locate(self, name: str = "") -> tuple[Any, str]:
        if self._opened is None:
            self._opened = open_filesystem(self.name)
        filesystem, root = self._opened
        filesystem.invalidate_cache()  # other processes write here, too
        return filesystem, f"{root.rstrip('/')}/{name}" if name else root

    def _call(self, method: str, name: str, **options: Any) -> Any:
        """Call a method of the file system, and return its result; None if the file or folder does not exist."""
        filesystem, path = self._locate(name)
        try:
            return getattr(filesystem, method)(path, **options)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # each file system has its own exceptions
            verb = "removed" if method == "rm_file" else "read"
            raise OutputError(f"{self.name}/{name} cannot be {verb}: {_reason(error)}.") from error

    def make_folders(self, *folders: str) -> None:
        """Create the folder itself and folders in it. Object stores need none, so this does nothing for URLs."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is no such file.

        Raises
        ------
        OutputError
            The file cannot be read.
        """
        return self._call("cat_file", name)

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names of the files and folders in a folder, without temporary files.

        Raises
        ------
        OutputError
            The folder cannot be read.
        """
        paths = (PurePosixPath(path).name for path in self._call("ls", folder, detail=False) or ())
        return sorted(name for name in paths if not name.startswith("."))

    def exists(self, name: str = "") -> bool:
        """Return whether there is a file with this name, or by default anything at this place."""
        filesystem, path = self._locate(name)
        return bool(filesystem.exists(path))

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        self._call("rm_file", name)

    def remove_all(self, last: str) -> None:
        """Remove everything, and the file ``last`` after all others: it marks the rest as ours."""
        filesystem, root = self._locate()
        if filesystem.exists(root):
            others = [n for n in filesystem.find(root) if n != self._locate(last)[1]]
            filesystem.rm(others) if others else None
        self.remove(last)
        if filesystem.exists(root):  # the folders of a file system
            filesystem.rm(root, recursive=True)

    def write(self, name: str, content: bytes, *, mode: str = "overwrite") -> None:
        """Write a file atomically, replacing an existing one unless the ``mode`` is "create".

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        filesystem, path = self._locate(name)
        try:
            _make_parent(filesystem, path)
            filesystem.pipe_file(path, content, mode=mode)
        except Exception as error:  # each file system has its own exceptions
            raise OutputError(f"{self.name} cannot be written: {_reason(error)}.") from error

    def create(self, name: str, content: bytes) -> bool:
        """Create a file and return True, or return False if it exists already.

        Of several callers exactly one gets True in local folders, S3 and Google Cloud Storage (which write on the
        condition that the object does not exist); with other stores several may.
        """
        if self.exists(name):
            return False
        try:
            self.write(name, content, mode="create")
        except OutputError:
            if self.exists(name):  # created by another caller in the meantime
                return False
            raise
        return True

    def remove_if_equal(self, name: str, content: bytes) -> bool:
        """Remove a file that has this content, and return whether this call removed it (always True for URLs)."""
        self.remove(name)
        return True

    def age_seconds(self, name: str) -> float | None:
        """Return the time since a file was written, by the clock of the storage; None if it does not exist."""
        from datetime import UTC, datetime

        filesystem, path = self._locate(name)
        try:
            written = filesystem.modified(path)
        except (FileNotFoundError, NotImplementedError):
            return None
        written = written if written.tzinfo else written.replace(tzinfo=UTC)
        return max(0.0, (datetime.now(UTC) - written).total_seconds())


class LocalStorage(Storage):
    """Small files below a local or shared folder."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder))
        self.path = Path(folder).absolute()  # other processes may have another working directory

    def _locate(self, name: str = "") -> tuple[Any, str]:
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(), str(self.path / name)

    def make_folders(self, *folders: str) -> None:
        """Create the folder itself and folders in it.

        Only this method does: `write` does not bring a removed folder back.
        """
        try:
            for folder in ("", *folders):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically, replacing an existing one."""
        target = self.path / name
        with suppress(OSError):  # writing then fails
            target.parent.mkdir(exist_ok=True)  # not its parents: see `make_folders`
        write_atomic(target, content)

    def create(self, name: str, content: bytes) -> bool:
        """Create a file and return True, or return False if it exists already."""
        target = self.path / name
        partial = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex[:8]}")
        try:
            partial.write_bytes(content)
            try:
                os.link(partial, target)  # atomic, with the complete content
            except FileExistsError:
                return False
            except OSError:  # the file system has no hard links
                with open(target, "xb") as file:
                    file.write(content)
        except FileExistsError:
            return False
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        finally:
            with suppress(OSError):
                partial.unlink()
        return True

    def remove_if_equal(self, name: str, content: bytes) -> bool:
        """Remove a file that has this content, and return whether this call removed it."""
        aside = self.path / f".{name}.{uuid4().hex}"
        with suppress(OSError):
            os.rename(self.path / name, aside)
            equal = aside.read_bytes() == content
            if not equal:  # replaced by another process in the meantime: put it back
                os.link(aside, self.path / name)
            aside.unlink()
            return equal
        return False

    def remove_all(self, last: str) -> None:
        """Remove everything, and the file ``last`` after all others: it marks the rest as ours."""
        for _ in range(3):  # another process may be adding files
            for name in os.listdir(self.path) if self.path.exists() else ():
                if name != last:
                    with suppress(OSError):
                        remove(self.path / name)
            if {p.name for p in self.path.glob("*")} <= {last}:
                shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                return
            time.sleep(0.2)
        raise OutputError(f"{self.path} cannot be removed. Remove it and run the command again.")

    def age_seconds(self, name: str) -> float | None:
        """Return the time since a file was written, by the clock of the file system; None if it does not exist."""
        clock = self.path / f".clock-{os.getpid()}"
        try:
            written = (self.path / name).stat().st_mtime
        except OSError:
            return None
        try:  # the clock of a shared file system may differ from that of this machine
            clock.touch()
            now = clock.stat().st_mtime
            clock.unlink(missing_ok=True)
        except OSError:  # the folder is read-only
            now = time.time()
        return max(0.0, now - written)


def _place(path: str | Path) -> tuple[Storage, str]:
    """Return the storage of a file's folder, and the name of the file."""
    folder, _, name = str(path).rstrip("/").rpartition("/")
    return (Storage(folder), name) if is_url(path) else (LocalStorage(Path(path).parent), Path(path).name)


def _make_parent(filesystem: Any, path: str) -> None:
    """Create the parent folder on file systems that have folders."""
    protocols = filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    if {"file", "memory"} & set(protocols):
        filesystem.makedirs(str(PurePosixPath(path).parent), exist_ok=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {str(error)[:200]}"
