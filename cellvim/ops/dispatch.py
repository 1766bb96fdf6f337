"""Which back-end runs the ops: the fastest one that is there for the tensors' device, or the one that was named.

Nothing is swapped silently. A named back-end (`use_backend`, or the environment's ``CELLVIM_BACKEND``) runs every op or
raises a `BackendError`. Left to itself, CellVim takes "native" for float32 and bfloat16 tensors on the CPU, "cuda" for
those and float16 on an NVIDIA GPU, and "reference" for the rest: other devices, float64, more than 4 taps or 64 states,
and `torch.export`, whose graphs must not hold our own ops. A GPU without the CUDA library runs the reference under
`torch.compile`. `describe_backends` (``cellvim backends``) says which back-end runs and why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from cellvim.errors import BackendError, listing, suggestion
from cellvim.ops import compiled, cuda, mamba_ssm, native, reference

BACKENDS: dict[str, ModuleType] = {"native": native, "reference": reference, "cuda": cuda, "mamba_ssm": mamba_ssm}
_FASTEST = {"cpu": "native", "cuda": "cuda"}  # by device type; elsewhere the reference runs
_chosen: str | None = os.environ.get("CELLVIM_BACKEND") or None
_said: set[str] = set()
_log = logging.getLogger("cellvim")


@dataclass(frozen=True)
class BackendDescription:
    """One row of ``cellvim backends``."""

    name: str
    available: bool
    selected: bool
    reason: str


def describe_backends() -> list[BackendDescription]:
    """Say for every back-end whether it is there, whether it runs, and why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    selected = selected_backend(device)
    return [
        BackendDescription(name, True, name == selected, "plain PyTorch: any device, every dtype")
        if backend is reference
        else BackendDescription(name, backend.available(), name == selected, backend.reason())
        for name, backend in BACKENDS.items()
    ]


def selected_backend(device: torch.device) -> str:
    """Return the name of the back-end that runs float32 ops on ``device``."""
    if _chosen is not None:
        _check(_chosen)
        return _chosen
    fastest = _FASTEST.get(device.type, "reference")
    return fastest if fastest == "reference" or BACKENDS[fastest].available() else "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops on the named back-end within the block.

    Raises
    ------
    BackendError
        If there is no such back-end, or it is not available here.
    """
    global _chosen
    _check(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(
            f"There is no back-end {name!r}; there are {listing(BACKENDS)}.{suggestion(name, BACKENDS)} "
            "See `cellvim backends`."
        )
    backend = BACKENDS[name]
    if backend is not reference and not backend.available():
        raise BackendError(f"The back-end {name!r} is not available: {backend.reason()}.")


def _backend(*tokens: Tensor, taps: int = 1, states: int = 1) -> ModuleType:
    """The named back-end, or the fastest that takes these tensors."""
    if _chosen is not None:
        _check(_chosen)
        return BACKENDS[_chosen]
    fastest = _FASTEST.get(tokens[0].device.type)
    if fastest is None or _is_exporting():
        return reference
    backend = BACKENDS[fastest]
    if not backend.available():
        if torch.compiler.is_compiling():
            return reference
        if backend is cuda and compiled.available():
            _say_once(
                f"The plain PyTorch path runs under torch.compile, slower than the CUDA kernels: {cuda.reason()}."
            )
            return compiled
        _say_once(f"The plain PyTorch path runs, several times slower: {backend.reason()}.")
        return reference
    return reference if backend.refusal(*tokens, taps=taps, states=states) else backend


def _is_exporting() -> bool:
    """Whether `torch.export` traces (a question that torch 2.6 cannot answer yet)."""
    asked = getattr(torch.compiler, "is_exporting", None)
    return asked is not None and asked()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


def add_norm(hidden: Tensor, residual: Tensor | None, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """See `cellvim.ops.reference.add_norm`."""
    tokens = (hidden,) if residual is None else (hidden, residual)
    return _backend(*tokens).add_norm(hidden, residual, *args, **kwargs)


def conv_pool(x: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.conv_pool`."""
    return _backend(x, taps=weight.shape[-1]).conv_pool(x, weight, *args, **kwargs)


def pooled_scan(pooled: Tensor, delta: Tensor, delta_bias: Tensor, A: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.pooled_scan`."""
    backend = _backend(pooled, delta, states=A.shape[-1])
    return backend.pooled_scan(pooled, delta, delta_bias, A, *args, **kwargs)


def expand_gate(x: Tensor, z: Tensor, y: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.expand_gate`."""
    return _backend(x, z, y, taps=weight.shape[-1]).expand_gate(x, z, y, weight, *args, **kwargs)
