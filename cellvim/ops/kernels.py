"""The fused ops' C interface and their torch ops: what the CPU library and the CUDA library share.

Both libraries take the same structs of pointers, sizes and strides. Here these are filled, memory for results is found,
and the ops are registered once with their shapes and gradients (as ``torch.ops.cellvim_native``); the tensors' device
decides which `Library` runs. `cellvim.ops.native` and `cellvim.ops.cuda` load the libraries and say what they take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from cellvim.ops.scan_plan import ScanPlan

MAX_TAPS = 4
MAX_STATES = 64

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the codes of enum cellvim_dtype
_POOLS = {"none": 0, "mean": 1, "max": 2, "attention": 3}
_NORMS = {"none": 0, "layer": 1, "rms": 2}
_STATUS = {
    1: "an index of the plan is out of range, or absent tokens are not at the end",
    3: "sizes that do not fit each other",
}


# ---------------------------------------------------------------------------------------------------------------------
# The ops, as `cellvim.ops.reference` defines them, for tensors that the library takes.


def add_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    kind: str = "rms",
) -> tuple[Tensor, Tensor]:
    """See `cellvim.ops.reference.add_norm`."""
    residual = None if residual is None else residual.float().expand(hidden.shape)
    bias = bias if kind == "layer" else None
    return torch.ops.cellvim_native.add_norm(hidden, residual, weight.float(), _float(bias), eps, kind)


def conv_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: ScanPlan,
    pool: str = "mean",
    score_weight: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> Tensor:
    """See `cellvim.ops.reference.conv_pool`."""
    if pool not in _POOLS:
        raise ValueError(f"pool is {pool!r}; expected one of {tuple(_POOLS)}")
    if plan.is_dense and not plan.pools:
        pool = "none"
    if pool != "attention":
        score_weight = score_bias = None
    pooled, _ = torch.ops.cellvim_native.conv_pool(
        x,
        weight.float(),
        _float(bias),
        _float(score_weight),
        _float(score_bias),
        *plan_arguments(plan, _slots(plan, pool)),
        pool,
    )
    return pooled


def pooled_scan(pooled: Tensor, delta: Tensor, delta_bias: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """See `cellvim.ops.reference.pooled_scan`."""
    dtype = pooled.dtype
    pooled, delta = _same_type(pooled, delta)
    y = torch.ops.cellvim_native.pooled_scan(pooled, delta, delta_bias.float(), A.float(), B.float(), C.float())
    return y.to(dtype)


def expand_gate(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    plan: ScanPlan,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `cellvim.ops.reference.expand_gate`."""
    dtype = x.dtype
    x, z, y = _same_type(x, z, y)
    norm_weight = None if norm == "none" else norm_weight
    norm_bias = norm_bias if norm == "layer" else None
    out = torch.ops.cellvim_native.expand_gate(
        x,
        z,
        y,
        weight.float(),
        _float(bias),
        _float(skip),
        *plan_arguments(plan, y.shape[2]),
        norm,
        _float(norm_weight),
        _float(norm_bias),
        eps,
    )
    return out.to(dtype)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def _same_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Give mixed inputs the wider type, so that none loses digits."""
    if len({t.dtype for t in tensors}) == 1:
        return tensors
    return tuple(t.float() for t in tensors)


def _slots(plan: ScanPlan, pool: str) -> int:
    return plan.sizes[0] * plan.sizes[1] * plan.sizes[2] if plan.is_dense and pool == "none" else plan.slots


def plan_arguments(plan: ScanPlan, slots: int) -> tuple:
    """Return the plan as a torch op takes it: order, slot, slot_weight, grid, slots, mean_weight."""
    grid = [*plan.sizes, *plan.strides, *map(int, plan.pooled)]
    if plan.is_dense:
        return None, None, None, grid, slots, plan.mean_weight
    order, slot, weight = plan.order, plan.slot, plan.slot_weight.float()
    batch = max(order.shape[0], slot.shape[1], weight.shape[0])
    return order.expand(batch, -1), slot.expand(-1, batch, -1), weight.expand(batch, -1), grid, slots, 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The libraries' structs; fields as in csrc/cpu/cellvim_cpu.h.


class _Plan(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("length", "stored", "slots")),
        *((name, c_int64 * 3) for name in ("sizes", "strides", "pooled")),
        ("index_batch", c_int64),
        *((name, c_void_p) for name in ("order", "slot", "slot_weight")),
        ("mean_weight", c_float),
    ]


class _AddNorm(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "width")),
        *((name, c_int32) for name in ("dtype", "kind", "threads")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("hidden", "residual", "weight", "bias", "normed", "total")),
        *((name, c_void_p) for name in ("grad_normed", "grad_total", "grad_residual", "grad_hidden")),
        *((name, c_void_p) for name in ("grad_weight", "grad_bias")),
    ]


class _ConvPool(Structure):
    _fields_ = [
        ("plan", _Plan),
        *((name, c_int64) for name in ("batch", "width", "taps")),
        *((name, c_int32) for name in ("dtype", "pool", "threads")),
        ("x", c_void_p),
        *((name, c_int64) for name in ("x_batch", "x_token")),
        *((name, c_void_p) for name in ("weight", "bias", "score_weight", "score_bias", "out", "best", "share")),
        *((name, c_void_p) for name in ("grad_out", "grad_x", "grad_weight", "grad_bias")),
        *((name, c_void_p) for name in ("grad_score_weight", "grad_score_bias")),
    ]


class _PooledScan(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "steps", "width", "states")),
        *((name, c_int32) for name in ("dtype", "threads")),
        *((name, c_void_p) for name in ("pooled", "delta")),
        *((name, c_int64 * 3) for name in ("pooled_stride", "delta_stride")),
        *((name, c_void_p) for name in ("delta_bias", "a", "b", "c")),
        *((name, c_int64 * 3) for name in ("b_stride", "c_stride")),
        *((name, c_void_p) for name in ("out", "grad_out", "grad_pooled", "grad_delta")),
        *((name, c_void_p) for name in ("grad_delta_bias", "grad_a", "grad_b", "grad_c")),
    ]


class _ExpandGate(Structure):
    _fields_ = [
        ("plan", _Plan),
        *((name, c_int64) for name in ("batch", "width", "taps")),
        *((name, c_int32) for name in ("dtype", "norm", "threads")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("x", "z")),
        *((name, c_int64) for name in ("x_batch", "x_token", "z_batch", "z_token")),
        *((name, c_void_p) for name in ("y", "weight", "bias", "skip", "norm_weight", "norm_bias", "out")),
        *((name, c_void_p) for name in ("grad_out", "grad_x", "grad_z", "grad_y", "grad_mixed")),
        *((name, c_void_p) for name in ("grad_weight", "grad_bias", "grad_skip")),
        *((name, c_void_p) for name in ("grad_norm_weight", "grad_norm_bias")),
    ]


STRUCTS = {"add_norm": _AddNorm, "conv_pool": _ConvPool, "pooled_scan": _PooledScan, "expand_gate": _ExpandGate}


class Library(ABC):
    """A shared library that runs the ops on one kind of device."""

    mixes_in_place = False  # whether the gradient of expand_gate may be kept in that of x

    @abstractmethod
    def run(self, op: str, arguments: Structure, device: torch.device) -> int:
        """Call a function, such as ``conv_pool_backward``, with its struct; return its status."""

    def describe(self, status: int) -> str:
        """Say what a status other than 0 means."""
        return _STATUS.get(status, f"status {status}")


LIBRARIES: dict[str, Library] = {}  # by type of device; `cellvim.ops.native` and `cellvim.ops.cuda` fill it


def _run(op: str, arguments: Structure, on: Tensor) -> None:
    library = LIBRARIES[on.device.type]
    status = library.run(op, arguments, on.device)
    if status == 2:
        raise MemoryError(f"{op} ran out of memory.")
    if status:
        raise ValueError(f"{op} was given {library.describe(status)}.")


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _common(tokens: Tensor) -> dict[str, int]:
    return {"dtype": _DTYPES.index(tokens.dtype), "threads": torch.get_num_threads()}


def _rows(t: Tensor) -> Tensor:
    """The tensor itself if a row's values lie side by side, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _plan_struct(order, slot, slot_weight, grid, slots, mean_weight, stored: int) -> _Plan:
    return _Plan(
        length=stored if order is None else order.shape[1],
        stored=stored,
        slots=slots,
        sizes=tuple(grid[:3]),
        strides=tuple(grid[3:6]),
        pooled=tuple(grid[6:]),
        index_batch=1 if order is None else order.shape[0],
        order=_address(order),
        slot=_address(slot),
        slot_weight=_address(slot_weight),
        mean_weight=mean_weight,
    )


def _check(condition: bool, message: str) -> None:
    """The kernels trust sizes: what does not fit must not reach them."""
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Torch ops: schema, CPU implementation, shapes for tracing, and gradient of each.

_torch = torch.library.Library("cellvim_native", "DEF")
_PLAN_SCHEMA = (
    "Tensor? order, Tensor? slot, Tensor? slot_weight, SymInt[] grid, SymInt slots, float mean_weight"  # of ScanPlan
)
_PLAN_LENGTH = 6


def _define(name: str, schema: str, implementation, fake) -> None:
    _torch.define(name + schema)
    for device in ("CPU", "CUDA"):
        _torch.impl(name, implementation, device)
    torch.library.register_fake(f"cellvim_native::{name}", fake, lib=_torch)


def _differentiable(name: str, save, backward) -> None:
    torch.library.register_autograd(f"cellvim_native::{name}", backward, setup_context=save, lib=_torch)


# --- add_norm


def _add_norm(hidden, residual, weight, bias, eps, kind):
    hidden, weight = hidden.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    D = hidden.shape[-1]
    _check(weight.shape == (D,) and (bias is None or bias.shape == (D,)), f"The norm's weights are not ({D},).")
    normed = torch.empty_like(hidden)
    total = torch.empty_like(hidden, dtype=torch.float32)
    arguments = _AddNorm(
        rows=hidden.numel() // max(D, 1),
        width=D,
        kind=_NORMS[kind],
        eps=eps,
        hidden=_address(hidden),
        residual=_address(residual),
        weight=_address(weight),
        bias=_address(bias),
        normed=_address(normed),
        total=_address(total),
        **_common(hidden),
    )
    _run("add_norm", arguments, hidden)
    return normed, total


def _add_norm_backward(grad_normed, grad_total, total, weight, eps, kind, dtype):
    total, weight = total.contiguous(), weight.contiguous()
    grad_normed = None if grad_normed is None else grad_normed.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    low_precision = dtype != torch.float32
    grad_residual = torch.empty_like(total)
    grad_hidden = torch.empty_like(total, dtype=dtype) if low_precision else total.new_empty(0)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    arguments = _AddNorm(
        rows=total.numel() // max(total.shape[-1], 1),
        width=total.shape[-1],
        dtype=_DTYPES.index(dtype),
        threads=torch.get_num_threads(),
        kind=_NORMS[kind],
        eps=eps,
        weight=_address(weight),
        total=_address(total),
        grad_normed=_address(grad_normed),
        grad_total=_address(grad_total),
        grad_residual=_address(grad_residual),
        grad_hidden=_address(grad_hidden) if low_precision else None,
        grad_weight=_address(grad_weight),
        grad_bias=_address(grad_bias),
    )
    _run("add_norm_backward", arguments, total)
    return grad_residual, grad_hidden, grad_weight, grad_bias


def _add_norm_save(ctx, inputs, output):
    hidden, residual, weight, bias, eps, kind = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)
    ctx.rest = hidden.dtype, residual is not None, bias is not None, eps, kind


def _add_norm_grad(ctx, grad_normed, grad_total):
    dtype, has_residual, has_bias, eps, kind = ctx.rest
    if grad_normed is None and grad_total is None:
        return (None,) * 6
    total, weight = ctx.saved_tensors
    residual, hidden, weight, bias = torch.ops.cellvim_native.add_norm_backward(
        grad_normed, grad_total, total, weight, eps, kind, dtype
    )
    hidden = residual if dtype == torch.float32 else hidden
    return hidden, residual if has_residual else None, weight, bias if has_bias else None, None, None


_define(
    "add_norm",
    "(Tensor hidden, Tensor? residual, Tensor weight, Tensor? bias, float eps, str kind) -> (Tensor, Tensor)",
    _add_norm,
    lambda hidden, *_: (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        torch.empty_like(hidden, dtype=torch.float32, memory_format=torch.contiguous_format),
    ),
)
_define(
    "add_norm_backward",
    "(Tensor? grad_normed, Tensor? grad_total, Tensor total, Tensor weight, float eps, str kind, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_norm_backward,
    lambda grad_normed, grad_total, total, weight, eps, kind, dtype: (
        total.new_empty(total.shape),
        total.new_empty(total.shape if dtype != torch.float32 else 0, dtype=dtype),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    ),
)
_differentiable("add_norm", _add_norm_save, _add_norm_grad)


# --- conv_pool


def _conv_pool_arguments(x, weight, bias, score_weight, score_bias, plan, pool) -> _ConvPool:
    B, stored, E = x.shape
    _check(weight.shape[:2] == (2, E) and (bias is None or bias.shape == (2, E)), f"The taps do not fit width {E}.")
    if pool == "attention":
        _check(
            score_weight is not None and score_weight.shape == (2, E) and score_bias.shape == (2,),
            f"Attention pooling needs score weights (2, {E}) and biases (2,).",
        )
    _check(plan[0] is None or plan[0].shape[0] in (1, B), "The plan's indices are of another batch.")
    return _ConvPool(
        plan=_plan_struct(*plan, stored),
        batch=B,
        width=E,
        taps=weight.shape[-1],
        pool=_POOLS[pool],
        x=_address(x),
        x_batch=x.stride(0),
        x_token=x.stride(1),
        weight=_address(weight),
        bias=_address(bias),
        score_weight=_address(score_weight),
        score_bias=_address(score_bias),
        **_common(x),
    )


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _conv_pool_out(x, order, slots, pool):
    """Fresh tensors: the pooled tokens, and what the backward needs: winners of a maximum or shares of a softmax."""
    B, stored, E = x.shape
    length = stored if order is None else order.shape[1]
    out = x.new_empty(2, B, slots, E)
    if pool == "max":
        return out, x.new_empty(2, B, slots, E, dtype=torch.int32)
    return out, x.new_empty((2, B, length) if pool == "attention" else 0, dtype=torch.float32)


def _conv_pool(x, weight, bias, score_weight, score_bias, order, slot, slot_weight, grid, slots, mean_weight, pool):
    x = _rows(x)
    weight, bias, score_weight, score_bias = _dense(weight, bias, score_weight, score_bias)
    order, slot, slot_weight = _dense(order, slot, slot_weight)
    plan = order, slot, slot_weight, grid, slots, mean_weight
    out, kept = _conv_pool_out(x, order, slots, pool)
    arguments = _conv_pool_arguments(x, weight, bias, score_weight, score_bias, plan, pool)
    arguments.out, arguments.best, arguments.share = _address(out), _address(kept), _address(kept)
    _run("conv_pool", arguments, x)
    return out, kept


def _conv_pool_backward(
    grad, x, weight, bias, score_weight, score_bias, kept, order, slot, slot_weight, grid, slots, mean_weight, pool
):
    x, grad = _rows(x), grad.to(x.dtype).contiguous()
    weight, bias, score_weight, score_bias = _dense(weight, bias, score_weight, score_bias)
    order, slot, slot_weight = _dense(order, slot, slot_weight)
    plan = order, slot, slot_weight, grid, slots, mean_weight
    E = x.shape[-1]
    grad_x = x.new_empty(x.shape)
    grad_weight, grad_bias = weight.new_empty(weight.shape), weight.new_empty(2, E)
    grad_score = [weight.new_empty((2, E)), weight.new_empty(2)] if pool == "attention" else [weight.new_empty(0)] * 2
    arguments = _conv_pool_arguments(x, weight, bias, score_weight, score_bias, plan, pool)
    arguments.best, arguments.share, arguments.grad_out = _address(kept), _address(kept), _address(grad)
    arguments.grad_x, arguments.grad_weight, arguments.grad_bias = map(_address, (grad_x, grad_weight, grad_bias))
    if pool == "attention":
        arguments.grad_score_weight, arguments.grad_score_bias = map(_address, grad_score)
    _run("conv_pool_backward", arguments, x)
    return grad_x, grad_weight, grad_bias, grad_score[0].clone(), grad_score[1].clone()


def _conv_pool_backward_fake(grad, x, weight, bias, score_weight, score_bias, kept, *rest):
    E, has_score = x.shape[-1], rest[-1] == "attention"
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(2, E),
        weight.new_empty((2, E) if has_score else 0),
        weight.new_empty(2 if has_score else 0),
    )


def _conv_pool_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.rest = inputs[8:]


def _conv_pool_grad(ctx, grad, _):
    x, weight, bias, score_weight, score_bias, order, slot, slot_weight, kept = ctx.saved_tensors
    grads = torch.ops.cellvim_native.conv_pool_backward(
        grad, x, weight, bias, score_weight, score_bias, kept, order, slot, slot_weight, *ctx.rest
    )
    inputs = (x, weight, bias, score_weight, score_bias)
    grads = [None if t is None else g for t, g in zip(inputs, grads, strict=True)]
    return *grads, *(None,) * (_PLAN_LENGTH + 1)


_define(
    "conv_pool",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? score_weight, Tensor? score_bias, {_PLAN_SCHEMA}, str pool)"
    " -> (Tensor, Tensor)",
    _conv_pool,
    lambda x, weight, bias, score_weight, score_bias, order, slot, slot_weight, grid, slots, mean_weight, pool: (
        _conv_pool_out(x, order, slots, pool)
    ),
)
_define(
    "conv_pool_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? score_weight, Tensor? score_bias, Tensor kept, "
    f"{_PLAN_SCHEMA}, str pool) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv_pool_backward,
    _conv_pool_backward_fake,
)
_differentiable("conv_pool", _conv_pool_save, _conv_pool_grad)


# --- pooled_scan


def _pooled_scan_arguments(pooled, delta, delta_bias, A, B, C) -> _PooledScan:
    _, batch, steps, width = pooled.shape
    states = A.shape[-1]
    _check(delta.shape == pooled.shape, "delta is not of the shape of the pooled tokens.")
    _check(delta_bias.shape == (2, width) and A.shape[:2] == (2, width), f"A or delta_bias do not fit width {width}.")
    _check(B.shape == C.shape == (2, batch, steps, states), "B or C do not fit the pooled tokens and A.")
    return _PooledScan(
        batch=batch,
        steps=steps,
        width=width,
        states=states,
        pooled=_address(pooled),
        delta=_address(delta),
        pooled_stride=pooled.stride()[:3],
        delta_stride=delta.stride()[:3],
        delta_bias=_address(delta_bias),
        a=_address(A),
        b=_address(B),
        c=_address(C),
        b_stride=B.stride()[:3],
        c_stride=C.stride()[:3],
        **_common(pooled),
    )


def _pooled_scan(pooled, delta, delta_bias, A, B, C):
    pooled, delta, B, C = map(_rows, (pooled, delta, B, C))
    delta_bias, A = _dense(delta_bias, A)
    out = pooled.new_empty(pooled.shape)
    arguments = _pooled_scan_arguments(pooled, delta, delta_bias, A, B, C)
    arguments.out = _address(out)
    _run("pooled_scan", arguments, pooled)
    return out


def _pooled_scan_backward(grad, pooled, delta, delta_bias, A, B, C):
    pooled, delta, B, C = map(_rows, (pooled, delta, B, C))
    delta_bias, A = _dense(delta_bias, A)
    grad = grad.to(pooled.dtype).contiguous()
    grads = [t.new_empty(t.shape) for t in (pooled, delta, delta_bias, A, B, C)]
    arguments = _pooled_scan_arguments(pooled, delta, delta_bias, A, B, C)
    arguments.grad_out = _address(grad)
    for name, t in zip(("pooled", "delta", "delta_bias", "a", "b", "c"), grads, strict=True):
        setattr(arguments, f"grad_{name}", _address(t))
    _run("pooled_scan_backward", arguments, pooled)
    return tuple(grads)


_define(
    "pooled_scan",
    "(Tensor pooled, Tensor delta, Tensor delta_bias, Tensor A, Tensor B, Tensor C) -> Tensor",
    _pooled_scan,
    lambda pooled, *_: pooled.new_empty(pooled.shape),
)
_define(
    "pooled_scan_backward",
    "(Tensor grad, Tensor pooled, Tensor delta, Tensor delta_bias, Tensor A, Tensor B, Tensor C)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pooled_scan_backward,
    lambda grad, *inputs: tuple(t.new_empty(t.shape) for t in inputs),
)
_differentiable(
    "pooled_scan",
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, grad: torch.ops.cellvim_native.pooled_scan_backward(grad, *ctx.saved_tensors),
)


# --- expand_gate


def _expand_gate_arguments(x, z, y, weight, bias, skip, plan, norm, norm_weight, norm_bias, eps) -> _ExpandGate:
    B, stored, E = x.shape
    _check(z.shape == x.shape, "z is not of the shape of x.")
    _check(y.shape == (2, B, plan[4], E), f"y is {tuple(y.shape)}; expected {(2, B, plan[4], E)}.")
    _check(weight.shape[:2] == (2, E) and (bias is None or bias.shape == (2, E)), f"The taps do not fit width {E}.")
    _check(skip is None or skip.shape == (2, E), f"The skip is not (2, {E}).")
    _check(norm == "none" or norm_weight.shape == (E,), f"The norm's weight is not ({E},).")
    _check(norm_bias is None or norm_bias.shape == (E,), f"The norm's bias is not ({E},).")
    _check(plan[0] is None or plan[0].shape[0] in (1, B), "The plan's indices are of another batch.")
    return _ExpandGate(
        plan=_plan_struct(*plan, stored),
        batch=B,
        width=E,
        taps=weight.shape[-1],
        norm=_NORMS[norm],
        eps=eps,
        x=_address(x),
        z=_address(z),
        x_batch=x.stride(0),
        x_token=x.stride(1),
        z_batch=z.stride(0),
        z_token=z.stride(1),
        y=_address(y),
        weight=_address(weight),
        bias=_address(bias),
        skip=_address(skip),
        norm_weight=_address(norm_weight),
        norm_bias=_address(norm_bias),
        **_common(x),
    )


def _expand_gate(
    x, z, y, weight, bias, skip, order, slot, slot_weight, grid, slots, mean_weight, norm, norm_weight, norm_bias, eps
):
    x, z = _rows(x), _rows(z)
    y, weight, bias, skip, norm_weight, norm_bias = _dense(y, weight, bias, skip, norm_weight, norm_bias)
    order, slot, slot_weight = _dense(order, slot, slot_weight)
    plan = order, slot, slot_weight, grid, slots, mean_weight
    out = x.new_empty(x.shape)
    arguments = _expand_gate_arguments(x, z, y, weight, bias, skip, plan, norm, norm_weight, norm_bias, eps)
    arguments.out = _address(out)
    _run("expand_gate", arguments, x)
    return out


def _expand_gate_backward(
    grad,
    x,
    z,
    y,
    weight,
    bias,
    skip,
    norm_weight,
    norm_bias,
    order,
    slot,
    slot_weight,
    grid,
    slots,
    mean_weight,
    norm,
    eps,
):
    x, z, grad = _rows(x), _rows(z), grad.to(x.dtype).contiguous()
    y, weight, bias, skip, norm_weight, norm_bias = _dense(y, weight, bias, skip, norm_weight, norm_bias)
    order, slot, slot_weight = _dense(order, slot, slot_weight)
    plan = order, slot, slot_weight, grid, slots, mean_weight
    arguments = _expand_gate_arguments(x, z, y, weight, bias, skip, plan, norm, norm_weight, norm_bias, eps)
    grads = _expand_gate_backward_out(x, z, y, weight, skip)
    mixed = _scratch_for_mixed(grads[0], x, skip)
    arguments.grad_out, arguments.grad_mixed = _address(grad), _address(mixed)
    names = ("x", "z", "y", "weight", "bias", "skip", "norm_weight", "norm_bias")
    for name, t in zip(names, grads, strict=True):
        setattr(arguments, f"grad_{name}", _address(t))
    _run("expand_gate_backward", arguments, x)
    return grads


def _scratch_for_mixed(grad_x, x, skip):
    """Memory for the gradient before the norm.

    The CPU kernels keep it in grad_x until the convolution's gradient replaces it; on a GPU neighbouring blocks still
    read it then.
    """
    if x.dtype == torch.float32 and skip is not None and LIBRARIES[x.device.type].mixes_in_place:
        return grad_x
    return x.new_empty(x.shape, dtype=torch.float32)


def _expand_gate_backward_out(x, z, y, weight, skip):
    """Fresh tensors for the gradients; without a skip the convolution has none and is left out."""
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


def _expand_gate_save(ctx, inputs, output):
    x, z, y, weight, bias, skip = inputs[:6]
    norm, norm_weight, norm_bias, eps = inputs[6 + _PLAN_LENGTH :]
    ctx.save_for_backward(x, z, y, weight, bias, skip, norm_weight, norm_bias, *inputs[6:9])
    ctx.rest = *inputs[9 : 6 + _PLAN_LENGTH], norm, eps


def _expand_gate_grad(ctx, grad):
    x, z, y, weight, bias, skip, norm_weight, norm_bias, order, slot, slot_weight = ctx.saved_tensors
    gx, gz, gy, gw, gb, gs, gnw, gnb = torch.ops.cellvim_native.expand_gate_backward(
        grad, x, z, y, weight, bias, skip, norm_weight, norm_bias, order, slot, slot_weight, *ctx.rest
    )
    if skip is None:
        gx = gw = gb = gs = None
    gb = None if bias is None else gb
    gnw, gnb = None if norm_weight is None else gnw, None if norm_bias is None else gnb
    return gx, gz, gy, gw, gb, gs, *(None,) * _PLAN_LENGTH, None, gnw, gnb, None


_define(
    "expand_gate",
    f"(Tensor x, Tensor z, Tensor y, Tensor weight, Tensor? bias, Tensor? skip, {_PLAN_SCHEMA}, str norm, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor",
    _expand_gate,
    lambda x, *_: x.new_empty(x.shape),
)
_define(
    "expand_gate_backward",
    "(Tensor grad, Tensor x, Tensor z, Tensor y, Tensor weight, Tensor? bias, Tensor? skip, Tensor? norm_weight, "
    f"Tensor? norm_bias, {_PLAN_SCHEMA}, str norm, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _expand_gate_backward,
    lambda grad, x, z, y, weight, bias, skip, *_: _expand_gate_backward_out(x, z, y, weight, skip),
)
_differentiable("expand_gate", _expand_gate_save, _expand_gate_grad)
