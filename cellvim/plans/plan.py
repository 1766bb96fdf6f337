"""Planning an embedding: everything that was asked for is checked before any work is done.

A plan says how each field becomes rows, and nothing else: not who does it, in which order, or on which machine. What
it is made of is its identity, by which an unfinished job is known again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from dataclasses import field as default
from functools import cached_property
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cellvim.channels import canonical_name, find_dna_channel, match_channels, parse_channel_overrides
from cellvim.errors import FieldReadError, InputError, ModelError, OutputError, PlateError, listing, suggestion

if TYPE_CHECKING:
    from cellvim.data.cell_sources import CellSource
    from cellvim.data.crops import CropSpec
    from cellvim.data.illumination import Illumination
    from cellvim.data.normalize import IntensityScale
    from cellvim.data.plate import Field, Plate
    from cellvim.models.encoder import Encoder
    from cellvim.running.ledger import Key, Rows

Unit = Literal["cell", "tile", "field"]
Channels = str | Sequence[str] | Mapping[str, str] | None
Plates = "str | Path | Plate | Sequence[str | Path | Plate]"

UNITS = ("cell", "tile", "field")
PRECISIONS = ("auto", "float32", "bfloat16")
DEFAULT_MODEL = "fastchannelvim_tiny_patch16"
SEGMENTED = ("nuclei", "cells", "cellpose")  # sources of cells that need a channel of nuclei
CELL_UM = 40.0  # a cell with its surroundings, when the plate says how large a pixel is
CELL_PX = 64  # and when it does not
TILE_PX = 224
SCALE_BY = ("auto", "all", "controls", "model")
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
            from cellvim.data.cell_sources import open_cells
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
        """Yield each field's rows, or why it has none, see `cellvim.encoding.embed_fields`."""
        from cellvim.encoding import embed_fields

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


def plan_embedding(
    plate: Plates,
    *,
    model: str | Path | Encoder = DEFAULT_MODEL,
    unit: Unit = "cell",
    channels: Channels = None,
    wells: Sequence[str] | None = None,
    crop_size: int | None = None,
    crop_um: float | None = None,
    um_per_px: float | None = None,
    overlap: float = 0.0,
    cells: str | Path = "nuclei",
    border: str = "pad",
    mask_neighbours: bool = False,
    scale_by: Literal["auto", "all", "controls", "model"] = "auto",
    illumination: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    per_channel: bool = False,
    probabilities: bool = False,
    tokens: bool = False,
    seed: int = 0,
    view: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
) -> EmbeddingPlan:
    """Check everything that was asked for, before any work is done; parameters as in `cellvim.embed`, and:

    Parameters
    ----------
    view
        Which plane, time point and resolution of plates that are given by path: arguments of `open_plate`.
    cache
        Folder in which what is estimated of the plates is kept for the next time.

    Raises
    ------
    CellvimError
        Something given cannot be used.
    """
    _check_choices(unit, crop_size, batch_size, scale_by, precision, tokens)
    sources = list(plate) if isinstance(plate, list | tuple) else [plate]
    if not sources:
        raise InputError("No plate was given; expected the path of at least one.")
    device = usable_device(device)
    looks = _look_at_all(sources, dict(view or {}), unit, channels, wells, cells, crop_size, crop_um, um_per_px)
    names = _unique_names(looks)
    built_for = _untrained_size(unit, looks[0], um_per_px)
    meanings = _all_meanings(looks)
    encoder, model_name = _encoder(model, meanings, image_size=built_for, seed=seed)
    input_px = None
    if unit != "field":
        input_px = encoder.config.image_height
        if encoder.config.image_width != input_px:
            raise ModelError(
                f"{model_name} is built for {input_px} x {encoder.config.image_width} pixels, but a {unit} is square. "
                "Use --unit field or another model."
            )
    if per_channel and encoder.config.tokens != "per_channel":
        raise ModelError(f"{model_name} has joint tokens, none of which is of one channel; --per-channel needs others.")
    class_names = _class_names(encoder, model_name) if probabilities else ()
    from cellvim.data.crops import CropSpec

    options = {"overlap": overlap, "border": border, "mask_neighbours": mask_neighbours, "um_per_px": um_per_px}
    options |= {"size_um": crop_um} if crop_um is not None else {"size_px": crop_size or input_px}
    cutting = CropSpec(unit, **(options if unit != "field" else {"um_per_px": um_per_px}))
    plans = []
    for look, name in zip(looks, names, strict=True):
        try:
            plans.append(
                _plan_plate(look, name, encoder, model_name, cutting, cells, scale_by, illumination, seed, cache)
            )
        except OSError as error:
            if cache is None:
                raise
            raise OutputError(f"{cache} cannot be written: {error.strerror or error}.") from error
        if len(looks) > 1:
            plans[-1].close()
        look.close()
    precision = _precision(precision, device)
    plan = EmbeddingPlan(
        plates=tuple(plans),
        unit=unit,
        model=encoder.to(device).eval(),
        model_name=model_name,
        trained=bool(encoder.is_trained),
        input_px=input_px,
        batch_size=1,
        device=device,
        precision=precision,
        seed=seed,
        per_channel=per_channel,
        class_names=class_names,
        notes=tuple(_unlike_training(encoder, model_name, plans, unit, input_px)),
        tokens=tokens,
    )
    if unit == "field":
        return plan
    if batch_size is not None:
        return replace(plan, batch_size=batch_size)
    from cellvim.encoding import automatic_batch_size

    return replace(plan, batch_size=automatic_batch_size(plan), batch_size_is_automatic=True)


@dataclass
class _Look:
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
        from cellvim.data.plate import open_plate

        if self._plate is None:
            self._plate = open_plate(self.source, **self.view) if isinstance(self.source, str) else self.source
        return self._plate

    def close(self) -> None:
        self._plate = None


def _look_at_all(sources, view, unit, channels, wells, cells, crop_size, crop_um, um_per_px) -> list[_Look]:
    from cellvim.data.crops import CropSpec
    from cellvim.data.plate import Plate, open_plate
    from cellvim.data.wells import canonical_well

    looks: list[_Look] = []
    for source in sources:
        plate = source if isinstance(source, Plate) else open_plate(source, **view)
        crop_px, pixel_size_um = crop_size, plate.pixel_size_um
        if crop_um is not None or um_per_px is not None:
            _, size = CropSpec(
                unit if crop_um is not None or crop_size is not None else "field",
                crop_size if crop_um is None else None,
                size_um=crop_um,
                um_per_px=um_per_px,
            ).pixels(pixel_size_um)
            crop_px = size if crop_um is not None else crop_size
            _check_size(unit, crop_px)
        fields, _, _ = fields_of(plate, wells)
        names, meanings = _plate_channels(plate, channels)
        first_shape = next(_shapes(fields), None)
        if crop_px is not None and first_shape is not None:
            factor = 1.0 if um_per_px is None else pixel_size_um / um_per_px
            _check_crop_fits(crop_px, [max(1, round(n * factor)) for n in first_shape])
        looks.append(
            _Look(
                source=source if isinstance(source, Plate) else str(source),
                view={} if isinstance(source, Plate) else view,
                wells=None if wells is None else [canonical_well(w) for w in wells],
                name=plate.name,
                path=plate.path,
                channels=names,
                meanings=meanings,
                dna=nuclear_channel(plate, names, meanings) if unit == "cell" and cells in SEGMENTED else None,
                crop_px=crop_px,
                pixel_size_um=pixel_size_um,
                first_shape=first_shape,
                _plate=plate,
            )
        )
        if len(sources) > 1:
            looks[-1].close()
    return looks


def _plan_plate(
    look: _Look, name, encoder, model_name, cutting: CropSpec, cells, scale_by, illumination, seed, cache
) -> PlatePlan:
    from cellvim.data.cell_sources import open_cells
    from cellvim.data.intensity_rules import choose_intensity_scale

    plate = look.plate
    fields, lost, chosen = fields_of(plate, look.wells)
    ids = _channel_ids(encoder, look.meanings, model_name)
    order = np.argsort(ids).tolist()  # as in training, and so that the plate's order of channels does not matter
    channels, meanings, ids = ([values[i] for i in order] for values in (look.channels, look.meanings, ids))
    light = _illumination(plate, channels, name, seed, cache) if illumination else None
    options: dict[str, Any] = {"seed": seed}
    if light is not None:
        options["illumination"] = light
    scale = choose_intensity_scale(
        plate,
        channels,
        scale_by=scale_by,
        learned=getattr(encoder, "card", {}).get("intensity"),
        meanings=[encoder.config.channel_names[i] for i in ids],
        model_name=model_name,
        cache=None if cache is None else Path(cache) / f"{_file_name(name)}.json",
        **options,
    )
    source = open_cells(cells, plate, dna=look.dna) if cutting.unit == "cell" else None
    return PlatePlan(
        source=look.source,
        view=look.view,
        wells=look.wells,
        name=name,
        path=look.path,
        n_fields=len(fields),
        field_digest=field_digest(fields),
        lost_wells=lost,
        chosen_wells=chosen,
        channels=channels,
        meanings=meanings,
        channel_ids=ids,
        dna=look.dna,
        cutting=cutting,
        crop_px=None if cutting.unit == "field" else cutting.pixels(look.pixel_size_um)[1],
        pixel_size_um=look.pixel_size_um,
        cells_from=str(cells) if cutting.unit == "cell" else None,
        cells_name="not used" if source is None else source.name,
        cell_notes="" if source is None else "; ".join(dict.fromkeys(source.notes)),
        scale=scale,
        illumination=light,
        _opened=(plate, fields, source),
    )


def _illumination(plate: Plate, channels: list[str], name: str, seed: int, cache: str | Path | None) -> Illumination:
    """Return the light's shape, read from the cache when the same was estimated before."""
    from cellvim.data.illumination import Illumination, estimate_illumination
    from cellvim.data.normalize import _identity

    if cache is None:
        return estimate_illumination(plate, channels, seed=seed)
    key = _identity(plate, channels, {"illumination": True, "seed": seed})
    stored = Path(cache) / f"{_file_name(name)}.{key[:12]}.illumination.npz"
    if stored.exists():
        with suppress(InputError):
            return Illumination.load(stored)
    found = estimate_illumination(plate, channels, seed=seed)
    stored.parent.mkdir(parents=True, exist_ok=True)
    found.save(stored)
    return found


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


def _check_choices(unit, crop_size, batch_size, scale_by, precision, tokens) -> None:
    if unit not in UNITS:
        raise InputError(f"The unit '{unit}' is not known; expected {listing(UNITS)}.{suggestion(unit, UNITS)}")
    _check_size(unit, crop_size)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"The batch size is {batch_size}; expected at least 1.")
    if scale_by not in SCALE_BY:
        raise InputError(f"Intensities can be scaled by {listing(SCALE_BY)}, not by '{scale_by}'.")
    if precision not in PRECISIONS:
        raise InputError(f"The precision '{precision}' is not known; expected {listing(PRECISIONS)}.")
    if tokens and unit != "field":
        raise InputError(f"Maps of tokens are of whole fields: --tokens needs --unit field, not {unit}.")


def _check_size(unit: str, crop_size: int | None) -> None:
    if unit == "field" and crop_size is not None:
        raise InputError("A crop size goes with the units cell and tile; a field is embedded whole.")
    if crop_size is not None and crop_size < 8:
        raise InputError(f"The crop size is {crop_size} pixels; expected at least 8.")


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


def _unique_names(looks: list[_Look]) -> list[str]:
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


def _all_meanings(looks: list[_Look]) -> list[str]:
    """Return what the channels of all plates show, each once."""
    found: dict[str, str] = {}
    for look in looks:
        for meaning in look.meanings:
            found.setdefault(canonical_name(meaning) or meaning, meaning)
    return looks[0].meanings if len(looks) == 1 else list(found.values())


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


def nuclear_channel(plate: Plate, names: list[str], meanings: list[str]) -> str:
    """Return the channel to find nuclei in: of those chosen by what they mean, else any of the plate."""
    for available, chosen in ((meanings, names), (plate.channel_names, plate.channel_names)):
        if sum(canonical_name(name) == "DNA" for name in available) == 1:
            return chosen[find_dna_channel(available, where=Path(plate.path).name)]
    return plate.channel_names[find_dna_channel(plate.channel_names, where=Path(plate.path).name)]


def usable_device(device: str) -> str:
    """Return the device that is meant.

    Raises
    ------
    InputError
        It is not known, or not there.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise InputError(f"The device '{device}' is not known; expected auto, cpu, cuda, cuda:1, mps or xpu.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        reason = reason if len(reason) < 160 else f"this PyTorch does not run on {kind} here"
        raise InputError(f"The device '{device}' cannot be used ({reason}). Leave --device out, or use cpu.") from error
    return device


def _precision(precision: str, device: str) -> str:
    if precision != "auto":
        return precision
    import torch

    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def _encoder(
    model: str | Path | Encoder, channels: list[str], *, image_size: int | tuple[int, int], seed: int
) -> tuple[Encoder, str]:
    """Return the encoder and what to call it: given, loaded from a file, or made by name with random weights."""
    if not isinstance(model, str | Path):
        return model, "the given model"
    path = Path(model)
    if path.exists() or path.suffix in (".safetensors", ".pth", ".ckpt"):
        from cellvim.models.weights import load_checkpoint

        return load_checkpoint(path), path.name
    import torch

    from cellvim.models.shipped import shipped_models

    if str(model) in shipped_models():
        from cellvim.models.weights import load_checkpoint

        return load_checkpoint(shipped_models()[str(model)]), str(model)

    from cellvim.models.registry import create_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changes = {"in_channels": len(channels), "channel_names": tuple(channels), "image_size": image_size}
        return create_model(str(model), **changes, num_classes=0), str(model)


def _untrained_size(unit: Unit, look: _Look, um_per_px: float | None) -> int | tuple[int, int]:
    """Return the size to build a model for that has no training to agree with: the unit's own, nothing is resized."""
    pixel = um_per_px or look.pixel_size_um
    if unit == "field" and look.first_shape is not None:
        factor = 1.0 if um_per_px is None else look.pixel_size_um / um_per_px
        return tuple(max(1, round(n * factor)) for n in look.first_shape)
    if look.crop_px is not None:
        return look.crop_px
    if unit == "tile":
        return TILE_PX
    return CELL_PX if pixel is None else max(16, 16 * round(CELL_UM / pixel / 16))


def _channel_ids(encoder: Encoder, meanings: list[str], model_name: str) -> list[int]:
    """Return the model's numbers for the channels, matched by name."""
    config = encoder.config
    if config.readout == "tokens":
        raise ModelError(f"{model_name} gives every token (readout='tokens'); an embedding needs one row a unit.")
    if config.channel_names is None:
        raise ModelError(
            f"{model_name} does not say what its {config.in_channels} channels are, so they cannot be matched by name. "
            "Save it with channel_names in its configuration."
        )
    ids = match_channels(meanings, list(config.channel_names), where=model_name)
    if config.tokens == "joint" and sorted(ids) != list(range(config.in_channels)):
        raise ModelError(
            f"{model_name} needs all of its channels ({listing(config.channel_names)}); the plate gives "
            f"{listing(meanings)}. A model with per-channel tokens takes any of them."
        )
    return ids


def _class_names(encoder: Encoder, model_name: str) -> tuple[str, ...]:
    """Return the names of the classes that the model learned."""
    count = encoder.config.num_classes
    if not count or not encoder.is_trained:
        raise ModelError(f"{model_name} learned no classes, so --probabilities has none. Train one: `cellvim train`.")
    names = tuple(map(str, getattr(encoder, "card", {}).get("class_names", ())))
    return names if len(names) == count else tuple(f"class {i}" for i in range(count))


def _unlike_training(
    encoder: Encoder, model_name: str, plans: Sequence[PlatePlan], unit: str, input_px: int | None
) -> Iterator[str]:
    """Yield what is otherwise than in the model's training and changes what it sees, a sentence each."""
    card = getattr(encoder, "card", {})
    if card.get("unit", unit) != unit:
        yield f"{model_name} learned from crops of the unit {card['unit']}; this embeds by {unit}."
    learned = card.get("pixel_size_um")
    for plan in plans:
        pixel = plan.cutting.um_per_px or plan.pixel_size_um
        if not learned or pixel is None:
            continue
        seen = pixel if plan.crop_px is None else pixel * plan.crop_px / input_px
        if not 0.8 < seen / learned < 1.25:
            yield (
                f"{model_name} learned from pixels of {learned:.3g} µm and sees pixels of {seen:.3g} µm of "
                f"{plan.name}. --um-per-px {learned:.3g} makes them alike."
            )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
