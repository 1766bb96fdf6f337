"""From plate to device: fields decoded ahead in threads, uploaded once, and their crops cut there.

Two forms of the same: `stream_crops` in this process, and `CropDataset` for a `torch.utils.data.DataLoader` whose
workers are spawned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cellvim.data.crops import (
    CropSpec,
    cut_and_scale,
    cut_on_device,
    place_windows,
    resample_field,
    resampled_centers,
    tile_centers,
)
from cellvim.errors import ChannelError, FieldReadError

if TYPE_CHECKING:
    import pandas as pd

    from cellvim.data.cell_sources import Cells, CellSource
    from cellvim.data.illumination import Illumination
    from cellvim.data.normalize import IntensityScale
    from cellvim.data.plate import Field


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


def cut_field(
    field: Field,
    raw: np.ndarray,
    spec: CropSpec,
    *,
    scale: IntensityScale | None = None,
    cells: Cells | None = None,
    device: str | torch.device = "cpu",
) -> tuple[torch.Tensor, pd.DataFrame]:
    """Cut one field that has been read: (C, H, W) in the stored type. Returns crops and table as in `FieldCrops`."""
    tensor = torch.from_numpy(np.ascontiguousarray(raw))
    result = _cut(0, field, tensor, cells, len(raw), spec, scale, torch.device(device))
    return result.crops, result.table


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


class CropDataset(IterableDataset):
    """Crops one by one, for a DataLoader: fields are shared out among its workers, which may be spawned.

    Yields ``(crop (C, S, S) float32, index of the field, number of the object)``. Every crop comes exactly once,
    however many workers there are.

    Parameters
    ----------
    fields, channels, spec, scale, cells
        As in `stream_crops`. Everything is pickled to spawned workers; nothing is opened before they begin.
    seed
        Shuffles the order of fields, and of the crops in each; with ``set_epoch`` another order every epoch. None: the
        plate's order.

    Notes
    -----
    Use ``multiprocessing_context="spawn"``: forked workers hang once OpenMP or Zarr's threads have run.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        channels: Sequence[str],
        spec: CropSpec,
        *,
        scale: IntensityScale | None = None,
        cells: CellSource | None = None,
        seed: int | None = None,
    ) -> None:
        self.fields, self.channels, self.spec = list(fields), list(channels), spec
        self.scale, self.cells, self.seed = scale, cells, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        order = np.arange(len(self.fields))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        worker = get_worker_info()
        if worker is not None:
            order = order[worker.id :: worker.num_workers]
        fields = [self.fields[i] for i in order]
        streamed = stream_crops(
            fields, self.channels, self.spec, scale=self.scale, cells=self.cells, workers=1, ahead=2
        )
        for field_crops in streamed:
            number = int(order[field_crops.index])
            within = np.arange(len(field_crops.crops) if field_crops.failed is None else 0)
            if self.seed is not None:
                within = np.random.default_rng([self.seed, self.epoch, number]).permutation(within)
            objects = field_crops.table["object_number"].to_numpy()
            for i in within:
                yield field_crops.crops[i], number, int(objects[i])
