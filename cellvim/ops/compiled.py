"""The back end "compiled": plain PyTorch under `torch.compile`, for GPUs without the CUDA library."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch

from cellvim.ops import reference
from cellvim.ops.reference import refusal

__all__ = ["add_norm", "available", "conv_pool", "expand_gate", "name", "pooled_scan", "reason", "refusal"]

name = "compiled"
MAX_STEPS = 64  # of a scan to compile: its loop is unrolled, and the time to compile increases with its length


def available() -> bool:
    """Whether `torch.compile` can generate code for this machine's GPU, which needs Triton."""
    from torch.utils._triton import has_triton

    return has_triton()


def reason() -> str:
    """Return what it runs on, or why it is not available."""
    return "plain PyTorch under torch.compile" if available() else "torch.compile needs a GPU and Triton"


@cache
def _compile(op: Callable) -> Callable:
    return torch.compile(op, dynamic=False)


def _compiled(definition: Callable) -> Callable:
    """Return the op that compiles its definition when it is first called."""

    @wraps(definition)
    def op(*args, **kwargs):
        return _compile(definition)(*args, **kwargs)

    return op


add_norm = _compiled(reference.add_norm)
conv_pool = _compiled(reference.conv_pool)
expand_gate = _compiled(reference.expand_gate)
_short_scan = _compiled(reference.pooled_scan)


@wraps(reference.pooled_scan)
def pooled_scan(pooled, *args, **kwargs):
    """See `cellvim.ops.reference.pooled_scan`."""
    scan = _short_scan if pooled.shape[2] <= MAX_STEPS else reference.pooled_scan
    return scan(pooled, *args, **kwargs)
