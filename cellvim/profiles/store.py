"""Read an AnnData by runs of rows, from Zarr, HDF5 or memory: never the whole of a store on disk."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.errors import InputError, listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

TABLES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
FORMATS = (".zarr", ".h5ad", *TABLES)


class RowStore:
    """The rows of an AnnData, read when they are asked for.

    Made by `open_rows`. Columns of ``obs`` are read one at a time, the index of the rows never.

    Attributes
    ----------
    name
        What to call it in messages.
    n_rows
        How many rows there are.
    matrices
        Names and widths of what can be read by rows: ``X`` and, where there are, ``X_emb_<channel>`` of obsm.
    var_names
        Names of the features of X.
    obs_columns
        Names of the columns of obs.
    """

    def __init__(self, name: str, obs: Any, matrices: dict[str, Any], var_names: list[str], uns: Any, obsm: Any = None):
        self.name = name
        self.var_names = var_names
        self._obs = obs
        self._uns = uns
        self._obsm = obsm
        self._matrices = matrices
        if isinstance(obs, pd.DataFrame):
            self.obs_columns = [str(c) for c in obs.columns]
        else:
            self.obs_columns = [str(c) for c in obs.attrs["column-order"]]
        self.n_rows = int(matrices["X"].shape[0])
        self.matrices = {key: int(values.shape[1]) for key, values in matrices.items()}

    def column(self, name: str) -> pd.Series:
        """Return a whole column of obs."""
        if isinstance(self._obs, pd.DataFrame):
            return self._obs[name].reset_index(drop=True)
        from anndata.io import read_elem

        return pd.Series(read_elem(self._obs[name]))

    def rows(self, start: int, stop: int, matrix: str = "X") -> np.ndarray:
        """Return rows ``start`` to ``stop`` (exclusive) of a matrix, (n, D)."""
        values = self._matrices[matrix][start:stop]
        return values.toarray() if hasattr(values, "toarray") else np.asarray(values)

    def obsm(self, name: str) -> np.ndarray | None:
        """Return a whole entry of obsm, such as ``spatial``, as an array; None if there is none of that name."""
        if self._obsm is None or name not in self._obsm:
            return None
        values = self._obsm[name]
        if not isinstance(self._obs, pd.DataFrame):  # on disk
            from anndata.io import read_elem

            values = read_elem(values)
        values = values.toarray() if hasattr(values, "toarray") else values
        return np.asarray(values)

    def uns(self) -> dict[str, Any]:
        """Return what ``uns["cellvim"]`` says, or nothing."""
        if self._uns is None or "cellvim" not in self._uns:
            return {}
        if isinstance(self._uns, dict) or not hasattr(self._uns, "attrs"):
            return dict(self._uns["cellvim"])
        from anndata.io import read_elem

        return dict(read_elem(self._uns["cellvim"]))


@contextmanager
def open_rows(source: str | Path | AnnData) -> Iterator[RowStore]:
    """Open an AnnData for reading by rows.

    Parameters
    ----------
    source
        An AnnData, or the path of one (``.zarr``, ``.h5ad``) or of a table (``.parquet``, ``.csv``, ``.tsv``), which is
        read whole.

    Yields
    ------
    RowStore

    Raises
    ------
    InputError
        It does not exist or cannot be read.
    """
    if not isinstance(source, str | Path):
        yield _of_anndata(source, "the AnnData")
        return
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    suffix = suffix_found(path)
    if suffix in TABLES:
        from cellvim.profiles.bridges import read_table

        yield _of_anndata(read_table(path), str(path))
        return
    with _opened(path, suffix) as group:
        yield _of_group(group, str(path))


def suffix_of(path: Path) -> str:
    """Return which of the known formats a path's name says.

    Raises
    ------
    InputError
        None of them.
    """
    suffix = next((s for s in sorted(FORMATS, key=len, reverse=True) if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise InputError(f"{path} is none of the formats that CellVim reads and writes here: {listing(FORMATS)}.")
    return suffix


def suffix_found(path: Path) -> str:
    """Return the format of a file to read: what its name says, else what is in it.

    Raises
    ------
    InputError
        Neither is a known one.
    """
    if not path.name.lower().endswith(FORMATS):
        from cellvim.anndata_io import found_format

        found = found_format(path)
        if found is not None:
            return f".{found}"
    return suffix_of(path)


@contextmanager
def _opened(path: Path, suffix: str) -> Iterator[Any]:
    wrong = f"{path} is no AnnData"
    if suffix == ".zarr":
        import zarr

        try:
            group = zarr.open_group(path, mode="r")
        except Exception as error:  # zarr raises many kinds for a folder that is no store
            raise InputError(f"{wrong}: {error}") from error
        if group.attrs.get("encoding-type") != "anndata":
            is_plate = "plate" in group.attrs or "ome" in group.attrs
            hint = "It is a plate of images: cellvim embed makes an AnnData of it." if is_plate else "Expected one."
            raise InputError(f"{wrong} (Zarr). {hint}")
        yield group
        return
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{wrong} (HDF5): {error}") from error
    with file:
        if file.attrs.get("encoding-type") != "anndata":
            raise InputError(f"{wrong} (HDF5). Expected one, as scanpy or CellVim write it.")
        yield file


def _of_group(group: Any, name: str) -> RowStore:
    from anndata.io import read_elem

    if "X" not in group:
        raise InputError(f"{name} has no X, so there are no embeddings in it.")
    matrices = {"X": _lazy(group["X"])}
    for key in group.get("obsm", {}):
        if key.startswith("X_emb_"):
            matrices[key] = _lazy(group["obsm"][key])
    var = group["var"]
    var_names = [str(v) for v in read_elem(var[var.attrs["_index"]])]
    return RowStore(name, group["obs"], matrices, var_names, group.get("uns"), group.get("obsm"))


def _lazy(element: Any) -> Any:
    if element.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        from anndata.io import sparse_dataset

        return sparse_dataset(element)
    return element


def _of_anndata(adata: AnnData, name: str) -> RowStore:
    if adata.X is None:
        raise InputError(f"{name} has no X, so there are no embeddings in it.")
    matrices = {"X": adata.X} | {k: adata.obsm[k] for k in adata.obsm if k.startswith("X_emb_")}
    return RowStore(name, adata.obs, matrices, [str(v) for v in adata.var_names], adata.uns, adata.obsm)
