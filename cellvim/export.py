"""Writing embeddings under their final name: AnnData as Zarr or HDF5, or Parquet. What bears the name is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellvim.errors import InputError, OutputError, listing, suggestion
from cellvim.formats.anndata_file import write_h5ad, write_zarr
from cellvim.formats.content import found_format
from cellvim.formats.joining import open_embeddings
from cellvim.formats.parquet import write_parquet
from cellvim.formats.tables import Layout, PlateRows

__all__ = ["FORMATS", "PlateRows", "check_output", "format_of", "open_embeddings", "write_embeddings"]

FORMATS = ("zarr", "h5ad", "parquet")
_SUFFIXES = {".zarr": "zarr", ".h5ad": "h5ad", ".h5": "h5ad", ".parquet": "parquet", ".pq": "parquet"}
_WRITERS = {"zarr": write_zarr, "h5ad": write_h5ad, "parquet": write_parquet}


def format_of(output: str | Path, format: str | None = None) -> str:
    """Return the format to write: the one named, else by the output's suffix, else Zarr.

    Raises
    ------
    InputError
        There is no such format, or it is not that of the suffix.
    """
    suffix = "." + str(output).rstrip("/").rpartition(".")[2].lower()
    by_suffix = _SUFFIXES.get(suffix)
    if format is None:
        return by_suffix or "zarr"
    if format not in FORMATS:
        raise InputError(
            f"The format '{format}' is not known; expected {listing(FORMATS)}.{suggestion(format, FORMATS)}"
        )
    if by_suffix not in (None, format):
        raise InputError(f"The format is {format}, and the output is named {Path(output).name}. Leave --format out.")
    return format


def check_output(output: str | Path, *, overwrite: bool) -> None:
    """Raise when ``output`` exists and may not be replaced.

    Raises
    ------
    OutputError
        It exists and ``overwrite`` is off, or it is something else than embeddings.
    """
    if is_remote(output):
        if remote_exists(str(output)) and not overwrite:
            raise OutputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
        return
    output = Path(output)
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if found_format(output) is None:
        raise OutputError(f"{output} exists and is no AnnData store, so it is not replaced. Choose another --output.")


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


def is_remote(output: str | Path) -> bool:
    """Return whether the output is named by a URL."""
    return "://" in str(output)


def output_exists(output: str | Path) -> bool:
    """Return whether something bears the output's name."""
    return remote_exists(str(output)) if is_remote(output) else os.path.lexists(output)


def remote_exists(url: str) -> bool:
    """Return whether anything is there."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return bool(filesystem.exists(path))


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
