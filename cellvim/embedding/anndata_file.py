"""AnnData on disk, in Zarr or HDF5, written block by block: anndata makes it empty, and the rows are filled in."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.embedding import row_tables as tables
from cellvim.embedding.row_tables import Layout, PlateRows, blocks

if TYPE_CHECKING:
    pass

Plates = Sequence[Callable[[], PlateRows]]


def write_zarr(path: Path, plates: Plates, layout: Layout, n_features: int, uns: Mapping[str, Any]) -> None:
    """Write an AnnData as Zarr of format 2, which every reader of today opens."""
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=2)
    _write_empty(group, layout, n_features, uns)
    _fill(group, plates, layout, n_features)
    zarr.consolidate_metadata(group.store)


def write_h5ad(path: Path, plates: Plates, layout: Layout, n_features: int, uns: Mapping[str, Any]) -> None:
    """Write an AnnData as HDF5.

    Raises
    ------
    OSError
        There is too little room for it. That is looked at beforehand: HDF5 brings the process down when a disk is full.
    """
    import h5py

    needed, free = _size_in_hdf5(layout, n_features), shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"about {needed / 1e6:,.0f} MB are needed, and {free / 1e6:,.1f} MB are free")
    with h5py.File(path, "w") as file:
        _write_empty(file, layout, n_features, uns)
        _fill(file, plates, layout, n_features)


def _size_in_hdf5(layout: Layout, n_features: int) -> int:
    """Return about how many bytes the file will have; arrays are not compressed and grow by blocks of rows."""
    row = n_features * 4 + sum(width * dtype.itemsize for width, dtype in layout.obsm.values())
    row += 8 * len(layout.columns) + 16
    filled = -(-layout.n_rows // tables.ROWS_PER_BLOCK) * tables.ROWS_PER_BLOCK
    return filled * row + 60 * layout.n_rows + 300_000  # 60: a row's name


def _fill(group: Any, plates: Plates, layout: Layout, n_features: int) -> None:
    arrays = {name: group[f"obsm/{name}"] for name in layout.obsm} | {"": group["X"], "_index": group["obs/_index"]}
    for name, column in layout.columns.items():
        arrays[f"obs/{name}"] = group[f"obs/{name}/codes" if column.dtype is None else f"obs/{name}"]
    for array in arrays.values():
        array.resize((layout.n_rows, *array.shape[1:]))
    first = 0
    for block in blocks(plates, layout, n_features):
        rows = slice(first, first + len(block.X))
        arrays[""][rows] = block.X
        arrays["_index"][rows] = block.names
        for name, values in block.columns.items():
            arrays[f"obs/{name}"][rows] = values
        for name, values in block.obsm.items():
            arrays[name][rows] = values
        first = rows.stop


def _write_empty(group: Any, layout: Layout, n_features: int, uns: Mapping[str, Any]) -> None:
    """Write an AnnData without rows through anndata itself, so that the on-disk format is anndata's own."""
    import anndata
    from anndata.experimental import write_dispatched

    in_hdf5 = type(group).__module__.startswith("h5py")

    def with_chunks(write, store, name, element, *, dataset_kwargs, iospec):
        if iospec.encoding_type in ("array", "string-array") and len(element) == 0:
            # these grow: give them the chunks that they will need
            rest = element.shape[1:]
            dataset_kwargs = {**dataset_kwargs, "chunks": (tables.ROWS_PER_BLOCK, *rest)}
            if in_hdf5:
                dataset_kwargs["maxshape"] = (None, *rest)
        write(store, name, element, dataset_kwargs=dataset_kwargs)

    empty = anndata.AnnData(
        X=np.zeros((0, n_features), np.float32),
        obs=layout.empty_obs(),
        var=pd.DataFrame(index=[f"emb_{i:04d}" for i in range(n_features)]),
        obsm={name: np.zeros((0, width), dtype) for name, (width, dtype) in layout.obsm.items()},
        uns=dict(uns),
    )
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    write_dispatched(group, "/", empty, with_chunks)
