"""The C++ kernels as torch ops: PyTorch's own checks of schema, shapes, gradients and tracing."""

from __future__ import annotations

import pytest
import torch
from cases import conv_pool_inputs, dense_plan, expand_gate_inputs, indexed_plan, pooled_scan_inputs, tensors

from cellvim.ops import kernels, native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

DENSE = dense_plan((3, 4, 2), (1, 0, 2), (False, True, False))
INDEXED = indexed_plan(0, 2, 24, 5)


def leaves(inputs: dict) -> dict:
    return {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}


@pytest.mark.parametrize("plan", [DENSE, INDEXED], ids=["dense", "indexed"])
@pytest.mark.parametrize("pool", ["mean", "max", "attention"])
def test_opcheck_conv_pool(plan, pool):
    t = leaves(conv_pool_inputs(0, 2, 24, 16, 4))
    scores = (t["score_weight"], t["score_bias"]) if pool == "attention" else (None, None)
    arguments = (t["x"], t["weight"], t["bias"], *scores, pool, *kernels.plan_arguments(plan, plan.slots))
    torch.library.opcheck(torch.ops.cellvim_native.conv_pool.default, arguments)


@pytest.mark.parametrize("with_skip", [True, False])
def test_opcheck_expand_gate(with_skip):
    t = leaves(expand_gate_inputs(0, 2, 24, DENSE.slots, 16, 4))
    arguments = (
        *(t["x"], t["z"], t["y"], t["weight"], t["bias"], t["skip"] if with_skip else None),
        *(t["norm_weight"], t["norm_bias"], "layer", 1e-5),
        *kernels.plan_arguments(DENSE, DENSE.slots),
    )
    torch.library.opcheck(torch.ops.cellvim_native.expand_gate.default, arguments)


def test_opcheck_pooled_scan():
    t = leaves(pooled_scan_inputs(0, 2, 5, 16, 3))
    torch.library.opcheck(torch.ops.cellvim_native.pooled_scan.default, tuple(t.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_add_norm(dtype):
    new = tensors(0)
    hidden = new(2, 3, 16).to(dtype).requires_grad_()
    arguments = (hidden, new(2, 3, 16).requires_grad_(), new(16).requires_grad_(), None, 1e-5, "rms")
    torch.library.opcheck(torch.ops.cellvim_native.add_norm.default, arguments)


def test_compiles_as_one_graph():
    inputs = conv_pool_inputs(0, 2, 24, 16, 4)

    def pooled_norm(x, weight, bias):
        return native.conv_pool(x, weight, bias, DENSE).square().mean(-1)

    compiled = torch.compile(pooled_norm, fullgraph=True, backend="aot_eager")
    arguments = [inputs[name].clone().requires_grad_() for name in ("x", "weight", "bias")]
    expected, actual = pooled_norm(*arguments), compiled(*arguments)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual.sum(), arguments), torch.autograd.grad(expected.sum(), arguments), strict=True
    ):
        torch.testing.assert_close(a, e)
