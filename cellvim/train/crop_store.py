"""Crops that were cut: held in memory while they fit, else in files that training reads from as from an array."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellvim.errors import CellvimWarning, OutputError

MEMORY = 1 << 31  # bytes of crops held in memory; of more than that, all lie in files


class CropFile:
    """Crops (n, C, S, S) in a file, read when they are indexed; only its name goes to loading processes."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.shape = path, np.dtype(dtype), tuple(shape)
        self._mapped: np.memmap | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if self._mapped is None:
            self._mapped = np.memmap(self.path, self.dtype, mode="r", shape=self.shape)
        return np.asarray(self._mapped[rows])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


class CropStore:
    """Takes the crops of one plate after the other.

    Parameters
    ----------
    folder
        For the files; made when it is needed.
    n_fields
        Of all plates, to tell beforehand how large the files will be.
    memory
        Bytes that are held in memory at most; None for `MEMORY`.
    """

    def __init__(self, folder: Path, n_fields: int, *, memory: int | None = None) -> None:
        self.folder, self.n_fields = Path(folder), n_fields
        self.memory = MEMORY if memory is None else memory
        self.bytes = self.fields = 0  # that were cut so far
        self.goes_on_in_files = False
        self.parts: list[np.ndarray] = []  # of the plate in hand, in memory
        self.file: Any = None
        self.rows, self.shape, self.dtype = 0, (0, 0, 0), np.dtype(np.float16)

    def find(self, key: str, n_fields: int) -> tuple[CropFile, dict[str, np.ndarray]] | None:
        """Return the crops of a plate from an earlier run that cut the same, and their table; None without."""
        try:
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as stored:
                columns = {name: stored[name] for name in stored.files}
            dtype, shape = np.dtype(str(columns.pop("dtype"))), tuple(columns.pop("shape").tolist())
            path = self.folder / f"{key}.crops"
            if path.stat().st_size != int(np.prod(shape)) * dtype.itemsize:
                return None
        except (OSError, ValueError, KeyError):
            return None  # not there, or not whole: they are cut again
        self.goes_on_in_files = True
        self.n_fields -= n_fields
        return CropFile(path, dtype, shape), columns

    def append(self, crops: np.ndarray, key: str) -> None:
        """Take a field's crops of the plate ``key``.

        Raises
        ------
        OutputError
            They are more than memory and disk hold.
        """
        self.fields += 1
        if not len(crops):
            return
        self.shape, self.dtype = crops.shape[1:], crops.dtype
        self.bytes += crops.nbytes
        self.rows += len(crops)
        self.goes_on_in_files |= self.bytes > self.memory
        if not self.goes_on_in_files:
            self.parts.append(crops)
            return
        try:
            if self.file is None:
                self._open(key)
            crops.tofile(self.file)
        except OSError as error:
            self.discard()
            raise OutputError(
                f"The crops cannot be written to {self.folder}: {error.strerror or error}. Choose a --data.cache on "
                "another disk."
            ) from error

    def finish(self, key: str, columns: dict[str, np.ndarray]) -> np.ndarray | CropFile:
        """Return the crops of the plate, and keep its table beside them where they lie in a file."""
        rows, parts, file = self.rows, self.parts, self.file
        self.rows, self.parts = 0, []
        if file is None:
            return np.concatenate(parts) if parts else np.zeros((0, *self.shape), self.dtype)
        shape = (rows, *self.shape)
        path = self.folder / f"{key}.crops"
        try:
            file.close()
            os.replace(file.name, path)
            partial = self.folder / f"{key}.{os.getpid()}.partial.npz"
            np.savez(partial, dtype=self.dtype.str, shape=np.array(shape), **columns)
            os.replace(partial, self.folder / f"{key}.npz")
        except OSError as error:
            self.discard()
            raise OutputError(f"The crops cannot be written to {self.folder}: {error.strerror or error}.") from error
        self.file = None
        return CropFile(path, self.dtype, shape)

    def discard(self) -> None:
        """Remove what is not whole."""
        if self.file is not None:
            self.file.close()
            Path(self.file.name).unlink(missing_ok=True)
            self.file = None

    def _open(self, key: str) -> None:
        """Begin a file with what is in memory, if the disk will hold all that is to come."""
        per_field = self.bytes / self.fields
        needed = int(per_field * self.n_fields)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"The crops need about {_gigabytes(needed)} of disk ({self.fields} of {self.n_fields} fields made "
                f"{_gigabytes(self.bytes)}), and {self.folder} has {_gigabytes(free)}. Choose a --data.cache on "
                "another disk, or take fewer or smaller crops: --data.wells, --data.crop_size, --data.margin."
            )
        warnings.warn(
            f"The crops need about {_gigabytes(needed)}, more than the {_gigabytes(self.memory)} that are held in "
            f"memory; they lie in {self.folder}.",
            CellvimWarning,
            stacklevel=2,
        )
        self.file = (self.folder / f"{key}.{os.getpid()}.partial").open("wb")
        for part in self.parts:
            part.tofile(self.file)
        self.parts = []


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB"


def remove_files(folder: Path, keys: Sequence[str]) -> None:
    """Remove the files of these plates, and their folder if nothing else is in it."""
    for key in keys:
        for suffix in ("crops", "npz"):
            (folder / f"{key}.{suffix}").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
