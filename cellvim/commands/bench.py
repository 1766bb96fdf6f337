"""The figures that the docs quote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cellvim.commands.console import check_file


def flops(
    size: Annotated[str, typer.Option(help="Size of the models: tiny, small, base, large or huge.")] = "tiny",
) -> None:
    """Operations of FastVim, Vim and ViT against image size (the paper's Figure 4)."""
    from rich.console import Console

    from cellvim.bench import flops

    Console().print(flops.table(flops.run(size)))


def cpu(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions: about a minute.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
) -> None:
    """Speed of the CPU kernels, as ratios within one run."""
    from rich.console import Console

    from cellvim.bench import cpu

    if output is not None:
        check_file(output)
    results = cpu.run(quick=quick)
    for table in cpu.tables(results):
        Console().print(table)
    _write(results, output)


def data(
    plate: Annotated[Path | None, typer.Argument(metavar="PLATE.zarr", help="A plate of your own, too.")] = None,
    crop_size: Annotated[int, typer.Option(metavar="PX", help="Side of a crop.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Cells a second from plate to device, beside the raw decoding of the same chunks."""
    from cellvim.bench import data

    data.run(plate, crop_px=crop_size, device=device)


def profiles(
    rows: Annotated[int, typer.Option(help="Cells.")] = 10_000_000,
    width: Annotated[int, typer.Option(help="Features.")] = 192,
    folder: Annotated[Path | None, typer.Option(help="Where to write the cells: 7.7 GB by default.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
) -> None:
    """Peak memory and time of aggregating synthetic cells to wells."""
    from cellvim.bench import profiles

    if output is not None:
        check_file(output)
    results = profiles.run(rows, width, folder=folder)
    _write(results, output)


def embed(
    plate: Annotated[str | None, typer.Argument(metavar="PLATE.zarr", help="A plate of your own.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME|PATH", help="As in `cellvim embed`.")] = None,
    cells: Annotated[str, typer.Option(metavar="SOURCE", help="As in `cellvim embed`; of your own plate.")] = "nuclei",
    crop_size: Annotated[int, typer.Option(metavar="PX", help="Side of a crop.")] = 64,
    wells: Annotated[int, typer.Option(metavar="N", help="How many wells.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Crops at once.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Instead: peak memory with 1, 10 and 100 plates.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
) -> None:
    """Cells a second and plates an hour, end to end, beside the model alone."""
    from cellvim.bench import embed as bench

    if output is not None:
        check_file(output)
    if memory:
        results = bench.run_memory()
    else:
        results = bench.run(
            plate,
            model=model,
            cells=cells,
            crop_px=crop_size,
            wells=wells,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
    _write(results, output)


def gpu(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer models and repetitions: under 3 minutes.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file, written after every row.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Every row once, tiny, on any device.")] = False,
) -> None:
    """Speed of the CUDA kernels and models against the floor of this GPU."""
    from cellvim.bench import gpu, gpu_report

    if output is not None:
        check_file(output)
    results = gpu.run(quick, output, dry_run)
    print(gpu_report.report(results))
    if any(row.get("failed") for row in results["rows"]):
        raise typer.Exit(3)


def _write(results: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        import json

        output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Wrote {output}")
