"""Fresh weights have the published statistics, but for the slip that ours mends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cellvim import MaskedAutoencoder, create_model
from cellvim.models.registry import model_config

STATISTICS = json.loads((Path(__file__).resolve().parents[1] / "golden" / "_init_statistics.json").read_text())
BUILD = {
    "FastVim-T depth 24": lambda: create_model("fastvim_tiny_patch16", initialization="reference"),
    "Vim-T depth 24": lambda: create_model("vim_tiny_patch16", initialization="reference"),
    "FastChannelVim-S/16": lambda: create_model("fastchannelvim_small_patch16", initialization="reference"),
    "FastMaskVim width 192, decoder 512x2, depth 24": lambda: MaskedAutoencoder(
        model_config("fastmaskvim_tiny_patch16", initialization="reference")
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_fresh_weights_have_the_published_statistics(name: str) -> None:
    torch.manual_seed(0)
    model = BUILD[name]()
    for key, expected in STATISTICS[name].items():
        value = model.get_parameter(key).detach()
        assert list(value.shape) == expected["shape"], key
        n = value.numel()
        noise = 4.5 * expected["std"] / n**0.5  # of a sample mean, in both theirs and ours
        assert abs(value.mean().item() - expected["mean"]) <= 2 * noise + 1e-4 * abs(expected["mean"]) + 1e-6, key
        assert value.std().item() == pytest.approx(expected["std"], rel=max(0.02, 6 / n**0.5), abs=1e-7), key
        spread = expected["max"] - expected["min"]
        if "uniform" in describe(expected) and n > 500:
            assert value.min().item() == pytest.approx(expected["min"], abs=0.02 * spread), key
            assert value.max().item() == pytest.approx(expected["max"], abs=0.02 * spread), key


def describe(expected: dict) -> str:
    """A uniform distribution's range is √12 standard deviations."""
    spread = expected["max"] - expected["min"]
    return "uniform" if expected["std"] and abs(spread / expected["std"] - 12**0.5) < 0.05 else "other"


def test_both_directions_start_with_the_same_range_of_step_sizes() -> None:
    mixer = create_model("fastvim_tiny_patch16", depth=1).layers[0].mixer
    for bias in (mixer.dt_proj.bias, mixer.dt_proj_b.bias):
        delta = F.softplus(bias)
        assert delta.min() >= 1e-3 * 0.99 and delta.max() <= 1e-1 * 1.01
        assert delta.log().mean().item() == pytest.approx(torch.tensor([1e-3, 1e-1]).log().mean().item(), abs=0.3)
    reference = create_model("fastvim_tiny_patch16", depth=1, initialization="reference").layers[0].mixer
    assert not reference.dt_proj_b.bias.any()
