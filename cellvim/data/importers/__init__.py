"""Import microscope files as an OME-Zarr 0.5 plate.

One importer per format reads names and metadata into an `ImportPlan`; `import_plate` writes the plate.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cellvim
from cellvim.channels import parse_channel_names
from cellvim.data.importers.imagexpress import find_htd, is_imagexpress, plan_imagexpress
from cellvim.data.importers.import_plan import (
    CellStrip,
    ImportOptions,
    ImportPlan,
    MaximumOf,
    PageOf,
    Site,
    Source,
    source_name,
)
from cellvim.data.importers.load_data import find_load_data, is_load_data, plan_load_data
from cellvim.data.importers.ome_tiff import find_ome_tiffs, plan_ome_tiff
from cellvim.data.importers.phenix import JUMP_CHANNELS, find_index, plan_phenix
from cellvim.data.importers.single_cells import find_cell_tables, plan_single_cells, read_strip
from cellvim.data.importers.tiff_folder import find_tiffs, plan_tiff_folder
from cellvim.data.plate import Plate, open_plate
from cellvim.data.plate_writer import PlateWriter, check_target
from cellvim.data.platemap import derive_pert_type, join_perturbations, join_platemap, read_platemap
from cellvim.errors import ChannelError, InputError, MetadataError, OutputError, PlateError, listing

if TYPE_CHECKING:
    import pandas as pd

IMPORTERS: dict[str, Callable[[Path, ImportOptions], ImportPlan]] = {
    "tiff": plan_tiff_folder,
    "phenix": plan_phenix,
    "imagexpress": plan_imagexpress,
    "load_data": plan_load_data,
    "ome_tiff": plan_ome_tiff,
    "single_cells": plan_single_cells,
}
FORMATS = ("auto", *IMPORTERS)
DETECTORS: tuple[tuple[str, Callable[[Path], object]], ...] = (  # in this order; "tiff" if nothing is found
    ("load_data", find_load_data),
    ("phenix", find_index),
    ("imagexpress", find_htd),
    ("ome_tiff", find_ome_tiffs),
    ("imagexpress", is_imagexpress),
    ("single_cells", lambda source: find_cell_tables(source) and not find_tiffs(source)),
)
CHANNEL_PRESETS = {"jump": JUMP_CHANNELS}
MAX_PLANE_BYTES = 4 << 30
MAX_COMPRESSION = 5_000  # of a plane larger than 64 MiB


def import_plate(
    source: str | Path,
    target: str | Path,
    *,
    metadata: str | Path | None = None,
    compounds: str | Path | Sequence[str | Path] = (),
    format: str = "auto",
    load_data: str | Path | None = None,
    pattern: str | None = None,
    pixel_size_um: float | None = None,
    channel_names: dict[str, str] | str | None = None,
    plate_name: str | None = None,
    pert_type: str | None = None,
    z: int | str | None = None,
    t: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    verify: int = 16,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plate:
    """Import a folder of microscope files as an OME-Zarr plate.

    The plate is written to ``<target>.partial`` and renamed when it is complete and a sample of it has been read back.
    Repeating an interrupted import resumes it. Memory is bounded: each worker holds one field.

    Parameters
    ----------
    source
        Folder with the files; or a LoadData table (CSV or parquet), or a table of single cells (parquet), with the
        files that it lists in or below its folder.
    target
        Folder of the new plate, such as ``plate.zarr``.
    metadata
        Plate map: a table with a column of wells (CSV, TSV or Excel). See `cellvim.data.platemap.read_platemap`.
    compounds
        Tables with details of the perturbations in the plate map. See `cellvim.data.platemap.join_perturbations`.
    format
        Format of the files; auto detects it. The formats are those of `FORMATS`.
    load_data
        CellProfiler's LoadData CSV, which lists the well, site and channel of each file; images are searched for by
        name below ``source``.
    pattern
        Regular expression for the file names. See `cellvim.data.importers.tiff_folder.plan_tiff_folder`.
    pixel_size_um
        Pixel size in µm; overrides the one in the source.
    channel_names
        Names of the channels by their key in the file names, such as ``ch5=DNA,ch4=ER``, or ``jump`` for the eight
        channels of JUMP-CP. A dictionary (``{"ch5": "DNA"}``) in Python. Other channels keep the name in the source.
    plate_name
        Name of the plate; overrides the one in the source. By default the name of the target.
    pert_type
        Rule for a column ``Metadata_pert_type``, such as ``"SBS_Controls:-1=negcon,0=trt,1=poscon"``.
    z
        Plane of a z-stack to import, counted from 0, or ``max`` for the maximum projection.
    t
        Time point to import, counted from 0.
    overwrite
        Replace an existing plate at ``target``.
    resume
        Resume an interrupted run of the same import.
    verify
        Number of fields to read back and to compare with the files.
    workers
        Number of threads that read and write fields; by default one per processor, at most 8.
    progress
        Called with (finished fields, all fields).

    Returns
    -------
    Plate
        The new plate, opened.

    Raises
    ------
    PlateError
        The source has no images, images cannot be assigned to wells, a site lacks a channel, or a file cannot be read.
    ChannelError
        A channel name is given for a channel that does not exist, or twice.
    MetadataError
        The plate map does not fit.
    OutputError
        The target exists or cannot be written.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise PlateError(f"{source} does not exist; expected a folder of microscope images.")
    cell_table = None
    if source.is_file() and load_data is None:
        if source.name.lower().endswith((".csv", ".csv.gz")) or is_load_data(source):
            source, load_data = source.parent, source
        elif source.suffix.lower() in (".pq", ".parquet"):
            source, cell_table = source.parent, source
    if not source.is_dir():
        raise PlateError(f"{source} is a file; expected a folder of microscope images, or a LoadData CSV.")
    check_target(target, overwrite=overwrite)
    if source.resolve().is_relative_to(target.resolve()):
        raise OutputError(f"{target} is or contains the source {source}; choose another name for the plate.")
    if pixel_size_um is not None and not (np.isfinite(pixel_size_um) and pixel_size_um > 0):
        raise InputError(f"--pixel-size is {pixel_size_um}; expected micrometers, above 0.")

    table = None if load_data is None else Path(load_data)
    options = {"pattern": pattern, "load_data": table, "cell_table": cell_table, "plate_name": plate_name}
    plan = make_import_plan(source, format=format, **options, z=z, t=t)
    names = _name_channels(plan, channel_names, source)
    name = plate_name or plan.plate_name or target.name.removesuffix(".zarr").removesuffix(".ome")
    pixel_size_um = pixel_size_um or plan.pixel_size_um
    tables = [compounds] if isinstance(compounds, str | Path) else list(compounds)
    well_metadata, notes = _well_metadata(metadata, tables, pert_type, plan, name)
    job = _fingerprint(plan, names, pixel_size_um) if resume else None

    with PlateWriter(
        target, name=name, channel_names=names, pixel_size_um=pixel_size_um, overwrite=overwrite, job=job
    ) as writer:
        _write_fields(plan, writer, workers or min(8, os.cpu_count() or 1), progress)
        writer.finish(
            verify=verify,
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


def make_import_plan(source: Path, *, format: str = "auto", **options: Any) -> ImportPlan:
    """Assign files to wells, sites and channels, without writing anything; ``options`` are `ImportOptions`."""
    chosen = ImportOptions(**options)
    if format not in FORMATS:
        raise InputError(f"--format '{format}' is not known; choose {listing(FORMATS)}.")
    if chosen.z is not None and chosen.z != "max" and (not isinstance(chosen.z, int) or chosen.z < 0):
        raise InputError(f"--z is {chosen.z!r}; expected the number of a plane, from 0, or max.")
    if format == "auto":
        given = {"load_data": chosen.load_data, "single_cells": chosen.cell_table, "tiff": chosen.pattern}
        format = next((name for name, value in given.items() if value is not None), None) or next(
            (name for name, find in DETECTORS if find(source)), "tiff"
        )
    if chosen.pattern is not None and format not in ("tiff", "ome_tiff"):
        raise InputError(f"--pattern is for --format tiff and ome_tiff; {format} files have fixed names.")
    return IMPORTERS[format](source, chosen)


def _fingerprint(plan: ImportPlan, names: list[str], pixel_size_um: float | None) -> str:
    """Return a hash of the source files with their sizes and times, and of the names in the plate."""
    digest = sha256(json.dumps([plan.format, plan.channel_keys, names, pixel_size_um]).encode())
    for site, files in plan.fields.items():
        digest.update(json.dumps(site).encode())
        for source in dict.fromkeys(files.values()):
            digest.update(repr(source).encode())
            planes = source.planes if isinstance(source, MaximumOf | CellStrip) else (source,)
            for plane in planes[:64]:
                with suppress(OSError):
                    status = (plane.path if isinstance(plane, PageOf) else plane).stat()
                    digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _name_channels(plan: ImportPlan, given: dict[str, str] | str | None, source: Path) -> list[str]:
    preset = CHANNEL_PRESETS.get(given.strip().lower()) if isinstance(given, str) else None
    if preset is not None:
        given = preset
    elif isinstance(given, str):
        given = parse_channel_names(given)
    by_name = {name: key for key, name in plan.channel_names.items()}
    wanted = {by_name.get(key, key): name for key, name in (given or {}).items()}
    tested, known = (wanted, plan.channel_keys) if preset is None else (plan.channel_keys, wanted)
    if unknown := [key for key in tested if key not in known]:
        found = [f"{k} ({plan.channel_names[k]})" if k in plan.channel_names else k for k in plan.channel_keys]
        raise ChannelError(
            f"Channel '{unknown[0]}' is not in {source if preset is None else 'that preset'}; the files have "
            f"{listing(found)}. Name them with --channel-names, as in {plan.channel_keys[0]}=DNA."
        )
    names = [str(wanted.get(key, plan.channel_names.get(key, key))) for key in plan.channel_keys]
    for i, name in enumerate(names):
        if names.index(name) < i:
            first, second = plan.channel_keys[names.index(name)], plan.channel_keys[i]
            raise ChannelError(
                f"Channels {first} and {second} of {source} would both be named '{name}'; distinguish them with "
                f"--channel-names, as in {second}={name}2."
            )
    return names


def _well_metadata(
    metadata: str | Path | None, compounds: list[str | Path], pert_type: str | None, plan: ImportPlan, plate_name: str
) -> tuple[pd.DataFrame | None, list[str]]:
    """Return the plate map of the plate's wells, with perturbations and plate-level columns, and notes on it."""
    import pandas as pd

    wells = list(dict.fromkeys(well for well, _ in plan.fields))
    notes: list[str] = []
    if metadata is None:
        for option, value in (("--pert-type", pert_type), ("--compounds", compounds)):
            if value:
                raise MetadataError(f"{option} needs a plate map; give one with --metadata.")
        if not plan.plate_metadata:
            return None, notes
        table = pd.DataFrame(index=pd.Index(wells, name="well"))
    else:
        name = Path(metadata).name
        table, notes = read_platemap(metadata, plate_name=plate_name)
        table, more = join_platemap(table, wells, source=name)
        notes += more
        for path in compounds:
            table, more = join_perturbations(table, path, source=name)
            notes += more
        if pert_type:
            table = derive_pert_type(table, pert_type)
    return table.assign(**{k: v for k, v in plan.plate_metadata.items() if k not in table}), notes


def _write_fields(
    plan: ImportPlan, writer: PlateWriter, workers: int, progress: Callable[[int, int], None] | None
) -> None:
    """Read and write fields in threads, with at most two fields per thread in the queue."""

    def write(item: tuple[Site, dict[str, Source]]) -> None:
        (well, site), files = item
        if (well, site) not in writer.done:
            image = read_field(well, site, [files[key] for key in plan.channel_keys])
            writer.write_field(well, site, image, position_um=plan.positions.get((well, site)))

    items, queue = iter(plan.fields.items()), deque[Future[None]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in range(len(plan.fields)):
                queue.extend(pool.submit(write, item) for item in islice(items, 2 * workers - len(queue)))
                queue.popleft().result()
                if progress is not None:
                    progress(done + 1, len(plan.fields))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def read_field(well: str, site: str, files: Sequence[Source]) -> np.ndarray:
    """Read the channels of one field, each from its file, its plane of a file, or the projection of several.

    Returns
    -------
    np.ndarray
        (C, H, W) in the type of the files.

    Raises
    ------
    PlateError
        A file cannot be decoded, is not a single greyscale plane, or differs in size or type from the field's first.
    """
    if files and isinstance(files[0], CellStrip):
        return read_strip(files[0])
    where = f"(well {well} site {site})"
    planes: list[np.ndarray] = []
    for source in files:
        plane = _read_plane(source, where)
        first = planes[0] if planes else plane
        if plane.shape != first.shape or plane.dtype != first.dtype:
            raise PlateError(
                f"{source if isinstance(source, Path) else source_name(source)} {where} is {plane.shape[0]} x "
                f"{plane.shape[1]} {plane.dtype}; {source_name(files[0])} of the same site is {first.shape[0]} x "
                f"{first.shape[1]} {first.dtype}."
            )
        planes.append(plane)
    return np.stack(planes)


def _read_plane(source: Source, where: str) -> np.ndarray:
    if isinstance(source, MaximumOf):
        highest = _read_plane(source.planes[0], where)
        for plane in source.planes[1:]:
            other = _read_plane(plane, where)
            if other.shape != highest.shape:
                raise PlateError(f"{source_name(source)} {where} differ in size: {highest.shape} and {other.shape}.")
            highest = np.maximum(highest, other)
        return highest
    import tifffile

    path, series, page = source if isinstance(source, PageOf) else (source, None, 0)
    where = f"{path} {where}"
    try:
        with tifffile.TiffFile(path) as tiff:
            if series is not None:
                one = tiff.series[series].pages[page]
            elif len(tiff.pages) != 1:
                raise PlateError(f"{where} has {len(tiff.pages)} pages; expected one plane per file.")
            else:
                one = tiff.pages[0]
            if one is None:
                raise PlateError(f"{where}: its plane {page} is missing.")
            if len(one.shape) != 2 or 0 in one.shape:
                raise PlateError(f"{where} has the shape {one.shape}; expected one greyscale plane (height, width).")
            declared = one.size * one.dtype.itemsize if one.dtype is not None else 0
            stored = path.stat().st_size
            if declared > MAX_PLANE_BYTES or (declared > 64 << 20 and declared > MAX_COMPRESSION * stored):
                raise PlateError(f"{where} declares {declared:,} bytes of pixels and stores {stored:,}.")
            plane = one.asarray()
    except PlateError:
        raise
    except Exception as error:  # tifffile and its codecs have their own exceptions
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise PlateError(f"{where} cannot be read as a TIFF ({cause}).") from error
    if plane.dtype.kind not in "uif":
        raise PlateError(f"{where} has pixels of type {plane.dtype}; expected integers or floats.")
    return plane
