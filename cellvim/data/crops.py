"""Cutting crops: windows of one size around cells or tiles, from a whole field at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellvim.errors import InputError


@dataclass(frozen=True)
class CropSpec:
    """What one embedding is of: a ``cell`` or a ``tile`` of ``size_px`` pixels, or the whole ``field``.

    Raises
    ------
    InputError
        The unit is none of these, or a cell or tile has no positive size.
    """

    unit: str
    size_px: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in ("cell", "tile", "field"):
            raise InputError(f"--unit '{self.unit}' is not known; choose cell, tile or field.")
        if self.unit != "field" and (self.size_px is None or self.size_px < 1):
            raise InputError(f"A {self.unit} needs a crop size of at least 1 px; found {self.size_px}.")


def cut_crops(image: np.ndarray, centers: np.ndarray, size_px: int) -> np.ndarray:
    """Cut one window around each center; what lies outside of the field is zero.

    A window of S pixels has its pixel S // 2 on the center rounded to the nearest pixel.

    Parameters
    ----------
    image
        (C, H, W), any type.
    centers
        (n, 2) as (y, x) in pixels, where pixel 0's middle is 0.0.
    size_px
        S.

    Returns
    -------
    np.ndarray
        (n, C, S, S), contiguous, of the image's type.

    Raises
    ------
    ValueError
        A shape does not fit, or a center is not finite.
    """
    centers = np.asarray(centers, dtype=np.float64).reshape(-1, 2)
    if image.ndim != 3 or size_px < 1:
        raise ValueError(f"expected an image (C, H, W) and a size of at least 1, not {image.shape} and {size_px}")
    if not np.isfinite(centers).all():
        raise ValueError("every center must be finite")
    n_channels, height, width = image.shape
    if not len(centers):
        return np.empty((0, n_channels, size_px, size_px), image.dtype)
    first = np.floor(centers + 0.5).astype(np.int64) - size_px // 2  # top left pixel of each window
    before = np.maximum(0, -first.min(axis=0))
    after = np.maximum(0, first.max(axis=0) + size_px - (height, width))
    if before.any() or after.any():
        too_far = int(max(before.max(), after.max()))
        if too_far > size_px:  # such a window would be all zero, and its padding could be of any size
            raise ValueError(f"a center lies {too_far - size_px} px or more outside of the field of {height} x {width}")
        image = np.pad(image, ((0, 0), (before[0], after[0]), (before[1], after[1])))
        first = first + before
    windows = np.lib.stride_tricks.sliding_window_view(image, (size_px, size_px), axis=(1, 2))
    return np.ascontiguousarray(windows.transpose(1, 2, 0, 3, 4)[first[:, 0], first[:, 1]])  # (n, C, S, S)


def tile_centers(height: int, width: int, size_px: int, stride_px: int | None = None) -> np.ndarray:
    """Return the centers of tiles that together cover every pixel of a field.

    Tiles start every ``stride_px`` pixels; the last one of a row or column is moved back to end with the field, so
    no tile reaches beyond it unless the field is smaller than a tile.

    Parameters
    ----------
    height, width
        Of the field, px.
    size_px
        Side of a tile.
    stride_px
        Distance between tiles, at most ``size_px``; ``size_px`` if None (no overlap but the last one's).

    Returns
    -------
    np.ndarray
        (n, 2) float64 as (y, x), for `cut_crops`, row by row.

    Raises
    ------
    InputError
        The stride is not between 1 and the size: the field would not be covered.
    """
    stride_px = size_px if stride_px is None else stride_px
    if size_px < 1 or not 1 <= stride_px <= size_px:
        raise InputError(
            f"Tiles of {size_px} px every {stride_px} px do not cover a field; choose 1 <= stride <= size."
        )

    def starts(length: int) -> np.ndarray:
        last = max(0, length - size_px)
        return np.unique(np.append(np.arange(0, last + 1, stride_px), last))

    y, x = np.meshgrid(starts(height), starts(width), indexing="ij")
    return np.stack([y.ravel(), x.ravel()], axis=1).astype(np.float64) + size_px // 2


def resize_crops(crops: np.ndarray, size_px: int) -> np.ndarray:
    """Resample crops to the side that a model expects, bilinearly and without aliasing when shrinking.

    Parameters
    ----------
    crops
        (n, C, S, S) float32.
    size_px
        The new side.

    Returns
    -------
    np.ndarray
        (n, C, size_px, size_px) float32; the same array if it has that size already.
    """
    if crops.shape[-2:] == (size_px, size_px):
        return crops
    if not len(crops):
        return np.empty((*crops.shape[:2], size_px, size_px), crops.dtype)
    import torch

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(crops, dtype=np.float32)),
        size=(size_px, size_px),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    return resized.numpy()
