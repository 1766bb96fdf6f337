"""Base of all trainings: construction of the model for the data, steps, schedules and random seeds."""

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
from cellvim.train.augment import Augmentation, middle_window
from cellvim.train.batches import DataDescription
from cellvim.train.optimization import Optimization
from cellvim.train.resuming import check_same_model, start_from


class TrainingModule(LightningModule):
    """Base of the trainings. Subclasses construct a model and compute the loss of a batch.

    Parameters
    ----------
    encoder
        Name of a model (`cellvim models`).
    changes
        Values of `EncoderConfig` that differ from the named model's. Channels, classes and image size come from the
        data.
    optimization, augmentation
        See `Optimization` and `Augmentation`.
    weights
        Checkpoint (.safetensors) or name of a trained model to start from, instead of random weights.
    gradient_checkpointing
        Recompute the blocks in the backward pass instead of storing their activations: less memory, more time.
    seed
        Random seed for weights, augmentation, masks, drop path and channel sampling. The draws for a batch depend only
        on the seed, the epoch, the number of the batch and the process, so a resumed run repeats those of an
        uninterrupted one. Channels are drawn identically in all processes.

    Notes
    -----
    The model is constructed in `configure_model`, when the data are known.
    """

    has_classes = True  # whether the model has a head for the classes of the data

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
        self.config_of(DataDescription(channel_names=("a channel",)))  # raises for unknown names
        self.model: nn.Module | None = None
        self.last_losses: dict[str, Tensor] = {}
        self.settings: dict[str, Any] | None = None  # settings that determine the weights
        self.stop_requested = False  # by Ctrl-C in this process
        self.stops_now = False  # after the current batch, in all processes
        self._loader_state: dict[str, int] | None = None  # from a loaded checkpoint
        self._evaluated: Tensor | None = None  # (2,) sum of the losses of the evaluated crops, and their number
        self._rates = self._decays = np.zeros(0)

    # ---- defined by subclasses -----------------------------------------------------------------------------------

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """Return the model to train."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """Return the losses of a training batch; "loss" is minimised."""
        raise NotImplementedError

    def evaluate(self, images: Tensor, labels: Tensor, channels: Tensor) -> tuple[Tensor, int]:
        """Return the mean loss of a batch of validation or test crops, and the number of crops."""
        raise NotImplementedError

    # ---- the model -----------------------------------------------------------------------------------------------

    def config_of(self, description: DataDescription) -> EncoderConfig:
        """Return the model's configuration for these data."""
        fixed = {"in_channels", "channel_names", "num_classes"} & set(self.changes)
        if fixed:
            raise InputError(f"model.changes contains {listing(sorted(fixed))}, which the data determine; remove it.")
        changes: dict[str, Any] = {
            "channel_names": tuple(description.channel_names),
            "in_channels": len(description.channel_names),
            "num_classes": len(description.class_names) if self.has_classes else 0,
        }
        if description.crop_px:
            changes["image_size"] = description.crop_px
        return model_config(self.encoder_name, **changes | self.changes)

    @property
    def description(self) -> DataDescription:
        """Description of the data."""
        return self.trainer.datamodule.description

    def configure_model(self) -> None:
        """Construct the model for the data once, with weights that depend on the seed only."""
        if self.model is not None:
            return
        config = self.config_of(self.description)
        if isinstance(config.image_size, tuple):
            raise ModelError(f"Training requires square images, but image_size is {config.image_size}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = self.make_model(config)
        self.model.gradient_checkpointing = self.gradient_checkpointing
        if (sampler := getattr(self.model, "channel_sampler", None)) is not None:
            sampler.seed(self.seed)
        if self.weights is not None:
            self.load_pretrained(self.weights)

    def load_pretrained(self, path: str) -> None:
        """Load the weights of a checkpoint of the same architecture."""
        start_from(self.model, path)

    def finished_model(self) -> nn.Module:
        """Return the model to save: an `Encoder` or `MaskedAutoencoder`."""
        return self.model

    # ---- steps ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, channels: Any = None) -> Tensor:
        return self.model(images, channels=channels)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Augment the images and return the loss."""
        images, labels, channels = self.prepare(batch)
        losses = self.loss(self.augmentation.apply(images, self.model.config.image_size), labels, channels)
        value = losses["loss"].detach()
        # All processes must stop in the same step; one that stopped alone would leave the others waiting.
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
        """Evaluate the centres of the crops, without augmentation."""
        images, labels, channels = self.prepare(batch)
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(batch_idx)  # the same masks in every epoch
            mean, count = self.evaluate(middle_window(images, self.model.config.image_size), labels, channels)
        self._evaluated += torch.stack([mean.detach().float() * count, mean.new_tensor(count, dtype=torch.float32)])

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Reset the evaluation."""
        self._evaluated = torch.zeros(2, device=self.device)

    def on_test_epoch_start(self) -> None:
        """Reset the evaluation."""
        self.on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Log the evaluation over all crops of all processes."""
        self.log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the evaluation over all test crops of all processes."""
        self.log_evaluation("test")

    def log_evaluation(self, part: str) -> None:
        """Log the evaluation under names that start with ``part``; a collective operation of all processes."""
        total, count = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        if count > 0:
            self.log(f"{part}_loss", total / count, rank_zero_only=False)

    def prepare(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images (scaled on the device unless scaled before), labels and channel ids (C,) of a batch."""
        group = self.trainer.datamodule.groups[batch["group"]]
        images = group.scaled(batch["images"])
        return images, batch["labels"], torch.tensor(group.channel_ids, device=images.device)

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
        """Return the optimiser, and compute the schedules of all steps."""
        trainer = self.trainer
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError(
                "The schedules require the length of the training; give --trainer.max_epochs or max_steps."
            )
        if steps < 1:
            raise InputError("There is no batch to train on; check that the training part of the split has crops.")
        trainer.fit_loop.setup_data()  # estimated_stepping_batches does not do so if max_steps is given
        self._rates, self._decays = self.optimization.schedules(
            int(steps),
            -(-trainer.num_training_batches // trainer.accumulate_grad_batches),
            trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        )
        return self.optimization.make(self.trained_part())

    def trained_part(self) -> nn.Module:
        """Return the part of the model that the optimiser updates."""
        return self.model

    def on_train_start(self) -> None:
        """Continue with the batch after a checkpoint from the middle of an epoch."""
        if self._loader_state is not None:
            self.trainer.train_dataloader.load_state_dict(self._loader_state)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate and weight decay of this step, and the random seed of this batch."""
        step = min(self.trainer.global_step, len(self._rates) - 1)
        for group in self.optimizers().param_groups:
            group["lr"] = float(self._rates[step]) * group["lr_scale"]
            group["weight_decay"] = float(self._decays[step]) if group["decayed"] else 0.0
        drawn = np.random.SeedSequence([self.seed, self.current_epoch, batch_idx, self.trainer.global_rank])
        torch.manual_seed(int(drawn.generate_state(1)[0]))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the architecture, the settings and the position in the epoch to the checkpoint."""
        checkpoint["cellvim"] = {
            "model": type(self.model).__name__,
            "config": self.model.config.to_dict(),
            "settings": self.settings,
            # Lightning stores this too, but restores it too late: counting the steps has started the epoch.
            "loader": self.trainer.train_dataloader.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has the same architecture."""
        saved = checkpoint.get("cellvim")
        if saved is None:
            raise ModelError("The checkpoint was not written by `cellvim train`, so it cannot be resumed.")
        self._loader_state = saved["loader"]
        if self.model is not None:
            check_same_model(saved, self.model)
