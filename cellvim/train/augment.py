"""Augmentation of batches on the device that trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cellvim.errors import InputError

Operation = Callable[[Tensor, Tensor], Tensor]  # of RandAugment: images (B, 3, H, W) and level, (B, 1, 1, 1) in ± 0.3


@dataclass
class Augmentation:
    """Settings of the augmentation of training images. For evaluation, the central window is used.

    Parameters
    ----------
    pad_to
        Size to which smaller images are padded with 0 before a random window of the model's size is cut.
    resized_crop
        Range of the window's area as a fraction of the image's, (min, max): the window is resized to the model's size.
    flips, vertical_flips, quarter_turns
        Whether to mirror left to right, mirror top to bottom, and rotate by multiples of 90°.
    intensity
        Values of each channel are multiplied by exp(u), u uniform in ± this value.
    defocus, defocus_radius
        Probability of blurring with a disc, and its maximum radius in pixels.
    coarse_dropout, holes, hole_size
        Probability of setting squares to 0, their maximum number, and their maximum side in pixels.
    rand_augment
        Number of RandAugment operations; 0 for none. Requires values in [0, 1] and three channels.
    erasing
        Probability of random erasing: setting a rectangle to 0.
    mixup, cutmix
        Parameters α of the Beta distributions; 0 for none. With both, one of them is drawn for each batch.

    References
    ----------
    Cubuk et al., RandAugment (2020); Zhong et al., Random Erasing (2020); Zhang et al., mixup (2018); Yun et al.,
    CutMix (2019).
    """

    pad_to: int | None = None
    resized_crop: tuple[float, float] | None = None
    flips: bool = True
    vertical_flips: bool = True
    quarter_turns: bool = True
    intensity: float = 0.0
    defocus: float = 0.0
    defocus_radius: int = 3
    coarse_dropout: float = 0.0
    holes: int = 8
    hole_size: int = 8
    rand_augment: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("defocus", "coarse_dropout", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augmentation.{name} is {getattr(self, name)}; expected a probability, 0 to 1.")
        for name in ("intensity", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise InputError(f"augmentation.{name} is {getattr(self, name)}; expected 0 or more.")

    @torch.no_grad()
    def apply(self, images: Tensor, size: int) -> Tensor:
        """Augment every image independently with torch's generator: (B, C, H, W) -> (B, C, size, size)."""
        if self.resized_crop is not None:
            images = random_resized_crop(images, size, self.resized_crop)
        else:
            images = random_window(pad_to_size(images, max(self.pad_to or 0, size)), size)
        if self.flips:
            images = random_flips(images, -1)
        if self.vertical_flips:
            images = random_flips(images, -2)
        if self.quarter_turns:
            images = random_quarter_turns(images)
        if self.intensity:
            gain = torch.empty(*images.shape[:2], 1, 1, device=images.device).uniform_(-1, 1)
            images = images * (gain * self.intensity).exp()
        if self.defocus:
            images = random_defocus(images, self.defocus, self.defocus_radius)
        if self.coarse_dropout:
            images = random_holes(images, self.coarse_dropout, self.holes, self.hole_size)
        if self.rand_augment:
            images = rand_augment(images, self.rand_augment)
        return random_erasing(images, self.erasing) if self.erasing else images


def pad_to_size(images: Tensor, size: int) -> Tensor:
    """Pad images (B, C, H, W) with 0 on all sides to at least ``size`` x ``size``."""
    height, width = (max(0, size - n) for n in images.shape[-2:])
    if not height and not width:
        return images
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def middle_window(images: Tensor, size: int) -> Tensor:
    """Cut the central window (B, C, size, size), padded with 0 where images are smaller."""
    images = pad_to_size(images, size)
    top, left = ((n - size) // 2 for n in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def random_window(images: Tensor, size: int) -> Tensor:
    """Cut a window at a random position from every image, (B, C, H, W) -> (B, C, size, size)."""
    batch, channels, height, width = images.shape
    if (height, width) == (size, size):
        return images
    top = torch.randint(0, height - size + 1, (batch, 1, 1, 1), device=images.device)
    left = torch.randint(0, width - size + 1, (batch, 1, 1, 1), device=images.device)
    steps = torch.arange(size, device=images.device)
    index = (top + steps[:, None]) * width + left + steps  # (B, 1, size, size)
    flat = images.reshape(batch, channels, -1)
    return flat.gather(2, index.view(batch, 1, -1).expand(-1, channels, -1)).view(batch, channels, size, size)


def random_flips(images: Tensor, axis: int) -> Tensor:
    """Mirror every image along an axis with probability ½."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(axis), images)


def random_quarter_turns(images: Tensor) -> Tensor:
    """Rotate every image (B, C, S, S) by 0, 90, 180 or 270°."""
    turns = torch.randint(0, 4, (len(images), 1, 1, 1), device=images.device)
    turned = torch.where(turns >= 2, images.rot90(2, (-2, -1)), images)
    return torch.where(turns % 2 == 1, turned.rot90(1, (-2, -1)), turned)


def random_defocus(images: Tensor, probability: float, radius: int) -> Tensor:
    """Blur every image with a disc of a random radius up to ``radius`` pixels, with a probability."""
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    distance = (steps[:, None] ** 2 + steps**2).sqrt()
    radii = torch.rand(len(images), 1, 1, device=images.device) * radius
    radii = torch.where(torch.rand_like(radii) < probability, radii, 0.0)
    discs = (radii + 0.5 - distance).clamp(0, 1)  # antialiased
    discs = discs / discs.sum((-2, -1), keepdim=True)  # (B, k, k)
    batch, channels = images.shape[:2]
    kernels = discs.repeat_interleave(channels, 0)[:, None].to(images.dtype)
    padded = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    return F.conv2d(padded, kernels, groups=batch * channels).view_as(images)


def random_resized_crop(images: Tensor, size: int, area: tuple[float, float]) -> Tensor:
    """Cut a window with a random area fraction and aspect ratio (3/4 to 4/3) from every image, and resize it."""
    batch, _, height, width = images.shape
    side, ratio = _random_boxes(batch, area, (3 / 4, 4 / 3), images.device)
    tall, wide = (side * height / ratio).clamp(max=height) / height, (side * width * ratio).clamp(max=width) / width
    matrix = torch.zeros(batch, 2, 3, device=images.device)
    matrix[:, 0, 0], matrix[:, 1, 1] = wide, tall
    matrix[:, 0, 2] = (1 - wide) * (2 * torch.rand(batch, device=images.device) - 1)
    matrix[:, 1, 2] = (1 - tall) * (2 * torch.rand(batch, device=images.device) - 1)
    return _warp(images, matrix, size)


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Set a rectangle of 2 to 33% of the area to 0 in every image, with a probability."""
    batch, _, height, width = images.shape
    side, ratio = _random_boxes(batch, (0.02, 0.33), (0.3, 1 / 0.3), images.device)
    chosen = torch.rand(batch, device=images.device) < probability
    tall = torch.where(chosen, (side * height / ratio).round().clamp(max=height), 0)
    wide = torch.where(chosen, (side * width * ratio).round().clamp(max=width), 0)
    top = (torch.rand(batch, device=images.device) * (height - tall + 1)).floor()
    left = (torch.rand(batch, device=images.device) * (width - wide + 1)).floor()
    return _blank(images, *(v[:, None, None] for v in (top, left, tall, wide)))


def _random_boxes(
    batch: int, area: tuple[float, float], ratio: tuple[float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw the square root of the area fraction, and of the aspect ratio (log-uniform), (batch,) each."""
    side = torch.empty(batch, device=device).uniform_(*area).sqrt()
    return side, (torch.empty(batch, device=device).uniform_(*map(math.log, ratio)) / 2).exp()


def random_holes(images: Tensor, probability: float, most: int, size: int) -> Tensor:
    """Set up to ``most`` squares of up to ``size`` pixels a side to 0 in every image, with a probability."""
    batch, _, height, width = images.shape
    device = images.device
    count = torch.randint(1, most + 1, (batch, 1), device=device)
    count = torch.where(torch.rand(batch, 1, device=device) < probability, count, 0)
    side = torch.randint(1, size + 1, (batch, most), device=device)
    side = torch.where(torch.arange(most, device=device) < count, side, 0)[..., None]  # (B, most, 1)
    top = torch.randint(0, height, (batch, most, 1), device=device)
    left = torch.randint(0, width, (batch, most, 1), device=device)
    return _blank(images, top, left, side, side)


def _blank(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Set rectangles to 0 in all channels; their position and size are (B, n, 1)."""
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    in_rows = ((rows >= top) & (rows < top + height)).to(images.dtype)  # (B, n, H)
    in_columns = ((columns >= left) & (columns < left + width)).to(images.dtype)
    inside = torch.einsum("bnh,bnw->bhw", in_rows, in_columns) > 0
    return images.masked_fill(inside[:, None], 0.0)


def _warp(images: Tensor, matrix: Tensor, size: int | None = None) -> Tensor:
    """Resample images by affine matrices (B, 2, 3) in coordinates from -1 to 1, bilinearly, with 0 outside."""
    height, width = images.shape[-2:] if size is None else (size, size)
    grid = F.affine_grid(matrix.to(images.dtype), [*images.shape[:2], height, width], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def rand_augment(images: Tensor, operations: int) -> Tensor:
    """Apply random operations of `OPERATIONS` to every image (B, 3, H, W), after clamping to [0, 1].

    The magnitude is 9 of 30, with a random sign.
    """
    images = images.clamp(0, 1)
    for _ in range(operations):
        drawn = torch.randint(0, len(OPERATIONS), (len(images),), device=images.device)
        sign = 2.0 * torch.randint(0, 2, (len(images), 1, 1, 1), device=images.device) - 1
        changed = images.clone()
        for number, operation in enumerate(OPERATIONS):
            if (chosen := drawn == number).any():
                changed[chosen] = operation(images[chosen], sign[chosen] * 9 / 30).clamp(0, 1)
        images = changed
    return images


def _affine(*, degrees: float = 0, shear: tuple = (0, 0), shift: tuple = (0, 0)) -> Operation:
    """Return an operation that rotates, shears (x, y) and shifts (x, y) by the level times these values."""

    def operation(images: Tensor, level: Tensor) -> Tensor:
        level = level.flatten()
        angle = torch.deg2rad(degrees * level)
        cosine, sine = angle.cos(), angle.sin()
        rows = [cosine, shear[0] * level - sine, shift[0] * level, shear[1] * level + sine, cosine, shift[1] * level]
        return _warp(images, torch.stack(rows, 1).view(-1, 2, 3))

    return operation


def _blend(other: Callable[[Tensor], Tensor]) -> Operation:
    """Return an operation that moves images away from, or towards, a degenerate version of them."""
    return lambda images, level: (degenerate := other(images)) + (1 + 0.9 * level) * (images - degenerate)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def _smooth(images: Tensor) -> Tensor:
    kernel = torch.ones(3, 3, device=images.device, dtype=images.dtype)
    kernel[1, 1] = 5
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, (kernel / kernel.sum()).expand(3, 1, 3, 3), groups=3)


def _equalize(images: Tensor, level: Tensor) -> Tensor:
    bins = (images.flatten(2) * 255).long()  # (B, 3, H W)
    rows = bins.shape[0] * bins.shape[1]
    offset = 256 * torch.arange(rows, device=images.device).view(*bins.shape[:2], 1)
    counts = torch.bincount((bins + offset).flatten(), minlength=256 * rows).view(*bins.shape[:2], 256)
    below = (counts.cumsum(2) - counts / 2) / counts.sum(2, keepdim=True)
    return below.gather(2, bins).view_as(images).to(images.dtype)


def _auto_contrast(images: Tensor, level: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images)


OPERATIONS: tuple[Operation, ...] = (
    lambda images, level: images,
    lambda images, level: 1 - images,
    lambda images, level: torch.where(images >= 1 - level.abs(), 1 - images, images),  # solarize
    lambda images, level: (images * 255).div(2, rounding_mode="floor") * 2 / 255,  # posterize: 7 bits
    _auto_contrast,
    _equalize,
    _affine(degrees=30),
    _affine(shear=(0.3, 0)),
    _affine(shear=(0, 0.3)),
    _affine(shift=(0.9, 0)),  # by at most 45% of the side at magnitude 30
    _affine(shift=(0, 0.9)),
    _blend(_grey),  # saturation
    _blend(lambda images: _grey(images).mean((2, 3), keepdim=True)),  # contrast
    _blend(torch.zeros_like),  # brightness
    _blend(_smooth),  # sharpness
)


def mix(images: Tensor, targets: Tensor, settings: Augmentation) -> tuple[Tensor, Tensor]:
    """Mix every image and its soft target (B, K) with another of the batch, by mixup or CutMix."""
    if not settings.mixup and not settings.cutmix:
        return images, targets
    cut = bool(settings.cutmix) and (not settings.mixup or bool(torch.rand(()) < 0.5))
    alpha = settings.cutmix if cut else settings.mixup
    gamma = torch._standard_gamma(torch.tensor([alpha, alpha]))
    share = float(gamma[0] / gamma.sum())
    other = torch.randperm(len(images), device=images.device)
    if cut:
        height, width = images.shape[-2:]
        half = 0.5 * (1 - share) ** 0.5
        y, x = (float(v) for v in torch.rand(2))
        top, bottom = (round(max(0.0, min(1.0, y + s)) * height) for s in (-half, half))
        left, right = (round(max(0.0, min(1.0, x + s)) * width) for s in (-half, half))
        images = images.clone()
        images[..., top:bottom, left:right] = images[other][..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = share * images + (1 - share) * images[other]
    return images, share * targets + (1 - share) * targets[other]
