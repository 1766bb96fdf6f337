"""The command line: one thin function a command.

Only typer and rich are imported here, so that ``cellvim --help`` answers at once; each command imports what it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from cellvim import __version__
from cellvim.errors import CellvimError, InputError, ModelError, listing, suggestion

if TYPE_CHECKING:
    from cellvim.embedding import EmbeddingSummary

INTERRUPTED = 130  # as shells report Ctrl-C


class _Commands(TyperGroup):
    """Commands whose errors are one clear line; anything but a `CellvimError` is a bug and keeps its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except CellvimError as error:
            _say(f"Error: {' '.join(str(error).split())}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            raise typer.Exit(_interrupted(stop)) from None


app = typer.Typer(
    cls=_Commands,
    help="Microscopy plates to embeddings: OME-Zarr in, FastChannelVim, AnnData out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes 0.1 s more to appear
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Print the figures that the docs quote.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 not usable, 3 done but for some fields, 130 Ctrl-C."""
    # Threads of torch and of our kernels wait for each other by spinning; for long, where other programs want the
    # processor too, and a model on the CPU is then up to ten times slower. Shorter costs nothing on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app(args=argv, prog_name="cellvim")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as stop:  # before a command ran, or after
        return _interrupted(stop)
    return 0


def _interrupted(stop: KeyboardInterrupt) -> int:
    _say(str(stop) or "Interrupted: nothing unfinished bears an output's name.")
    return INTERRUPTED


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cellvim {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


PlatePath = Annotated[str, typer.Argument(metavar="PLATE.zarr", help="An OME-Zarr plate: folder, zip file or URL.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output when it exists.")]
Control = Annotated[str, typer.Option(metavar="[COLUMN:]VALUE", help="Which rows are negative controls.")]
Batch = Annotated[str | None, typer.Option(metavar="COLUMN", help="Plates that were made together.")]


@app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of TIFFs, as the microscope wrote it.")],
    target: Annotated[Path, typer.Argument(metavar="PLATE.zarr", help="The OME-Zarr plate to make.")],
    metadata: Annotated[
        Path | None, typer.Option("--metadata", "-m", help="Plate map: a table with a column of wells.")
    ] = None,
    channel_names: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=NAME,…", help="What the files' channels show: ch5=DNA,ch4=ER; or jump for JUMP-CP's."
        ),
    ] = None,
    pixel_size: Annotated[float | None, typer.Option(metavar="UM", help="Side of a pixel in µm.")] = None,
    pert_type: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="Which wells are controls: Compound:DMSO=negcon,Wortmannin=poscon."),
    ] = None,
    plate_name: Annotated[str | None, typer.Option(help="What to call the plate; as the folder by default.")] = None,
    format: Annotated[
        str, typer.Option(help="tiff, phenix, imagexpress, load_data, ome_tiff or single_cells; auto tells them apart.")
    ] = "auto",
    pattern: Annotated[str | None, typer.Option(help="How files are named, when it cannot be told.")] = None,
    compounds: Annotated[
        list[Path] | None, typer.Option(help="Table of the perturbations that the plate map names; may be repeated.")
    ] = None,
    load_data: Annotated[
        Path | None, typer.Option(help="CellProfiler's LoadData CSV, which says what each file shows.")
    ] = None,
    z: Annotated[str | None, typer.Option(metavar="N|max", help="Plane of a z-stack, from 0, or its maximum.")] = None,
    t: Annotated[int | None, typer.Option(metavar="N", help="Time point, from 0.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make an OME-Zarr plate from a folder of TIFFs."""
    from cellvim.data.importers import import_plate

    with _progress("Importing", "") as progress:
        plate = import_plate(
            source,
            target,
            metadata=metadata,
            compounds=compounds or (),
            load_data=load_data,
            z=_plane(z),
            t=t,
            format=format,
            pattern=pattern,
            pixel_size_um=pixel_size,
            channel_names=channel_names,
            plate_name=plate_name,
            pert_type=pert_type,
            overwrite=overwrite,
            progress=progress,
        )
    print(
        f"{_count(len(plate.wells), 'well')}, {_count(len(plate.fields), 'field')}, "
        f"channels {', '.join(plate.channel_names)} → {target}\n"
        f"Next: cellvim embed {quote(str(target))} -o embeddings.zarr{_naming_dna(plate.channel_names)}"
    )
    for note in plate.cellvim_attributes.get("notes", ()):
        _say(f"Note: {note}.")


@app.command()
def info(plate: PlatePath) -> None:
    """Say what a plate holds, and what is odd about it."""
    from cellvim.data.plate import describe, open_plate

    found = describe(open_plate(plate))
    pixel = found["pixel_size_um"]
    per_well = ", ".join(f"{fields} in each of {_count(w, 'well')}" for fields, w in found["fields_per_well"].items())
    for name, value in {
        "plate": f"{found['name']} (OME-Zarr {found['ome_zarr_version']})",
        "wells": f"{found['n_wells']} ({_first_and_last(found['wells'])})",
        "fields": f"{found['n_fields']} ({per_well})",
        "channels": ", ".join(found["channel_names"]),
        "size": ", ".join(f"{size} ({_count(n, 'field')})" for size, n in found["sizes"].items()),
        "pixels": ", ".join(found["dtypes"]),
        "µm/px": "unknown" if pixel is None else f"{pixel:g}",
        "plate map": ", ".join(found["well_metadata_columns"]) or "none",
    }.items():
        print(f"{name:<10} {value}")
    for oddity in found["oddities"]:
        print(f"{'odd':<10} {oddity}")


@app.command()
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
    from cellvim.embedding import DEFAULT_MODEL, embed_plates

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
        "view": {"z": _plane(z), "t": t, "level": level},
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
    }
    failed = False
    with _progress("Embedding", f"{unit}s") as progress:
        for summary in embed_plates(
            plates, output, planned, run, per_plate=per_plate, overwrite=overwrite, progress=progress
        ):
            _report(summary)
            failed = failed or bool(summary.failed)
    if failed:
        raise typer.Exit(3)


@app.command()
def status(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="What `cellvim embed` writes, or has written.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how far `cellvim embed` is: while it runs, after it stopped, and when it is done."""
    import json

    from cellvim.running.status import describe, read_status

    found = read_status(output)
    print(json.dumps(found, indent=1) if as_json else describe(found))


@app.command()
def profile(
    embeddings: Annotated[
        list[Path],
        typer.Argument(metavar="EMBEDDINGS…", help="AnnData (.zarr, .h5ad), tables, or folders."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The profiles to write: .h5ad, .zarr, .parquet or .csv.")
    ] = Path("profiles.h5ad"),
    aggregate: Annotated[
        str, typer.Option(help="A well's profile: mean, median or robust of its cells; none if rows are profiles.")
    ] = "mean",
    by: Annotated[
        str, typer.Option(metavar="COLUMNS", help="Rows that agree in these columns make one profile.")
    ] = "Metadata_Plate,Metadata_Well",
    normalize: Annotated[
        str,
        typer.Option(
            metavar="METHODS", help="robustmad, standardize, spherize, tvn, pca, harmony, in this order; or none."
        ),
    ] = "robustmad",
    fit_on: Annotated[str, typer.Option(help="Fit on the negative controls, negcon, or on all rows.")] = "negcon",
    per: Annotated[
        str | None, typer.Option(metavar="WHAT", help="Fit for each plate, batch or COLUMN, or once for all.")
    ] = None,
    select_features: Annotated[
        bool, typer.Option("--select-features", help="Leave out features that are redundant or do not vary.")
    ] = False,
    min_cells: Annotated[int, typer.Option(metavar="N", help="Wells with fewer cells get no profile.")] = 1,
    control: Annotated[
        str, typer.Option(metavar="[COLUMN:]VALUE", help="Which rows are negative controls.")
    ] = "negcon",
    batch: Batch = None,
    seed: Annotated[int, typer.Option(help="Of PCA and Harmony.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make normalised profiles of wells from the embeddings of their cells."""
    from cellvim.profiles import pipeline

    with _remarks(), _progress("Aggregating", "") as progress:
        profiles = pipeline.profile(
            embeddings,
            output,
            aggregate_by=by.split(","),
            statistic=None if aggregate == "none" else aggregate,
            normalize=[] if normalize == "none" else normalize.split(","),
            fit_on=fit_on,
            per=per,
            select=select_features,
            min_cells=min_cells,
            control=control,
            batch=batch,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    made = [*profiles.layers, *profiles.obsm]
    print(
        f"{_count(profiles.n_obs, 'profile')} of {_count(profiles.n_vars, 'feature')}"
        f"{', normalised: ' + ', '.join(made) if made else ''} → {output}\nNext: cellvim evaluate {quote(str(output))}"
    )


@app.command()
def evaluate(
    profiles: Annotated[Path, typer.Argument(metavar="PROFILES", help="Profiles: .h5ad, .zarr or a table.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write everything as JSON.")] = None,
    use: Annotated[
        str | None, typer.Option(metavar="NAMES", help="X, a layer or an entry of obsm; what was made last by default.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAMES", help="Only these tasks: retrieval,assay,…")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Classify this; treatments by default.")] = None,
    control: Annotated[
        str, typer.Option(metavar="[COLUMN:]VALUE", help="Which rows are negative controls.")
    ] = "negcon",
    positive: Annotated[str, typer.Option(metavar="[COLUMN:]VALUE", help="Which are positive controls.")] = "poscon",
    perturbation: Annotated[str | None, typer.Option(metavar="COLUMN", help="What was done to the cells.")] = None,
    dose: Annotated[str | None, typer.Option(metavar="COLUMN", help="How much of it.")] = None,
    mechanism: Annotated[str | None, typer.Option(metavar="COLUMN", help="Its mechanism of action.")] = None,
    plate: Annotated[str | None, typer.Option(metavar="COLUMN", help="The plate.")] = None,
    well: Annotated[str | None, typer.Option(metavar="COLUMN", help="The well.")] = None,
    batch: Batch = None,
    null_size: Annotated[int, typer.Option(help="Random draws for p values.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Say what profiles can tell: retrieval, mechanisms, classification, batches, Z′, dose response."""
    from rich.console import Console

    from cellvim.evaluate.evaluation import TASKS, evaluate_profiles
    from cellvim.evaluate.tables import summary_tables
    from cellvim.profiles import read_profiles

    if output is not None and output.exists() and not overwrite:
        raise InputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if output is not None:
        _check_file(output)
    with _remarks(), _progress("Evaluating", "") as progress:
        result = evaluate_profiles(
            read_profiles(profiles),
            use=use.split(",") if use else None,
            tasks=tasks.split(",") if tasks else TASKS,
            label=label,
            control=control,
            positive=positive,
            null_size=null_size,
            seed=seed,
            progress=progress,
            perturbation=perturbation,
            dose=dose,
            mechanism=mechanism,
            plate=plate,
            well=well,
            batch=batch,
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120  # of a file or a pipe rich believes that it has 80 columns
    for table in summary_tables(result):
        console.print(table)
        console.print()
    roles = ("plate", "well", "batch", "perturbation", "dose", "mechanism", "pert_type")
    taken = (f"{role} {column}" for role in roles if (column := result.settings["columns"][role]))
    print(f"Columns: {', '.join(taken)}")
    for row in result.left_out.itertuples():
        print(f"Not computed: {row.task}: {row.reason}")
    if output is not None:
        result.save(output)
        print(f"Wrote {output}")


@app.command()
def report(
    embeddings: Annotated[Path, typer.Argument(metavar="EMBEDDINGS", help="What `cellvim embed` wrote; or .h5ad.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    plate: Annotated[
        list[str] | None,
        typer.Option(metavar="PLATE.zarr", help="Where crops come from, if the plate was moved; may be repeated."),
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `cellvim profile` wrote; made here by default.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="JSON", help="What `cellvim evaluate -o` wrote; computed here by default.")
    ] = None,
    color_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="What colours the map of cells at first.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; the plate's name by default.")] = None,
    max_cells: Annotated[
        int | None, typer.Option(metavar="N", help="Cells laid out by UMAP at most: 20,000 by default.")
    ] = None,
    control: Annotated[
        str, typer.Option(metavar="[COLUMN:]VALUE", help="Which rows are negative controls.")
    ] = "negcon",
    positive: Annotated[str, typer.Option(metavar="[COLUMN:]VALUE", help="Which are positive controls.")] = "poscon",
    perturbation: Annotated[str | None, typer.Option(metavar="COLUMN", help="What was done to the cells.")] = None,
    dose: Annotated[str | None, typer.Option(metavar="COLUMN", help="How much of it.")] = None,
    mechanism: Annotated[str | None, typer.Option(metavar="COLUMN", help="Its mechanism of action.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write everything about embeddings on one HTML page: plates, a map with crops, controls, activity, doses."""
    from cellvim.report import write_report

    with _progress("Reporting", "") as progress:
        summary = write_report(
            embeddings,
            output,
            plate=plate or (),
            profiles=profiles,
            evaluation=evaluation,
            color_by=color_by,
            title=title,
            max_cells=max_cells,
            control=control,
            positive=positive,
            perturbation=perturbation,
            dose=dose,
            mechanism=mechanism,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    for remark in summary.remarks:
        _warn(remark)
    print(summary)


@app.command()
def attribute(
    plate: PlatePath,
    well: Annotated[str, typer.Option(help="The well of the crop: B03.")],
    site: Annotated[str | None, typer.Option(help="Its field; the first one that holds a cell, by default.")] = None,
    number: Annotated[
        int | None, typer.Option(metavar="N", help="Its Metadata_ObjectNumber; nearest to the middle by default.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: .png, .pdf or .svg.")] = Path(
        "attribution.png"
    ),
    model: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="A name of `cellvim models`, or a checkpoint.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="integrated_gradients, gradient_times_input, occlusion, or attention (its pooling).")
    ] = "integrated_gradients",
    target: Annotated[str, typer.Option(metavar="WHAT", help="embedding, or the number of a class.")] = "embedding",
    steps: Annotated[int, typer.Option(help="Points of the path, for integrated gradients.")] = 32,
    unit: Annotated[str, typer.Option(help="What was embedded: cell, tile or field.")] = "cell",
    channels: Annotated[str | None, typer.Option(help="Channels by name, as for embed.")] = None,
    crop_size: Annotated[int | None, typer.Option(metavar="PX", help="Side of the crop, as for embed.")] = None,
    cells: Annotated[str, typer.Option(metavar="SOURCE", help="Where cells come from, as for embed.")] = "nuclei",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Show which patches and channels of a crop drove its embedding, or a class."""
    from cellvim.attribution.crop import explain_crop
    from cellvim.attribution.picture import check_picture, save_picture
    from cellvim.embedding import DEFAULT_MODEL, plan_embedding

    check_picture(output, overwrite=overwrite)
    plan = plan_embedding(
        plate,
        unit=unit,
        model=model or DEFAULT_MODEL,
        channels=channels,
        crop_size=crop_size,
        cells=cells,
        device=device,
        seed=seed,
    )
    explained = explain_crop(plan, well, site, number, method=method, target=target, steps=steps)
    for remark in explained.remarks:
        _warn(remark)
    save_picture(explained.figure, output)
    print(f"{explained.summary} → {output}")


@app.command(
    "train",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train_command(context: typer.Context) -> None:
    """Train a model: a recipe, a configuration, or your own plate and a column of labels."""
    from cellvim.train.usage import USAGE, describe_recipes

    arguments = list(context.args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if "--list" in arguments:
        for name, what in describe_recipes():
            print(f"{name:<34} {what}")
        return
    try:
        from cellvim.train.run import train
    except ModuleNotFoundError as error:
        raise InputError(f"Training needs {error.name}. Install it: pip install 'cellvim[train]'") from error
    model = train([a if a != "--help_all" else "--help" for a in arguments])
    if model is not None:
        print(f"{model}\nNext: cellvim embed PLATE.zarr -o embeddings.zarr --model {quote(str(model))}")


@app.command()
def models(
    family: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this family, or the card of a trained model.")
    ] = None,
) -> None:
    """List the models that can be named, with their parameters and operations."""
    from rich.console import Console
    from rich.table import Table

    from cellvim.models.flops import count_flops, count_parameters
    from cellvim.models.registry import DESCRIPTIONS, FAMILIES, list_models, model_config
    from cellvim.models.shipped import model_card, shipped_models

    if family in shipped_models():
        print(model_card(family))
        return
    if family is not None and family not in FAMILIES:
        raise ModelError(f"There is no family {family!r}; there are {listing(FAMILIES)}.{suggestion(family, FAMILIES)}")
    for one in FAMILIES if family is None else (family,):
        table = Table("name", title=f"{one}: {DESCRIPTIONS[one]}", title_justify="left", box=None)
        for column in ("blocks × width", "parameters", "operations"):
            table.add_column(column, justify="right")
        for name in (n for n in list_models() if n.split("_")[0] == one):
            config = model_config(name)
            table.add_row(
                name,
                f"{config.depth} × {config.embed_dim}",
                f"{count_parameters(config) / 1e6:,.1f} M",
                f"{count_flops(config)['total'] / 1e9:,.2f} G",
            )
        Console().print(table, "")
    print("Operations are of one image of 224 × 224 pixels, 3 channels or 8 with a token a channel (docs/models.md).")
    print("Any other patch size works too, as in fastvim_tiny_patch14.")
    print("These names give random weights. `cellvim embed --model PATH` takes trained ones; so does the name of one")
    print("that comes with CellVim:")
    for name, path in shipped_models().items():
        print(f"  {name}  TRAINED, {path.stat().st_size / 1e6:.1f} MB (card: cellvim models {name})")


@app.command()
def backends() -> None:
    """Say which back-end runs the models here, and why."""
    from cellvim.ops.dispatch import describe_backends

    for backend in describe_backends():
        state = "runs" if backend.selected else "there" if backend.available else "not there"
        print(f"{backend.name:<12} {state:<10} {backend.reason}")


@bench_app.command("flops")
def bench_flops(
    size: Annotated[str, typer.Option(help="Size of the models: tiny, small, base, large or huge.")] = "tiny",
) -> None:
    """Operations of FastVim, Vim and ViT against image size (the paper's Figure 4)."""
    from rich.console import Console

    from cellvim.bench import flops

    Console().print(flops.table(flops.run(size)))


@bench_app.command("cpu")
def bench_cpu(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions: about a minute.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
) -> None:
    """Speed of the CPU kernels, as ratios within one run."""
    import json

    from rich.console import Console

    from cellvim.bench import cpu

    if output is not None and not output.parent.is_dir():
        raise InputError(f"The folder {output.parent} for the figures does not exist.")
    results = cpu.run(quick=quick)
    for table in cpu.tables(results):
        Console().print(table)
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Wrote {output}")


@bench_app.command("data")
def bench_data(
    plate: Annotated[Path | None, typer.Argument(metavar="PLATE.zarr", help="A plate of your own, too.")] = None,
    crop_size: Annotated[int, typer.Option(metavar="PX", help="Side of a crop.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Cells a second from plate to device, beside the raw decoding of the same chunks."""
    from cellvim.bench import data

    data.run(plate, crop_px=crop_size, device=device)


@bench_app.command("profiles")
def bench_profiles(
    rows: Annotated[int, typer.Option(help="Cells.")] = 10_000_000,
    width: Annotated[int, typer.Option(help="Features.")] = 192,
    folder: Annotated[Path | None, typer.Option(help="Where to write the cells: 7.7 GB by default.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
) -> None:
    """Peak memory and time of aggregating synthetic cells to wells."""
    import json

    from cellvim.bench import profiles

    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"The folder {output.parent} for the figures does not exist.")
    results = profiles.run(rows, width, folder=folder)
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Wrote {output}")


@bench_app.command("embed")
def bench_embed(
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
    import json

    from cellvim.bench import embed as bench

    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"The folder {output.absolute().parent} for the figures does not exist.")
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
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Wrote {output}")


@app.command()
def datasets(name: Annotated[str | None, typer.Argument(help="Show this dataset's card.")] = None) -> None:
    """List the datasets that are described, and those that come with CellVim."""
    from cellvim.data.bundled import dataset_card, dataset_cards

    if name is not None:
        print(dataset_card(name))
        return
    for card in dataset_cards():
        print(f"{card.name:<20} {'comes with it' if card.has_images else 'to download':<14} {card.title}")
    print("cellvim datasets NAME shows the card: source, licence, channels, how to get it.")


@bench_app.command("gpu")
def bench_gpu(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer models and repetitions: under 3 minutes.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file, written after every row.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Every row once, tiny, on any device.")] = False,
) -> None:
    """Speed of the CUDA kernels and models against the floor of this GPU."""
    from cellvim.bench import gpu, gpu_report

    if output is not None and not output.parent.is_dir():
        raise InputError(f"The folder {output.parent} for the figures does not exist.")
    results = gpu.run(quick, output, dry_run)
    print(gpu_report.report(results))
    if any(row.get("failed") for row in results["rows"]):
        raise typer.Exit(3)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what the demo makes.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew when the folder exists.")] = False,
) -> None:
    """Run the main job on a small real plate: import, embed, look at the result."""
    from cellvim.demo import run_demo

    run_demo(output, overwrite=overwrite, say=print, warn=_warn, progress=_progress)


def _open(plate: str, z: str | None, t: int | None, level: int):
    from cellvim.data.plate import open_plate

    return open_plate(plate, z=_plane(z), t=t, level=level)


def _plane(z: str | None) -> int | str | None:
    if z is not None and z != "max" and not z.isdigit():
        raise InputError(f"--z is '{z}'; expected the number of a plane, or max.")
    return int(z) if z and z.isdigit() else z


def _check_file(output: Path) -> None:
    """Refuse, before any work, a file that could not be written after it."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InputError(f"The folder {folder} for the figures does not exist.")
    if output.is_dir():
        raise InputError(f"{output} is a folder; expected the name of a file for the figures.")
    if not os.access(folder, os.W_OK):
        raise InputError(f"The folder {folder} for the figures cannot be written to. Choose another --output.")


def _naming_dna(channels: Sequence[str]) -> str:
    """Return the option that cells need on a plate none of whose channels is DNA by its name."""
    from cellvim.channels import canonical_name

    if any(canonical_name(name) == "DNA" for name in channels):
        return ""
    return " --channels DNA=NAME  (the name here of the channel that shows nuclei; or --unit tile)"


def _report(summary: EmbeddingSummary) -> None:
    for remark in summary.remarks():
        _warn(remark)
    print(summary)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _warn(line: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("Warning: " + line, style="bold yellow"))


@contextmanager
def _remarks() -> Iterator[None]:
    """Show warnings of our own as one line each, and none of the libraries'."""
    import warnings

    from cellvim.errors import CellvimWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CellvimWarning)
        yield
    for warning in caught:
        _warn(" ".join(str(warning.message).split()))


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _first_and_last(wells: list[str]) -> str:
    return wells[0] if len(wells) == 1 else f"{wells[0]} to {wells[-1]}"


@contextmanager
def _progress(what: str, units: str) -> Iterator[Callable[..., None]]:
    """Yield a function of (done, total, rows) that moves a progress bar; nothing is shown but on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rows]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None, rows="")

        def update(done: int, total: int, rows: int | None = None) -> None:
            bar.update(task, completed=done, total=total, rows="" if rows is None else f"{rows:,} {units}")

        yield update


if __name__ == "__main__":
    sys.exit(main())
