"""Which patches and which channels of a crop drove its embedding, or a class: docs/attribution.md.

`attribute` explains one number of a model's output by gradients or by occlusion; `attention_scores` reads what
attention pooling weighs; `draw_attribution` puts either beside the crop. Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "METHODS": "cellvim.attribution.tokens",
    "AttentionScores": "cellvim.attribution.attention",
    "Attribution": "cellvim.attribution.tokens",
    "attention_scores": "cellvim.attribution.attention",
    "attribute": "cellvim.attribution.tokens",
    "draw_attribution": "cellvim.attribution.picture",
    "read_crop": "cellvim.attribution.crop",
}

__all__ = [
    "METHODS",
    "AttentionScores",
    "Attribution",
    "attention_scores",
    "attribute",
    "draw_attribution",
    "read_crop",
]

if TYPE_CHECKING:
    from cellvim.attribution.attention import AttentionScores, attention_scores
    from cellvim.attribution.crop import read_crop
    from cellvim.attribution.picture import draw_attribution
    from cellvim.attribution.tokens import METHODS, Attribution, attribute


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cellvim.attribution' has no attribute {name!r}")
