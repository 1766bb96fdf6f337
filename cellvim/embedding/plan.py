"""Planning: the options are validated and resolved into a plan before any field is embedded.

`inspect_plates` opens the plates and selects fields and channels, `plan_plates` resolves channels, crops, intensities
and cells; neither needs a model, and training uses both. `plan_embedding` adds the model. A plan describes how each
field becomes rows. It does not depend on who embeds a field, in which order or on which machine. What determines the
rows is the plan's ``identity``, by which an unfinished run is recognised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from dataclasses import field as default
from functools import cached_property
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.channels import canonical_name, find_dna_channel, match_channels, parse_channel_overrides
from cellvim.data.cells import CellSource, open_cells
from cellvim.data.crops import CropSpec
from cellvim.data.intensity import IntensityScale, cache_key, choose_intensity_scale
from cellvim.data.plate import Field, Plate, open_plate
from cellvim.data.wells import canonical_well
from cellvim.embedding.options import (
    Channels,
    EmbeddingOptions,
    PlateOptions,
    Plates,
    Unit,
    check_crop_size,
    with_options,
)
from cellvim.errors import FieldReadError, InputError, ModelError, OutputError, PlateError, listing

if TYPE_CHECKING:
    from cellvim.data.illumination import Illumination
    from cellvim.embedding.ledger import Key
    from cellvim.models.encoder import Encoder

SEGMENTED = ("nuclei", "cells", "cellpose")  # sources of cells that require a nuclear channel
CELL_UM = 40.0  # default crop around a cell if the pixel size is known
CELL_PX = 64  # and if it is unknown
TILE_PX = 224
VERSIONS = ("cellvim", "numpy", "scipy", "scikit-image", "torch")  # packages that the rows are computed with


@dataclass
class PlateSummary:
    """The selected fields and channels of a plate. Opens the plate on demand, and can close it again.

    Attributes
    ----------
    source
        Path of the plate, or the plate if it was given opened.
    view
        Arguments of `open_plate` for a path: plane, time point and resolution level.
    wells
        Selected wells; None for all.
    name, path
        Name, unique among the plates of a run, and path.
    n_fields, field_digest
        Number of selected fields, and a hash of their names.
    lost_wells, chosen_wells
        Selected wells without and with fields.
    channels, meanings
        The plate's names of the selected channels, and the names by which a model's channels are matched.
    dna
        Channel in which nuclei are found; None if cells are not segmented.
    crop_px
        Side of a crop in pixels of the plate, or of the resampled field; None for the default or an entire field.
    pixel_size_um
        Pixel size in µm; None if unknown.
    field_shape
        (H, W) of the first readable field.
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
    dna: str | None
    crop_px: int | None
    pixel_size_um: float | None
    field_shape: tuple[int, int] | None
    _opened: tuple[Plate, list[Field]] | None = default(default=None, repr=False, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def plate(self) -> Plate:
        """The opened plate."""
        return self._open()[0]

    @property
    def fields(self) -> list[Field]:
        """The selected fields, in the order of the rows."""
        return self._open()[1]

    @property
    def extra_channels(self) -> list[str]:
        """The nuclear channel, if it has to be read in addition to the selected channels."""
        return [self.dna] if self.dna is not None and self.dna not in self.channels else []

    def close(self) -> None:
        """Close the plate."""
        self._opened = None

    def _open(self) -> tuple[Plate, list[Field]]:
        if self._opened is None:
            plate = open_plate(self.source, **self.view) if isinstance(self.source, str) else self.source
            selected, _, _ = _select_fields(plate, self.wells)
            if _digest(selected) != self.field_digest:
                raise PlateError(f"The fields of {self.path} have changed since the run was planned. Run it again.")
            self._opened = (plate, selected)
        return self._opened


@dataclass
class PlatePlan(PlateSummary):
    """How the fields of one plate are cropped and scaled.

    Attributes
    ----------
    channel_ids
        Numbers of the channels in the model; the channels are in this order.
    cutting
        Unit and size of the crops.
    cells_from, cells_name, cell_notes
        Source of the cells as in `PlateOptions.cells`, its description, and remarks about it.
    scale, illumination
        Intensity scale, and correction of uneven illumination.
    """

    channel_ids: list[int]
    cutting: CropSpec
    cells_from: str | None
    cells_name: str
    cell_notes: str
    scale: IntensityScale
    illumination: Illumination | None
    _cells: CellSource | None = default(default=None, repr=False, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cells": None}

    @property
    def cells(self) -> CellSource | None:
        """Source of the cells; None for other units."""
        if self._cells is None and self.cells_from is not None:
            self._cells = open_cells(self.cells_from, self.plate, dna=self.dna)
        return self._cells

    def close(self) -> None:
        """Close the plate and the source of its cells."""
        self._opened = self._cells = None

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about this plate that determines the rows."""
        return {
            "name": self.name,
            "fields": {"count": self.n_fields, "sha256": self.field_digest},
            "channels": dict(zip(self.channels, self.meanings, strict=True)),
            "model_ids": self.channel_ids,
            "nuclei": self.dna,
            "cells": self.cells_name,
            "crop_px": self.crop_px,
            "pixel_size_um": self.pixel_size_um,
            "view": self.view,
            "intensities": {k: v for k, v in self.scale.to_dict().items() if k != "sampling"},
            "illumination": None if self.illumination is None else self.illumination.digest,
        }


@dataclass(frozen=True)
class EmbeddingPlan:
    """Everything that determines the rows of an embedding. Made by `plan_embedding`.

    Attributes
    ----------
    plates
        Plan of each plate.
    options
        Record of the options that affect the rows, see `EmbeddingOptions.record`.
    unit, seed, per_channel, tokens
        As in `EmbeddingOptions`.
    model, model_name, trained
        Encoder on the device, its name, and whether its weights are trained.
    input_px
        Side of the model's input; None if fields are embedded at their own resolution.
    batch_size
        Number of crops per batch; None if it is chosen when the run starts, see `cellvim.embedding.encode`.
    device, precision
        Device, and float32 or bfloat16.
    class_names
        Names of the classes whose probabilities are returned.
    notes
        Remarks for the user.
    """

    plates: tuple[PlatePlan, ...]
    options: Mapping[str, Any]
    unit: Unit
    model: Encoder
    model_name: str
    trained: bool
    input_px: int | None
    batch_size: int | None
    device: str
    precision: str
    seed: int
    per_channel: bool = False
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tokens: bool = False

    @property
    def n_fields(self) -> int:
        """Number of fields of all plates."""
        return sum(plate.n_fields for plate in self.plates)

    @property
    def n_features(self) -> int:
        """Width of an embedding, D."""
        return self.model.config.embed_dim

    def all_keys(self, stretch: range | None = None) -> Iterator[Key]:
        """Yield (index of the plate, index of the field) of all fields, or of a range of them."""
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

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the names, types, shapes and values of the weights."""
        digest = sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.endswith("_extra_state"):  # of the channel sampling in training, not a weight
                continue
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that the rows are computed with, without local labels such as ``+cu124``."""
        return {name: _version(name).partition("+")[0] for name in VERSIONS}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the rows, as plain values; an unfinished run resumes only if it is the same."""
        kind = self.device.split(":")[0]
        return {
            "model": self.model_name,
            "configuration": self.model.config.to_dict(),
            "weights": self.weights_sha256,
            "trained": self.trained,
            "input_px": self.input_px,
            "options": self.options,
            "classes": list(self.class_names),
            "device": kind,
            # GPU libraries choose kernels by the batch size, which affects the last digits.
            "batch_size": "any" if kind == "cpu" else self.batch_size,
            "versions": self.versions,
            "plates": {f"{i:05d}": plate.identity for i, plate in enumerate(self.plates)},
        }


@with_options(EmbeddingOptions)
def plan_embedding(plate: Plates, *, cache: str | Path | None = None, **options: Any) -> EmbeddingPlan:
    """Validate the options and plan an embedding.

    Parameters
    ----------
    plate
        An OME-Zarr plate or a list of plates, as in `cellvim.embed`.
    cache
        Folder in which estimates from the plates, such as intensity scales, are kept.
    **options
        See `EmbeddingOptions`.

    Returns
    -------
    EmbeddingPlan
        To be executed by `run_embedding`.

    Raises
    ------
    CellvimError
        An option, plate or model cannot be used.
    """
    return make_plan(plate, EmbeddingOptions(**options), cache=cache)


def make_plan(plates: Plates, options: EmbeddingOptions, *, cache: str | Path | None = None) -> EmbeddingPlan:
    """Plan an embedding, see `plan_embedding`."""
    device = usable_device(options.device)
    summaries = inspect_plates(plates, options)
    size = default_input_size(summaries[0], options)
    encoder, model_name = _choose_encoder(options.model, all_meanings(summaries), image_size=size, seed=options.seed)
    _check_encoder(encoder, model_name, options)
    class_names = _class_names(encoder, model_name) if options.probabilities else ()
    input_px = None if options.unit == "field" else encoder.config.image_height
    config = encoder.config
    plans = plan_plates(
        summaries,
        options,
        channel_names=config.channel_names,
        all_channels=config.tokens == "joint",
        default_crop_px=input_px,
        learned_intensity=getattr(encoder, "card", {}).get("intensity"),
        model_name=model_name,
        cache=cache,
    )
    precision = options.precision
    if precision == "auto":
        import torch

        supports_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if supports_bfloat16 else "float32"
    return EmbeddingPlan(
        plates=tuple(plans),
        options={**options.record(), "model": model_name, "precision": precision},
        unit=options.unit,
        model=encoder.to(device).eval(),
        model_name=model_name,
        trained=bool(encoder.is_trained),
        input_px=input_px,
        batch_size=1 if options.unit == "field" else options.batch_size,
        device=device,
        precision=precision,
        seed=options.seed,
        per_channel=options.per_channel,
        class_names=class_names,
        notes=tuple(_differences_to_training(encoder, model_name, plans, options.unit, input_px)),
        tokens=options.tokens,
    )


def inspect_plates(plates: Plates, options: PlateOptions) -> list[PlateSummary]:
    """Open plates and select their fields and channels. If there are several, they are closed again.

    Parameters
    ----------
    plates
        Path, URL or opened plate, or a list of these.
    options
        ``unit``, ``channels``, ``wells``, ``cells``, the crop size and the view are used.

    Returns
    -------
    list of PlateSummary
        One per plate. Their names are unique.

    Raises
    ------
    InputError
        There is no plate, a plate lacks a well or channel, a crop does not fit, or two plates have the same name.
    PlateError
        A plate cannot be opened.
    """
    sources = list(plates) if isinstance(plates, list | tuple) else [plates]
    if not sources:
        raise InputError("No plate was given; expected the path of at least one.")
    summaries = []
    for source in sources:
        summaries.append(_inspect_plate(source, options))
        if len(sources) > 1:
            summaries[-1].close()
    _make_names_unique(summaries)
    return summaries


def plan_plates(
    plates: Plates | Sequence[PlateSummary],
    options: PlateOptions,
    *,
    channel_names: Sequence[str] | None = None,
    all_channels: bool = False,
    default_crop_px: int | None = None,
    learned_intensity: Mapping[str, Any] | None = None,
    model_name: str = "the model",
    cache: str | Path | None = None,
) -> list[PlatePlan]:
    """Resolve the channels, crops, intensities and cells of plates. Does not require a model.

    Parameters
    ----------
    plates
        Plates as in `inspect_plates`, or the summaries that it returned.
    options
        Options of `PlateOptions`, or of a subclass.
    channel_names
        Channels of the model, which the plates' channels are matched with and sorted by. By default those of all
        plates, in the order of their first appearance (`all_meanings`), as for a model that is yet to be trained.
    all_channels
        Whether each plate must have all channels of the model.
    default_crop_px
        Side of a crop in pixels if the options contain no crop size; by default that of an untrained model, see
        `default_input_size`.
    learned_intensity
        Intensity scaling of the model's training, for ``scale_by`` "auto" and "model", see `choose_intensity_scale`.
    model_name
        Name of the model for messages.
    cache
        Folder in which intensity scales and illumination are kept.

    Returns
    -------
    list of PlatePlan
        One per plate: opened if there is one plate, otherwise closed. They open on demand.

    Raises
    ------
    InputError
        A plate does not fit the options or the model's channels.
    OutputError
        The cache cannot be written.
    """
    given = list(plates) if isinstance(plates, list | tuple) else [plates]
    are_inspected = bool(given) and all(isinstance(plate, PlateSummary) for plate in given)
    summaries = given if are_inspected else inspect_plates(plates, options)
    if channel_names is None:
        channel_names = all_meanings(summaries)
    if default_crop_px is None and options.unit != "field":
        default_crop_px = default_input_size(summaries[0], options)
    cutting = _crop_spec(options, default_crop_px)
    plans = []
    for summary in summaries:
        ids = match_channels(summary.meanings, list(channel_names), where=model_name)
        if all_channels and sorted(ids) != list(range(len(channel_names))):
            raise ModelError(
                f"{model_name} requires all of its channels ({listing(channel_names)}); the plate has "
                f"{listing(summary.meanings)}. A model with per-channel tokens accepts a subset."
            )
        order = np.argsort(ids).tolist()  # the model's order, so that the plate's order does not matter
        summary = replace(
            summary,
            channels=[summary.channels[i] for i in order],
            meanings=[summary.meanings[i] for i in order],
        )
        learned_names = [channel_names[ids[i]] for i in order]
        try:
            light = _illumination(summary, options.seed, cache) if options.illumination else None
            scale = choose_intensity_scale(
                summary.plate,
                summary.channels,
                scale_by=options.scale_by,
                learned=learned_intensity,
                meanings=learned_names,
                model_name=model_name,
                cache=None if cache is None else Path(cache) / f"{_file_name(summary.name)}.json",
                seed=options.seed,
                **({} if light is None else {"illumination": light}),
            )
        except OSError as error:
            if cache is None:
                raise
            raise OutputError(f"{cache} cannot be written: {error.strerror or error}.") from error
        source = open_cells(options.cells, summary.plate, dna=summary.dna) if options.unit == "cell" else None
        values = {each.name: getattr(summary, each.name) for each in fields(summary)}
        values["crop_px"] = None if options.unit == "field" else cutting.pixels(summary.pixel_size_um)[1]
        plans.append(
            PlatePlan(
                **values,
                channel_ids=[ids[i] for i in order],
                cutting=cutting,
                cells_from=str(options.cells) if options.unit == "cell" else None,
                cells_name="not used" if source is None else source.name,
                cell_notes="" if source is None else "; ".join(dict.fromkeys(source.notes)),
                scale=scale,
                illumination=light,
                _cells=source,
            )
        )
        if len(summaries) > 1:
            plans[-1].close()
            summary.close()
    return plans


def all_meanings(summaries: Sequence[PlateSummary]) -> list[str]:
    """Return the channels of all plates, each once, in the order of their first appearance."""
    found: dict[str, str] = {}
    for summary in summaries:
        for meaning in summary.meanings:
            found.setdefault(canonical_name(meaning) or meaning, meaning)
    return summaries[0].meanings if len(summaries) == 1 else list(found.values())


def default_input_size(summary: PlateSummary, options: PlateOptions) -> int | tuple[int, int]:
    """Return the input size of an untrained model: the size of a crop, or (H, W) of a field, so nothing is resized."""
    if options.unit == "field" and summary.field_shape is not None:
        factor = 1.0 if options.um_per_px is None else summary.pixel_size_um / options.um_per_px
        return tuple(max(1, round(n * factor)) for n in summary.field_shape)
    if summary.crop_px is not None:
        return summary.crop_px
    if options.unit == "tile":
        return TILE_PX
    pixel = options.um_per_px or summary.pixel_size_um
    return CELL_PX if pixel is None else max(16, 16 * round(CELL_UM / pixel / 16))


def usable_device(device: str) -> str:
    """Return the name of the device to use; "auto" is resolved.

    Raises
    ------
    InputError
        The device is unknown or not available.
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
    except (RuntimeError, AssertionError) as error:  # which of the two depends on the device
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        reason = reason if len(reason) < 160 else f"this PyTorch does not support {kind} here"
        raise InputError(f"The device '{device}' cannot be used ({reason}). Leave --device out, or use cpu.") from error
    return device


def _inspect_plate(source: str | Path | Plate, options: PlateOptions) -> PlateSummary:
    is_open = isinstance(source, Plate)
    plate = source if is_open else open_plate(source, **options.view)
    selected, lost, chosen = _select_fields(plate, options.wells)
    channels, meanings = _select_channels(plate, options.channels)
    crop_px = _requested_crop_px(options, plate.pixel_size_um)
    shape = next(_readable_shapes(selected), None)
    if crop_px is not None and shape is not None:
        factor = 1.0 if options.um_per_px is None else plate.pixel_size_um / options.um_per_px
        height, width = (max(1, round(n * factor)) for n in shape)
        if crop_px > max(height, width):
            raise InputError(
                f"The crop is {crop_px} pixels, but the fields are {height} x {width}; expected at most "
                f"{max(height, width)}. Choose a smaller crop size."
            )
    needs_dna = options.unit == "cell" and options.cells in SEGMENTED
    return PlateSummary(
        source=plate if is_open else str(source),
        view={} if is_open else options.view,
        wells=None if options.wells is None else [canonical_well(well) for well in options.wells],
        name=plate.name,
        path=plate.path,
        n_fields=len(selected),
        field_digest=_digest(selected),
        lost_wells=lost,
        chosen_wells=chosen,
        channels=channels,
        meanings=meanings,
        dna=_nuclear_channel(plate, channels, meanings) if needs_dna else None,
        crop_px=crop_px,
        pixel_size_um=plate.pixel_size_um,
        field_shape=shape,
        _opened=(plate, selected),
    )


def _select_fields(plate: Plate, wells: Sequence[str] | None) -> tuple[list[Field], list[str], list[str]]:
    """Return the fields of the wells, the wells without fields and those with fields."""
    wanted = plate.wells if wells is None else [canonical_well(well) for well in wells]
    unknown = [well for well in wanted if well not in plate.wells]
    if unknown:
        raise InputError(f"{Path(plate.path).name} has no well {listing(unknown)}; it has {listing(plate.wells)}.")
    selected = [field for field in plate.fields if field.well in set(wanted)]
    present = {field.well for field in selected}
    return selected, [w for w in plate.wells if w in set(wanted) - present], sorted(present)


def _select_channels(plate: Plate, channels: Channels) -> tuple[list[str], list[str]]:
    """Return the plate's names of the channels, and their names for matching with a model."""
    if channels is None:
        return list(plate.channel_names), list(plate.channel_names)
    if isinstance(channels, Mapping):
        channels = [f"{meaning}={name}" for meaning, name in channels.items()]
    pairs = parse_channel_overrides(channels if isinstance(channels, str) else ",".join(channels))
    ids = match_channels([name for _, name in pairs], plate.channel_names, where=Path(plate.path).name)
    names = [plate.channel_names[i] for i in ids]
    return names, [meaning or name for (meaning, _), name in zip(pairs, names, strict=True)]


def _requested_crop_px(options: PlateOptions, pixel_size_um: float | None) -> int | None:
    """Return the side of a crop in pixels of the plate, or of the resampled field, if the options determine it."""
    if options.crop_um is None and options.um_per_px is None:
        return options.crop_size
    has_size = options.crop_um is not None or options.crop_size is not None
    size = {"size_px": options.crop_size} if options.crop_um is None else {"size_um": options.crop_um}
    spec = CropSpec(options.unit if has_size else "field", **size, um_per_px=options.um_per_px)
    _, crop_px = spec.pixels(pixel_size_um)
    check_crop_size(options.unit, crop_px)
    return crop_px


def _readable_shapes(selected: Iterable[Field]) -> Iterator[tuple[int, int]]:
    for field in selected:
        with suppress(FieldReadError):
            yield field.shape[1:]


def _nuclear_channel(plate: Plate, names: list[str], meanings: list[str]) -> str:
    """Return the channel in which nuclei are found: a selected one if possible, otherwise any of the plate."""
    where = Path(plate.path).name
    if sum(canonical_name(name) == "DNA" for name in meanings) == 1:
        return names[find_dna_channel(meanings, where=where)]
    return plate.channel_names[find_dna_channel(plate.channel_names, where=where)]


def _make_names_unique(summaries: Sequence[PlateSummary]) -> None:
    """Prefix the names of plates that have the same name with the folder in which each is stored."""
    names = [summary.name for summary in summaries]
    for summary in summaries:
        parts = summary.path.rstrip("/").replace("\\", "/").split("/")
        if names.count(summary.name) > 1 and len(parts) > 1:
            summary.name = f"{parts[-2]}_{summary.name}"
    names = [summary.name for summary in summaries]
    for name in names:
        if names.count(name) > 1:
            paths = [summary.path for summary in summaries if summary.name == name]
            raise InputError(
                f"Several plates are named {name}, so their rows could not be distinguished: {listing(paths)}."
            )


def _crop_spec(options: PlateOptions, default_crop_px: int | None) -> CropSpec:
    if options.unit == "field":
        return CropSpec(options.unit, um_per_px=options.um_per_px)
    return CropSpec(
        options.unit,
        size_px=None if options.crop_um is not None else options.crop_size or default_crop_px,
        size_um=options.crop_um,
        overlap=options.overlap,
        border=options.border,
        mask_neighbours=options.mask_neighbours,
        um_per_px=options.um_per_px,
    )


def _illumination(summary: PlateSummary, seed: int, cache: str | Path | None) -> Illumination:
    """Return the illumination of a plate, from the cache if it was estimated before."""
    from cellvim.data.illumination import Illumination, estimate_illumination

    plate, channels = summary.plate, summary.channels
    if cache is None:
        return estimate_illumination(plate, channels, seed=seed)
    key = cache_key(plate, channels, {"illumination": True, "seed": seed})
    stored = Path(cache) / f"{_file_name(summary.name)}.{key[:12]}.illumination.npz"
    if stored.exists():
        with suppress(InputError):
            return Illumination.load(stored)
    found = estimate_illumination(plate, channels, seed=seed)
    stored.parent.mkdir(parents=True, exist_ok=True)
    found.save(stored)
    return found


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _choose_encoder(
    model: str | Path | Encoder, channels: list[str], *, image_size: int | tuple[int, int], seed: int
) -> tuple[Encoder, str]:
    """Return the encoder and its name: the given one, one from a file, or one created by name."""
    from cellvim.models.checkpoints import shipped_models
    from cellvim.models.registry import create_model, load_checkpoint

    if not isinstance(model, str | Path):
        return model, "the given model"
    path = Path(model)
    if path.exists() or path.suffix in (".safetensors", ".pth", ".ckpt"):
        return load_checkpoint(path), path.name
    name = str(model)
    if name in shipped_models():
        return create_model(name), name
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changes = {"in_channels": len(channels), "channel_names": tuple(channels), "image_size": image_size}
        return create_model(name, **changes, num_classes=0), name


def _check_encoder(encoder: Encoder, model_name: str, options: EmbeddingOptions) -> None:
    config = encoder.config
    if options.unit != "field" and config.image_height != config.image_width:
        raise ModelError(
            f"The input of {model_name} is {config.image_height} x {config.image_width} pixels, but a {options.unit} "
            "is square. Use --unit field or another model."
        )
    if options.per_channel and config.tokens != "per_channel":
        raise ModelError(f"{model_name} has joint tokens; --per-channel requires a model with per-channel tokens.")
    if config.readout == "tokens":
        raise ModelError(f"{model_name} returns all tokens (readout='tokens'); an embedding requires one row per unit.")
    if config.channel_names is None:
        raise ModelError(
            f"{model_name} does not name its {config.in_channels} channels, so they cannot be matched by name. Save it "
            "with channel_names in its configuration."
        )


def _class_names(encoder: Encoder, model_name: str) -> tuple[str, ...]:
    """Return the names of the classes that the model was trained on."""
    count = encoder.config.num_classes
    if not count or not encoder.is_trained:
        raise ModelError(
            f"{model_name} was not trained on classes, which --probabilities requires. Train one: `cellvim train`."
        )
    names = tuple(map(str, getattr(encoder, "card", {}).get("class_names", ())))
    return names if len(names) == count else tuple(f"class {i}" for i in range(count))


def _differences_to_training(
    encoder: Encoder, model_name: str, plans: Sequence[PlatePlan], unit: str, input_px: int | None
) -> Iterator[str]:
    """Yield a sentence for each property of the crops that differs from the model's training."""
    card = getattr(encoder, "card", {})
    if card.get("unit", unit) != unit:
        yield f"{model_name} was trained on crops of the unit {card['unit']}; the unit of this run is {unit}."
    learned = card.get("pixel_size_um")
    for plan in plans:
        pixel = plan.cutting.um_per_px or plan.pixel_size_um
        if not learned or pixel is None:
            continue
        seen = pixel if plan.crop_px is None else pixel * plan.crop_px / input_px
        if not 0.8 < seen / learned < 1.25:
            yield (
                f"{model_name} was trained on pixels of {learned:.3g} µm, but the pixels of {plan.name} are "
                f"{seen:.3g} µm. Resample them with --um-per-px {learned:.3g}."
            )


def _digest(selected: Iterable[Field]) -> str:
    """Return a hash of the names of the fields."""
    return sha256("\0".join(field.name for field in selected).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
