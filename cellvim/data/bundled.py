"""Finding the small datasets that come with CellVim, in a checkout and in an installed package alike."""

from __future__ import annotations

from pathlib import Path

import cellvim
from cellvim.errors import InputError, listing, suggestion

DEMO_DATASET = "sbs_translocation"


def bundled_datasets() -> dict[str, Path]:
    """Return the folder of each dataset that has its files here, by name."""
    folder = _folder()
    if folder is None:
        return {}
    return {p.name: p for p in sorted(folder.iterdir()) if (p / "card.md").is_file()}


def bundled_dataset(name: str = DEMO_DATASET) -> Path:
    """Return the folder of a bundled dataset: ``images/``, ``platemap.csv``, ``card.md`` and ``LICENSE``.

    Raises
    ------
    InputError
        There is no such dataset; the message lists those that are there.
    """
    known = bundled_datasets()
    if name not in known:
        raise InputError(
            f"Dataset '{name}' does not come with CellVim; it has {listing(known)}.{suggestion(name, known)}"
        )
    return known[name]


def _folder() -> Path | None:
    package = Path(cellvim.__file__).parent
    for folder in (package / "datasets", package.parent / "datasets"):  # a wheel's, a checkout's
        if folder.is_dir():
            return folder
    return None
