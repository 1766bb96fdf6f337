"""ScanPlan: the order in which a block visits its tokens, and the tokens that it pools.

Tokens are stored once, (B, L, E). A block on the transposed grid, with other pooled axes or with missing tokens, reads
the same memory in another order. A plan is either a grid of at most three axes with strides (``sizes``, ``strides``,
``pooled``) or, for irregular sets of tokens, a list of indices (``order``, ``slot``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """The order in which a block visits and pools its tokens."""

    sizes: tuple[int, int, int]  # lengths of the axes in the block's order, slowest first; their product is L if dense
    strides: tuple[int, int, int]  # token (i0, i1, i2) is stored at i0·s0 + i1·s1 + i2·s2
    pooled: tuple[bool, bool, bool]  # the other axes, in order, form the P = `slots` steps of the scan
    pool_scale: float = 1.0  # factor on a mean over the pooled axes
    # Indexed plans. (B or 1, L) int64: the stored token at each step of the block's order, −1 for the missing tokens of
    # a ragged sample, which come last.
    order: torch.Tensor | None = None
    # (2, B or 1, L) int64: the scan step that pools the token in the forward and the backward direction, counted from
    # the start of the grid in both; any valid value where `order` is −1.
    slot: torch.Tensor | None = None
    # (B or 1, P) float32 (float64 for a model in float64): factor on the sum of a slot's tokens.
    slot_weight: torch.Tensor | None = None
    slot_count: int | None = None  # P of an indexed plan
    stored_axes: tuple[int, int, int] | None = None  # the block's axes in stored order; None to derive from the strides

    def __post_init__(self) -> None:
        if self.stored_axes is None:
            # An axis of length 1 may have any stride and position.
            axes = sorted(range(3), key=lambda a: (-self.strides[a], a) if self.sizes[a] > 1 else (1, a))
            object.__setattr__(self, "stored_axes", tuple(axes))

    @property
    def is_dense(self) -> bool:
        """Whether every sample has the full grid of tokens."""
        return self.order is None

    @property
    def slots(self) -> int:
        """P, the number of scan steps."""
        if self.slot_count is not None:
            return self.slot_count
        return prod([n for n, away in zip(self.sizes, self.pooled, strict=True) if not away])

    @property
    def group(self) -> int:
        """Number of tokens per slot of a dense grid."""
        return prod([n for n, away in zip(self.sizes, self.pooled, strict=True) if away])

    @property
    def pools(self) -> bool:
        """Whether any axis is pooled (False for Vim and ChannelVim)."""
        return any(self.pooled)

    @property
    def mean_weight(self) -> float:
        """Factor that converts the sum of a dense slot to its scaled mean."""
        return self.pool_scale / self.group if self.pools else 1.0


def sequence_plan(length: int) -> ScanPlan:
    """Return the plan of a sequence that is scanned token by token, as in Vim."""
    return ScanPlan(sizes=(length, 1, 1), strides=(1, 1, 1), pooled=(False, False, False))
