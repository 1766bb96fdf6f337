"""Attribution of an embedding or a class to the patches and channels of a crop: docs/attribution.md.

`attribute` explains an output of a model by gradients or occlusion; `attention_scores` returns the weights of attention
pooling; `draw_attribution` plots either.
"""

from cellvim.attribution.attention import AttentionScores, attention_scores
from cellvim.attribution.crop import read_crop
from cellvim.attribution.picture import draw_attribution
from cellvim.attribution.tokens import METHODS, Attribution, attribute

__all__ = [
    "METHODS",
    "AttentionScores",
    "Attribution",
    "attention_scores",
    "attribute",
    "draw_attribution",
    "read_crop",
]
