"""The plan of an import: which file holds which channel of which site, validated before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from cellvim.data.wells import canonical_well, natural_key, well_position
from cellvim.errors import InputError, MetadataError, PlateError, listing


class PageOf(NamedTuple):
    """One plane of a file that holds several."""

    path: Path
    series: int
    page: int


class MaximumOf(NamedTuple):
    """The maximum projection of the planes of a z-stack."""

    planes: tuple[Path | PageOf, ...]


class CellStrip(NamedTuple):
    """The cells of one field, placed side by side in one image: (C, S, n · S)."""

    planes: tuple[Path, ...]


Source = Path | PageOf | MaximumOf | CellStrip
Site = tuple[str, str]  # (well, site)


def source_name(source: Source) -> str:
    """Return the name of a source for messages."""
    if isinstance(source, Path):
        return source.name
    if isinstance(source, PageOf):
        return f"{source.path.name} (image {source.series}, plane {source.page})"
    more = "planes" if isinstance(source, MaximumOf) else "cells"
    return f"{source_name(source.planes[0])} and {len(source.planes) - 1} more {more}"


class PlaneFile(NamedTuple):
    """An image file, or a plane of one: a channel of a site at one z plane and time point."""

    path: Path | PageOf
    well: str  # A01
    site: str
    channel: str  # as in the file name: ch5, Channel1, w2
    z: str = ""  # as in the file name; empty without z planes
    t: str = ""


@dataclass(frozen=True)
class ImportOptions:
    """Options of the importers; `cellvim.data.importers.import_plate` describes them."""

    pattern: str | None = None
    load_data: Path | None = None
    cell_table: Path | None = None
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

    def note_left_out(self, names: Sequence[object], what: str, limit: int = 4) -> None:
        """Add a note on files or sites that were left out, if there are any."""
        if names:
            self.notes.append(f"{len(names)} {what} and were left out: {listing(names, limit)}")

    def set_pixel_size(self, sizes: set[float | None], where: str) -> None:
        """Set the pixel size to the only one of ``sizes`` (µm)."""
        if len(sizes) > 1:
            self.notes.append(f"{where} several pixel sizes ({listing(sorted(map(str, sizes)))} µm): none was taken")
        self.pixel_size_um = next(iter(sizes)) if len(sizes) == 1 else None


def make_plan(
    files: Iterable[PlaneFile],
    *,
    source: Path,
    format: str,
    options: ImportOptions,
    missing: Iterable[PlaneFile] = (),
    listed: str = "",
) -> ImportPlan:
    """Group files into fields, and check that each field has each channel once.

    Sites whose files are all ``missing`` are left out; ``listed`` names where they are listed: ``"sites of a.csv"``.

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
    missing = list(missing)
    lost = [f"{f.path.name} (well {f.well} site {f.site} {f.channel})" for f in missing if (f.well, f.site) in found]
    if lost:
        raise PlateError(f"{source}: {len(lost)} files for {listed} are missing: {listing(lost, 4)}. Add them.")
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
    plan = ImportPlan(format, fields, keys)
    left_out = list(dict.fromkeys(f"{f.well}/{f.site}" for f in missing))
    plan.note_left_out(left_out, f"{listed} have no files", limit=12)
    return plan


def sorted_sites(sites: Iterable[Site]) -> list[Site]:
    """Return (well, site) pairs in plate order."""
    return sorted(sites, key=lambda pair: (well_position(pair[0]), natural_key(pair[1])))


def _choose(files: list[PlaneFile], source: Path, options: ImportOptions) -> Source:
    """Return the only file of a channel of a site, or the projection of its planes."""
    first = files[0]
    place = f"{source}: channel {first.channel} of well {first.well} site {first.site}"

    def name(file: PlaneFile) -> str:
        is_below = isinstance(file.path, Path) and file.path.is_relative_to(source)
        return file.path.relative_to(source).as_posix() if is_below else source_name(file.path)

    for axis, option, what in (("t", options.t, "time points"), ("z", options.z, "z planes")):
        values = sorted({getattr(f, axis) for f in files}, key=natural_key)
        if len(values) < 2 or option == "max":
            continue
        if option is None:
            one, other = (name(next(f for f in files if getattr(f, axis) == v)) for v in values[:2])
            raise PlateError(
                f"{place} has {len(values)} {what}, such as {one} and {other}. Choose one with --{axis} 0 to "
                f"{len(values) - 1}{' or --z max' if axis == 'z' else ''}."
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
                f"{place} has two files, {name(other)} and {name(file)}. Narrow --pattern so that it distinguishes "
                "them or excludes one."
            )
    if len(files) == 1:
        return files[0].path
    return MaximumOf(tuple(f.path for f in sorted(files, key=lambda f: natural_key(f.z))))


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
    if text and text.isdigit():
        return str(int(text))
    return "".join(ch for ch in text or "" if ch.isascii() and ch.isalnum()) or "1"


def choose_plate(plates: Any, plate_name: str | None, path: Path) -> Any:
    """Return which rows of a table belong to the plate, from the column with the names of the plates.

    Raises
    ------
    PlateError
        The table lists several plates, and ``plate_name`` is not one of them.
    """
    kept = plates.eq(plate_name) if plates.nunique() > 1 else plates.notna()
    if not kept.any():
        names = listing(sorted(plates.unique()), 6)
        raise PlateError(f"{path} lists the plates {names}; choose one with --plate-name.")
    return kept


class FileFinder:
    """Finds files by name below a folder; of several with the name, the one whose path has the most in common."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder = folder
        self._by_name: dict[str, list[Path]] = {}
        for path in files:
            self._by_name.setdefault(path.name, []).append(path)

    def find(self, name: str, folder: str) -> Path | None:
        """Return the file with a name whose parent folders match the end of ``folder`` best, or None."""
        name = name.replace("\\", "/").rpartition("/")[2]
        found = self._by_name.get(name, [])
        if len(found) < 2:
            return found[0] if found else None
        wanted = [p for p in folder.replace("\\", "/").split("/") if p]

        def n_common(path: Path) -> int:
            pairs = zip(reversed(path.parent.parts), reversed(wanted), strict=False)
            return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

        best = max(map(n_common, found))
        matches = [p for p in found if n_common(p) == best]
        if len(matches) > 1:
            raise PlateError(
                f"{self.folder} has {len(found)} files named {name}, and their folders do not identify the right one: "
                f"{listing((p.relative_to(self.folder) for p in matches), 2)}. Import one of those folders."
            )
        return matches[0]


def tag_name(element: Any) -> str:
    """Return the tag of an XML element without its namespace."""
    return str(element.tag).rpartition("}")[2]
