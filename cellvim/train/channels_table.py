"""Accuracy by the number of channels: on all of them, and on every subset of each size (ChannelViT's table)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cellvim.errors import ModelError
from cellvim.train.metrics import classification_scores, confusion_matrix

if TYPE_CHECKING:
    import pandas as pd


@torch.inference_mode()
def evaluate_channel_subsets(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor, Sequence[int]]],
    *,
    most: int = 256,
    seed: int = 0,
) -> pd.DataFrame:
    """Classify with every subset of the channels.

    Parameters
    ----------
    model
        An `Encoder` with per-channel tokens and a head; put into evaluation mode.
    batches
        (images (B, C, H, W), labels (B,), channel ids (C,)), read once for each subset; all of the same channels.
    most
        Of the subsets of one size; where there are more, that many are drawn.
    seed
        Of that draw.

    Returns
    -------
    One row a subset: ``n_channels``, ``channels`` (names or numbers), ``accuracy``, ``balanced_accuracy``,
    ``macro_f1``, ``weighted_f1``.

    Raises
    ------
    ModelError
        The model has joint tokens: it needs all of its channels.

    References
    ----------
    Bao et al., Channel Vision Transformers (2024), Table 2.
    """
    import pandas as pd

    if model.config.tokens != "per_channel":
        raise ModelError("Channels can be left out of a model with per-channel tokens only; this one has joint tokens.")
    model.eval()
    generator = np.random.default_rng(seed)
    ids = list(batches[0][2])
    names = model.config.channel_names or tuple(map(str, range(model.config.in_channels)))
    rows = []
    for size in range(1, len(ids) + 1):
        for chosen in _subsets(len(ids), size, most, generator):
            counted = sum(
                confusion_matrix(
                    model(images[:, list(chosen)], channels=[ids[i] for i in chosen]).argmax(1),
                    labels,
                    model.config.num_classes,
                )
                for images, labels, _ in batches
            )
            rows.append(
                {"n_channels": size, "channels": ",".join(names[ids[i]] for i in chosen)}
                | classification_scores(counted)
            )
    return pd.DataFrame(rows)


def _subsets(count: int, size: int, most: int, generator: np.random.Generator) -> list[tuple[int, ...]]:
    if comb(count, size) <= most:
        return list(combinations(range(count), size))
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < most:
        drawn[tuple(sorted(generator.choice(count, size, replace=False).tolist()))] = None
    return list(drawn)


def summarize_channel_subsets(table: pd.DataFrame, score: str = "accuracy") -> pd.DataFrame:
    """Return mean and standard deviation of a score over the subsets of each size, and how many there were."""
    grouped = table.groupby("n_channels")[score]
    return grouped.agg(["mean", lambda v: v.std(ddof=0), "count"]).set_axis(["mean", "sd", "subsets"], axis=1)
