"""Finding the small datasets that come with CellVim, in a checkout and in an installed package alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cellvim
from cellvim.errors import InputError, listing, suggestion

DEMO_DATASET = "sbs_translocation"


def bundled_datasets() -> dict[str, Path]:
    """Return the folder of each dataset that is described here, by name."""
    folder = _folder()
    if folder is None:
        return {}
    return {p.name: p for p in sorted(folder.iterdir()) if (p / "card.md").is_file()}


@dataclass(frozen=True)
class DatasetCard:
    """What is said of a dataset in one line, and whether its files are here."""

    name: str
    title: str
    has_images: bool


def dataset_cards() -> list[DatasetCard]:
    """Return every dataset that has a card, by name."""
    cards = []
    for name, folder in bundled_datasets().items():
        first = (folder / "card.md").read_text(encoding="utf-8").partition("\n")[0]
        cards.append(DatasetCard(name, first.lstrip("# ").partition(": ")[2] or name, (folder / "images").is_dir()))
    return cards


def dataset_card(name: str) -> str:
    """Return the card of a dataset, Markdown.

    Raises
    ------
    InputError
        There is no such dataset; the message lists those that there are.
    """
    return (bundled_dataset(name) / "card.md").read_text(encoding="utf-8")


def bundled_dataset(name: str = DEMO_DATASET) -> Path:
    """Return the folder of a bundled dataset: ``images/``, ``platemap.csv``, ``card.md`` and ``LICENSE``.

    Raises
    ------
    InputError
        There is no such dataset; the message lists those that are there.
    """
    known = bundled_datasets()
    if name not in known:
        raise InputError(f"Dataset '{name}' is not known to CellVim; it has {listing(known)}.{suggestion(name, known)}")
    return known[name]


def _folder() -> Path | None:
    package = Path(cellvim.__file__).parent
    for folder in (package / "datasets", package.parent / "datasets"):  # a wheel's, a checkout's
        if folder.is_dir():
            return folder
    return None
