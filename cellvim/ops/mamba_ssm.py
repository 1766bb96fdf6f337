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

from cellvim.ops import compiled, cuda, kernels, reference

name = "mamba_ssm"
MAX_STATES = 256


def available() -> bool:
    """Whether the package and its compiled extension can be imported, and there is a CUDA GPU."""
    return load_scan()[0] is not None


def reason() -> str:
    """Return what it runs on, or why it is not available."""
    return load_scan()[1]


def refusal(*tokens: Tensor, taps: int = 1, states: int = 1) -> str | None:
    """Return why the inputs are not supported, None if they are."""
    own = kernels.refusal("cuda", cuda.DTYPES, tokens, taps=1, states=states, max_states=MAX_STATES)
    return own or _others().refusal(*tokens, taps=taps)


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
        directed = (t[k].flip(1) if k else t[k] for t in (pooled, delta, B, C))  # (B, P, ·) in the order of the scan
        u, step, b, c = (t.to(pooled.dtype).transpose(1, 2).contiguous() for t in directed)
        y = selective_scan_fn(u, step, A[k].float(), b, c, delta_bias=delta_bias[k].float(), delta_softplus=True)
        outputs.append((y.flip(-1) if k else y).transpose(1, 2))
    return torch.stack(outputs).to(pooled.dtype)


def _delegated(definition: Callable) -> Callable:
    @wraps(definition)
    def op(*args, **kwargs):
        return getattr(_others(), definition.__name__)(*args, **kwargs)

    return op


add_norm = _delegated(reference.add_norm)
conv_pool = _delegated(reference.conv_pool)
expand_gate = _delegated(reference.expand_gate)
