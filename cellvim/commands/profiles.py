"""From embeddings to profiles and figures."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from cellvim.commands.console import Batch, Overwrite, check_file, count, progress_bar, remarks_shown
from cellvim.errors import InputError


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

    with remarks_shown(), progress_bar("Aggregating", "") as progress:
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
        f"{count(profiles.n_obs, 'profile')} of {count(profiles.n_vars, 'feature')}"
        f"{', normalised: ' + ', '.join(made) if made else ''} → {output}\nNext: cellvim evaluate {quote(str(output))}"
    )


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

    from cellvim.evaluate.evaluation import TASKS, evaluate_profiles, summary_tables
    from cellvim.profiles import read_profiles

    if output is not None and output.exists() and not overwrite:
        raise InputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if output is not None:
        check_file(output)
    with remarks_shown(), progress_bar("Evaluating", "") as progress:
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
