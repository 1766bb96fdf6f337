"""The same image gives bitwise the same embedding, whatever else is in its batch and wherever it stands."""

from __future__ import annotations

import pytest
import torch

from cellvim import create_model

MODELS = {
    "fastchannelvim_tiny_patch16": {"in_channels": 3},
    "fastchannelvim_tiny_patch8": {"in_channels": 2, "pool_axes": 2},
    "channelvim_tiny_patch16": {"in_channels": 2},
    "fastvim_tiny_patch16": {"num_classes": 1},
    "vim_tiny_patch16": {},
    "channelvit_tiny_patch16": {"in_channels": 3},
    "vit_tiny_patch16": {"pool": "mean"},
    "fastchannelvim_small_patch16": {"in_channels": 2, "pool": "attention"},
    "fastchannelvim_small_patch8": {"in_channels": 1, "class_token": "middle", "embed_dim": 48},
}


@pytest.fixture
def threads(backend: str):
    """The plain path keeps its promise with one thread (docs/models.md)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if backend == "reference" else before)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
def test_embedding_does_not_depend_on_batch_mates(name: str, threads) -> None:
    torch.manual_seed(0)
    model = create_model(name, **{"image_size": 48, "depth": 3, "num_classes": 5} | MODELS[name]).eval()
    images = torch.rand(7, model.config.in_channels, 40, 48)
    with torch.inference_mode():
        expected = model(images)
        for count in (1, 2, 3, 5):
            assert torch.equal(model(images[:count]), expected[:count]), count
        assert torch.equal(model(images.flip(0)).flip(0), expected)
