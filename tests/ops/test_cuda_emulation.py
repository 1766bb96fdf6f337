"""The CUDA kernels' own code, run on the CPU by a small emulation, against the definition in float64.

What holds here without a GPU: indexing, strides, masks, reductions, gradients, barriers. What does not: speed, memory
ordering, the hardware's approximations. `python -m benchmarks.gpu_check` asks the same of a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from cases import (
    assert_close,
    conv_pool_inputs,
    dense_plan,
    error,
    expand_gate_inputs,
    in_float64,
    indexed_plan,
    pooled_scan_inputs,
    run,
    tensors,
)
from cuda_emulation import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import plans

from cellvim.ops import kernels, reference
from cellvim.ops.scan_plan import ScanPlan, sequence_plan

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")

TOLERANCE = 5e-6  # as for the CPU kernels: float32 sums of up to a few hundred terms
NONE, ROWS, COLUMNS, CHANNELS = (False,) * 3, (True, False, False), (False, True, False), (False, False, True)
DENSE = {  # every way in which kept and pooled axes can follow one another, stored in the block's order and transposed
    f"{name}, stored {stored}": dense_plan((5, 4, 3), stored, pooled, 0.5)
    for name, pooled in {
        "nothing pooled": NONE,
        "kept pooled kept": COLUMNS,
        "kept pooled": (False, True, True),
        "pooled kept": ROWS,
        "pooled pooled kept": (True, True, False),
        "pooled kept pooled": (True, False, True),
        "kept kept pooled": CHANNELS,
    }.items()
    for stored in ((0, 1, 2), (1, 0, 2))
}
INDEXED = {
    "ragged samples": indexed_plan(0, 2, 60, 7),
    "one plan for all samples": indexed_plan(1, 2, 60, 7, shared=True),
}
LONG = {  # cells that several blocks share
    "long rows": dense_plan((2, 70, 3), (1, 0, 2), COLUMNS),
    "one slot": dense_plan((2, 150, 1), (0, 1, 2), COLUMNS),
}
PLANS = DENSE | INDEXED | LONG


@pytest.fixture(scope="module")
def emulated() -> build.EmulatedLibrary:
    return build.open_emulation()


@pytest.fixture(autouse=True, params=["ff", "7f"], ids=["poison-ff", "poison-7f"])
def on_the_emulation(request, emulated, monkeypatch) -> None:
    """Run the CUDA kernels on CPU tensors, with shared memory filled with NaN (-1) or with large integers."""
    monkeypatch.setitem(kernels.LIBRARIES, "cpu", emulated)
    monkeypatch.setenv("CELLVIM_EMULATION_POISON", request.param)


def check(op: str, inputs: dict, seed: int, tolerance: float = TOLERANCE, **options) -> None:
    actual = run(partial(getattr(kernels, op), **options), inputs, seed, torch.float32)
    expected = run(partial(getattr(reference, op), **options), in_float64(inputs, torch.float32), seed, torch.float64)
    assert_close(actual, expected, tolerance)


def check_low_precision(op: str, inputs: dict, seed: int, dtype: torch.dtype, **options) -> None:
    """At most twice the error of plain PyTorch on the same rounded inputs, with one rounding of the result to spare."""
    rounding = {torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    inputs = {k: None if t is None else t.to(dtype).float() for k, t in inputs.items()}
    exact = run(partial(getattr(reference, op), **options), in_float64(inputs, dtype), seed, torch.float64)
    plain = run(partial(getattr(reference, op), **options), inputs, seed, dtype)
    actual = run(partial(getattr(kernels, op), **options), inputs, seed, dtype)
    for name in exact:
        if name == "grad score_bias":
            continue  # zero by definition
        assert actual[name].dtype == plain[name].dtype, name
        assert error(actual[name], exact[name]) <= 2 * max(error(plain[name], exact[name]), rounding), name


def length_of(plan: ScanPlan) -> int:
    return plan.sizes[0] * plan.sizes[1] * plan.sizes[2]


def without_scores(inputs: dict) -> dict:
    return {k: v for k, v in inputs.items() if "score" not in k}


@pytest.mark.parametrize("pool", ["mean", "max", "attention"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_conv_pool(plan, pool):
    # 20 channels fill no warp; 3 taps are padded.
    inputs = conv_pool_inputs(1, 2, length_of(plan), 20, 3)
    check("conv_pool", inputs if pool == "attention" else without_scores(inputs), 1, plan=plan, pool=pool)


def test_conv_pool_gives_the_convolution_where_nothing_is_pooled():
    inputs = without_scores(conv_pool_inputs(2, 2, 60, 16, 4)) | {"bias": None}
    check("conv_pool", inputs, 2, plan=DENSE["kept pooled, stored (1, 0, 2)"], pool="none")
    check("conv_pool", inputs, 2, plan=indexed_plan(3, 2, 60, 60), pool="none")


@pytest.mark.parametrize("length", [1, 3, 21, 25, 97, 98])
def test_expand_gate_with_lengths_that_fill_no_group_of_four_steps(length):
    """Steps beyond the last one have no slot: Vim's 197 tokens, ChannelVim's 1,569, masked batches, odd grids."""
    check("expand_gate", expand_gate_inputs(15, 2, length, length, 20, 4), 15, plan=sequence_plan(length))


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_expand_gate(plan, norm):
    inputs = expand_gate_inputs(3, 2, length_of(plan), plan.slots, 20, 4)
    inputs |= {"norm_weight": None} if norm == "none" else {}
    inputs |= {"norm_bias": None} if norm != "layer" else {}
    inputs |= {"skip": None} if norm == "rms" and plan in INDEXED.values() else {}
    check("expand_gate", inputs, 3, plan=plan, norm=norm)


@pytest.mark.parametrize(
    ("steps", "width", "states"), [(1, 3, 1), (7, 16, 16), (8, 17, 5), (17, 70, 16), (9, 65, 64), (520, 5, 16)]
)
def test_pooled_scan(steps, width, states):
    check("pooled_scan", pooled_scan_inputs(4, 2, steps, width, states), 4)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [16, 33, 192, 384, 770, 1300])
def test_add_norm(width, kind):
    new = tensors(5)
    inputs = {"hidden": new(2, 5, width), "residual": new(2, 5, width) if width != 33 else None}
    inputs |= {"weight": new(width), "bias": new(width) if kind == "layer" else None}
    check("add_norm", inputs, 5, kind=kind)


@pytest.mark.parametrize("width", [1, 3, 130])
def test_channels_that_are_no_multiple_of_four(width):
    plan = DENSE["kept pooled kept, stored (1, 0, 2)"]
    for pool in ("mean", "max"):
        check("conv_pool", without_scores(conv_pool_inputs(6, 2, 60, width, 4)), 6, plan=plan, pool=pool)
    inputs = expand_gate_inputs(6, 2, 60, plan.slots, width, 4) | {"norm_weight": None, "norm_bias": None}
    check("expand_gate", inputs, 6, plan=plan, norm="none")


def test_more_channels_than_half_a_block_of_threads():
    plan = dense_plan((2, 3, 1), (0, 1, 2), COLUMNS)
    check("expand_gate", expand_gate_inputs(7, 1, 6, plan.slots, 2050, 4), 7, plan=plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", [DENSE["kept pooled kept, stored (1, 0, 2)"], INDEXED["ragged samples"]])
def test_low_precision(dtype, plan):
    for pool in ("mean", "max", "attention"):
        inputs = conv_pool_inputs(8, 2, 60, 48, 4)
        inputs["weight"] = inputs["weight"] + 0.1 * (pool == "max")  # distinct maxima: ties may be split in other ways
        inputs = inputs if pool == "attention" else without_scores(inputs)
        check_low_precision("conv_pool", inputs, 8, dtype, plan=plan, pool=pool)
    check_low_precision("expand_gate", expand_gate_inputs(9, 2, 60, plan.slots, 36, 4), 9, dtype, plan=plan)
    check_low_precision("pooled_scan", pooled_scan_inputs(10, 2, 20, 24, 16), 10, dtype)
    new = tensors(11)
    inputs = {"hidden": new(2, 9, 72), "residual": new(2, 9, 72), "weight": new(72), "bias": None}
    check_low_precision("add_norm", inputs, 11, dtype)


def test_long_sequences_do_not_drift():
    """Decays near 1 over 5,000 steps, in chunks: an exp that is off by 1e-7 would be off by 5e-4 at the end."""
    inputs = pooled_scan_inputs(12, 1, 5000, 4, 16)
    inputs["delta_bias"] = torch.full((2, 4), -9.0)  # delta near 1e-4
    expected = reference.pooled_scan(**{k: v.double() for k, v in inputs.items()})
    assert error(kernels.pooled_scan(**inputs), expected) < 2e-6


def test_an_image_does_not_depend_on_its_batch():
    """Bitwise: no sum is divided in a way that the batch decides."""
    plan = LONG["long rows"]
    inputs = without_scores(conv_pool_inputs(13, 3, 420, 20, 4))
    alone = {k: v[1:2] if k == "x" else v for k, v in inputs.items()}
    assert torch.equal(kernels.conv_pool(**inputs, plan=plan)[:, 1:2], kernels.conv_pool(**alone, plan=plan))
    inputs = expand_gate_inputs(13, 3, 420, plan.slots, 20, 4)
    alone = inputs | {"x": inputs["x"][1:2], "z": inputs["z"][1:2], "y": inputs["y"][:, 1:2]}
    assert torch.equal(kernels.expand_gate(**inputs, plan=plan)[1:2], kernels.expand_gate(**alone, plan=plan))
    inputs = pooled_scan_inputs(13, 3, 600, 4, 16)
    alone = {k: v[:, 1:2] if v.ndim == 4 else v for k, v in inputs.items()}
    assert torch.equal(kernels.pooled_scan(**inputs)[:, 1:2], kernels.pooled_scan(**alone))


def test_extreme_values_stay_finite():
    inputs = conv_pool_inputs(14, 1, 6, 16, 4)
    inputs["x"] = inputs["x"] * torch.tensor([1e-30, 1.0, 50.0, 1e3, 65_535.0, 1e30])[None, :, None]
    out = kernels.conv_pool(inputs["x"], inputs["weight"], inputs["bias"], sequence_plan(6), "none")
    assert torch.isfinite(out).all()
    for value in (0.0, 65_535.0):
        scan = pooled_scan_inputs(14, 1, 9, 8, 16)
        scan["pooled"] = torch.full_like(scan["pooled"], value)
        results = run(kernels.pooled_scan, scan, 14, torch.float32)
        assert all(torch.isfinite(t).all() for t in results.values())


def test_threads_may_run_in_any_order(monkeypatch):
    """Without a barrier, a thread reads what another has not written yet: the result depends on the order."""

    def same_in_reverse(op, inputs):
        forward = run(op, inputs, 1, torch.float32)
        monkeypatch.setenv("CELLVIM_EMULATION_ORDER", "reverse")
        backward = run(op, inputs, 1, torch.float32)
        monkeypatch.delenv("CELLVIM_EMULATION_ORDER")
        for name, array in forward.items():
            assert torch.equal(array, backward[name]), (op, name)

    for plan in (DENSE["kept pooled kept, stored (1, 0, 2)"], INDEXED["ragged samples"]):
        for pool in ("max", "attention"):
            inputs = conv_pool_inputs(1, 2, 60, 20, 4)
            inputs = inputs if pool == "attention" else without_scores(inputs)
            same_in_reverse(partial(kernels.conv_pool, plan=plan, pool=pool), inputs)
        same_in_reverse(partial(kernels.expand_gate, plan=plan), expand_gate_inputs(2, 2, 60, plan.slots, 150, 4))
    same_in_reverse(kernels.pooled_scan, pooled_scan_inputs(3, 2, 520, 5, 16))


random_cases = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.slow
@random_cases
@given(data=st.data(), seed=st.integers(0, 2**20), batch=st.integers(1, 3), width=st.sampled_from([1, 16, 17, 70, 260]))
def test_any_plan(data, seed, batch, width):
    plan, length = data.draw(plans(batch))
    if all(plan.pooled) and plan.is_dense:
        return
    taps = data.draw(st.integers(1, 4))
    inputs = without_scores(conv_pool_inputs(seed, batch, length, width, taps))
    check("conv_pool", inputs, seed, plan=plan, pool=data.draw(st.sampled_from(["mean", "max"])))
    inputs = expand_gate_inputs(seed, batch, length, plan.slots, width, taps)
    if width < 16:  # the norm of one to three values multiplies rounding errors by up to 1 / sqrt(eps)
        check("expand_gate", inputs | {"norm_weight": None, "norm_bias": None}, seed, plan=plan, norm="none")
    else:
        check("expand_gate", inputs, seed, plan=plan)


@pytest.mark.slow
def test_the_checks_of_a_gpu_pass_on_the_emulation(monkeypatch):
    """`benchmarks.gpu_check` itself: its shapes, its plans, and complete models against the published numbers."""
    monkeypatch.syspath_prepend(str(build.REPOSITORY))
    from benchmarks import gpu_check

    monkeypatch.setattr(gpu_check, "GPU", torch.device("cpu"))
    monkeypatch.setattr(gpu_check, "cuda", kernels)
    rows = [row for task in gpu_check._op_tasks("ops", 6, (16, 17, 36, 64)) for row in task.run()]
    rows += list(gpu_check._check_golden())
    assert len(rows) > 100 and not [row for row in rows if not row["ok"]]


@pytest.mark.slow
def test_kernels_read_and_write_only_their_own_memory():
    """This file's quick tests once more under the address sanitizer."""
    flags = "-fsanitize=address -g"
    preload = subprocess.run(
        [build.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        "CELLVIM_EMULATION_FLAGS": flags,
        "LD_PRELOAD": preload,
        # The fibers' stacks are ours; Python and torch keep memory for the life of the process.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=0",
    }
    build.build(*flags.split())  # compilers do not like the preload
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not any_order"]
    done = subprocess.run(command, env=environment, cwd=build.REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
