"""Planning an embedding: everything that was asked for is checked before any work is done.

A plan says how each field becomes rows, and nothing else: not who does it, in which order, or on which machine.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.embedding.encoders import (
    channel_ids,
    choose_encoder,
    class_names_of,
    square_input,
    unlike_training,
    usable_device,
    usable_precision,
)
from cellvim.embedding.looks import Look, all_meanings, look_at_all, unique_names, untrained_size
from cellvim.embedding.options import EmbeddingOptions, Plates
from cellvim.embedding.plan import EmbeddingPlan, PlatePlan, field_digest, fields_of
from cellvim.errors import InputError, ModelError, OutputError

if TYPE_CHECKING:
    from cellvim.data.crops import CropSpec
    from cellvim.data.illumination import Illumination
    from cellvim.data.plate import Plate
    from cellvim.models.encoder import Encoder


def plan_embedding(plate: Plates, *, cache: str | Path | None = None, **options: Any) -> EmbeddingPlan:
    """Check everything that was asked for, before any work is done.

    Parameters
    ----------
    plate
        An OME-Zarr plate or several, as in `cellvim.embed`.
    cache
        Folder in which what is estimated of the plates is kept for the next time.
    **options
        Those of `cellvim.embedding.options.EmbeddingOptions`.

    Raises
    ------
    CellvimError
        Something given cannot be used.
    """
    asked = EmbeddingOptions(**options)
    asked.check()
    sources = list(plate) if isinstance(plate, list | tuple) else [plate]
    if not sources:
        raise InputError("No plate was given; expected the path of at least one.")
    device = usable_device(asked.device)
    looks = look_at_all(sources, asked)
    names = unique_names(looks)
    size = untrained_size(looks[0], asked)
    encoder, model_name = choose_encoder(asked.model, all_meanings(looks), image_size=size, seed=asked.seed)
    input_px = None if asked.unit == "field" else square_input(encoder, model_name, asked.unit)
    if asked.per_channel and encoder.config.tokens != "per_channel":
        raise ModelError(f"{model_name} has joint tokens, none of which is of one channel; --per-channel needs others.")
    class_names = class_names_of(encoder, model_name) if asked.probabilities else ()
    cutting = _cutting(asked, input_px)
    plans = []
    for look, name in zip(looks, names, strict=True):
        try:
            plans.append(_plan_plate(look, name, encoder, model_name, cutting, asked, cache))
        except OSError as error:
            if cache is None:
                raise
            raise OutputError(f"{cache} cannot be written: {error.strerror or error}.") from error
        if len(looks) > 1:
            plans[-1].close()
        look.close()
    plan = EmbeddingPlan(
        plates=tuple(plans),
        unit=asked.unit,
        model=encoder.to(device).eval(),
        model_name=model_name,
        trained=bool(encoder.is_trained),
        input_px=input_px,
        batch_size=1,
        device=device,
        precision=usable_precision(asked.precision, device),
        seed=asked.seed,
        per_channel=asked.per_channel,
        class_names=class_names,
        notes=tuple(unlike_training(encoder, model_name, plans, asked.unit, input_px)),
        tokens=asked.tokens,
    )
    if asked.unit == "field":
        return plan
    if asked.batch_size is not None:
        return replace(plan, batch_size=asked.batch_size)
    from cellvim.embedding.encode import automatic_batch_size

    return replace(plan, batch_size=automatic_batch_size(plan), batch_size_is_automatic=True)


def _cutting(asked: EmbeddingOptions, input_px: int | None) -> CropSpec:
    from cellvim.data.crops import CropSpec

    if asked.unit == "field":
        return CropSpec(asked.unit, um_per_px=asked.um_per_px)
    size = {"size_px": asked.crop_size or input_px} if asked.crop_um is None else {"size_um": asked.crop_um}
    return CropSpec(
        asked.unit,
        **size,
        overlap=asked.overlap,
        border=asked.border,
        mask_neighbours=asked.mask_neighbours,
        um_per_px=asked.um_per_px,
    )


def _plan_plate(
    look: Look,
    name: str,
    encoder: Encoder,
    model_name: str,
    cutting: CropSpec,
    asked: EmbeddingOptions,
    cache: str | Path | None,
) -> PlatePlan:
    from cellvim.data.cells import open_cells
    from cellvim.data.intensity import choose_intensity_scale

    plate = look.plate
    fields, lost, chosen = fields_of(plate, look.wells)
    ids = channel_ids(encoder, look.meanings, model_name)
    order = np.argsort(ids).tolist()  # as in training, and so that the plate's order of channels does not matter
    channels, meanings, ids = ([values[i] for i in order] for values in (look.channels, look.meanings, ids))
    light = _illumination(plate, channels, name, asked.seed, cache) if asked.illumination else None
    options: dict[str, Any] = {"seed": asked.seed}
    if light is not None:
        options["illumination"] = light
    scale = choose_intensity_scale(
        plate,
        channels,
        scale_by=asked.scale_by,
        learned=getattr(encoder, "card", {}).get("intensity"),
        meanings=[encoder.config.channel_names[i] for i in ids],
        model_name=model_name,
        cache=None if cache is None else Path(cache) / f"{_file_name(name)}.json",
        **options,
    )
    source = open_cells(asked.cells, plate, dna=look.dna) if cutting.unit == "cell" else None
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
        cells_from=str(asked.cells) if cutting.unit == "cell" else None,
        cells_name="not used" if source is None else source.name,
        cell_notes="" if source is None else "; ".join(dict.fromkeys(source.notes)),
        scale=scale,
        illumination=light,
        _opened=(plate, fields, source),
    )


def _illumination(plate: Plate, channels: list[str], name: str, seed: int, cache: str | Path | None) -> Illumination:
    """Return the light's shape, read from the cache when the same was estimated before."""
    from cellvim.data.illumination import Illumination, estimate_illumination
    from cellvim.data.intensity import cache_key

    if cache is None:
        return estimate_illumination(plate, channels, seed=seed)
    key = cache_key(plate, channels, {"illumination": True, "seed": seed})
    stored = Path(cache) / f"{_file_name(name)}.{key[:12]}.illumination.npz"
    if stored.exists():
        with suppress(InputError):
            return Illumination.load(stored)
    found = estimate_illumination(plate, channels, seed=seed)
    stored.parent.mkdir(parents=True, exist_ok=True)
    found.save(stored)
    return found


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
