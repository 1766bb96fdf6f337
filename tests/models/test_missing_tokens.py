"""Missing tokens and channels: masked, irregular and ragged batches through the same code as full grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellvim import Encoder, EncoderConfig, MaskedAutoencoder
from cellvim.errors import ChannelError, InputError, ModelError
from cellvim.models.grid import kept_ids

BASE = {
    "image_size": 24,
    "patch_size": 4,
    "in_channels": 3,
    "embed_dim": 16,
    "depth": 3,
    "num_classes": 0,
    "d_state": 4,
    "drop_path_rate": 0.0,
}


def build(**changes) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**BASE | changes)).eval()


def ragged_mask(model: Encoder, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    length = 36 * (3 if model.config.tokens == "per_channel" else 1)
    mask = torch.rand(batch, length, generator=generator) < torch.tensor([[0.2], [0.5], [0.9]])[:batch]
    mask[0, :6] = False  # an empty row of the grid
    return mask


CASES = {
    "joint": {"tokens": "joint"},
    "joint_vim": {"tokens": "joint", "pool": "none", "alternate": False},
    "joint_max": {"tokens": "joint", "pool": "max"},
    "joint_attention_pool": {"tokens": "joint", "pool": "attention"},
    "per_channel": {},
    "spatial_first": {"scan_order": "spatial_first"},
    "two_axes": {"pool_axes": 2},
    "class_first": {"class_token": "first"},
    "mean_of_kept": {"masked_pool": "mean"},
    "vit": {"mixer": "attention", "num_heads": 2, "pool": "none", "tokens": "joint"},
    "vit_pooled": {"mixer": "attention", "num_heads": 2, "tokens": "joint"},
}


@pytest.mark.parametrize("name", CASES)
def test_everything_kept_equals_the_full_grid(name: str) -> None:
    model = build(**CASES[name])
    images = torch.rand(2, 3, 24, 24)
    everything = torch.ones_like(ragged_mask(model, 2))
    torch.testing.assert_close(model(images, keep=everything), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ragged_sample_equals_itself_alone(name: str) -> None:
    model = build(**CASES[name])
    images, keep = torch.rand(3, 3, 24, 24), ragged_mask(model)
    together = model(images, keep=keep)
    for i in range(3):
        alone = model(images[i : i + 1], keep=keep[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ragged_batch_learns_everywhere(name: str) -> None:
    model = build(**CASES[name]).train()
    images, keep = torch.rand(3, 3, 24, 24), ragged_mask(model)
    out = model.run_blocks(*model._embed_chosen(images, None, keep))
    out.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_absent_tokens_of_a_ragged_sample_are_zero() -> None:
    model = build(tokens="joint")
    keep = ragged_mask(model)
    tokens = model.forward_tokens(torch.rand(3, 3, 24, 24), keep=keep)
    assert tokens.shape[1] == keep.sum(1).max()
    for row, count in zip(tokens, keep.sum(1).tolist(), strict=True):
        assert row[:count].abs().min() > 0
        assert not row[count:].any()


def test_masked_pool_is_the_sum_over_the_full_count_or_the_mean_of_the_kept() -> None:
    from cellvim.models.grid import TokenGrid
    from cellvim.ops import reference

    keep = torch.zeros(1, 36, dtype=torch.bool)
    keep[0, [0, 1, 5, 13, 30]] = True  # rows 0, 2 and 5 of six columns
    x = torch.randn(1, 5, 4)
    expected_sum = torch.stack([x[0, :3].sum(0), 0 * x[0, 0], x[0, 3], 0 * x[0, 0], 0 * x[0, 0], x[0, 4]])
    for kind, count in (("sum", torch.full((6, 1), 6.0)), ("mean", torch.tensor([[3.0], [1], [1], [1], [1], [1]]))):
        config = EncoderConfig(**BASE | {"tokens": "joint", "masked_pool": kind})
        plan = TokenGrid(config, 6, 6, 1, kept=kept_ids(keep, 1, 36)).plan(0)
        torch.testing.assert_close(reference.pool_mean(x, plan)[0], expected_sum / count)


def test_odd_blocks_read_kept_tokens_column_by_column() -> None:
    from cellvim.models.grid import TokenGrid

    config = EncoderConfig(**BASE | {"tokens": "joint"})
    ids = torch.tensor([[1, 6, 7, 12, 13, -1]])  # (0,1) (1,0) (1,1) (2,0) (2,1)
    plan = TokenGrid(config, 6, 6, 1, kept=ids).plan(1)
    assert plan.order.tolist() == [[1, 3, 0, 2, 4, -1]]
    assert plan.slot[0, 0, :5].tolist() == [0, 0, 1, 1, 1]


def test_reference_mode_does_not_mirror_the_labels() -> None:
    from cellvim.models.grid import TokenGrid

    config = EncoderConfig(**BASE | {"tokens": "joint", "mask_reverse": "reference"})
    ids = torch.tensor([[0, 1, 8, 30]])  # rows 0 0 1 5; reversed sequence: rows 5 1 0 0
    forward, backward = TokenGrid(config, 6, 6, 1, kept=ids).plan(0).slot[:, 0]
    assert forward.tolist() == [0, 0, 1, 5]
    # Labelled 0 0 1 5 in reversed reading, so the last token is at step 0 from the end, that is in slot 5.
    assert backward.tolist() == [0, 4, 5, 5]


def test_reference_mode_refuses_ragged_batches() -> None:
    model = build(tokens="joint", mask_reverse="reference")
    with pytest.raises(ModelError, match="mirrored"):
        model(torch.rand(3, 3, 24, 24), keep=ragged_mask(model))


@pytest.mark.parametrize("scan_order", ["channel_first", "spatial_first"])
@pytest.mark.parametrize("pool_axes", [1, 2])
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_channel_subset_in_a_batch_equals_the_sample_alone(scan_order: str, pool_axes: int, pool: str) -> None:
    model = build(scan_order=scan_order, pool_axes=pool_axes, pool=pool, channel_names=("DNA", "ER", "Mito"))
    images = torch.rand(3, 3, 24, 24)
    sets = [["Mito"], ["ER", "DNA"], ["DNA", "ER", "Mito"]]
    together = model.forward_features(images, channels=sets)
    for i, names in enumerate(sets):
        alone = model.forward_features(images[i : i + 1, : len(names)], channels=names)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_channels_by_name_and_id_agree_and_order_matters_not_to_the_embedding_used() -> None:
    model = build(channel_names=("DNA", "ER", "Mito"))
    images = torch.rand(2, 2, 24, 24)
    by_id = model(images, channels=[2, 0])
    torch.testing.assert_close(model(images, channels=["Mito", "DNA"]), by_id)
    torch.testing.assert_close(model(images, channels=["MitoTracker", "hoechst"]), by_id)
    assert not torch.allclose(model(images, channels=[0, 2]), by_id)


def test_joint_channels_are_put_into_the_models_order() -> None:
    model = build(tokens="joint", channel_names=("DNA", "ER", "Mito"))
    images = torch.rand(2, 3, 24, 24)
    shuffled = images[:, [2, 0, 1]]
    torch.testing.assert_close(model(shuffled, channels=["Mito", "DNA", "ER"]), model(images))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (["DNA", "Golgi", "ER"], "Golgi.*DNA, ER, Mito"),
        ([0, 1], "expected \\(3,\\)"),
        ([0, 1, 3], "0 to 2"),
        ([0, 1, 1], "repeat"),
        ([0, "ER", 2], "only names or only integers"),
        ([-1, 1, 2], "0 to 2"),
    ],
)
def test_wrong_channels_are_refused(channels: list, message: str) -> None:
    model = build(channel_names=("DNA", "ER", "Mito"))
    with pytest.raises(ChannelError, match=message):
        model(torch.rand(2, 3, 24, 24), channels=channels)


def test_channel_count_that_does_not_fit_asks_which_they_are() -> None:
    with pytest.raises(ChannelError, match=r"2 channels, the model 3.*channels="):
        build()(torch.rand(2, 2, 24, 24))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.zeros(2, 108, dtype=torch.bool), "selects no token"),
        (torch.ones(2, 50, dtype=torch.bool), "expected \\(2, 108\\)"),
        (torch.ones(3, 108, dtype=torch.bool), "one row for each of the 2"),
        (torch.tensor([[0, 0], [1, 2]]), "repeat"),
        (torch.tensor([[0, 108], [1, 2]]), "above 107"),
    ],
)
def test_wrong_keep_is_refused(keep: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()(torch.rand(2, 3, 24, 24), keep=keep)


@pytest.mark.parametrize("scan_order", ["channel_first", "spatial_first"])
def test_per_channel_autoencoder_masks_whole_channels(scan_order: str) -> None:
    torch.manual_seed(0)
    config = EncoderConfig(**BASE | {"scan_order": scan_order, "channel_sampling": "none", "num_classes": 4})
    model = MaskedAutoencoder(
        config, decoder_dim=16, decoder_depth=1, mask_ratio=0.75, channel_mask_ratio=1 / 3, supervised=True
    )
    out = model(torch.rand(4, 3, 24, 24))
    assert out.prediction.shape == (4, 108, 16)
    assert out.logits.shape == (4, 4)
    shape, axis = ((36, 3), 1) if scan_order == "channel_first" else ((3, 36), 2)
    masked_whole = out.mask.unflatten(1, shape).all(axis)  # (B, C)
    assert masked_whole.sum(1).tolist() == [1, 1, 1, 1]
    assert (out.mask == 0).sum(1).tolist() == [27] * 4
    (out.loss + out.logits.square().sum()).backward()
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, key


def test_share_of_masked_channels_holds_on_average() -> None:
    """A quarter of two channels is one in every other batch; of one channel, none: one has to stay."""
    torch.manual_seed(0)
    config = EncoderConfig(**BASE | {"in_channels": 2, "channel_sampling": "none"})
    model = MaskedAutoencoder(config, decoder_dim=16, decoder_depth=1, mask_ratio=0.5, channel_mask_ratio=0.25)
    masks = [model(torch.rand(2, 2, 24, 24)).mask.unflatten(1, (36, 2)) for _ in range(60)]
    masked_whole = [int(m.all(1).sum(1).unique()) for m in masks]  # the same number in each sample of a batch
    assert set(masked_whole) == {0, 1}
    assert 15 < sum(masked_whole) < 45  # 4 standard deviations around 30
    assert {int((m == 0).sum()) for m in masks} == {2 * 36}
    one = [model(torch.rand(2, 1, 24, 24), channels=[1]).mask.sum(1).tolist() for _ in range(8)]
    assert one == [[18, 18]] * 8


def test_autoencoder_predicts_the_channels_it_drew() -> None:
    config = EncoderConfig(**BASE)
    model = MaskedAutoencoder(config, decoder_dim=16, decoder_depth=1).train()
    lengths = {model(torch.rand(2, 3, 24, 24)).prediction.shape[1] for _ in range(12)}
    assert lengths == {36, 72, 108}


def test_autoencoder_becomes_an_encoder_with_its_weights() -> None:
    torch.manual_seed(0)
    for changes in ({"tokens": "joint"}, {"tokens": "joint", "class_token": "middle", "pool": "none"}, {}):
        mae = MaskedAutoencoder(EncoderConfig(**BASE | changes), decoder_dim=16, decoder_depth=1).eval()
        encoder = mae.to_encoder(num_classes=5).eval()
        images = torch.rand(2, 3, 24, 24)
        torch.testing.assert_close(encoder.forward_features(images), mae.forward_features(images))
        assert encoder(images).shape == (2, 5)
        assert encoder.pos_embed.requires_grad
