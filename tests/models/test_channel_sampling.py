"""Hierarchical channel sampling draws from its own saved generator."""

from __future__ import annotations

import copy
import pickle

import torch

from cellvim import Encoder, EncoderConfig
from cellvim.models.patch_embed import ChannelSampler

CONFIG = EncoderConfig(
    image_size=16, patch_size=8, in_channels=4, embed_dim=8, depth=1, num_classes=3, drop_path_rate=0.0
)


def test_number_is_uniform_and_channels_are_distinct() -> None:
    sampler = ChannelSampler(seed=1)
    draws = [sampler.draw(4, ordered=False).tolist() for _ in range(4000)]
    for n in range(1, 5):
        assert abs(sum(len(d) == n for d in draws) - 1000) < 120  # 4.4 standard deviations
    assert all(len(set(d)) == len(d) for d in draws)
    firsts = [d[0] for d in draws]
    assert all(abs(firsts.count(c) - 1000) < 120 for c in range(4))


def test_sorted_keeps_channel_order_and_unsorted_does_not() -> None:
    assert all(d == sorted(d) for d in (ChannelSampler(s).draw(4, ordered=True).tolist() for s in range(50)))
    assert any(d != sorted(d) for d in (ChannelSampler(s).draw(4, ordered=False).tolist() for s in range(50)))


def test_draw_a_sample_shares_the_number_but_not_the_channels() -> None:
    draws = [ChannelSampler(s).draw(5, ordered=True, samples=6) for s in range(20)]
    assert all(d.shape[0] == 6 for d in draws)
    assert any((d[0] != d[1]).any() for d in draws)


def test_training_sees_the_drawn_channels_and_evaluation_all() -> None:
    model = Encoder(CONFIG).train()
    images = torch.rand(2, 4, 16, 16)
    drawn = copy.deepcopy(model.channel_sampler).draw(4, ordered=True)
    logits = model(images)
    torch.testing.assert_close(logits, model.eval()(images[:, drawn], channels=drawn.tolist()))
    before = model.channel_sampler.state
    model(images)
    assert torch.equal(model.channel_sampler.state, before)


def test_sampling_per_image_equals_each_image_with_its_channels() -> None:
    model = Encoder(CONFIG.replace(sample_channels_per_image=True)).train()
    images = torch.rand(3, 4, 16, 16)
    drawn = copy.deepcopy(model.channel_sampler).draw(4, ordered=True, samples=3)
    logits = model(images)
    model.eval()
    for i, ids in enumerate(drawn):
        alone = model(images[i : i + 1, ids], channels=ids.tolist())
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_draws_do_not_touch_or_follow_the_global_generator() -> None:
    model = Encoder(CONFIG).train()
    images = torch.rand(1, 4, 16, 16)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model(images)
    assert torch.equal(torch.rand(1), expected)


def test_checkpoint_resumes_the_draws(tmp_path) -> None:
    model = Encoder(CONFIG)
    model.channel_sampler.seed(7)
    model.channel_sampler.draw(4, ordered=True)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    expected = [model.channel_sampler.draw(4, ordered=False).tolist() for _ in range(20)]
    resumed = Encoder(CONFIG)
    resumed.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert [resumed.channel_sampler.draw(4, ordered=False).tolist() for _ in range(20)] == expected


def test_copies_and_pickles_draw_alike() -> None:
    model = Encoder(CONFIG)
    model.channel_sampler.seed(3)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = [model.channel_sampler.draw(4, ordered=True).tolist() for _ in range(10)]
    for other in copies:
        assert [other.channel_sampler.draw(4, ordered=True).tolist() for _ in range(10)] == expected
