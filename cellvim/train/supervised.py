"""Supervised training: cross entropy on the classes of the data, and classification scores."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cellvim.errors import InputError, MetadataError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.train.augment import mix
from cellvim.train.batches import UNLABELLED, DataDescription
from cellvim.train.module import TrainingModule


class Supervised(TrainingModule):
    """Train an `Encoder` to classify crops.

    Parameters
    ----------
    label_smoothing
        Fraction of the target that is spread over all classes.
    class_weights
        "balanced": each class has the same weight in the loss, independent of its number of crops.
    encoder, changes, optimization, augmentation, weights, gradient_checkpointing, seed
        See `TrainingModule`.
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
        self.confusion: Tensor | None = None  # (K, K) labels × predictions of the current evaluation

    def config_of(self, description: DataDescription) -> EncoderConfig:
        """Return the model's configuration for these data."""
        if self._trainer is not None and len(description.class_names) < 2:
            raise MetadataError(
                f"{description.training_data} has no labels; supervised training requires a label column."
            )
        return super().config_of(description)

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """Return the model to train."""
        return Encoder(config)

    def class_weight(self) -> Tensor | None:
        """Return the (K,) class weights of the loss, with mean 1 over the training crops; None if all are 1."""
        if self.class_weights == "none":
            return None
        counts = torch.tensor(self.description.class_counts, dtype=torch.float32, device=self.device)
        weights = counts.sum() / counts.clamp_min(1) / (counts > 0).sum()
        return torch.where(counts > 0, weights, 0.0)

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """Return the cross entropy of the labelled crops of a batch."""
        known = labels >= 0
        if not bool(known.any()):
            return {"loss": self.model(images, channels=channels).sum() * 0.0}  # all processes must take part in a step
        if not bool(known.all()):
            images, labels = images[known], labels[known]
        images, targets = mix(images, self.one_hot(labels, images.dtype), self.augmentation)
        return {"loss": self.cross_entropy(self.model(images, channels=channels), targets)}

    def one_hot(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the targets (B, K) of labels (B,); those of unlabelled crops are arbitrary."""
        return F.one_hot(labels.clamp_min(0), len(self.description.class_names)).to(dtype)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy, with class weights and label smoothing."""
        return F.cross_entropy(
            logits.float(), targets, weight=self.class_weight(), label_smoothing=self.label_smoothing
        )

    def classify(self, images: Tensor, channels: Tensor) -> Tensor:
        """Return the logits for evaluation, (B, C, H, W) -> (B, K)."""
        return self.model(images, channels=channels)

    def evaluate(self, images: Tensor, labels: Tensor, channels: Tensor) -> tuple[Tensor, int]:
        """Return the mean loss of the labelled crops of a batch and their number; count the predictions."""
        logits = self.classify(images, channels).float()
        self.confusion += confusion_matrix(logits, labels)
        known = labels >= 0
        count = int(known.sum())
        return F.cross_entropy(logits[known], labels[known]) if count else logits.new_zeros(()), count

    def on_validation_epoch_start(self) -> None:
        """Reset the evaluation."""
        super().on_validation_epoch_start()
        n_classes = len(self.description.class_names)
        self.confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=self.device)

    def log_evaluation(self, part: str) -> None:
        """Log the loss, accuracy and F1 over all crops."""
        super().log_evaluation(part)
        confusion = self.trainer.strategy.reduce(self.confusion, reduce_op="sum")
        if confusion.sum() > 0:
            scores = classification_scores(confusion)
            self.log_dict({f"{part}_{name}": value for name, value in scores.items()}, rank_zero_only=False)


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the counts of (label, prediction) pairs, (K, K) int64, of logits (B, K); without unlabelled crops."""
    return multiclass_confusion_matrix(
        logits.argmax(1), labels, logits.shape[1], ignore_index=UNLABELLED, validate_args=False
    )


def classification_scores(confusion: Tensor) -> dict[str, float]:
    """Return accuracy, balanced accuracy, macro and weighted F1 of a confusion matrix (labels × predictions).

    Means are taken over the classes that have labels, as in scikit-learn with ``labels=np.unique(y_true)``.
    """
    confusion = confusion.double()
    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    total, present = support.sum().clamp_min(1), support > 0
    f1 = 2 * hits / (support + predicted).clamp_min(1)
    recall = hits / support.clamp_min(1)
    n_present = present.sum().clamp_min(1)
    return {
        "accuracy": float(hits.sum() / total),
        "balanced_accuracy": float(recall[present].sum() / n_present),
        "macro_f1": float(f1[present].sum() / n_present),
        "weighted_f1": float((f1 * support).sum() / total),
    }
