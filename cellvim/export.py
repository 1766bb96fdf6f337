"""Write embeddings as AnnData in Zarr, field by field, in constant memory.

Each field's rows are first kept in a small file of their own beside the output (``<output>.partial``). When every
field is there, the files are put together in field order, so that the result does not depend on the order in which
fields were finished, and the whole is renamed to its final name. What bears the final name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from cellvim.errors import OutputError

OBJECT_COLUMN = "Metadata_ObjectNumber"
KEY_COLUMNS = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
ROWS_PER_CHUNK = 8192

_MARKER = "cellvim-partial"  # a folder without it is not ours to delete


class AnnDataWriter:
    """Collect the rows of many fields and make one AnnData store of them.

    Parameters
    ----------
    output
        The store to make, ``something.zarr``.
    fields
        One row a field, in the order that the output will have. The columns ``Metadata_Plate``, ``Metadata_Well`` and
        ``Metadata_Site`` name the field; these and all others become columns of ``obs``.
    n_features
        Width of the embeddings.
    overwrite
        Whether an AnnData store of that name may be replaced (when the new one is whole, not before).

    Raises
    ------
    OutputError
        The output exists and may not be replaced, or cannot be written.
    """

    def __init__(self, output: str | Path, fields: pd.DataFrame, n_features: int, *, overwrite: bool = False):
        self.output = Path(output)
        self.fields = fields.reset_index(drop=True)
        self.n_features = n_features
        self.overwrite = overwrite
        check_output(self.output, overwrite=overwrite)
        self.partial = self.output.with_name(self.output.name + ".partial")
        _remove_partial(self.partial)
        with _disk_errors(self.output):
            self._parts.mkdir(parents=True)
            (self.partial / _MARKER).touch()

    def __enter__(self) -> AnnDataWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        _remove_partial(self.partial)

    @property
    def _parts(self) -> Path:
        return self.partial / "fields"

    def _part(self, field: int) -> Path:
        return self._parts / f"{field:08d}.npz"

    def append(self, field: int, embeddings: np.ndarray, objects: pd.DataFrame, spatial: np.ndarray) -> None:
        """Keep the rows of one field.

        Parameters
        ----------
        field
            The field's row in ``fields``.
        embeddings
            (n, D) float32.
        objects
            (n rows) numbers about each object, the same columns in every field; ``Metadata_ObjectNumber`` among them.
        spatial
            (n, 2) position (x, y) within the field.
        """
        if embeddings.shape != (len(objects), self.n_features) or spatial.shape != (len(objects), 2):
            raise ValueError(
                f"field {field}: embeddings {embeddings.shape}, objects {objects.shape} and spatial {spatial.shape} "
                f"do not fit together; expected n rows and {self.n_features} features"
            )
        arrays = {f"obs/{name}": objects[name].to_numpy() for name in objects.columns}
        part = self._part(field)
        with _disk_errors(self.output):
            with open(part.with_suffix(".tmp"), "wb") as file:
                np.savez(file, X=embeddings.astype(np.float32, copy=False), spatial=spatial, **arrays)
            os.replace(part.with_suffix(".tmp"), part)

    def finish(self, uns: Mapping[str, object]) -> int:
        """Put the fields together, give the store its final name and return its number of rows."""
        done = [field for field in range(len(self.fields)) if self._part(field).exists()]
        counts = np.array([len(_load(self._part(field), "spatial")) for field in done], dtype=np.int64)
        store = self.partial / "anndata.zarr"
        with _disk_errors(self.output):
            self._write(store, done, counts, uns)
            self._rename(store)
        return int(counts.sum())

    def _write(self, store: Path, done: list[int], counts: np.ndarray, uns: Mapping[str, object]) -> None:
        import zarr

        fields = _categorical(self.fields.iloc[[f for f, n in zip(done, counts, strict=True) if n > 0]])
        group = zarr.open_group(store, mode="w", zarr_format=2)  # format 2: every AnnData reader of today opens it
        _write_empty(group, self._empty_obs(fields, done), self.n_features, uns)
        for block in _blocks(done, counts):
            parts = [dict(np.load(self._part(field))) for field in block]
            sizes = [len(part["spatial"]) for part in parts]
            objects = {
                name.removeprefix("obs/"): np.concatenate([part[name] for part in parts])
                for name in parts[0]
                if name.startswith("obs/")
            }
            constants = fields.loc[np.repeat(block, sizes)]
            group["X"].append(np.concatenate([part["X"] for part in parts]))
            group["obsm/spatial"].append(np.concatenate([part["spatial"] for part in parts]))
            group["obs/_index"].append(_obs_names(constants, objects[OBJECT_COLUMN]))
            for name, column in constants.items():
                if isinstance(column.dtype, pd.CategoricalDtype):
                    group[f"obs/{name}/codes"].append(column.cat.codes.to_numpy())
                else:
                    group[f"obs/{name}"].append(column.to_numpy())
            for name, values in objects.items():
                group[f"obs/{name}"].append(values)
        zarr.consolidate_metadata(group.store)

    def _empty_obs(self, fields: pd.DataFrame, done: list[int]) -> pd.DataFrame:
        """Return obs with every column's type and categories, and no rows."""
        objects = {OBJECT_COLUMN: np.zeros(0, np.int64)}
        if done:
            with np.load(self._part(done[0])) as part:
                objects = {n.removeprefix("obs/"): part[n][:0] for n in part.files if n.startswith("obs/")}
        columns = dict(fields.iloc[:0].items()) | objects
        first = [*KEY_COLUMNS, OBJECT_COLUMN]
        order = first + [name for name in columns if name not in first]
        return pd.DataFrame({name: columns[name] for name in order}, index=pd.Index([], dtype=object))

    def _rename(self, store: Path) -> None:
        if self.output.exists():
            check_output(self.output, overwrite=self.overwrite)  # it may have appeared while we were working
            os.rename(self.output, self.partial / "replaced")
        os.rename(store, self.output)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise when ``output`` exists and may not be replaced.

    Raises
    ------
    OutputError
        It exists and ``overwrite`` is off, or it is something else than an AnnData store.
    """
    if not output.exists():
        return
    if not overwrite:
        raise OutputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if not _is_anndata(output):
        raise OutputError(f"{output} exists and is no AnnData store, so it is not replaced. Choose another --output.")


def _is_anndata(path: Path) -> bool:
    for name, attributes in ((".zattrs", lambda j: j), ("zarr.json", lambda j: j.get("attributes", {}))):
        try:
            if attributes(json.loads((path / name).read_text())).get("encoding-type") == "anndata":
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


def _remove_partial(partial: Path) -> None:
    if not partial.exists():
        return
    if not (partial / _MARKER).exists():
        raise OutputError(f"{partial} is in the way and was not made by CellVim. Move it, or choose another --output.")
    shutil.rmtree(partial)


class _disk_errors:
    """Turn the operating system's refusals (full disk, no permission) into one clear line."""

    def __init__(self, output: Path):
        self.output = output

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, OSError):
            raise OutputError(f"{self.output} cannot be written: {error.strerror or error}.") from error


def _load(part: Path, name: str) -> np.ndarray:
    with np.load(part) as arrays:
        return arrays[name]


def _blocks(done: list[int], counts: np.ndarray) -> Iterator[list[int]]:
    """Yield runs of fields that together fill about one chunk."""
    block, rows = [], 0
    for field, count in zip(done, counts, strict=True):
        if count == 0:
            continue
        block.append(field)
        rows += count
        if rows >= ROWS_PER_CHUNK:
            yield block
            block, rows = [], 0
    if block:
        yield block


def _categorical(fields: pd.DataFrame) -> pd.DataFrame:
    """Return the table with every column of text as a categorical (a field's value repeats for all its objects)."""
    out = {}
    for name, column in fields.items():
        if pd.api.types.is_bool_dtype(column) or pd.api.types.is_numeric_dtype(column):
            out[name] = column.astype(float) if column.isna().any() else column.astype(column.to_numpy().dtype)
        else:
            text = column.where(column.isna(), column.astype(str))
            out[name] = pd.Series(pd.Categorical(text), index=column.index)
    return pd.DataFrame(out, index=fields.index)


def _obs_names(constants: pd.DataFrame, objects: np.ndarray) -> np.ndarray:
    names = [constants[column].astype(str).to_numpy(dtype=object) for column in KEY_COLUMNS]
    return names[0] + "__" + names[1] + "__" + names[2] + "__" + objects.astype(str).astype(object)


def _write_empty(group, obs: pd.DataFrame, n_features: int, uns: Mapping[str, object]) -> None:
    """Write an AnnData without rows through anndata itself, so that the on-disk format is anndata's own."""
    import anndata
    from anndata.experimental import write_dispatched

    def with_chunks(write, store, name, element, *, dataset_kwargs, iospec):
        if iospec.encoding_type in ("array", "string-array") and len(element) == 0:
            # these grow: give them the chunks that they will need
            dataset_kwargs = {**dataset_kwargs, "chunks": (ROWS_PER_CHUNK, *element.shape[1:])}
        write(store, name, element, dataset_kwargs=dataset_kwargs)

    empty = anndata.AnnData(
        X=np.zeros((0, n_features), np.float32),
        obs=obs,
        var=pd.DataFrame(index=[f"emb_{i:04d}" for i in range(n_features)]),
        obsm={"spatial": np.zeros((0, 2))},
        uns=dict(uns),
    )
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    write_dispatched(group, "/", empty, with_chunks)
