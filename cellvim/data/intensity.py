"""Intensity scaling: robust percentiles or z-scores per plate and channel, from a deterministic sample of fields."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as default
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.errors import FieldReadError, InputError, MetadataError, PlateError, listing

if TYPE_CHECKING:
    import torch

    from cellvim.data.illumination import Illumination
    from cellvim.data.plate import Field, Plate

METHODS = ("percentile", "zscore")
_SAMPLE = 1 << 22  # float pixels kept a channel; integer images are counted exactly
_MOST_FIELDS = 192  # that a tolerance can lead to reading: their counts are held in memory
_REDRAWS = 100  # of the sampled fields, to see how far the estimate depends on which were drawn
_Z_CEILING = 10.0
_FORMAT = 2  # of the cached file; another one is estimated anew


@dataclass(frozen=True, eq=False)
class IntensityScale:
    """A linear scale per channel: ``low`` becomes 0 and ``high`` becomes 1.

    Values are clipped to ``[floor, ceiling]``. The ceiling lies above 1 so that a few wells brighter than the rest of
    the plate (a strong control) keep their order, while a hot pixel cannot reach far.

    Attributes
    ----------
    channel_names
        C names, in the order of ``low`` and ``high``.
    low, high
        (C,) float64, in stored intensities. Equal where a channel is constant: it then becomes 0 everywhere.
    ceiling
        Largest value that `apply` returns.
    floor
        Smallest value that `apply` returns; below 0 for z-scores.
    method
        "percentile", or "zscore": then ``low`` is the mean and ``high`` one standard deviation above it.
    sampling
        How it was estimated: the fields read, and the standard error of ``low`` and ``high`` by the distance between
        them, from redrawing those fields.
    """

    channel_names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    ceiling: float = 2.0
    floor: float = 0.0
    method: str = "percentile"
    sampling: dict[str, Any] = default(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_names", tuple(self.channel_names))
        for side in ("low", "high"):
            values = np.array(getattr(self, side), dtype=np.float64)
            if values.shape != (len(self.channel_names),) or not np.isfinite(values).all():
                raise ValueError(f"{side} must be {len(self.channel_names)} finite numbers, not {values}")
            values.setflags(write=False)
            object.__setattr__(self, side, values)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the image (C, H, W) of any type as float32, scaled and clipped; NaN becomes 0."""
        if image.ndim != 3 or image.shape[0] != len(self.channel_names):
            raise ValueError(
                f"the image has the shape {image.shape}; expected ({len(self.channel_names)}, H, W) for the channels "
                f"{listing(self.channel_names)}"
            )
        return self.apply_in_place(image.astype(np.float32))

    def low_and_factor(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (C,) float32 each: what is taken off a channel, and what it is then multiplied by."""
        width = np.where(self.high > self.low, self.high - self.low, np.inf)
        return self.low.astype(np.float32), (1.0 / width).astype(np.float32)

    def apply_in_place(self, image: np.ndarray) -> np.ndarray:
        """Scale an image (C, H, W) or crops (n, C, H, W), float32, and return it."""
        low, factor = self.low_and_factor()
        image -= low[:, None, None]
        image *= factor[:, None, None]
        if self.floor < 0:
            image[np.isnan(image)] = 0
        # fmax and fmin rather than clip: of a NaN and 0 they return the 0
        np.fmax(image, np.float32(self.floor), out=image)
        np.fmin(image, np.float32(self.ceiling), out=image)
        return image

    def apply_on_device(self, image: torch.Tensor) -> torch.Tensor:
        """Return what `apply` returns, for an image (C, H, W) or crops (n, C, H, W) that are on a device already."""
        import torch

        low, factor = (torch.from_numpy(side).to(image.device) for side in self.low_and_factor())
        scaled = image.to(torch.float32, copy=True)
        scaled.sub_(low[:, None, None]).mul_(factor[:, None, None])
        return scaled.nan_to_num_(nan=0.0, posinf=None, neginf=None).clamp_(self.floor, self.ceiling)

    def to_dict(self) -> dict[str, Any]:
        """Return the scale as plain lists and numbers, for JSON."""
        return {
            "channel_names": list(self.channel_names),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "ceiling": self.ceiling,
            **({"floor": self.floor, "method": self.method} if self.method != "percentile" else {}),
            **({"sampling": self.sampling} if self.sampling else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> IntensityScale:
        """Read what `to_dict` wrote."""
        return cls(
            tuple(data["channel_names"]),
            data["low"],
            data["high"],
            float(data.get("ceiling", 2.0)),
            float(data.get("floor", 0.0)),
            str(data.get("method", "percentile")),
            dict(data.get("sampling", {})),
        )


def estimate_intensity_scale(
    plate: Plate,
    channels: Sequence[str],
    *,
    method: str = "percentile",
    low_percentile: float = 0.1,
    high_percentile: float = 99.9,
    max_fields: int = 24,
    tolerance: float | None = None,
    wells: Sequence[str] | None = None,
    illumination: Illumination | None = None,
    seed: int = 0,
) -> IntensityScale:
    """Estimate each channel's scale from fields spread over the plate.

    Every pixel of the sampled fields counts: integer images are counted per value, so the percentiles are exact for
    the sample; of float images a regular subset is kept. Unreadable fields are passed over.

    Parameters
    ----------
    plate
        The plate.
    channels
        Names on the plate, in the order wanted.
    method
        ``percentile``, or ``zscore``: mean and standard deviation.
    low_percentile, high_percentile
        What becomes 0 and 1.
    max_fields
        How many fields to read at first. One is drawn from each of as many equal stretches of the plate.
    tolerance
        Read more fields, twice as many each time, until the standard error of ``low`` and ``high`` is below this share
        of the distance between them, or all have been read, or 192. None: ``max_fields`` decide. What was reached is
        in `IntensityScale.sampling`.
    wells
        Wells to look at, such as `reference_wells`; all by default.
    illumination
        Correction that the images will have; it is applied here too.
    seed
        Of that draw; the same seed always gives the same fields.

    Raises
    ------
    ChannelError
        A channel is not there.
    PlateError
        None of the sampled fields can be read.
    """
    if not 0 <= low_percentile < high_percentile <= 100:
        raise ValueError(f"percentiles must be 0 <= low < high <= 100, not {low_percentile} and {high_percentile}")
    if method not in METHODS:
        raise InputError(f"The intensity scale '{method}' is not known; choose {listing(METHODS)}.")
    fields = plate.fields if wells is None else [f for f in plate.fields if f.well in set(wells)]
    if not fields:
        raise PlateError(f"{plate.path} has no field in the wells {listing(wells or ())}.")
    ask = (low_percentile, high_percentile) if method == "percentile" else None
    samples: dict[str, list[_Values] | None] = {}  # a field's name -> what was seen of each channel
    count = max_fields
    while True:
        chosen = _spread(fields, count, seed)
        for field in chosen:
            if field.name not in samples:
                samples[field.name] = _look(field, channels, illumination)
        read = [s for s in samples.values() if s is not None]
        if not read:
            raise PlateError(
                f"{plate.path}: none of the {len(samples)} fields sampled for the intensity scale can be read "
                f"({listing(samples)}). First reason: {_why(chosen[0], channels)}"
            )
        bounds = np.array([_bounds([s[c] for s in read], ask) for c in range(len(channels))]).reshape(-1, 2)
        if tolerance is None:
            error = None
            break
        missing = 1 - len(samples) / len(fields)  # all fields read: nothing is left to chance
        error = np.sqrt(missing) * _standard_errors(read, len(channels), ask, bounds, seed)
        if not (error > tolerance).any() or count >= min(len(fields), _MOST_FIELDS):
            break
        count = min(2 * count, _MOST_FIELDS)
    sampling: dict[str, Any] = {}
    if error is not None:
        sampling = {
            "n_fields": len(read),
            "n_fields_in_all": len(fields),
            "relative_error": float(error.max(initial=0)),
        }
    if method == "zscore":
        return IntensityScale(tuple(channels), bounds[:, 0], bounds[:, 1], _Z_CEILING, -_Z_CEILING, method, sampling)
    return IntensityScale(tuple(channels), bounds[:, 0], bounds[:, 1], sampling=sampling)


def reference_wells(plate: Plate) -> list[str]:
    """Return the plate's negative controls: ``negcon`` by ``Metadata_pert_type``, or else wells treated with DMSO.

    Raises
    ------
    MetadataError
        The plate map names none.
    """
    table = plate.well_metadata
    for column in ("Metadata_pert_type", "pert_type", "control_type", "Metadata_control_type"):
        if column in table and (chosen := table[column].astype(str).str.lower().str.startswith("negcon")).any():
            return list(table.index[chosen])
    for column in table.columns:
        values = table[column].astype(str).str.strip().str.lower()
        chosen = values.eq("dmso")
        # "solvent: DMSO" is true of every well that got a compound: a control column tells wells apart
        if chosen.any() and not chosen.all() and str(column).lower() != "solvent":
            return list(table.index[chosen])
    raise MetadataError(
        f"{plate.path} names no negative controls: expected negcon in Metadata_pert_type, or DMSO in another column "
        f"(it has {listing(table.columns)}). Import it with --metadata and --pert-type, or scale by all wells."
    )


def cached_intensity_scale(plate: Plate, channels: Sequence[str], cache: str | Path, **options: Any) -> IntensityScale:
    """Return `estimate_intensity_scale`, read from a JSON file when the same was estimated before.

    Parameters
    ----------
    plate, channels, **options
        As in `estimate_intensity_scale`.
    cache
        The file, best beside the output. It is replaced when the plate, the channels or the options differ, and when
        it cannot be read.
    """
    cache = Path(cache)
    key = cache_key(plate, channels, options)
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return IntensityScale.from_dict(stored["scale"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not ours: it is estimated
    scale = estimate_intensity_scale(plate, channels, **options)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"key": key, "scale": scale.to_dict()}, indent=1), encoding="utf-8")
    os.replace(partial, cache)
    return scale


def cache_key(plate: Plate, channels: Sequence[str], options: dict[str, Any]) -> str:
    """Return a hash of all that decides a scale: the plate's fields and their stored sizes, channels and options."""
    plain = {
        k: v.digest if hasattr(v, "digest") else list(v) if isinstance(v, tuple) else v for k, v in options.items()
    }
    fields = _spread(plate.fields, 48, 0)
    what = {
        "format": _FORMAT,
        "plate": plate.name,
        "view": [str(v) for v in plate.selection.values()],
        "fields": [f.name for f in plate.fields],
        "stored": [f.layout.folder.stored_bytes() if f.is_readable else None for f in fields],
        "channels": list(channels),
        "options": plain,
    }
    return sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _spread(fields: Sequence[Field], count: int, seed: int) -> list[Field]:
    """Draw one field from each of ``count`` equal stretches: even over the plate, without locking on to a column."""
    if count >= len(fields):
        return list(fields)
    edges = np.linspace(0, len(fields), count + 1).astype(int)
    rng = np.random.default_rng(seed)
    return [fields[rng.integers(start, stop)] for start, stop in pairwise(edges)]


def _look(field: Field, channels: Sequence[str], illumination: Illumination | None) -> list[_Values] | None:
    """Return what counts of each channel of a field; None where it cannot be read."""
    try:
        image = field.read(channels)
    except FieldReadError:
        return None
    if illumination is not None:
        image = illumination.apply(image)
    return [_Values.of(plane) for plane in image]


def _why(field: Field, channels: Sequence[str]) -> str:
    """Return why a field cannot be read."""
    try:
        field.read(channels)
    except FieldReadError as error:
        return str(error)
    return "it can be read now; try again."


@dataclass(frozen=True)
class _Values:
    """Pixels of one plane, in bounded memory: counted per value where they are 8- or 16-bit, else thinned out."""

    counts: np.ndarray | None
    values: np.ndarray | None

    @classmethod
    def of(cls, plane: np.ndarray) -> _Values:
        if plane.dtype in (np.uint8, np.uint16):
            return cls(np.bincount(plane.ravel()).astype(np.int32), None)
        values = plane.ravel()
        values = values[:: max(1, values.size // (_SAMPLE // 16))].astype(np.float32)
        return cls(None, values[np.isfinite(values)])


def _bounds(seen: Sequence[_Values], percentiles: tuple[float, float] | None) -> tuple[float, float]:
    """Return (low, high) of one channel from what was seen of it."""
    counted = [v.counts for v in seen if v.counts is not None]
    loose = [v.values for v in seen if v.values is not None]
    if not loose:
        return _of_counts(_total(counted, np.ones(len(counted))), percentiles)
    values = np.concatenate(loose)
    values = values[:: max(1, -(-values.size // _SAMPLE))].astype(np.float64)
    if counted:  # a plate may mix types: then the counted ones join as values
        total = _total(counted, np.ones(len(counted)))
        values = np.concatenate([values, np.repeat(np.arange(total.size, dtype=np.float64), _thin(total))])
    if not values.size:
        return 0.0, 0.0
    if percentiles is None:
        return float(values.mean()), float(values.mean() + values.std())
    low, high = np.percentile(values, percentiles)
    return float(low), float(high)


def _total(counts: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    total = np.zeros(max((c.size for c in counts), default=0))
    for count, weight in zip(counts, weights, strict=True):
        total[: count.size] += weight * count
    return total


def _of_counts(total: np.ndarray, percentiles: tuple[float, float] | None) -> tuple[float, float]:
    n = total.sum()
    if not n:
        return 0.0, 0.0
    if percentiles is None:
        values = np.arange(total.size, dtype=np.float64)
        mean = float(total @ values / n)
        return mean, mean + float(np.sqrt(max(0.0, total @ (values - mean) ** 2 / n)))
    # the smallest value below which lies at least that share of the pixels
    cumulated = np.cumsum(total)
    low, high = (float(np.searchsorted(cumulated, max(1, np.ceil(p / 100 * n)))) for p in percentiles)
    return low, high


def _standard_errors(
    read: Sequence[Sequence[_Values]],
    n_channels: int,
    percentiles: tuple[float, float] | None,
    bounds: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return the standard error of each channel's bounds by the distance between them: (C, 2), from redrawn fields."""
    if len(read) < 3:
        return np.full((n_channels, 2), np.inf)
    rng = np.random.default_rng([seed, len(read)])
    draws = rng.multinomial(len(read), np.full(len(read), 1 / len(read)), size=_REDRAWS)
    errors = np.zeros((n_channels, 2))
    for c in range(n_channels):
        width = bounds[c, 1] - bounds[c, 0]
        if not width:
            continue
        seen = [_thinned(s[c]) for s in read]
        redrawn = [_weighted_bounds(seen, weights, percentiles) for weights in draws]
        errors[c] = np.std(redrawn, axis=0) / width
    return errors


def _thinned(seen: _Values, most: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Return a field's pixels as (values, how many of each), few enough to be redrawn a hundred times."""
    if seen.counts is not None:
        values = np.flatnonzero(seen.counts)
        return values.astype(np.float64), seen.counts[values].astype(np.float64)
    values = np.sort(seen.values.astype(np.float64))
    step = max(1, values.size // most)
    return values[::step], np.full(len(values[::step]), float(step))


def _weighted_bounds(
    seen: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray, percentiles: tuple[float, float] | None
) -> tuple[float, float]:
    drawn = [(v, n * w) for (v, n), w in zip(seen, weights, strict=True) if w]
    values, counts = (np.concatenate(part) for part in zip(*drawn, strict=True))
    if percentiles is None:
        mean = np.average(values, weights=counts)
        return float(mean), float(mean + np.sqrt(np.average((values - mean) ** 2, weights=counts)))
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(counts[order])
    place = np.searchsorted(cumulated, np.array(percentiles) / 100 * cumulated[-1])
    low, high = values[order][np.minimum(place, len(values) - 1)]
    return float(low), float(high)


def _thin(histogram: np.ndarray) -> np.ndarray:
    return np.ceil(histogram / max(1.0, histogram.sum() / _SAMPLE)).astype(np.int64)


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
