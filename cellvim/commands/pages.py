"""What one looks at: a report, and what drove an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellvim.commands.console import Overwrite, PlatePath, progress_bar, warn


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

    with progress_bar("Reporting", "") as progress:
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
        warn(remark)
    print(summary)


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
        warn(remark)
    save_picture(explained.figure, output)
    print(f"{explained.summary} → {output}")
