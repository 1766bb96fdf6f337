"""Plans: what becomes of each field, as plain values that are checked, sent to workers and compared.

What a plan is made of is its identity, by which an unfinished job is known again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as default
from functools import cached_property
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellvim.embedding.options import Unit
from cellvim.errors import InputError, PlateError, listing

if TYPE_CHECKING:
    from cellvim.data.cells import CellSource
    from cellvim.data.crops import CropSpec
    from cellvim.data.illumination import Illumination
    from cellvim.data.intensity import IntensityScale
    from cellvim.data.plate import Field, Plate
    from cellvim.embedding.ledger import Key, Rows
    from cellvim.models.encoder import Encoder

VERSIONS = ("cellvim", "numpy", "scipy", "scikit-image", "torch")  # of what the rows are computed with


@dataclass
class PlatePlan:
    """What is done with one plate. Opens it when its fields are needed, and can let go of them again.

    Attributes
    ----------
    source
        The plate's path, or the plate where it was given opened.
    name, path
        Of the plate; the name is unique among the plates of one job.
    n_fields, field_digest
        How many fields are embedded, and a hash of their names.
    lost_wells
        Wells that the plate lists and has no field of.
    channels, meanings, channel_ids
        The plate's names in the model's order; what each is called towards the model; the model's numbers for them.
    dna
        The channel that nuclei are found in, where cells are segmented.
    cutting
        What is cut, in pixels or µm.
    crop_px
        Side of a crop in pixels of the plate, or of the resampled field; None for the whole field.
    scale, illumination
        What is done to intensities.
    """

    source: str | Plate
    view: dict[str, Any]
    wells: list[str] | None
    name: str
    path: str
    n_fields: int
    field_digest: str
    lost_wells: list[str]
    chosen_wells: list[str]
    channels: list[str]
    meanings: list[str]
    channel_ids: list[int]
    dna: str | None
    cutting: CropSpec
    crop_px: int | None
    pixel_size_um: float | None
    cells_from: str | None
    cells_name: str
    cell_notes: str
    scale: IntensityScale
    illumination: Illumination | None
    _opened: tuple[Plate, list[Field], CellSource | None] | None = default(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def plate(self) -> Plate:
        """The plate, opened."""
        return self._open()[0]

    @property
    def fields(self) -> list[Field]:
        """The fields to embed, in the order of the rows."""
        return self._open()[1]

    @property
    def cells(self) -> CellSource | None:
        """Where cells come from; None for other units."""
        return self._open()[2]

    @property
    def extra_channels(self) -> list[str]:
        """The channel to read for finding nuclei alone, if it is not embedded."""
        return [self.dna] if self.dna is not None and self.dna not in self.channels else []

    def close(self) -> None:
        """Let go of the opened plate."""
        self._opened = None

    def _open(self) -> tuple[Plate, list[Field], CellSource | None]:
        if self._opened is None:
            from cellvim.data.cells import open_cells
            from cellvim.data.plate import open_plate

            plate = open_plate(self.source, **self.view) if isinstance(self.source, str) else self.source
            fields, _, _ = fields_of(plate, self.wells)
            if field_digest(fields) != self.field_digest:
                raise PlateError(f"{self.path} has other fields now than when the run was planned. Run it again.")
            cells = None if self.cells_from is None else open_cells(self.cells_from, plate, dna=self.dna)
            self._opened = (plate, fields, cells)
        return self._opened

    @property
    def identity(self) -> dict[str, Any]:
        """All of this plate that decides the rows."""
        return {
            "name": self.name,
            "fields": {"count": self.n_fields, "sha256": self.field_digest},
            "channels": dict(zip(self.channels, self.meanings, strict=True)),
            "model_ids": self.channel_ids,
            "nuclei": self.dna,
            "cells": self.cells_name,
            "crop_px": self.crop_px,
            "pixel_size_um": self.pixel_size_um,
            "view": {k: v for k, v in self.view.items() if k != "storage_options"},
            "intensities": {k: v for k, v in self.scale.to_dict().items() if k != "sampling"},
            "illumination": None if self.illumination is None else self.illumination.digest,
        }


@dataclass(frozen=True)
class EmbeddingPlan:
    """Everything that decides what the rows will be. Made by `plan_embedding`."""

    plates: tuple[PlatePlan, ...]
    unit: Unit
    model: Encoder
    model_name: str
    trained: bool
    input_px: int | None  # side of a crop as the model sees it; None: the field at its own resolution
    batch_size: int
    device: str
    precision: str  # float32 or bfloat16
    seed: int
    per_channel: bool = False
    class_names: tuple[str, ...] = ()  # of which probabilities are wanted
    notes: tuple[str, ...] = ()  # what the user should know
    tokens: bool = False
    batch_size_is_automatic: bool = False  # then an unfinished job's own is taken, where it matters

    @property
    def plate(self) -> Plate:
        """The plate, where there is one only; else the first."""
        return self.plates[0].plate

    @property
    def crop_px(self) -> int | None:
        """Side of a crop on the first plate; None: the whole field."""
        return self.plates[0].crop_px

    @property
    def fields(self) -> list[Field]:
        """The fields of all plates."""
        return [field for plate in self.plates for field in plate.fields]

    @property
    def n_fields(self) -> int:
        """How many fields there are on all plates."""
        return sum(plate.n_fields for plate in self.plates)

    @property
    def n_features(self) -> int:
        """Width of an embedding, D."""
        return self.model.config.embed_dim

    def all_keys(self, stretch: range | None = None) -> Iterator[Key]:
        """Yield (number of the plate, number of the field) of all fields, or of a stretch of them."""
        first = 0
        for number, plate in enumerate(self.plates):
            within = range(first, first + plate.n_fields)
            first = within.stop
            own = within if stretch is None else range(max(within.start, stretch.start), min(within.stop, stretch.stop))
            for i in own:
                yield number, i - within.start

    def field_name(self, key: Key) -> tuple[str, str]:
        """Return the names of a field's plate and of the field."""
        plate = self.plates[key[0]]
        return plate.name, plate.fields[key[1]].name

    def on(self, device: str, *, threads: int | None = None) -> EmbeddingPlan:
        """Return the plan for another device: the same plan if it is on that device already.

        With ``threads``, this process computes with so many from here on.
        """
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        if device == self.device:
            return self
        return replace(self, model=copy.deepcopy(self.model).to(device), device=device)

    def embed(self, keys: Iterable[Key], *, threads: int = 2) -> Iterator[tuple[Key, Rows | str]]:
        """Yield each field's rows, or why it has none, see `cellvim.embedding.encode.embed_fields`."""
        from cellvim.embedding.encode import embed_fields

        return embed_fields(self, keys, threads=threads)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the weights' names, types, shapes and values."""
        digest = sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.endswith("_extra_state"):  # of the channel sampling in training, no weight
                continue
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of what the rows are computed with, without what tells builds for different machines apart."""
        return {name: _version(name).partition("+")[0] for name in VERSIONS}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the rows, as plain values: an unfinished job goes on only where it is the same."""
        kind = self.device.split(":")[0]
        return {
            "model": self.model_name,
            "configuration": self.model.config.to_dict(),
            "weights": self.weights_sha256,
            "trained": self.trained,
            "unit": self.unit,
            "input_px": self.input_px,
            "cutting": {
                name: getattr(self.plates[0].cutting, name)
                for name in ("size_um", "um_per_px", "overlap", "border", "mask_neighbours")
            },
            "per_channel": self.per_channel,
            "classes": list(self.class_names),
            "tokens": self.tokens,
            "seed": self.seed,
            "precision": self.precision,
            "device": kind,
            # A GPU's libraries choose kernels by the batch size, and with it the last digits.
            "batch_size": "any" if kind == "cpu" else self.batch_size,
            "versions": self.versions,
            "plates": {f"{i:05d}": plate.identity for i, plate in enumerate(self.plates)},
        }


def fields_of(plate: Plate, wells: Sequence[str] | None) -> tuple[list[Field], list[str], list[str]]:
    """Return the fields of the wells, the wells that have none, and those that have some.

    Raises
    ------
    InputError
        The plate has no such well.
    """
    from cellvim.data.wells import canonical_well

    wanted = plate.wells if wells is None else [canonical_well(well) for well in wells]
    unknown = [well for well in wanted if well not in plate.wells]
    if unknown:
        raise InputError(f"{Path(plate.path).name} has no well {listing(unknown)}; it has {listing(plate.wells)}.")
    chosen = set(wanted)
    fields = [field for field in plate.fields if field.well in chosen]
    present = {field.well for field in fields}
    return fields, [w for w in plate.wells if w in chosen and w not in present], sorted(present)


def field_digest(fields: Iterable[Field]) -> str:
    """Return a hash of the fields' names."""
    return sha256("\0".join(field.name for field in fields).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
