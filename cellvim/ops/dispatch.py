"""Which back-end runs the ops: the fastest one that is there for the tensors' device, or the one that was named.

Nothing is swapped silently: naming an absent back-end is an error, and `describe_backends` (``cellvim backends``) says
which back-end runs and why the others do not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from cellvim.errors import BackendError, listing
from cellvim.ops import reference

BACKENDS: dict[str, ModuleType] = {"reference": reference}
_chosen: str | None = os.environ.get("CELLVIM_BACKEND") or None


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
    return [
        BackendDescription(
            "reference", True, selected_backend(device) == "reference", "plain PyTorch: any device, every dtype"
        )
    ]


def selected_backend(device: torch.device) -> str:
    """Return the name of the back-end that runs ops on ``device``."""
    if _chosen is not None:
        _check(_chosen)
        return _chosen
    return "reference"


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
        raise BackendError(f"There is no back-end {name!r}; there are {listing(BACKENDS)}. See `cellvim backends`.")


def _backend(x: Tensor) -> ModuleType:
    return BACKENDS[selected_backend(x.device)]


def add_norm(hidden: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """See `cellvim.ops.reference.add_norm`."""
    return _backend(hidden).add_norm(hidden, *args, **kwargs)


def conv_pool(x: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.conv_pool`."""
    return _backend(x).conv_pool(x, *args, **kwargs)


def pooled_scan(pooled: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.pooled_scan`."""
    return _backend(pooled).pooled_scan(pooled, *args, **kwargs)


def expand_gate(x: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.expand_gate`."""
    return _backend(x).expand_gate(x, *args, **kwargs)
