"""Plates: make one, say what it holds, list the data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from cellvim.commands.console import Overwrite, PlatePath, count, plane_of, progress_bar, say


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

    with progress_bar("Importing", "") as progress:
        plate = import_plate(
            source,
            target,
            metadata=metadata,
            compounds=compounds or (),
            load_data=load_data,
            z=plane_of(z),
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
        f"{count(len(plate.wells), 'well')}, {count(len(plate.fields), 'field')}, "
        f"channels {', '.join(plate.channel_names)} → {target}\n"
        f"Next: cellvim embed {quote(str(target))} -o embeddings.zarr{_naming_dna(plate.channel_names)}"
    )
    for note in plate.cellvim_attributes.get("notes", ()):
        say(f"Note: {note}.")


def info(plate: PlatePath) -> None:
    """Say what a plate holds, and what is odd about it."""
    from cellvim.data.plate import describe, open_plate

    found = describe(open_plate(plate))
    pixel = found["pixel_size_um"]
    per_well = ", ".join(f"{fields} in each of {count(w, 'well')}" for fields, w in found["fields_per_well"].items())
    for name, value in {
        "plate": f"{found['name']} (OME-Zarr {found['ome_zarr_version']})",
        "wells": f"{found['n_wells']} ({_first_and_last(found['wells'])})",
        "fields": f"{found['n_fields']} ({per_well})",
        "channels": ", ".join(found["channel_names"]),
        "size": ", ".join(f"{size} ({count(n, 'field')})" for size, n in found["sizes"].items()),
        "pixels": ", ".join(found["dtypes"]),
        "µm/px": "unknown" if pixel is None else f"{pixel:g}",
        "plate map": ", ".join(found["well_metadata_columns"]) or "none",
    }.items():
        print(f"{name:<10} {value}")
    for oddity in found["oddities"]:
        print(f"{'odd':<10} {oddity}")


def datasets(name: Annotated[str | None, typer.Argument(help="Show this dataset's card.")] = None) -> None:
    """List the datasets that are described, and those that come with CellVim."""
    from cellvim.data.bundled import dataset_card, dataset_cards

    if name is not None:
        print(dataset_card(name))
        return
    for card in dataset_cards():
        print(f"{card.name:<20} {'comes with it' if card.has_images else 'to download':<14} {card.title}")
    print("cellvim datasets NAME shows the card: source, licence, channels, how to get it.")


def _naming_dna(channels: Sequence[str]) -> str:
    """Return the option that cells need on a plate none of whose channels is DNA by its name."""
    from cellvim.channels import canonical_name

    if any(canonical_name(name) == "DNA" for name in channels):
        return ""
    return " --channels DNA=NAME  (the name here of the channel that shows nuclei; or --unit tile)"


def _first_and_last(wells: list[str]) -> str:
    return wells[0] if len(wells) == 1 else f"{wells[0]} to {wells[-1]}"
