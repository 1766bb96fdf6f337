"""A first look at plates: their channels, sizes and names, before there is a model to match them with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellvim.channels import canonical_name, find_dna_channel, match_channels, parse_channel_overrides
from cellvim.embedding.options import Channels, EmbeddingOptions, check_size
from cellvim.embedding.plan import fields_of
from cellvim.errors import FieldReadError, InputError, listing

if TYPE_CHECKING:
    from cellvim.data.plate import Field, Plate

SEGMENTED = ("nuclei", "cells", "cellpose")  # sources of cells that need a channel of nuclei
CELL_UM = 40.0  # a cell with its surroundings, when the plate says how large a pixel is
CELL_PX = 64  # and when it does not
TILE_PX = 224


@dataclass
class Look:
    """What a first look at a plate tells, before there is a model to match it with."""

    source: str | Plate
    view: dict[str, Any]
    wells: list[str] | None
    name: str
    path: str
    channels: list[str]
    meanings: list[str]
    dna: str | None
    crop_px: int | None
    pixel_size_um: float | None
    first_shape: tuple[int, int] | None
    _plate: Plate | None

    @property
    def plate(self) -> Plate:
        """The plate, opened."""
        from cellvim.data.plate import open_plate

        if self._plate is None:
            self._plate = open_plate(self.source, **self.view) if isinstance(self.source, str) else self.source
        return self._plate

    def close(self) -> None:
        """Let go of the opened plate."""
        self._plate = None


def look_at_all(sources: Sequence[str | Path | Plate], asked: EmbeddingOptions) -> list[Look]:
    """Look at each plate; of several, none stays open.

    Raises
    ------
    CellvimError
        A plate cannot be opened, or has not what was asked for.
    """
    from cellvim.data.plate import Plate, open_plate
    from cellvim.data.wells import canonical_well

    view, wells, cells = dict(asked.view or {}), asked.wells, asked.cells
    looks: list[Look] = []
    for source in sources:
        plate = source if isinstance(source, Plate) else open_plate(source, **view)
        pixel_size_um = plate.pixel_size_um
        crop_px = _crop_px(asked, pixel_size_um)
        fields, _, _ = fields_of(plate, wells)
        names, meanings = _plate_channels(plate, asked.channels)
        first_shape = next(_shapes(fields), None)
        if crop_px is not None and first_shape is not None:
            factor = 1.0 if asked.um_per_px is None else pixel_size_um / asked.um_per_px
            _check_crop_fits(crop_px, [max(1, round(n * factor)) for n in first_shape])
        looks.append(
            Look(
                source=source if isinstance(source, Plate) else str(source),
                view={} if isinstance(source, Plate) else view,
                wells=None if wells is None else [canonical_well(w) for w in wells],
                name=plate.name,
                path=plate.path,
                channels=names,
                meanings=meanings,
                dna=nuclear_channel(plate, names, meanings) if asked.unit == "cell" and cells in SEGMENTED else None,
                crop_px=crop_px,
                pixel_size_um=pixel_size_um,
                first_shape=first_shape,
                _plate=plate,
            )
        )
        if len(sources) > 1:
            looks[-1].close()
    return looks


def _crop_px(asked: EmbeddingOptions, pixel_size_um: float | None) -> int | None:
    """Return the side of a crop in pixels of the plate, or of the resampled field, where one was asked for."""
    from cellvim.data.crops import CropSpec

    if asked.crop_um is None and asked.um_per_px is None:
        return asked.crop_size
    _, size = CropSpec(
        asked.unit if asked.crop_um is not None or asked.crop_size is not None else "field",
        asked.crop_size if asked.crop_um is None else None,
        size_um=asked.crop_um,
        um_per_px=asked.um_per_px,
    ).pixels(pixel_size_um)
    crop_px = size if asked.crop_um is not None else asked.crop_size
    check_size(asked.unit, crop_px)
    return crop_px


def unique_names(looks: list[Look]) -> list[str]:
    """Return the plates' names, with the folder that each is in where plates of one name lie in several."""
    names = [look.name for look in looks]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        parts = [look.path.rstrip("/").replace("\\", "/").split("/") for look in looks]
        names = [f"{p[-2]}_{n}" if n in doubled and len(p) > 1 else n for n, p in zip(names, parts, strict=True)]
    if len(set(names)) < len(names):
        name = next(n for n in names if names.count(n) > 1)
        paths = [look.path for look, n in zip(looks, names, strict=True) if n == name]
        raise InputError(f"Several plates are called {name}, so their rows could not be told apart: {listing(paths)}.")
    return names


def all_meanings(looks: list[Look]) -> list[str]:
    """Return what the channels of all plates show, each once."""
    found: dict[str, str] = {}
    for look in looks:
        for meaning in look.meanings:
            found.setdefault(canonical_name(meaning) or meaning, meaning)
    return looks[0].meanings if len(looks) == 1 else list(found.values())


def nuclear_channel(plate: Plate, names: list[str], meanings: list[str]) -> str:
    """Return the channel to find nuclei in: of those chosen by what they mean, else any of the plate."""
    for available, chosen in ((meanings, names), (plate.channel_names, plate.channel_names)):
        if sum(canonical_name(name) == "DNA" for name in available) == 1:
            return chosen[find_dna_channel(available, where=Path(plate.path).name)]
    return plate.channel_names[find_dna_channel(plate.channel_names, where=Path(plate.path).name)]


def untrained_size(look: Look, asked: EmbeddingOptions) -> int | tuple[int, int]:
    """Return the size to build a model for that has no training to agree with: the unit's own, nothing is resized."""
    unit, um_per_px = asked.unit, asked.um_per_px
    pixel = um_per_px or look.pixel_size_um
    if unit == "field" and look.first_shape is not None:
        factor = 1.0 if um_per_px is None else look.pixel_size_um / um_per_px
        return tuple(max(1, round(n * factor)) for n in look.first_shape)
    if look.crop_px is not None:
        return look.crop_px
    if unit == "tile":
        return TILE_PX
    return CELL_PX if pixel is None else max(16, 16 * round(CELL_UM / pixel / 16))


def _plate_channels(plate: Plate, channels: Channels) -> tuple[list[str], list[str]]:
    """Return the plate's names of the channels to embed, and what they are called towards the model."""
    if channels is None:
        return list(plate.channel_names), list(plate.channel_names)
    if isinstance(channels, Mapping):
        channels = [f"{meaning}={name}" for meaning, name in channels.items()]
    pairs = parse_channel_overrides(channels if isinstance(channels, str) else ",".join(channels))
    ids = match_channels([name for _, name in pairs], plate.channel_names, where=Path(plate.path).name)
    return [plate.channel_names[i] for i in ids], [
        meaning or plate.channel_names[i] for (meaning, _), i in zip(pairs, ids, strict=True)
    ]


def _shapes(fields: Iterable[Field]) -> Iterator[tuple[int, int]]:
    for field in fields:
        with suppress(FieldReadError):
            yield field.shape[1:]


def _check_crop_fits(crop_px: int, shape: Sequence[int]) -> None:
    if crop_px > max(shape):
        raise InputError(
            f"The crop is {crop_px} pixels, but the fields are {shape[0]} x {shape[1]}; expected at most {max(shape)}. "
            "Choose with --crop-size."
        )
