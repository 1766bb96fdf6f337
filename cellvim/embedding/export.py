"""Writing embeddings under their final name: AnnData as Zarr or HDF5, or Parquet. What bears the name is whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cellvim.anndata_io import FORMATS, check_output, format_of, open_embeddings
from cellvim.embedding.anndata_file import write_h5ad, write_zarr
from cellvim.embedding.parquet import write_parquet
from cellvim.embedding.row_tables import Layout, PlateRows
from cellvim.errors import OutputError
from cellvim.files import is_url, remove, replace_path, upload

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
            beside = None if is_url(output) else Path(output).absolute().parent
            with tempfile.TemporaryDirectory(dir=beside, prefix=".cellvim-") as folder:
                return _write(output, plates, n_features, uns, format, Path(folder), overwrite, before_naming)
        return _write(output, plates, n_features, uns, format, workplace, overwrite, before_naming)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.") from error


def _write(output, plates, n_features, uns, format, workplace, overwrite, before_naming) -> int:
    whole = workplace / f"whole.{format}"
    remove(whole)
    layout = Layout.of(plates)
    _WRITERS[format](whole, plates, layout, n_features, uns)
    check_output(output, overwrite=overwrite)  # it may have appeared while we were working
    before_naming()
    if is_url(output):
        upload(whole, str(output))
        remove(whole)
        return layout.n_rows
    remove(workplace / "replaced")
    replace_path(whole, output, aside=workplace / "replaced")
    return layout.n_rows
