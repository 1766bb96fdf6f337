"""At the edges: missing pixels, odd noise, ragged maps, class tokens in exported graphs, wrong types and values."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from cellvim import (
    Encoder,
    EncoderConfig,
    MaskedAutoencoder,
    create_model,
    load_checkpoint,
    load_reference,
    save_checkpoint,
)
from cellvim.errors import CellvimError, InputError, ModelError
from cellvim.models.flops import count_flops

BASE = {
    "image_size": 16,
    "patch_size": 4,
    "in_channels": 3,
    "embed_dim": 16,
    "depth": 2,
    "num_classes": 0,
    "d_state": 4,
    "drop_path_rate": 0.0,
}


def build(**changes) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**BASE | changes)).eval()


def autoencoder(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(EncoderConfig(**BASE | changes), decoder_dim=16, decoder_depth=1).eval()


@pytest.mark.parametrize("changes", [{"class_token": "middle", "pool": "none"}, {"mixer": "attention", "num_heads": 2}])
def test_exported_graph_with_a_class_token_takes_any_batch(changes: dict) -> None:
    model = build(tokens="joint", class_token="first", **{k: v for k, v in changes.items() if k != "class_token"})
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.rand(2, 3, 16, 16),), dynamic_shapes={"images": {0: batch}}).module()
    for size in (1, 3):
        images = torch.rand(size, 3, 16, 16)
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


def test_noise_may_be_any_finite_numbers() -> None:
    model, images = autoencoder(tokens="joint"), torch.rand(2, 3, 16, 16)
    ranks = torch.arange(16.0).expand(2, -1)
    expected = model(images, noise=ranks / 16)
    for noise in (ranks, ranks - 100, ranks * 1e6):
        out = model(images, noise=noise)
        assert torch.equal(out.mask, expected.mask)
        assert torch.equal(out.loss, expected.loss)
    assert expected.mask.sum(1).tolist() == [12, 12]
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(InputError, match="noise contains NaN or infinite"):
            model(images, noise=ranks.masked_fill(ranks == 3, wrong))


def test_noise_fixes_the_channels_in_training_too() -> None:
    model = autoencoder().train()
    noise = torch.rand(2, 48)
    assert {model(torch.rand(2, 3, 16, 16), noise=noise).mask.shape[1] for _ in range(8)} == {48}


def test_keep_fixes_the_channels_in_training_too() -> None:
    model, keep = build().train(), torch.ones(2, 48, dtype=torch.bool)
    for _ in range(8):
        model(torch.rand(2, 3, 16, 16), keep=keep)


@pytest.mark.parametrize("scan_order", ["channel_first", "spatial_first"])
@pytest.mark.parametrize("class_token", ["none", "first", "middle"])
def test_maps_of_a_ragged_batch_equal_each_sample_alone(scan_order: str, class_token: str) -> None:
    model = build(scan_order=scan_order, class_token=class_token)
    images = torch.rand(2, 2, 16, 16)
    together = model.forward_intermediates(images, [0, 1], channels=[[0], [1, 2]])
    first = model.forward_intermediates(images[:1, :1], [0, 1], channels=[0])
    second = model.forward_intermediates(images[1:], [0, 1], channels=[1, 2])
    for both, one, two in zip(together, first, second, strict=True):
        torch.testing.assert_close(both[:1, :, :1], one, rtol=1e-5, atol=1e-5)
        assert not both[0, :, 1].any()
        torch.testing.assert_close(both[1:], two, rtol=1e-5, atol=1e-5)


def test_maps_of_an_irregular_grid_are_zero_where_nothing_is() -> None:
    model, keep = build(tokens="joint"), torch.rand(2, 16) < 0.5
    keep[:, 0] = True
    (out,) = model.forward_intermediates(torch.rand(2, 3, 16, 16), [1], keep=keep)
    assert torch.equal(out.abs().sum(1).flatten(1) > 0, keep)


@pytest.mark.parametrize("pool", ["none", "mean"])
@pytest.mark.parametrize("tokens", ["joint", "per_channel"])
def test_middle_class_token_of_a_ragged_batch_equals_each_sample_alone(pool: str, tokens: str) -> None:
    model = build(class_token="middle", pool=pool, tokens=tokens)
    images = torch.rand(3, 3, 16, 16)
    keep = torch.rand(3, 48 if tokens == "per_channel" else 16) < torch.tensor([[0.3], [0.6], [0.9]])
    together = model(images, keep=keep)
    for i in range(3):
        alone = model(images[i : i + 1], keep=keep[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    if tokens == "per_channel":
        sets = [[2], [0, 1], [0, 1, 2]]
        together = model(images, channels=sets)
        for i, ids in enumerate(sets):
            alone = model(images[i : i + 1, : len(ids)], channels=ids)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_pixels_of_missing_tokens_are_never_read() -> None:
    model, images = build(), torch.rand(2, 2, 16, 16)
    expected = model(images, channels=[[0], [1, 2]])
    images[0, 1] = torch.nan
    out = model(images, channels=[[0], [1, 2]])
    assert torch.equal(out, expected)
    out.sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key


def test_autoencoder_learns_on_an_irregular_grid() -> None:
    for changes in ({"tokens": "joint"}, {}, {"scan_order": "spatial_first"}):
        model, images = autoencoder(**changes), torch.rand(3, 3, 16, 16)
        length = 16 if changes.get("tokens") else 48
        keep = torch.rand(3, length) < torch.tensor([[0.3], [0.6], [1.0]])
        keep[:, 0] = True
        noise = torch.rand(3, length)
        out = model(images, noise=noise, keep=keep)
        counts = [max(1, int(n * 0.25)) for n in keep.sum(1)]
        assert (keep.sum(1) - out.mask.sum(1)).int().tolist() == counts
        assert not (out.mask.bool() & ~keep).any()
        for i in range(3):  # each sample as if it were alone
            alone = model(images[i : i + 1], noise=noise[i : i + 1], keep=keep[i : i + 1])
            wanted = keep[i]
            torch.testing.assert_close(out.prediction[i, wanted], alone.prediction[0, wanted], rtol=1e-4, atol=1e-5)
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        everything = torch.ones_like(keep)
        torch.testing.assert_close(model(images, noise=noise, keep=everything).loss, model(images, noise=noise).loss)


def test_autoencoder_checkpoint_loads_back(tmp_path) -> None:
    model, images, noise = autoencoder(), torch.rand(1, 3, 16, 16), torch.rand(1, 48)
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "mae.safetensors"))
    assert isinstance(loaded, MaskedAutoencoder)
    assert torch.equal(loaded(images, noise).loss, model(images, noise).loss)
    model.save_pretrained(tmp_path / "hub")
    assert torch.equal(
        MaskedAutoencoder.from_pretrained(tmp_path / "hub")(images, noise).loss, model(images, noise).loss
    )
    with pytest.raises(ModelError, match="num_classes"):
        MaskedAutoencoder.from_pretrained(tmp_path / "hub", num_classes=2)


def test_autoencoder_becomes_an_encoder_of_another_resolution() -> None:
    model = autoencoder(tokens="joint")
    assert model.to_encoder(image_size=32).pos_embed.shape == (1, 64, 16)
    for changes in ({"embed_dim": 32}, {"class_token": "first"}, {"in_channels": 4}):
        with pytest.raises(ModelError):
            model.to_encoder(**changes)


def test_weights_beside_plain_settings_load(tmp_path) -> None:
    weights = dict(build().named_parameters())
    for name, content in {
        "namespace": {"model": weights, "args": argparse.Namespace(lr=1.0)},
        "number": {"model": weights, "best": np.float64(0.9)},
        "tensor": {"epoch": torch.tensor(3), "state_dict": weights},
    }.items():
        torch.save(content, tmp_path / f"{name}.pth")
        load_reference(build(), tmp_path / f"{name}.pth")
    load_reference(build(), {k: v.detach().numpy() for k, v in weights.items()})
    build().load_state_dict(weights)  # torch's own way needs no state of our draws


def test_foreign_entry_is_named_whatever_the_prefix() -> None:
    weights = {f"model.{k}": v for k, v in build().named_parameters()}
    with pytest.raises(ModelError, match=r"foo\.bar"):
        load_reference(build(), weights | {"foo.bar": torch.ones(1)})


@pytest.mark.parametrize(
    "changes",
    [
        {"pool_scale": "a"}, {"pool_scale": -1.0}, {"pool_scale": float("nan")}, {"layer_scale": "a"},
        {"num_heads": -2}, {"mlp_ratio": 0}, {"patch_stride": 2.5}, {"patch_stride": 9}, {"image_size": (32, 32, 32)},
        {"image_size": 32.0}, {"image_size": None}, {"image_size": "224"}, {"alternate": "yes"},
        {"position_embedding": "no"}, {"channel_names": "ABC"}, {"channel_names": (1, 2, 3)}, {"depth": True},
        {"depth": 0}, {"out_indices": (1, 1)}, {"out_indices": 1}, {"out_indices": (7,)}, {"num_classes": 2.5},
        {"num_classes": None}, {"d_conv": 2.0}, {"d_conv": 5}, {"dt_rank": -1}, {"dt_rank": "auto"},
        {"drop_path_rate": None}, {"pool": "sum"}, {"mixer": "attention", "layer_scale": 0.1},
        {"tokens": "joint", "pool_axes": 2}, {"channel_names": ("a", "a", "b")},
    ],
)  # fmt: skip
def test_wrong_value_of_a_configuration_is_named(changes: dict) -> None:
    with pytest.raises(ModelError, match=next(iter(changes)).split("_")[0]):
        EncoderConfig(**BASE | changes)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(torch.rand(2, 3, 16, 16).double()),
        lambda m: m(torch.rand(2, 3, 16, 16).bfloat16()),
        lambda m: m(np.zeros((2, 3, 16, 16), np.float32)),
        lambda m: m(None),
        lambda m: m(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)),
        lambda m: m(torch.rand(3, 16, 16)),
        lambda m: m(torch.rand(2, 0, 16, 16), channels=[]),
        lambda m: m(torch.rand(2, 3, 0, 16)),
        lambda m: m(torch.rand(2, 3, 16, 16), channels="DNA"),
        lambda m: m(torch.rand(2, 3, 16, 16), channels=3),
        lambda m: m(torch.rand(2, 3, 16, 16), channels={0, 1, 2}),
        lambda m: m(torch.rand(2, 3, 16, 16), channels=[True, False, True]),
        lambda m: m(torch.rand(2, 3, 16, 16), channels=torch.tensor([0.1, 1.0, 2.0])),
        lambda m: m(torch.rand(2, 3, 16, 16), channels=torch.tensor([True, False, True])),
        lambda m: m(torch.rand(2, 3, 16, 16), keep=[[True]]),
        lambda m: m(torch.rand(2, 3, 16, 16), keep=torch.rand(2, 48)),
        lambda m: m(torch.rand(2, 3, 16, 16), channels=[[0], [1, 2, 0]], keep=torch.ones(2, 5, dtype=torch.bool)),
        lambda m: m.forward_intermediates(torch.rand(2, 3, 16, 16), 1),
        lambda m: m.forward_intermediates(torch.rand(2, 3, 16, 16), ["a"]),
        lambda m: m.forward_intermediates(torch.rand(2, 3, 16, 16), [5]),
        lambda m: Encoder({}),
        lambda m: MaskedAutoencoder(m.config, mask_ratio="a"),
        lambda m: MaskedAutoencoder(m.config, decoder_depth=-1),
        lambda m: MaskedAutoencoder(m.config)(torch.rand(1, 3, 16, 16), noise=[1]),
        lambda m: MaskedAutoencoder(m.config)(torch.rand(0, 3, 16, 16)),
        lambda m: load_reference(m, [1]),
        lambda m: count_flops(m.config, channels=9),
        lambda m: count_flops(m.config, height=-5),
        lambda m: create_model(None),
        lambda m: m.load_state_dict(dict(m.state_dict()) | {"_extra_state": torch.zeros(3)}),
    ],
)
def test_wrong_input_is_our_error_in_one_line(call) -> None:
    with pytest.raises(CellvimError) as caught:
        call(build())
    assert len(str(caught.value)) > 20


def test_generators_are_read_once() -> None:
    model, images = build(), torch.rand(1, 3, 16, 16)
    assert len(model.forward_intermediates(images, (i for i in (0, 1)))) == 2
    torch.testing.assert_close(model(images, channels=(i for i in (0, 1, 2))), model(images))


def test_empty_batch_gives_empty_results() -> None:
    model = build()
    assert model(torch.rand(0, 3, 16, 16)).shape == (0, 16)
    assert model(torch.rand(0, 3, 16, 16), keep=torch.ones(0, 48, dtype=torch.bool)).shape[0] == 0


def test_maps_have_the_models_type() -> None:
    model = build(out_indices=(0, 1)).bfloat16()
    maps = model.forward_intermediates(torch.rand(1, 3, 16, 16).bfloat16())
    assert {m.dtype for m in maps} == {torch.bfloat16}
