"""The operation count agrees with the paper's and with a count of the matrix products that really run."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cellvim import create_model
from cellvim.models.flops import count_flops
from cellvim.models.registry import model_config

PAPER = {  # Table 1, in 10⁹
    "fastvim_tiny_patch16": 1.17,
    "fastvim_small_patch16": 4.43,
    "fastvim_base_patch16": 17.23,
    "vim_tiny_patch16": 1.8,
    "vim_small_patch16": 5.9,
    "vim_base_patch16": 20.9,
}


@pytest.mark.parametrize("name", PAPER)
def test_count_agrees_with_the_paper_within_three_percent(name: str) -> None:
    assert count_flops(model_config(name))["total"] / 1e9 == pytest.approx(PAPER[name], rel=0.03)


@pytest.mark.parametrize("name", ["fastchannelvim_tiny_patch16", "channelvit_tiny_patch16", "fastvim_tiny_patch16"])
def test_matrix_products_are_those_that_run(name: str, monkeypatch) -> None:
    monkeypatch.setattr("cellvim.ops.dispatch._ROWS_PER_THREAD", 0)  # padding of few rows would be counted
    monkeypatch.setattr("cellvim.ops.dispatch._ONEDNN", False)  # the counter does not know its products
    changes = {"image_size": 96, "depth": 2, "num_classes": 3, "in_channels": 3}
    model, parts = create_model(name, **changes).eval(), count_flops(model_config(name, **changes))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.rand(1, 3, 96, 96))
    products = sum(parts[k] for k in ("patch_embed", "projections", "delta", "attention", "head"))
    assert counter.get_total_flops() == 2 * products


def test_pooling_makes_the_scan_cheaper_but_not_the_projections() -> None:
    fast, slow = (count_flops(model_config(f"{n}_small_patch16", class_token="none")) for n in ("fastvim", "vim"))
    assert slow["scan"] == 14 * fast["scan"]
    assert slow["projections"] == fast["projections"]
