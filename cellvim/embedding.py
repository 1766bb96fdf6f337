"""The main job: embed a plate's cells, tiles or fields into an AnnData.

Reads as it runs: plan → for each field: read, locate the units, cut, embed → append → finish. A field is the unit of
work: its rows depend on the plan and on its own pixels, never on the fields before it.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field as default
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from cellvim.channels import canonical_name, find_dna_channel, match_channels, parse_channel_overrides
from cellvim.errors import ChannelError, FieldReadError, InputError, ModelError, listing, suggestion

if TYPE_CHECKING:
    from anndata import AnnData

    from cellvim.data.cell_sources import CellSource
    from cellvim.data.crops import CropSpec
    from cellvim.data.normalize import IntensityScale
    from cellvim.data.plate import Field, Plate
    from cellvim.models.encoder import Encoder

Unit = Literal["cell", "tile", "field"]
Channels = str | Sequence[str] | Mapping[str, str] | None

UNITS = ("cell", "tile", "field")
DEFAULT_MODEL = "fastchannelvim_tiny_patch16"
_SEGMENTED = ("nuclei", "cells", "cellpose")  # sources of cells that need a channel of nuclei
CELL_UM = 40.0  # a cell with its surroundings, when the plate says how large a pixel is
CELL_PX = 64  # and when it does not
TILE_PX = 224


def embed(
    plate: str | Path | Plate,
    output: str | Path | None = None,
    *,
    model: str | Path | Encoder = DEFAULT_MODEL,
    unit: Unit = "cell",
    channels: Channels = None,
    wells: Sequence[str] | None = None,
    crop_size: int | None = None,
    crop_um: float | None = None,
    overlap: float = 0.0,
    cells: str | Path = "nuclei",
    border: str = "pad",
    mask_neighbours: bool = False,
    scale_by: Literal["all", "controls"] = "all",
    batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> AnnData:
    """Embed a plate and return the AnnData.

    Parameters
    ----------
    plate
        An OME-Zarr plate: its path, or what `open_plate` returned.
    output
        Where to write the AnnData (Zarr). Without it the result is in memory only.
    model
        A name (see `list_models`; its weights are random), the path of a checkpoint, or an `Encoder`.
    unit
        What one row is: a "cell", a "tile" of the field, or the whole "field".
    channels
        Channels to embed, by name: ``["DNA", "ER"]`` or ``"DNA,ER"``; all by default. Where the plate's name does not
        say what a channel shows, say it: ``{"DNA": "ch5", "ER": "ch4"}`` or ``"DNA=ch5,ER=ch4"``.
    wells
        Wells to embed, such as ``["A01", "B07"]``; all by default.
    crop_size
        Side in plate pixels of a cell's crop or of a tile. By default what the model was trained on, or, for a model
        without training, 40 µm around a cell (64 pixels when the pixel size is unknown) and 224 pixels for a tile.
    crop_um
        That side in µm instead. Plates of different pixel sizes are then resampled to one.
    overlap
        Of neighbouring tiles, as a share of their side.
    cells
        Where cells come from: "nuclei" or "cells" to segment them, "cellpose", "labels:NAME" of the plate, the path of
        a table of positions or of a folder of masks; see `cellvim.data.cell_sources.open_cells`.
    border
        What becomes of a cell whose crop reaches beyond the field: "pad" with 0, "reflect", "shift" or "drop".
    mask_neighbours
        Set what belongs to other cells to 0.
    scale_by
        Intensities are scaled by the percentiles of "all" wells, or of the negative "controls" of the plate map.
    batch_size
        Crops embedded at once.
    device
        "auto", "cpu", "cuda", "cuda:1", "mps".
    seed
        Of random weights and of the pixels that the intensity scale is estimated on.
    overwrite
        Replace ``output`` when it exists.

    Returns
    -------
    AnnData
        ``X`` (n, D) float32; ``obs`` with plate, well, site, object number, the plate map's columns and measurements;
        ``obsm["spatial"]`` (x, y) within the field; ``uns["cellvim"]`` with all that is needed to repeat the run.

    Warns
    -----
    UserWarning
        The weights are not trained, a field could not be read, or nothing was found.

    Raises
    ------
    CellvimError
        Something given cannot be used; the message says what, and what to do.
    """
    import anndata

    from cellvim.export import check_output

    if output is not None:
        check_output(Path(output), overwrite=overwrite)
    plan = plan_embedding(
        plate,
        model=model,
        unit=unit,
        channels=channels,
        wells=wells,
        crop_size=crop_size,
        crop_um=crop_um,
        overlap=overlap,
        cells=cells,
        border=border,
        mask_neighbours=mask_neighbours,
        scale_by=scale_by,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(output) if output is not None else Path(temporary) / "embeddings.zarr"
        summary = run_embedding(plan, target, overwrite=overwrite)
        for remark in summary.remarks():
            warnings.warn(remark, stacklevel=2)
        return anndata.read_zarr(target)


@dataclass(frozen=True)
class EmbeddingPlan:
    """Everything that decides what the rows will be. Made by `plan_embedding`."""

    plate: Plate
    fields: list[Field]
    lost_wells: list[str]  # that the plate lists, but has no field of
    unit: Unit
    channels: list[str]  # the plate's names, in the model's order
    meanings: list[str]  # what each is called towards the model: the plate's name unless the user said otherwise
    channel_ids: list[int]  # the model's numbers for them
    dna: str | None  # the channel that nuclei are found in
    model: Encoder
    model_name: str
    trained: bool
    cutting: CropSpec  # the same as the next, with what to do at borders and with neighbours
    cells: CellSource | None  # where cells come from; None for other units
    crop_px: int | None  # side of a crop on the plate; None: the whole field
    input_px: int | None  # side of a crop as the model sees it; None: the field at its own resolution
    scale: IntensityScale
    batch_size: int
    device: str
    seed: int

    @property
    def read_channels(self) -> list[str]:
        """Channels to read: those to embed and then, if it is none of them, the one that nuclei are found in."""
        extra = [self.dna] if self.dna is not None and self.dna not in self.channels else []
        return [*self.channels, *extra]

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


@dataclass
class EmbeddingSummary:
    """What a run of `run_embedding` did."""

    output: Path
    unit: Unit
    n_fields: int
    n_units: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str]] = default(default_factory=list)  # name of the field, and why
    untrained: str | None = None  # what to say about the weights

    def __str__(self) -> str:
        rate = self.n_units / self.seconds if self.seconds else 0.0
        counts = ((self.n_units, self.unit), (self.n_fields - len(self.failed), "field"))
        units, fields = (f"{n:,} {name}{'s' * (n != 1)}" for n, name in counts)
        return f"{units} from {fields} in {self.seconds:.1f} s ({rate:,.1f} {self.unit}s/s) → {self.output}"

    def remarks(self) -> list[str]:
        """Return what the user must know about the result, a line each; empty if all is as it should be."""
        lines = [self.untrained] if self.untrained else []
        if self.failed:
            names = listing(name for name, _ in self.failed)
            lines.append(
                f"{len(self.failed)} of {self.n_fields} fields could not be read and are missing from the output: "
                f'{names}. First reason: {self.failed[0][1]} All reasons: uns["cellvim"]["failed_fields"].'
            )
        if self.n_units == 0 and len(self.failed) < self.n_fields:
            lines.append(
                f"No {self.unit} was found in any field, so the output has no rows. Is the right channel named DNA, "
                "and are the images in focus? Try `cellvim info`, or --unit tile."
            )
        return lines


def plan_embedding(
    plate: str | Path | Plate,
    *,
    model: str | Path | Encoder = DEFAULT_MODEL,
    unit: Unit = "cell",
    channels: Channels = None,
    wells: Sequence[str] | None = None,
    crop_size: int | None = None,
    crop_um: float | None = None,
    overlap: float = 0.0,
    cells: str | Path = "nuclei",
    border: str = "pad",
    mask_neighbours: bool = False,
    scale_by: Literal["all", "controls"] = "all",
    batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
) -> EmbeddingPlan:
    """Check everything that was asked for, before any work is done; parameters as in `embed`.

    Raises
    ------
    CellvimError
        Something given cannot be used.
    """
    from cellvim.data.cell_sources import open_cells
    from cellvim.data.crops import CropSpec
    from cellvim.data.normalize import estimate_intensity_scale, reference_wells
    from cellvim.data.plate import open_plate

    _check_choices(unit, crop_size, batch_size)
    if scale_by not in ("all", "controls"):
        raise InputError(f"Intensities can be scaled by all wells or by the controls, not by '{scale_by}'.")
    plate = open_plate(plate) if isinstance(plate, str | Path) else plate
    if crop_um is not None:
        _, crop_size = CropSpec(unit, crop_size, size_um=crop_um).pixels(plate.pixel_size_um)
        _check_choices(unit, crop_size, batch_size)
    fields, lost_wells = _fields_of(plate, wells)
    names, meanings = _plate_channels(plate, channels)
    dna = _nuclear_channel(plate, names, meanings) if unit == "cell" and cells in _SEGMENTED else None
    device = _device(device)
    if crop_size is not None:
        _check_crop_fits(crop_size, fields)
    built_for = _untrained_size(unit, crop_size, plate)
    encoder, model_name = _encoder(model, meanings, image_size=built_for, seed=seed)
    ids = _channel_ids(encoder, meanings, model_name)
    order = np.argsort(ids).tolist()  # as in training, and so that the plate's order of channels does not matter
    names, meanings, ids = ([values[i] for i in order] for values in (names, meanings, ids))
    crop_px = input_px = None
    if unit != "field":
        input_px = encoder.config.image_height
        crop_px = crop_size or input_px
        if encoder.config.image_width != input_px:
            raise ModelError(
                f"{model_name} is built for {input_px} x {encoder.config.image_width} pixels, but a {unit} is square. "
                "Use --unit field or another model."
            )
    cutting = CropSpec(unit, crop_px, overlap=overlap, border=border, mask_neighbours=mask_neighbours)
    return EmbeddingPlan(
        plate=plate,
        fields=fields,
        lost_wells=lost_wells,
        unit=unit,
        channels=names,
        meanings=meanings,
        channel_ids=ids,
        dna=dna,
        model=encoder.to(device).eval(),
        model_name=model_name,
        trained=bool(encoder.is_trained),
        cutting=cutting,
        cells=open_cells(cells, plate, dna=dna) if unit == "cell" else None,
        crop_px=crop_px,
        input_px=input_px,
        scale=estimate_intensity_scale(
            plate, names, wells=reference_wells(plate) if scale_by == "controls" else None, seed=seed
        ),
        batch_size=1 if unit == "field" else batch_size,
        device=device,
        seed=seed,
    )


def run_embedding(
    plan: EmbeddingPlan,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> EmbeddingSummary:
    """Embed field by field and write the AnnData.

    Parameters
    ----------
    plan
        From `plan_embedding`.
    output
        The AnnData store to write; it gets its name only when it is whole.
    overwrite
        Replace ``output`` when it exists.
    progress
        Called at the start and after each field with the fields done, the fields in all and the rows so far.

    Raises
    ------
    OutputError
        The output exists or cannot be written.
    """
    from cellvim.export import AnnDataWriter

    start, started = time.perf_counter(), datetime.now(UTC)
    summary = EmbeddingSummary(Path(output), plan.unit, len(plan.fields), untrained=_untrained_remark(plan))
    for well in plan.lost_wells:
        summary.n_fields += 1
        summary.failed.append((well, f"Well {well} is listed by the plate, but has no field."))
    width = plan.model.config.embed_dim
    with AnnDataWriter(output, _field_table(plan), width, overwrite=overwrite) as writer:
        if progress is not None:
            progress(0, len(plan.fields), 0)
        for index, field in enumerate(plan.fields):
            try:
                embeddings, objects, spatial = embed_field(plan, field)
            except (FieldReadError, ChannelError) as error:  # one bad field never stops a plate
                summary.failed.append((field.name, str(error)))
            else:
                writer.append(index, embeddings, objects, spatial)
                summary.n_units += len(objects)
            if progress is not None:
                progress(index + 1, len(plan.fields), summary.n_units)
        summary.seconds = time.perf_counter() - start
        writer.finish({"cellvim": _provenance(plan, summary, started)})
    return summary


def embed_field(plan: EmbeddingPlan, field: Field) -> tuple[np.ndarray, pd.DataFrame, np.ndarray]:
    """Embed the units of one field.

    Returns
    -------
    embeddings : np.ndarray
        (n, D) float32.
    objects : pd.DataFrame
        (n rows) number and measurements of each unit.
    spatial : np.ndarray
        (n, 2) position (x, y) within the field, in µm, or in pixels where the pixel size is unknown.

    Raises
    ------
    FieldReadError, ChannelError
        The field's pixels cannot be read, or it lacks a channel.
    """
    raw = field.read(plan.read_channels)  # (C, H, W), the DNA channel last where it is not embedded
    objects, centers, labels = _locate(plan, field, raw)  # (n, 2) as (y, x); (H, W) where neighbours are masked
    image = plan.scale.apply(raw[: len(plan.channels)])  # (C, H, W) float32
    embeddings = np.zeros((len(objects), plan.model.config.embed_dim), np.float32)
    for first in range(0, len(objects), plan.batch_size):
        batch = slice(first, first + plan.batch_size)
        numbers = objects["Metadata_ObjectNumber"].to_numpy()[batch]
        embeddings[batch] = _features(plan, _cut(plan, image, centers[batch], labels, numbers))
    return embeddings, objects, centers[:, ::-1] * (field.pixel_size_um or 1.0)


def _locate(plan: EmbeddingPlan, field: Field, raw: np.ndarray) -> tuple[pd.DataFrame, np.ndarray, np.ndarray | None]:
    """Return the units of a field: numbers about each, its centre (y, x) in pixels, and labels to mask others by."""
    from cellvim.data.crops import place_windows, tile_centers

    height, width = raw.shape[1:]
    if plan.cells is not None:
        found = plan.cells.find(field, raw, plan.read_channels)
        _, kept = place_windows(found.centers, plan.crop_px, (height, width), border=plan.cutting.border)
        objects = found.table[kept].reset_index(drop=True).drop(columns=["y_px", "x_px"])
        objects = objects.rename(columns={"object_number": "Metadata_ObjectNumber"})
        return objects, found.centers[kept], found.labels if plan.cutting.mask_neighbours else None
    if plan.unit == "tile":
        stride = max(1, round(plan.crop_px * plan.cutting.stride))
        centers = np.asarray(tile_centers(height, width, plan.crop_px, stride), dtype=np.float64)
    else:
        centers = np.array([[(height - 1) / 2, (width - 1) / 2]])
    return pd.DataFrame({"Metadata_ObjectNumber": np.arange(1, len(centers) + 1)}), centers, None


def _cut(
    plan: EmbeddingPlan, image: np.ndarray, centers: np.ndarray, labels: np.ndarray | None, numbers: np.ndarray
) -> np.ndarray:
    """Return what the model sees of each unit: (n, C, h, w) float32."""
    from cellvim.data.crops import cut_crops, resize_crops

    if plan.crop_px is None:
        return image[None]
    crops = cut_crops(image, centers, plan.crop_px, border=plan.cutting.border, labels=labels, numbers=numbers)
    return resize_crops(crops, plan.input_px)


def _features(plan: EmbeddingPlan, crops: np.ndarray) -> np.ndarray:
    """Return the model's features of up to a batch of crops, (n, C, h, w) -> (n, D)."""
    import torch

    missing = 0 if plan.device == "cpu" else plan.batch_size - len(crops)
    images = torch.from_numpy(np.ascontiguousarray(crops)).to(plan.device)
    if missing:  # a GPU's libraries choose kernels by the batch size; kept constant, a cell's row is always the same
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    with torch.inference_mode():
        return plan.model.forward_features(images, channels=plan.channel_ids)[: len(crops)].float().cpu().numpy()


def _check_choices(unit: str, crop_size: int | None, batch_size: int) -> None:
    if unit not in UNITS:
        raise InputError(f"The unit '{unit}' is not known; expected {listing(UNITS)}.{suggestion(unit, UNITS)}")
    if unit == "field" and crop_size is not None:
        raise InputError("A crop size goes with the units cell and tile; a field is embedded whole.")
    if crop_size is not None and crop_size < 8:
        raise InputError(f"The crop size is {crop_size} pixels; expected at least 8.")
    if batch_size < 1:
        raise InputError(f"The batch size is {batch_size}; expected at least 1.")


def _check_crop_fits(crop_px: int, fields: list[Field]) -> None:
    for field in fields:
        with suppress(FieldReadError):
            longest = max(field.shape[1:])
            if crop_px > longest:
                raise InputError(
                    f"The crop is {crop_px} pixels, but the fields are {field.shape[1]} x {field.shape[2]}; expected "
                    f"at most {longest}. Choose with --crop-size."
                )
            return


def _fields_of(plate: Plate, wells: Sequence[str] | None) -> tuple[list[Field], list[str]]:
    """Return the fields of the wells, and the wells that have none."""
    from cellvim.data.wells import canonical_well

    wanted = plate.wells if wells is None else [canonical_well(well) for well in wells]
    unknown = [well for well in wanted if well not in plate.wells]
    if unknown:
        raise InputError(f"{Path(plate.path).name} has no well {listing(unknown)}; it has {listing(plate.wells)}.")
    fields = [field for field in plate.fields if field.well in wanted]
    present = {field.well for field in fields}
    return fields, [well for well in plate.wells if well in wanted and well not in present]


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


def _nuclear_channel(plate: Plate, names: list[str], meanings: list[str]) -> str:
    """Return the channel to find nuclei in: of those chosen by what they mean, else any of the plate."""
    for available, chosen in ((meanings, names), (plate.channel_names, plate.channel_names)):
        if sum(canonical_name(name) == "DNA" for name in available) == 1:
            return chosen[find_dna_channel(available, where=Path(plate.path).name)]
    return plate.channel_names[find_dna_channel(plate.channel_names, where=Path(plate.path).name)]


def _device(device: str) -> str:
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

    from cellvim.models.registry import create_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changes = {"in_channels": len(channels), "channel_names": tuple(channels), "image_size": image_size}
        return create_model(str(model), **changes, num_classes=0), str(model)


def _untrained_size(unit: Unit, crop_size: int | None, plate: Plate) -> int | tuple[int, int]:
    """Return the size to build a model for that has no training to agree with: the unit's own, nothing is resized."""
    if unit == "field":
        for field in plate.fields:
            with suppress(FieldReadError):
                return field.shape[1:]
    if crop_size is not None:
        return crop_size
    if unit == "tile":
        return TILE_PX
    return CELL_PX if plate.pixel_size_um is None else max(16, 16 * round(CELL_UM / plate.pixel_size_um / 16))


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


def _field_table(plan: EmbeddingPlan) -> pd.DataFrame:
    """Return one row a field: plate, well, site and the plate map's columns."""
    sites = [f.site for f in plan.fields]
    wells = [f.well for f in plan.fields]
    table = pd.DataFrame(
        {
            "Metadata_Plate": plan.plate.name,
            "Metadata_Well": wells,
            "Metadata_Site": [int(s) for s in sites] if all(str(s).isdigit() for s in sites) else sites,
        }
    )
    plate_map = plan.plate.well_metadata.reindex(wells)
    for name in plate_map.columns:
        column = (
            f"Metadata_{name}" if name in _OWN_COLUMNS or name.startswith(("mean_intensity_", "qc_")) else str(name)
        )
        if column not in table:
            table[column] = plate_map[name].to_numpy()
    if "pert_type" in table and "Metadata_pert_type" not in table:
        table["Metadata_pert_type"] = table["pert_type"]
    return table


_OWN_COLUMNS = {"Metadata_ObjectNumber", "area_px", "area_um2", "touches_border"}


def _untrained_remark(plan: EmbeddingPlan) -> str | None:
    if plan.trained:
        return None
    return (
        f"{plan.model_name} has UNTRAINED weights (random, seed {plan.seed}). They show that everything works and are "
        "a baseline to beat; they are no basis for a finding. --model takes the path of a trained checkpoint."
    )


def _provenance(plan: EmbeddingPlan, summary: EmbeddingSummary, started: datetime) -> dict[str, Any]:
    """Return uns["cellvim"]: enough to repeat the run."""
    import json

    import torch

    pixel_size_um = plan.plate.pixel_size_um
    crop = {"size_px": "whole field"}
    if plan.crop_px is not None:
        crop = {"size_px": plan.crop_px, "input_px": plan.input_px}
        if pixel_size_um is not None:
            crop["size_um"] = plan.crop_px * pixel_size_um
        if plan.cutting.overlap:
            crop["overlap"] = plan.cutting.overlap
        if plan.cutting.border != "pad":
            crop["border"] = plan.cutting.border
        if plan.cutting.mask_neighbours:
            crop["mask_neighbours"] = True
    return {
        "model": {"name": plan.model_name, "config": json.dumps(plan.model.config.to_dict())},
        "weights": {
            "trained": plan.trained,
            "sha256": plan.weights_sha256,
            **({} if plan.trained else {"seed": plan.seed, "warning": _untrained_remark(plan)}),
        },
        "plate": {
            "name": plan.plate.name,
            "path": str(Path(plan.plate.path).resolve()),
            "pixel_size_um": "unknown" if pixel_size_um is None else pixel_size_um,
            "wells": sorted({f.well for f in plan.fields}),
        },
        "unit": plan.unit,
        "cells": "not used" if plan.cells is None else plan.cells.name,
        "cell_notes": "" if plan.cells is None else "; ".join(dict.fromkeys(plan.cells.notes)),
        "channels": {
            "plate": plan.channels,
            "model": [plan.model.config.channel_names[i] for i in plan.channel_ids],
            "model_ids": plan.channel_ids,
            "nuclei": plan.dna or "not used",
        },
        "preprocessing": {"intensity": plan.scale.to_dict(), "crop": crop},
        "spatial_unit": "pixel" if pixel_size_um is None else "micrometer",
        "failed_fields": pd.DataFrame(
            {
                "field": np.array([name for name, _ in summary.failed], dtype=object),
                "reason": np.array([reason for _, reason in summary.failed], dtype=object),
            }
        ),
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "device": plan.device,
        "versions": {"python": sys.version.split()[0], **_versions("cellvim", "numpy", "scikit-image", "zarr")}
        | {"torch": str(torch.__version__)},
        "run": {
            "command": " ".join(sys.argv),
            "started": started.isoformat(timespec="seconds"),
            "seconds": summary.seconds,
        },
    }


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
