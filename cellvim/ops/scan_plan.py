"""ScanPlan: the order in which one block visits its tokens, and which of them it pools together.

Tokens are stored once, (B, L, E); a block on the transposed grid, with other pooled axes or with missing tokens
reads the same memory in another order. Kernels see a grid of at most three axes with strides (``sizes``,
``strides``, ``pooled``), or, for irregular sets of tokens, explicit indices (``order``, ``slot``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """How a block walks through its tokens.

    Parameters
    ----------
    sizes
        Lengths (n0, n1, n2) of the axes in the block's order, slowest first; their product is L when the plan is dense.
    strides
        Step of each axis in stored tokens: token (i0, i1, i2) is stored at ``i0*s0 + i1*s1 + i2*s2``.
    pooled
        Which axes are pooled away. The others, in order, form the P = ``slots`` steps of the scan.
    pool_scale
        Factor on a mean over the pooled axes.
    order
        None for a dense grid. Else (B or 1, L) int64: the stored token at each step of the block's order, −1 where a
        ragged sample has none (only at the end).
    slot
        With ``order``: (2, B or 1, L) int64, the scan step that pools the token, for the forward and the backward
        direction, counted from the grid's start in both; any valid value where ``order`` is −1.
    slot_weight
        With ``order``: (B or 1, P) float32 (float64 for a model in float64), the factor on the sum of a slot's tokens.
    slot_count
        With ``order``: P. None for a dense grid.
    stored_axes
        The block's axes in the order in which they are stored, slowest first; None to see it by the strides.
    """

    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    pooled: tuple[bool, bool, bool]
    pool_scale: float = 1.0
    order: torch.Tensor | None = None
    slot: torch.Tensor | None = None
    slot_weight: torch.Tensor | None = None
    slot_count: int | None = None
    stored_axes: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.stored_axes is None:
            # An axis of length 1 may carry any stride; it may stand anywhere.
            axes = sorted(range(3), key=lambda a: (-self.strides[a], a) if self.sizes[a] > 1 else (1, a))
            object.__setattr__(self, "stored_axes", tuple(axes))

    @property
    def is_dense(self) -> bool:
        """Whether every sample has the same full grid of tokens."""
        return self.order is None

    @property
    def slots(self) -> int:
        """P, the number of scan steps."""
        if self.slot_count is not None:
            return self.slot_count
        return prod([n for n, away in zip(self.sizes, self.pooled, strict=True) if not away])

    @property
    def group(self) -> int:
        """Number of tokens of a dense grid that are pooled together."""
        return prod([n for n, away in zip(self.sizes, self.pooled, strict=True) if away])

    @property
    def pools(self) -> bool:
        """Whether any axis is pooled (False for Vim and ChannelVim)."""
        return any(self.pooled)

    @property
    def mean_weight(self) -> float:
        """Factor that turns a dense slot's sum into its (scaled) mean."""
        return self.pool_scale / self.group if self.pools else 1.0


def sequence_plan(length: int) -> ScanPlan:
    """Return the plan of a plain sequence that is scanned token by token, as in Vim."""
    return ScanPlan(sizes=(length, 1, 1), strides=(1, 1, 1), pooled=(False, False, False))
