"""The C++ kernels give bitwise the same whatever the number of threads, and for a sample whatever its batch-mates."""

from __future__ import annotations

import pytest
import torch
from cases import conv_pool_inputs, dense_plan, expand_gate_inputs, indexed_plan, pooled_scan_inputs, run, tensors

from cellvim.ops import native
from cellvim.ops.scan_plan import ScanPlan

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

BATCH, LENGTH, WIDTH = 5, 130, 200
DENSE = dense_plan((13, 5, 2), (1, 0, 2), (False, True, False))
INDEXED = indexed_plan(1, BATCH, LENGTH, 11)


def cases(plan: ScanPlan) -> dict:
    new = tensors(2)
    gate = expand_gate_inputs(0, BATCH, LENGTH, plan.slots, WIDTH, 4)
    conv = conv_pool_inputs(0, BATCH, LENGTH, WIDTH, 4)
    plain = {k: v for k, v in conv.items() if "score" not in k}
    norm = {"hidden": new(BATCH, LENGTH, WIDTH), "residual": new(BATCH, LENGTH, WIDTH)}
    return {
        "mean": (native.conv_pool, plain, {"plan": plan}),
        "max": (native.conv_pool, plain, {"plan": plan, "pool": "max"}),
        "attention": (native.conv_pool, conv, {"plan": plan, "pool": "attention"}),
        "scan": (native.pooled_scan, pooled_scan_inputs(0, BATCH, 70, WIDTH, 16), {}),
        "expand": (native.expand_gate, gate, {"plan": plan}),
        "add_norm": (native.add_norm, norm | {"weight": new(WIDTH), "bias": new(WIDTH)}, {"kind": "layer"}),
    }


@pytest.mark.parametrize("plan", [DENSE, INDEXED], ids=["dense", "indexed"])
@pytest.mark.parametrize("case", ["mean", "max", "attention", "scan", "expand", "add_norm"])
def test_number_of_threads_changes_no_bit(case, plan, threads):
    op, inputs, options = cases(plan)[case]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(lambda **t: op(**t, **options), inputs, 0, torch.float32))
    for name, array in results[0].items():
        assert torch.equal(array, results[1][name]), name
        assert torch.equal(array, results[2][name]), name


@pytest.mark.parametrize("plan", [DENSE, INDEXED], ids=["dense", "indexed"])
@pytest.mark.parametrize("case", ["mean", "max", "attention", "scan", "expand", "add_norm"])
def test_batch_mates_change_no_bit(case, plan):
    op, inputs, options = cases(plan)[case]
    together = op(**inputs, **options)
    together = together[0] if isinstance(together, tuple) else together
    batch_axis = 1 if case in ("mean", "max", "attention", "scan") else 0
    for b in range(BATCH):
        alone = {
            name: t.narrow(1 if t.ndim == 4 else 0, b, 1) if t.ndim == 4 or t.shape[0] == BATCH else t
            for name, t in inputs.items()
        }
        if not plan.is_dense and "plan" in options:
            options = options | {"plan": one_sample(plan, b)}
        out = op(**alone, **options)
        out = out[0] if isinstance(out, tuple) else out
        assert torch.equal(out, together.narrow(batch_axis, b, 1)), b


def one_sample(plan: ScanPlan, b: int) -> ScanPlan:
    return ScanPlan(
        plan.sizes,
        plan.strides,
        plan.pooled,
        order=plan.order[b : b + 1],
        slot=plan.slot[:, b : b + 1],
        slot_weight=plan.slot_weight[b : b + 1],
        slot_count=plan.slots,
    )
