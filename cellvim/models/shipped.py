"""Trained models that come with CellVim: small ones, each a safetensors file with its card beside it."""

from __future__ import annotations

from pathlib import Path

from cellvim.errors import ModelError, listing, suggestion

_FOLDER = Path(__file__).parents[1] / "checkpoints"


def shipped_models() -> dict[str, Path]:
    """Return the names of the trained models that come with CellVim, and their files."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.safetensors"))}


def model_card(name: str) -> str:
    """Return the card of a shipped model: data, licence, figures, limits (Markdown).

    Raises
    ------
    ModelError
        There is no such model.
    """
    known = shipped_models()
    if name not in known:
        raise ModelError(f"No trained model {name!r} comes with CellVim; there are {listing(known)}."
                         f"{suggestion(name, known)}")  # fmt: skip
    return known[name].with_suffix(".md").read_text(encoding="utf-8")
