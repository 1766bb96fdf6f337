"""Writing embeddings under their final name: AnnData as Zarr or HDF5, or Parquet. What bears the name is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellvim.anndata_io import FORMATS, check_output, format_of, is_remote
from cellvim.embedding.anndata_file import write_h5ad, write_zarr
from cellvim.embedding.joining import open_embeddings
from cellvim.embedding.parquet import write_parquet
from cellvim.embedding.row_tables import Layout, PlateRows
from cellvim.errors import OutputError

__all__ = ["FORMATS", "PlateRows", "check_output", "format_of", "open_embeddings", "write_embeddings"]

_WRITERS = {"zarr": write_zarr, "h5ad": write_h5ad, "parquet": write_parquet}


def write_embeddings(
    output: str | Path,
    plates: Sequence[Callable[[], PlateRows]],
    n_features: int,
    uns: Mapping[str, Any],
    *,
    format: str,
    workplace: Path | None,
    overwrite: bool = False,
    before_naming: Callable[[], None] = lambda: None,
) -> int:
    """Write the rows of all plates, field by field, and give the whole its name at the end.

    Parameters
    ----------
    output
        What to write: a path, or a URL.
    plates
        One a plate: opens its rows. Called more than once; nothing is kept of a plate when the next is opened.
    n_features
        Width of the embeddings.
    uns
        What the rows were made with.
    format
        One of `FORMATS`.
    workplace
        Folder on the same file system as the output, to write it in; a temporary one if None.
    overwrite
        The output may be replaced.
    before_naming
        Called when all is written, just before it gets its name.

    Returns
    -------
    int
        The number of rows.

    Raises
    ------
    OutputError
        The output exists and may not be replaced, or cannot be written.
    """
    try:
        if workplace is None:
            beside = None if is_remote(output) else Path(output).absolute().parent
            with tempfile.TemporaryDirectory(dir=beside, prefix=".cellvim-") as folder:
                return _write(output, plates, n_features, uns, format, Path(folder), overwrite, before_naming)
        return _write(output, plates, n_features, uns, format, workplace, overwrite, before_naming)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.") from error


def _write(output, plates, n_features, uns, format, workplace, overwrite, before_naming) -> int:
    whole = workplace / f"whole.{format}"
    _remove(whole)
    layout = Layout.of(plates)
    _WRITERS[format](whole, plates, layout, n_features, uns)
    check_output(output, overwrite=overwrite)  # it may have appeared while we were working
    before_naming()
    if is_remote(output):
        upload(whole, str(output))
        _remove(whole)
        return layout.n_rows
    output = Path(output)
    if output.exists():
        replaced = workplace / "replaced"
        _remove(replaced)
        os.rename(output, replaced)
    os.rename(whole, output)
    return layout.n_rows


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def upload(local: Path, url: str) -> None:
    """Copy a file or a store to an object store, a store's own metadata last: until then it cannot be opened.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)
        files = [local] if local.is_file() else [p for p in sorted(local.rglob("*")) if p.is_file()]
        files.sort(key=lambda p: p.parent == local and local.is_dir())
        for file in files:
            target = path if file == local else f"{path}/{file.relative_to(local).as_posix()}"
            if url.startswith(("file:", "memory:")):
                filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(file), target)
    except Exception as error:  # each filesystem has its own kinds
        raise OutputError(f"{url} cannot be written ({type(error).__name__}: {str(error)[:200]}).") from error
