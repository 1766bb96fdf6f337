"""Write profiles to files, atomically: under a temporary name, which is then changed."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cellvim.anndata_io import check_output, suffix_of
from cellvim.errors import OutputError

if TYPE_CHECKING:
    from anndata import AnnData


def check_profiles_output(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise when profiles cannot be written there.

    Raises
    ------
    OutputError
        The file exists and ``overwrite`` is off, or its folder does not exist.
    """
    path = Path(path)
    if suffix_of(path) == ".zarr":
        check_output(path, overwrite=overwrite)
    elif path.is_dir():
        raise OutputError(f"{path} is a folder, so it is not replaced. Choose another --output.")
    elif path.exists() and not overwrite:
        raise OutputError(f"{path} exists already. Choose another --output, or replace it with --overwrite.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"The folder {path.absolute().parent} for the output does not exist.")


def write_profiles(adata: AnnData, path: str | Path, *, overwrite: bool = False) -> None:
    """Write profiles to ``.zarr``, ``.h5ad``, or as a table of what was made last to ``.parquet``, ``.csv``, ``.tsv``.

    Raises
    ------
    OutputError
        The file exists and ``overwrite`` is off, or it cannot be written.
    """
    import anndata

    path = Path(path)
    check_profiles_output(path, overwrite=overwrite)
    suffix = suffix_of(path)
    partial = path.with_name(f"{path.name[: -len(suffix)]}.partial-{os.getpid()}{path.name[-len(suffix) :]}")
    try:
        if suffix == ".zarr":
            with warnings.catch_warnings():
                # format 2, which every AnnData reader of today opens; anndata warns that its default will change
                warnings.filterwarnings("ignore", "Writing zarr v2", UserWarning)
                with anndata.settings.override(zarr_write_format=2):
                    adata.write_zarr(partial)
        elif suffix == ".h5ad":
            adata.write_h5ad(partial)
        else:
            from cellvim.profiles.bridges import write_table

            write_table(adata, partial)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
