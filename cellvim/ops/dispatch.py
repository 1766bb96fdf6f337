"""The ops of the models, and the choice of the back end that runs each of them.

A back end named with `use_backend` or the environment variable ``CELLVIM_BACKEND`` runs every op or raises a
`BackendError`. Otherwise the first available one of the tensors' device runs: "native" on the CPU; "cuda", "mamba_ssm"
or "compiled" on an NVIDIA GPU. Plain PyTorch ("reference") runs what that back end does not support, such as float64,
as well as other devices and `torch.export`, whose graphs must not contain CellVim's own ops. `describe_backends` is
``cellvim backends`` on the command line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cellvim.errors import BackendError, listing, suggestion
from cellvim.ops import native, reference

BACKENDS = ("native", "reference", "cuda", "mamba_ssm", "compiled")

_ROWS_PER_THREAD = 8
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_chosen: str | None = os.environ.get("CELLVIM_BACKEND") or None
_warned: set[str] = set()
_log = logging.getLogger("cellvim")


class Backend(Protocol):
    """An implementation of the ops: a module of this package.

    The ops have the signatures of their definitions in `cellvim.ops.reference`.
    """

    name: str
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    conv_pool: Callable[..., Tensor]
    pooled_scan: Callable[..., Tensor]
    expand_gate: Callable[..., Tensor]

    def available(self) -> bool:
        """Whether it can run on this machine."""

    def reason(self) -> str:
        """Return what it runs on, or why it is not available."""

    def refusal(self, *tokens: Tensor, taps: int = 1, states: int = 1) -> str | None:
        """Return why it does not support activations with these devices, dtypes, taps and states; None if it does."""


@dataclass(frozen=True)
class BackendDescription:
    """One row of ``cellvim backends``."""

    name: str
    available: bool
    selected: bool
    reason: str


def describe_backends() -> list[BackendDescription]:
    """Return the availability of each back end and the one that is selected for this machine."""
    selected = selected_backend(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    backends = map(_backend, BACKENDS)
    return [BackendDescription(b.name, b.available(), b.name == selected, b.reason()) for b in backends]


def selected_backend(device: torch.device) -> str:
    """Return the name of the back end that runs float32 ops on ``device``."""
    return (_available(_chosen) if _chosen else _fastest(device.type) or reference).name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops on the named back end within the block.

    Raises
    ------
    BackendError
        The back end is unknown or not available.
    """
    global _chosen
    _available(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def _backend(name: str) -> Backend:
    if name in ("native", "reference"):
        return native if name == "native" else reference
    from cellvim.ops import compiled, cuda, mamba_ssm  # only GPUs need them

    return {"cuda": cuda, "mamba_ssm": mamba_ssm, "compiled": compiled}[name]


def _available(name: str) -> Backend:
    if name not in BACKENDS:
        raise BackendError(
            f"Back end {name!r} is unknown; available names are {listing(BACKENDS)}.{suggestion(name, BACKENDS)} "
            "See `cellvim backends`."
        )
    backend = _backend(name)
    if not backend.available():
        raise BackendError(f"Back end {name!r} is not available: {backend.reason()}.")
    return backend


def _fastest(device_type: str) -> Backend | None:
    """Return the first available back end of a type of device; None if there is only the reference."""
    if device_type == "cpu":
        return native if native.available() else None
    if device_type == "cuda":
        from cellvim.ops import compiled, cuda, mamba_ssm

        for backend in (cuda, mamba_ssm, compiled):
            if backend.available():
                return backend
    return None


def _choose(*tokens: Tensor, taps: int = 1, states: int = 1) -> Backend:
    """Return the named back end, or the fastest that supports these tensors."""
    if _chosen is not None:
        backend = _available(_chosen)
        if why := backend.refusal(*tokens, taps=taps, states=states):
            raise BackendError(f"Back end {_chosen!r} does not support {why}. Choose 'reference'.")
        return backend
    device_type = tokens[0].device.type
    is_exporting = getattr(torch.compiler, "is_exporting", bool)  # unknown in torch 2.6
    if device_type not in ("cpu", "cuda") or is_exporting():
        return reference
    backend = _fastest(device_type)
    if not torch.compiler.is_compiling():
        if backend is None or backend.name in ("mamba_ssm", "compiled"):
            _warn_of_slow_ops(device_type, backend)
    elif backend is not None and backend.name in ("mamba_ssm", "compiled"):
        return reference  # which the caller is compiling
    return reference if backend is None or backend.refusal(*tokens, taps=taps, states=states) else backend


def _warn_of_slow_ops(device_type: str, backend: Backend | None) -> None:
    """Log once why the compiled kernels do not run, and what runs instead."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    why = _backend("native" if device_type == "cpu" else "cuda").reason()
    runs = {
        None: "Plain PyTorch runs, which is several times slower",
        "compiled": "Plain PyTorch runs under torch.compile, slower than the CUDA kernels",
        "mamba_ssm": "The scan of mamba-ssm runs, slower than the CUDA kernels",
    }
    _log.warning(f"{runs[backend and backend.name]}: {why}.")


@wraps(reference.add_norm)
def add_norm(hidden, residual, *args, **kwargs):
    """See `cellvim.ops.reference.add_norm`."""
    tokens = (hidden,) if residual is None else (hidden, residual)
    return _choose(*tokens).add_norm(hidden, residual, *args, **kwargs)


@wraps(reference.conv_pool)
def conv_pool(x, weight, *args, **kwargs):
    """See `cellvim.ops.reference.conv_pool`."""
    return _choose(x, taps=weight.shape[-1]).conv_pool(x, weight, *args, **kwargs)


@wraps(reference.pooled_scan)
def pooled_scan(pooled, delta, delta_bias, A, *args, **kwargs):
    """See `cellvim.ops.reference.pooled_scan`."""
    return _choose(pooled, delta, states=A.shape[-1]).pooled_scan(pooled, delta, delta_bias, A, *args, **kwargs)


@wraps(reference.expand_gate)
def expand_gate(x, z, y, weight, *args, **kwargs):
    """See `cellvim.ops.reference.expand_gate`."""
    return _choose(x, z, y, taps=weight.shape[-1]).expand_gate(x, z, y, weight, *args, **kwargs)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, (..., K) -> (..., N), where each row is independent of the other rows of ``x``.

    CPU matrix libraries change the order of summation when a thread gets three rows or fewer, or when the result has a
    single column, so that an image's embedding would depend on its batch. Few rows are therefore padded, and a single
    column is computed as a plain reduction.
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
    """Return `F.linear`, computed by oneDNN if it can be called directly; it is faster than MKL on AMD processors."""
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and _ONEDNN and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
