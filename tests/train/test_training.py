"""A training is reproducible from its seed and from its checkpoint, and stops at a non-finite loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from cellvim.errors import CellvimError, InputError, ModelError, TrainingError
from cellvim.train.augment import Augmentation
from cellvim.train.callbacks import Checkpoints, LearningCurves
from cellvim.train.ema import WeightAverage
from cellvim.train.folders import LabelledCrops
from cellvim.train.joint import Joint
from cellvim.train.masked import Masked
from cellvim.train.optimization import Optimization, cosine_schedule
from cellvim.train.supervised import Supervised

PATTERN = r"(?P<Metadata_Plate>P\d)_"
TINY = {"depth": 2, "embed_dim": 16, "drop_path_rate": 0.2}


class StopAfter(Callback):
    """Stop a training early."""

    def __init__(self, epochs: int | None = None, steps: int | None = None):
        self.epochs, self.steps = epochs, steps

    def on_train_epoch_end(self, trainer, pl_module):
        if self.epochs is not None and trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.steps is not None and trainer.global_step == self.steps:
            raise KeyboardInterrupt


def crops(folder: Path, **options):
    options = {"batch_size": 4, "val": 0.25, "test": 0.25, "crop_size": 16} | options
    return LabelledCrops(str(folder), pattern=PATTERN, channels=["DNA"], **options)


def supervised(seed: int = 0, encoder: str = "fastchannelvim_tiny_patch8", **options) -> Supervised:
    choices = {
        "changes": TINY,
        "optimization": Optimization(lr=1e-2, lr_batch=4, warmup_epochs=1),
        "augmentation": Augmentation(pad_to=18, intensity=0.1),
    }
    return Supervised(encoder, seed=seed, **choices | options)


def trainer(folder: Path, *callbacks, epochs: int = 4, **options) -> Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), use_distributed_sampler=False, default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, Checkpoints) for c in callbacks), **defaults | options,
    )  # fmt: skip


def weights(module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_seed_gives_the_same_weights_bitwise(crop_folder, tmp_path):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # earlier draws do not matter
        module = supervised(seed)
        trainer(tmp_path, epochs=1).fit(module, datamodule=crops(crop_folder, seed=seed))
        runs.append(weights(module))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["model.head.weight"], runs[2]["model.head.weight"])


@pytest.mark.parametrize("average", [False, True], ids=["plain", "averaged"])
def test_a_resumed_training_ends_at_the_same_weights_bitwise(crop_folder, tmp_path, average):
    """Optimiser, schedules, order of crops, augmentation, drop path and channel draws are restored."""

    def extras():
        return [WeightAverage(0.9)] if average else []

    uninterrupted, curves = supervised(), LearningCurves(tmp_path / "uninterrupted")
    trainer(tmp_path, curves, *extras()).fit(uninterrupted, datamodule=crops(crop_folder))

    half = trainer(tmp_path, Checkpoints(tmp_path), LearningCurves(tmp_path / "half"), StopAfter(2), *extras())
    half.fit(supervised(), datamodule=crops(crop_folder))
    assert half.current_epoch == 2
    resumed, drawn = supervised(seed=0), LearningCurves(tmp_path / "resumed")
    trainer(tmp_path, Checkpoints(tmp_path / "again"), drawn, *extras()).fit(
        resumed, datamodule=crops(crop_folder), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert_same(weights(uninterrupted), weights(resumed))
    assert drawn.epochs == curves.epochs  # the same loss curve
    assert (tmp_path / "resumed" / "curves.png").stat().st_size > 5000


def test_a_training_resumes_in_the_middle_of_an_epoch(crop_folder, tmp_path):
    uninterrupted = supervised()
    trainer(tmp_path, epochs=2).fit(uninterrupted, datamodule=crops(crop_folder))
    steps = len(crops_loader(crop_folder)) + 2
    saving = Checkpoints(tmp_path, every_n_train_steps=steps)
    cut = trainer(tmp_path, saving, StopAfter(steps=steps + 1), epochs=2)
    with pytest.raises(SystemExit):  # raised by Lightning for an interruption
        cut.fit(supervised(), datamodule=crops(crop_folder))
    resumed = supervised()
    trainer(tmp_path, epochs=2).fit(
        resumed, datamodule=crops(crop_folder), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert_same(weights(uninterrupted), weights(resumed))


def crops_loader(folder):
    data = crops(folder)
    data.setup()
    return data.train_dataloader()


def test_checkpoints_contain_the_state_of_the_channel_sampler(crop_folder, tmp_path):
    module = supervised()
    trainer(tmp_path, Checkpoints(tmp_path), epochs=1).fit(module, datamodule=crops(crop_folder))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["model._extra_state"], module.model.channel_sampler.state)


def test_it_learns(crop_folder, tmp_path):
    module, curves = supervised(changes=TINY | {"drop_path_rate": 0.0}), LearningCurves(tmp_path)
    fitted = trainer(tmp_path, curves, epochs=8)
    fitted.fit(module, datamodule=crops(crop_folder, val=0.0, test=0.5))
    assert curves.epochs[-1]["train_loss"] < 0.5 * curves.epochs[0]["train_loss"]
    assert (
        fitted.test(module, datamodule=crops(crop_folder, val=0.0, test=0.5), verbose=False)[0]["test_accuracy"] > 0.9
    )


def test_steps_use_the_schedules(crop_folder, tmp_path):
    seen = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            groups = pl_module.optimizers().param_groups
            seen.append((max(g["lr"] for g in groups), sorted({g["weight_decay"] for g in groups})))

    choices = Optimization(lr=1e-3, lr_batch=8, warmup_epochs=1, weight_decay=0.04, final_weight_decay=0.4)
    module = supervised(optimization=choices)
    trainer(tmp_path, Record(), epochs=3, accumulate_grad_batches=2).fit(module, datamodule=crops(crop_folder))

    steps, batches = len(seen) // 2, len(seen) // 3
    expected = cosine_schedule(1e-3, 1e-6, steps, warmup_steps=batches // 2)  # batch 4 x 2, the lr_batch
    decays = cosine_schedule(0.04, 0.4, steps)
    assert batches % 2 == 0
    for number, (rate, decay) in enumerate(seen):
        assert rate == pytest.approx(expected[number // 2], abs=1e-12)
        assert decay == [0.0, pytest.approx(decays[number // 2])]


def test_a_length_in_steps_warms_up_over_the_same_epochs(crop_folder, tmp_path):
    """16 crops are 4 steps per epoch, so one epoch of warm-up is 4 steps for a length in epochs or in steps."""
    for options in ({"epochs": -1, "max_steps": 10}, {"epochs": 50, "max_steps": 10}):
        module = supervised()
        trainer(tmp_path, **options).fit(module, datamodule=crops(crop_folder))
        assert len(module._rates) == 10
        assert module._rates[:5].tolist() == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(crop_folder, tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 2:
                pl_module.model.head.bias.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"loss is nan in epoch 1, batch 2 \(crops .*\.tif") as caught:
        trainer(tmp_path, Checkpoints(tmp_path), Poison()).fit(supervised(), datamodule=crops(crop_folder))
    kept = tmp_path / "checkpoints" / "last.ckpt"
    assert str(kept) in str(caught.value)
    assert "\n" not in str(caught.value)
    saved = torch.load(kept, weights_only=True)
    assert saved["epoch"] == 0
    assert all(v.isfinite().all() for v in saved["state_dict"].values() if v.is_floating_point())


def test_a_checkpoint_of_another_architecture_raises_with_the_differences(crop_folder, tmp_path):
    trainer(tmp_path, Checkpoints(tmp_path), epochs=1).fit(supervised(), datamodule=crops(crop_folder))
    other = supervised(changes=TINY | {"depth": 3, "pool": "max"})
    with pytest.raises(ModelError, match=r"depth is 2 there and 3 here.*pool is 'mean' there and 'max' here"):
        trainer(tmp_path, epochs=2).fit(
            other, datamodule=crops(crop_folder), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True
        )


@pytest.mark.parametrize("kind", ["masked", "joint"])
def test_masked_and_joint_trainings_learn(crop_folder, tmp_path, kind):
    made = {
        "masked": lambda: Masked("fastmaskvim_tiny_patch4", decoder_dim=16, decoder_depth=1, **options),
        "joint": lambda: Joint(
            "fastchannelmaskvim_tiny_patch4", decoder_dim=16, decoder_depth=1, mask_ratio=0.25, **options
        ),
    }
    options = {
        "changes": {"depth": 2, "embed_dim": 16, "drop_path_rate": 0.0},
        "optimization": Optimization(lr=5e-3, lr_batch=4, warmup_epochs=0),
        "augmentation": Augmentation(),
    }
    module, curves = made[kind](), LearningCurves(tmp_path)
    trainer(tmp_path, curves, epochs=5).fit(module, datamodule=crops(crop_folder, val=0.25, test=0.0))
    assert curves.epochs[-1]["train_loss"] < 0.9 * curves.epochs[0]["train_loss"]
    assert curves.epochs[-1]["val_loss"] < curves.epochs[0]["val_loss"]
    if kind == "joint":
        assert {"train_masked_loss", "train_supervised_loss", "val_macro_f1"} <= curves.epochs[-1].keys()


def test_class_weights_balance_the_loss(crop_folder, tmp_path):
    module = supervised(class_weights="balanced")
    data = crops(crop_folder)
    data.setup()
    data.description.class_counts = (30, 10)
    module.trainer = trainer(tmp_path)
    module.trainer.datamodule = data
    weight = module.class_weight()
    assert torch.allclose(weight * torch.tensor([30.0, 10.0]), torch.tensor([20.0, 20.0]))


def test_settings_that_the_data_determine_cannot_be_changed():
    with pytest.raises(InputError, match="num_classes, which the data determine"):
        supervised(changes={"num_classes": 4})
    with pytest.raises(CellvimError, match=r"Model 'fastvim_tin"):
        supervised(encoder="fastvim_tin_patch8")
