"""Embed the cells, tiles or fields of plates into an AnnData.

Read the modules in the order in which a run executes them: `options`, `plan`, `encode`, `ledger`, `workers`, `run`.
Names are imported on first use, so that the command line can show the options without importing PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_MODULES = {
    "DEFAULT_MODEL": "options",
    "UNITS": "options",
    "EmbeddingOptions": "options",
    "RunOptions": "options",
    "EmbeddingPlan": "plan",
    "plan_embedding": "plan",
    "EmbeddingSummary": "run",
    "embed": "run",
    "embed_field": "run",
    "embed_plates": "run",
    "run_embedding": "run",
}

__all__ = [
    "DEFAULT_MODEL",
    "UNITS",
    "EmbeddingOptions",
    "EmbeddingPlan",
    "EmbeddingSummary",
    "RunOptions",
    "embed",
    "embed_field",
    "embed_plates",
    "plan_embedding",
    "run_embedding",
]

if TYPE_CHECKING:
    from cellvim.embedding.options import DEFAULT_MODEL, UNITS, EmbeddingOptions, RunOptions
    from cellvim.embedding.plan import EmbeddingPlan, plan_embedding
    from cellvim.embedding.run import EmbeddingSummary, embed, embed_field, embed_plates, run_embedding


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"cellvim.embedding.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'cellvim.embedding' has no attribute {name!r}")
