"""Importing raw Opera Phenix and Operetta measurements: Harmony's index where it is, else the files' names."""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from cellvim.data.importers.import_plan import Choice, ImportPlan, PlaneFile, make_plan, site_name
from cellvim.data.importers.tiff_folder import plan_tiff_folder
from cellvim.data.wells import canonical_well
from cellvim.errors import MetadataError, PlateError, listing

INDEX_NAMES = ("Index.xml", "Index.idx.xml")
# The channels of JUMP-CP's Opera Phenix plates of eight channels. Other sites number theirs differently, and a file's
# name tells only the number: so this is used when the user asks for it by name, never guessed.
JUMP_CHANNELS = {
    "ch1": "Mito",
    "ch2": "AGP",
    "ch3": "RNA",
    "ch4": "ER",
    "ch5": "DNA",
    "ch6": "HighZBF",
    "ch7": "LowZBF",
    "ch8": "Brightfield",
}


def find_index(source: Path) -> Path | None:
    """Return Harmony's index of a measurement folder, or None."""
    for folder in (source, source / "Images"):
        for name in INDEX_NAMES:
            if (folder / name).is_file():
                return folder / name
    return None


def plan_phenix(source: Path, *, choice: Choice | None = None) -> ImportPlan:
    """Read a measurement folder: channel names and µm/px come from the index; without it the names tell the rest.

    Raises
    ------
    PlateError
        The index cannot be read, files that it lists are missing, or a site lacks a channel.
    """
    index = find_index(source)
    if index is None:
        folder = source / "Images" if (source / "Images").is_dir() else source
        plan = plan_tiff_folder(folder, pattern="phenix", choice=choice)
        plan.format = "phenix"
        return plan
    return _plan_from_index(source, index, choice)


def _plan_from_index(source: Path, index: Path, choice: Choice | None) -> ImportPlan:
    images, channels, plate_name = _read_index(index)
    files, missing = [], {}
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
        file = PlaneFile(index.parent / url, well, site, key, image.get("PlaneID", ""), image.get("TimepointID", ""))
        if (position := _position(image)) is not None:
            positions.setdefault((well, site), position)
        if file.path.is_file():
            files.append(file)
        else:
            missing.setdefault((well, file.site), []).append(file)
        for tag in ("ChannelName", "ImageResolutionX", "ImageResolutionY"):
            if image.get(tag):
                channels.setdefault(key, {}).setdefault(tag, image[tag])
    there = {(f.well, f.site) for f in files}
    partly = [
        f"{f.path.name} (well {f.well} site {f.site} {f.channel})" for k in missing if k in there for f in missing[k]
    ]
    if partly:
        raise PlateError(f"{source}: {len(partly)} files of the index are missing: {listing(partly, 4)}. Add them.")
    if not files:
        raise PlateError(f"{index} lists {len(images)} images and none of the files is in {index.parent}.")
    plan = make_plan(files, source=source, format="phenix", choice=choice)
    plan.positions = {place: positions[place] for place in plan.fields if place in positions}
    if missing:
        names = [f"{well}/{site}" for well, site in missing]
        plan.notes.append(f"{len(names)} fields of {index.name} have no files and were left out: {listing(names)}")
    plan.plate_name = plate_name
    plan.channel_names = {
        key: channels[key]["ChannelName"] for key in plan.channel_keys if channels.get(key, {}).get("ChannelName")
    }
    plan.pixel_size_um = _pixel_size(channels, plan, index)
    return plan


def _position(image: dict[str, str]) -> tuple[float, float] | None:
    """Return where the field's middle lies in its well, (x, y) in µm; Harmony gives metres, y upwards."""
    try:
        x, y = (float(image[f"Position{axis}"]) * 1e6 for axis in "XY")
    except (KeyError, ValueError):
        return None
    return (round(x, 3), round(y, 3)) if abs(x) < 1e6 and abs(y) < 1e6 else None


def _pixel_size(channels: dict[str, dict[str, str]], plan: ImportPlan, index: Path) -> float | None:
    sizes = set()
    for key in plan.channel_keys:
        for tag in ("ImageResolutionX", "ImageResolutionY"):
            text = channels.get(key, {}).get(tag)
            try:
                meters = float(text) if text else 0.0
            except ValueError as error:
                raise PlateError(f"{index}: '{text}' is no {tag}.") from error
            if meters > 0:
                sizes.add(round(meters * 1e6, 6))
    if len(sizes) > 1:
        plan.notes.append(f"{index.name} gives several pixel sizes ({listing(sorted(sizes))} µm): none was taken")
        return None
    return sizes.pop() if sizes else None


def _read_index(index: Path) -> tuple[list[dict[str, str]], dict[str, dict[str, str]], str | None]:
    """Return the images (tag -> text), what the maps say of each channel, and the plate's name."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    images: list[dict[str, str]] = []
    channels: dict[str, dict[str, str]] = {}
    plate_name: str | None = None
    try:
        for _, element in iterparse(index, events=("end",), forbid_dtd=True):
            tag = _local(element)
            if tag == "Image":
                children = _texts(element)
                if "URL" in children:  # the list of wells repeats images by id alone
                    images.append(children)
                element.clear()
            elif tag == "Entry" and "ChannelID" in element.attrib:  # from Harmony 5.2 on, constants are in a map
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
    return {_local(child): child.text.strip() for child in element if child.text and child.text.strip()}


def _local(element: Element) -> str:
    return element.tag.rpartition("}")[2]
