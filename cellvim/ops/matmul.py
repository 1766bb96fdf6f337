"""The matrix product of a linear layer, with the same result for a row whatever rows stand beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS_PER_THREAD = 8
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    CPU matrix libraries sum in another order when a thread gets three rows or fewer, or when the result is one column
    wide, so that an image's embedding would depend on its batch. Few rows are therefore padded, and one column is
    summed as a plain reduction.

    Parameters
    ----------
    x
        (..., K).
    weight, bias
        (N, K) and (N,).

    Returns
    -------
    (..., N)
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if weight.shape[0] == 1:
        out = (x * weight[0]).sum(-1, keepdim=True)
        return out if bias is None else out + bias
    rows = x.shape[:-1].numel()
    enough = _ROWS_PER_THREAD * torch.get_num_threads()
    if rows >= enough:
        return _product(x, weight, bias)
    padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, enough - rows))
    return _product(padded, weight, bias)[:rows].unflatten(0, x.shape[:-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by oneDNN where it may be asked directly: on AMD processors it is faster than MKL."""
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and _ONEDNN and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
