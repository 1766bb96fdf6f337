"""What every training shares: the model made to fit the data, batches prepared on the device, schedules, and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from cellvim.errors import InputError, ModelError, TrainingError, listing
from cellvim.models.config import EncoderConfig
from cellvim.models.registry import model_config
from cellvim.train.augment import Augment, Augmentation, middle_window
from cellvim.train.data import DataDescription
from cellvim.train.optimization import Optimization
from cellvim.train.schedules import cosine_schedule


class TrainingModule(LightningModule):
    """Base of the trainings: subclasses make a model and turn a batch into a loss.

    Parameters
    ----------
    encoder
        Name of a model (`cellvim models`).
    changes
        Values of `EncoderConfig` that differ from the named model's. Channels, classes and image size come from the
        data.
    optimization, augmentation
        See their classes.
    weights
        Checkpoint (.safetensors) to start from instead of random weights.
    seed
        Of augmentations, masks, drop path and channel sampling: each batch's draws depend on it, the epoch and the
        batch's number alone, so that a resumed run draws as one that never stopped.

    Notes
    -----
    The model is made in `configure_model`, when the data are known.
    """

    def __init__(
        self,
        encoder: str = "fastchannelvim_small_patch16",
        *,
        changes: dict[str, Any] | None = None,
        optimization: Optimization | None = None,
        augmentation: Augmentation | None = None,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder_name, self.changes = encoder, dict(changes or {})
        self.optimization = optimization or Optimization()
        self.augmentation = augmentation or Augmentation()
        self.weights, self.seed = weights, seed
        self.config_of(DataDescription(("a channel",)))  # names that are unknown are told before data are read
        self.model: nn.Module | None = None
        self.augment: Augment | None = None
        self.last_losses: dict[str, Tensor] = {}
        self._batches_done = 0  # of the epoch that a checkpoint was made in
        self._rates = self._decays = np.zeros(0)

    # ---- what subclasses say -------------------------------------------------------------------------------------

    n_classes_of_data = True  # whether the model has a head for the data's classes

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """Return the model to train."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """Return the losses of a training batch; "loss" is the one that is minimised."""
        raise NotImplementedError

    def evaluate(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """Return means over a batch of validation or test, by name."""
        raise NotImplementedError

    # ---- the model -----------------------------------------------------------------------------------------------

    def config_of(self, description: DataDescription) -> EncoderConfig:
        """Return the model's configuration for these data."""
        fixed = {"in_channels", "channel_names", "num_classes"} & set(self.changes)
        if fixed:
            raise InputError(f"model.changes sets {listing(sorted(fixed))}, which the data say; leave it out.")
        changes: dict[str, Any] = {
            "channel_names": tuple(description.channel_names),
            "in_channels": len(description.channel_names),
            "num_classes": len(description.class_names) if self.n_classes_of_data else 0,
        }
        if description.crop_px:
            changes["image_size"] = description.crop_px
        return model_config(self.encoder_name, **changes | self.changes)

    @property
    def description(self) -> DataDescription:
        """What the data say of themselves."""
        return self.trainer.datamodule.description

    def configure_model(self) -> None:
        """Make the model for the data, once; seeded, so that the same seed starts from the same weights."""
        if self.model is not None:
            return
        config = self.config_of(self.description)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = self.make_model(config)
        sampler = getattr(self.model, "channel_sampler", None)
        if sampler is not None:
            sampler.seed(self.seed)
        if self.weights is not None:
            self.load_pretrained(self.weights)
        if isinstance(config.image_size, tuple):
            raise ModelError(f"Training cuts squares, but image_size is {config.image_size}.")
        self.augment = Augment(self.augmentation, config.image_size)

    def load_pretrained(self, path: str) -> None:
        """Start from the weights of a checkpoint of the same architecture."""
        from cellvim.train.finetune import start_from

        start_from(self.model, path)

    def finished_model(self) -> nn.Module:
        """Return what is saved at the end: an `Encoder` or `MaskedAutoencoder`."""
        return self.model

    # ---- steps ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, channels: Any = None) -> Tensor:
        return self.model(images, channels=channels)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Augment, compute the loss, and stop if it is no number."""
        images, labels, channels = self.prepare(batch)
        losses = self.loss(self.augment(images), labels, channels)
        value = losses["loss"].detach()
        if not bool(torch.isfinite(value)):
            raise self._not_finite(float(value), batch, batch_idx)
        self.last_losses = {k: v.detach() for k, v in losses.items()}
        self.log_dict({f"train_{k}": v for k, v in self.last_losses.items()}, batch_size=len(labels), prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Evaluate the middle of the crops, without augmentation."""
        self._evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As `validation_step`, on the test."""
        self._evaluation_step(batch, batch_idx, "test")

    def _evaluation_step(self, batch: dict[str, Any], batch_idx: int, part: str) -> None:
        images, labels, channels = self.prepare(batch)
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(batch_idx)  # masks are the same every time
            values = self.evaluate(middle_window(images, self.model.config.image_size), labels, channels)
        for name, value in values.items():
            self.log(f"{part}_{name}", value, batch_size=len(labels), on_epoch=True, sync_dist=True)

    def prepare(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Scale a batch's intensities where that was left for the device; images, labels, channel ids (C,)."""
        group = self.trainer.datamodule.groups[batch["group"]]
        images = batch["images"]
        images = images.float() if group.scale is None else group.scale.apply_on_device(images)
        channels = torch.tensor(group.channel_ids, device=images.device)
        return images, batch["labels"], channels

    def _not_finite(self, value: float, batch: dict[str, Any], batch_idx: int) -> TrainingError:
        rows = batch["rows"].tolist()
        table = self.trainer.datamodule.table.iloc[rows]
        names = table["path"] if "path" in table else [f"row {i}" for i in rows]
        kept = getattr(self.trainer.checkpoint_callback, "last_good", "") or "none: no epoch was finished"
        return TrainingError(
            f"The loss is {value} in epoch {self.current_epoch}, batch {batch_idx} (crops {listing(names, 3)}). "
            f"Training stopped; the last good checkpoint is {kept}. Try a lower learning rate, a longer warm-up or "
            "--trainer.gradient_clip_val 1."
        )

    # ---- schedules and seeds -------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimiser, and the schedules over all of its steps."""
        choices, trainer = self.optimization, self.trainer
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("The schedules need the length of the training; give --trainer.max_epochs or max_steps.")
        steps = int(steps)
        if steps < 1:
            raise InputError("There is no batch to train on; are there crops for training?")
        batch = trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        per_epoch = steps / epochs if epochs else -(-len(trainer.train_dataloader) // trainer.accumulate_grad_batches)
        self._rates = cosine_schedule(
            choices.lr * batch / choices.lr_batch,
            choices.final_lr,
            steps,
            warmup_steps=round(choices.warmup_epochs * per_epoch),
            warmup_from=choices.warmup_lr,
        )
        final = choices.weight_decay if choices.final_weight_decay is None else choices.final_weight_decay
        self._decays = cosine_schedule(choices.weight_decay, final, steps)
        return choices.make(self.trained_part())

    def trained_part(self) -> nn.Module:
        """Return what the optimiser updates."""
        return self.model

    def on_train_start(self) -> None:
        """After a checkpoint in the middle of an epoch, go on with the batch after it."""
        self.trainer.train_dataloader.skip = self._batches_done

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set this step's learning rate and weight decay, and the seed of this batch's draws."""
        step = min(self.trainer.global_step, len(self._rates) - 1)
        for group in self.optimizers().param_groups:
            group["lr"] = float(self._rates[step]) * group["lr_scale"]
            group["weight_decay"] = float(self._decays[step]) if group["decayed"] else 0.0
        drawn = np.random.SeedSequence([self.seed, self.current_epoch, batch_idx, self.trainer.global_rank])
        torch.manual_seed(int(drawn.generate_state(1)[0]))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the architecture beside the weights, to name differences when it is resumed."""
        checkpoint["cellvim"] = {"model": type(self.model).__name__, "config": self.model.config.to_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture, naming what differs."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        self._batches_done = 0 if progress["is_last_batch"] else progress["current"]["processed"]
        saved = checkpoint.get("cellvim")
        if saved is None or self.model is None:
            return
        own = {"model": type(self.model).__name__, **self.model.config.to_dict()}
        other = {"model": saved["model"], **saved["config"]}
        differ = [f"{k} is {other.get(k)!r} there and {v!r} here" for k, v in own.items() if other.get(k) != v]
        if differ:
            raise ModelError(f"The checkpoint is of another model: {listing(differ, 6)}. Resume with its own recipe.")
