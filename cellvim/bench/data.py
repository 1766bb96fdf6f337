"""How fast cells come from a plate to a device tensor, beside the raw decoding of the same chunks."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cellvim.data.cell_sources import Cells
    from cellvim.data.plate import Field, Plate

JUMP_CHANNELS = ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")
JUMP_SIZE, JUMP_FIELDS, JUMP_PIXEL_UM = 1080, 9, 0.598
GOAL = 0.8


class _Given:
    """Cells at positions that are known beforehand, so that segmentation is not what is measured."""

    name, needs_dna = "given", False

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n, self.seed, self.notes = n, seed, []

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        import pandas as pd

        from cellvim.data.cell_sources import Cells

        rng = np.random.default_rng([self.seed, *field.name.encode()])
        table = pd.DataFrame(
            {
                "object_number": np.arange(1, self.n + 1),
                "x_px": rng.uniform(0, image.shape[2] - 1, self.n),
                "y_px": rng.uniform(0, image.shape[1] - 1, self.n),
            }
        )
        return Cells(table, np.zeros((0, 0), np.int32))


def run(
    plate: str | Path | None = None,
    *,
    device: str = "auto",
    cells_per_field: int = 100,
    crop_px: int = 64,
    wells: int = 4,
    workers: int | None = None,
    repeats: int = 3,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure, print and return the figures.

    Parameters
    ----------
    plate
        A plate of your own, besides the synthetic one: 384 wells of JUMP's shape (8 x 1080², 9 fields), of which
        ``wells`` are written.
    device
        Where crops are cut; "auto" takes a GPU if there is one.
    cells_per_field, crop_px
        How many crops of which side are cut from each field, at random places.
    wells
        How many wells of the synthetic plate hold pixels.
    workers
        Threads that decode; as many as processors if None.
    repeats
        The fastest of so many passes counts, for the stream and for raw decoding alike.

    Returns
    -------
    list of dict
        One a plate: ``plate, open_s, fields, raw_fields_per_s, stream_fields_per_s, cells_per_s, ratio, peak_rss_mb``.
    """
    import torch

    from cellvim.data.plate import open_plate

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = workers or os.cpu_count() or 1
    results = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [synthetic_jump_plate(Path(folder) / "jump_shape.zarr", wells=wells)]
        paths += [Path(plate)] if plate is not None else []
        for path in paths:
            start = time.perf_counter()
            opened = open_plate(path)
            open_s = time.perf_counter() - start
            result = measure(
                opened, device=device, n=cells_per_field, crop_px=crop_px, workers=workers, repeats=repeats
            )
            results.append({"plate": opened.name, "open_s": open_s, "wells": len(opened.wells), **result})
    say(
        f"{cells_per_field} crops of {crop_px} px a field, {workers} threads, {device}, the fastest of {repeats}; "
        f"goal: at least {GOAL} of raw decoding"
    )
    for r in results:
        say(
            f"{r['plate']}: {r['wells']} wells opened in {r['open_s']:.2f} s; {r['fields']} fields of {r['shape']}\n"
            f"  raw decoding   {r['raw_fields_per_s']:8.1f} fields/s  {r['raw_mb_per_s']:8.0f} MB/s\n"
            f"  to device      {r['stream_fields_per_s']:8.1f} fields/s  {r['cells_per_s']:8.0f} cells/s\n"
            f"  ratio          {r['ratio']:8.2f}\n"
            f"  peak memory    {r['peak_rss_mb']:8.0f} MB"
        )
    return results


def measure(
    plate: Plate, *, device: str, n: int, crop_px: int, workers: int, repeats: int = 3, most: int = 48
) -> dict[str, Any]:
    """Return how fast a plate's fields are decoded alone, and how fast they become crops on the device."""
    import resource

    import torch

    from cellvim.data.crops import CropSpec
    from cellvim.data.normalize import IntensityScale
    from cellvim.data.stream import stream_crops

    channels = plate.channel_names
    fields = [f for f in plate.fields if f.is_readable and f.layout.holds_data()][:most]
    scale = IntensityScale(tuple(channels), np.zeros(len(channels)), np.full(len(channels), 65535.0))
    spec = CropSpec("cell", crop_px)

    def raw() -> int:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(workers) as pool:
            return sum(pool.map(lambda f: f.read().nbytes, fields))

    def stream() -> int:
        cut = stream_crops(
            fields, channels, spec, scale=scale, cells=_Given(n), device=device, workers=workers, ahead=2 * workers
        )
        total = sum(len(c.crops) for c in cut)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return total

    n_bytes, n_cells = raw(), stream()  # both once before they are timed: files are in memory then, for both
    raw_s, stream_s = float("inf"), float("inf")
    for _ in range(repeats):  # in turn, so that what else the machine does meets both
        raw_s, stream_s = min(raw_s, _seconds(raw)), min(stream_s, _seconds(stream))
    return {
        "fields": len(fields),
        "shape": " x ".join(map(str, fields[0].shape)),
        "raw_fields_per_s": len(fields) / raw_s,
        "raw_mb_per_s": n_bytes / raw_s / 1e6,
        "stream_fields_per_s": len(fields) / stream_s,
        "cells_per_s": n_cells / stream_s,
        "ratio": raw_s / stream_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def synthetic_jump_plate(target: Path, *, wells: int = 4, seed: int = 0) -> Path:
    """Write a 384-well plate of JUMP's shape of which a few wells hold pixels; the others are metadata alone.

    The pixels are smooth blobs with the noise of a camera, so that they compress about as real ones do.
    """
    import json
    import shutil

    from scipy import ndimage as ndi

    from cellvim.data.wells import well_name
    from cellvim.data.writer import PlateWriter

    names = [well_name(r, c) for r in range(16) for c in range(24)]
    rng = np.random.default_rng(seed)
    base = ndi.gaussian_filter(rng.random((8, 135, 135)) ** 12, (0, 3, 3))
    base = ndi.zoom(base / base.max(), (1, 8, 8), order=1)[:, :JUMP_SIZE, :JUMP_SIZE]
    with PlateWriter(target, name=target.stem, channel_names=JUMP_CHANNELS, pixel_size_um=JUMP_PIXEL_UM) as writer:
        for well in names[:wells]:
            for site in range(1, JUMP_FIELDS + 1):
                shift = tuple(rng.integers(0, JUMP_SIZE, 2))
                level = 500 + 20_000 * np.roll(base, shift, axis=(1, 2))
                image = level + np.sqrt(level) * rng.standard_normal(level.shape, np.float32)
                writer.write_field(well, str(site), image.clip(0, 65535).astype(np.uint16))
        writer.finish()
    root = json.loads((target / "zarr.json").read_text())
    plate = root["attributes"]["ome"]["plate"]
    plate["rows"] = [{"name": n} for n in dict.fromkeys(w[:-2] for w in names)]
    plate["columns"] = [{"name": f"{c:02d}"} for c in range(1, 25)]
    plate["wells"] = [
        {"path": f"{w[:-2]}/{w[-2:]}", "rowIndex": i // 24, "columnIndex": i % 24} for i, w in enumerate(names)
    ]
    (target / "zarr.json").write_text(json.dumps(root))
    first = target / "A" / "01"
    for well in names[wells:]:
        folder = target / well[:-2] / well[-2:]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(first / "zarr.json", folder / "zarr.json")
        for site in range(1, JUMP_FIELDS + 1):
            (folder / str(site) / "0").mkdir(parents=True)
            shutil.copy(first / str(site) / "zarr.json", folder / str(site) / "zarr.json")
            shutil.copy(first / str(site) / "0" / "zarr.json", folder / str(site) / "0" / "zarr.json")
    return target
