"""Crops of cells and tiles: their size and position, cutting them from fields, and reading fields ahead of use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from cellvim.errors import ChannelError, FieldReadError, InputError

if TYPE_CHECKING:
    from cellvim.data.cells import Cells, CellSource
    from cellvim.data.illumination import Illumination
    from cellvim.data.intensity import IntensityScale
    from cellvim.data.plate import Field

BORDERS = ("pad", "reflect", "shift", "drop")
_COMPILING = Lock()


@dataclass(frozen=True)
class CropSpec:
    """Size and treatment of crops: a ``cell`` or ``tile`` of a given side, or the entire ``field``.

    Attributes
    ----------
    unit
        cell, tile or field.
    size_px
        Side of a crop in pixels of the plate or, with ``um_per_px``, of the resampled field.
    size_um
        Side of a crop in µm, instead of ``size_px``.
    um_per_px
        Common pixel size to which fields are resampled before cutting. None: no resampling.
    overlap
        Overlap of neighbouring tiles as a fraction of their side, in [0, 1).
    border
        Treatment of a cell's window that extends beyond the field: ``pad`` with 0, ``reflect`` the image,
        ``shift`` the window inside, or ``drop`` the cell.
    mask_neighbours
        Set pixels of other cells to 0.

    Raises
    ------
    InputError
        A value is invalid.
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
            raise InputError(f"--unit '{self.unit}' is unknown; choose cell, tile or field.")
        if self.size_px is not None and self.size_um is not None:
            raise InputError(f"The crop size is given as {self.size_px} px and as {self.size_um} µm; give only one.")
        if self.unit != "field" and self.size_um is None and (self.size_px is None or self.size_px < 1):
            raise InputError(f"A {self.unit} needs a crop size of at least 1 px; found {self.size_px}.")
        for name, value in (("crop size", self.size_um), ("common pixel size", self.um_per_px)):
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"The {name} is {value} µm; expected a length above 0.")
        if self.border not in BORDERS:
            raise InputError(f"--border '{self.border}' is unknown; choose {', '.join(BORDERS)}.")
        if not 0 <= self.overlap < 1:
            raise InputError(f"The overlap of tiles is {self.overlap}; expected 0 to below 1.")
        if self.mask_neighbours and self.unit != "cell":
            raise InputError(f"Neighbours can be masked for cells only; the unit is {self.unit}.")

    def pixels(self, pixel_size_um: float | None) -> tuple[float, int | None]:
        """Return the factor by which to resample a field of this pixel size, and the side of a crop in px after that.

        Raises
        ------
        InputError
            A length is given in µm and the pixel size is unknown.
        """
        if pixel_size_um is None and (self.size_um is not None or self.um_per_px is not None):
            raise InputError(
                "Sizes are given in µm, but the plate has no pixel size: import it with --pixel-size, or give sizes in "
                "pixels."
            )
        factor = 1.0 if self.um_per_px is None else pixel_size_um / self.um_per_px
        if self.size_um is None:
            return factor, self.size_px
        return factor, max(1, round(self.size_um / (self.um_per_px or pixel_size_um)))

    @property
    def stride(self) -> float:
        """Distance between tiles as a fraction of their side."""
        return 1.0 - self.overlap


def place_windows(
    centers: np.ndarray, size_px: int, shape: tuple[int, int], *, border: str = "pad"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the top left pixel of the window around each center.

    Pixel S // 2 of a window of S pixels lies on the center rounded to the nearest pixel.

    Parameters
    ----------
    centers
        (n, 2) as (y, x) in pixels; the center of the first pixel is 0.0.
    size_px
        S.
    shape
        (H, W) of the field.
    border
        One of `BORDERS`: ``shift`` moves windows inside the field, ``drop`` omits those that extend beyond it.

    Returns
    -------
    first : np.ndarray
        (m, 2) int64 as (y, x); negative where a window begins before the field.
    kept : np.ndarray
        (n,) bool, which centers have a window.

    Raises
    ------
    ValueError
        A center is not finite, or lies more than a window outside of the field.
    """
    centers = np.asarray(centers, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(centers).all():
        raise ValueError("every center must be finite")
    first = np.floor(centers + 0.5).astype(np.int64) - size_px // 2
    limit = np.array(shape) - size_px  # the last position inside the field
    kept = np.ones(len(first), bool)
    if border == "drop":
        kept = ((first >= 0) & (first <= limit)).all(axis=1)
    elif border == "shift":
        first = np.clip(first, np.minimum(0, limit // 2), np.maximum(limit, limit // 2))
    elif border not in BORDERS:
        raise ValueError(f"a border is one of {BORDERS}, not {border!r}")
    first = first[kept]
    too_far = int(max((-first).max(initial=0), (first - limit).max(initial=0)))
    if too_far > size_px:
        raise ValueError(
            f"a center lies {too_far - size_px} px or more outside of the field of {shape[0]} x {shape[1]}"
        )
    return first, kept


def tile_centers(height: int, width: int, size_px: int, stride_px: int | None = None) -> np.ndarray:
    """Return the centers of tiles that together cover every pixel of a field.

    Tiles start every ``stride_px`` pixels. The last tile of a row or column is moved back to end with the field, so
    that no tile extends beyond a field that is at least as large as a tile.

    Parameters
    ----------
    height, width
        Size of the field in px.
    size_px
        Side of a tile.
    stride_px
        Distance between tiles, at most ``size_px``, which is the default.

    Returns
    -------
    np.ndarray
        (n, 2) float64 as (y, x), row by row.

    Raises
    ------
    InputError
        The stride is not between 1 and the size.
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


def _window_pixels(first: torch.Tensor, size_px: int, length: int, border: str) -> torch.Tensor:
    """Return (n, S) the pixels that windows starting at ``first`` (n,) read along one axis of a field; -1 for none."""
    pixels = first[:, None] + torch.arange(size_px, device=first.device)
    if border == "reflect":  # the edge pixel twice: NumPy's ``symmetric``
        pixels = pixels % (2 * length)
        return pixels.minimum(2 * length - 1 - pixels)
    return pixels.masked_fill((pixels < 0) | (pixels >= length), -1)


def _fill_windows(
    image: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    low: np.ndarray,
    factor: np.ndarray,
    ceiling: np.float32,
    labels: np.ndarray,
    numbers: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill ``out`` (n, C, S, S) from ``image`` (C, H, W); empty ``low`` or ``labels`` skip the scaling or masking."""
    # Unsigned indices: numba would test signed ones for being negative, which prevents vectorization.
    size = out.shape[-1]
    is_foreign = np.zeros((size, size), np.bool_)
    for n in range(len(rows)):
        inside = np.flatnonzero(columns[n] >= 0)
        if len(inside) < size or rows[n].min() < 0:
            out[n] = 0
        if not len(inside):
            continue
        begin, end = np.uintp(inside[0]), np.uintp(inside[-1] + 1)
        shift = np.uintp(columns[n, inside[0]] - inside[0])
        is_mirrored = columns[n, inside[-1]] - columns[n, inside[0]] != inside[-1] - inside[0]
        if labels.size:
            own = numbers[n]
            for i in range(size):
                y = np.uintp(max(rows[n, i], 0))
                for j in range(begin, end):
                    label = labels[y, np.uintp(columns[n, j])]
                    is_foreign[i, j] = (label != 0) & (label != own)
        for c in range(len(image)):
            for i in range(size):
                if rows[n, i] < 0:
                    continue
                y = np.uintp(rows[n, i])
                if is_mirrored:
                    for j in range(begin, end):
                        out[n, c, i, j] = image[c, y, np.uintp(columns[n, j])]
                else:
                    for j in range(begin, end):
                        out[n, c, i, j] = image[c, y, shift + j]
                if low.size:
                    low_c, factor_c = low[c], factor[c]
                    for j in range(begin, end):
                        value = (out[n, c, i, j] - low_c) * factor_c
                        value = value if value > np.float32(0) else np.float32(0)  # 0 for NaN as well
                        out[n, c, i, j] = value if value < ceiling else ceiling
                if labels.size:
                    for j in range(begin, end):
                        out[n, c, i, j] = 0 if is_foreign[i, j] else out[n, c, i, j]


@cache
def _compiled_fill() -> Callable[..., None]:
    """Compile `_fill_windows` at its first call; numba caches the machine code on disk if a folder is writable."""
    from numba import njit

    try:
        return njit(nogil=True, cache=True)(_fill_windows)
    except RuntimeError:  # numba found neither this folder nor the user's cache folder writable
        return njit(nogil=True)(_fill_windows)


def cut_crops(
    image: np.ndarray,
    first: np.ndarray,
    size_px: int,
    scale: IntensityScale | None = None,
    *,
    border: str = "pad",
    labels: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
) -> np.ndarray:
    """Cut windows from a field on the CPU and scale them, reading and writing each pixel once.

    The result equals that of scaling the entire field first. Runs in the calling thread without holding the GIL, so
    that several threads can cut at once.

    Parameters
    ----------
    image
        (C, H, W), any numeric type.
    first
        (n, 2) top left pixels from `place_windows`.
    size_px
        S.
    scale
        Scale of these C channels; None keeps the intensities.
    border
        ``reflect`` mirrors the field beyond its edge; anything else fills with 0.
    labels, numbers
        (H, W) and (n,): pixels of other cells than the window's own become 0.

    Returns
    -------
    np.ndarray
        (n, C, S, S) float32, contiguous.

    Raises
    ------
    ValueError
        A shape does not fit.
    """
    if image.ndim != 3 or size_px < 1:
        raise ValueError(f"expected an image (C, H, W) and a size of at least 1, not {image.shape} and {size_px}")
    low, factor = (np.empty(0, np.float32),) * 2 if scale is None else scale.low_and_factor()
    if low.size and low.shape != (len(image),):
        raise ValueError(f"the scale has {low.size} channels, the image {len(image)}")
    if labels is None:
        labels, numbers = np.empty((0, 0)), np.empty(0)
    elif labels.shape != image.shape[1:] or numbers is None or len(numbers) != len(first):
        raise ValueError("masking neighbours needs labels of the field's size and one number per window")
    if image.dtype not in (np.uint8, np.uint16, np.int16, np.float32):  # compile no more variants than these
        image = image.astype(np.float32)
    places = torch.from_numpy(np.asarray(first, np.int64)).T
    rows, columns = (
        _window_pixels(*pair, border).numpy() for pair in zip(places, (size_px,) * 2, image.shape[1:], strict=True)
    )
    out = np.empty((len(first), len(image), size_px, size_px), np.float32)
    arguments = (
        np.ascontiguousarray(image),
        rows,
        columns,
        low,
        factor,
        np.float32(0 if scale is None else scale.ceiling),
        np.ascontiguousarray(labels, np.int32),
        np.ascontiguousarray(numbers, np.int32),
        out,
    )
    with _COMPILING:
        fill = _compiled_fill()
    try:
        fill(*arguments)
    except OSError:  # the disk of numba's cache is full; the function itself has been compiled
        fill(*arguments)
    return out


def cut_on_device(
    image: torch.Tensor,
    first: torch.Tensor,
    size_px: int,
    *,
    border: str = "pad",
    labels: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cut windows from a field on its device with a single gather; see `cut_crops`, whose result it equals."""
    n_channels, height, width = image.shape
    if not len(first):
        return image.new_empty((0, n_channels, size_px, size_px))
    y, x = _window_pixels(first[:, 0], size_px, height, border), _window_pixels(first[:, 1], size_px, width, border)
    blank = (y < 0)[:, :, None] | (x < 0)[:, None, :]  # (n, S, S)
    index = y.clamp(min=0)[:, :, None] * width + x.clamp(min=0)[:, None, :]
    crops = image.reshape(n_channels, -1)[:, index.reshape(-1)].reshape(n_channels, *index.shape).transpose(0, 1)
    if labels is not None:
        found = labels.reshape(-1)[index]
        blank |= (found != 0) & (found != numbers[:, None, None])
    if bool(blank.any()):
        crops = crops.masked_fill(blank[:, None], 0)
    return crops.contiguous()


def resample_field(image: torch.Tensor, factor: float) -> tuple[torch.Tensor, tuple[float, float]]:
    """Resample a field to another pixel size with antialiased bilinear interpolation.

    Parameters
    ----------
    image
        (C, H, W) float32.
    factor
        Old µm/px divided by new µm/px.

    Returns
    -------
    image : torch.Tensor
        (C, H', W'), at least one pixel.
    factors : tuple
        Actual factors (y, x), which give an integer number of pixels; see `resampled_centers`.
    """
    if abs(factor - 1) < 1e-9:
        return image, (1.0, 1.0)
    size = tuple(max(1, round(n * factor)) for n in image.shape[1:])
    resampled = torch.nn.functional.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    return resampled, (size[0] / image.shape[1], size[1] / image.shape[2])


def resampled_centers(centers: np.ndarray, factors: tuple[float, float]) -> np.ndarray:
    """Return the positions of centers (n, 2), given as (y, x), in the field returned by `resample_field`."""
    return (np.asarray(centers, np.float64) + 0.5) * np.asarray(factors) - 0.5


def resize_crops(crops: torch.Tensor, size_px: int) -> torch.Tensor:
    """Resize crops (n, C, S, S) to the side that a model expects, with antialiased bilinear interpolation."""
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
        Index of the field among those given.
    field
        The field.
    crops
        (n, C, S, S) float32 on the device; (1, C, H, W) for an entire field; empty if reading failed.
    table
        One row per crop: ``object_number``, ``x_px`` and ``y_px`` in stored pixels, and a cell's measurements.
    failed
        Reason why the field could not be read, or None.
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
    """Yield the crops of each field, in the order of the fields.

    Each field is decoded once. While one field is in use, ``workers`` threads read the next ones and find their cells;
    at most ``ahead`` fields are held in memory.

    Parameters
    ----------
    fields
        Fields of one or several plates, consumed as they are needed.
    channels
        Names on the plate, in the order of the crops' channels.
    spec
        Size and treatment of crops.
    scale
        Intensity scale; None keeps stored intensities, as float32.
    cells
        Source of cells; required for the unit cell.
    device
        Device on which crops are cut.
    workers, ahead
        Number of threads, and of fields held in memory.
    extra_channels
        Channels read only for finding cells.
    illumination
        Correction applied to the pixels before scaling. Cells are found and measured on stored intensities.

    Notes
    -----
    A field that cannot be read is yielded with `FieldCrops.failed` set, and the stream continues.
    """
    if spec.unit == "cell" and cells is None:
        raise ValueError("crops of cells need a source of cells")
    device = torch.device(device)
    names = [*channels, *extra_channels]

    def read(field: Field) -> tuple[torch.Tensor, Cells | None]:
        return _read(field, names, len(channels), cells if spec.unit == "cell" else None, illumination, device)

    def read_and_cut(field: Field) -> tuple[torch.Tensor, pd.DataFrame]:
        return _cut_field(field, *read(field), spec, scale, device)

    on_cpu = device.type == "cpu"  # the threads cut as well, since there is no device to overlap with
    queue: deque[tuple[int, Field, Future[Any]]] = deque()
    todo = iter(enumerate(fields))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            while True:
                while len(queue) < max(1, ahead) and (item := next(todo, None)) is not None:
                    queue.append((*item, pool.submit(read_and_cut if on_cpu else read, item[1])))
                if not queue:
                    return
                index, field, future = queue.popleft()
                try:
                    ready = future.result()
                except (FieldReadError, ChannelError) as error:
                    no_rows = pd.DataFrame(
                        {"object_number": np.zeros(0, int), "x_px": np.zeros(0), "y_px": np.zeros(0)}
                    )
                    yield FieldCrops(index, field, torch.empty(0), no_rows, str(error))
                else:
                    crops, table = ready if on_cpu else _cut_field(field, *ready, spec, scale, device)
                    yield FieldCrops(index, field, crops, table)
                    del future, ready, crops, table  # free this field before the next one is taken
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read(
    field: Field,
    names: Sequence[str],
    n_channels: int,
    cells: CellSource | None,
    illumination: Illumination | None,
    device: torch.device,
) -> tuple[torch.Tensor, Cells | None]:
    """Return the first ``n_channels`` of a field, in pinned memory for CUDA, and its cells."""
    pinned = device.type == "cuda"
    raw = None
    if pinned and field.dtype.isnative:  # decode into the memory from which the GPU copies asynchronously
        kind = torch.from_numpy(np.empty(0, field.dtype)).dtype
        raw = torch.empty((len(names), *field.shape[1:]), dtype=kind, pin_memory=True)
        image = field.read(names, out=raw.numpy())
    else:
        image = field.read(names)
    found = None if cells is None else cells.find(field, image, names)
    if illumination is not None:
        raw, image = None, illumination.apply(image[:n_channels])
    if raw is None:
        raw = torch.from_numpy(image if image.dtype.isnative else image.astype(image.dtype.newbyteorder("=")))
        raw = raw.pin_memory() if pinned else raw
    return raw[:n_channels], found


def _cut_field(
    field: Field,
    raw: torch.Tensor,
    cells: Cells | None,
    spec: CropSpec,
    scale: IntensityScale | None,
    device: torch.device,
) -> tuple[torch.Tensor, pd.DataFrame]:
    """Return the crops of one field (C, H, W) and their table."""
    factor, size = spec.pixels(field.pixel_size_um)
    factors, image = (1.0, 1.0), None
    if device.type != "cpu" or spec.unit == "field" or abs(factor - 1) >= 1e-9:
        image = raw.to(device, non_blocking=True)
        if image.dtype is torch.uint16 and device.type not in ("cpu", "cuda"):  # no unsigned 16-bit integers there
            image = image.view(torch.int16).to(torch.float32)
            image = torch.where(image < 0, image + 65536, image)
        image = image.to(torch.float32)
        image = scale.apply_on_device(image) if scale is not None else image
        image, factors = resample_field(image, factor)
    if spec.unit == "field":
        middle = {"object_number": [1], "x_px": [(raw.shape[2] - 1) / 2], "y_px": [(raw.shape[1] - 1) / 2]}
        return image[None], pd.DataFrame(middle)
    shape = tuple((raw if image is None else image).shape[1:])
    border, labels, numbers = "pad", None, None
    if spec.unit == "tile":
        centers = tile_centers(*shape, size, max(1, round(size * spec.stride)))
        first, _ = place_windows(centers, size, shape)
        places = (centers + 0.5) / np.asarray(factors) - 0.5
        table = pd.DataFrame(
            {"object_number": np.arange(1, len(first) + 1), "x_px": places[:, 1], "y_px": places[:, 0]}
        )
    else:
        border = spec.border
        first, kept = place_windows(resampled_centers(cells.centers, factors), size, shape, border=border)
        table = cells.table if kept.all() else cells.table[kept].reset_index(drop=True)
        if spec.mask_neighbours:
            labels, numbers = cells.labels, table["object_number"].to_numpy(np.int32)
    if image is None:  # cut before scaling: most pixels of a field may lie in no crop
        crops = cut_crops(raw.numpy(), first, size, scale, border=border, labels=labels, numbers=numbers)
        return torch.from_numpy(crops), table
    if labels is not None:
        labels, numbers = torch.from_numpy(labels).to(device), torch.from_numpy(numbers).to(device)
        if labels.shape != shape:
            labels = torch.nn.functional.interpolate(labels[None, None].double(), size=shape, mode="nearest-exact")
            labels = labels[0, 0].to(torch.int32)
    places = torch.from_numpy(first).to(device)
    return cut_on_device(image, places, size, border=border, labels=labels, numbers=numbers), table
