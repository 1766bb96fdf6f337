"""Trained weights in other models: channels by name, a probe folded into a head, joint training as an encoder."""

from __future__ import annotations

import pytest
import torch

from cellvim.errors import ChannelError, ModelError
from cellvim.models.checkpoints import save_checkpoint
from cellvim.models.encoder import Encoder
from cellvim.models.mae import MaskedAutoencoder
from cellvim.models.registry import create_model, model_config
from cellvim.train.augment import (
    OPERATIONS,
    Augmentation,
    middle_window,
    mix,
    rand_augment,
    random_erasing,
    random_resized_crop,
    random_window,
)
from cellvim.train.joint import encoder_of_joint
from cellvim.train.probe import Probe
from cellvim.train.resuming import start_from
from cellvim.train.training import evaluate_channel_subsets

SMALL = {"depth": 2, "embed_dim": 16, "image_size": 16}


def test_channels_are_matched_by_name(tmp_path):
    names = ("DNA", "ER", "GFP")
    source = create_model("fastchannelvim_tiny_patch8", channel_names=names, num_classes=4, **SMALL).eval()
    path = save_checkpoint(source, tmp_path / "a.safetensors")
    model = create_model("fastchannelvim_tiny_patch8", channel_names=("GFP", "DNA"), num_classes=2, **SMALL).eval()
    start_from(model, path)
    images = torch.rand(2, 2, 16, 16)
    torch.testing.assert_close(
        model.forward_features(images), source.forward_features(images, channels=["GFP", "DNA"]), rtol=1e-5, atol=1e-6
    )
    other = create_model("fastchannelvim_tiny_patch8", channel_names=("Mito",), num_classes=2, **SMALL)
    with pytest.raises(ChannelError, match="Mito"):
        start_from(other, path)


def test_an_encoder_starts_from_a_masked_pretraining(tmp_path):
    config = model_config("fastmaskvim_tiny_patch8", channel_names=("DNA",), **SMALL)
    masked = MaskedAutoencoder(config, decoder_dim=16, decoder_depth=1).eval()
    path = save_checkpoint(masked, tmp_path / "m.safetensors")
    model = create_model("fastvim_tiny_patch8", channel_names=("DNA",), num_classes=3, pool_scale=0.25, **SMALL).eval()
    start_from(model, path)
    images = torch.rand(2, 1, 16, 16)
    expected = masked.to_encoder(pool_scale=0.25).eval().forward_features(images)
    torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-5, atol=1e-6)
    bigger = create_model("fastvim_tiny_patch8", channel_names=("DNA",), num_classes=3, **SMALL | {"image_size": 32})
    start_from(bigger, path)
    assert bigger.pos_embed.shape[1] == 16


def test_another_architecture_raises_with_the_differences(tmp_path):
    source = create_model("fastvim_tiny_patch8", channel_names=("DNA",), num_classes=3, **SMALL)
    path = save_checkpoint(source, tmp_path / "a.safetensors")
    model = create_model("fastvim_tiny_patch8", channel_names=("DNA",), num_classes=3, **SMALL | {"depth": 3})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ModelError, match="depth is 2 there and 3 here"):
        start_from(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_probe_folds_into_the_head():
    encoder = create_model("fastvim_tiny_patch8", channel_names=("DNA",), num_classes=3, **SMALL)
    probe = Probe(encoder).train()
    for _ in range(3):
        probe(torch.rand(8, 1, 16, 16))
    probe.eval()
    images = torch.rand(4, 1, 16, 16)
    expected = probe(images)
    torch.testing.assert_close(probe.to_encoder().eval()(images), expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in probe.encoder.parameters())


def test_a_joint_training_becomes_an_encoder_with_its_head():
    config = model_config("fastchannelmaskvim_tiny_patch8", channel_names=("DNA", "GFP"), **SMALL | {"num_classes": 3})
    joint = MaskedAutoencoder(config, decoder_dim=16, decoder_depth=1, mask_ratio=0.0, supervised=True).eval()
    encoder, images = encoder_of_joint(joint), torch.rand(2, 2, 16, 16)
    assert type(encoder) is Encoder
    torch.testing.assert_close(encoder(images), joint(images).logits, rtol=1e-4, atol=1e-5)  # without masking
    half = MaskedAutoencoder(config, decoder_dim=16, decoder_depth=1, mask_ratio=0.5, supervised=True)
    assert encoder_of_joint(half).config.pool_scale == 0.5


def test_every_subset_of_the_channels_is_evaluated():
    model = create_model("fastchannelvim_tiny_patch8", channel_names=("DNA", "ER", "GFP"), num_classes=2, **SMALL)
    images, labels = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 0, 1, 0, 1])
    table = evaluate_channel_subsets(model, [(images, labels, [0, 1, 2])])
    assert list(table["channels"]) == ["DNA", "ER", "GFP", "DNA,ER", "DNA,GFP", "ER,GFP", "DNA,ER,GFP"]
    right = (model(images[:, [0, 2]], channels=["DNA", "GFP"]).argmax(1) == labels).float().mean()
    assert table["accuracy"][4] == pytest.approx(float(right))
    assert table["n_channels"].value_counts().to_dict() == {1: 3, 2: 3, 3: 1}
    joint = create_model("fastvim_tiny_patch8", channel_names=("DNA",), num_classes=2, **SMALL)
    with pytest.raises(ModelError, match="joint tokens"):
        evaluate_channel_subsets(joint, [(images[:, :1], labels, [0])])


def test_augmentations_keep_shape_and_values():
    torch.manual_seed(0)
    images = torch.rand(4, 2, 20, 20)
    choices = Augmentation(defocus=1.0, coarse_dropout=1.0, hole_size=4, intensity=0.1, pad_to=24)
    out = choices.apply(images, 16)
    assert out.shape == (4, 2, 16, 16)
    assert out.isfinite().all()
    moved = Augmentation().apply(images, 20)  # flips and rotations only move pixels
    torch.testing.assert_close(moved.flatten(2).sort().values, images.flatten(2).sort().values)
    window = random_window(images, 16)
    assert any(torch.equal(window[0], images[0, :, i : i + 16, j : j + 16]) for i in range(5) for j in range(5))
    torch.testing.assert_close(middle_window(images, 16), images[:, :, 2:18, 2:18])
    colour = Augmentation(resized_crop=(0.2, 1.0), rand_augment=2, erasing=1.0)
    rgb = colour.apply(torch.rand(4, 3, 20, 20), 16)
    assert rgb.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_stay_distributions(kind):
    torch.manual_seed(1)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8)
    mixed, targets = mix(images, torch.eye(4), Augmentation(**{kind: 1.0}))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    expected = (targets * torch.arange(4.0)).sum(1)  # an image's mean is its target's mean
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)


def test_rand_augment_operations_keep_the_range_and_move_the_values():
    torch.manual_seed(2)
    images, level = torch.rand(2, 3, 24, 24), torch.full((2, 1, 1, 1), 0.3)
    changed = [operation(images, level) for operation in OPERATIONS]
    assert torch.equal(changed[0], images)
    torch.testing.assert_close(changed[1], 1 - images)
    assert all(not torch.equal(one, images) for one in changed[1:])
    augmented = rand_augment(images.repeat(16, 1, 1, 1), 2)
    assert augmented.shape == (32, 3, 24, 24) and augmented.min() >= 0 and augmented.max() <= 1


def test_random_erasing_and_resized_crops_cover_the_given_area():
    torch.manual_seed(3)
    erased = (random_erasing(torch.ones(200, 3, 32, 32), 1.0) == 0).float().mean((1, 2, 3))
    assert erased.min() > 0.01 and erased.max() < 0.36
    assert (random_erasing(torch.ones(200, 3, 32, 32), 0.0) == 1).all()
    ramp = torch.arange(32.0).expand(200, 1, 32, 32)
    cropped = random_resized_crop(ramp, 16, (0.25, 0.25))  # half of the width, but for the aspect ratio
    width = (cropped.amax(3) - cropped.amin(3))[:, 0, 0] * 16 / 15
    assert width.min() > 12.5 and width.max() < 19.5
    torch.testing.assert_close(random_resized_crop(ramp, 32, (1.0, 1.0))[0, 0].mean(), ramp.mean(), rtol=0.2, atol=0)
