"""Augmentations, on the device: crops are already there as a batch, and nothing goes back to the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellvim.errors import InputError


@dataclass
class Augmentation:
    """What is done to training images; evaluation only cuts their middle.

    Parameters
    ----------
    pad_to
        Images smaller than this are padded with 0 before a random window of the model's size is cut.
    resized_crop
        Instead: cut a window of a random share of the area, in this range, and resize it.
    flips, vertical_flips, quarter_turns
        Mirror left to right, top to bottom, and turn by multiples of 90°.
    intensity
        Each channel's values are multiplied by exp(u), u uniform in ± this.
    defocus, defocus_radius
        Probability of a blur by a disc, and the largest radius in pixels.
    coarse_dropout, holes, hole_size
        Probability of blanking squares, their largest number and side in pixels.
    rand_augment
        Number of RandAugment's operations; 0 for none. Needs values in [0, 1] and three channels.
    erasing
        Probability of random erasing.
    mixup, cutmix
        Parameters α of the Beta distributions; 0 for none. With both, one of them is drawn for each batch.
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


class Augment(nn.Module):
    """Applies an `Augmentation`: images (B, C, H, W) of any size -> (B, C, size, size)."""

    def __init__(self, choices: Augmentation, size: int) -> None:
        super().__init__()
        self.choices, self.size = choices, size
        self.geometry, self.late = _kornia(choices, size)
        self.requires_grad_(False)  # kornia keeps probabilities as parameters; DDP would wait for their gradients

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Draw anew for every image, from torch's generator."""
        choices = self.choices
        if self.geometry is not None:
            images = self.geometry(images)
        else:
            images = random_window(pad_to_size(images, max(choices.pad_to or 0, self.size)), self.size)
        for axis, chosen in ((-1, choices.flips), (-2, choices.vertical_flips)):
            images = random_flips(images, axis) if chosen else images
        if choices.quarter_turns:
            images = random_quarter_turns(images)
        if choices.intensity:
            gain = torch.empty(*images.shape[:2], 1, 1, device=images.device).uniform_(-1, 1)
            images = images * (gain * choices.intensity).exp()
        if choices.defocus:
            images = random_defocus(images, choices.defocus, choices.defocus_radius)
        if choices.coarse_dropout:
            images = random_holes(images, choices.coarse_dropout, choices.holes, choices.hole_size)
        return self.late(images) if self.late is not None else images


def _kornia(choices: Augmentation, size: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The parts that kornia has: what replaces the random window, and what comes last."""
    if choices.resized_crop is None and not choices.rand_augment and not choices.erasing:
        return None, None
    import kornia.augmentation as K

    geometry = None
    if choices.resized_crop is not None:
        geometry = K.RandomResizedCrop((size, size), scale=tuple(choices.resized_crop), keepdim=True)
    late: list[nn.Module] = []
    if choices.rand_augment:
        late += [_Clamp(), K.auto.RandAugment(n=choices.rand_augment, m=9)]
    if choices.erasing:
        late.append(K.RandomErasing(p=choices.erasing, keepdim=True))
    return geometry, nn.Sequential(*late) if late else None


class _Clamp(nn.Module):
    """To what RandAugment's operations are defined on."""

    def forward(self, images: Tensor) -> Tensor:
        return images.clamp(0, 1)


def pad_to_size(images: Tensor, size: int) -> Tensor:
    """Pad images (B, C, H, W) with 0 around to at least ``size`` a side."""
    height, width = (max(0, size - n) for n in images.shape[-2:])
    if not height and not width:
        return images
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def middle_window(images: Tensor, size: int) -> Tensor:
    """Cut the middle (B, C, size, size), padded with 0 where images are smaller."""
    images = pad_to_size(images, size)
    top, left = ((n - size) // 2 for n in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def random_window(images: Tensor, size: int) -> Tensor:
    """Cut a window at a place of its own from every image, (B, C, H, W) -> (B, C, size, size)."""
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
    """Mirror along an axis with probability ½, image by image."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(axis), images)


def random_quarter_turns(images: Tensor) -> Tensor:
    """Turn square images by 0, 90, 180 or 270°."""
    turns = torch.randint(0, 4, (len(images), 1, 1, 1), device=images.device)
    turned = torch.where(turns >= 2, images.rot90(2, (-2, -1)), images)
    return torch.where(turns % 2 == 1, turned.rot90(1, (-2, -1)), turned)


def random_defocus(images: Tensor, probability: float, radius: int) -> Tensor:
    """Blur by a disc of a random radius up to ``radius`` pixels, image by image."""
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    distance = (steps[:, None] ** 2 + steps**2).sqrt()
    radii = torch.rand(len(images), 1, 1, device=images.device) * radius
    radii = torch.where(torch.rand_like(radii) < probability, radii, 0.0)
    discs = (radii + 0.5 - distance).clamp(0, 1)  # soft at the rim
    discs = discs / discs.sum((-2, -1), keepdim=True)  # (B, k, k)
    batch, channels = images.shape[:2]
    kernels = discs.repeat_interleave(channels, 0)[:, None].to(images.dtype)
    padded = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    return F.conv2d(padded, kernels, groups=batch * channels).view_as(images)


def random_holes(images: Tensor, probability: float, most: int, size: int) -> Tensor:
    """Set up to ``most`` squares of up to ``size`` pixels a side to 0, in all channels."""
    batch, _, height, width = images.shape
    device = images.device
    count = torch.randint(1, most + 1, (batch, 1), device=device)
    count = torch.where(torch.rand(batch, 1, device=device) < probability, count, 0)
    side = torch.randint(1, size + 1, (batch, most), device=device)
    side = torch.where(torch.arange(most, device=device) < count, side, 0)[..., None]  # (B, holes, 1)
    top = torch.randint(0, height, (batch, most, 1), device=device)
    left = torch.randint(0, width, (batch, most, 1), device=device)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows = ((rows >= top) & (rows < top + side)).to(images.dtype)  # (B, holes, H)
    in_columns = ((columns >= left) & (columns < left + side)).to(images.dtype)
    hole = torch.einsum("bnh,bnw->bhw", in_rows, in_columns) > 0
    return images.masked_fill(hole[:, None], 0.0)


def mix(images: Tensor, targets: Tensor, choices: Augmentation) -> tuple[Tensor, Tensor]:
    """Mix every image and its soft target (B, K) with another of the batch, by mixup or cutmix.

    References
    ----------
    Zhang et al., mixup (2018); Yun et al., CutMix (2019).
    """
    if not choices.mixup and not choices.cutmix:
        return images, targets
    cut = bool(choices.cutmix) and (not choices.mixup or bool(torch.rand(()) < 0.5))
    alpha = choices.cutmix if cut else choices.mixup
    share = float(_beta(alpha))
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


def _beta(alpha: float) -> Any:
    """Draw from Beta(α, α)."""
    a, b = torch._standard_gamma(torch.tensor([alpha, alpha]))
    return a / (a + b)
