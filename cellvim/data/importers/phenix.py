"""Import raw Opera Phenix and Operetta measurements, from Harmony's index or otherwise from the file names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from cellvim.data.importers.import_plan import ImportOptions, ImportPlan, PlaneFile, make_plan, site_name, tag_name
from cellvim.data.importers.tiff_folder import plan_tiff_folder
from cellvim.data.wells import canonical_well
from cellvim.errors import MetadataError, PlateError

INDEX_NAMES = ("Index.xml", "Index.idx.xml")
# The eight channels of JUMP-CP's Opera Phenix plates. Other laboratories number theirs differently, and file names
# contain only the number: the preset is used when the user asks for it, never guessed.
_JUMP_NAMES = ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")
JUMP_CHANNELS = {f"ch{i}": name for i, name in enumerate(_JUMP_NAMES, start=1)}


def find_index(source: Path) -> Path | None:
    """Return Harmony's index of a measurement folder, or None."""
    candidates = (folder / name for folder in (source, source / "Images") for name in INDEX_NAMES)
    return next((path for path in candidates if path.is_file()), None)


def plan_phenix(source: Path, options: ImportOptions) -> ImportPlan:
    """Plan the import of a measurement folder; channel names and the pixel size are in the index only.

    Raises
    ------
    PlateError
        The index cannot be read, files that it lists are missing, or a site lacks a channel.
    """
    index = find_index(source)
    if index is None:
        folder = source / "Images" if (source / "Images").is_dir() else source
        plan = plan_tiff_folder(folder, replace(options, pattern="phenix"))
        plan.format = "phenix"
        return plan
    images, channels, plate_name = _read_index(index)
    files: list[PlaneFile] = []
    positions: dict[tuple[str, str], tuple[float, float]] = {}
    for image in images:
        url = image.get("URL", "")
        if not url or "/" in url or "\\" in url or url.startswith("."):
            raise PlateError(f"{index} lists the file '{url}'; expected a name in the folder of the index.")
        try:
            well = canonical_well(f"r{image['Row']}c{image['Col']}")
            key = f"ch{int(image['ChannelID'])}"
        except (KeyError, ValueError, MetadataError) as error:
            raise PlateError(f"{index}: the image '{url}' has no valid Row, Col and ChannelID ({error}).") from error
        site = site_name(image.get("FieldID"))
        z, t = image.get("PlaneID", ""), image.get("TimepointID", "")
        files.append(PlaneFile(index.parent / url, well, site, key, z, t))
        if (position := _position(image)) is not None:
            positions.setdefault((well, site), position)
        for tag in ("ChannelName", "ImageResolutionX", "ImageResolutionY"):
            if image.get(tag):
                channels.setdefault(key, {}).setdefault(tag, image[tag])
    missing = [f for f in files if not f.path.is_file()]
    files = [f for f in files if f.path.is_file()]
    if not files:
        raise PlateError(f"{index} lists {len(images)} images and none of the files is in {index.parent}.")
    listed = f"fields of {index.name}"
    plan = make_plan(files, source=source, format="phenix", options=options, missing=missing, listed=listed)
    plan.positions = {site: positions[site] for site in plan.fields if site in positions}
    plan.plate_name = plate_name
    known = {key: channels.get(key, {}) for key in plan.channel_keys}
    plan.channel_names = {key: values["ChannelName"] for key, values in known.items() if values.get("ChannelName")}
    try:
        meters = [float(values.get(f"ImageResolution{axis}") or 0) for values in known.values() for axis in "XY"]
    except ValueError as error:
        raise PlateError(f"{index}: the pixel size of a channel is not a number ({error}).") from error
    plan.set_pixel_size({round(size * 1e6, 6) for size in meters if size > 0}, f"{index.name} gives")
    return plan


def _position(image: dict[str, str]) -> tuple[float, float] | None:
    """Return the centre of the field in its well, (x, y) in µm; the index has metres, with y upwards."""
    try:
        x, y = (float(image[f"Position{axis}"]) * 1e6 for axis in "XY")
    except (KeyError, ValueError):
        return None
    return (round(x, 3), round(y, 3)) if abs(x) < 1e6 and abs(y) < 1e6 else None


def _read_index(index: Path) -> tuple[list[dict[str, str]], dict[str, dict[str, str]], str | None]:
    """Return the images (tag -> text), the properties of each channel, and the plate's name."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    images: list[dict[str, str]] = []
    channels: dict[str, dict[str, str]] = {}
    plate_name: str | None = None
    try:
        for _, element in iterparse(index, events=("end",), forbid_dtd=True):
            tag = tag_name(element)
            if tag == "Image":
                children = _texts(element)
                if "URL" in children:  # the list of wells refers to images by their id alone
                    images.append(children)
                element.clear()
            elif tag == "Entry" and "ChannelID" in element.attrib:  # constants are in a map since Harmony 5.2
                channels.setdefault(f"ch{element.attrib['ChannelID']}", {}).update(_texts(element))
                element.clear()
            elif tag == "Plate":
                children = _texts(element)
                plate_name = plate_name or children.get("Name") or children.get("PlateID")
    except (ParseError, DefusedXmlException, UnicodeDecodeError, ValueError) as error:
        raise PlateError(f"{index} cannot be read as Harmony's index: {error or type(error).__name__}.") from error
    if not images:
        raise PlateError(f"{index} lists no images; expected Harmony's index of a measurement.")
    return images, channels, plate_name


def _texts(element: Element) -> dict[str, str]:
    return {tag_name(child): child.text.strip() for child in element if child.text and child.text.strip()}
