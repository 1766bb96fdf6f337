"""Every model against the numbers of the published implementation (tests/golden): outputs, blocks, gradients."""

from __future__ import annotations

import pytest
import torch
from golden_cases import ENCODER_CASES, load_model, prefixes, read_case, subset, weights_of

from cellvim import Encoder, EncoderConfig


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """5e-5·max|array| in float32, 1e-10 in float64: the tolerance of design §4."""
    tolerance = (1e-10 if expected.dtype == torch.float64 else 5e-5) * expected.abs().max().item()
    worst = (actual - expected).abs().max().item()
    assert worst <= tolerance, f"{name}: off by {worst:.3g}, allowed {tolerance:.3g}"


def run_blocks(model: Encoder, images: torch.Tensor, channels) -> tuple[list, torch.Tensor]:
    hidden, grid = model.embed(images, channels)
    residual, outputs = None, []
    for i, block in enumerate(model.layers):
        hidden, residual = block(hidden, residual, grid.plan(i))
        outputs.append(hidden)
    return outputs, residual


@pytest.mark.parametrize(("name", "prefix"), [(n, p) for n in ENCODER_CASES for p in prefixes(n)])
def test_equals_published_numbers(name: str, prefix: str, backend: str) -> None:
    description, arrays = read_case(name)
    model = load_model(description, arrays)
    images = arrays[f"{prefix}x"].requires_grad_()
    channels = subset(images, model)

    logits = model(images, channels)
    assert_close(logits, arrays[f"{prefix}logits"], "logits")
    if f"{prefix}tokens" in arrays:
        assert_close(model.forward_tokens(images, channels), arrays[f"{prefix}tokens"], "tokens")
    if model.config.readout == "mean":
        assert_close(model.forward_features(images, channels), arrays[f"{prefix}features"], "features")
    (logits * arrays["loss_weight"][: len(images)]).sum().backward()
    assert_close(images.grad, arrays[f"{prefix}grad/x"], "gradient of x")
    if prefix:
        return
    for key in arrays:
        if key.startswith("grad/") and key != "grad/x":
            assert_close(model.get_parameter(key.removeprefix("grad/")).grad, arrays[key], key)
    for key, length in description["grad_l2_of_every_parameter_float64"].items():
        assert model.get_parameter(key).grad.norm().item() == pytest.approx(length, rel=1e-4, abs=1e-6), key
    outputs, residual = run_blocks(model, images, channels)
    for i, hidden in enumerate(outputs):
        assert_close(hidden, arrays[f"block/{i}/hidden"], f"block {i}")
    assert_close(residual, arrays[f"block/{len(outputs) - 1}/residual"], "residual")


@pytest.mark.parametrize("name", ENCODER_CASES)
def test_equals_published_numbers_in_float64(name: str) -> None:
    description, arrays = read_case(name)
    model = load_model(description, arrays).double()
    for prefix in ("", "sub/"):
        if f"f64/{prefix}logits" in arrays:
            images = arrays[f"{prefix}x"].double()
            channels = subset(images, model)
            assert_close(model(images, channels), arrays[f"f64/{prefix}logits"], f"{prefix}logits")
            if model.config.readout == "mean":
                features = model.forward_features(images, channels)
                assert_close(features, arrays[f"f64/{prefix}features"], f"{prefix}features")


@pytest.mark.parametrize(
    "name", ["fastchannelvim_hcs_sorted", "fastchannelvim_hcs_unsorted", "channelvim_hcs_unsorted_sf"]
)
def test_drawn_channels_equal_published_training_numbers(name: str, monkeypatch) -> None:
    description, arrays = read_case(name)
    model = load_model(description, arrays).train()
    for seed, drawn in description["channels_drawn_after_random_seed"].items():
        monkeypatch.setattr(model.channel_sampler, "draw", lambda *_, drawn=drawn, **__: torch.tensor(drawn))
        assert_close(model(arrays["x"]), arrays[f"seed{seed}/logits"], f"seed {seed}")


@pytest.mark.parametrize("path", ["row", "col"])
@pytest.mark.parametrize("order", ["cf", "sf"])
def test_patch_embedding_with_channels_of_each_sample(order: str, path: str) -> None:
    from cellvim.models.patch_embed import PatchEmbed

    _, arrays = read_case("channel_patchembed_order")
    arrays = {k.removeprefix(f"{order}_{path}/"): v for k, v in arrays.items() if k.startswith(f"{order}_{path}/")}
    config = EncoderConfig(
        image_size=(16, 24),
        patch_size=8,
        in_channels=6,
        embed_dim=10,
        scan_order="channel_first" if order == "cf" else "spatial_first",
        scan_path=f"{path}wise",
    )
    embed = PatchEmbed(config)
    embed.load_state_dict(weights_of(arrays))
    assert_close(embed(arrays["x"], arrays["order"]).flatten(1, -2), arrays["out_with_order"], "with order")
    assert_close(embed(arrays["x"]).flatten(1, -2), arrays["out_without_order"], "without order")
