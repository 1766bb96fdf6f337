"""Importing OME-TIFFs: channels, planes, time points and µm/px from their OME-XML; wells from it or from names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from cellvim.data.importers.import_plan import Choice, ImportPlan, PageOf, PlaneFile, make_plan, site_name
from cellvim.data.importers.tiff_folder import find_tiffs
from cellvim.data.wells import canonical_well, well_name
from cellvim.errors import MetadataError, PlateError, listing

UNITS_UM = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "m": 1e6, "pm": 1e-6, "Å": 1e-4, "": 1.0}
MAX_XML_CHARS = 64 << 20
_WELL = re.compile(
    r"(?<![A-Za-z0-9])(?P<well>[A-P]\d{1,2})(?![0-9A-Za-z])(?:[_-](?:s|f|site|field)?(?P<site>\d+)(?!\d))?"
)
_PHENIX = re.compile(r"r(?P<row>\d{2})c(?P<column>\d{2})f(?P<site>\d+)")


def find_ome_tiffs(source: Path) -> list[Path]:
    """Return the files named ``.ome.tif`` or ``.ome.tiff`` in a folder and below it."""
    return [p for p in find_tiffs(source) if re.search(r"\.ome\.tiff?$", p.name, re.I)]


def plan_ome_tiff(source: Path, *, pattern: str | None = None, choice: Choice | None = None) -> ImportPlan:
    """Read OME-TIFFs: a file a field, or a file with the images of many.

    Parameters
    ----------
    source
        The folder; sub-folders are searched too.
    pattern
        Regular expression with the groups ``well`` and, if there are several, ``site``, searched for in file names;
        otherwise the OME-XML's plate decides, else a well in the name.
    choice
        Which z plane and time point.

    Raises
    ------
    PlateError
        A file cannot be read, its well cannot be told, or fields have different channels.
    """
    files = find_ome_tiffs(source)
    if not files:
        raise PlateError(f"{source} has no .ome.tif files.")
    planes: list[PlaneFile] = []
    names: dict[str, set[str]] = {}
    sizes: set[float | None] = set()
    for path in files:
        images, places = _read_xml(path)
        with _opened(path) as tiff:
            series = list(tiff.series)
            if len(series) != len(images):
                raise PlateError(f"{path} describes {len(images)} images and holds {len(series)}.")
            for index, (image, one) in enumerate(zip(images, series, strict=True)):
                place = _place(path, pattern, places.get(image["id"]), index if len(images) > 1 else None)
                sizes.add(image["pixel_size_um"])
                for page, at in enumerate(_pages(one, path)):
                    channel = f"c{at.get('C', 0)}"
                    names.setdefault(channel, set()).add(_nth(image["channels"], at.get("C", 0)))
                    planes.append(
                        PlaneFile(
                            PageOf(path, index, page), *place, channel, z=str(at.get("Z", "")), t=str(at.get("T", ""))
                        )
                    )
    plan = make_plan(planes, source=source, format="ome_tiff", choice=choice)
    told = {key: next(iter(names[key])) for key in plan.channel_keys if len(names[key]) == 1 and "" not in names[key]}
    different = [f"{key} ({listing(sorted(names[key]))})" for key in plan.channel_keys if len(names[key]) > 1]
    if different:
        raise PlateError(
            f"{source}: its files name the same channel differently: {listing(different)}. Import them apart."
        )
    plan.channel_names = told if len(set(told.values())) == len(told) else {}
    if len(sizes) == 1:
        plan.pixel_size_um = sizes.pop()
    elif len(sizes) > 1:
        plan.notes.append(f"the files give several pixel sizes ({listing(sorted(map(str, sizes)))}): none was taken")
    return plan


def _opened(path: Path) -> Any:
    import tifffile

    try:
        return tifffile.TiffFile(path)
    except Exception as error:  # tifffile has its own kinds
        raise PlateError(f"{path} cannot be read as a TIFF ({type(error).__name__}: {error}).") from error


def _pages(series: Any, path: Path) -> list[dict[str, int]]:
    """Return each page's place along C, Z and T, in the order of the file."""
    import numpy as np

    axes = series.axes.upper()
    if not axes.endswith("YX") or not set(axes[:-2]) <= set("CZTQI"):
        raise PlateError(f"{path} has the axes {axes}; expected planes Y, X with C, Z and T before them.")
    shape = series.shape[:-2]
    if np.prod(shape, dtype=float) > 1e6:
        raise PlateError(f"{path} declares {series.shape} planes; that is no field.")
    return [dict(zip(axes[:-2], map(int, at), strict=True)) for at in np.ndindex(*shape)]


def _read_xml(path: Path) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Return the images (id, channels, µm/px), and (well, site) by image id where the XML has a plate."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    with _opened(path) as tiff:
        text = tiff.ome_metadata
    if not text:
        raise PlateError(f"{path} has no OME-XML; import it with --format tiff.")
    if len(text) > MAX_XML_CHARS:
        raise PlateError(f"{path} has OME-XML of {len(text):,} characters; that is no description of an image.")
    try:
        root = fromstring(text, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError) as error:
        raise PlateError(f"{path}: its OME-XML cannot be read: {error or type(error).__name__}.") from error
    images, places = [], {}
    for element in root.iter():
        tag = _tag(element)
        if tag == "Image":
            pixels = next((c for c in element if _tag(c) == "Pixels"), None)
            channels = [c.get("Name") or "" for c in pixels or () if _tag(c) == "Channel"]
            images.append({"id": element.get("ID", ""), "channels": channels, "pixel_size_um": _size(pixels)})
        elif tag == "Well":
            try:
                well = well_name(int(element.get("Row", "")), int(element.get("Column", "")))
                canonical_well(well)
            except (ValueError, MetadataError) as error:
                raise PlateError(f"{path}: its OME-XML has a well without a place ({error}).") from error
            samples = [s for s in element if _tag(s) == "WellSample"]
            for site, sample in enumerate(samples, start=1):
                reference = next((c.get("ID") for c in sample if _tag(c) == "ImageRef"), None)
                if reference:
                    places[reference] = (well, str(site))
    return images, places


def _tag(element: Any) -> str:
    return str(element.tag).rpartition("}")[2]


def _size(pixels: Any) -> float | None:
    if pixels is None:
        return None
    try:
        x, y = (float(pixels.get(f"PhysicalSize{a}", "nan")) for a in "XY")
        units = [UNITS_UM[pixels.get(f"PhysicalSize{a}Unit", "µm")] for a in "XY"]
    except (ValueError, KeyError):
        return None
    x, y = x * units[0], y * units[1]
    return round(x, 9) if x > 0 and abs(x - y) <= 1e-3 * x else None


def _place(path: Path, pattern: str | None, told: tuple[str, str] | None, index: int | None) -> tuple[str, str]:
    if pattern is None and told is not None:
        return told
    try:
        match = re.search(pattern, path.name) if pattern else _PHENIX.search(path.name) or _WELL.search(path.name)
    except re.error as error:
        raise PlateError(f"--pattern '{pattern}' is not a regular expression: {error}.") from error
    groups = match.groupdict() if match else {}
    text = groups.get("well") or f"{groups.get('row') or ''}{groups.get('column') or ''}"
    if groups.get("row", "").isdigit():
        text = f"r{groups['row']}c{groups['column']}"
    if not text:
        raise PlateError(
            f"{path}: neither its OME-XML nor its name says which well it shows. Give --pattern, as in "
            "'(?P<well>[A-P]\\d\\d)_(?P<site>\\d+)'."
        )
    try:
        well = canonical_well(text)
    except MetadataError as error:
        raise PlateError(f"{path}: {error}") from error
    site = groups.get("site")
    return well, site_name(site if site is not None or index is None else str(index + 1))


def _nth(names: list[str], position: int) -> str:
    return names[position] if position < len(names) else ""
