"""The transformer block of the ViT and ChannelViT baselines, on torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cellvim import ops
from cellvim.models.config import EncoderConfig
from cellvim.models.drop_path import drop_path
from cellvim.ops import reference
from cellvim.ops.scan_plan import ScanPlan

EPS = 1e-6  # as in the published ViT and ChannelViT


class AttentionBlock(nn.Module):
    """Pre-norm attention and MLP, with the `Block` interface: the residual stream, and what is to be added to it.

    With ``config.pool="mean"`` the tokens are pooled along the plan's axes before the attention and its result is
    given back to each of them: what pooling does to a transformer (FastVim paper, Table 7).

    References
    ----------
    Dosovitskiy et al., An Image is Worth 16x16 Words (2021); Bao et al., Channel Vision Transformers (2024).
    """

    def __init__(self, config: EncoderConfig, drop_rate: float = 0.0) -> None:
        super().__init__()
        D, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.heads = config.heads
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(D, eps=EPS)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=EPS)
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor, residual: Tensor | None, plan: ScanPlan) -> tuple[Tensor, Tensor]:
        """Take the last block's output and the residual, both (B, L, D); return this block's."""
        residual = hidden if residual is None else residual + hidden
        mixed = self._attend(self.norm1(residual), plan)
        residual = residual + drop_path(mixed, self.drop_rate, self.training)
        hidden = _apply(self.fc2, F.gelu(_apply(self.fc1, self.norm2(residual))))
        return drop_path(hidden, self.drop_rate, self.training), residual

    def _attend(self, tokens: Tensor, plan: ScanPlan) -> Tensor:
        if plan.pools:
            tokens = reference.pool_mean(tokens, plan)  # (B, P, D)
        qkv = _apply(self.qkv, tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, d)
        out = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=_present_keys(plan))
        out = _apply(self.proj, out.transpose(1, 2).flatten(2))
        return reference.expand(out, plan) if plan.pools else out


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return ops.linear(x, layer.weight, layer.bias)


def _present_keys(plan: ScanPlan) -> Tensor | None:
    """Mask of the keys (tokens, or slots of pooled ones) that exist, (B, 1, 1, keys); None when all do."""
    if plan.is_dense:
        return None
    keys, index = (plan.slots, plan.slot[0]) if plan.pools else (plan.order.shape[1], plan.order)
    index = index.masked_fill(plan.order < 0, keys)  # absent tokens mark a spare key
    present = plan.order.new_zeros(plan.order.shape[0], keys + 1, dtype=bool).scatter_(1, index, True)
    return present[:, None, None, :keys]
