"""Exponential average of the weights: evaluated, saved and exported in their place."""

from __future__ import annotations

from lightning.pytorch.callbacks import EMAWeightAveraging


class WeightAverage(EMAWeightAveraging):
    """Lightning's exponential average with the recipes' decay; updated after every step of the optimiser.

    Checkpoints hold both the average and the weights that training goes on with.

    Parameters
    ----------
    decay
        Share of the average that stays at each step.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__(decay=decay)
