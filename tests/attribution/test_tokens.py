"""Gradients and occlusion: completeness, the relevant channel and patch, and all back ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellvim.attribution import METHODS, attribute
from cellvim.errors import CellvimError, InputError, ModelError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.ops import dispatch

BACKENDS = [b.name for b in dispatch.describe_backends() if b.available and b.name != "cuda"]


def make_model(seed: int = 0, **changes) -> Encoder:
    options = {
        "image_size": 24, "patch_size": 8, "in_channels": 3, "embed_dim": 16, "depth": 3, "num_classes": 4,
        "channel_names": ("DNA", "ER", "Mito"),
    }  # fmt: skip
    torch.manual_seed(seed)
    return Encoder(EncoderConfig(**options | changes))


def make_images(seed: int = 0, n: int = 2, c: int = 3, height: int = 24, width: int = 24) -> torch.Tensor:
    return torch.rand(n, c, height, width, generator=torch.Generator().manual_seed(seed))


class OneChannel(Encoder):
    """A model whose embedding depends only on the top left patch of one channel."""

    def forward_features(self, images, channels=None, keep=None):
        seen = torch.zeros_like(images)
        seen[:, 1, :8, :8] = images[:, 1, :8, :8]
        return super().forward_features(seen, channels, keep)


@pytest.mark.parametrize("target", ["embedding", 2, "direction"])
@pytest.mark.parametrize(
    "changes", [{}, {"tokens": "joint"}, {"mixer": "attention", "class_token": "first", "pool": "none", "num_heads": 2}]
)
def test_integrated_gradients_are_complete(target, changes):
    model, images = make_model(**changes).double(), make_images().double()
    target = np.linspace(-1, 1, 16) if target == "direction" else target
    found = attribute(model, images, target=target, steps=64, batch_size=128)
    assert found.patches.shape == (2, 3, 3, 3)
    gained = found.output - found.baseline_output
    assert np.abs(gained).min() > 1e-3, "nothing to explain: the test could not fail"
    np.testing.assert_allclose(found.patches.sum((1, 2, 3)), gained, rtol=1e-3)
    np.testing.assert_allclose(found.residual, 0, atol=1e-3 * np.abs(gained).max())
    np.testing.assert_allclose(found.channels, found.patches.sum((2, 3)))


def test_the_target_embedding_is_the_distance_from_the_baseline():
    model, images = make_model(num_classes=0), make_images()
    found = attribute(model, images, steps=1)
    with torch.no_grad():
        model.eval()
        distance = (model(images) - model(torch.zeros_like(images))).norm(dim=1)
    np.testing.assert_allclose(found.output - found.baseline_output, distance, rtol=1e-4)


def test_the_output_for_a_class_is_its_logit():
    model, images = make_model(), make_images()
    found = attribute(model, images, target=3, method="occlusion")
    with torch.no_grad():
        np.testing.assert_allclose(found.output, model.eval()(images)[:, 3], rtol=1e-5, atol=1e-6)


def test_gradient_times_input_is_the_directional_derivative():
    model, images = make_model().double(), make_images().double()
    found = attribute(model, images, target=1, method="gradient_times_input", baseline=0.25)
    model.eval()
    step, way = 1e-5, images - 0.25
    with torch.no_grad():
        slope = (model(images + step * way) - model(images - step * way))[:, 1] / (2 * step)
    np.testing.assert_allclose(found.patches.sum((1, 2, 3)), slope, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_relevant_channel_and_patch_contribute(method):
    torch.manual_seed(0)
    model = OneChannel(make_model().config)
    found = attribute(model, make_images(), method=method, steps=8)
    assert (found.channel_share[:, 1] > 1 - 1e-6).all()
    np.testing.assert_array_equal(found.channels[:, [0, 2]], 0)
    rest = np.ones((3, 3, 3), bool)
    rest[1, 0, 0] = False
    np.testing.assert_array_equal(found.patches[:, rest], 0)
    assert (np.abs(found.patches[:, 1, 0, 0]) > 0).all()


def test_occlusion_equals_the_decrease_of_the_output():
    model, images = make_model(), make_images()
    found = attribute(model, images, target=0, method="occlusion", batch_size=5, baseline=0.1)
    model.eval()
    with torch.no_grad():
        for b, c, row, column in [(0, 0, 0, 0), (1, 2, 1, 2), (0, 1, 2, 1)]:
            hidden = images.clone()
            hidden[b, c, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0.1
            lost = (model(images) - model(hidden))[b, 0]
            assert found.patches[b, c, row, column] == pytest.approx(lost.item(), abs=1e-6)
        hidden = images.clone()
        hidden[:, 2] = 0.1
        np.testing.assert_allclose(found.channels[:, 2], (model(images) - model(hidden))[:, 0], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_on_every_backend(backend):
    model, images = make_model(), make_images()
    with dispatch.use_backend("reference"):
        expected = attribute(model, images, target=1)
    with dispatch.use_backend(backend):
        found = attribute(model, images, target=1)
    assert np.abs(found.patches).min() > 0
    np.testing.assert_allclose(found.patches, expected.patches, atol=2e-4 * np.abs(expected.patches).max())


@pytest.mark.parametrize(
    ("height", "width", "changes"),
    [
        (12, 20, {}),
        (7, 9, {}),
        (12, 16, {"patch_stride": 4}),
        (12, 20, {"scan_path": "colwise"}),
        (12, 20, {"pool": "attention"}),
    ],
)
def test_patches_of_any_size_contain_every_pixel_once(height, width, changes):
    model, images = make_model(**changes).double(), make_images(height=height, width=width).double()
    found = attribute(model, images, target=0, batch_size=64)
    assert found.patches.shape[2:] == model.config.grid_size(height, width)
    np.testing.assert_allclose(found.residual, 0, atol=1e-3 * np.abs(found.output - found.baseline_output).max())
    assert attribute(model, images, method="occlusion").patches.shape == found.patches.shape


def test_a_subset_of_the_channels_by_name():
    model, images = make_model(), make_images(c=2)
    found = attribute(model, images, channels=["Mito", "DNA"], target=0)
    other = attribute(model, images, channels=[2, 0], target=0)
    np.testing.assert_array_equal(found.patches, other.patches)
    assert found.patches.shape[1] == 2


def test_the_batch_size_does_not_affect_the_result():
    model, images = make_model(), make_images(n=3)
    for method in METHODS:
        one, many = (attribute(model, images, method=method, steps=4, batch_size=b) for b in (1, 100))
        np.testing.assert_allclose(one.patches, many.patches, atol=1e-6)


def test_the_mode_of_the_model_is_restored():
    model = make_model()
    model.train()
    model.layers[0].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    attribute(model, make_images(), steps=2)
    assert model.training and not model.layers[0].training and model.layers[1].training
    for name, p in model.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])


def test_an_image_equal_to_its_baseline_has_no_attribution():
    found = attribute(make_model(), np.zeros((1, 3, 24, 24), np.float32))
    np.testing.assert_array_equal(found.patches, 0)
    np.testing.assert_array_equal(found.channel_share, 0)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target": "class"}, InputError, "'class'"),
        ({"target": 4}, InputError, "0 to 3"),
        ({"target": np.ones(3)}, InputError, "16 finite numbers"),
        ({"target": np.full(16, np.nan)}, InputError, "finite"),
        ({"method": "lime"}, InputError, "integrated_gradients"),
        ({"steps": 0}, InputError, "at least 1"),
        ({"batch_size": 0}, InputError, "at least 1"),
        ({"baseline": np.zeros((5, 5))}, InputError, "baseline"),
        ({"channels": ["DNA", "ER", "nothing"]}, CellvimError, "nothing"),
        ({"images": np.full((1, 3, 24, 24), np.nan, np.float32)}, InputError, "NaN"),
        ({"images": np.zeros((1, 3, 24, 24), np.uint8)}, InputError, "floating"),
        ({"images": np.zeros((3, 24, 24), np.float32)}, InputError, "batch"),
    ],
)
def test_invalid_arguments_raise_errors(options, kind, message):
    options = {"images": make_images()} | options
    with pytest.raises(kind, match=message):
        attribute(make_model(), **options)


def test_models_without_classes_or_with_token_readout_raise_errors():
    with pytest.raises(ModelError, match="no classes"):
        attribute(make_model(num_classes=0), make_images(), target=0)
    with pytest.raises(ModelError, match="readout"):
        attribute(make_model(num_classes=0, readout="tokens"), make_images())
    with pytest.raises(InputError, match="Encoder"):
        attribute(torch.nn.Identity(), make_images())
