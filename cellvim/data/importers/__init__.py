"""Importing a plate: from microscope files to OME-Zarr 0.5, whatever wrote them.

An importer reads names and metadata into an `ImportPlan`; `import_plate` does the rest for all of them alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import cellvim
from cellvim.channels import parse_channel_names
from cellvim.data.importers.phenix import JUMP_CHANNELS, find_index, plan_phenix
from cellvim.data.importers.plan import ImportPlan
from cellvim.data.importers.tiff_folder import PATTERNS, find_tiffs, plan_tiff_folder
from cellvim.data.plate import Plate, open_plate
from cellvim.data.platemap import derive_pert_type, join_platemap, read_platemap
from cellvim.data.writer import PlateWriter, check_target
from cellvim.errors import ChannelError, InputError, MetadataError, OutputError, PlateError, listing

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("auto", "tiff", "phenix")
CHANNEL_PRESETS = {"jump": JUMP_CHANNELS}


def import_plate(
    source: str | Path,
    target: str | Path,
    *,
    metadata: str | Path | None = None,
    format: str = "auto",
    pattern: str | None = None,
    pixel_size_um: float | None = None,
    channel_names: dict[str, str] | str | None = None,
    plate_name: str | None = None,
    pert_type: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plate:
    """Import a folder of microscope files as an OME-Zarr plate.

    The plate is written under ``<target>.partial`` and renamed when it is whole. Memory stays bounded: each worker
    holds one field.

    Parameters
    ----------
    source
        Folder with the files.
    target
        The plate to make, such as ``plate.zarr``.
    metadata
        Plate map: a table with a column of wells, see `cellvim.data.platemap.read_platemap`.
    format
        ``tiff``, ``phenix``, or ``auto`` to tell by what is there.
    pattern
        File names, see `cellvim.data.importers.tiff_folder.plan_tiff_folder`.
    pixel_size_um
        Side of a pixel; overrides what the source says.
    channel_names
        Names for channels as the files name them: ``{"ch5": "DNA"}``, the same as text ``"ch5=DNA,ch4=ER"``, or
        ``"jump"`` for the eight channels of JUMP-CP. Channels left out keep the name that the source gives.
    plate_name
        Overrides the source's; else the target's name.
    pert_type
        Rule for a column ``Metadata_pert_type``, as in ``"SBS_Controls:-1=negcon,0=trt,1=poscon"``.
    overwrite
        Replace a plate at ``target``.
    workers
        Threads that read and write fields; as many as processors, at most 8, if None.
    progress
        Called with (fields done, fields in all).

    Returns
    -------
    Plate
        The new plate, opened.

    Raises
    ------
    PlateError
        The source has no images that can be told apart, a site lacks a channel, or a file cannot be read.
    ChannelError
        A channel name is given for a channel that is not there, or twice.
    MetadataError
        The plate map does not fit.
    OutputError
        The target exists or cannot be written.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise PlateError(f"{source} does not exist; expected a folder of microscope images.")
    if not source.is_dir():
        raise PlateError(f"{source} is a file; expected a folder of microscope images.")
    check_target(target, overwrite=overwrite)
    if source.resolve().is_relative_to(target.resolve()):
        raise OutputError(f"{target} is or contains the source {source}; choose another name for the plate.")
    if pixel_size_um is not None and not (np.isfinite(pixel_size_um) and pixel_size_um > 0):
        raise InputError(f"--pixel-size is {pixel_size_um}; expected micrometers, above 0.")

    plan = make_import_plan(source, format=format, pattern=pattern)
    names = _name_channels(plan, channel_names, source)
    name = plate_name or plan.plate_name or target.name.removesuffix(".zarr").removesuffix(".ome")
    pixel_size_um = pixel_size_um or plan.pixel_size_um
    well_metadata, notes = _well_metadata(metadata, pert_type, plan, name)

    with PlateWriter(
        target, name=name, channel_names=names, pixel_size_um=pixel_size_um, overwrite=overwrite
    ) as writer:
        _write_fields(plan, writer, workers, progress)
        writer.finish(
            well_metadata=well_metadata,
            notes=[*plan.notes, *notes],
            provenance={
                "made_by": f"cellvim import {cellvim.__version__}",
                "format": plan.format,
                "source": source.resolve().name,
                "metadata": Path(metadata).name if metadata else None,
                "channels": dict(zip(plan.channel_keys, names, strict=True)),
            },
        )
    return open_plate(target)


def make_import_plan(source: Path, *, format: str = "auto", pattern: str | None = None) -> ImportPlan:
    """Find out which file is what, with the importer of that format; nothing is written."""
    if format not in FORMATS:
        raise InputError(f"--format '{format}' is not known; choose {listing(FORMATS)}.")
    if format == "auto":
        format = "phenix" if pattern is None and find_index(source) else "tiff"
    if format == "phenix":
        if pattern is not None:
            raise InputError("--pattern is for --format tiff; Phenix file names have only one form.")
        return plan_phenix(source)
    return plan_tiff_folder(source, pattern=pattern)


def _name_channels(plan: ImportPlan, given: dict[str, str] | str | None, source: Path) -> list[str]:
    preset = isinstance(given, str) and given.strip().lower() in CHANNEL_PRESETS
    if preset:
        given = CHANNEL_PRESETS[given.strip().lower()]
    elif isinstance(given, str):
        given = parse_channel_names(given)
    given = dict(given or {})
    by_name = {name: key for key, name in plan.channel_names.items()}
    wanted = {by_name.get(key, key): name for key, name in given.items()}
    unknown = [key for key in wanted if key not in plan.channel_keys]
    if preset:
        unknown = [key for key in plan.channel_keys if key not in wanted]
    if unknown:
        known = [f"{k} ({plan.channel_names[k]})" if k in plan.channel_names else k for k in plan.channel_keys]
        raise ChannelError(
            f"Channel '{unknown[0]}' is not in {'that preset' if preset else source}; the files have "
            f"{listing(known)}. Name them with --channel-names, as in {plan.channel_keys[0]}=DNA."
        )
    names = [str(wanted.get(key, plan.channel_names.get(key, key))) for key in plan.channel_keys]
    for i, name in enumerate(names):
        if names.index(name) < i:
            first, second = plan.channel_keys[names.index(name)], plan.channel_keys[i]
            raise ChannelError(
                f"Channels {first} and {second} of {source} would both be named '{name}'; tell them apart with "
                f"--channel-names, as in {second}={name}2."
            )
    return names


def _well_metadata(
    metadata: str | Path | None, pert_type: str | None, plan: ImportPlan, plate_name: str
) -> tuple[pd.DataFrame | None, list[str]]:
    if metadata is None:
        if pert_type:
            raise MetadataError("--pert-type derives a column from the plate map; give one with --metadata.")
        return None, []
    table, notes = read_platemap(metadata, plate_name=plate_name)
    wells = list(dict.fromkeys(well for well, _ in plan.fields))
    table, more = join_platemap(table, wells, source=Path(metadata).name)
    if pert_type:
        table = derive_pert_type(table, pert_type)
    return table, notes + more


def _write_fields(
    plan: ImportPlan, writer: PlateWriter, workers: int | None, progress: Callable[[int, int], None] | None
) -> None:
    """Read and write fields in a few threads; never more than twice as many fields waiting as there are threads."""
    workers = workers or min(8, os.cpu_count() or 1)

    def one(item: tuple[tuple[str, str], dict[str, Path]]) -> None:
        (well, site), files = item
        writer.write_field(well, site, read_field(well, site, [files[key] for key in plan.channel_keys]))

    done, total = 0, len(plan.fields)
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[None]] = []
        items: Iterator[tuple[tuple[str, str], dict[str, Path]]] = iter(plan.fields.items())
        try:
            while done < total:
                while len(waiting) < 2 * workers and (item := next(items, None)) is not None:
                    waiting.append(pool.submit(one, item))
                waiting.pop(0).result()
                done += 1
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def read_field(well: str, site: str, files: list[Path]) -> np.ndarray:
    """Read the channels of one field from single-plane TIFFs.

    Returns
    -------
    np.ndarray
        (C, H, W) in the files' type.

    Raises
    ------
    PlateError
        A file cannot be decoded, is not one grey plane, or differs in size or type from the field's first.
    """
    planes: list[np.ndarray] = []
    for path in files:
        plane = _read_tiff(path, f"{path} (well {well} site {site})")
        if planes and (plane.shape != planes[0].shape or plane.dtype != planes[0].dtype):
            raise PlateError(
                f"{path} (well {well} site {site}) is {plane.shape[0]} x {plane.shape[1]} {plane.dtype}; "
                f"{files[0].name} of the same site is {planes[0].shape[0]} x {planes[0].shape[1]} {planes[0].dtype}."
            )
        planes.append(plane)
    return np.stack(planes)


def _read_tiff(path: Path, where: str) -> np.ndarray:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            if len(tiff.pages) != 1:
                raise PlateError(f"{where} has {len(tiff.pages)} pages; expected one plane a file.")
            shape = tiff.pages[0].shape
            if len(shape) != 2 or 0 in shape:
                raise PlateError(f"{where} has the shape {shape}; expected one grey plane (height, width).")
            plane = tiff.pages[0].asarray()
    except PlateError:
        raise
    except Exception as error:  # tifffile and each of its codecs raise their own kinds
        raise PlateError(f"{where} cannot be read as a TIFF ({type(error).__name__}: {error}).") from error
    if plane.dtype.kind not in "uif":
        raise PlateError(f"{where} has pixels of type {plane.dtype}; expected integers or floats.")
    return plane


__all__ = ["CHANNEL_PRESETS", "FORMATS", "PATTERNS", "find_tiffs", "import_plate", "make_import_plan", "read_field"]
