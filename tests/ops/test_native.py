"""The C++ kernels against the definition in float64: outputs and every gradient, on random shapes and plans."""

from __future__ import annotations

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import plans

from cellvim.ops import native, reference
from cellvim.ops.scan_plan import ScanPlan, sequence_plan

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

# Float32 sums of up to a few hundred terms: a tenth of the 5e-5 that the golden cases allow for complete models.
TOLERANCE = 5e-6
random_cases = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WIDTHS = st.sampled_from([1, 3, 16, 17, 48, 64, 70, 131])
SEEDS = st.integers(0, 2**20)


def check(op: str, inputs: dict, seed: int, **options) -> None:
    actual = run(partial(getattr(native, op), **options), inputs, seed, torch.float32)
    expected = run(partial(getattr(reference, op), **options), in_float64(inputs, torch.float32), seed, torch.float64)
    assert_close(actual, expected, TOLERANCE)


def check_bfloat16(op: str, inputs: dict, seed: int, **options) -> None:
    """At most twice the error of plain PyTorch on the same rounded inputs, with one rounding of the result to spare."""
    exact = run(partial(getattr(reference, op), **options), in_float64(inputs, torch.bfloat16), seed, torch.float64)
    plain = run(partial(getattr(reference, op), **options), inputs, seed, torch.bfloat16)
    actual = run(partial(getattr(native, op), **options), inputs, seed, torch.bfloat16)
    for name in exact:
        if name == "grad score_bias":
            continue  # zero by definition
        assert actual[name].dtype == plain[name].dtype, name
        allowed = 2 * max(error(plain[name], exact[name]), 2**-9)
        assert error(actual[name], exact[name]) <= allowed, name


@random_cases
@given(data=st.data(), seed=SEEDS, batch=st.integers(1, 3), width=WIDTHS, taps=st.integers(1, 4))
def test_conv_pool_on_any_plan(data, seed, batch, width, taps):
    plan, length = data.draw(plans(batch))
    pool = data.draw(st.sampled_from(["mean", "max", "attention"] + ["none"] * (not plan.pools or not plan.is_dense)))
    inputs = conv_pool_inputs(seed, batch, length, width, taps)
    if data.draw(st.booleans()):
        inputs["bias"] = None
    if pool != "attention":
        del inputs["score_weight"], inputs["score_bias"]
    check("conv_pool", inputs, seed, plan=plan, pool=pool)


@random_cases
@given(data=st.data(), seed=SEEDS, batch=st.integers(1, 3), width=WIDTHS, taps=st.integers(1, 4))
def test_expand_gate_on_any_plan(data, seed, batch, width, taps):
    plan, length = data.draw(plans(batch))
    norm = data.draw(st.sampled_from(["layer", "rms", "none"]))
    inputs = expand_gate_inputs(seed, batch, length, plan.slots, width, taps)
    for name in ("bias", "skip"):
        if data.draw(st.booleans()):
            inputs[name] = None
    if norm == "none":
        inputs["norm_weight"] = None
    if norm != "layer" or data.draw(st.booleans()):
        inputs["norm_bias"] = None
    if norm != "none" and width < 16:
        return  # the norm of one to three values multiplies rounding errors by up to 1 / sqrt(eps)
    check("expand_gate", inputs, seed, plan=plan, norm=norm)


@random_cases
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    steps=st.sampled_from([1, 2, 7, 63, 64, 65, 150]),
    width=WIDTHS,
    states=st.sampled_from([1, 5, 16, 64]),
)
def test_pooled_scan_on_any_shape(seed, batch, steps, width, states):
    check("pooled_scan", pooled_scan_inputs(seed, batch, steps, width, states), seed)


@random_cases
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70)),
    width=st.sampled_from([16, 33, 192]),
    kind=st.sampled_from(["layer", "rms"]),
    first=st.booleans(),
)
def test_add_norm_on_any_shape(seed, shape, width, kind, first):
    new = tensors(seed)
    inputs = {"hidden": new(*shape, width), "residual": None if first else new(*shape, width)}
    inputs |= {"weight": new(width), "bias": new(width) if kind == "layer" else None}
    check("add_norm", inputs, seed, kind=kind)


@pytest.mark.parametrize("pool", ["mean", "max", "attention"])
@pytest.mark.parametrize("plan", [dense_plan((5, 4, 3), (1, 0, 2), (False, True, False)), indexed_plan(0, 2, 60, 7)])
def test_conv_pool_in_bfloat16(pool, plan):
    inputs = conv_pool_inputs(3, 2, 60, 48, 4)
    if pool != "attention":
        del inputs["score_weight"], inputs["score_bias"]
    if pool == "max":
        inputs["weight"] = inputs["weight"] + 0.1  # distinct maxima: ties may be split in other ways
    check_bfloat16("conv_pool", inputs, 3, plan=plan, pool=pool)


def test_expand_gate_in_bfloat16():
    plan = dense_plan((5, 4, 3), (1, 0, 2), (False, True, False))
    check_bfloat16("expand_gate", expand_gate_inputs(4, 2, 60, plan.slots, 70, 4), 4, plan=plan)


def test_pooled_scan_in_bfloat16():
    check_bfloat16("pooled_scan", pooled_scan_inputs(5, 2, 90, 70, 16), 5)


def test_add_norm_in_bfloat16():
    new = tensors(6)
    inputs = {"hidden": new(2, 9, 70), "residual": new(2, 9, 70), "weight": new(70), "bias": None}
    check_bfloat16("add_norm", inputs, 6)


def test_mixed_types_keep_the_wider_digits():
    inputs = pooled_scan_inputs(7, 1, 9, 16, 4)
    narrow = inputs | {"delta": inputs["delta"].bfloat16()}
    expected = reference.pooled_scan(**{k: v.double() for k, v in narrow.items()})
    assert error(native.pooled_scan(**narrow), expected) < TOLERANCE


def test_inputs_may_lie_in_any_way():
    """Channels that are not side by side are copied, everything else is read where it lies."""
    plan = dense_plan((5, 4, 3), (1, 0, 2), (False, True, False))
    inputs = expand_gate_inputs(8, 2, 60, plan.slots, 32, 4)
    scattered = {
        name: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t for name, t in inputs.items()
    }
    assert not scattered["x"].is_contiguous() and scattered["x"].stride(-1) != 1
    torch.testing.assert_close(native.expand_gate(**scattered, plan=plan), native.expand_gate(**inputs, plan=plan))
    inputs = pooled_scan_inputs(8, 2, 6, 32, 4)
    scattered = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in inputs.items()}
    assert torch.equal(native.pooled_scan(**scattered), native.pooled_scan(**inputs))


def test_gradients_may_lie_in_any_way():
    """`sum().backward()` hands over a gradient of stride 0."""
    plan = dense_plan((5, 4, 3), (0, 1, 2), (False, True, False))
    inputs = {k: v.clone().requires_grad_() for k, v in conv_pool_inputs(9, 2, 60, 32, 4).items() if "score" not in k}
    native.conv_pool(**inputs, plan=plan).sum().backward()
    actual = {k: v.grad.clone() for k, v in inputs.items()}
    pooled = native.conv_pool(**inputs, plan=plan)
    grads = torch.autograd.grad(pooled, list(inputs.values()), torch.ones_like(pooled))
    for (name, grad), expected in zip(actual.items(), grads, strict=True):
        assert torch.equal(grad, expected), name


def test_long_sequences_do_not_drift():
    """Decays near 1 over 5,000 steps: an exp that is off by 1e-7 to one side would end up off by 5e-4."""
    inputs = pooled_scan_inputs(10, 1, 5000, 16, 16)
    inputs["delta_bias"] = torch.full((2, 16), -9.0)  # delta near 1e-4
    expected = reference.pooled_scan(**{k: v.double() for k, v in inputs.items()})
    assert error(native.pooled_scan(**inputs), expected) < 1e-5


def test_extreme_values_stay_finite():
    plan = sequence_plan(6)
    inputs = conv_pool_inputs(11, 1, 6, 16, 4)
    inputs["x"] = inputs["x"] * torch.tensor([1e-30, 1.0, 50.0, 1e3, 1e6, 1e30])[None, :, None]
    out = native.conv_pool(inputs["x"], inputs["weight"], inputs["bias"], plan, "none")
    expected = reference.conv_pool(
        inputs["x"].double(), inputs["weight"].double(), inputs["bias"].double(), plan, "none"
    )
    assert torch.isfinite(out).all()
    for step in range(6):
        assert error(out[:, :, step], expected[:, :, step]) < TOLERANCE, step
    scan = pooled_scan_inputs(11, 1, 6, 16, 4)
    scan["delta"] = torch.linspace(-200, 200, 6)[None, None, :, None].expand(2, 1, 6, 16)
    expected = reference.pooled_scan(**{k: v.double() for k, v in scan.items()})
    assert error(native.pooled_scan(**scan), expected) < TOLERANCE


def test_nan_reaches_the_tokens_it_should_and_no_others():
    plan = dense_plan((4, 5, 1), (0, 1, 2), (False, True, False))
    inputs = conv_pool_inputs(12, 1, 20, 16, 4)
    x = inputs["x"].clone()
    x[0, 12, 3] = float("nan")  # row 2, column 2: directions 0 and 1 see it from tokens 9 to 15
    for pool in ("mean", "max"):
        for ops in (native, reference):
            out = ops.conv_pool(x, inputs["weight"], inputs["bias"], plan, pool)
            found = out.isnan().nonzero().tolist()
            assert found == [[0, 0, 2, 3], [0, 0, 3, 3], [1, 0, 1, 3], [1, 0, 2, 3]], (pool, ops.__name__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": torch.tensor([[0, 5, 2, 3]])}, "index"),
        ({"order": torch.tensor([[0, 1, 1, 3]])}, "index"),
        ({"order": torch.tensor([[0, -1, 2, 3]])}, "index"),
        ({"slot": torch.tensor([[[0, 1, 2, 3]], [[0, 1, 2, 9]]])}, "index"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message):
    plan = indexed_plan(0, 1, 4, 4)
    fields = {"order": torch.arange(4)[None], "slot": torch.arange(4).expand(2, 1, 4)} | change
    bad = ScanPlan(plan.sizes, plan.strides, plan.pooled, 1.0, **fields, slot_weight=plan.slot_weight, slot_count=4)
    inputs = conv_pool_inputs(0, 1, 4, 16, 4)
    with pytest.raises(ValueError, match=message):
        native.conv_pool(inputs["x"], inputs["weight"], inputs["bias"], bad)


def test_sizes_that_do_not_fit_are_refused():
    inputs = conv_pool_inputs(0, 1, 12, 16, 4)
    with pytest.raises(ValueError, match="taps"):
        native.conv_pool(inputs["x"], inputs["weight"][:, :8], inputs["bias"], sequence_plan(12))
    with pytest.raises(ValueError, match="sizes do not match"):
        native.conv_pool(inputs["x"], inputs["weight"], inputs["bias"], sequence_plan(11))
    scan = pooled_scan_inputs(0, 1, 4, 16, 4)
    with pytest.raises(ValueError, match="B or C"):
        native.pooled_scan(**scan | {"B": scan["B"][:, :, :3]})
