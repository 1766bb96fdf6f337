"""The plain PyTorch ops under `torch.compile`: what a GPU runs when the CUDA library is not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cellvim.ops import reference

MAX_STEPS = 64  # of a scan that is compiled: its loop is unrolled, and the time to compile grows with it


def add_norm(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """See `cellvim.ops.reference.add_norm`."""
    return _compile(reference.add_norm)(*args, **kwargs)


def conv_pool(*args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.conv_pool`."""
    return _compile(reference.conv_pool)(*args, **kwargs)


def pooled_scan(pooled: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.pooled_scan`; longer sequences than `MAX_STEPS` run as they are."""
    if pooled.shape[2] > MAX_STEPS:
        return reference.pooled_scan(pooled, *args, **kwargs)
    return _compile(reference.pooled_scan)(pooled, *args, **kwargs)


def expand_gate(*args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.expand_gate`."""
    return _compile(reference.expand_gate)(*args, **kwargs)


def available() -> bool:
    """Whether `torch.compile` can make code for GPUs here: it needs Triton."""
    return torch.utils._triton.has_triton()


@cache
def _compile(op: Callable) -> Callable:
    return torch.compile(op, dynamic=False)
