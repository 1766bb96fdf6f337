"""Import ImageXpress (MetaXpress) plates: wavelengths from the HTD file, everything else from the file names."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from cellvim.data.importers.import_plan import ImportOptions, ImportPlan, MaximumOf, PlaneFile, make_plan, site_name
from cellvim.data.importers.tiff_folder import find_tiffs
from cellvim.data.wells import canonical_well
from cellvim.errors import PlateError, listing

MAX_HTD_BYTES = 16 << 20
_NAME = re.compile(
    r"^(?:.*_)?(?P<well>(?:[A-Z]|A[A-F])\d{2})(?:_s(?P<site>\d+))?(?:_w(?P<wave>\d+?))?(?P<thumb>_thumb)?"
    r"(?P<guid>[0-9A-F]{8}-[0-9A-F-]{27}|_?\[[0-9A-F-]+\])?\.tiff?$",
    re.I,
)


def find_htd(source: Path) -> Path | None:
    """Return the HTD file of a plate folder, or of its first time point, or None."""
    files = (path for folder in (source, source / "TimePoint_1") for path in sorted(folder.glob("*")))
    return next((path for path in files if path.suffix.lower() == ".htd" and path.is_file()), None)


def plan_imagexpress(source: Path, options: ImportOptions) -> ImportPlan:
    """Plan the import of a plate folder of MetaXpress, with its ``TimePoint_n`` and ``ZStep_n`` folders.

    Without an HTD file, as in JUMP's copies of such plates, the names of the wavelengths are read from the TIFFs.

    Raises
    ------
    PlateError
        The HTD file cannot be read, no file has a MetaXpress name, or a site lacks a channel.
    """
    htd = find_htd(source)
    entries = _read_htd(htd) if htd is not None else {}
    waves = {f"w{key[8:]}": value for key, value in entries.items() if re.fullmatch(r"WaveName\d+", key)}
    files, missed = [], []
    for path in find_tiffs(source):
        match = _NAME.match(path.name)
        if match is None:
            missed.append(path.name)
            continue
        folders = path.relative_to(source).parts
        time, step = (
            next((m[1] for folder in folders if (m := re.fullmatch(pattern, folder, re.I))), "")
            for pattern in (r"TimePoint_(\d+)", r"ZStep_(\d+)")
        )
        if match["thumb"] or step == "0":  # ZStep_0 holds MetaXpress's own projection
            continue
        well = canonical_well(match["well"])
        files.append(PlaneFile(path, well, site_name(match["site"]), f"w{match['wave'] or 1}", z=step, t=time))
    if not files:
        raise PlateError(
            f"{source}: none of its TIFF files has a name such as Plate_A01_s1_w1.tif ({listing(missed, 3)})."
        )
    plan = make_plan(files, source=source, format="imagexpress", options=options)
    first = next(iter(plan.fields.values()))
    if htd is None:
        waves = {key: name for key in plan.channel_keys if (name := _plane_info(first[key]).get("_IllumSetting_"))}
    names = {key: waves[key] for key in plan.channel_keys if waves.get(key)}
    if len(set(names.values())) == len(names):
        plan.channel_names = names
    else:
        where = htd.name if htd is not None else "MetaXpress"
        plan.notes.append(f"{where} names several wavelengths alike ({listing(names.values())}): they keep w1, w2, …")
    plan.plate_name = htd.stem if htd is not None else None  # the Description is often the same for all plates
    absent = [f"{key} ({name})" for key, name in waves.items() if key not in plan.channel_keys]
    if absent:
        plan.notes.append(f"{htd.name} lists wavelengths that have no files: {listing(absent)}")
    plan.note_left_out(missed, "TIFF files have no MetaXpress name")
    plane = _plane_info(first[plan.channel_keys[0]])
    size, is_on, unit = (plane.get(f"spatial-calibration-{key}") for key in ("x", "state", "units"))
    if is_on and isinstance(size, int | float) and size > 0 and str(unit).lower() in ("um", "µm", "micron", "microns"):
        plan.pixel_size_um = float(size)
    return plan


def is_imagexpress(source: Path) -> bool:
    """Return whether a folder without an HTD file is MetaXpress's, from the names and the metadata of a TIFF."""
    files = find_tiffs(source)
    matches = [_NAME.match(p.name) for p in files]
    images = [p for p, m in zip(files, matches, strict=True) if m and not m["thumb"]]
    return bool(images) and all(matches) and bool(_plane_info(images[0]))


def _read_htd(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_HTD_BYTES:
        raise PlateError(f"{path} has {path.stat().st_size:,} bytes; expected a small text file of MetaXpress.")
    try:
        rows = list(csv.reader(path.read_text(encoding="latin-1").splitlines(), skipinitialspace=True))
    except (OSError, csv.Error) as error:
        raise PlateError(f"{path} cannot be read as an HTD file: {error}.") from error
    entries = {row[0].strip().strip('"'): row[1].strip().strip('"').strip() for row in rows if len(row) > 1}
    if "HTSInfoFile" not in entries:
        raise PlateError(f"{path} is not an HTD file of MetaXpress: it does not begin with HTSInfoFile.")
    return entries


def _plane_info(source: object) -> dict[str, Any]:
    """Return MetaXpress's metadata of a plane in its TIFF; empty if there is none."""
    import tifffile

    path = source.planes[0] if isinstance(source, MaximumOf) else source
    try:
        with tifffile.TiffFile(path) as tiff:
            metadata = tiff.metaseries_metadata or {}
    except Exception:  # reported when the pixels are read
        return {}
    plane = metadata.get("PlaneInfo", {}) if isinstance(metadata, dict) else {}
    return plane if isinstance(plane, dict) else {}
