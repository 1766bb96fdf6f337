"""Attribute a model's output to patches and channels, by gradients along a path, a single gradient, or occlusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cellvim.attribution.baselines import Inputs, check_inputs, in_evaluation
from cellvim.attribution.targets import Target, target_function
from cellvim.errors import InputError, listing, suggestion

if TYPE_CHECKING:
    from cellvim.models.encoder import Encoder
    from cellvim.models.patch_embed import Channels

METHODS = ("integrated_gradients", "gradient_times_input", "occlusion")


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each patch of each channel contributed to one number of the output.

    Attributes
    ----------
    patches
        (B, C, rows, columns) float64, signed; a patch is that of the model's grid.
    channels
        (B, C) float64, signed. With gradients the sum over the patches. With occlusion what is lost with the whole
        channel, which is not the sum of its patches, as they stand in for each other.
    output, baseline_output
        (B,) float64: the number explained, of the image and of its baseline.
    method, target
        How, and of what.
    patch_px
        Distance from patch to patch in pixels of the input.
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
        """(B, C): the absolute contribution of each channel by that of all; zero where nothing contributed."""
        size = np.abs(self.channels)
        total = size.sum(1, keepdims=True)
        return np.divide(size, total, out=np.zeros_like(size), where=total > 0)

    @property
    def residual(self) -> np.ndarray:
        """(B,): output − baseline output − the sum of the patches; near 0 for integrated gradients."""
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
    """Attribute one number of the output to the patches and channels of the input.

    Parameters
    ----------
    model
        Any `Encoder`; it is run in evaluation and left as it was.
    images
        (B, C, H, W), normalised as for the model.
    channels
        Ids or names of the images' channels, as for `Encoder.forward`.
    target
        What is explained: "embedding", the distance by which the image moved the embedding away from the baseline's;
        the number of a class, for its logit; or a direction (D,) in the embedding, such as the mean of a treatment
        less that of the controls, for the embedding's component along it.
    method
        "integrated_gradients": gradients along the straight path from the baseline, times the way: they sum to output −
        baseline output. "gradient_times_input": the gradient at the image alone, times the way: fast and local.
        "occlusion": what the output loses when a patch, or a whole channel, is replaced by the baseline.
    baseline
        What "nothing there" is: anything that expands to the images' shape. None for 0, the darkest pixels.
    steps
        Points of the path (Gauss–Legendre), for integrated gradients.
    batch_size
        Images that the model sees at once.

    Returns
    -------
    Attribution

    Raises
    ------
    CellvimError
        Something given does not fit the model.

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
            points, weights = _path(steps) if method == "integrated_gradients" else (np.ones(1), np.ones(1))
            pixels = _path_gradients(inputs, function, points, weights, batch_size)
            patches = inputs.patch_sums(pixels)
            by_channel = patches.sum((2, 3))
    what = target if isinstance(target, str) else f"class {target}" if np.ndim(target) == 0 else "direction"
    arrays = (tensor.cpu().numpy() for tensor in (patches, by_channel, output, of_baseline))
    return Attribution(*arrays, method=method, target=what, patch_px=model.config.stride)


def _path(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of the Gauss–Legendre quadrature on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return (points + 1) / 2, weights / 2


def _path_gradients(
    inputs: Inputs,
    function: Callable[[Tensor, Tensor], Tensor],
    points: np.ndarray,
    weights: np.ndarray,
    batch_size: int,
) -> Tensor:
    """(B, C, H, W) float64: the way from the baseline times the mean gradient along it."""
    way = inputs.images - inputs.baseline
    total = torch.zeros_like(way, dtype=torch.float64)
    row, point = (n.ravel() for n in np.indices((len(way), len(points))))
    for first in range(0, len(row), batch_size):
        rows = torch.from_numpy(row[first : first + batch_size]).to(way.device)
        where = point[first : first + batch_size]
        at = torch.as_tensor(points[where], dtype=way.dtype, device=way.device)[:, None, None, None]
        weight = torch.as_tensor(weights[where], dtype=torch.float64, device=way.device)[:, None, None, None]
        with torch.enable_grad():
            images = (inputs.baseline[rows] + at * way[rows]).requires_grad_()
            (gradient,) = torch.autograd.grad(function(images, rows).sum(), images)
        total.index_add_(0, rows, gradient.double() * weight)
    return total * way.double()


def _occlusion(
    inputs: Inputs, function: Callable[[Tensor, Tensor], Tensor], output: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """(B, C, rows, columns) and (B, C) float64: what the output loses without a patch, and without a channel."""
    n_images, n_channels = inputs.images.shape[:2]
    masks = inputs.patch_masks()
    masks = torch.cat([masks, torch.ones_like(masks[:1])])  # the last one: the whole channel
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
