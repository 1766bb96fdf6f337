"""The back end "mamba_ssm": the selective scan of the mamba-ssm package (the extra ``cellvim[mamba]``).

It runs on NVIDIA GPUs without CellVim's CUDA library, or when named. The package contains only a scan; the other ops
run on the back end that is selected without it.

References
----------
Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023), Alg. 2;
https://github.com/state-spaces/mamba, `selective_scan_fn`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType

import torch
from torch import Tensor

from cellvim.ops import compiled, cuda, reference

name = "mamba_ssm"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATES = 256


def available() -> bool:
    """Whether the package and its compiled extension can be imported, and there is a CUDA GPU."""
    return load_scan()[0] is not None


def reason() -> str:
    """Return what it runs on, or why it is not available."""
    return load_scan()[1]


def refusal(*tokens: Tensor, taps: int = 1, states: int = 1) -> str | None:
    """Return why the inputs are not supported, None if they are."""
    for t in tokens:
        if t.device.type != "cuda":
            return f"tensors on {t.device.type}, only on CUDA GPUs"
        if t.dtype not in DTYPES:
            return f"{t.dtype} tensors, only float32, bfloat16 and float16"
    if states > MAX_STATES:
        return f"{states} states, only up to {MAX_STATES}"
    return _others().refusal(*tokens, taps=taps)


@cache
def load_scan() -> tuple[Callable | None, str]:
    """Import the scan once; return it, or None and the reason."""
    if not torch.cuda.is_available():
        return None, "mamba-ssm needs a CUDA GPU"
    try:
        import selective_scan_cuda  # noqa: F401  the compiled extension
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # besides ImportError, whatever the package or its dependencies raise when imported
        if isinstance(error, ModuleNotFoundError) and error.name in ("mamba_ssm", "selective_scan_cuda"):
            return None, f"{error.name} is not installed; install it with: pip install 'cellvim[mamba]'"
        return None, f"mamba-ssm cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    return selective_scan_fn, "the scan of mamba-ssm: float32, bfloat16 and float16 on CUDA GPUs"


def _others() -> ModuleType:
    if cuda.available():
        return cuda
    return compiled if compiled.available() else reference


@wraps(reference.pooled_scan)
def pooled_scan(pooled, delta, delta_bias, A, B, C):
    """See `cellvim.ops.reference.pooled_scan`."""
    selective_scan_fn = load_scan()[0]
    outputs = []
    for k in range(2):
        u, step, b, c = (_channels_first(t[k].to(pooled.dtype), reverse=k == 1) for t in (pooled, delta, B, C))
        y = selective_scan_fn(u, step, A[k].float(), b, c, delta_bias=delta_bias[k].float(), delta_softplus=True)
        outputs.append((y.flip(-1) if k else y).transpose(1, 2))
    return torch.stack(outputs).to(pooled.dtype)


def _channels_first(t: Tensor, reverse: bool) -> Tensor:
    """(B, P, K) -> (B, K, P) in the order of the scan."""
    return (t.flip(1) if reverse else t).transpose(1, 2).contiguous()


@wraps(reference.add_norm)
def add_norm(*args, **kwargs):
    """See `cellvim.ops.reference.add_norm`."""
    return _others().add_norm(*args, **kwargs)


@wraps(reference.conv_pool)
def conv_pool(*args, **kwargs):
    """See `cellvim.ops.reference.conv_pool`."""
    return _others().conv_pool(*args, **kwargs)


@wraps(reference.expand_gate)
def expand_gate(*args, **kwargs):
    """See `cellvim.ops.reference.expand_gate`."""
    return _others().expand_gate(*args, **kwargs)
