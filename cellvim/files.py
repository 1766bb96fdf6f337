"""Where a job keeps its files: a folder of this machine or a shared one, or an object store behind a URL.

A file appears whole or not at all, which is all that the ledger builds on.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from cellvim.errors import OutputError

FRESH_S = 60.0  # a file that was touched since belongs to someone who is alive


def storage_at(output: str | Path) -> Storage:
    """Return the place of ``<output>.partial``."""
    text = str(output).rstrip("/")
    if "://" in text:
        return Bucket(text + ".partial")
    return Folder(Path(text + ".partial"))


class Storage:
    """Small files by relative name. See `Folder` and `Bucket`."""

    name: str
    is_local: bool

    def prepare(self, *folders: str) -> None:
        """Make the place, and folders in it. Only this does: what was removed is not brought back by a late writer.

        Raises
        ------
        OutputError
            It cannot be written.
        """
        raise NotImplementedError

    def write(self, name: str, content: bytes) -> None:
        """Make the file appear whole, replacing it where it exists.

        Raises
        ------
        OutputError
            It cannot be written.
        """
        raise NotImplementedError

    def read(self, name: str) -> bytes | None:
        """Return the content, or None where there is no such file."""
        raise NotImplementedError

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none where it does not exist. Unfinished files are left out."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        raise NotImplementedError

    def remove_all(self, last: str) -> None:
        """Remove the whole place, a file of the name ``last`` at the end: until then it says whose the rest is."""
        raise NotImplementedError

    def exists(self) -> bool:
        """Return whether there is anything."""
        raise NotImplementedError

    def age_s(self, name: str) -> float | None:
        """Return how long ago the file was written by the storage's own clock, or None where there is none."""
        raise NotImplementedError

    def create(self, name: str, content: bytes) -> bool:
        """Make the file if it does not exist, and return whether it was made: of several callers one succeeds."""
        raise NotImplementedError

    def take_away(self, name: str, content: bytes) -> bool:
        """Remove a file of that content, and return whether it was this caller who did."""
        raise NotImplementedError


class Folder(Storage):
    """A folder, of this machine or shared."""

    is_local = True

    def __init__(self, path: Path) -> None:
        self.path, self.name = path.absolute(), str(path)  # other processes may stand elsewhere

    def prepare(self, *folders: str) -> None:
        """Make the place, and folders in it."""
        try:
            for folder in ("", *folders):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def write(self, name: str, content: bytes) -> None:
        """Make the file appear whole, replacing it where it exists."""
        target = self.path / name
        partial = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex[:8]}")
        try:
            try:
                partial.write_bytes(content)
            except FileNotFoundError:  # a folder in the place, not the place itself
                partial.parent.mkdir(exist_ok=True)
                partial.write_bytes(content)
            os.replace(partial, target)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def read(self, name: str) -> bytes | None:
        """Return the content, or None where there is no such file."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(f"{self.path / name} cannot be read: {error.strerror or error}.") from error

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted."""
        try:
            return sorted(n for n in os.listdir(self.path / folder) if not n.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise OutputError(f"{self.path / folder} cannot be read: {error.strerror or error}.") from error

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def remove_all(self, last: str) -> None:
        """Remove the whole place, a file of the name ``last`` at the end."""
        for _ in range(3):  # someone may be adding to it
            with suppress(FileNotFoundError):
                for child in self.path.iterdir():
                    if child.is_dir() and not child.is_symlink():
                        shutil.rmtree(child, ignore_errors=True)
                    elif child.name != last:
                        child.unlink(missing_ok=True)
            if {p.name for p in self.path.glob("*")} <= {last}:
                shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                return
            time.sleep(0.2)
        raise OutputError(f"{self.path} cannot be removed. Remove it, and run the command again.")

    def exists(self) -> bool:
        """Return whether there is anything."""
        return self.path.exists()

    def age_s(self, name: str) -> float | None:
        """Return how long ago the file was written."""
        try:
            written = (self.path / name).stat().st_mtime
            clock = self.path / f".clock-{os.getpid()}"
            try:  # the clock of a shared file system is not ours
                clock.touch()
                now = clock.stat().st_mtime
                clock.unlink(missing_ok=True)
            except OSError:  # we may only look
                now = time.time()
        except OSError:
            return None
        return max(0.0, now - written)

    def create(self, name: str, content: bytes) -> bool:
        """Make the file if it does not exist, and return whether it was made."""
        target = self.path / name
        partial = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex[:8]}")
        try:
            partial.write_bytes(content)
            try:
                os.link(partial, target)  # whole at once, for one alone
            except FileExistsError:
                return False
            except OSError:  # a file system without links
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

    def take_away(self, name: str, content: bytes) -> bool:
        """Remove a file of that content, and return whether it was this caller who did."""
        aside = self.path / f".{name}.{uuid4().hex}"
        try:
            os.rename(self.path / name, aside)
            if aside.read_bytes() == content:
                aside.unlink()
                return True
            os.link(aside, self.path / name)  # of another in the meantime: put back
            aside.unlink()
        except OSError:
            return False
        return False


class Bucket(Storage):
    """A prefix of an object store, or of anything else that fsspec reaches by a URL."""

    is_local = False

    def __init__(self, url: str) -> None:
        self.url = self.name = url.rstrip("/")
        self._opened: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "name": self.name, "_opened": None}

    @property
    def _place(self) -> tuple[Any, str]:
        if self._opened is None:
            try:
                import fsspec

                self._opened = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise OutputError(f"{self.url} cannot be reached: {error}. pip install 'cellvim[cloud]'") from error
        return self._opened

    def _path(self, name: str) -> str:
        return f"{self._place[1].rstrip('/')}/{name}" if name else self._place[1]

    def prepare(self, *folders: str) -> None:
        """Do nothing: an object store has no folders."""

    def write(self, name: str, content: bytes, *, mode: str = "overwrite") -> None:
        """Make the object appear whole, replacing it where it exists."""
        filesystem, path = self._place[0], self._path(name)
        try:
            if self.url.startswith(("file:", "memory:")):
                filesystem.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            filesystem.pipe_file(path, content, mode=mode)
        except Exception as error:  # each filesystem has its own kinds
            raise OutputError(f"{self.url} cannot be written ({type(error).__name__}: {str(error)[:200]}).") from error

    def read(self, name: str) -> bytes | None:
        """Return the content, or None where there is no such object."""
        try:
            return self._place[0].cat_file(self._path(name))
        except FileNotFoundError:
            return None
        except Exception as error:  # each filesystem has its own kinds
            raise OutputError(
                f"{self.url}/{name} cannot be read ({type(error).__name__}: {str(error)[:200]})."
            ) from error

    def names(self, folder: str) -> list[str]:
        """Return the names under a prefix, sorted."""
        filesystem = self._place[0]
        filesystem.invalidate_cache()
        try:
            found = filesystem.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(n).name for n in found)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        try:
            self._place[0].rm_file(self._path(name))
        except FileNotFoundError:
            return

    def remove_all(self, last: str) -> None:
        """Remove everything under the prefix, an object of the name ``last`` at the end."""
        filesystem, place = self._place
        filesystem.invalidate_cache()
        found = [n for n in filesystem.find(place) if n != self._path(last)] if filesystem.exists(place) else []
        if found:
            filesystem.rm(found)
        self.remove(last)
        if filesystem.exists(place):  # folders of a file system
            filesystem.rm(place, recursive=True)

    def exists(self) -> bool:
        """Return whether there is anything."""
        self._place[0].invalidate_cache()
        return bool(self._place[0].exists(self._place[1]))

    def age_s(self, name: str) -> float | None:
        """Return how long ago the object was written."""
        from datetime import UTC, datetime

        filesystem = self._place[0]
        filesystem.invalidate_cache()
        try:
            written = filesystem.modified(self._path(name))
        except (FileNotFoundError, NotImplementedError):
            return None
        written = written if written.tzinfo else written.replace(tzinfo=UTC)
        return max(0.0, (datetime.now(UTC) - written).total_seconds())

    def create(self, name: str, content: bytes) -> bool:
        """Make the object if it does not exist: S3 and GCS let one alone succeed, other stores may let several."""
        filesystem = self._place[0]
        filesystem.invalidate_cache()
        if filesystem.exists(self._path(name)):
            return False
        try:
            self.write(name, content, mode="create")
        except OutputError:
            filesystem.invalidate_cache()
            if filesystem.exists(self._path(name)):  # another was faster
                return False
            raise
        return True

    def take_away(self, name: str, content: bytes) -> bool:
        """Remove an object; another caller may believe the same."""
        self.remove(name)
        return True
