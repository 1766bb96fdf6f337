"""Embed the cells, tiles or fields of plates into an AnnData."""

from cellvim.embedding.options import DEFAULT_MODEL, UNITS
from cellvim.embedding.plan import EmbeddingPlan
from cellvim.embedding.planning import plan_embedding
from cellvim.embedding.run import EmbeddingSummary, embed, embed_field, embed_plates, run_embedding

__all__ = [
    "DEFAULT_MODEL",
    "UNITS",
    "EmbeddingPlan",
    "EmbeddingSummary",
    "embed",
    "embed_field",
    "embed_plates",
    "plan_embedding",
    "run_embedding",
]
