"""Stochastic depth: leave a block's output out for some samples of a training batch."""

from __future__ import annotations

from torch import Tensor


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero whole samples of (B, …) with probability ``rate`` and scale the others by 1 / (1 − rate), in training only.

    References
    ----------
    Huang et al., Deep Networks with Stochastic Depth (2016).
    """
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * keep.div_(1 - rate)
