"""Hierarchical channel sampling: ours follows the published rule, from a generator of its own."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from cellvim.models.patch_embed import ChannelSampler

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "_hcs_draws.json").read_text())


def test_the_published_rule_is_a_number_and_then_channels():
    """Else what we hold our draws against would not be what was published."""
    for case, draws in GOLDEN["consecutive_draws_unsorted"].items():
        count, seed = (int(part.split("=")[1]) for part in case.split())
        generator = random.Random(seed)
        for drawn in draws:
            n = generator.randint(1, count)
            assert generator.sample(range(count), k=n) == drawn


def test_our_draws_have_the_rules_distribution():
    """The number is uniform, and given the number every channel is as likely; 5 standard errors are allowed."""
    count, draws = 5, 4000
    sampler = ChannelSampler(seed=3)
    drawn = [sampler.draw(count, ordered=False) for _ in range(draws)]
    numbers = torch.bincount(torch.tensor([len(d) for d in drawn]), minlength=count + 1)[1:] / draws
    assert (numbers - 1 / count).abs().max() < 5 * (1 / count * (1 - 1 / count) / draws) ** 0.5
    share = torch.bincount(torch.cat(drawn), minlength=count) / draws  # expected (C + 1) / 2C
    expected = (count + 1) / (2 * count)
    assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / draws) ** 0.5
    first = torch.bincount(torch.tensor([int(d[0]) for d in drawn]), minlength=count) / draws  # no order is preferred
    assert (first - 1 / count).abs().max() < 5 * (1 / count * (1 - 1 / count) / draws) ** 0.5


def test_sorted_draws_are_the_same_channels_in_order():
    one, other = ChannelSampler(seed=1), ChannelSampler(seed=1)
    for _ in range(20):
        assert one.draw(6, ordered=True).tolist() == sorted(other.draw(6, ordered=False).tolist())
