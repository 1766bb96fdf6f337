"""What an importer finds: which file holds which channel of which site, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cellvim.data.wells import natural_key, well_position
from cellvim.errors import InputError, PlateError, listing


@dataclass(frozen=True)
class PageOf:
    """One plane of a file that holds several."""

    path: Path
    series: int
    page: int

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"{self.path.name} (image {self.series}, plane {self.page})"


@dataclass(frozen=True)
class MaximumOf:
    """The maximum over planes of a z-stack."""

    planes: tuple[Path | PageOf, ...]

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"{self.planes[0].name} and {len(self.planes) - 1} more planes"


Source = Path | PageOf | MaximumOf


@dataclass(frozen=True)
class PlaneFile:
    """One image file, or plane of one: a channel of a site of a well, at one z plane and time point."""

    path: Path | PageOf
    well: str  # A01
    site: str
    channel: str  # as the files name it: ch5, Channel1, w2
    z: str = ""  # as the files name them; empty where they do not
    t: str = ""


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
    positions
        (well, site) -> (x, y) of the field's middle in µm, as the source says.
    plate_metadata
        What the source says of the plate as a whole: ``Metadata_Source``, ``Metadata_Batch``.
    """

    format: str
    fields: dict[tuple[str, str], dict[str, Source]]
    channel_keys: list[str]
    channel_names: dict[str, str] = field(default_factory=dict)
    pixel_size_um: float | None = None
    plate_name: str | None = None
    notes: list[str] = field(default_factory=list)
    positions: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    plate_metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Which z plane and time point to take, by their place in order; ``z="max"`` projects. None: there is only one."""

    z: int | str | None = None
    t: int | None = None


def make_plan(files: Iterable[PlaneFile], *, source: Path, format: str, choice: Choice | None = None) -> ImportPlan:
    """Group files into fields, and check that each field has each channel once.

    Raises
    ------
    PlateError
        There are no files, a site lacks a channel, or several files are one channel of one site.
    InputError
        The z plane or time point that was chosen is not there.
    """
    choice = choice or Choice()
    found: dict[tuple[str, str], dict[str, list[PlaneFile]]] = {}
    keys: set[str] = set()
    for file in files:
        found.setdefault((file.well, file.site), {}).setdefault(file.channel, []).append(file)
        keys.add(file.channel)
    if not found:
        raise PlateError(f"{source} has no image files that could be imported.")
    fields = {place: {c: _choose(fs, source, choice) for c, fs in of.items()} for place, of in found.items()}
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


def _choose(files: list[PlaneFile], source: Path, choice: Choice) -> Source:
    """Return the one file of a channel of a site, or the projection of its planes."""
    for axis, option in (("t", choice.t), ("z", choice.z)):
        values = sorted({getattr(f, axis) for f in files}, key=natural_key)
        if len(values) < 2 or option == "max":
            continue
        if option is None:
            first, other = (next(f for f in files if getattr(f, axis) == v) for v in values[:2])
            what = f"{len(values)} z planes" if axis == "z" else f"{len(values)} time points"
            projection = " or --z max" if axis == "z" else ""
            raise PlateError(
                f"{source}: channel {first.channel} of well {first.well} site {first.site} has {what}, such as "
                f"{_below(source, first.path)} and {_below(source, other.path)}. Choose one with --{axis} 0 to "
                f"{len(values) - 1}{projection}."
            )
        if not isinstance(option, int) or not 0 <= option < len(values):
            raise InputError(
                f"--{axis} is {option}; well {files[0].well} site {files[0].site} of {source} has {axis} = 0 to "
                f"{len(values) - 1}."
            )
        files = [f for f in files if getattr(f, axis) == values[option]]
    distinct = {(f.z, f.t) for f in files}
    if len(files) > len(distinct):
        first, other = next((a, b) for i, a in enumerate(files) for b in files[i + 1 :] if (a.z, a.t) == (b.z, b.t))
        raise PlateError(
            f"{source}: channel {first.channel} of well {first.well} site {first.site} has two files, "
            f"{_below(source, first.path)} and {_below(source, other.path)}. Narrow --pattern so that it tells them "
            "apart or leaves one out."
        )
    if len(files) == 1:
        return files[0].path
    return MaximumOf(tuple(f.path for f in sorted(files, key=lambda f: natural_key(f.z))))


def _below(source: Path, path: Path | PageOf) -> str:
    if isinstance(path, PageOf):
        return path.name
    return path.relative_to(source).as_posix() if path.is_relative_to(source) else path.name


def site_name(text: str | None) -> str:
    """Return a site's name: ``"01"`` is ``"1"``; a source without sites has the one site ``"1"``."""
    if not text:
        return "1"
    if text.isdigit():
        return str(int(text))
    return "".join(ch for ch in text if ch.isascii() and ch.isalnum()) or "1"
