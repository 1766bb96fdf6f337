"""Stored AnnData and tables: their formats, and reading them into memory, by rows, or joined without reading ``X``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, InputError, MetadataError, OutputError, listing
from cellvim.files import exists, is_url

if TYPE_CHECKING:
    from anndata import AnnData
    from anndata.experimental import AnnCollection

TABLE_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
READABLE = (".zarr", ".h5ad", *TABLE_SUFFIXES)
OBS_NAMES = "Metadata_obs_names"  # column of a table with the names of the rows
TAKEN_AT_ONCE = 4096  # rows per read of `StoredAnnData.take`; skipping rows costs less than another read
_FEATURE_PREFIXES = ("Cells_", "Nuclei_", "Cytoplasm_", "emb_")
_IDENTIFIERS = {"ImageNumber", "ObjectNumber", "TableNumber"}  # numbers that are not features


def check_output(output: str | Path, *, overwrite: bool) -> None:
    """Raise if an existing ``output`` must not be replaced, or is not an AnnData or Parquet file."""
    if not exists(output):
        return
    if not overwrite:
        raise OutputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if not is_url(output) and found_format(output) is None:
        raise OutputError(
            f"{output} exists and is not an AnnData or Parquet file, so it is not replaced. Choose another --output."
        )


def found_format(path: str | Path) -> str | None:
    """Return "zarr" or "h5ad" for an AnnData, "parquet" for a Parquet file, by content; None for anything else."""
    import h5py

    path = Path(path)
    for name, attributes in ((".zattrs", lambda j: j), ("zarr.json", lambda j: j.get("attributes", {}))):
        try:
            if attributes(json.loads((path / name).read_text())).get("encoding-type") == "anndata":
                return "zarr"
        except (OSError, ValueError, AttributeError):
            continue
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PAR1":
                return "parquet"
        with h5py.File(path, "r") as file:
            return "h5ad" if file.attrs.get("encoding-type") == "anndata" else None
    except OSError:
        return None


class StoredAnnData:
    """An AnnData whose rows are read on request, from Zarr, HDF5, Parquet or memory. Returned by `open_anndata`.

    Columns of ``obs`` are read one at a time, and the names of the rows only by `row_names`.

    Attributes
    ----------
    name
        Name for messages.
    n_rows
        Number of rows.
    matrices
        Names and widths of the matrices: ``X`` and, if present, ``X_emb_<channel>`` of ``obsm``.
    var_names
        Names of the features of ``X``.
    obs_columns
        Names of the columns of ``obs``.
    """

    def __init__(
        self,
        name: str,
        matrices: dict[str, Any],
        var_names: Iterable[str],
        obs_columns: Iterable[str],
        *,
        column: Callable[[str], pd.Series],
        names: Callable[[], Iterable[Any]],
        obsm: Callable[[str], Any],
        uns: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.name = name
        self.n_rows = int(matrices["X"].shape[0])
        self.matrices = {key: int(values.shape[1]) for key, values in matrices.items()}
        self.var_names = [str(v) for v in var_names]
        self.obs_columns = [str(c) for c in obs_columns]
        self._matrices = matrices
        self._column, self._names, self._obsm, self._uns = column, names, obsm, uns

    def column(self, name: str) -> pd.Series:
        """Return a column of ``obs``, indexed from 0."""
        return self._column(name).reset_index(drop=True)

    def obs(self) -> pd.DataFrame:
        """Return all columns of ``obs``, indexed from 0."""
        return pd.DataFrame({name: self.column(name) for name in self.obs_columns}, index=pd.RangeIndex(self.n_rows))

    def row_names(self) -> np.ndarray:
        """Return the names of the rows, (n,) text."""
        return np.array([str(name) for name in self._names()], dtype=object)

    def rows(self, start: int, stop: int, matrix: str = "X") -> np.ndarray:
        """Return rows ``start`` to ``stop`` (exclusive) of a matrix, (n, D)."""
        values = self._matrices[matrix][start:stop]
        return values.toarray() if hasattr(values, "toarray") else np.asarray(values)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Return the rows ``index``, in ascending order, of ``X``: (m, D) float32."""
        out = np.empty((len(index), self.matrices["X"]), np.float32)
        for start in range(0, self.n_rows, TAKEN_AT_ONCE):
            first, last = np.searchsorted(index, [start, start + TAKEN_AT_ONCE])
            if first < last:
                block = self.rows(int(index[first]), int(index[last - 1]) + 1)
                out[first:last] = block[index[first:last] - index[first]]
        return out

    def obsm(self, name: str) -> np.ndarray | None:
        """Return an entry of ``obsm`` such as ``spatial``, or None if it does not exist."""
        values = self._obsm(name)
        return None if values is None else np.asarray(values.toarray() if hasattr(values, "toarray") else values)

    def uns(self) -> dict[str, Any]:
        """Return ``uns["cellvim"]``, or an empty dictionary."""
        return dict(self._uns())


@contextmanager
def open_anndata(source: str | Path | AnnData) -> Iterator[StoredAnnData]:
    """Open an AnnData for reading rows on request.

    Parameters
    ----------
    source
        An AnnData, or the path of one (``.zarr``, ``.h5ad``) or of a table (``.parquet``; ``.csv`` and ``.tsv`` are
        read into memory). See `from_pycytominer` for the columns of a table.

    Yields
    ------
    StoredAnnData

    Raises
    ------
    InputError
        It does not exist or cannot be read.
    """
    if not isinstance(source, str | Path):
        yield _of_anndata(source, "the AnnData")
        return
    path = Path(source)
    suffix = readable_suffix(path)
    if suffix == ".parquet":
        yield _of_parquet(path)
    elif suffix in TABLE_SUFFIXES:
        yield _of_anndata(_read_table(path), str(path))
    else:
        with _open_group(path, suffix) as group:
            yield _of_group(group, str(path))


def read_anndata(path: str | Path) -> AnnData:
    """Read an AnnData or a table of profiles into memory.

    Parameters
    ----------
    path
        An AnnData (``.zarr``, ``.h5ad``), or a table (``.parquet``, ``.csv``, ``.tsv``; see `from_pycytominer`).

    Raises
    ------
    InputError
        It does not exist or cannot be read.
    """
    import anndata

    path = Path(path)
    suffix = readable_suffix(path)
    if suffix in TABLE_SUFFIXES:
        return _read_table(path)
    with open_anndata(path):  # raises a precise error for a file that is not an AnnData
        pass
    with _anndata_errors(path):
        return anndata.read_zarr(path) if suffix == ".zarr" else anndata.read_h5ad(path)


@contextmanager
def _anndata_errors(path: Path) -> Iterator[None]:
    import anndata

    try:
        yield
    except CellvimError:
        raise
    except (OSError, KeyError, ValueError, anndata.io.AnnDataReadError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def open_embeddings(paths: str | Path | Sequence[str | Path]) -> AnnCollection:
    """Join several AnnData without reading their ``X``.

    Parameters
    ----------
    paths
        AnnData in Zarr or HDF5, or a folder of them, such as the output of ``cellvim embed --per-plate``.

    Returns
    -------
    anndata.experimental.AnnCollection
        ``collection.obs`` describes all rows and is in memory; ``collection[rows].to_adata()`` reads rows.

    Raises
    ------
    InputError
        A file cannot be read, or the files have different numbers of features.
    """
    import anndata
    from anndata.experimental import AnnCollection
    from anndata.io import read_elem

    def opened(path: Path) -> AnnData:
        suffix = readable_suffix(path)
        with _anndata_errors(path), _open_group(path, suffix) as group:
            if suffix == ".h5ad":
                return anndata.read_h5ad(path, backed="r")
            obsm = {"spatial": read_elem(group["obsm/spatial"])} if "obsm/spatial" in group else {}
            return anndata.AnnData(X=group["X"], obs=read_elem(group["obs"]), var=read_elem(group["var"]), obsm=obsm)

    sources = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [file for source in sources for file in stored_files(source, (".zarr", ".h5ad"))]
    parts = [opened(file) for file in files]
    widths = {part.n_vars for part in parts}
    if len(widths) > 1:
        raise InputError(
            f"The embeddings have {listing(sorted(widths))} features; only embeddings of the same model can be joined."
        )
    return AnnCollection(parts, join_obs="outer", join_vars="inner", join_obsm="inner", harmonize_dtypes=False)


def stored_files(source: str | Path, suffixes: Sequence[str] = (".zarr", ".h5ad", ".parquet")) -> list[Path]:
    """Return the AnnData in a folder, such as the output of ``cellvim embed --per-plate``; or another path as it is."""
    path = Path(source)
    if not path.is_dir() or path.name.lower().endswith(READABLE) or found_format(path):
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if not files:
        raise InputError(f"The folder {path} contains no embeddings; expected files such as plate.zarr or plate.h5ad.")
    return files


def suffix_of(path: Path) -> str:
    """Return the suffix of a path; raise if it is not one of `READABLE`."""
    suffix = next((s for s in sorted(READABLE, key=len, reverse=True) if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise InputError(f"The format of {path} is not supported; expected one of {listing(READABLE)}.")
    return suffix


def readable_suffix(path: Path) -> str:
    """Return the suffix for the format of an existing file: that of its name, or else found by content."""
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if not path.name.lower().endswith(READABLE) and (found := found_format(path)) is not None:
        return f".{found}"
    return suffix_of(path)


def from_pycytominer(table: pd.DataFrame, *, features: Sequence[str] | None = None) -> AnnData:
    """Convert a table of profiles to an AnnData.

    Parameters
    ----------
    table
        As written by pycytominer, or any table with one profile per row.
    features
        Columns that are features. By default those that begin with ``Cells_``, ``Nuclei_``, ``Cytoplasm_`` or
        ``emb_``; if there are none, all numeric columns whose names do not begin with ``Metadata_``.

    Returns
    -------
    AnnData
        ``X`` (n, D) float32; all other columns are in ``obs``, text as categoricals.

    Raises
    ------
    MetadataError
        There are no features, a feature is not numeric, or two columns have the same name.
    """
    import anndata

    names = [str(c) for c in table.columns]
    if len(set(names)) < len(names):
        raise MetadataError(f"Duplicate columns: {listing(sorted({n for n in names if names.count(n) > 1}))}.")
    table = table.set_axis(names, axis=1)
    chosen = _feature_columns(table) if features is None else [str(f) for f in features]
    if lost := [f for f in chosen if f not in table]:
        raise MetadataError(f"The table does not have the columns {listing(lost)}; it has {listing(names, 30)}.")
    if text := [f for f in chosen if not pd.api.types.is_numeric_dtype(table[f])]:
        raise MetadataError(f"Features must be numeric, but these columns are not: {listing(text)}.")
    if not chosen:
        raise MetadataError(f"The table has no features (numeric columns); it has {listing(names, 30)}.")
    obs = table.drop(columns=chosen).reset_index(drop=True)
    index = obs.pop(OBS_NAMES).astype(str) if OBS_NAMES in obs else pd.Series(obs.index.astype(str))
    for name in obs.columns:
        obs[name] = _as_obs_column(obs[name])
    obs = obs.rename(columns=_renamed(table))
    obs.index = pd.Index(index.to_numpy(dtype=object))
    return anndata.AnnData(
        X=table[chosen].to_numpy(dtype=np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(chosen, dtype=object))
    )


def is_metadata(column: object) -> bool:
    """Return whether pycytominer considers a column metadata rather than a feature."""
    return str(column).startswith(("Metadata_", "Image_Metadata_"))


def _renamed(table: pd.DataFrame) -> dict[str, str]:
    """Return the names in ``obs`` of columns that `cellvim.to_pycytominer` renamed."""
    return table.attrs.get("cellvim", {}).get("renamed", {})


def _feature_columns(table: pd.DataFrame) -> list[str]:
    numeric = [
        name
        for name in table.columns
        if pd.api.types.is_numeric_dtype(table[name]) and not pd.api.types.is_bool_dtype(table[name])
    ]
    known = [name for name in numeric if name.startswith(_FEATURE_PREFIXES)]
    return known or [name for name in numeric if not is_metadata(name) and name not in _IDENTIFIERS]


def _as_obs_column(values: pd.Series) -> pd.Series:
    """Return a column of a table as ``obs`` contains it: text becomes categorical."""
    if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return values
    values = values.astype(object)
    return values.where(values.isna(), values.astype(str)).astype("category")


def _read_table(path: Path) -> AnnData:
    """Read profiles from a table, see `from_pycytominer`; ``uns`` from the metadata of a Parquet file."""
    with _table_errors(path):
        if readable_suffix(path) == ".parquet":
            import pyarrow.parquet

            table, uns = pd.read_parquet(path), _parquet_uns(pyarrow.parquet.read_schema(path))
        else:
            table, uns = pd.read_csv(path, sep="\t" if ".tsv" in path.suffixes else ",", low_memory=False), {}
    adata = from_pycytominer(table)
    if uns:
        adata.uns["cellvim"] = uns
    return adata


@contextmanager
def _table_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(f"Reading {path.name} requires pyarrow: pip install 'cellvim[tables]'.") from error
    except (OSError, ValueError) as error:  # pandas and pyarrow raise ValueErrors for parsing errors
        raise InputError(f"{path} cannot be read as a table: {error}") from error


def _parquet_uns(schema: Any) -> dict[str, Any]:
    """Return ``uns["cellvim"]``, which ``cellvim embed --format parquet`` stores in the metadata of the file."""
    return json.loads((schema.metadata or {}).get(b"cellvim", "{}"))


class _ParquetRows:
    """The features of a Parquet file, read by row groups; slices are (n, D) float32."""

    def __init__(self, file: Any, features: list[str]) -> None:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self.shape = (file.metadata.num_rows, len(features))
        self._file, self._features, self._ends = file, features, np.cumsum(sizes)
        self._cached: tuple[range, np.ndarray] = (range(0), np.empty((0, len(features)), np.float32))

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last = np.searchsorted(self._ends, [rows.start, rows.stop - 1], side="right")
        groups = range(first, last + 1)
        if groups != self._cached[0]:
            values = self._file.read_row_groups(list(groups), columns=self._features).to_pandas()
            self._cached = groups, values[self._features].to_numpy(dtype=np.float32)
        offset = self._ends[groups.start - 1] if groups.start else 0
        return self._cached[1][rows.start - offset : rows.stop - offset]


def _of_parquet(path: Path) -> StoredAnnData:
    with _table_errors(path):
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        empty = file.schema_arrow.empty_table().to_pandas()
    empty.attrs = json.loads((file.schema_arrow.metadata or {}).get(b"PANDAS_ATTRS", "{}"))
    layout = from_pycytominer(empty)
    stored_as = {name: stored for stored, name in _renamed(empty).items()}

    def column(name: str) -> pd.Series:
        stored = stored_as.get(name, name)
        return _as_obs_column(file.read(columns=[stored]).to_pandas()[stored])

    features = list(layout.var_names)
    return StoredAnnData(
        str(path),
        {"X": _ParquetRows(file, features)},
        features,
        layout.obs.columns,
        column=column,
        names=lambda: file.read(columns=[], use_pandas_metadata=True).to_pandas().index,
        obsm=lambda _: None,
        uns=lambda: _parquet_uns(file.schema_arrow),
    )


@contextmanager
def _open_group(path: Path, suffix: str) -> Iterator[Any]:
    """Open the root group of an AnnData in Zarr or HDF5."""
    if suffix == ".zarr":
        import zarr

        try:
            group = zarr.open_group(path, mode="r")
        except Exception as error:  # zarr raises many types for a folder that is not a store
            raise InputError(f"{path} is not an AnnData: {error}") from error
        if group.attrs.get("encoding-type") != "anndata":
            is_plate = "plate" in group.attrs or "ome" in group.attrs
            hint = " It is a plate of images: create an AnnData with cellvim embed." if is_plate else ""
            raise InputError(f"{path} is a Zarr store, but not an AnnData.{hint}")
        yield group
        return
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} is not an AnnData (HDF5): {error}") from error
    with file:
        if file.attrs.get("encoding-type") != "anndata":
            raise InputError(f"{path} is an HDF5 file, but not an AnnData as written by CellVim or scanpy.")
        yield file


def _of_group(group: Any, name: str) -> StoredAnnData:
    from anndata.io import read_elem, sparse_dataset

    def lazy(element: Any) -> Any:
        is_sparse = element.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix")
        return sparse_dataset(element) if is_sparse else element

    if "X" not in group:
        raise InputError(f"{name} has no X, so it contains no embeddings.")
    obs, var, obsm, uns = group["obs"], group["var"], group.get("obsm", {}), group.get("uns", {})
    return StoredAnnData(
        name,
        {"X": lazy(group["X"])} | {key: lazy(obsm[key]) for key in obsm if key.startswith("X_emb_")},
        read_elem(var[var.attrs["_index"]]),
        obs.attrs["column-order"],
        column=lambda column: pd.Series(read_elem(obs[column])),
        names=lambda: read_elem(obs[obs.attrs["_index"]]),
        obsm=lambda key: read_elem(obsm[key]) if key in obsm else None,
        uns=lambda: read_elem(uns["cellvim"]) if "cellvim" in uns else {},
    )


def _of_anndata(adata: AnnData, name: str) -> StoredAnnData:
    if adata.X is None:
        raise InputError(f"{name} has no X, so it contains no embeddings.")
    return StoredAnnData(
        name,
        {"X": adata.X} | {key: adata.obsm[key] for key in adata.obsm if key.startswith("X_emb_")},
        adata.var_names,
        adata.obs.columns,
        column=lambda column: adata.obs[column],
        names=lambda: adata.obs_names,
        obsm=lambda key: adata.obsm.get(key),
        uns=lambda: adata.uns.get("cellvim", {}),
    )
