"""Attribute the output of a model to patches and channels, by integrated gradients, gradient × input, or occlusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cellvim.errors import InputError, ModelError, listing, suggestion
from cellvim.models.encoder import Encoder
from cellvim.models.patch_embed import Channels, check_images, resolve_channels

Target = str | int | np.ndarray | Tensor
Function = Callable[[Tensor, Tensor], Tensor]  # images (n, C, H, W) and their row numbers (n,) -> (n,)
METHODS = ("integrated_gradients", "gradient_times_input", "occlusion")


@dataclass(frozen=True, eq=False)
class Attribution:
    """Contribution of each patch of each channel to a scalar function of the output.

    Attributes
    ----------
    patches
        (B, C, rows, columns) float64, signed; the patches of the model's grid.
    channels
        (B, C) float64, signed. For gradients, the sum over the patches. For occlusion, the decrease without the entire
        channel, which differs from the sum because patches are redundant.
    output, baseline_output
        (B,) float64: the value for the image and for its baseline.
    method, target
        Method and target of the attribution.
    patch_px
        Distance between patches in pixels of the input.
    """

    patches: np.ndarray
    channels: np.ndarray
    output: np.ndarray
    baseline_output: np.ndarray
    method: str
    target: str
    patch_px: int

    @property
    def channel_share(self) -> np.ndarray:
        """(B, C): absolute contribution of each channel relative to the sum of all; zero without contributions."""
        size = np.abs(self.channels)
        total = size.sum(1, keepdims=True)
        return np.divide(size, total, out=np.zeros_like(size), where=total > 0)

    @property
    def residual(self) -> np.ndarray:
        """(B,): output − baseline output − sum of the patches; near 0 for integrated gradients."""
        return self.output - self.baseline_output - self.patches.sum((1, 2, 3))


def attribute(
    model: Encoder,
    images: Tensor | np.ndarray,
    *,
    channels: Channels = None,
    target: Target = "embedding",
    method: str = "integrated_gradients",
    baseline: Tensor | np.ndarray | float | None = None,
    steps: int = 32,
    batch_size: int = 32,
) -> Attribution:
    """Attribute a scalar function of the output to the patches and channels of the input.

    Parameters
    ----------
    model
        Any `Encoder`; it is run in evaluation mode, and its mode is restored.
    images
        (B, C, H, W), normalised as for the model.
    channels
        Ids or names of the channels, as for `Encoder.forward`.
    target
        "embedding": the distance of the embedding from that of the baseline. A class number: its logit. A direction
        (D,) in the embedding, such as the mean of a treatment minus that of the controls: the component along it.
    method
        "integrated_gradients": gradients averaged along the straight path from the baseline to the image, times the
        difference of image and baseline; they sum to output − baseline output. "gradient_times_input": the gradient at
        the image, times the difference; fast and local. "occlusion": decrease of the output when a patch, or a channel,
        is replaced by the baseline.
    baseline
        Reference image, in any shape that expands to that of the images; by default 0, the darkest pixels.
    steps
        Number of points on the path (Gauss–Legendre), for integrated gradients.
    batch_size
        Number of images per forward pass.

    Returns
    -------
    Attribution

    Raises
    ------
    CellvimError
        An argument does not fit the model.

    References
    ----------
    Sundararajan, Taly, Yan, "Axiomatic attribution for deep networks", ICML 2017; Zeiler, Fergus, "Visualizing and
    understanding convolutional networks", ECCV 2014 (occlusion).
    """
    if method not in METHODS:
        raise InputError(
            f"The method '{method}' is not known; expected {listing(METHODS)}.{suggestion(method, METHODS)}"
        )
    for name, number in (("steps", steps), ("batch_size", batch_size)):
        if number < 1:
            raise InputError(f"{name} is {number}; expected at least 1.")
    inputs = check_inputs(model, images, channels, baseline)
    with in_evaluation(model):
        function = target_function(inputs, target)
        rows = torch.arange(len(inputs.images), device=inputs.images.device)
        with torch.no_grad():
            output, of_baseline = (function(pixels, rows).double() for pixels in (inputs.images, inputs.baseline))
        if method == "occlusion":
            patches, by_channel = _occlusion(inputs, function, output, batch_size)
        else:
            points, weights = np.ones(1), np.ones(1)
            if method == "integrated_gradients":
                points, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
                points, weights = (points + 1) / 2, weights / 2
            pixels = _path_gradients(inputs, function, points, weights, batch_size)
            patches = inputs.patch_sums(pixels)
            by_channel = patches.sum((2, 3))
    what = target if isinstance(target, str) else f"class {target}" if np.ndim(target) == 0 else "direction"
    arrays = (tensor.cpu().numpy() for tensor in (patches, by_channel, output, of_baseline))
    return Attribution(*arrays, method=method, target=what, patch_px=model.config.stride)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A model, images and their baselines. Returned by `check_inputs`.

    Attributes
    ----------
    model
        The model.
    images, baseline
        (B, C, H, W), with the type and on the device of the model.
    channels
        As for `Encoder.forward`.
    """

    model: Encoder
    images: Tensor
    baseline: Tensor
    channels: Channels

    def features(self, images: Tensor) -> Tensor:
        """Return the features of images (n, C, H, W), (n, D)."""
        return self.model.forward_features(images, channels=self.channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of patches."""
        return self.model.config.grid_size(*self.images.shape[-2:])

    def patch_sums(self, pixels: Tensor) -> Tensor:
        """Sum pixels (…, H, W) by patch, (…, rows, columns); with overlapping patches, each pixel is counted once."""
        rows, columns = self.grid
        y, x = self._patch_of_pixels()
        summed = pixels.new_zeros(*pixels.shape[:-2], rows, pixels.shape[-1]).index_add(-2, y, pixels)
        return summed.new_zeros(*summed.shape[:-1], columns).index_add(-1, x, summed)

    def patch_masks(self) -> Tensor:
        """Return the pixels of each patch as masks, (rows · columns, H, W)."""
        y, x = self._patch_of_pixels()
        number = y[:, None] * self.grid[1] + x  # (H, W)
        return number == torch.arange(self.grid[0] * self.grid[1], device=number.device)[:, None, None]

    def _patch_of_pixels(self) -> tuple[Tensor, Tensor]:
        """Return the row of patches of each row of pixels (H,), and the column of each column (W,)."""
        stride, device = self.model.config.stride, self.images.device
        y, x = (
            (torch.arange(length, device=device) // stride).clamp_max(count - 1)
            for length, count in zip(self.images.shape[-2:], self.grid, strict=True)
        )
        return y, x


def check_inputs(model: Encoder, images: Tensor | np.ndarray, channels: Channels, baseline: object) -> Inputs:
    """Return the images and baselines in the type and on the device of the model; raise if they do not fit it."""
    if not isinstance(model, Encoder):
        raise InputError(f"An attribution requires an Encoder; found a {type(model).__name__}.")
    weight = model.patch_embed.proj.weight
    images = torch.as_tensor(images)
    if images.is_floating_point():
        images = images.to(weight.device, weight.dtype)
    check_images(images, weight.dtype)
    resolve_channels(channels, images, model.config)
    if not bool(images.isfinite().all()):
        raise InputError("The images have NaN or infinite pixels; expected finite, normalised pixels.")
    if baseline is None:
        return Inputs(model, images, torch.zeros_like(images), channels)
    baseline = torch.as_tensor(baseline).to(images)
    try:
        baseline = baseline.expand(images.shape)
    except RuntimeError:
        raise InputError(
            f"The baseline has the shape {tuple(baseline.shape)}; expected that of the images, {tuple(images.shape)}, "
            "or one that expands to it, such as a number or (C, 1, 1)."
        ) from None
    return Inputs(model, images, baseline, channels)


@contextmanager
def in_evaluation(model: Encoder) -> Iterator[None]:
    """Run a model without dropout and channel sampling, and restore the mode of all modules."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def target_function(inputs: Inputs, target: Target) -> Function:
    """Return a function of images (n, C, H, W) and of (n,), the rows of ``inputs`` that they are variants of.

    Raises
    ------
    InputError, ModelError
        The target, as in `attribute`, is not valid for the model.
    """
    model = inputs.model
    if model.config.readout == "tokens":
        raise ModelError("The model returns tokens (readout='tokens'); attribution requires one row per image.")

    def along(direction: Tensor) -> Function:
        return lambda images, rows: (inputs.features(images) * direction[rows]).sum(1)

    if isinstance(target, str):
        if target != "embedding":
            raise InputError(f"The target '{target}' is not known; expected embedding, a class number or a direction.")
        with torch.no_grad():
            difference = inputs.features(inputs.images) - inputs.features(inputs.baseline)
        length = difference.norm(dim=1, keepdim=True)
        unit = difference / length.clamp_min(torch.finfo(difference.dtype).tiny)
        return along(torch.where(length > 0, unit, torch.zeros_like(unit)))
    if isinstance(target, int | np.integer) and not isinstance(target, bool):
        count = model.config.num_classes
        if not count:
            raise ModelError("The model has no classes (num_classes=0); attribute its embedding, or a direction in it.")
        if not 0 <= target < count:
            raise InputError(f"The model has no class {target}; expected 0 to {count - 1}.")
        return lambda images, rows: model(images, channels=inputs.channels)[:, int(target)]
    direction = torch.as_tensor(target).to(inputs.images)
    if direction.shape != (model.config.embed_dim,) or not bool(direction.isfinite().all()):
        raise InputError(
            f"The direction has the shape {tuple(direction.shape)}; expected {model.config.embed_dim} finite numbers, "
            "one per feature of the embedding."
        )
    return along(direction.expand(len(inputs.images), -1))


def _path_gradients(
    inputs: Inputs, function: Function, points: np.ndarray, weights: np.ndarray, batch_size: int
) -> Tensor:
    """(B, C, H, W) float64: the difference from the baseline times the mean gradient along the path."""
    difference = inputs.images - inputs.baseline
    total = torch.zeros_like(difference, dtype=torch.float64)
    row, point = (n.ravel() for n in np.indices((len(difference), len(points))))
    for first in range(0, len(row), batch_size):
        rows = torch.from_numpy(row[first : first + batch_size]).to(difference.device)
        where = point[first : first + batch_size]
        at = torch.as_tensor(points[where], dtype=difference.dtype, device=difference.device)[:, None, None, None]
        weight = torch.as_tensor(weights[where], dtype=torch.float64, device=difference.device)[:, None, None, None]
        with torch.enable_grad():
            images = (inputs.baseline[rows] + at * difference[rows]).requires_grad_()
            (gradient,) = torch.autograd.grad(function(images, rows).sum(), images)
        total.index_add_(0, rows, gradient.double() * weight)
    return total * difference.double()


def _occlusion(inputs: Inputs, function: Function, output: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """(B, C, rows, columns) and (B, C) float64: decrease of the output without a patch, and without a channel."""
    n_images, n_channels = inputs.images.shape[:2]
    masks = inputs.patch_masks()
    masks = torch.cat([masks, torch.ones_like(masks[:1])])  # the last mask: the entire channel
    lost = output.new_empty(n_images * n_channels * len(masks))
    numbers = torch.arange(len(lost), device=lost.device)
    with torch.no_grad():
        for some in numbers.split(batch_size):
            rows, rest = some // (n_channels * len(masks)), some % (n_channels * len(masks))
            channel, mask = rest // len(masks), rest % len(masks)
            images = inputs.images[rows]  # a copy
            one = torch.arange(len(some), device=some.device)
            images[one, channel] = torch.where(masks[mask], inputs.baseline[rows, channel], images[one, channel])
            lost[some] = output[rows] - function(images, rows).double()
    lost = lost.view(n_images, n_channels, len(masks))
    return lost[:, :, :-1].unflatten(2, inputs.grid).contiguous(), lost[:, :, -1].contiguous()
