"""The selective scan of the mamba-ssm package as a named back-end, for comparison with ours.

Nothing is imported before the back-end is asked for: mamba-ssm has no wheels and does not import without a GPU. It has
a scan only; the other ops run where they would without it.

References
----------
Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023), Alg. 2;
https://github.com/state-spaces/mamba, `selective_scan_fn`.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from cellvim.errors import BackendError
from cellvim.ops import compiled, cuda, reference


def available() -> bool:
    """Whether the package is installed and there is a GPU. It is not imported to find out."""
    return find_spec("mamba_ssm") is not None and torch.cuda.is_available()


def reason() -> str:
    """Say what is missing."""
    if find_spec("mamba_ssm") is None:
        return "the package mamba-ssm is not installed"
    if not torch.cuda.is_available():
        return "mamba-ssm needs a CUDA GPU, and there is none"
    return "the scan of mamba-ssm; only when named"


def pooled_scan(pooled: Tensor, delta: Tensor, delta_bias: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """See `cellvim.ops.reference.pooled_scan`."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise BackendError(f"The back-end 'mamba_ssm' does not import: {error}.") from error
    outputs = []
    for k in range(2):
        u, step, b, c = (_channels_first(t[k], reverse=k == 1) for t in (pooled, delta, B, C))
        # Its B and C come in the tokens' type, their step in any.
        y = selective_scan_fn(
            u, step.to(u.dtype), A[k].float(), b.to(u.dtype), c.to(u.dtype), None, None, delta_bias[k].float(), True
        )
        outputs.append((y.flip(-1) if k else y).transpose(1, 2))
    return torch.stack(outputs).to(pooled.dtype)


def add_norm(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """See `cellvim.ops.reference.add_norm`."""
    return _others().add_norm(*args, **kwargs)


def conv_pool(*args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.conv_pool`."""
    return _others().conv_pool(*args, **kwargs)


def expand_gate(*args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.expand_gate`."""
    return _others().expand_gate(*args, **kwargs)


def _others():
    if cuda.available():
        return cuda
    return compiled if compiled.available() else reference


def _channels_first(t: Tensor, reverse: bool) -> Tensor:
    """(B, P, K) -> (B, K, P) in the order of the scan."""
    return (t.flip(1) if reverse else t).transpose(1, 2).contiguous()
