"""Crops of cells and tiles: their size and place, cutting them from a field, and reading fields ahead of use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cellvim.errors import ChannelError, FieldReadError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from cellvim.data.cells import Cells, CellSource
    from cellvim.data.illumination import Illumination
    from cellvim.data.intensity import IntensityScale
    from cellvim.data.plate import Field

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
    return resize_on_device(torch.from_numpy(np.ascontiguousarray(crops, dtype=np.float32)), size_px).numpy()


def resize_on_device(crops: torch.Tensor, size_px: int) -> torch.Tensor:
    """Do what `resize_crops` does with crops (n, C, S, S) that are on a device already."""
    if crops.shape[-2:] == (size_px, size_px):
        return crops
    if not len(crops):
        return crops.new_empty((0, crops.shape[1], size_px, size_px))
    return torch.nn.functional.interpolate(
        crops, size=(size_px, size_px), mode="bilinear", align_corners=False, antialias=True
    )


@dataclass(frozen=True)
class FieldCrops:
    """All crops of one field.

    Attributes
    ----------
    index
        Which of the fields that were given.
    field
        The field.
    crops
        (n, C, S, S) float32 on the device; (1, C, H, W) for a whole field; empty where it could not be read.
    table
        One row a crop: ``object_number``, ``x_px`` and ``y_px`` in stored pixels, and a cell's measurements.
    failed
        Why the field could not be read, or None.
    """

    index: int
    field: Field
    crops: torch.Tensor
    table: pd.DataFrame
    failed: str | None = None


def stream_crops(
    fields: Iterable[Field],
    channels: Sequence[str],
    spec: CropSpec,
    *,
    scale: IntensityScale | None = None,
    cells: CellSource | None = None,
    device: str | torch.device = "cpu",
    workers: int = 2,
    ahead: int = 4,
    extra_channels: Sequence[str] = (),
    illumination: Illumination | None = None,
) -> Iterator[FieldCrops]:
    """Yield every field's crops, in the order of the fields.

    Each field is decoded once. While one is on the device, the next are being read and their cells found, in
    ``workers`` threads; never more than ``ahead`` of them are held, whatever the size of the plate.

    Parameters
    ----------
    fields
        Of one or several plates; taken one at a time, as they are needed.
    channels
        Names on the plate, in the order of the crops' channels.
    spec
        What to cut.
    scale
        Intensities to apply on the device; as stored, in float32, if None.
    cells
        Where cells come from; needed for the unit cell.
    device
        Where crops are cut.
    workers, ahead
        Threads, and fields in memory before the one in use.
    extra_channels
        Channels to read for finding cells alone.
    illumination
        Divided out of what is cut, before it is scaled. Cells are found and measured on intensities as stored.

    Notes
    -----
    A field that cannot be read is yielded with `FieldCrops.failed`: one bad field never stops a plate.
    """
    if spec.unit == "cell" and cells is None:
        raise ValueError("crops of cells need a source of cells")
    device = torch.device(device)
    queue: deque[tuple[int, Field, Future[Any]]] = deque()
    todo = iter(enumerate(fields))
    names = [*channels, *extra_channels]
    on_cpu = device.type == "cpu"  # then the threads cut too: there is nothing for them to overlap with

    def prepare(item: tuple[int, Field]) -> Any:
        raw, found = _prepare(item[1], names, spec, cells, device.type == "cuda", illumination, len(channels))
        return _cut(*item, raw, found, len(channels), spec, scale, device) if on_cpu else (raw, found)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            while True:
                while len(queue) < max(1, ahead) and (item := next(todo, None)) is not None:
                    queue.append((*item, pool.submit(prepare, item)))
                if not queue:
                    return
                index, field, future = queue.popleft()
                try:
                    ready = future.result()
                except (FieldReadError, ChannelError) as error:
                    yield FieldCrops(index, field, torch.empty(0), _empty(), str(error))
                else:
                    yield ready if on_cpu else _cut(index, field, *ready, len(channels), spec, scale, device)
                    del ready
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare(
    field: Field,
    names: Sequence[str],
    spec: CropSpec,
    cells: CellSource | None,
    pinned: bool,
    illumination: Illumination | None,
    n_channels: int,
) -> tuple[torch.Tensor, Cells | None]:
    raw = None
    if pinned and field.dtype.isnative:  # decoded straight into memory that the GPU reads while the processor goes on
        height, width = field.shape[1:]
        kind = torch.from_numpy(np.empty(0, field.dtype)).dtype
        raw = torch.empty((len(names), height, width), dtype=kind, pin_memory=True)
        image = field.read(names, out=raw.numpy())
    else:
        image = field.read(names)
    found = cells.find(field, image, names) if spec.unit == "cell" and cells is not None else None
    if illumination is not None:
        raw, image = None, illumination.apply(image[:n_channels])
    if raw is None:
        raw = torch.from_numpy(image if image.dtype.isnative else image.astype(image.dtype.newbyteorder("=")))
        raw = raw.pin_memory() if pinned else raw
    return raw, found


def _cut(
    index: int,
    field: Field,
    raw: torch.Tensor,
    cells: Cells | None,
    n_channels: int,
    spec: CropSpec,
    scale: IntensityScale | None,
    device: torch.device,
) -> FieldCrops:
    import pandas as pd

    factor, size = spec.pixels(field.pixel_size_um)
    if device.type == "cpu" and spec.unit != "field" and abs(factor - 1) < 1e-9:
        return _cut_stored(index, field, raw[:n_channels].numpy(), cells, spec, size, scale)
    image = _float32(raw[:n_channels].to(device, non_blocking=True))
    image = scale.apply_on_device(image) if scale is not None else image
    image, factors = resample_field(image, factor)
    shape = (image.shape[1], image.shape[2])
    if spec.unit == "field":
        middle = {"object_number": [1], "x_px": [(raw.shape[2] - 1) / 2], "y_px": [(raw.shape[1] - 1) / 2]}
        return FieldCrops(index, field, image[None], pd.DataFrame(middle))
    if spec.unit == "tile":
        centers = tile_centers(*shape, size, max(1, round(size * spec.stride)))
        first, _ = place_windows(centers, size, shape)
        places = (centers + 0.5) / np.asarray(factors) - 0.5
        table = pd.DataFrame(
            {"object_number": np.arange(1, len(first) + 1), "x_px": places[:, 1], "y_px": places[:, 0]}
        )
        crops = cut_on_device(image, torch.from_numpy(first).to(device), size)
        return FieldCrops(index, field, crops, table)
    first, kept = place_windows(resampled_centers(cells.centers, factors), size, shape, border=spec.border)
    table = _rows(cells.table, kept)
    labels = numbers = None
    if spec.mask_neighbours:
        labels = torch.from_numpy(cells.labels).to(device)
        numbers = torch.from_numpy(table["object_number"].to_numpy(np.int32)).to(device)
        if labels.shape != shape:
            labels = torch.nn.functional.interpolate(labels[None, None].double(), size=shape, mode="nearest-exact")
            labels = labels[0, 0].to(torch.int32)
    places = torch.from_numpy(first).to(device)
    crops = cut_on_device(image, places, size, border=spec.border, labels=labels, numbers=numbers)
    return FieldCrops(index, field, crops, table)


def _cut_stored(
    index: int,
    field: Field,
    image: np.ndarray,
    cells: Cells | None,
    spec: CropSpec,
    size: int,
    scale: IntensityScale | None,
) -> FieldCrops:
    """Cut before scaling: on the CPU, pixels that are in no crop are better left alone."""
    import pandas as pd

    shape = (image.shape[1], image.shape[2])
    if spec.unit == "tile":
        centers = tile_centers(*shape, size, max(1, round(size * spec.stride)))
        first, _ = place_windows(centers, size, shape)
        numbers = np.arange(1, len(first) + 1)
        table = pd.DataFrame({"object_number": numbers, "x_px": centers[:, 1], "y_px": centers[:, 0]})
        return FieldCrops(index, field, torch.from_numpy(cut_and_scale(image, first, size, scale)), table)
    first, kept = place_windows(cells.centers, size, shape, border=spec.border)
    table = _rows(cells.table, kept)
    masked = {"labels": cells.labels, "numbers": table["object_number"].to_numpy()} if spec.mask_neighbours else {}
    crops = cut_and_scale(image, first, size, scale, border=spec.border, **masked)
    return FieldCrops(index, field, torch.from_numpy(crops), table)


def _rows(table: pd.DataFrame, kept: np.ndarray) -> pd.DataFrame:
    """Return the rows of the crops that there are, numbered from 0."""
    if not kept.all():
        table = table[kept]
    return (
        table
        if len(table) == 0 or (table.index[-1] == len(table) - 1 and table.index[0] == 0)
        else table.reset_index(drop=True)
    )


def _float32(image: torch.Tensor) -> torch.Tensor:
    if image.dtype is torch.uint16 and image.device.type not in ("cpu", "cuda"):
        # devices that know no unsigned 16 bits: as signed, and set right afterwards
        signed = image.view(torch.int16).to(torch.float32)
        return torch.where(signed < 0, signed + 65536, signed)
    return image.to(torch.float32)


def _empty() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({"object_number": np.zeros(0, int), "x_px": np.zeros(0), "y_px": np.zeros(0)})
