"""Cutting crops: windows of one size around cells or tiles, from a whole field at once, on the CPU or on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.errors import InputError

if TYPE_CHECKING:
    import torch

    from cellvim.data.normalize import IntensityScale

BORDERS = ("pad", "reflect", "shift", "drop")
CACHE_BYTES = 1 << 17  # of crops scaled at once: each pass finds them in the cache


@dataclass(frozen=True)
class CropSpec:
    """What one embedding is of: a ``cell`` or a ``tile`` of a given side, or the whole ``field``.

    Attributes
    ----------
    unit
        cell, tile or field.
    size_px
        Side of a crop in pixels: of the plate, or, with ``um_per_px``, of the resampled field.
    size_um
        Side of a crop in µm, instead of ``size_px``.
    um_per_px
        Common pixel size to which fields are resampled before anything is cut; None: as stored.
    overlap
        Of neighbouring tiles, as a share of their side: 0 to below 1.
    border
        What to do with a cell's window that reaches beyond the field: ``pad`` it with 0, ``reflect`` the image,
        ``shift`` the window inside, or ``drop`` the cell.
    mask_neighbours
        Set to 0 what belongs to other cells.

    Raises
    ------
    InputError
        A value is not one of these.
    """

    unit: str
    size_px: int | None = None
    size_um: float | None = None
    um_per_px: float | None = None
    overlap: float = 0.0
    border: str = "pad"
    mask_neighbours: bool = False

    def __post_init__(self) -> None:
        if self.unit not in ("cell", "tile", "field"):
            raise InputError(f"--unit '{self.unit}' is not known; choose cell, tile or field.")
        if self.size_px is not None and self.size_um is not None:
            raise InputError(f"A crop's size is given as {self.size_px} px and as {self.size_um} µm; give one of them.")
        if self.unit != "field" and self.size_um is None and (self.size_px is None or self.size_px < 1):
            raise InputError(f"A {self.unit} needs a crop size of at least 1 px; found {self.size_px}.")
        for name, value in (("crop size", self.size_um), ("common pixel size", self.um_per_px)):
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"The {name} is {value} µm; expected a length above 0.")
        if self.border not in BORDERS:
            raise InputError(f"--border '{self.border}' is not known; choose {', '.join(BORDERS)}.")
        if not 0 <= self.overlap < 1:
            raise InputError(f"The overlap of tiles is {self.overlap}; expected 0 to below 1.")
        if self.mask_neighbours and self.unit != "cell":
            raise InputError(f"Neighbours can be masked for cells only; the unit is {self.unit}.")

    def pixels(self, pixel_size_um: float | None) -> tuple[float, int | None]:
        """Return how a field of this pixel size is cut: the factor to resample it by, and a crop's side in px then.

        Raises
        ------
        InputError
            A length in µm was asked for, and the plate does not say how large its pixels are.
        """
        if pixel_size_um is None and (self.size_um is not None or self.um_per_px is not None):
            raise InputError(
                "Sizes are asked for in µm, and the plate has no pixel size: import it with --pixel-size, or give "
                "sizes in pixels."
            )
        factor = 1.0 if self.um_per_px is None else pixel_size_um / self.um_per_px
        if self.size_um is None:
            return factor, self.size_px
        return factor, max(1, round(self.size_um / (self.um_per_px or pixel_size_um)))

    @property
    def stride(self) -> float:
        """Distance between tiles as a share of their side."""
        return 1.0 - self.overlap


def place_windows(
    centers: np.ndarray, size_px: int, shape: tuple[int, int], *, border: str = "pad"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the top left pixel of each window, and which windows there are.

    A window of S pixels has its pixel S // 2 on the center rounded to the nearest pixel.

    Parameters
    ----------
    centers
        (n, 2) as (y, x) in pixels, where pixel 0's middle is 0.0.
    size_px
        S.
    shape
        (H, W) of the field.
    border
        One of `BORDERS`: ``shift`` moves windows inside, ``drop`` leaves out those that reach beyond.

    Returns
    -------
    first : np.ndarray
        (m, 2) int64 as (y, x), of the windows that are kept; negative where one begins before the field.
    kept : np.ndarray
        (n,) bool.

    Raises
    ------
    ValueError
        A center is not finite, or lies a whole window outside of the field.
    """
    centers = np.asarray(centers, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(centers).all():
        raise ValueError("every center must be finite")
    first = np.floor(centers + 0.5).astype(np.int64) - size_px // 2
    limit = np.array(shape) - size_px  # the last place that is still inside
    kept = np.ones(len(first), bool)
    if border == "drop":
        kept = ((first >= 0) & (first <= limit)).all(axis=1)
    elif border == "shift":
        first = np.clip(first, np.minimum(0, limit // 2), np.maximum(limit, limit // 2))
    elif border not in BORDERS:
        raise ValueError(f"a border is one of {BORDERS}, not {border!r}")
    first = first[kept]
    too_far = int(max((-first).max(initial=0), (first - limit).max(initial=0)))
    if too_far > size_px:  # such a window would be all zero, and its padding could be of any size
        raise ValueError(
            f"a center lies {too_far - size_px} px or more outside of the field of {shape[0]} x {shape[1]}"
        )
    return first, kept


def cut_crops(
    image: np.ndarray,
    centers: np.ndarray,
    size_px: int,
    *,
    border: str = "pad",
    labels: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
) -> np.ndarray:
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
    border
        One of `BORDERS`; with ``drop``, crops are fewer than centers, see `place_windows` for which.
    labels
        (H, W) whole numbers: what belongs to another cell than the crop's own becomes 0.
    numbers
        (n,) the crops' own labels.

    Returns
    -------
    np.ndarray
        (n, C, S, S), contiguous, of the image's type.

    Raises
    ------
    ValueError
        A shape does not fit, or a center is not finite.
    """
    if image.ndim != 3 or size_px < 1:
        raise ValueError(f"expected an image (C, H, W) and a size of at least 1, not {image.shape} and {size_px}")
    first, kept = place_windows(centers, size_px, image.shape[1:], border=border)
    crops = _windows(image, first, size_px, border)
    if labels is None:
        return crops
    if labels.shape != image.shape[1:] or numbers is None or len(numbers) != len(kept):
        raise ValueError("neighbours are masked by labels of the field's size and one number a center")
    others = _windows(labels[None], first, size_px, border)  # (n, 1, S, S)
    own = np.asarray(numbers)[kept][:, None, None, None]
    crops[np.broadcast_to((others != 0) & (others != own), crops.shape)] = 0
    return crops


def _windows(image: np.ndarray, first: np.ndarray, size_px: int, border: str) -> np.ndarray:
    height, width = image.shape[1:]
    if not len(first):
        return np.empty((0, len(image), size_px, size_px), image.dtype)
    before = np.maximum(0, -first.min(axis=0))
    after = np.maximum(0, first.max(axis=0) + size_px - (height, width))
    if before.any() or after.any():
        mode = "symmetric" if border == "reflect" else "constant"
        image = np.pad(image, ((0, 0), (before[0], after[0]), (before[1], after[1])), mode=mode)
        first = first + before
    windows = np.lib.stride_tricks.sliding_window_view(image, (size_px, size_px), axis=(1, 2))
    return np.ascontiguousarray(windows.transpose(1, 2, 0, 3, 4)[first[:, 0], first[:, 1]])  # (n, C, S, S)


def cut_on_device(
    image: torch.Tensor,
    first: torch.Tensor,
    size_px: int,
    *,
    border: str = "pad",
    labels: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cut windows from a field that is on the device: one gather, nothing is copied but the crops.

    Parameters
    ----------
    image
        (C, H, W).
    first
        (n, 2) int64 top left pixels from `place_windows`, on the same device.
    size_px
        S.
    border
        ``reflect`` to mirror the field beyond its edge; anything else fills with 0.
    labels, numbers
        (H, W) and (n,): what belongs to another cell becomes 0.

    Returns
    -------
    torch.Tensor
        (n, C, S, S), the same numbers as `cut_crops` gives.
    """
    import torch

    n_channels, height, width = image.shape
    if not len(first):
        return image.new_empty((0, n_channels, size_px, size_px))
    offset = torch.arange(size_px, device=image.device)
    y, x = first[:, :1] + offset, first[:, 1:] + offset  # (n, S)
    outside = None
    if border == "reflect":
        y, x = _mirrored(y, height), _mirrored(x, width)
    else:
        out_y, out_x = (y < 0) | (y >= height), (x < 0) | (x >= width)
        if bool(out_y.any()) or bool(out_x.any()):
            outside = out_y[:, :, None] | out_x[:, None, :]  # (n, S, S)
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    place = y[:, :, None] * width + x[:, None, :]  # (n, S, S)
    crops = image.reshape(n_channels, -1)[:, place.reshape(-1)].reshape(n_channels, *place.shape).transpose(0, 1)
    blank = outside
    if labels is not None:
        others = labels.reshape(-1)[place]
        foreign = (others != 0) & (others != numbers[:, None, None])
        blank = foreign if blank is None else blank | foreign
    if blank is not None:
        crops = crops.masked_fill(blank[:, None], 0)
    return crops.contiguous()


def cut_and_scale(
    image: np.ndarray,
    first: np.ndarray,
    size_px: int,
    scale: IntensityScale | None,
    *,
    border: str = "pad",
    labels: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
) -> np.ndarray:
    """Cut windows of a stored field on the CPU and scale them on the way.

    The same numbers as scaling the whole field and then `cut_crops`, but pixels in no crop are left alone: in C++ each
    is read and written once, without it NumPy does the same in blocks that stay in the cache. Starts no threads, so
    that it can run in as many as there are processors.

    Parameters
    ----------
    image
        (C, H, W) in the stored type.
    first, size_px, border, labels, numbers
        As in `cut_on_device`, as arrays.
    scale
        Of these C channels; None leaves intensities as they are.

    Returns
    -------
    np.ndarray
        (n, C, S, S) float32.
    """
    from cellvim.ops import windows

    crops = np.empty((len(first), len(image), size_px, size_px), np.float32)
    if windows.refusal(image) is not None:
        return _cut_and_scale_blocks(image, first, crops, scale, border, labels, numbers)
    linear: dict[str, Any] = {}
    if scale is not None:
        low, factor = scale.low_and_factor()
        linear = {"low": low, "factor": factor, "floor": scale.floor, "ceiling": scale.ceiling}
    return windows.cut_windows(
        image, first, crops, **linear, mirror=border == "reflect", labels=labels, numbers=numbers
    )


def _cut_and_scale_blocks(
    image: np.ndarray,
    first: np.ndarray,
    crops: np.ndarray,
    scale: IntensityScale | None,
    border: str,
    labels: np.ndarray | None,
    numbers: np.ndarray | None,
) -> np.ndarray:
    """Fill crops (n, C, S, S) as `cut_and_scale` says, with NumPy alone."""
    n_channels, height, width = image.shape
    size_px = crops.shape[-1]
    if not len(first):
        return crops
    inside = ((first >= 0) & (first + size_px <= (height, width))).all(axis=1)
    within = np.flatnonzero(inside)
    step = max(1, CACHE_BYTES // (4 * n_channels * size_px**2))
    if len(within):
        views = np.lib.stride_tricks.sliding_window_view(image, (size_px, size_px), axis=(1, 2))
        views = views.transpose(1, 2, 0, 3, 4)
        for start in range(0, len(within), step):
            places = within[start : start + step]
            block = views[first[places, 0], first[places, 1]].astype(np.float32)
            crops[places] = block if scale is None else scale.apply_in_place(block)
    beyond = np.flatnonzero(~inside)
    if len(beyond):
        offset = np.arange(size_px)
        y, x = first[beyond, :1] + offset, first[beyond, 1:] + offset
        if border == "reflect":
            y, x = _mirrored_index(y, height), _mirrored_index(x, width)
        outside = ((y < 0) | (y >= height))[:, :, None] | ((x < 0) | (x >= width))[:, None, :]
        place = np.clip(y, 0, height - 1)[:, :, None] * width + np.clip(x, 0, width - 1)[:, None, :]
        stored = np.take(image.reshape(n_channels, -1), place, axis=1)  # (C, m, S, S)
        block = np.ascontiguousarray(stored.transpose(1, 0, 2, 3), np.float32)
        block = block if scale is None else scale.apply_in_place(block)
        crops[beyond] = np.where(outside[:, None], np.float32(0), block)
    if labels is not None:
        others = _windows(labels[None], first, size_px, border)
        own = np.asarray(numbers)[:, None, None, None]
        crops[np.broadcast_to((others != 0) & (others != own), crops.shape)] = 0
    return crops


def _mirrored_index(index: np.ndarray, length: int) -> np.ndarray:
    index = index % (2 * length)
    return np.minimum(index, 2 * length - 1 - index)


def _mirrored(index: torch.Tensor, length: int) -> torch.Tensor:
    """Return where a mirrored field (edge pixels twice, as NumPy's symmetric) has these places."""
    index = index % (2 * length)
    return index.minimum(2 * length - 1 - index)


def resample_field(image: torch.Tensor, factor: float) -> tuple[torch.Tensor, tuple[float, float]]:
    """Resample a field to another pixel size: bilinear, without aliasing when shrinking.

    Parameters
    ----------
    image
        (C, H, W) float32.
    factor
        New pixels for one old one: old µm/px divided by new µm/px.

    Returns
    -------
    image : torch.Tensor
        (C, H', W'), at least one pixel.
    factors : tuple
        What the sides were really multiplied by, (y, x): whole pixels allow no more. For `resampled_centers`.
    """
    import torch

    if abs(factor - 1) < 1e-9:
        return image, (1.0, 1.0)
    size = tuple(max(1, round(n * factor)) for n in image.shape[1:])
    resampled = torch.nn.functional.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    return resampled, (size[0] / image.shape[1], size[1] / image.shape[2])


def resampled_centers(centers: np.ndarray, factors: tuple[float, float]) -> np.ndarray:
    """Return where centers (n, 2), given as (y, x), lie in the field that `resample_field` made."""
    return (np.asarray(centers, np.float64) + 0.5) * np.asarray(factors) - 0.5


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
    import torch

    return resize_on_device(torch.from_numpy(np.ascontiguousarray(crops, dtype=np.float32)), size_px).numpy()


def resize_on_device(crops: torch.Tensor, size_px: int) -> torch.Tensor:
    """Do what `resize_crops` does with crops (n, C, S, S) that are on a device already."""
    import torch

    if crops.shape[-2:] == (size_px, size_px):
        return crops
    if not len(crops):
        return crops.new_empty((0, crops.shape[1], size_px, size_px))
    return torch.nn.functional.interpolate(
        crops, size=(size_px, size_px), mode="bilinear", align_corners=False, antialias=True
    )
