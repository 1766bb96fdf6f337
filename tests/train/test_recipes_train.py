"""Every recipe trains for one step with tiny crops, and validates once."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cellvim.models.checkpoints import save_checkpoint
from cellvim.models.mae import MaskedAutoencoder
from cellvim.models.registry import create_model, model_config
from cellvim.train.recipes import recipe_descriptions, recipe_settings

SMALL = {"depth": 2, "embed_dim": 48}
QUICK = (
    "plate", "crops", "imagenet_fastvim_tiny", "mae_base", "finetune_base", "linear_probe", "joint_small",
    "jumpcp_fastchannelvim_s16", "jumpcp_channelvit_s16",
)  # fmt: skip


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory):
    """One folder per class of PNGs that are not square, from plates P0 and P1: three channels, and one grey image."""
    import imagecodecs

    folder, rng = tmp_path_factory.mktemp("colour") / "images", np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            shape = (44, 40, 3) if number else (44, 40)
            image = rng.integers(0, 120, shape).astype(np.uint8) + (100 if name == "light" else 0)
            (folder / name / f"P{number % 2}_{number:02d}.png").write_bytes(imagecodecs.png_encode(image))
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A tiny masked pre-training, from which fine-tuning and probe start."""
    config = model_config("fastmaskvim_base_patch16", image_size=32, channel_names=("red", "green", "blue"), **SMALL)
    masked = MaskedAutoencoder(config, decoder_dim=16, decoder_depth=1)
    return save_checkpoint(masked, tmp_path_factory.mktemp("pretrained") / "masked.safetensors")


class Watch(Callback):
    """Compare the weights before and after the training."""

    def on_train_start(self, trainer, pl_module):
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_after_backward(self, trainer, pl_module):
        self.without_gradient = [n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]

    def on_train_end(self, trainer, pl_module):
        after = dict(pl_module.named_parameters())
        self.moved = {n for n, p in self.before.items() if not torch.equal(p, after[n])}
        self.finite = all(bool(p.isfinite().all()) for p in after.values())


@pytest.mark.parametrize(
    "recipe", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in recipe_descriptions()]
)
def test_every_recipe_takes_a_step(recipe, colour_folder, labelled_plate, pretrained, tmp_path):
    """With its model family, losses, augmentation, callbacks and precision; only sizes are changed."""
    from cellvim.train.configuration import TrainingCLI

    settings = recipe_settings(recipe)
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    patch = model_config(model["encoder"]).patch_size
    side = 2 * (patch if isinstance(patch, int) else patch[0])
    changes = model["changes"] | SMALL
    options = ["--model.changes", json.dumps(changes), "--model.optimization.warmup_epochs", "0"]
    options += ["--data.crop_size", str(side), "--data.batch_size", "4", "--data.val", "0.25", "--data.test", "0"]
    if "plates" in data:
        options += ["--data.plates", json.dumps([str(labelled_plate)]), "--data.label", "compound"]
        options += ["--data.margin", "2"] if "margin" in data else []
    else:
        options += ["--data.folder", str(colour_folder), "--data.pattern", r"(?P<Metadata_Plate>P\d)_"]
        options += ["--data.lazy", "true", "--data.channels", "[red, green, blue]", "--data.split", "random_by_cell"]
        options += ["--data.workers", "0"]
    if "pad_to" in model["augmentation"]:
        options += ["--model.augmentation.pad_to", str(side + 8)]
    if "decoder_dim" in model:
        options += ["--model.decoder_dim", "16", "--model.decoder_depth", "1"]
    if "weights" in model:
        if patch != 16:  # the patch size of the masked pre-training
            source = create_model(
                model["encoder"], image_size=side, channel_names=("red", "green", "blue"), **changes, num_classes=0
            )
            pretrained = save_checkpoint(source, tmp_path / "start.safetensors")
        options += ["--model.weights", str(pretrained)]
    for name, value in {
        "accelerator": "cpu", "max_epochs": "1", "limit_train_batches": "1", "limit_val_batches": "1",
        "num_sanity_val_steps": "0", "logger": "false", "enable_checkpointing": "false", "enable_progress_bar": "false",
    }.items():  # fmt: skip
        options += [f"--trainer.{name}", value]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = TrainingCLI(["--config", json.dumps(settings), *options], tmp_path)
        watch = Watch()
        cli.trainer.callbacks.append(watch)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 1
    assert watch.finite
    assert not watch.without_gradient  # otherwise several processes would wait for them
    # a bias may get no gradient (of attention's scores) or a step below its rounding (at these learning rates)
    assert not [n for n in watch.before.keys() - watch.moved if not n.endswith("bias")]
    for name, value in model["optimization"].items():
        found = getattr(cli.model.optimization, name)
        expected = 0 if name == "warmup_epochs" else value
        assert (list(found) if isinstance(found, tuple) else found) == expected, name
    metrics = cli.trainer.callback_metrics
    assert np.isfinite(float(metrics["train_loss"])) and np.isfinite(float(metrics["val_loss"]))
    if "Masked" not in settings["model"]["class_path"]:
        assert 0 <= float(metrics["val_accuracy"]) <= 1
    config = cli.model.finished_model().config
    for name, value in changes.items():
        assert getattr(config, name) == value, name
