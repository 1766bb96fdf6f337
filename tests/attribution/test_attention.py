"""Attention scores sum to 1 over the pooled axes, equal those of the kernels, and are assigned to the right patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellvim.attribution import attention_scores
from cellvim.errors import ModelError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.ops import native, reference

AXES = {"channel": 3, "row": 4, "column": 5}  # of shares


def make_model(**changes) -> Encoder:
    options = {
        "image_size": (16, 24), "patch_size": 8, "in_channels": 3, "embed_dim": 16, "depth": 3, "num_classes": 0,
        "pool": "attention",
    }  # fmt: skip
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**options | changes))


def make_images(n: int = 2, c: int = 3) -> torch.Tensor:
    return torch.rand(n, c, 16, 24, generator=torch.Generator().manual_seed(1))


CASES = [
    {},
    {"scan_order": "spatial_first"},
    {"scan_path": "colwise"},
    {"pool_axes": 2},
    {"tokens": "joint"},
    {"tokens": "joint", "class_token": "middle"},
    {"alternate": False},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_shares_sum_to_one_over_the_pooled_axes(changes):
    model = make_model(**changes)
    found = attention_scores(model, make_images())
    assert found.shares.shape == (3, 2, 2, 1 if "tokens" in changes else 3, 2, 3)
    assert (found.shares > 0).all() and np.ptp(found.shares) > 1e-4
    for shares, pooled in zip(found.shares, found.pooled, strict=True):
        np.testing.assert_allclose(shares.sum(tuple(AXES[a] - 1 for a in pooled)), 1, rtol=1e-5)
    expected = {0: ("column",), 1: ("column",) if changes.get("alternate") is False else ("row",)}
    if changes.get("scan_path") == "colwise":
        expected = {0: ("row",), 1: ("column",)}
    if changes.get("pool_axes") == 2:
        expected = {0: ("channel", "column"), 1: ("channel", "row"), 2: ("row", "column")}
    assert {i: found.pooled[i] for i in expected} == expected
    assert found.compares_channels == (changes.get("pool_axes") == 2)


def test_equal_scores_give_equal_shares():
    model = make_model()
    for layer in model.layers:
        for head in (layer.mixer.pool_score, layer.mixer.pool_score_b):
            torch.nn.init.zeros_(head.weight)
    np.testing.assert_allclose(attention_scores(model, make_images()).patches, 1, rtol=1e-6)


@pytest.mark.parametrize("changes", CASES[:4], ids=str)
def test_the_highest_share_is_at_the_highest_score(changes):
    """Without convolution, position and channel embedding, only the bright patch is a different token."""
    model = make_model(**changes | {"depth": 1, "position_embedding": False, "d_conv": 0}).eval()
    torch.nn.init.zeros_(model.patch_embed.channel_embed.weight)
    images = torch.zeros(1, 3, 16, 24)
    images[0, 1, 8:, 8:16] = 1.0
    mixer = model.layers[0].mixer
    with torch.no_grad():
        hidden, _ = model.embed(images)
        u = torch.nn.functional.silu(mixer.in_proj(model.layers[0].norm(hidden, None)[0]).chunk(2, -1)[0])[0]
        usual = u.median(0).values
        other = u[(u - usual).norm(dim=1).argmax()] - usual
        for head in (mixer.pool_score, mixer.pool_score_b):
            head.weight.copy_(3 * other[None] / other.square().sum())
    patches = attention_scores(model, images).patches[0]
    assert np.unravel_index(patches.argmax(), patches.shape) == (1, 1, 1)
    assert patches.max() > 1.5 and np.median(patches) == pytest.approx(1, abs=0.2)


@pytest.mark.skipif(not native.available(), reason=f"the CPU kernels are not there: {native.reason()}")
@pytest.mark.parametrize("changes", [{}, {"pool_axes": 2}, {"tokens": "joint", "class_token": "middle"}], ids=str)
def test_shares_equal_those_of_the_kernels(changes):
    model = make_model(**changes).eval()
    with torch.no_grad():
        hidden, grid = model.embed(make_images())
        for i, block in enumerate(model.layers):
            plan, mixer = grid.plan(i), block.mixer
            normed, _ = block.norm(hidden, None)
            x = mixer.in_proj(normed).chunk(2, -1)[0]
            u = reference._convolve(x, *mixer._convolution(x), plan)  # (2, B, L, E)
            shares = mixer.pooling_shares(normed, plan)
            pooled = native.conv_pool(x, *mixer._convolution(x), plan, "attention", *mixer._score())
            block_order = torch.stack([reference._to_block_order(s[..., None], plan) for s in shares])
            if plan.is_dense:
                summed = reference._grouped(block_order * u, plan).sum(3)
            else:
                summed = reference._scatter_sum(block_order * u, plan)
            torch.testing.assert_close(summed, pooled, rtol=1e-4, atol=1e-5)


def test_missing_tokens_of_ragged_samples_have_a_share_of_zero():
    model = make_model().eval()
    keep = torch.ones(2, 18, dtype=torch.bool)
    keep[0, 5:12] = False
    with torch.no_grad():
        hidden, grid = model.embed(make_images(), keep=keep)
        shares = model.layers[0].mixer.pooling_shares(hidden, grid.plan(0))
    assert shares.shape == (2, 2, 18)
    np.testing.assert_array_equal(shares[:, 0, 11:], 0)
    rows = grid.kept // 9  # row of each token
    channel = grid.kept % 3
    for row in range(2):
        for c in range(3):
            group = (rows == row) & (channel == c) & (grid.kept >= 0)
            for direction in shares:
                total = (direction * group).sum(1)
                np.testing.assert_allclose(total[group.any(1)], 1, rtol=1e-5)


def test_other_pooling_raises_an_error():
    with pytest.raises(ModelError, match="'mean'"):
        attention_scores(make_model(pool="mean"), make_images())
