"""Plans and inputs for the ops' tests, and the comparison of a back-end with the definition in float64.

It needs torch alone, so that ``python -m benchmarks.gpu_check`` runs on a bare GPU machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cellvim.ops.scan_plan import ScanPlan

EPSILON = 1e-30


def dense_plan(sizes: Sequence[int], stored: Sequence[int], pooled: Sequence[bool], scale: float = 1.0) -> ScanPlan:
    """A full grid whose axes lie in memory in the order ``stored``, slowest first."""
    strides, step = [0, 0, 0], 1
    for axis in reversed(stored):
        strides[axis] = step
        step *= sizes[axis]
    return ScanPlan(tuple(sizes), tuple(strides), tuple(pooled), scale)


def indexed_plan(seed: int, batch: int, tokens: int, slots: int, shared: bool = False) -> ScanPlan:
    """Ragged samples in random order; some slots stay empty, and the directions disagree on the labels."""
    g = torch.Generator().manual_seed(seed)
    rows = 1 if shared else batch
    order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(rows)])
    for row in range(rows):
        order[row, int(torch.randint(1, tokens + 1, (), generator=g)) :] = -1
    return ScanPlan(
        sizes=(tokens, 1, 1),
        strides=(1, 1, 1),
        pooled=(True, False, False),
        order=order,
        slot=torch.randint(0, slots, (2, rows, tokens), generator=g),
        slot_weight=torch.rand(rows, slots, generator=g) + 0.1,
        slot_count=slots,
    )


def tensors(seed: int) -> Callable[..., Tensor]:
    """A maker of random tensors."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g)


def conv_pool_inputs(seed: int, batch: int, length: int, width: int, taps: int) -> dict[str, Tensor]:
    """x is half of a wider array, as the mixer hands it over."""
    new = tensors(seed)
    return {
        "x": new(batch, length, 2 * width)[..., :width],
        "weight": new(2, width, taps) * 0.5,
        "bias": new(2, width) * 0.3,
        "score_weight": new(2, width) * 0.3,
        "score_bias": new(2),
    }


def pooled_scan_inputs(seed: int, batch: int, steps: int, width: int, states: int) -> dict[str, Tensor]:
    """B and C are slices of one array, as the mixer hands them over."""
    new = tensors(seed)
    _, B, C = new(2, batch, steps, 3 + 2 * states).split([3, states, states], dim=-1)
    return {
        "pooled": new(2, batch, steps, width),
        "delta": new(2, batch, steps, width),
        "delta_bias": new(2, width) - 1,
        "A": -new(2, width, states).abs() * 2,
        "B": B,
        "C": C,
    }


def expand_gate_inputs(seed: int, batch: int, length: int, slots: int, width: int, taps: int) -> dict[str, Tensor]:
    """x and z are the halves of one array."""
    new = tensors(seed)
    x, z = new(batch, length, 2 * width).chunk(2, dim=-1)
    return {
        "x": x,
        "z": z,
        "y": new(2, batch, slots, width),
        "weight": new(2, width, taps) * 0.5,
        "bias": new(2, width) * 0.3,
        "skip": new(2, width),
        "norm_weight": new(width) + 1,
        "norm_bias": new(width),
    }


TOKENS = ("x", "z", "y", "pooled", "delta", "B", "C", "hidden")  # what takes the low precision


def run(op: Callable, inputs: dict[str, Tensor | None], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and every gradient of ``op(**inputs)``, by name; gradients flow in from a fixed random direction."""
    leaves = {}
    for name, t in inputs.items():
        if t is not None:
            low = dtype != torch.bfloat16 or name in TOKENS
            # `detach` keeps the strides, so that slices stay slices.
            leaves[name] = (t if t.dtype == dtype or not low else t.to(dtype)).detach().requires_grad_()
    outputs = op(**{name: leaves.get(name) for name in inputs})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    new = tensors(seed + 1)
    # Numbers that every type holds exactly, so that all of them start from the same direction.
    directions = [new(*o.shape).bfloat16().to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), directions, allow_unused=True)
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def in_float64(inputs: dict[str, Tensor | None], like: torch.dtype) -> dict[str, Tensor | None]:
    """The same numbers, after rounding tokens to ``like``."""
    return {name: None if t is None else (t.to(like) if name in TOKENS else t).double() for name, t in inputs.items()}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; NaN counts as infinite."""
    difference = (actual.double() - expected.double()).abs()
    worst = difference.max().item() / max(expected.double().abs().max().item(), EPSILON) if actual.numel() else 0.0
    return float("inf") if worst != worst else worst


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every array by name. The score bias has a gradient of zero by definition: only rounding is left of it."""
    for name, array in expected.items():
        assert actual[name].shape == array.shape, name
        if name == "grad score_bias":
            assert actual[name].double().abs().max() < 1e-4, name
        else:
            assert error(actual[name], array) <= tolerance, f"{name}: {error(actual[name], array):.1e}"
