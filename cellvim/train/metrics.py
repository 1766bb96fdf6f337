"""Accuracy and F1 from a confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Count (label, prediction) pairs, (n_classes, n_classes) int64; rows with a label below 0 do not count."""
    known = labels >= 0
    index = labels[known] * n_classes + predicted[known]
    return torch.bincount(index, minlength=n_classes**2).view(n_classes, n_classes)


def classification_scores(confusion: Tensor) -> dict[str, float]:
    """Return accuracy, balanced accuracy, macro and weighted F1 of a confusion matrix (labels × predictions).

    Classes without a label do not count in the means, as in scikit-learn when ``labels`` are those present.
    """
    confusion = confusion.double()
    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    total = support.sum().clamp_min(1)
    present = support > 0
    f1 = 2 * hits / (support + predicted).clamp_min(1)
    recall = hits / support.clamp_min(1)
    n = present.sum().clamp_min(1)
    return {
        "accuracy": float(hits.sum() / total),
        "balanced_accuracy": float(recall[present].sum() / n),
        "macro_f1": float(f1[present].sum() / n),
        "weighted_f1": float((f1 * support).sum() / total),
    }
