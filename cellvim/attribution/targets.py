"""The one number of a model's output that an attribution explains: a distance, a direction or a class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cellvim.attribution.baselines import Inputs
from cellvim.errors import InputError, ModelError

Target = str | int | np.ndarray | Tensor


def target_function(inputs: Inputs, target: Target) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (images (n, C, H, W), their row numbers (n,)) -> (n,) that is to be explained.

    Parameters
    ----------
    inputs
        The model, its images and their baselines. A row number says which of these images another one is a variant of.
    target
        As in `cellvim.attribution.attribute`.

    Raises
    ------
    InputError, ModelError
        The target is none, or the model cannot give it.
    """
    model = inputs.model
    if model.config.readout == "tokens":
        raise ModelError("The model gives every token (readout='tokens'); attribution needs one row an image.")
    if isinstance(target, str):
        if target != "embedding":
            raise InputError(f"The target '{target}' is not known; expected embedding, a class number or a direction.")
        return _along(inputs, _way_from_baseline(inputs))
    if isinstance(target, int | np.integer) and not isinstance(target, bool):
        return _class(inputs, int(target))
    direction = torch.as_tensor(target).to(inputs.images)
    if direction.shape != (model.config.embed_dim,) or not bool(direction.isfinite().all()):
        raise InputError(
            f"The direction has the shape {tuple(direction.shape)}; expected {model.config.embed_dim} finite numbers, "
            "one a feature of the embedding."
        )
    return _along(inputs, direction.expand(len(inputs.images), -1))


def _way_from_baseline(inputs: Inputs) -> Tensor:
    """(B, D): the unit vector from the baseline's embedding to the image's; zero where they are the same."""
    with torch.no_grad():
        way = inputs.features(inputs.images) - inputs.features(inputs.baseline)
        length = way.norm(dim=1, keepdim=True)
        return torch.where(length > 0, way / length.clamp_min(torch.finfo(way.dtype).tiny), torch.zeros_like(way))


def _along(inputs: Inputs, direction: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, rows: (inputs.features(images) * direction[rows]).sum(1)


def _class(inputs: Inputs, number: int) -> Callable[[Tensor, Tensor], Tensor]:
    count = inputs.model.config.num_classes
    if not count:
        raise ModelError("The model has no classes (num_classes=0); attribute its embedding, or a direction in it.")
    if not 0 <= number < count:
        raise InputError(f"Class {number} is not among the model's 0 to {count - 1}.")
    return lambda images, rows: inputs.model(images, channels=inputs.channels)[:, number]
