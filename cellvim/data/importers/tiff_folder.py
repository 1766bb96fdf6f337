"""Import a folder of single-plane TIFFs with well, site and channel in their names."""

from __future__ import annotations

import re
from pathlib import Path

from cellvim.data.importers.import_plan import ImportOptions, ImportPlan, PlaneFile, make_plan, parse_site
from cellvim.errors import InputError, PlateError, listing

PATTERNS: dict[str, str] = {  # ready patterns, tried in this order; each must match the complete file name
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
# MetaXpress stores a thumbnail beside each image
_THUMBNAIL = re.compile(r"_thumb(?:[0-9A-F-]{36}|_?\[[0-9A-F-]+\])?\.tiff?$", re.I)


def find_tiffs(source: Path) -> list[Path]:
    """Return the TIFF files in a folder and below it, sorted, without hidden ones (``._a.tif``)."""
    found = (p for p in source.rglob("*") if p.suffix.lower() in (".tif", ".tiff") and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())


def plan_tiff_folder(source: Path, options: ImportOptions) -> ImportPlan:
    """Plan the import from the file names in a folder and its sub-folders.

    ``options.pattern`` is the name of one of `PATTERNS`, or a regular expression with the named groups ``well``, or
    ``row`` and ``column``; ``channel``; and optionally ``site``, ``plane`` (or ``z``) and ``time`` (or ``t``). It is
    searched for in the path below ``source`` if it contains a ``/``, otherwise in the file name. Without a pattern, the
    first ready one that fits all files is used.

    Raises
    ------
    InputError
        The pattern is not a regular expression, or lacks a group.
    PlateError
        No pattern fits, or a site lacks a channel.
    """
    files = [p for p in find_tiffs(source) if not _THUMBNAIL.search(p.name)]
    if not files:
        raise PlateError(f"{source} has no TIFF files; expected a folder of .tif or .tiff images.")
    expression = _compile(options.pattern) if options.pattern else _choose(source, files)
    planes, missed = [], []
    for path in files:
        match = expression.search(path.relative_to(source).as_posix() if "/" in expression.pattern else path.name)
        if match is None:
            missed.append(path.name)
            continue
        groups = match.groupdict()
        well, site = parse_site(groups, path.name)
        if not groups.get("channel"):
            raise PlateError(f"{path.name}: the pattern finds no channel in its name; correct --pattern.")
        z, t = (groups.get(long) or groups.get(short) or "" for long, short in (("plane", "z"), ("time", "t")))
        planes.append(PlaneFile(path, well, site, groups["channel"], z, t))
    if not planes:
        raise PlateError(
            f"{source}: the pattern '{expression.pattern}' fits none of its {len(files)} TIFF files, such as "
            f"{files[0].name}. Correct --pattern; ready ones are {listing(PATTERNS)}."
        )
    plan = make_plan(planes, source=source, format="tiff_folder", options=options)
    plan.note_left_out(missed, "TIFF files do not fit the pattern")
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
    for expression in map(_ready, PATTERNS):
        if all(expression.search(path.name) for path in files):
            return expression
    raise PlateError(
        f"{source}: no ready pattern fits all {len(files)} TIFF files ({listing((p.name for p in files), 3)}). Give "
        "one with --pattern, a regular expression with the groups well (or row and column), site and channel; ready "
        f"ones are {listing(PATTERNS)}."
    )
