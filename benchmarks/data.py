"""Compare the rate of reading cells from a plate into a device tensor with raw decoding of the same chunks."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cellvim.data.cells import Cells
    from cellvim.data.plate import Field, Plate

JUMP_CHANNELS = ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")
JUMP_SIZE, JUMP_FIELDS, JUMP_PIXEL_UM = 1080, 9, 0.598
GOAL = 0.8


class _Given:
    """Cells at given positions, so that segmentation is not part of the measurement."""

    name, needs_dna = "given", False

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n, self.seed, self.notes = n, seed, []

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        import pandas as pd

        from cellvim.data.cells import Cells

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
        Plate to measure in addition to the synthetic one: 384 wells of JUMP's shape (8 x 1080², 9 fields), of which
        ``wells`` are written.
    device
        Device on which crops are cut; "auto" uses a GPU if there is one.
    cells_per_field, crop_px
        Number and side of the crops from each field, at random positions.
    wells
        Number of wells of the synthetic plate with pixels.
    workers
        Number of decoding threads; one per processor if None.
    repeats
        Number of passes, of which the fastest counts; the stream and raw decoding alternate.

    Returns
    -------
    list of dict
        One per plate: ``plate, open_s, fields, raw_fields_per_s, zarr_fields_per_s, stream_fields_per_s, cells_per_s,
        ratio, ratio_cpu, peak_rss_mb``.
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
        f"{cells_per_field} crops of {crop_px} px a field, {workers} threads, {device}, the fastest of "
        f"{repeats}; goal: at least {GOAL} of raw decoding"
    )
    for r in results:
        said = f"wells opened in {r['open_s']:.2f} s; {r['fields']} fields of {r['shape']}, stored in {r['stored']:.0%}"
        say(
            f"{r['plate']}: {r['wells']} {said}\n"
            f"  raw decoding   {r['raw_fields_per_s']:8.1f} fields/s  {r['raw_mb_per_s']:8.0f} MB/s\n"
            f"  Zarr-python    {r['zarr_fields_per_s']:8.1f} fields/s\n"
            f"  to device      {r['stream_fields_per_s']:8.1f} fields/s  {r['cells_per_s']:8.0f} cells/s\n"
            f"  ratio          {r['ratio']:8.2f}           {r['ratio_cpu']:8.2f} by processor time\n"
            f"  peak memory    {r['peak_rss_mb']:8.0f} MB"
        )
    return results


def measure(
    plate: Plate, *, device: str, n: int, crop_px: int, workers: int, repeats: int = 3, most: int = 48
) -> dict[str, Any]:
    """Return how fast a plate's fields are decoded alone, and how fast they become crops on the device.

    Raw decoding is the lower bound: the same number of threads reads each field's files and decompresses their chunks
    into allocated memory. Reading the same fields with zarr-python is measured as well.
    """
    import resource
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from cellvim.data.crops import CropSpec, stream_crops
    from cellvim.data.intensity import IntensityScale
    from cellvim.data.plate_store import ChunkedArray, open_array

    channels = plate.channel_names
    fields = [f for f in plate.fields if f.is_readable and f.layout.holds_data() and f.channel_names == channels][:most]
    scale = IntensityScale(tuple(channels), np.zeros(len(channels)), np.full(len(channels), 65535.0))
    spec = CropSpec("cell", crop_px)
    own = threading.local()

    def zarr(field: Field) -> int:
        return np.asarray(open_array(field.layout.folder)[...]).nbytes

    def decode(field: Field) -> int:
        array = field.layout.open()
        if not isinstance(array, ChunkedArray):
            return zarr(field)
        if getattr(own, "shape", None) != array.shape:
            own.shape, own.buffer = array.shape, np.empty(array.shape, array.dtype)
        array.read([(0, size) for size in array.shape], own.buffer)
        return own.buffer.nbytes

    def each(work: Callable[[Field], int]) -> int:
        with ThreadPoolExecutor(workers) as pool:
            return sum(pool.map(work, fields))

    def stream() -> int:
        cut = stream_crops(
            fields, channels, spec, scale=scale, cells=_Given(n), device=device, workers=workers, ahead=4 * workers
        )
        total = sum(len(c.crops) for c in cut)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return total

    passes = {"raw": lambda: each(decode), "zarr": lambda: each(zarr), "stream": stream}
    counted = {name: one() for name, one in passes.items()}  # afterwards the files are in memory for all of them
    wall, cpu = ({name: [] for name in passes} for _ in range(2))
    for _ in range(repeats):  # alternating, so that other load affects all of them alike
        for name, one in passes.items():
            start = time.perf_counter(), time.process_time()
            one()
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    raw_s, zarr_s, stream_s = (min(wall[name]) for name in passes)
    return {
        "fields": len(fields),
        "shape": " x ".join(map(str, fields[0].shape)),
        "stored": sum(f.layout.folder.stored_bytes() for f in fields) / counted["raw"],
        "raw_fields_per_s": len(fields) / raw_s,
        "raw_mb_per_s": counted["raw"] / raw_s / 1e6,
        "zarr_fields_per_s": len(fields) / zarr_s,
        "stream_fields_per_s": len(fields) / stream_s,
        "cells_per_s": counted["stream"] / stream_s,
        "ratio": raw_s / stream_s,
        "ratio_cpu": min(cpu["raw"]) / min(cpu["stream"]),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def synthetic_jump_plate(target: Path, *, wells: int = 4, seed: int = 0) -> Path:
    """Write a 384-well plate of JUMP's shape with pixels in a few wells; the others have metadata only.

    The pixels are smooth blobs with camera noise that compress like real ones: to 80%, where the
    8-channel field of JUMP's BR00117035 takes 76%, and decompressed about as fast.
    """
    import json
    import shutil

    from scipy import ndimage as ndi

    from cellvim.data.plate_writer import PlateWriter
    from cellvim.data.wells import well_name

    names = [well_name(r, c) for r in range(16) for c in range(24)]
    rng = np.random.default_rng(seed)
    base = ndi.gaussian_filter(rng.random((8, 135, 135)) ** 12, (0, 3, 3))
    base = ndi.zoom(base / base.max(), (1, 8, 8), order=1)[:, :JUMP_SIZE, :JUMP_SIZE]
    with PlateWriter(target, name=target.stem, channel_names=JUMP_CHANNELS, pixel_size_um=JUMP_PIXEL_UM) as writer:
        for well in names[:wells]:
            for site in range(1, JUMP_FIELDS + 1):
                shift = tuple(rng.integers(0, JUMP_SIZE, 2))
                level = 500 + 6_000 * np.roll(base, shift, axis=(1, 2))
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


def main() -> None:
    """Measure, print and write the figures."""
    from benchmarks.timing import check_output, parser, write_results

    options = parser(__doc__)
    options.add_argument("plate", nargs="?", metavar="PLATE.zarr", help="measure this plate as well")
    options.add_argument("--crop-size", type=int, default=64, metavar="PX", help="side of a crop (default: 64)")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    arguments = options.parse_args()
    check_output(arguments.output)
    results = run(arguments.plate, crop_px=arguments.crop_size, device=arguments.device)
    write_results(results, arguments.output)


if __name__ == "__main__":
    main()
