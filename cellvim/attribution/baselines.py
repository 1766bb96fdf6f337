"""What an attribution starts from: the images, the baseline that they are compared with, and the patches of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellvim.errors import InputError
from cellvim.models.encoder import Encoder
from cellvim.models.patch_embed import Channels, check_images, resolve_channels


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images, the baseline that each is compared with, and the model that sees them. Made by `check_inputs`.

    Attributes
    ----------
    model
        In evaluation.
    images, baseline
        (B, C, H, W), of the model's type and on its device.
    channels
        As for `Encoder.forward`.
    """

    model: Encoder
    images: Tensor
    baseline: Tensor
    channels: Channels

    def features(self, images: Tensor) -> Tensor:
        """Return (n, D) features of (n, C, H, W) images."""
        return self.model.forward_features(images, channels=self.channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.config.grid_size(*self.images.shape[-2:])

    def patch_sums(self, pixels: Tensor) -> Tensor:
        """Sum pixels (…, H, W) over the patches, (…, rows, columns); every pixel counts once, also in overlaps."""
        rows, columns = self.grid
        y, x = (_patch_of(n, m, self.model.config.stride, pixels.device) for n, m in self._sides())
        summed = pixels.new_zeros(*pixels.shape[:-2], rows, pixels.shape[-1]).index_add(-2, y, pixels)
        return summed.new_zeros(*summed.shape[:-1], columns).index_add(-1, x, summed)

    def patch_masks(self) -> Tensor:
        """Return (rows · columns, H, W) bool: the pixels of each patch, row by row."""
        y, x = (_patch_of(n, m, self.model.config.stride, self.images.device) for n, m in self._sides())
        number = y[:, None] * self.grid[1] + x  # (H, W)
        return number == torch.arange(self.grid[0] * self.grid[1], device=number.device)[:, None, None]

    def _sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        height, width = self.images.shape[-2:]
        return (height, self.grid[0]), (width, self.grid[1])


def _patch_of(length: int, count: int, stride: int, device: torch.device) -> Tensor:
    """(length,) the patch that a row or column of pixels is counted to."""
    return (torch.arange(length, device=device) // stride).clamp_max(count - 1)


def check_inputs(model: Encoder, images: Tensor | np.ndarray, channels: Channels, baseline: object) -> Inputs:
    """Return the images and their baseline as the model takes them.

    Parameters
    ----------
    model, images, channels, baseline
        As in `cellvim.attribution.attribute`.

    Raises
    ------
    InputError, ChannelError
        The images, their channels or the baseline do not fit the model.
    """
    if not isinstance(model, Encoder):
        raise InputError(f"An attribution needs an Encoder; found a {type(model).__name__}.")
    weight = model.patch_embed.proj.weight
    images = torch.as_tensor(images)
    if images.is_floating_point():
        images = images.to(weight.device, weight.dtype)
    check_images(images, weight.dtype)
    resolve_channels(channels, images, model.config)
    if not bool(images.isfinite().all()):
        raise InputError("The images hold NaN or infinite pixels; expected finite, normalised ones.")
    if baseline is None:
        return Inputs(model, images, torch.zeros_like(images), channels)
    baseline = torch.as_tensor(baseline).to(images)
    try:
        baseline = baseline.expand(images.shape)
    except RuntimeError:
        raise InputError(
            f"The baseline has the shape {tuple(baseline.shape)}; expected that of the images, "
            f"{tuple(images.shape)}, or one that is repeated to it, such as a number or (C, 1, 1)."
        ) from None
    return Inputs(model, images, baseline, channels)


@contextmanager
def in_evaluation(model: Encoder) -> Iterator[None]:
    """Run a model without dropout and channel sampling, and leave every part in the mode that it was in."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
