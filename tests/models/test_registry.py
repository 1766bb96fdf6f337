"""Named models have the published sizes and shapes, and every parameter of each learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cellvim import create_model, list_models, load_checkpoint
from cellvim.errors import ModelError
from cellvim.models.checkpoints import shipped_models
from cellvim.models.registry import FAMILIES, model_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PUBLISHED = {
    "FastVim-T/16 1000": ("fastvim_tiny_patch16", {}),
    "FastVim-S/16 1000": ("fastvim_small_patch16", {}),
    "FastVim-B/16 1000": ("fastvim_base_patch16", {}),
    "FastVim-S/16 1000 without LN after SSM": ("fastvim_small_patch16", {"ssm_norm": "none"}),
    "Vim-S/16 1000 midcls": ("vim_small_patch16", {}),
    "FastChannelVim-S/16 8 channels 161": ("fastchannelvim_small_patch16", {}),
    "ChannelVim-S/16 8 channels 161": ("channelvim_small_patch16", {}),
    "FastChannelVim-S/8 8 channels 161": ("fastchannelvim_small_patch8", {}),
    "ChannelVim-S/8 8 channels 161": ("channelvim_small_patch8", {}),
}


@pytest.mark.parametrize("published", PUBLISHED)
def test_parameters_equal_the_published_models(published: str) -> None:
    expected = json.loads((GOLDEN / "_real_models.json").read_text())[published]
    name, changes = PUBLISHED[published]
    with torch.device("meta"):
        parameters = dict(create_model(name, **changes).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == expected["parameters"]
    assert len(parameters) == expected["state_dict_keys"]
    for key, shape in expected["shapes"].items():
        assert list(parameters[key].shape) == shape, key


def test_lists_every_family_size_and_patch() -> None:
    assert len(list_models()) == len(FAMILIES) * 5 * 2
    for name in list_models():
        model_config(name)


@pytest.mark.parametrize("name", ["fastchanelvim_small_patch16", "fastvim_giant_patch16", "fastvim", ""])
def test_unknown_name_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(ModelError, match="fastchannelvim"):
        create_model(name)


def test_unknown_value_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ModelError, match="Did you mean embed_dim"):
        create_model("fastvim_tiny_patch16", embeddim=3)


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_of_every_model_learns(name: str) -> None:
    """Two of the model's blocks, so that the widest fit into memory; a third axis of pooling has none of its own."""
    torch.manual_seed(0)
    model = create_model(name, depth=2, image_size=32, in_channels=3, channel_sampling="none")
    out = model(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, model.config.num_classes or model.config.embed_dim)
    out.square().sum().backward()
    without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, f"no gradient: {', '.join(without)}"


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_model_has_the_weights_of_its_checkpoint(name: str) -> None:
    model, expected = create_model(name), load_checkpoint(shipped_models()[name])
    assert model.is_trained and not model.training
    assert model.config == expected.config and model.card == expected.card
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_values_that_contradict_a_shipped_model_are_refused() -> None:
    name = "fastchannelvim_multichannel"
    config = load_checkpoint(shipped_models()[name]).config
    agreeing = {"depth": config.depth, "channel_names": list(config.channel_names)}
    assert create_model(name, **agreeing).config == config
    with pytest.raises(ModelError, match=r"in_channels=3 contradicts .*'fastchannelvim_multichannel'") as caught:
        create_model(name, **agreeing, in_channels=3)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="Did you mean embed_dim"):
        create_model(name, embeddim=3)
