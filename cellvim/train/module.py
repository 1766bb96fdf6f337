"""What every training shares: the model made to fit the data, batches prepared on the device, schedules, and seeds."""

from __future__ import annotations

import math
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
from cellvim.train.resuming import check_same_model
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
        Checkpoint (.safetensors), or name of a trained model, to start from instead of random weights.
    gradient_checkpointing
        Compute the blocks a second time in the backward pass instead of keeping all they made: less memory, more time.
    seed
        Of augmentations, masks, drop path and channel sampling: each batch's draws depend on it, the epoch, the batch's
        number and the process's alone, so that a resumed run draws as one that never stopped. Channels are drawn alike
        in all processes.

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
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder_name, self.changes = encoder, dict(changes or {})
        self.optimization = optimization or Optimization()
        self.augmentation = augmentation or Augmentation()
        self.weights, self.gradient_checkpointing, self.seed = weights, gradient_checkpointing, seed
        self.config_of(DataDescription(("a channel",)))  # names that are unknown are told before data are read
        self.model: nn.Module | None = None
        self.augment: Augment | None = None
        self.last_losses: dict[str, Tensor] = {}
        self.settings: dict[str, Any] | None = None  # all that decides the weights, for who resumes
        self.stop_requested = False  # by Ctrl-C, in this process
        self.stops_now = False  # after the batch in hand, in all processes
        self._loader_state: dict[str, int] | None = None  # of a checkpoint that was loaded
        self._evaluated: Tensor | None = None  # (2,) sum of the losses of the crops that were evaluated, their number
        self._rates = self._decays = np.zeros(0)

    # ---- what subclasses say -------------------------------------------------------------------------------------

    n_classes_of_data = True  # whether the model has a head for the data's classes

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """Return the model to train."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """Return the losses of a training batch; "loss" is the one that is minimised."""
        raise NotImplementedError

    def evaluate(self, images: Tensor, labels: Tensor, channels: Tensor) -> tuple[Tensor, int]:
        """Return the mean loss over a batch of validation or test, and of how many crops it is."""
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
        self.model.gradient_checkpointing = self.gradient_checkpointing
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
        # All processes must learn of it in the same step: one that stopped alone would leave the others waiting.
        states = torch.stack([~torch.isfinite(value), torch.tensor(self.stop_requested, device=value.device)]).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(states, torch.distributed.ReduceOp.MAX)
        broken, self.stops_now = states.bool().tolist()
        if broken:
            raise self._not_finite(float(value), batch, batch_idx)
        self.last_losses = {k: v.detach() for k, v in losses.items()}
        self.log_dict({f"train_{k}": v for k, v in self.last_losses.items()}, batch_size=len(labels), prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Evaluate the middle of the crops, without augmentation."""
        self._evaluation_step(batch, batch_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As `validation_step`, on the test."""
        self._evaluation_step(batch, batch_idx)

    def _evaluation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images, labels, channels = self.prepare(batch)
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(batch_idx)  # masks are the same every time
            mean, count = self.evaluate(middle_window(images, self.model.config.image_size), labels, channels)
        self._evaluated += torch.stack([mean.detach().float() * count, mean.new_tensor(count, dtype=torch.float32)])

    def on_validation_epoch_start(self) -> None:
        """Begin to sum."""
        self._evaluated = torch.zeros(2, device=self.device)

    def on_test_epoch_start(self) -> None:
        """Begin to sum."""
        self.on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all crops of all processes."""
        self.log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`, on the test."""
        self.log_evaluation("test")

    def log_evaluation(self, part: str) -> None:
        """Log what was summed, under names that begin with ``part``; every process must come here, crops or not."""
        total, count = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        if count > 0:
            self.log(f"{part}_loss", total / count, rank_zero_only=False)

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
        found = (value, listing(names, 3), self.global_rank)
        if self.trainer.world_size > 1:
            everywhere: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everywhere, found)
            found = next(one for one in everywhere if not math.isfinite(one[0]))
        value, crops, rank = found
        where = f", process {rank}" if self.trainer.world_size > 1 else ""
        kept = getattr(self.trainer.checkpoint_callback, "last_good", "") or "none: no epoch was finished"
        return TrainingError(
            f"The loss is {value} in epoch {self.current_epoch}, batch {batch_idx}{where} (crops {crops}). "
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
        trainer.fit_loop.setup_data()  # the steps alone do not load it when they are given
        per_epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
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
        if self._loader_state is not None:
            self.trainer.train_dataloader.load_state_dict(self._loader_state)

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
        """Keep the architecture beside the weights, to name differences when it is resumed; and what data were had."""
        checkpoint["cellvim"] = {
            "model": type(self.model).__name__,
            "config": self.model.config.to_dict(),
            # Lightning keeps this too, but hands it to the loader too late: counting the steps has begun the epoch.
            "settings": self.settings,
            "loader": self.trainer.train_dataloader.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture, naming what differs."""
        saved = checkpoint.get("cellvim")
        if saved is None:
            raise ModelError("The checkpoint is not one of `cellvim train`, so it cannot be resumed.")
        self._loader_state = saved["loader"]
        if self.model is None:
            return
        check_same_model(saved, self.model)
