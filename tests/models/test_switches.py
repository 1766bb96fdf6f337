"""Every switch of EncoderConfig against a token-by-token definition (naive.py), on odd and non-square grids."""

from __future__ import annotations

import naive
import pytest
import torch

from cellvim import Encoder, EncoderConfig

BASE = {
    "image_size": (12, 20),
    "patch_size": 4,
    "in_channels": 2,
    "embed_dim": 8,
    "depth": 3,
    "num_classes": 0,
    "d_state": 4,
    "drop_path_rate": 0.0,
}
SWITCHES = {
    "default": {},
    "spatial_first": {"scan_order": "spatial_first"},
    "joint": {"tokens": "joint"},
    "no_pool": {"pool": "none", "alternate": False},
    "no_pool_alternating": {"pool": "none"},
    "no_pool_spatial_first": {"pool": "none", "scan_order": "spatial_first"},
    "max": {"pool": "max"},
    "max_two_axes": {"pool": "max", "pool_axes": 2},
    "attention": {"pool": "attention"},
    "attention_two_axes": {"pool": "attention", "pool_axes": 2, "scan_order": "spatial_first"},
    "two_axes": {"pool_axes": 2},
    "two_axes_spatial_first": {"pool_axes": 2, "scan_order": "spatial_first"},
    "not_alternating": {"alternate": False},
    "two_axes_not_alternating": {"pool_axes": 2, "alternate": False},
    "rms_rms": {"ssm_norm": "rms"},
    "layer_layer": {"input_norm": "layer"},
    "no_ssm_norm": {"ssm_norm": "none"},
    "pooled_skip": {"skip": "pooled"},
    "pooled_skip_no_norm": {"skip": "pooled", "ssm_norm": "none"},
    "no_convolution": {"d_conv": 0},
    "short_convolution": {"d_conv": 2},
    "layer_scale": {"layer_scale": 0.3},
    "pool_scale": {"pool_scale": 0.25},
    "expand_one_bias": {"expand": 1, "projection_bias": True, "dt_rank": 3},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switch_equals_its_definition(name: str) -> None:
    torch.manual_seed(3)
    model = Encoder(EncoderConfig(**BASE | SWITCHES[name])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from ones and zeros, so that each one matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(1, 2, 12, 20, dtype=torch.float64)
    channels = 2 if model.config.tokens == "per_channel" else 1
    with torch.inference_mode():
        embedded, _ = model.embed(images)
        expected = naive.encode(model, embedded[0].numpy(), 3, 5, channels)
        torch.testing.assert_close(model.forward_tokens(images)[0], torch.from_numpy(expected), rtol=0, atol=1e-11)


def test_readouts_are_the_mean_the_largest_logit_and_the_last_token() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 2, 12, 20)
    models = {
        r: Encoder(EncoderConfig(**BASE | {"readout": r, "num_classes": 3})).eval()
        for r in ("mean", "max", "last", "tokens")
    }
    for model in models.values():
        model.load_state_dict(models["mean"].state_dict())
    tokens, head = models["mean"].forward_tokens(images), models["mean"].head
    torch.testing.assert_close(models["mean"](images), head(tokens.mean(1)))
    torch.testing.assert_close(models["max"](images), head(tokens).amax(1))
    torch.testing.assert_close(models["last"](images), head(tokens[:, -1]))
    torch.testing.assert_close(models["tokens"].forward_features(images), tokens)


def test_colwise_path_is_the_transposed_image() -> None:
    torch.manual_seed(0)
    by_column = Encoder(EncoderConfig(**BASE | {"scan_path": "colwise", "image_size": 16})).eval()
    by_row = Encoder(EncoderConfig(**BASE | {"image_size": 16})).eval()
    state = dict(by_column.state_dict())
    weight = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = weight.transpose(-1, -2)  # pixels within a patch keep their place
    by_row.load_state_dict(state)
    images = torch.rand(2, 2, 16, 16)
    torch.testing.assert_close(by_column(images), by_row(images.transpose(2, 3)))


@pytest.mark.parametrize("tokens", ["per_channel", "joint"])
@pytest.mark.parametrize("pool", ["none", "mean"])
@pytest.mark.parametrize("class_token", ["first", "middle"])
def test_class_token_is_the_feature_and_learns(tokens: str, pool: str, class_token: str) -> None:
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(**BASE | {"tokens": tokens, "pool": pool, "class_token": class_token})).eval()
    images = torch.rand(2, 2, 12, 20)
    stored = model.forward_tokens(images)
    place = 0 if class_token == "first" else (stored.shape[1] - 1) // 2
    torch.testing.assert_close(model(images), stored[:, place])
    model(images).square().sum().backward()
    assert model.cls_token.grad.abs().max() > 0


def test_image_of_odd_size_equals_its_zero_padded_self() -> None:
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(**BASE)).eval()
    images = torch.rand(2, 2, 10, 17)
    padded = torch.nn.functional.pad(images, (0, 3, 0, 2))
    torch.testing.assert_close(model(images), model(padded), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(4, 4), (8, 28), (13, 5)])
def test_any_resolution_runs_and_learns(size: tuple[int, int]) -> None:
    model = Encoder(EncoderConfig(**BASE))
    model(torch.rand(2, 2, *size)).square().sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


def test_pooled_attention_attends_among_means() -> None:
    torch.manual_seed(0)
    config = EncoderConfig(**BASE | {"mixer": "attention", "num_heads": 2, "depth": 1})
    model = Encoder(config).eval()
    images = torch.rand(2, 2, 12, 20)
    with torch.inference_mode():
        hidden, grid = model.embed(images)
        block = model.layers[0]
        pooled = block.norm1(hidden).unflatten(1, (3, 5, 2)).mean(2).flatten(1, 2)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block.qkv(pooled).chunk(3, -1))
        share = (q @ k.transpose(-1, -2) / 2).softmax(-1)  # heads of 4 wide: √4
        mixed = block.proj((share @ v).transpose(1, 2).flatten(2))
        mixed = mixed.unflatten(1, (3, 1, 2)).expand(-1, -1, 5, -1, -1).flatten(1, 3)
        out, residual = block(hidden, None, grid.plan(0))
        torch.testing.assert_close(residual, hidden + mixed)
        assert out.shape == hidden.shape
