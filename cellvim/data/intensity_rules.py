"""Which scale a plate's intensities get: estimated of the plate by a rule, or the levels that a model learned with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellvim.data.normalize import (
    IntensityScale,
    cached_intensity_scale,
    estimate_intensity_scale,
    reference_wells,
)
from cellvim.errors import InputError, MetadataError, listing

if TYPE_CHECKING:
    from cellvim.data.plate import Plate

RULES = {"all": "each plate", "controls": "the negative controls of each plate"}  # as a model's card says it
_FAR_OFF = 4.0  # times as wide or as narrow as the plate's own: such levels are of other images


def choose_intensity_scale(
    plate: Plate,
    channels: Sequence[str],
    *,
    scale_by: str = "auto",
    learned: Mapping[str, Any] | None = None,
    meanings: Sequence[str] | None = None,
    model_name: str = "the model",
    cache: str | Path | None = None,
    **options: Any,
) -> IntensityScale:
    """Return the scale of a plate's channels.

    Parameters
    ----------
    plate
        The plate.
    channels
        Names on the plate, in the order wanted.
    scale_by
        "all": percentiles of the plate. "controls": of its negative controls. "model": the levels that the model
        learned with. "auto": whichever of these the model learned with, percentiles of the plate where it does not say.
    learned
        ``intensity`` of the model's card: a rule (``of`` and percentiles), or levels (`IntensityScale.to_dict`).
    meanings
        What the channels are called by the model; needed for levels.
    model_name
        For messages.
    cache
        File that keeps what is estimated.
    **options
        As for `estimate_intensity_scale`.

    Raises
    ------
    InputError
        Levels are asked for and there are none, or, with "auto", they do not fit the plate's intensities.
    MetadataError
        The plate map names no negative controls, and they are wanted.
    """
    learned = dict(learned or {})
    has_levels = "low" in learned
    if scale_by == "model" and not has_levels:
        raise InputError(f"{model_name} has no intensity levels of its own; leave --scale-by out.")
    percentiles: dict[str, Any] = {}
    if scale_by == "auto":
        percentiles = {k: learned[k] for k in ("low_percentile", "high_percentile") if k in learned}
        if has_levels:
            scale_by = "levels that fit"
        else:
            scale_by = next((k for k, of in RULES.items() if of == learned.get("of")), "all")
            if scale_by == "controls":
                percentiles["wells"] = _controls(plate, model_name)
    elif scale_by == "controls":
        percentiles["wells"] = reference_wells(plate)
    if scale_by == "model":
        return _levels(learned, meanings or channels, channels, model_name)
    options = options | percentiles
    own = (
        estimate_intensity_scale(plate, channels, **options)
        if cache is None
        else cached_intensity_scale(plate, channels, cache, **options)
    )
    if scale_by != "levels that fit":
        return own
    levels = _levels(learned, meanings or channels, channels, model_name)
    _check_fit(own, levels, Path(plate.path).name, model_name)
    return levels


def _controls(plate: Plate, model_name: str) -> list[str]:
    try:
        return reference_wells(plate)
    except MetadataError as error:
        raise MetadataError(
            f"{model_name} learned with intensities scaled by negative controls. {error} Or leave its rule: "
            "--scale-by all."
        ) from error


def _levels(
    learned: Mapping[str, Any], meanings: Sequence[str], channels: Sequence[str], model_name: str
) -> IntensityScale:
    known = IntensityScale.from_dict(learned)
    missing = [m for m in meanings if m not in known.channel_names]
    if missing:
        raise InputError(
            f"{model_name} has intensity levels of {listing(known.channel_names)}, none of {listing(missing)}. Scale "
            "by the plate: --scale-by all."
        )
    order = [known.channel_names.index(m) for m in meanings]
    levels = replace(known, channel_names=tuple(channels), low=known.low[order], high=known.high[order])
    return replace(levels, sampling={"levels": "those that the model learned with"})


def _check_fit(own: IntensityScale, levels: IntensityScale, where: str, model_name: str) -> None:
    """Raise where levels would leave a plate nearly black, or nearly white."""
    for channel, low, high, plate_low, plate_high in zip(
        own.channel_names, levels.low, levels.high, own.low, own.high, strict=True
    ):
        if not (high > low and plate_high > plate_low):
            continue
        ratio = (high - low) / (plate_high - plate_low)
        apart = max(low - plate_high, plate_low - high) > 0
        if apart or not 1 / _FAR_OFF <= ratio <= _FAR_OFF:
            raise InputError(
                f"{model_name} learned with intensities of {low:g} to {high:g}, but channel {channel} of {where} has "
                f"{plate_low:g} to {plate_high:g}. Scale by the plate itself with --scale-by all, or by the model's "
                "levels all the same with --scale-by model."
            )
