"""AnnData and Parquet files on disk: which format a file has, and whether it may be written."""

from __future__ import annotations

import json
from pathlib import Path

from cellvim.errors import InputError, OutputError, listing, suggestion
from cellvim.files import exists, is_url

FORMATS = ("zarr", "h5ad", "parquet")
_SUFFIXES = {".zarr": "zarr", ".h5ad": "h5ad", ".h5": "h5ad", ".parquet": "parquet", ".pq": "parquet"}


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
    if not exists(output):
        return
    if not overwrite:
        raise OutputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if not is_url(output) and found_format(output) is None:
        raise OutputError(f"{output} exists and is no AnnData store, so it is not replaced. Choose another --output.")


def found_format(path: str | Path) -> str | None:
    """Return ``"zarr"``, ``"h5ad"`` or ``"parquet"`` by content; None if the path is none of them."""
    return next((name for name, check in _CHECKS.items() if check(Path(path))), None)


def is_zarr(path: Path) -> bool:
    """Return whether a path is an AnnData in Zarr."""
    for name, attributes in ((".zattrs", lambda j: j), ("zarr.json", lambda j: j.get("attributes", {}))):
        try:
            if attributes(json.loads((path / name).read_text())).get("encoding-type") == "anndata":
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


def is_h5ad(path: Path) -> bool:
    """Return whether a path is an AnnData in HDF5."""
    import h5py

    if not path.is_file():
        return False
    try:
        with h5py.File(path, "r") as file:
            return file.attrs.get("encoding-type") == "anndata"
    except OSError:
        return False


def is_parquet(path: Path) -> bool:
    """Return whether a path is a Parquet file."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


_CHECKS = {"zarr": is_zarr, "h5ad": is_h5ad, "parquet": is_parquet}
