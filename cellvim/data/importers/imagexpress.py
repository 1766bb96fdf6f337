"""Importing ImageXpress (MetaXpress) plates: the HTD file names the wavelengths, the files' names tell the rest."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from cellvim.data.importers.import_plan import Choice, ImportPlan, PlaneFile, make_plan, site_name
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
    for folder in (source, source / "TimePoint_1"):
        for path in sorted(folder.glob("*")):
            if path.suffix.lower() == ".htd" and path.is_file():
                return path
    return None


def plan_imagexpress(source: Path, *, choice: Choice | None = None) -> ImportPlan:
    """Read a plate folder of MetaXpress, with its ``TimePoint_n`` and ``ZStep_n`` folders.

    Without an HTD file, as in JUMP's copies of such plates, the wavelengths are named by what MetaXpress wrote into the
    TIFFs themselves.

    Raises
    ------
    PlateError
        The HTD file cannot be read, no file has a MetaXpress name, or a site lacks a channel.
    """
    htd = find_htd(source)
    said = _read_htd(htd) if htd is not None else {}
    waves = {f"w{key[8:]}": value for key, value in said.items() if re.fullmatch(r"WaveName\d+", key)}
    files, missed = [], []
    for path in find_tiffs(source):
        match = _NAME.match(path.name)
        if match is None:
            missed.append(path)
            continue
        if match["thumb"]:
            continue
        time, step = (
            next((m[1] for part in path.relative_to(source).parts if (m := re.fullmatch(pattern, part, re.I))), "")
            for pattern in (r"TimePoint_(\d+)", r"ZStep_(\d+)")
        )
        if step == "0":  # MetaXpress keeps its own projection there
            continue
        well = canonical_well(match["well"])
        files.append(PlaneFile(path, well, site_name(match["site"]), f"w{match['wave'] or 1}", z=step, t=time))
    if not files:
        raise PlateError(
            f"{source}: none of its TIFF files has a name such as Plate_A01_s1_w1.tif "
            f"({listing((p.name for p in missed), 3)})."
        )
    plan = make_plan(files, source=source, format="imagexpress", choice=choice)
    first = next(iter(plan.fields.values()))
    if htd is None:
        waves = {key: name for key in plan.channel_keys if (name := _plane_info(first[key]).get("_IllumSetting_"))}
    names = {key: waves[key] for key in plan.channel_keys if waves.get(key)}
    plan.channel_names = names if len(set(names.values())) == len(names) else {}
    if names and not plan.channel_names:
        who = htd.name if htd is not None else "MetaXpress"
        plan.notes.append(f"{who} names several wavelengths alike ({listing(names.values())}): they keep w1, w2, …")
    plan.plate_name = htd.stem if htd is not None else None  # Description is often the same for all plates
    absent = [f"{key} ({name})" for key, name in waves.items() if key not in plan.channel_keys]
    if absent:
        plan.notes.append(f"{htd.name} lists wavelengths that have no files: {listing(absent)}")
    if missed:
        plan.notes.append(
            f"{len(missed)} TIFF files have no MetaXpress name and were left out: "
            f"{listing((p.name for p in missed), 4)}"
        )
    plan.pixel_size_um = _calibration(first[plan.channel_keys[0]])
    return plan


def is_imagexpress(source: Path) -> bool:
    """Return whether a folder without an HTD file is MetaXpress's: by the names, and by what the first TIFF says."""
    named = [p for p in find_tiffs(source) if (m := _NAME.match(p.name)) and not m["thumb"]]
    all_fit = len(named) > 0 and all(_NAME.match(p.name) for p in find_tiffs(source))
    return all_fit and bool(_plane_info(named[0]))


def _read_htd(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_HTD_BYTES:
        raise PlateError(f"{path} is of {path.stat().st_size:,} bytes; expected a small text file of MetaXpress.")
    said = {}
    try:
        for row in csv.reader(path.read_text(encoding="latin-1").splitlines(), skipinitialspace=True):
            if len(row) > 1:
                said[row[0].strip().strip('"')] = row[1].strip().strip('"').strip()
    except (OSError, csv.Error) as error:
        raise PlateError(f"{path} cannot be read as an HTD file: {error}.") from error
    if "HTSInfoFile" not in said:
        raise PlateError(f"{path} is not an HTD file of MetaXpress: it does not begin with HTSInfoFile.")
    return said


def _plane_info(source: object) -> dict[str, Any]:
    """Return what MetaXpress writes of a plane into its TIFF; empty where it did not."""
    import tifffile

    path = source if isinstance(source, Path) else getattr(source, "planes", (None,))[0]
    try:
        with tifffile.TiffFile(path) as tiff:
            metadata = tiff.metaseries_metadata or {}
    except Exception:  # the pixels' reader will say what is wrong with the file
        return {}
    plane = metadata.get("PlaneInfo", {}) if isinstance(metadata, dict) else {}
    return plane if isinstance(plane, dict) else {}


def _calibration(source: object) -> float | None:
    """Return µm/px as MetaXpress writes it, or None."""
    plane = _plane_info(source)
    size, on, unit = (plane.get(f"spatial-calibration-{k}") for k in ("x", "state", "units"))
    good = isinstance(size, int | float) and size > 0 and on and str(unit).lower() in ("um", "µm", "micron", "microns")
    return float(size) if good else None
