"""Masked autoencoders and dense features against the published numbers."""

from __future__ import annotations

import pytest
import torch
from golden_cases import GOLDEN, config_of, load_model, read_case, weights_of
from test_golden import assert_close

from cellvim import MaskedAutoencoder, create_model, load_reference

MASKED_CASES = [
    "fastmaskvim_layernorm_unfused",
    "fastmaskvim_ln",
    "fastmaskvim_mask0",
    "fastmaskvim_noln",
    "fastmaskvim_norotate_rawpix",
    "vimmae_midcls_ln",
]


def build(name: str) -> tuple[MaskedAutoencoder, dict]:
    description, arrays = read_case(name)
    config, kwargs = config_of(description), description["kwargs"]
    if name.startswith("vimmae"):
        config = config.replace(pool="none", alternate=False, class_token="middle")
    model = MaskedAutoencoder(
        config,
        decoder_dim=kwargs["decoder_embed_dim"],
        decoder_depth=kwargs["decoder_depth"],
        mask_ratio=description["mask_ratio"],
        norm_pixels=kwargs["norm_pix_loss"],
    )
    return model, arrays


@pytest.mark.parametrize("name", MASKED_CASES)
def test_masked_autoencoder_equals_published_numbers(name: str, backend: str) -> None:
    model, arrays = build(name)
    assert_close(model.pos_embed, arrays["init/pos_embed"], "position table")
    assert_close(model.decoder_pos_embed, arrays["init/decoder_pos_embed"], "decoder's position table")
    load_reference(model, weights_of(arrays)).eval()
    images = arrays["x"].requires_grad_()
    out = model(images, noise=arrays["noise"])
    assert torch.equal(out.mask, arrays["mask"])
    assert_close(out.latent, arrays["latent"], "latent")
    if "pred" in arrays:
        assert_close(out.prediction, arrays["pred"], "prediction")
    if "target_patches" in arrays:
        model.norm_pixels, norm_pixels = False, model.norm_pixels
        assert_close(model.targets(images), arrays["target_patches"], "target before its norm")
        model.norm_pixels = norm_pixels
    if "latent_loss_weight" in arrays:
        (out.latent * arrays["latent_loss_weight"]).sum().backward(retain_graph=True)
        for key in arrays:
            if key.startswith("grad_latent/"):
                key_of = key.removeprefix("grad_latent/")
                assert_close(images.grad if key_of == "x" else model.get_parameter(key_of).grad, arrays[key], key)
        model.zero_grad()
        images.grad = None
    if arrays["mask"].any():
        assert_close(out.loss[None], arrays["loss"], "loss")
        out.loss.backward(retain_graph=True)
        assert_close(images.grad, arrays["grad_loss/x_through_encoder_only"], "gradient of x")
        for key in arrays:
            if key.startswith("grad_loss/") and not key.endswith("/x_through_encoder_only"):
                assert_close(model.get_parameter(key.removeprefix("grad_loss/")).grad, arrays[key], key)
    if "grad_pred/x" in arrays:
        images.grad = None
        (out.prediction * arrays["pred_loss_weight"]).sum().backward()
        assert_close(images.grad, arrays["grad_pred/x"], "gradient of x through the prediction")


@pytest.mark.parametrize("name", MASKED_CASES)
def test_masked_autoencoder_equals_published_numbers_in_float64(name: str) -> None:
    model, arrays = build(name)
    load_reference(model, weights_of(arrays)).double().eval()
    out = model(arrays["x"].double(), noise=arrays["noise"])
    assert_close(out.latent, arrays["f64/latent"], "latent")
    if "f64/pred" in arrays:
        assert_close(out.prediction, arrays["f64/pred"], "prediction")
        if arrays["mask"].any():
            assert_close(out.loss[None], arrays["f64/loss"], "loss")


def test_nothing_masked_equals_fastvim() -> None:
    model, arrays = build("fastmaskvim_mask0")
    load_reference(model, weights_of(arrays)).eval()
    out = model(arrays["x"], noise=arrays["noise"])
    assert out.loss == 0
    expected = model.to_encoder().eval().forward_tokens(arrays["x"])
    assert_close(out.latent, expected.detach(), "latent")


def test_masked_autoencoder_has_the_published_size() -> None:
    import json

    expected = json.loads((GOLDEN / "_real_models.json").read_text())["FastMaskVim-B dec512d2"]
    config = create_model("fastvim_base_patch16", depth=1).config.replace(depth=24)
    parameters = dict(MaskedAutoencoder(config, decoder_dim=512, decoder_depth=2).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == expected["parameters"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == expected["trainable"]


def test_dense_features_equal_published_numbers() -> None:
    description, arrays = read_case("mm_fastvim_dense")
    model = load_model(description, arrays)
    images = arrays["x"].requires_grad_()
    maps = model.forward_intermediates(images, residual=False)
    for i, out in enumerate(maps):
        assert_close(out, arrays[f"out/{i}"], f"map {i}")
    sum((out * arrays[f"loss_weight/{i}"]).sum() for i, out in enumerate(maps)).backward()
    for key in arrays:
        if key.startswith("grad/"):
            grad = images.grad if key == "grad/x" else model.get_parameter(key.removeprefix("grad/")).grad
            assert_close(grad, arrays[key], key)
    doubled = model.double().forward_intermediates(images.detach().double(), residual=False)
    for i, out in enumerate(doubled):
        assert_close(out, arrays[f"f64/out/{i}"], f"map {i} in float64")


def test_dense_features_include_the_residual_by_default() -> None:
    description, arrays = read_case("mm_fastvim_dense")
    model = load_model(description, arrays)
    with torch.inference_mode():
        hidden, grid = model.embed(arrays["x"])
        stream = None
        for i, block in enumerate(model.layers):
            hidden, stream = block(hidden, stream, grid.plan(i))
        expected = model.outnorm_2(hidden + stream).transpose(1, 2).unflatten(2, (8, 4))
        assert_close(model.forward_intermediates(arrays["x"], [3])[0], expected, "last map")
