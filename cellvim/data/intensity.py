"""Intensity scales: estimated per plate and channel from a sample of fields, or learned with a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as default
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cellvim.data.plate import sample_fields
from cellvim.errors import FieldReadError, InputError, MetadataError, PlateError, listing
from cellvim.files import write_atomic

if TYPE_CHECKING:
    from cellvim.data.illumination import Illumination
    from cellvim.data.plate import Plate

RULES = {"all": "each plate", "controls": "the negative controls of each plate"}  # as in a model's card
_SAMPLE = 1 << 22  # float pixels kept per channel; pixels of 8- and 16-bit images are all counted
_FORMAT = 2  # of the cached file; files of another format are estimated again
_LARGEST_RATIO = 4.0  # between the ranges of a model's levels and of a plate, in either direction


@dataclass(frozen=True, eq=False)
class IntensityScale:
    """A linear scale per channel: ``low`` becomes 0 and ``high`` becomes 1.

    Values are clipped to ``[0, ceiling]``. The ceiling is above 1 so that a few wells brighter than the rest of the
    plate (such as a strong control) keep their order, while the influence of a hot pixel is bounded.

    Attributes
    ----------
    channel_names
        C names, in the order of ``low`` and ``high``.
    low, high
        (C,) float64, in stored intensities. If they are equal, as for a constant channel, the result is 0 everywhere.
    ceiling
        Largest value returned by `apply`.
    sampling
        Origin of the values, for the record.
    """

    channel_names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    ceiling: float = 2.0
    sampling: dict[str, Any] = default(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_names", tuple(self.channel_names))
        for side in ("low", "high"):
            values = np.array(getattr(self, side), dtype=np.float64)
            if values.shape != (len(self.channel_names),) or not np.isfinite(values).all():
                raise ValueError(f"{side} must be {len(self.channel_names)} finite numbers, not {values}")
            values.setflags(write=False)
            object.__setattr__(self, side, values)

    def low_and_factor(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (C,) float32 each: the offset to subtract, and the factor to multiply by after that."""
        width = np.where(self.high > self.low, self.high - self.low, np.inf)
        return self.low.astype(np.float32), (1.0 / width).astype(np.float32)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the image (C, H, W) of any type as float32, scaled and clipped; NaN becomes 0."""
        if image.ndim != 3 or image.shape[0] != len(self.channel_names):
            raise ValueError(
                f"the image has the shape {image.shape}; expected ({len(self.channel_names)}, H, W) for the channels "
                f"{listing(self.channel_names)}"
            )
        low, factor = self.low_and_factor()
        scaled = image.astype(np.float32)
        scaled -= low[:, None, None]
        scaled *= factor[:, None, None]
        np.fmax(scaled, np.float32(0), out=scaled)  # unlike clip, fmax returns 0 for NaN
        return np.fmin(scaled, np.float32(self.ceiling), out=scaled)

    def apply_on_device(self, image: torch.Tensor) -> torch.Tensor:
        """Return the same as `apply` for an image (C, H, W) or crops (n, C, H, W), on their device."""
        low, factor = (torch.from_numpy(side).to(image.device) for side in self.low_and_factor())
        scaled = image.to(torch.float32, copy=True)
        scaled.sub_(low[:, None, None]).mul_(factor[:, None, None])
        return scaled.nan_to_num_(nan=0.0, posinf=None, neginf=None).clamp_(0, self.ceiling)

    def to_dict(self) -> dict[str, Any]:
        """Return the scale as lists and numbers, for JSON."""
        return {
            "channel_names": list(self.channel_names),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "ceiling": self.ceiling,
            **({"sampling": self.sampling} if self.sampling else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> IntensityScale:
        """Create a scale from the result of `to_dict`."""
        return cls(
            tuple(data["channel_names"]),
            data["low"],
            data["high"],
            float(data.get("ceiling", 2.0)),
            dict(data.get("sampling", {})),
        )


def estimate_intensity_scale(
    plate: Plate,
    channels: Sequence[str],
    *,
    low_percentile: float = 0.1,
    high_percentile: float = 99.9,
    max_fields: int = 24,
    wells: Sequence[str] | None = None,
    illumination: Illumination | None = None,
    seed: int = 0,
) -> IntensityScale:
    """Estimate each channel's scale from fields spread over the plate.

    8- and 16-bit images are counted per value, so that the percentiles are exact for the sampled fields; of other
    images a regular subset of the pixels is used. Unreadable fields are skipped.

    Parameters
    ----------
    plate
        The plate.
    channels
        Channel names on the plate, in the order of the result.
    low_percentile, high_percentile
        Percentiles that become 0 and 1.
    max_fields
        Number of fields to read, see `sample_fields`.
    wells
        Wells to sample, such as `reference_wells`; all by default.
    illumination
        Correction to apply to the images first.
    seed
        Random seed for the choice of fields.

    Raises
    ------
    ChannelError
        The plate does not have a channel.
    PlateError
        No sampled field can be read.
    """
    if not 0 <= low_percentile < high_percentile <= 100:
        raise ValueError(f"percentiles must be 0 <= low < high <= 100, not {low_percentile} and {high_percentile}")
    fields = plate.fields if wells is None else [f for f in plate.fields if f.well in set(wells)]
    if not fields:
        raise PlateError(f"{plate.path} has no field in the wells {listing(wells or ())}.")
    sampled = sample_fields(fields, max_fields, seed)
    pixels = [_PixelSample() for _ in channels]
    errors = []
    for field in sampled:
        try:
            image = field.read(channels)
        except FieldReadError as error:
            errors.append(error)
            continue
        if illumination is not None:
            image = illumination.apply(image)
        for sample, plane in zip(pixels, image, strict=True):
            sample.add(plane)
    if len(errors) == len(sampled):
        raise PlateError(
            f"{plate.path}: none of the {len(sampled)} fields sampled for the intensity scale can be read "
            f"({listing([f.name for f in sampled])}). First reason: {errors[0]}"
        )
    bounds = np.array([p.percentiles(low_percentile, high_percentile) for p in pixels]).reshape(-1, 2)
    return IntensityScale(tuple(channels), bounds[:, 0], bounds[:, 1])


class _PixelSample:
    """Pixels of one channel in bounded memory: counted per value for 8- and 16-bit images, else a regular subset."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, np.int64)
        self._subsets: list[np.ndarray] = []

    def add(self, plane: np.ndarray) -> None:
        """Add the pixels of one image."""
        if plane.dtype in (np.uint8, np.uint16):
            counts = np.bincount(plane.ravel(), minlength=self._counts.size)
            counts[: self._counts.size] += self._counts
            self._counts = counts
        else:
            values = plane.ravel()
            values = values[:: max(1, values.size // (_SAMPLE // 16))].astype(np.float32)
            self._subsets.append(values[np.isfinite(values)])

    def percentiles(self, low: float, high: float) -> tuple[float, float]:
        """Return two percentiles, (0, 0) if there are no pixels."""
        count = int(self._counts.sum())
        if not self._subsets:
            cumulated = np.cumsum(self._counts)  # a percentile is the smallest value with that share of pixels below
            at = [max(1, np.ceil(p / 100 * count)) for p in (low, high)]
            return (float(np.searchsorted(cumulated, at[0])), float(np.searchsorted(cumulated, at[1])))
        values = np.concatenate(self._subsets)
        values = values[:: max(1, -(-values.size // _SAMPLE))].astype(np.float64)
        if count:  # the fields of a plate may differ in type: add the counted pixels, thinned, as values
            repeats = np.ceil(self._counts / max(1.0, count / _SAMPLE)).astype(np.int64)
            values = np.concatenate([values, np.repeat(np.arange(len(repeats), dtype=np.float64), repeats)])
        if not values.size:
            return 0.0, 0.0
        return tuple(np.percentile(values, (low, high)).tolist())


def reference_wells(plate: Plate) -> list[str]:
    """Return the plate's negative controls: ``negcon`` in ``Metadata_pert_type``, or else wells treated with DMSO.

    Raises
    ------
    MetadataError
        The plate map does not name any.
    """
    table = plate.well_metadata
    for column in ("Metadata_pert_type", "pert_type", "control_type", "Metadata_control_type"):
        if column in table and (chosen := table[column].astype(str).str.lower().str.startswith("negcon")).any():
            return list(table.index[chosen])
    for column in table.columns:
        chosen = table[column].astype(str).str.strip().str.lower().eq("dmso")
        # "solvent: DMSO" also describes wells with a compound
        if chosen.any() and not chosen.all() and str(column).lower() != "solvent":
            return list(table.index[chosen])
    raise MetadataError(
        f"{plate.path} names no negative controls: expected negcon in Metadata_pert_type, or DMSO in another column "
        f"(it has {listing(table.columns)}). Import it with --metadata and --pert-type, or scale by all wells."
    )


def cached_intensity_scale(plate: Plate, channels: Sequence[str], cache: str | Path, **options: Any) -> IntensityScale:
    """Return `estimate_intensity_scale`, from a JSON file if the same scale was estimated before.

    Parameters
    ----------
    plate, channels, **options
        See `estimate_intensity_scale`.
    cache
        The file. It is replaced if it cannot be read, or if the plate, the channels or the options differ.
    """
    cache = Path(cache)
    key = cache_key(plate, channels, options)
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return IntensityScale.from_dict(stored["scale"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the file does not exist or is not a cached scale
    scale = estimate_intensity_scale(plate, channels, **options)
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(cache, json.dumps({"key": key, "scale": scale.to_dict()}, indent=1))
    return scale


def cache_key(plate: Plate, channels: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return a hash of everything that an estimate depends on: fields, their stored sizes, channels and options."""
    plain = {
        k: v.digest if hasattr(v, "digest") else list(v) if isinstance(v, tuple) else v for k, v in options.items()
    }
    sampled = sample_fields(plate.fields, 48, 0)
    what = {
        "format": _FORMAT,
        "plate": plate.name,
        "view": [str(v) for v in plate.selection.values()],
        "fields": [f.name for f in plate.fields],
        "stored": [f.layout.folder.stored_bytes() if f.is_readable else None for f in sampled],
        "channels": list(channels),
        "options": plain,
    }
    return sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


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
        Channel names on the plate, in the order of the result.
    scale_by
        "all": percentiles of the plate. "controls": percentiles of its negative controls. "model": the levels of the
        model's training. "auto": as in the model's training, or percentiles of the plate if its card has no scale.
    learned
        ``intensity`` of the model's card: a rule (``of`` and percentiles), or levels (`IntensityScale.to_dict`).
    meanings
        The model's names of the channels; required for levels.
    model_name
        Name of the model in messages.
    cache
        File for the estimate.
    **options
        See `estimate_intensity_scale`.

    Raises
    ------
    InputError
        The model has no levels, or, with "auto", they do not fit the plate's intensities.
    MetadataError
        The plate map does not name the negative controls that are needed.
    """
    learned = dict(learned or {})
    is_auto = scale_by == "auto"
    if is_auto:
        options |= {k: learned[k] for k in ("low_percentile", "high_percentile") if k in learned}
        scale_by = next((rule for rule, of in RULES.items() if of == learned.get("of")), "all")
        scale_by = "model" if "low" in learned else scale_by
    levels = None
    if scale_by == "model":
        if "low" not in learned:
            raise InputError(f"{model_name} has no intensity levels; leave out --scale-by.")
        levels = _model_levels(learned, meanings or channels, channels, model_name)
        if not is_auto:
            return levels
    if scale_by == "controls":
        try:
            options["wells"] = reference_wells(plate)
        except MetadataError as error:
            if not is_auto:
                raise
            raise MetadataError(
                f"{model_name} was trained with intensities scaled by negative controls. {error} To scale by all wells "
                "instead, use --scale-by all."
            ) from error
    own = (
        estimate_intensity_scale(plate, channels, **options)
        if cache is None
        else cached_intensity_scale(plate, channels, cache, **options)
    )
    if levels is None:
        return own
    _check_levels(levels, own, Path(plate.path).name, model_name)
    return levels


def _model_levels(
    learned: Mapping[str, Any], meanings: Sequence[str], channels: Sequence[str], model_name: str
) -> IntensityScale:
    """Return the scale in a model's card for these channels."""
    known = IntensityScale.from_dict(learned)
    missing = [m for m in meanings if m not in known.channel_names]
    if missing:
        raise InputError(
            f"{model_name} has intensity levels of {listing(known.channel_names)}, but not of {listing(missing)}. "
            "Scale by the plate with --scale-by all."
        )
    order = [known.channel_names.index(m) for m in meanings]
    return replace(
        known,
        channel_names=tuple(channels),
        low=known.low[order],
        high=known.high[order],
        sampling={"levels": "those that the model learned with"},
    )


def _check_levels(levels: IntensityScale, own: IntensityScale, plate_name: str, model_name: str) -> None:
    """Raise an error if levels would turn a channel of a plate nearly black or nearly white."""
    for channel, low, high, own_low, own_high in zip(
        own.channel_names, levels.low, levels.high, own.low, own.high, strict=True
    ):
        if not (high > low and own_high > own_low):
            continue
        ratio = (high - low) / (own_high - own_low)
        if low > own_high or own_low > high or not 1 / _LARGEST_RATIO <= ratio <= _LARGEST_RATIO:
            raise InputError(
                f"{model_name} was trained with intensities of {low:g} to {high:g}, but channel {channel} of "
                f"{plate_name} has {own_low:g} to {own_high:g}. Scale by the plate with --scale-by all, or use the "
                "model's levels nevertheless with --scale-by model."
            )
