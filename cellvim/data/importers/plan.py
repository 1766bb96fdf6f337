"""What an importer finds: which file holds which channel of which site, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cellvim.data.wells import natural_key, well_position
from cellvim.errors import PlateError, listing


@dataclass(frozen=True)
class PlaneFile:
    """One image file: a channel of a site of a well, at one z plane and time point."""

    path: Path
    well: str  # A01
    site: str
    channel: str  # as the files name it: ch5, Channel1, w2
    plane: str = ""  # z plane and time point, where the names give them


@dataclass
class ImportPlan:
    """A plate to be: the files of every field, and what the source says about them.

    Attributes
    ----------
    format
        Which importer made it.
    fields
        (well, site) -> {channel key -> file}, every field with every channel, in plate order.
    channel_keys
        Channels as the files name them, in natural order.
    channel_names
        Names that the source itself gives to channel keys.
    pixel_size_um
        As the source says, or None.
    plate_name
        As the source says, or None.
    notes
        What was left out and why.
    """

    format: str
    fields: dict[tuple[str, str], dict[str, Path]]
    channel_keys: list[str]
    channel_names: dict[str, str] = field(default_factory=dict)
    pixel_size_um: float | None = None
    plate_name: str | None = None
    notes: list[str] = field(default_factory=list)


def make_plan(files: Iterable[PlaneFile], *, source: Path, format: str) -> ImportPlan:
    """Group files into fields, and check that each field has each channel once.

    Raises
    ------
    PlateError
        There are no files, a site lacks a channel, or several files are one channel of one site.
    """
    fields: dict[tuple[str, str], dict[str, Path]] = {}
    keys: set[str] = set()
    planes: dict[tuple[str, str, str], str] = {}
    for file in files:
        here = fields.setdefault((file.well, file.site), {})
        if file.channel in here:
            first, other = (_below(source, path) for path in (here[file.channel], file.path))
            which = planes[file.well, file.site, file.channel]
            why = (
                "They are different z planes or time points; one of each can be imported: choose it with --pattern."
                if which != file.plane
                else "Narrow --pattern so that it tells them apart or leaves one out."
            )
            raise PlateError(
                f"{source}: channel {file.channel} of well {file.well} site {file.site} has two files, {first} and "
                f"{other}. {why}"
            )
        here[file.channel] = file.path
        planes[file.well, file.site, file.channel] = file.plane
        keys.add(file.channel)
    if not fields:
        raise PlateError(f"{source} has no image files that could be imported.")
    channel_keys = sorted(keys, key=natural_key)
    ordered = sorted(fields, key=lambda ws: (well_position(ws[0]), natural_key(ws[1])))
    lacking = [
        f"well {well} site {site} lacks {listing(k for k in channel_keys if k not in fields[well, site])}"
        for well, site in ordered
        if len(fields[well, site]) < len(channel_keys)
    ]
    if lacking:
        raise PlateError(
            f"{source} has the channels {listing(channel_keys)}, but {len(lacking)} of {len(fields)} sites lack one: "
            f"{listing(lacking, 4)}. Add the files, or leave those sites or the channel out with --pattern."
        )
    return ImportPlan(format, {key: fields[key] for key in ordered}, channel_keys)


def _below(source: Path, path: Path) -> str:
    return path.relative_to(source).as_posix() if path.is_relative_to(source) else path.name


def site_name(text: str | None) -> str:
    """Return a site's name: ``"01"`` is ``"1"``; a source without sites has the one site ``"1"``."""
    if not text:
        return "1"
    if text.isdigit():
        return str(int(text))
    return "".join(ch for ch in text if ch.isascii() and ch.isalnum()) or "1"
