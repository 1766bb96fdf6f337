"""Options that save memory or add loading processes do not change the trained weights."""

from __future__ import annotations

import pytest
import torch
from test_training import TINY, StopAfter, assert_same, crops, supervised, trainer, weights

from cellvim.models.registry import load_checkpoint
from cellvim.train.augment import Augmentation
from cellvim.train.callbacks import Checkpoints, LearningCurves
from cellvim.train.ema import WeightAverage
from cellvim.train.joint import Joint
from cellvim.train.optimization import Optimization
from cellvim.train.training import export_model

STILL = Augmentation(flips=False, vertical_flips=False, quarter_turns=False)


def fit(folder, tmp_path, module, *callbacks, epochs=2, data=None, **options):
    data = data or crops(folder)
    fitted = trainer(tmp_path, *callbacks, epochs=epochs, **options)
    fitted.fit(module, datamodule=data)
    return weights(module)


def test_accumulated_gradients_are_those_of_the_bigger_batch(crop_folder, tmp_path):
    """A step has all 16 training crops in both cases: the mean gradient, learning rate and schedule agree."""
    choices = {"augmentation": STILL, "changes": TINY | {"drop_path_rate": 0.0}}
    found = [
        fit(
            crop_folder, tmp_path, supervised(**choices), epochs=4, data=crops(crop_folder, batch_size=size),
            accumulate_grad_batches=16 // size,
        )
        for size in (16, 4)
    ]  # fmt: skip
    for name, value in found[0].items():
        if not name.endswith("_extra_state"):  # state of the channel sampler, which draws four times as often
            torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["supervised", "joint"])
def test_gradient_checkpointing_gives_the_same_weights_bitwise(crop_folder, tmp_path, kind):
    """Drop path, masks and channels are the same when the blocks are recomputed."""
    made, calls = [], []

    class Count(StopAfter):
        def on_train_start(self, trainer, pl_module):
            calls.append(0)
            block = pl_module.model.layers[0]
            block.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + block.training))

    for twice in (False, True):
        if kind == "supervised":
            module = supervised(gradient_checkpointing=twice)
        else:
            module = Joint(
                "fastchannelmaskvim_tiny_patch4", decoder_dim=16, decoder_depth=1, changes=TINY,
                optimization=Optimization(lr=5e-3, lr_batch=4, warmup_epochs=0), gradient_checkpointing=twice,
            )  # fmt: skip
        made.append(fit(crop_folder, tmp_path, module, Count(), epochs=1))
    assert_same(*made)
    assert calls[1] == 2 * calls[0]


def test_bfloat16_learns_and_exports_float32(crop_folder, tmp_path):
    """Matrix products are in bfloat16; weights and optimiser steps, and the exported model, in float32."""
    module, curves = supervised(changes=TINY | {"drop_path_rate": 0.0}), LearningCurves(tmp_path)
    data = crops(crop_folder, val=0.0, test=0.5)
    fitted = trainer(tmp_path, curves, epochs=8, precision="bf16-mixed")
    fitted.fit(module, datamodule=data)
    assert curves.epochs[-1]["train_loss"] < 0.5 * curves.epochs[0]["train_loss"]
    assert fitted.test(module, datamodule=data, verbose=False)[0]["test_accuracy"] > 0.9
    path = export_model(module, data, tmp_path / "model.safetensors", metrics={}, recipe="test")
    loaded = load_checkpoint(path)
    assert {v.dtype for n, v in loaded.state_dict().items() if not n.endswith("_extra_state")} == {torch.float32}
    assert any((v != v.bfloat16().float()).any() for v in loaded.parameters())  # not rounded
    plain = fit(crop_folder, tmp_path, supervised(), epochs=1)
    lower = fit(crop_folder, tmp_path, supervised(), epochs=1, precision="bf16-mixed")
    assert not torch.equal(plain["model.head.weight"], lower["model.head.weight"])  # bfloat16 was used


def test_averaged_weights_are_exported(crop_folder, tmp_path):
    """The exported model is the moving average, computed here step by step."""
    decay, followed = 0.8, {}

    class Follow(StopAfter):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, value in pl_module.model.named_parameters():
                before = followed.get(name)
                now = value.detach().clone()
                followed[name] = now if before is None else decay * before + (1 - decay) * now

    module, data = supervised(), crops(crop_folder)
    fit(crop_folder, tmp_path, module, Follow(), WeightAverage(decay), data=data)
    path = export_model(module, data, tmp_path / "model.safetensors", metrics={}, recipe="test")
    exported = dict(load_checkpoint(path).named_parameters())
    for name, value in followed.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-4, atol=1e-6, msg=name)


def batches(folder, **options):
    data = crops(folder, **options)
    data.setup()
    loader = data.train_dataloader()
    found = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        found += list(loader)
    return data, found


@pytest.mark.parametrize(
    "options",
    [
        {"lazy": True},
        pytest.param({"workers": 2}, marks=pytest.mark.slow),  # processes that each import torch and Lightning
        pytest.param({"lazy": True, "workers": 2}, marks=pytest.mark.slow),
    ],
    ids=["lazy", "workers", "lazy-workers"],
)
def test_workers_and_lazy_reading_give_the_same_batches(crop_folder, options):
    """Bitwise: the crops have 8/7 of the model's size, so lazy reading does not resize them."""
    eager, expected = batches(crop_folder, crop_size=14)
    data, found = batches(crop_folder, crop_size=14, **options)
    assert len(found) == len(expected)
    assert (data.groups[0].scale.low == eager.groups[0].scale.low).all()
    assert (data.groups[0].scale.high == eager.groups[0].scale.high).all()
    for one, other in zip(found, expected, strict=True):
        assert one["images"].float().equal(other["images"].float())
        assert one["labels"].equal(other["labels"]) and one["rows"].equal(other["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lazy": True, "workers": 2, "crop_size": 14}])
def test_workers_resume_in_the_middle_of_an_epoch(crop_folder, tmp_path, options, recwarn):
    """Batches that workers had loaded ahead when the training stopped are loaded again."""
    changes = {"encoder": "fastchannelvim_tiny_patch2"} if "crop_size" in options else {}
    uninterrupted = fit(
        crop_folder, tmp_path, supervised(**changes), data=crops(crop_folder, **options | {"workers": 0})
    )
    saving = Checkpoints(tmp_path, every_n_train_steps=6)
    cut = trainer(tmp_path, saving, StopAfter(steps=7), epochs=2)
    with pytest.raises(SystemExit):
        cut.fit(supervised(**changes), datamodule=crops(crop_folder, **options))
    resumed = supervised(**changes)
    trainer(tmp_path, Checkpoints(tmp_path / "again"), epochs=2).fit(
        resumed, datamodule=crops(crop_folder, **options), ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
        weights_only=True,
    )  # fmt: skip
    assert_same(uninterrupted, weights(resumed))
    assert not [w for w in recwarn if "resumable" in str(w.message)]
