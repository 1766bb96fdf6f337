"""The plan of an import: which file holds which channel of which site, validated before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellvim.data.wells import canonical_well, natural_key, well_position
from cellvim.errors import InputError, MetadataError, PlateError, listing


@dataclass(frozen=True)
class PageOf:
    """One plane of a file that holds several."""

    path: Path
    series: int
    page: int

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.path.name} (image {self.series}, plane {self.page})"


@dataclass(frozen=True)
class MaximumOf:
    """The maximum projection of the planes of a z-stack."""

    planes: tuple[Path | PageOf, ...]

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.planes[0].name} and {len(self.planes) - 1} more planes"


@dataclass(frozen=True)
class CellStrip:
    """The cells of one field, placed side by side in one image: (C, S, n · S)."""

    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.files[0].name} and {len(self.files) - 1} more cells"


Source = Path | PageOf | MaximumOf | CellStrip
Site = tuple[str, str]  # (well, site)


@dataclass(frozen=True)
class PlaneFile:
    """An image file, or a plane of one: a channel of a site at one z plane and time point."""

    path: Path | PageOf
    well: str  # A01
    site: str
    channel: str  # as in the file name: ch5, Channel1, w2
    z: str = ""  # as in the file name; empty without z planes
    t: str = ""


@dataclass(frozen=True)
class ImportOptions:
    """What an importer may be given besides the folder.

    Attributes
    ----------
    pattern
        Name of a ready pattern, or a regular expression for file names.
    table
        Table that lists the images: LoadData, or single cells.
    plate_name
        Plate whose rows are taken if the table lists several.
    z, t
        Position of the z plane and time point to import; ``z="max"`` projects. None if there is only one.
    """

    pattern: str | None = None
    table: Path | None = None
    plate_name: str | None = None
    z: int | str | None = None
    t: int | None = None


@dataclass
class ImportPlan:
    """The files of every field, and the metadata of the source.

    Attributes
    ----------
    format
        Name of the importer.
    fields
        (well, site) -> {channel key -> file}: every field with every channel, in plate order.
    channel_keys
        Channels as named in the files, in natural order.
    channel_names
        Channel names by channel key, where the source has them.
    pixel_size_um, plate_name
        As in the source, or None.
    notes
        What was left out and why.
    positions
        (well, site) -> (x, y) of the centre of the field in µm, where the source has them.
    plate_metadata
        Columns with one value for the plate: ``Metadata_Source``, ``Metadata_Batch``.
    """

    format: str
    fields: dict[Site, dict[str, Source]]
    channel_keys: list[str]
    channel_names: dict[str, str] = field(default_factory=dict)
    pixel_size_um: float | None = None
    plate_name: str | None = None
    notes: list[str] = field(default_factory=list)
    positions: dict[Site, tuple[float, float]] = field(default_factory=dict)
    plate_metadata: dict[str, str] = field(default_factory=dict)


def make_plan(files: Iterable[PlaneFile], *, source: Path, format: str, options: ImportOptions) -> ImportPlan:
    """Group files into fields, and check that each field has each channel once.

    Raises
    ------
    PlateError
        There are no files, a site lacks a channel, or several files are one channel of one site.
    InputError
        The chosen z plane or time point does not exist.
    """
    found: dict[Site, dict[str, list[PlaneFile]]] = {}
    for file in files:
        found.setdefault((file.well, file.site), {}).setdefault(file.channel, []).append(file)
    if not found:
        raise PlateError(f"{source} has no image files that could be imported.")
    keys = sorted({key for channels in found.values() for key in channels}, key=natural_key)
    fields = {
        site: {key: _choose(candidates, source, options) for key, candidates in found[site].items()}
        for site in sorted_sites(found)
    }
    lacking = [
        f"well {well} site {site} lacks {listing(k for k in keys if k not in channels)}"
        for (well, site), channels in fields.items()
        if len(channels) < len(keys)
    ]
    if lacking:
        raise PlateError(
            f"{source} has the channels {listing(keys)}, but {len(lacking)} of {len(fields)} sites lack one: "
            f"{listing(lacking, 4)}. Add the files, or exclude those sites or the channel with --pattern."
        )
    return ImportPlan(format, fields, keys)


def sorted_sites(sites: Iterable[Site]) -> list[Site]:
    """Return (well, site) pairs in plate order."""
    return sorted(sites, key=lambda pair: (well_position(pair[0]), natural_key(pair[1])))


def _choose(files: list[PlaneFile], source: Path, options: ImportOptions) -> Source:
    """Return the only file of a channel of a site, or the projection of its planes."""
    first = files[0]
    place = f"channel {first.channel} of well {first.well} site {first.site}"
    for axis, option, what in (("t", options.t, "time points"), ("z", options.z, "z planes")):
        values = sorted({getattr(f, axis) for f in files}, key=natural_key)
        if len(values) < 2 or option == "max":
            continue
        if option is None:
            one, other = (next(f for f in files if getattr(f, axis) == v) for v in values[:2])
            raise PlateError(
                f"{source}: {place} has {len(values)} {what}, such as {_relative(source, one.path)} and "
                f"{_relative(source, other.path)}. Choose one with --{axis} 0 to {len(values) - 1}"
                f"{' or --z max' if axis == 'z' else ''}."
            )
        if not isinstance(option, int) or not 0 <= option < len(values):
            raise InputError(
                f"--{axis} is {option}; well {first.well} site {first.site} of {source} has {axis} = 0 to "
                f"{len(values) - 1}."
            )
        files = [f for f in files if getattr(f, axis) == values[option]]
    seen: dict[tuple[str, str], PlaneFile] = {}
    for file in files:
        other = seen.setdefault((file.z, file.t), file)
        if other is not file:
            raise PlateError(
                f"{source}: {place} has two files, {_relative(source, other.path)} and {_relative(source, file.path)}. "
                "Narrow --pattern so that it distinguishes them or excludes one."
            )
    if len(files) == 1:
        return files[0].path
    return MaximumOf(tuple(f.path for f in sorted(files, key=lambda f: natural_key(f.z))))


def _relative(source: Path, path: Path | PageOf) -> str:
    if isinstance(path, PageOf):
        return path.name
    return path.relative_to(source).as_posix() if path.is_relative_to(source) else path.name


def check_missing(files: Iterable[PlaneFile], missing: Iterable[PlaneFile], source: Path, table: str) -> list[str]:
    """Return the sites of a table that have no files at all, as ``A01/1``.

    Raises
    ------
    PlateError
        A site has some of its files and lacks others.
    """
    complete = {(f.well, f.site) for f in files}
    partial = [
        f"{f.path.name} (well {f.well} site {f.site} {f.channel})" for f in missing if (f.well, f.site) in complete
    ]
    if partial:
        raise PlateError(f"{source}: {len(partial)} files of {table} are missing: {listing(partial, 4)}. Add them.")
    return list(dict.fromkeys(f"{f.well}/{f.site}" for f in missing if (f.well, f.site) not in complete))


def parse_site(groups: Mapping[str, str | None], name: str) -> Site:
    """Return well and site from the groups ``well``, or ``row`` and ``column``, and ``site`` of a pattern.

    Raises
    ------
    PlateError
        The groups are not a well.
    """
    row, column = groups.get("row") or "", groups.get("column") or ""
    text = groups.get("well") or (f"r{row}c{column}" if row.isdigit() else row + column)
    try:
        return canonical_well(text), site_name(groups.get("site"))
    except MetadataError as error:
        raise PlateError(f"{name}: the pattern finds the well '{text}' in its name. {error}") from error


def site_name(text: str | None) -> str:
    """Return the name of a site: ``"01"`` is ``"1"``; a source without sites has the single site ``"1"``."""
    if not text:
        return "1"
    if text.isdigit():
        return str(int(text))
    return "".join(ch for ch in text if ch.isascii() and ch.isalnum()) or "1"


def tag_name(element: Any) -> str:
    """Return the tag of an XML element without its namespace."""
    return str(element.tag).rpartition("}")[2]
