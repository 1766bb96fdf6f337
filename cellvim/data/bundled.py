"""The small datasets in ``datasets/`` of a checkout, and of an installed package."""

from __future__ import annotations

from pathlib import Path

import cellvim
from cellvim.errors import InputError, listing, suggestion


def bundled_datasets() -> dict[str, Path]:
    """Return the folder of each dataset that has a card, by name."""
    package = Path(cellvim.__file__).parent
    folders = [f for f in (package / "datasets", package.parent / "datasets") if f.is_dir()]
    return {p.name: p for folder in folders[:1] for p in sorted(folder.iterdir()) if (p / "card.md").is_file()}


def bundled_dataset(name: str = "sbs_translocation") -> Path:
    """Return the folder of a bundled dataset: ``images/``, ``platemap.csv``, ``card.md`` and ``LICENSE``.

    Raises
    ------
    InputError
        There is no such dataset; the message lists the available ones.
    """
    known = bundled_datasets()
    if name not in known:
        raise InputError(
            f"Dataset '{name}' is not known to CellVim, which has {listing(known)}.{suggestion(name, known)}"
        )
    return known[name]
