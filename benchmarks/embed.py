"""Compare the time to embed a plate with the model alone on the same crops; measure the memory for many plates.

Both are measured in one run, so that other load on the machine affects both.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cellvim.embedding.plan import EmbeddingPlan

GOAL = 0.9  # of the model alone
FIELDS_OF_A_PLATE = 384 * 9
CELLS_OF_A_FIELD = 100  # at given positions: the synthetic plate has no nuclei
PLATES = (1, 10, 100)


def run(
    plate: str | Path | None = None,
    *,
    model: str | None = None,
    cells: str = "nuclei",
    crop_px: int = 64,
    wells: int = 2,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    repeats: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time the embedding of a plate and its parts, and then the model alone on the same number of crops.

    Parameters
    ----------
    plate
        Plate to embed. By default a synthetic one of JUMP's shape: fields of 8 x 1080², 9 per well, with 100 cells each
        at given positions.
    model, cells, crop_px, device, precision, batch_size
        As in `cellvim.embed`.
    wells
        Number of wells to embed.
    repeats
        Number of passes of both, of which the fastest counts.
    say
        Called with each line of output.

    Returns
    -------
    dict
        Figures, and the machine.
    """
    from benchmarks.timing import machine
    from cellvim.embedding.encode import with_batch_size
    from cellvim.embedding.options import DEFAULT_MODEL
    from cellvim.embedding.plan import plan_embedding

    with tempfile.TemporaryDirectory() as folder:
        source: str | Path
        if plate is None:
            source, cells = _drawn_plate(Path(folder), wells)
        else:
            source = plate
        start = time.perf_counter()
        plan = plan_embedding(
            source,
            model=model or DEFAULT_MODEL,
            unit="cell",
            cells=cells,
            crop_size=crop_px,
            wells=_first_wells(source, wells),
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
        plan = with_batch_size(plan)
        planning_s = time.perf_counter() - start
        crops = _some_crops(plan)
        passes, alone = [], float("inf")
        for number in range(repeats):  # alternating
            passes.append(_end_to_end(plan, Path(folder) / f"out{number}.zarr"))
            alone = min(alone, _model_alone(plan, crops, passes[-1]["cells"]))
        best = min(passes, key=lambda p: p["seconds"])
        effect = _effect_of_bfloat16(plan, crops)
    fields_per_s = best["fields"] / best["seconds"]
    result = {
        **machine(),
        "device": plan.device,
        "precision": plan.precision,
        "batch_size": plan.batch_size,
        "model": plan.model_name,
        "plate": plan.plates[0].name,
        "channels": len(plan.plates[0].channels),
        "crop_px": crop_px,
        "planning_s": planning_s,
        **best,
        "cells_per_s": best["cells"] / best["seconds"],
        "plates_per_h": 3600 * fields_per_s / FIELDS_OF_A_PLATE,
        "model_alone_s": alone,
        "model_alone_cells_per_s": best["cells"] / alone,
        "ratio": alone / best["seconds"],
        "bfloat16": effect,
    }
    if device.startswith("cuda") or plan.device.startswith("cuda"):
        import torch

        result["gpu"] = torch.cuda.get_device_name(plan.device)
    _say(result, say)
    return result


def run_memory(*, counts: tuple[int, ...] = PLATES, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Embed 1, 10 and 100 small plates into one AnnData, each in a separate process, and print its peak memory.

    Parameters
    ----------
    counts
        Numbers of plates.
    say
        Called with each line of output.
    """
    from benchmarks.timing import machine

    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = _small_model(Path(folder))
        first = _small_plate(Path(folder) / "b000" / "plate.zarr")
        for i in range(1, max(counts)):
            shutil.copytree(first, Path(folder) / f"b{i:03d}" / "plate.zarr")
        for count in counts:
            paths = [str(Path(folder) / f"b{i:03d}" / "plate.zarr") for i in range(count)]
            code = "import sys; from benchmarks.embed import embed_and_weigh; embed_and_weigh(sys.argv[1:])"
            output = str(Path(folder) / f"all{count}.zarr")
            said = subprocess.run(
                [sys.executable, "-c", code, output, str(model), *paths], capture_output=True, text=True, check=True
            )
            found.append({"plates": count, **json.loads(said.stdout.splitlines()[-1])})
            say(
                f"{count:4d} plates  {found[-1]['fields']:5d} fields  {found[-1]['rows']:7d} rows  "
                f"peak {found[-1]['peak_rss_mb']:7.1f} MB  ({found[-1]['seconds']:.1f} s)"
            )
    growth = found[-1]["peak_rss_mb"] / found[0]["peak_rss_mb"]
    say(f"{counts[-1]} plates take {growth:.2f} times the memory of {counts[0]}")
    return {**machine(), "memory": found, "growth": growth}


def embed_and_weigh(arguments: list[str]) -> None:
    """Embed plates in this process and print its peak memory: output, model, plates."""
    from cellvim.embedding import EmbeddingOptions, RunOptions, embed_plates

    output, model, *plates = arguments
    start = time.perf_counter()
    options = EmbeddingOptions(model=model, unit="cell", device="cpu")
    [summary] = embed_plates(plates, output, options, RunOptions())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"fields": summary.n_fields, "rows": summary.n_units, "peak_rss_mb": round(peak, 1)}
    print(json.dumps({**found, "seconds": round(time.perf_counter() - start, 1)}))


def _end_to_end(plan: EmbeddingPlan, output: Path) -> dict[str, Any]:
    from cellvim.embedding import run_embedding

    spent = {"model": 0.0, "writing rows": 0.0, "putting together": 0.0}
    with _timed(plan, spent):
        start = time.perf_counter()
        summary = run_embedding(plan, output)
        seconds = time.perf_counter() - start
    spent["waiting for crops, and the rest"] = seconds - sum(spent.values())
    return {
        "seconds": seconds,
        "fields": summary.n_fields - len(summary.failed),
        "cells": summary.n_units,
        "shares": {name: value / seconds for name, value in spent.items()},
    }


@contextmanager
def _timed(plan: EmbeddingPlan, spent: dict[str, float]) -> Iterator[None]:
    """Measure the seconds spent in the model, in writing rows and in assembling the output."""
    from cellvim.embedding import run
    from cellvim.embedding.encode import FieldEmbedder
    from cellvim.embedding.ledger import Ledger

    places = [
        (FieldEmbedder, "encode_batch", "model"),
        (Ledger, "store", "writing rows"),
        (run, "assemble", "putting together"),
    ]
    kept = [getattr(owner, name) for owner, name, _ in places]

    def counted(function: Callable, what: str) -> Callable:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            if what == "model":
                _wait_for(plan.device)
            spent[what] += time.perf_counter() - start
            return result

        return timed

    for (owner, name, what), function in zip(places, kept, strict=True):
        setattr(owner, name, counted(function, what))
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, kept, strict=True):
            setattr(owner, name, function)


def _model_alone(plan: EmbeddingPlan, crops: Any, n: int) -> float:
    """Return the seconds that the model takes for n crops on the device."""
    encode = _encoder_of(plan)
    batches = crops.split(plan.batch_size)
    encode(batches[0])
    _wait_for(plan.device)
    start, done, i = time.perf_counter(), 0, 0
    while done < n:
        batch = batches[i % len(batches)][: n - done]
        encode(batch)
        done, i = done + len(batch), i + 1
    _wait_for(plan.device)
    return time.perf_counter() - start


def _encoder_of(plan: EmbeddingPlan) -> Callable[[Any], list[Any]]:
    """Return the function that turns a batch into features, as in an embedding."""
    from cellvim.embedding.encode import FieldEmbedder

    embedder = FieldEmbedder(plan)
    features_of = embedder.features_of()
    return lambda batch: embedder.encode_batch(plan.plates[0], batch, features_of)


def _effect_of_bfloat16(plan: EmbeddingPlan, crops: Any) -> dict[str, float]:
    """Return the difference between embeddings of the same crops in bfloat16 and float32."""
    from dataclasses import replace

    import torch

    encoders = [_encoder_of(replace(plan, precision=p)) for p in ("float32", "bfloat16")]
    found = [torch.cat([encode(batch)[0] for batch in crops.split(plan.batch_size)]) for encode in encoders]
    exact, rough = (f.double().cpu() for f in found)
    centered = [f - exact.mean(0) for f in (exact, rough)]
    return {
        "relative_difference": float((rough - exact).norm() / exact.norm()),
        "relative_to_spread_of_cells": float((rough - exact).norm() / centered[0].norm()),
        "smallest_cosine": float(torch.nn.functional.cosine_similarity(exact, rough).min()),
        "smallest_cosine_of_centered": float(torch.nn.functional.cosine_similarity(*centered).min()),
    }


def _some_crops(plan: EmbeddingPlan) -> Any:
    """Return the crops of some fields, on the device and in the model's size."""
    import torch

    from cellvim.data.crops import resize_crops, stream_crops

    plate = plan.plates[0]
    cut = stream_crops(
        plate.fields[:4],
        plate.channels,
        plate.cutting,
        scale=plate.scale,
        cells=plate.cells,
        device=plan.device,
        extra_channels=plate.extra_channels,
    )
    found = [c.crops for c in cut if c.failed is None and len(c.crops)]
    return resize_crops(torch.cat(found), plan.input_px)


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _first_wells(plate: str | Path, count: int) -> list[str]:
    from cellvim.data.plate import open_plate

    return open_plate(plate).wells[:count]


def _drawn_plate(folder: Path, wells: int) -> tuple[Path, str]:
    """Write a synthetic plate of JUMP's shape, and a table of its cell positions."""
    import pandas as pd

    from benchmarks.data import JUMP_SIZE, synthetic_jump_plate
    from cellvim.data.plate import open_plate

    path = synthetic_jump_plate(folder / "jump_shape.zarr", wells=wells)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["ome"]["plate"]["wells"] = root["attributes"]["ome"]["plate"]["wells"][:wells]  # with pixels
    (path / "zarr.json").write_text(json.dumps(root))
    rng = np.random.default_rng(0)
    fields = [f for f in open_plate(path).fields if f.well in _first_wells(path, wells)]
    n = CELLS_OF_A_FIELD
    table = pd.DataFrame(
        {
            "Metadata_Well": np.repeat([f.well for f in fields], n),
            "Metadata_Site": np.repeat([f.site for f in fields], n),
            "ObjectNumber": np.tile(np.arange(1, n + 1), len(fields)),
            "Nuclei_Location_Center_X": rng.uniform(0, JUMP_SIZE - 1, n * len(fields)),
            "Nuclei_Location_Center_Y": rng.uniform(0, JUMP_SIZE - 1, n * len(fields)),
        }
    )
    table.to_csv(folder / "cells.csv", index=False)
    return path, str(folder / "cells.csv")


def _small_plate(path: Path) -> Path:
    """Write a plate of 2 wells with 2 fields of 2 x 256², with some discs in each."""
    from cellvim.data.plate_writer import PlateWriter

    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    with PlateWriter(path, name="plate", channel_names=["DNA", "GFP"], pixel_size_um=0.5) as writer:
        for well in ("A01", "A02"):
            for site in ("1", "2"):
                image = rng.normal(200, 5, (2, 256, 256))
                for cy, cx in rng.permutation([(32 + 48 * i, 32 + 48 * j) for i in range(4) for j in range(4)])[:10]:
                    image[:, (y - cy) ** 2 + (x - cx) ** 2 < 100] += 900
                writer.write_field(well, site, image.clip(0, 65535).astype(np.uint16))
        writer.finish()
    return path


def _small_model(folder: Path) -> Path:
    import torch

    import cellvim

    torch.manual_seed(0)
    config = cellvim.EncoderConfig(
        image_size=32, patch_size=8, in_channels=2, channel_names=("DNA", "GFP"), embed_dim=32, depth=2, num_classes=0
    )
    return cellvim.save_checkpoint(cellvim.Encoder(config), folder / "small.safetensors")


def _say(r: dict[str, Any], say: Callable[[str], None]) -> None:
    where = r.get("gpu") or f"{r['processor']}, {r['threads']} threads"
    say(f"{r['model']} on {where}, {r['precision']}, batches of {r['batch_size']}; load of the machine {r['load']}")
    say(f"{r['fields']} fields of {r['plate']}, {r['channels']} channels, {r['cells']:,} cells of {r['crop_px']} px")
    say(f"  end to end     {r['cells_per_s']:9.1f} cells/s   {r['plates_per_h']:.3f} plates/h (384 wells x 9 fields)")
    say(f"  model alone    {r['model_alone_cells_per_s']:9.1f} cells/s")
    say(f"  ratio          {r['ratio']:9.2f}   (goal: {GOAL})")
    for name, share in r["shares"].items():
        say(f"  {100 * share:5.1f} %  {name}")
    effect = r["bfloat16"]
    say(
        f"  bfloat16 against float32: {effect['relative_difference']:.1e} of the embedding, "
        f"{effect['relative_to_spread_of_cells']:.1e} of the spread of the cells; smallest cosine "
        f"{effect['smallest_cosine']:.6f}, centered {effect['smallest_cosine_of_centered']:.4f}"
    )


def main() -> None:
    """Measure, print and write the figures."""
    from benchmarks.timing import check_output, parser, write_results

    options = parser(__doc__)
    options.add_argument("plate", nargs="?", metavar="PLATE.zarr", help="a plate of your own (default: synthetic)")
    options.add_argument("--model", metavar="NAME|PATH", help="as for `cellvim embed`")
    options.add_argument("--cells", default="nuclei", metavar="SOURCE", help="as for `cellvim embed`")
    options.add_argument("--crop-size", type=int, default=64, metavar="PX", help="side of a crop (default: 64)")
    options.add_argument("--wells", type=int, default=2, metavar="N", help="number of wells (default: 2)")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    options.add_argument("--precision", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    options.add_argument("--batch-size", type=int, metavar="N", help="crops per batch (default: by available memory)")
    options.add_argument("--memory", action="store_true", help="measure peak memory with 1, 10 and 100 plates instead")
    given = vars(options.parse_args())
    output, memory, crop_px = given.pop("output"), given.pop("memory"), given.pop("crop_size")
    check_output(output)
    results = run_memory() if memory else run(given.pop("plate"), crop_px=crop_px, **given)
    write_results(results, output)


if __name__ == "__main__":
    main()
