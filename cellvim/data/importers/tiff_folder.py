"""Importing a folder of single-plane TIFFs whose names tell well, site and channel."""

from __future__ import annotations

import re
from pathlib import Path

from cellvim.data.importers.import_plan import Choice, ImportPlan, PlaneFile, make_plan, site_name
from cellvim.data.wells import canonical_well
from cellvim.errors import InputError, MetadataError, PlateError, listing

PATTERNS: dict[str, str] = {  # ready patterns, tried in this order; each must match the whole file name
    # r01c01f01p01-ch5sk1fk1fl1.tiff: Opera Phenix, Operetta (Harmony)
    "phenix": r"r(?P<row>\d{2})c(?P<column>\d{2})f(?P<site>\d+)p(?P<plane>\d+)-(?P<channel>ch\d+)sk(?P<time>\d+).*",
    # Channel1-01-A-01.tif: CellProfiler's SBS example
    "sbs": r"(?P<channel>Channel\d+)-\d+-(?P<row>[A-P])-(?P<column>\d{1,2})",
    # Week1_22123_B02_s1_w1A0B1.tif: ImageXpress (MetaXpress), with or without site
    "imagexpress": r".*_(?P<well>[A-P]\d{2})(?:_s(?P<site>\d+))?_(?P<channel>w\d)(?!_thumb).*",
    # B7_01_1_3_DAPI_001.tif: BioTek Cytation (Gen5)
    "cytation": r"(?P<well>[A-P]\d{1,2})_\d+_\d+_(?P<site>\d+)_(?P<channel>[^_]+)_\d+",
    # plate_A01_f03_DAPI.tif, A01-3-ch2.tif: any of the common orders
    "plain": r"(?:.*[_-])?(?P<well>[A-P]\d{1,2})[_-](?:[sf]|site|field)?(?P<site>\d+)[_-](?P<channel>[A-Za-z][\w]*)",
}
SUFFIXES = (".tif", ".tiff")
# MetaXpress keeps a thumbnail beside each image
_THUMBNAIL = re.compile(r"_thumb(?:[0-9A-F-]{36}|_?\[[0-9A-F-]+\])?\.tiff?$", re.I)


def find_tiffs(source: Path) -> list[Path]:
    """Return the TIFF files in a folder and below it, in a fixed order; hidden ones (``._a.tif``) are not images."""
    found = (p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())


def plan_tiff_folder(source: Path, *, pattern: str | None = None, choice: Choice | None = None) -> ImportPlan:
    """Read the files' names.

    Parameters
    ----------
    source
        The folder; sub-folders are searched too.
    pattern
        The name of one of `PATTERNS`, or a regular expression with named groups: ``well``, or ``row`` and
        ``column``; ``channel``; and if there are several, ``site``. Searched for in the path below ``source`` if it
        contains a ``/``, else in the file's name. Without one, the first ready pattern that fits all files is used.
        The groups ``plane`` (or ``z``) and ``time`` (or ``t``) tell z planes and time points apart.
    choice
        Which z plane and time point to take.

    Raises
    ------
    InputError
        The pattern is no regular expression, or lacks a group.
    PlateError
        No pattern fits, or a site lacks a channel.
    """
    files = [p for p in find_tiffs(source) if not _THUMBNAIL.search(p.name)]
    if not files:
        raise PlateError(f"{source} has no TIFF files; expected a folder of .tif or .tiff images.")
    expression = _compile(pattern) if pattern else _choose(source, files)
    planes, missed = [], []
    for path in files:
        text = path.relative_to(source).as_posix() if "/" in expression.pattern else path.name
        match = expression.search(text)
        (missed.append(path) if match is None else planes.append(_plane(path, match)))
    if not planes:
        raise PlateError(
            f"{source}: the pattern '{expression.pattern}' fits none of its {len(files)} TIFF files, such as "
            f"{files[0].name}. Correct --pattern; ready ones are {listing(PATTERNS)}."
        )
    plan = make_plan(planes, source=source, format="tiff_folder", choice=choice)
    if missed:
        plan.notes.append(
            f"{len(missed)} TIFF files do not fit the pattern and were left out: {listing((p.name for p in missed), 4)}"
        )
    return plan


def _compile(pattern: str) -> re.Pattern[str]:
    if pattern in PATTERNS:
        return _ready(pattern)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--pattern '{pattern}' is not a regular expression: {error}.") from error
    groups = set(expression.groupindex)
    if "channel" not in groups or not ("well" in groups or {"row", "column"} <= groups):
        raise InputError(
            f"--pattern '{pattern}' has the groups {listing(sorted(groups))}; expected channel, and well or row and "
            "column, as in (?P<well>[A-P]\\d\\d)_(?P<site>\\d+)_(?P<channel>\\w+)."
        )
    return expression


def _ready(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:{PATTERNS[name]})\.[Tt][Ii][Ff][Ff]?$")


def _choose(source: Path, files: list[Path]) -> re.Pattern[str]:
    for name in PATTERNS:
        expression = _ready(name)
        if all(expression.search(path.name) for path in files):
            return expression
    raise PlateError(
        f"{source}: no ready pattern fits all {len(files)} TIFF files ({listing((p.name for p in files), 3)}). Give "
        "one with --pattern, a regular expression with the groups well (or row and column), site and channel; ready "
        f"ones are {listing(PATTERNS)}."
    )


def _plane(path: Path, match: re.Match[str]) -> PlaneFile:
    groups = match.groupdict()
    text = groups.get("well") or f"{groups.get('row') or ''}{groups.get('column') or ''}"
    if "well" not in groups and str(groups.get("row")).isdigit():
        text = f"r{groups['row']}c{groups['column']}"
    try:
        well = canonical_well(text)
    except MetadataError as error:
        raise PlateError(f"{path.name}: the pattern finds the well '{text}' in its name. {error}") from error
    if not groups.get("channel"):
        raise PlateError(f"{path.name}: the pattern finds no channel in its name; correct --pattern.")
    z, t = (groups.get(long) or groups.get(short) or "" for long, short in (("plane", "z"), ("time", "t")))
    return PlaneFile(path, well, site_name(groups.get("site")), groups["channel"], z, t)
