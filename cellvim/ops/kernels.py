"""The C interface of the kernels and their torch ops, which the CPU library and the CUDA library share.

Both libraries take the same structs of pointers, sizes and strides. This module fills the structs, allocates the
results and registers the ops once, with shapes for tracing and gradients, as ``torch.ops.cellvim_native``. The device
of the tensors determines the `Library` that runs. `cellvim.ops.native` and `cellvim.ops.cuda` load the libraries.
"""

from __future__ import annotations

import ctypes
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellvim.ops import reference
from cellvim.ops.scan_plan import ScanPlan

MAX_TAPS = 4
MAX_STATES = 64

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the codes of enum cellvim_dtype
_POOLS = {"none": 0, "mean": 1, "max": 2, "attention": 3}
_NORMS = {"none": 0, "layer": 1, "rms": 2}
_STATUS = {1: "an index of the plan is out of range, or missing tokens are not at the end", 3: "sizes do not match"}


def refusal(
    device_type: str,
    dtypes: tuple[torch.dtype, ...],
    tokens: tuple[Tensor, ...],
    taps: int,
    states: int,
    max_states: int = MAX_STATES,
) -> str | None:
    """Return why a library for this type of device and these dtypes does not support the inputs, None if it does."""
    for t in tokens:
        if t.device.type != device_type:
            return f"tensors on {t.device.type}, only on {device_type}"
        if t.dtype not in dtypes:
            return f"{t.dtype} tensors, only {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    if not 1 <= taps <= MAX_TAPS:
        return f"{taps} convolution taps, only 1 to {MAX_TAPS}"
    if states > max_states:
        return f"{states} states, only up to {max_states}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The ops of `cellvim.ops.reference` for tensors that the library supports: cast the inputs and flatten the plan.


def _implements(definition: Callable) -> Callable[[Callable], Callable]:
    """Give a function the defaults and annotations of its definition, whose parameters it must have."""

    def decorate(function: Callable) -> Callable:
        code, expected = function.__code__, definition.__code__
        if code.co_varnames[: code.co_argcount] != expected.co_varnames[: expected.co_argcount]:
            raise TypeError(f"{function.__name__} does not have the parameters of its definition.")
        function.__defaults__, function.__annotations__ = definition.__defaults__, definition.__annotations__
        return function

    return decorate


@_implements(reference.add_norm)
def add_norm(hidden, residual, weight, bias, eps, kind):
    """See `cellvim.ops.reference.add_norm`."""
    residual = None if residual is None else residual.float().expand(hidden.shape)
    bias = bias if kind == "layer" else None
    return torch.ops.cellvim_native.add_norm(hidden, residual, weight.float(), _float(bias), eps, kind)


@_implements(reference.conv_pool)
def conv_pool(x, weight, bias, plan, pool, score_weight, score_bias):
    """See `cellvim.ops.reference.conv_pool`."""
    if pool not in _POOLS:
        raise ValueError(f"pool is {pool!r}; expected one of {tuple(_POOLS)}")
    if plan.is_dense and not plan.pools:
        pool = "none"
    if pool != "attention":
        score_weight = score_bias = None
    weights = (weight.float(), *map(_float, (bias, score_weight, score_bias)))
    slots = plan.sizes[0] * plan.sizes[1] * plan.sizes[2] if plan.is_dense and pool == "none" else plan.slots
    return torch.ops.cellvim_native.conv_pool(x, *weights, pool, *plan_arguments(plan, slots))[0]


@_implements(reference.pooled_scan)
def pooled_scan(pooled, delta, delta_bias, A, B, C):
    """See `cellvim.ops.reference.pooled_scan`."""
    dtype = pooled.dtype
    pooled, delta = _same_type(pooled, delta)
    y = torch.ops.cellvim_native.pooled_scan(pooled, delta, delta_bias.float(), A.float(), B.float(), C.float())
    return y.to(dtype)


@_implements(reference.expand_gate)
def expand_gate(x, z, y, weight, bias, skip, plan, norm, norm_weight, norm_bias, eps):
    """See `cellvim.ops.reference.expand_gate`."""
    dtype = x.dtype
    x, z, y = _same_type(x, z, y)
    norm_weight = None if norm == "none" else norm_weight
    norm_bias = norm_bias if norm == "layer" else None
    weights = (weight.float(), *map(_float, (bias, skip, norm_weight, norm_bias)))
    plan = plan_arguments(plan, y.shape[2])
    return torch.ops.cellvim_native.expand_gate(x, z, y, *weights, norm, eps, *plan).to(dtype)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def _same_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert mixed inputs to float32, the wider type."""
    if len({t.dtype for t in tensors}) == 1:
        return tensors
    return tuple(t.float() for t in tensors)


def plan_arguments(plan: ScanPlan, slots: int) -> tuple:
    """Return the plan as arguments of a torch op: order, slot, slot_weight, grid, slots, mean_weight."""
    grid = [*plan.sizes, *plan.strides, *map(int, plan.pooled)]
    if plan.is_dense:
        return None, None, None, grid, slots, plan.mean_weight
    order, slot, weight = plan.order, plan.slot, plan.slot_weight.float()
    batch = max(order.shape[0], slot.shape[1], weight.shape[0])
    return order.expand(batch, -1), slot.expand(-1, batch, -1), weight.expand(batch, -1), grid, slots, 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The structs of the C interface; fields as in csrc/cpu/cellvim_cpu.h. A struct does not keep its tensors alive: an op
# holds contiguous copies in local variables until the library has been called.


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class _Plan(Structure):
    _fields_ = _fields(
        (c_int64, "length stored slots"),
        (c_int64 * 3, "sizes strides pooled"),
        (c_int64, "index_batch"),
        (c_void_p, "order slot slot_weight"),
        (c_float, "mean_weight"),
    )


class _AddNorm(Structure):
    _fields_ = _fields(
        (c_int64, "rows width"),
        (c_int32, "dtype kind threads"),
        (c_float, "eps"),
        (c_void_p, "hidden residual weight bias normed total"),
        (c_void_p, "grad_normed grad_total grad_residual grad_hidden grad_weight grad_bias"),
    )


class _ConvPool(Structure):
    _fields_ = _fields(
        (_Plan, "plan"),
        (c_int64, "batch width taps"),
        (c_int32, "dtype pool threads"),
        (c_void_p, "x"),
        (c_int64, "x_batch x_token"),
        (c_void_p, "weight bias score_weight score_bias out best share"),
        (c_void_p, "grad_out grad_x grad_weight grad_bias grad_score_weight grad_score_bias"),
    )


class _PooledScan(Structure):
    _fields_ = _fields(
        (c_int64, "batch steps width states"),
        (c_int32, "dtype threads"),
        (c_void_p, "pooled delta"),
        (c_int64 * 3, "pooled_stride delta_stride"),
        (c_void_p, "delta_bias a b c"),
        (c_int64 * 3, "b_stride c_stride"),
        (c_void_p, "out grad_out grad_pooled grad_delta grad_delta_bias grad_a grad_b grad_c"),
    )


class _ExpandGate(Structure):
    _fields_ = _fields(
        (_Plan, "plan"),
        (c_int64, "batch width taps"),
        (c_int32, "dtype norm threads"),
        (c_float, "eps"),
        (c_void_p, "x z"),
        (c_int64, "x_batch x_token z_batch z_token"),
        (c_void_p, "y weight bias skip norm_weight norm_bias out"),
        (c_void_p, "grad_out grad_x grad_z grad_y grad_mixed"),
        (c_void_p, "grad_weight grad_bias grad_skip grad_norm_weight grad_norm_bias"),
    )


STRUCTS = {"add_norm": _AddNorm, "conv_pool": _ConvPool, "pooled_scan": _PooledScan, "expand_gate": _ExpandGate}


class Library(ABC):
    """A shared library that runs the ops on one type of device."""

    mixes_in_place = False  # whether expand_gate_backward may use the memory of grad_x for its scratch

    @abstractmethod
    def run(self, op: str, arguments: Structure, device: torch.device) -> int:
        """Call a function, such as ``conv_pool_backward``, with its struct; return its status."""

    def describe(self, status: int) -> str:
        """Return the meaning of a status other than 0."""
        return _STATUS.get(status, f"status {status}")


LIBRARIES: dict[str, Library] = {}  # by type of device; filled by `cellvim.ops.native` and `cellvim.ops.cuda`


def load_library(
    file: str, variable: str, open_library: Callable[[Path], ctypes.CDLL], remedy: str
) -> tuple[ctypes.CDLL | None, str]:
    """Open a compiled library; return it and an empty string, or None and why it is not available.

    The ``file`` is next to this module, or where an editable installation puts it; the environment ``variable`` can
    name another build. ``open_library`` raises an `OSError` or `AttributeError` if the file cannot be loaded, and
    ``remedy`` describes how to install it.
    """
    folders = [Path(__file__).parent, *map(Path, sys.modules[__package__].__path__)]
    folders += [Path(entry) / "cellvim" / "ops" for entry in sys.path if entry.endswith("-packages")]
    found = next((folder / file for folder in folders if (folder / file).is_file()), None)
    path = Path(os.environ[variable]) if os.environ.get(variable) else found
    if path is None:
        return None, f"this installation has no {file}; {remedy}"
    try:
        return open_library(path), ""
    except (OSError, AttributeError) as error:
        return None, f"{file} cannot be loaded ({error}); {remedy}"


def _run(op: str, arguments: Structure, on: Tensor, **tensors: Tensor) -> None:
    """Call a function of the library for the device of ``on``, with pointers to further tensors in its struct."""
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr())
    library = LIBRARIES[on.device.type]
    status = library.run(op, arguments, on.device)
    if status == 2:
        raise MemoryError(f"{op} ran out of memory.")
    if status:
        raise ValueError(f"{op} failed: {library.describe(status)}.")


def _pointers(**tensors: Tensor | None) -> dict[str, int | None]:
    return {name: None if t is None else t.data_ptr() for name, t in tensors.items()}


def _gradients(names: str, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"grad_{name}": grad for name, grad in zip(names.split(), grads, strict=True)}


def _common(dtype: torch.dtype) -> dict[str, int]:
    return {"dtype": _DTYPES.index(dtype), "threads": torch.get_num_threads()}


def _rows(t: Tensor) -> Tensor:
    """Return the tensor, or a copy unless the values of a row are contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _dense_plan(order, slot, slot_weight, grid, slots, mean_weight) -> tuple:
    return *_dense(order, slot, slot_weight), grid, slots, mean_weight


def _plan_struct(plan: tuple, batch: int, stored: int) -> _Plan:
    order, slot, slot_weight, grid, slots, mean_weight = plan
    _check(order is None or order.shape[0] in (1, batch), "The plan's indices have another batch size.")
    return _Plan(
        length=stored if order is None else order.shape[1],
        stored=stored,
        slots=slots,
        sizes=tuple(grid[:3]),
        strides=tuple(grid[3:6]),
        pooled=tuple(grid[6:]),
        index_batch=1 if order is None else order.shape[0],
        mean_weight=mean_weight,
        **_pointers(order=order, slot=slot, slot_weight=slot_weight),
    )


def _check(condition: bool, message: str) -> None:
    """Raise a `ValueError` before sizes that do not match reach the kernels, which do not check them."""
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Torch ops. Each has an allocation of its results, which also gives their shapes for tracing, a call and a gradient.

_torch = torch.library.Library("cellvim_native", "DEF")
_PLAN = "Tensor? order, Tensor? slot, Tensor? slot_weight, SymInt[] grid, SymInt slots, float mean_weight"
_PLAN_LENGTH = 6


def _op(schema: str, allocate: Callable) -> Callable[[Callable], Callable]:
    """Register a function as the torch op of a schema; ``allocate`` returns its results from the same arguments."""

    def register(implementation: Callable) -> Callable:
        name = schema.partition("(")[0]
        _torch.define(schema)
        for device in ("CPU", "CUDA"):
            _torch.impl(name, implementation, device)
        torch.library.register_fake(f"cellvim_native::{name}", allocate, lib=_torch)
        return implementation

    return register


def _differentiable(name: str, save: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"cellvim_native::{name}", backward, setup_context=save, lib=_torch)


# --- add_norm


def _add_norm_results(hidden, *_):
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape, dtype=torch.float32)


@_op(
    "add_norm(Tensor hidden, Tensor? residual, Tensor weight, Tensor? bias, float eps, str kind) -> (Tensor, Tensor)",
    _add_norm_results,
)
def _add_norm(hidden, residual, weight, bias, eps, kind):
    hidden, residual, weight, bias = _dense(hidden, residual, weight, bias)
    D = hidden.shape[-1]
    _check(weight.shape == (D,) and (bias is None or bias.shape == (D,)), f"The weights of the norm are not ({D},).")
    normed, total = _add_norm_results(hidden)
    arguments = _AddNorm(
        rows=hidden.numel() // max(D, 1),
        width=D,
        kind=_NORMS[kind],
        eps=eps,
        **_common(hidden.dtype),
        **_pointers(hidden=hidden, residual=residual, weight=weight, bias=bias),
    )
    _run("add_norm", arguments, hidden, normed=normed, total=total)
    return normed, total


def _add_norm_backward_results(grad_normed, grad_total, total, weight, eps, kind, dtype):
    return (
        total.new_empty(total.shape),  # of the residual
        total.new_empty(total.shape if dtype != torch.float32 else 0, dtype=dtype),  # of hidden, if another type
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


@_op(
    "add_norm_backward(Tensor? grad_normed, Tensor? grad_total, Tensor total, Tensor weight, float eps, str kind, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_norm_backward_results,
)
def _add_norm_backward(grad_normed, grad_total, total, weight, eps, kind, dtype):
    grad_normed, grad_total, total, weight = _dense(grad_normed, grad_total, total, weight)
    grads = _add_norm_backward_results(grad_normed, grad_total, total, weight, eps, kind, dtype)
    arguments = _AddNorm(
        rows=total.numel() // max(total.shape[-1], 1),
        width=total.shape[-1],
        kind=_NORMS[kind],
        eps=eps,
        **_common(dtype),
        **_pointers(weight=weight, total=total, grad_normed=grad_normed, grad_total=grad_total),
        **_pointers(grad_residual=grads[0], grad_hidden=grads[1] if dtype != torch.float32 else None),
        **_pointers(grad_weight=grads[2], grad_bias=grads[3]),
    )
    _run("add_norm_backward", arguments, total)
    return grads


def _add_norm_save(ctx, inputs, output):
    hidden, residual, weight, bias, eps, kind = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)
    ctx.rest = hidden.dtype, residual is not None, bias is not None, eps, kind


def _add_norm_grad(ctx, grad_normed, grad_total):
    dtype, has_residual, has_bias, eps, kind = ctx.rest
    if grad_normed is None and grad_total is None:
        return (None,) * 6
    residual, hidden, weight, bias = torch.ops.cellvim_native.add_norm_backward(
        grad_normed, grad_total, *ctx.saved_tensors, eps, kind, dtype
    )
    hidden = residual if dtype == torch.float32 else hidden
    return hidden, residual if has_residual else None, weight, bias if has_bias else None, None, None


_differentiable("add_norm", _add_norm_save, _add_norm_grad)


# --- conv_pool

_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? score_weight, Tensor? score_bias"


def _conv_pool_results(x, weight, bias, score_weight, score_bias, pool, order, slot, slot_weight, grid, slots, *_):
    """Pooled tokens, and for the backward pass the winners of a maximum or the shares of a softmax."""
    B, stored, E = x.shape
    length = stored if order is None else order.shape[1]
    out = x.new_empty(2, B, slots, E)
    if pool == "max":
        return out, x.new_empty(2, B, slots, E, dtype=torch.int32)
    return out, x.new_empty((2, B, length) if pool == "attention" else 0, dtype=torch.float32)


def _conv_pool_struct(x, weight, bias, score_weight, score_bias, pool, plan) -> _ConvPool:
    E = x.shape[-1]
    if pool == "attention":
        _check(
            score_weight is not None and score_weight.shape == (2, E) and score_bias.shape == (2,),
            f"Attention pooling needs score weights (2, {E}) and biases (2,).",
        )
    return _ConvPool(
        pool=_POOLS[pool],
        **_convolution(x, weight, bias, plan),
        **_pointers(score_weight=score_weight, score_bias=score_bias),
    )


def _convolution(x, weight, bias, plan) -> dict[str, Any]:
    """Return the fields of the ops that convolve x."""
    B, stored, E = x.shape
    _check(weight.shape[:2] == (2, E) and (bias is None or bias.shape == (2, E)), f"The taps do not fit width {E}.")
    return {
        "plan": _plan_struct(plan, B, stored),
        "batch": B,
        "width": E,
        "taps": weight.shape[-1],
        "x_batch": x.stride(0),
        "x_token": x.stride(1),
        **_common(x.dtype),
        **_pointers(x=x, weight=weight, bias=bias),
    }


@_op(f"conv_pool({_CONV}, str pool, {_PLAN}) -> (Tensor, Tensor)", _conv_pool_results)
def _conv_pool(x, weight, bias, score_weight, score_bias, pool, *plan):
    inputs = _rows(x), *_dense(weight, bias, score_weight, score_bias), pool
    plan = _dense_plan(*plan)
    out, kept = _conv_pool_results(*inputs, *plan)
    _run("conv_pool", _conv_pool_struct(*inputs, plan), x, out=out, best=kept, share=kept)
    return out, kept


def _conv_pool_backward_results(grad, x, weight, bias, score_weight, score_bias, kept, pool, *_):
    E, has_score = x.shape[-1], pool == "attention"
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(2, E),
        weight.new_empty((2, E) if has_score else 0),
        weight.new_empty(2 if has_score else 0),
    )


@_op(
    f"conv_pool_backward(Tensor grad, {_CONV}, Tensor kept, str pool, {_PLAN}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv_pool_backward_results,
)
def _conv_pool_backward(grad, x, weight, bias, score_weight, score_bias, kept, pool, *plan):
    inputs = _rows(x), *_dense(weight, bias, score_weight, score_bias)
    grad, plan = grad.to(x.dtype).contiguous(), _dense_plan(*plan)
    grads = _conv_pool_backward_results(grad, *inputs, kept, pool)
    arguments = _conv_pool_struct(*inputs, pool, plan)
    pointers = _gradients("x weight bias score_weight score_bias", grads)
    _run("conv_pool_backward", arguments, x, best=kept, share=kept, grad_out=grad, **pointers)
    return grads


def _conv_pool_save(ctx, inputs, output):
    tensors, ctx.pool, plan = inputs[:5], inputs[5], inputs[6:]
    ctx.save_for_backward(*tensors, output[1], *plan[:3])
    ctx.mark_non_differentiable(output[1])
    ctx.plan = plan[3:]


def _conv_pool_grad(ctx, grad, _):
    saved = ctx.saved_tensors
    grads = torch.ops.cellvim_native.conv_pool_backward(grad, *saved[:6], ctx.pool, *saved[6:], *ctx.plan)
    grads = [None if t is None else g for t, g in zip(saved[:5], grads, strict=True)]
    return *grads, *(None,) * (1 + _PLAN_LENGTH)


_differentiable("conv_pool", _conv_pool_save, _conv_pool_grad)


# --- pooled_scan

_SCAN = "Tensor pooled, Tensor delta, Tensor delta_bias, Tensor A, Tensor B, Tensor C"


def _pooled_scan_struct(pooled, delta, delta_bias, A, B, C) -> _PooledScan:
    _, batch, steps, width = pooled.shape
    states = A.shape[-1]
    _check(delta.shape == pooled.shape, "delta does not have the shape of the pooled tokens.")
    _check(delta_bias.shape == (2, width) and A.shape[:2] == (2, width), f"A or delta_bias do not fit width {width}.")
    _check(B.shape == C.shape == (2, batch, steps, states), "B or C do not fit the pooled tokens and A.")
    return _PooledScan(
        batch=batch,
        steps=steps,
        width=width,
        states=states,
        pooled_stride=pooled.stride()[:3],
        delta_stride=delta.stride()[:3],
        b_stride=B.stride()[:3],
        c_stride=C.stride()[:3],
        **_common(pooled.dtype),
        **_pointers(pooled=pooled, delta=delta, delta_bias=delta_bias, a=A, b=B, c=C),
    )


def _pooled_scan_inputs(pooled, delta, delta_bias, A, B, C) -> tuple[Tensor, ...]:
    return _rows(pooled), _rows(delta), delta_bias.contiguous(), A.contiguous(), _rows(B), _rows(C)


@_op(f"pooled_scan({_SCAN}) -> Tensor", lambda pooled, *_: pooled.new_empty(pooled.shape))
def _pooled_scan(*inputs):
    inputs = _pooled_scan_inputs(*inputs)
    out = inputs[0].new_empty(inputs[0].shape)
    _run("pooled_scan", _pooled_scan_struct(*inputs), out, out=out)
    return out


def _pooled_scan_backward_results(grad, *inputs):
    return tuple(t.new_empty(t.shape) for t in inputs)


@_op(
    f"pooled_scan_backward(Tensor grad, {_SCAN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pooled_scan_backward_results,
)
def _pooled_scan_backward(grad, *inputs):
    inputs = _pooled_scan_inputs(*inputs)
    grad = grad.to(inputs[0].dtype).contiguous()
    grads = _pooled_scan_backward_results(grad, *inputs)
    pointers = _gradients("pooled delta delta_bias a b c", grads)
    _run("pooled_scan_backward", _pooled_scan_struct(*inputs), grad, grad_out=grad, **pointers)
    return grads


_differentiable(
    "pooled_scan",
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, grad: torch.ops.cellvim_native.pooled_scan_backward(grad, *ctx.saved_tensors),
)


# --- expand_gate

_GATE = (
    "Tensor x, Tensor z, Tensor y, Tensor weight, Tensor? bias, Tensor? skip, Tensor? norm_weight, Tensor? norm_bias, "
    f"str norm, float eps, {_PLAN}"
)


def _expand_gate_inputs(x, z, *weights) -> tuple[Tensor | None, ...]:
    return _rows(x), _rows(z), *_dense(*weights)


def _expand_gate_struct(x, z, y, weight, bias, skip, norm_weight, norm_bias, norm, eps, plan) -> _ExpandGate:
    B, _, E = x.shape
    _check(z.shape == x.shape, "z does not have the shape of x.")
    _check(y.shape == (2, B, plan[4], E), f"y is {tuple(y.shape)}; expected {(2, B, plan[4], E)}.")
    _check(skip is None or skip.shape == (2, E), f"The skip is not (2, {E}).")
    _check(norm == "none" or norm_weight.shape == (E,), f"The weight of the norm is not ({E},).")
    _check(norm_bias is None or norm_bias.shape == (E,), f"The bias of the norm is not ({E},).")
    return _ExpandGate(
        norm=_NORMS[norm],
        eps=eps,
        z_batch=z.stride(0),
        z_token=z.stride(1),
        **_convolution(x, weight, bias, plan),
        **_pointers(z=z, y=y, skip=skip, norm_weight=norm_weight, norm_bias=norm_bias),
    )


@_op(f"expand_gate({_GATE}) -> Tensor", lambda x, *_: x.new_empty(x.shape))
def _expand_gate(x, z, y, weight, bias, skip, norm_weight, norm_bias, norm, eps, *plan):
    inputs = _expand_gate_inputs(x, z, y, weight, bias, skip, norm_weight, norm_bias)
    plan, out = _dense_plan(*plan), x.new_empty(x.shape)
    _run("expand_gate", _expand_gate_struct(*inputs, norm, eps, plan), x, out=out)
    return out


def _expand_gate_backward_results(grad, x, z, y, weight, bias, skip, *_):
    """Gradients of x, z, y, weight, bias, skip and the norm; without a skip the convolution has none."""
    E, full = x.shape[-1], skip is not None
    return (
        x.new_empty(x.shape if full else 0),
        z.new_empty(z.shape),
        y.new_empty(y.shape),
        weight.new_empty(weight.shape if full else 0),
        weight.new_empty((2, E) if full else 0),
        weight.new_empty((2, E) if full else 0),
        weight.new_empty(E),
        weight.new_empty(E),
    )


@_op(
    f"expand_gate_backward(Tensor grad, {_GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _expand_gate_backward_results,
)
def _expand_gate_backward(grad, x, z, y, weight, bias, skip, norm_weight, norm_bias, norm, eps, *plan):
    inputs = _expand_gate_inputs(x, z, y, weight, bias, skip, norm_weight, norm_bias)
    grad, plan = grad.to(x.dtype).contiguous(), _dense_plan(*plan)
    grads = _expand_gate_backward_results(grad, *inputs)
    # Scratch for the gradient before the norm. The CPU kernels may keep it in grad_x until they replace it with the
    # gradient of the convolution; on a GPU neighbouring blocks still read it at that point.
    in_place = x.dtype == torch.float32 and skip is not None and LIBRARIES[x.device.type].mixes_in_place
    mixed = grads[0] if in_place else x.new_empty(x.shape, dtype=torch.float32)
    arguments = _expand_gate_struct(*inputs, norm, eps, plan)
    pointers = _gradients("x z y weight bias skip norm_weight norm_bias", grads)
    _run("expand_gate_backward", arguments, x, grad_out=grad, grad_mixed=mixed, **pointers)
    return grads


def _expand_gate_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], *inputs[10:13])
    ctx.rest, ctx.plan = inputs[8:10], inputs[13:]


def _expand_gate_grad(ctx, grad):
    saved = ctx.saved_tensors  # once: gradient checkpointing recomputes them
    tensors, plan = saved[:8], saved[8:]
    grads = torch.ops.cellvim_native.expand_gate_backward(grad, *tensors, *ctx.rest, *plan, *ctx.plan)
    if tensors[5] is None:  # no skip
        grads = (None, *grads[1:3], None, None, None, *grads[6:])
    grads = [None if t is None else g for t, g in zip(tensors, grads, strict=True)]
    return *grads, *(None,) * (2 + _PLAN_LENGTH)


_differentiable("expand_gate", _expand_gate_save, _expand_gate_grad)
