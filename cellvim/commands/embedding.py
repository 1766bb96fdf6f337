"""From plates to embeddings, and how far that is."""

from __future__ import annotations

from typing import Annotated

import typer

from cellvim.commands.console import plane_of, print_summary, progress_bar


def embed(
    plates: Annotated[
        list[str], typer.Argument(metavar="PLATE.zarr…", help="OME-Zarr plates: folders, zip files or URLs.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="What to write: .zarr or .h5ad (AnnData), .parquet; or a URL.")
    ] = "embeddings.zarr",
    unit: Annotated[str, typer.Option(help="What one row is: cell, tile or field.")] = "cell",
    model: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="A name of `cellvim models`, or a checkpoint.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="Channels by name: DNA,ER. Or what they mean: DNA=ch5,ER=ch4. All by default.")
    ] = None,
    wells: Annotated[str | None, typer.Option(help="Wells: A01,B07. All by default.")] = None,
    crop_size: Annotated[int | None, typer.Option(metavar="PX", help="Side of a cell's crop or of a tile.")] = None,
    crop_um: Annotated[float | None, typer.Option(metavar="UM", help="That side in µm, whatever the plate's.")] = None,
    um_per_px: Annotated[
        float | None, typer.Option("--um-per-px", metavar="UM", help="Resample all fields to this pixel size first.")
    ] = None,
    overlap: Annotated[float, typer.Option(metavar="SHARE", help="Of neighbouring tiles.")] = 0.0,
    cells: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="nuclei, cells, cellpose, labels:NAME, a table of positions or a folder of masks."
        ),
    ] = "nuclei",
    border: Annotated[str, typer.Option(help="Crops beyond the field: pad, reflect, shift or drop.")] = "pad",
    mask_neighbours: Annotated[bool, typer.Option("--mask-neighbours", help="Blank out other cells.")] = False,
    scale_by: Annotated[
        str, typer.Option(help="Scale intensities by: all (wells), controls, model (its levels), auto (as it learned).")
    ] = "auto",
    illumination: Annotated[bool, typer.Option("--illumination", help="Correct uneven light.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Crops embedded at once; by the free memory by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    devices: Annotated[
        str | None, typer.Option(metavar="D,D…", help="Devices for the workers to take in turn: cuda:0,cuda:1.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32 or bfloat16.")] = "auto",
    workers: Annotated[int, typer.Option(metavar="N", help="Processes of this machine to share the work.")] = 1,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do the I-th of N parts, as one job of an array.")
    ] = None,
    engine: Annotated[str, typer.Option(help="processes, or ray for a cluster.")] = "processes",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; one of this machine by default.")] = None,
    per_plate: Annotated[bool, typer.Option("--per-plate", help="One output a plate, in the folder --output.")] = False,
    format: Annotated[str | None, typer.Option(help="zarr, h5ad or parquet; by the output's name by default.")] = None,
    per_channel: Annotated[bool, typer.Option("--per-channel", help="Also an embedding of each channel.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also those of the classes that the model learned.")
    ] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also maps of tokens; with --unit field.")] = False,
    spatialdata: Annotated[bool, typer.Option("--spatialdata", help="Add SpatialData's attributes.")] = False,
    log: Annotated[bool, typer.Option("--log", help="Keep the log beside the output, as JSON lines.")] = False,
    seed: Annotated[int, typer.Option(help="Of random weights and of the intensity sample.")] = 0,
    z: Annotated[str | None, typer.Option(metavar="N|max", help="Plane of a z-stack, or its maximum.")] = None,
    t: Annotated[int | None, typer.Option(metavar="N", help="Time point.")] = None,
    level: Annotated[int, typer.Option(metavar="N", help="Resolution of the plate: 0 is the full one.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, and replace the output.")] = False,
) -> None:
    """Embed plates' cells, tiles or fields into an AnnData; what was interrupted goes on where it stopped."""
    from cellvim.embedding import DEFAULT_MODEL, EmbeddingOptions, RunOptions, embed_plates

    planned = {
        "unit": unit,
        "model": model or DEFAULT_MODEL,
        "channels": channels,
        "wells": wells.split(",") if wells else None,
        "crop_size": crop_size,
        "crop_um": crop_um,
        "um_per_px": um_per_px,
        "overlap": overlap,
        "cells": cells,
        "border": border,
        "mask_neighbours": mask_neighbours,
        "scale_by": scale_by,
        "illumination": illumination,
        "batch_size": batch_size,
        "device": devices.split(",")[0] if devices else device,
        "precision": precision,
        "per_channel": per_channel,
        "probabilities": probabilities,
        "tokens": tokens,
        "seed": seed,
        "z": plane_of(z),
        "t": t,
        "level": level,
    }
    run = {
        "format": format,
        "workers": workers,
        "devices": devices.split(",") if devices else (),
        "engine": engine,
        "address": address,
        "shard": shard,
        "spatialdata": spatialdata,
        "log": log,
        "overwrite": overwrite,
    }
    failed = False
    with progress_bar("Embedding", f"{unit}s") as progress:
        for summary in embed_plates(
            plates, output, EmbeddingOptions(**planned), RunOptions(**run), per_plate=per_plate, progress=progress
        ):
            print_summary(summary)
            failed = failed or bool(summary.failed)
    if failed:
        raise typer.Exit(3)


def status(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="What `cellvim embed` writes, or has written.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how far `cellvim embed` is: while it runs, after it stopped, and when it is done."""
    import json

    from cellvim.embedding.status import describe, outputs_of, read_status

    found = [read_status(one) for one in outputs_of(output)]  # several, where each plate has its own
    if as_json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        print("\n\n".join(describe(one) for one in found))
