"""Exponential moving average of the weights."""

from __future__ import annotations

from lightning.pytorch.callbacks import EMAWeightAveraging


class WeightAverage(EMAWeightAveraging):
    """Lightning's moving average of the weights, with the decay of the recipes.

    The average is updated after every optimiser step; it is evaluated, saved and exported instead of the weights.
    Checkpoints contain both.

    Parameters
    ----------
    decay
        Fraction of the average that is kept at each step.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__(decay=decay)
