"""Import OME-TIFFs: channels, planes and pixel size from their OME-XML; wells from the OME-XML or the file names.

The OME-XML is read with defusedxml rather than ome-types, which does not accept files that are imported here (units or
elements outside the schema, namespaces before 2015), changes invalid identifiers, and takes 39 s for a comment of
60 MB.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from cellvim.data.importers import import_plan
from cellvim.data.importers.import_plan import ImportOptions, ImportPlan, PageOf, PlaneFile, Site, tag_name
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


def plan_ome_tiff(source: Path, options: ImportOptions) -> ImportPlan:
    """Plan the import of OME-TIFFs with one or several images per file, in a folder and its sub-folders.

    ``options.pattern`` is a regular expression with the groups ``well`` and optionally ``site``, searched for in file
    names. Without it, wells are those of the OME-XML's plate, or else found in the file names.

    Raises
    ------
    PlateError
        A file cannot be read, its well is unknown, or fields have different channels.
    """
    files = find_ome_tiffs(source)
    if not files:
        raise PlateError(f"{source} has no .ome.tif files.")
    planes: list[PlaneFile] = []
    names: dict[str, set[str]] = {}
    sizes: set[float | None] = set()
    for path in files:
        with _open_tiff(path) as tiff:
            images, sites = _read_xml(tiff.ome_metadata, path)
            series = list(tiff.series)
            if len(series) != len(images):
                raise PlateError(f"{path} describes {len(images)} images and holds {len(series)}.")
            for i, (image, one) in enumerate(zip(images, series, strict=True)):
                site = sites.get(image["id"])
                if options.pattern is not None or site is None:
                    site = _site_in_name(path, options.pattern, str(i + 1) if len(images) > 1 else None)
                sizes.add(image["pixel_size_um"])
                for page, at in enumerate(_plane_positions(one, path)):
                    c = at.get("C", 0)
                    channel = f"c{c}"
                    names.setdefault(channel, set()).add(image["channels"][c] if c < len(image["channels"]) else "")
                    z, t = str(at.get("Z", "")), str(at.get("T", ""))
                    planes.append(PlaneFile(PageOf(path, i, page), *site, channel, z, t))
    plan = import_plan.make_plan(planes, source=source, format="ome_tiff", options=options)
    different = [f"{key} ({listing(sorted(names[key]))})" for key in plan.channel_keys if len(names[key]) > 1]
    if different:
        raise PlateError(
            f"{source}: its files name the same channel differently: {listing(different)}. Import them separately."
        )
    known = {key: name for key in plan.channel_keys for name in names[key] if name}
    plan.channel_names = known if len(set(known.values())) == len(known) else {}
    plan.set_pixel_size(sizes, "the files give")
    return plan


def _open_tiff(path: Path) -> Any:
    import tifffile

    try:
        return tifffile.TiffFile(path)
    except Exception as error:  # tifffile has its own exceptions
        raise PlateError(f"{path} cannot be read as a TIFF ({type(error).__name__}: {error}).") from error


def _plane_positions(series: Any, path: Path) -> list[dict[str, int]]:
    """Return the index of each plane along C, Z and T, in the order of the file."""
    import numpy as np

    axes, shape = series.axes.upper(), series.shape[:-2]
    if not axes.endswith("YX") or not set(axes[:-2]) <= set("CZTQI"):
        raise PlateError(f"{path} has the axes {axes}; expected planes Y, X with C, Z and T before them.")
    if np.prod(shape, dtype=float) > 1e6:
        raise PlateError(f"{path} declares {series.shape} planes, too many for a field.")
    return [dict(zip(axes[:-2], map(int, at), strict=True)) for at in np.ndindex(*shape)]


def _read_xml(text: str | None, path: Path) -> tuple[list[dict[str, Any]], dict[str, Site]]:
    """Return the images (id, channels, pixel size), and the sites by image id if the OME-XML has a plate."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    if not text:
        raise PlateError(f"{path} has no OME-XML; import it with --format tiff.")
    if len(text) > MAX_XML_CHARS:
        raise PlateError(f"{path} has OME-XML of {len(text):,} characters, too many for a description of images.")
    try:
        root = fromstring(text, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError) as error:
        raise PlateError(f"{path}: its OME-XML cannot be read: {error or type(error).__name__}.") from error
    images, sites = [], {}
    for element in root.iter():
        tag = tag_name(element)
        if tag == "Image":
            pixels = next((c for c in element if tag_name(c) == "Pixels"), None)
            channels = [c.get("Name") or "" for c in pixels or () if tag_name(c) == "Channel"]
            images.append({"id": element.get("ID", ""), "channels": channels, "pixel_size_um": _pixel_size(pixels)})
        elif tag == "Well":
            try:
                well = canonical_well(well_name(int(element.get("Row", "")), int(element.get("Column", ""))))
            except (ValueError, MetadataError) as error:
                raise PlateError(f"{path}: its OME-XML has a well without a valid row and column ({error}).") from error
            for site, sample in enumerate((s for s in element if tag_name(s) == "WellSample"), start=1):
                reference = next((c.get("ID") for c in sample if tag_name(c) == "ImageRef"), None)
                if reference:
                    sites[reference] = (well, str(site))
    return images, sites


def _pixel_size(pixels: Any) -> float | None:
    if pixels is None:
        return None
    try:
        x, y = (
            float(pixels.get(f"PhysicalSize{a}", "nan")) * UNITS_UM[pixels.get(f"PhysicalSize{a}Unit", "µm")]
            for a in "XY"
        )
    except (ValueError, KeyError):
        return None
    return round(x, 9) if x > 0 and abs(x - y) <= 1e-3 * x else None


def _site_in_name(path: Path, pattern: str | None, default_site: str | None) -> Site:
    """Return the well and site in a file name; ``default_site`` if the name has a well only."""
    try:
        match = re.search(pattern, path.name) if pattern else _PHENIX.search(path.name) or _WELL.search(path.name)
    except re.error as error:
        raise PlateError(f"--pattern '{pattern}' is not a regular expression: {error}.") from error
    groups = match.groupdict() if match else {}
    if not any(groups.get(name) for name in ("well", "row", "column")):
        raise PlateError(
            f"{path}: neither its OME-XML nor its name contains a well. Give --pattern, as in "
            "'(?P<well>[A-P]\\d\\d)_(?P<site>\\d+)'."
        )
    if groups.get("site") is None:
        groups["site"] = default_site
    return import_plan.parse_site(groups, str(path))
