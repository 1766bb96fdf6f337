"""Supervised training: cross entropy on the classes of the data."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellvim.errors import InputError, MetadataError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.train.augment import mix
from cellvim.train.data import DataDescription
from cellvim.train.metrics import classification_scores, confusion_matrix
from cellvim.train.module import TrainingModule


class Supervised(TrainingModule):
    """Train an `Encoder` to tell classes apart.

    Parameters
    ----------
    label_smoothing
        Share of the target that is spread over all classes.
    class_weights
        "balanced": each class has the same weight in the loss, whatever its number of crops.
    encoder, changes, optimization, augmentation, weights, gradient_checkpointing, seed
        As for `TrainingModule`.
    """

    def __init__(
        self,
        encoder: str = "fastchannelvim_small_patch16",
        *,
        label_smoothing: float = 0.0,
        class_weights: Literal["none", "balanced"] = "none",
        **options: Any,
    ) -> None:
        super().__init__(encoder, **options)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing is {label_smoothing}; expected 0 to below 1.")
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self.confusion: Tensor | None = None  # (K, K) labels × predictions, of one evaluation

    def config_of(self, description: DataDescription) -> EncoderConfig:
        """The base's, with what this training needs of the head."""
        if self.trainer_is_attached and len(description.class_names) < 2:
            raise MetadataError(f"{description.source} has no labels; a supervised training needs a label column.")
        return super().config_of(description)

    @property
    def trainer_is_attached(self) -> bool:
        """Whether the data are known."""
        return self._trainer is not None

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """The model of this training."""
        return Encoder(config)

    def class_weight(self) -> Tensor | None:
        """(K,) weights of the classes in the loss, of mean 1 over the training crops; None when all are 1."""
        if self.class_weights == "none":
            return None
        counts = torch.tensor(self.description.class_counts, dtype=torch.float32, device=self.device)
        weights = counts.sum() / counts.clamp_min(1) / (counts > 0).sum()
        return torch.where(counts > 0, weights, 0.0)

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """The losses of a batch, see the base."""
        return {"loss": self.cross_entropy(lambda x: self.model(x, channels=channels), images, labels)}

    def cross_entropy(self, classify: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the labelled crops, mixed with others where the augmentation says so."""
        known = labels >= 0
        if not bool(known.any()):
            return classify(images).sum() * 0.0  # nothing to learn, but every process takes part in the step
        if not bool(known.all()):
            images, labels = images[known], labels[known]
        targets = F.one_hot(labels, len(self.description.class_names)).to(images.dtype)
        images, targets = mix(images, targets, self.augmentation)
        weight = self.class_weight()
        return F.cross_entropy(classify(images).float(), targets, weight=weight, label_smoothing=self.label_smoothing)

    def classify(self, images: Tensor, channels: Tensor) -> Tensor:
        """Return the logits that evaluation looks at, (B, C, H, W) -> (B, K)."""
        return self.model(images, channels=channels)

    def evaluate(self, images: Tensor, labels: Tensor, channels: Tensor) -> tuple[Tensor, int]:
        """Mean loss over the labelled crops of a batch, see the base; and count what they were taken for."""
        logits = self.classify(images, channels).float()
        self.confusion += confusion_matrix(logits.argmax(1), labels, logits.shape[1])
        known = labels >= 0
        count = int(known.sum())
        return F.cross_entropy(logits[known], labels[known]) if count else logits.new_zeros(()), count

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        super().on_validation_epoch_start()
        n_classes = len(self.description.class_names)
        self.confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=self.device)

    def log_evaluation(self, part: str) -> None:
        """Log accuracy and F1 over all crops, too."""
        super().log_evaluation(part)
        counted = self.trainer.strategy.reduce(self.confusion, reduce_op="sum")
        if counted.sum() > 0:
            scores = classification_scores(counted)
            self.log_dict({f"{part}_{name}": value for name, value in scores.items()}, rank_zero_only=False)
