"""Which format something on disk has, by what is in it: the name that a user gave may say nothing."""

from __future__ import annotations

from pathlib import Path

from cellvim.formats.anndata_file import is_h5ad, is_zarr
from cellvim.formats.parquet import is_parquet

_CHECKS = {"zarr": is_zarr, "h5ad": is_h5ad, "parquet": is_parquet}


def found_format(path: str | Path) -> str | None:
    """Return ``"zarr"``, ``"h5ad"`` or ``"parquet"``; None where nothing of the kind is there."""
    return next((name for name, check in _CHECKS.items() if check(Path(path))), None)
