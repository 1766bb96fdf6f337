"""Intensity scaling: robust percentiles per plate and channel, from a deterministic sample of fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.errors import FieldReadError, PlateError, listing

if TYPE_CHECKING:
    from cellvim.data.plate import Field, Plate

_SAMPLE = 1 << 22  # float pixels kept a channel; integer images are counted exactly


@dataclass(frozen=True, eq=False)
class IntensityScale:
    """A linear scale per channel: ``low`` becomes 0 and ``high`` becomes 1.

    Values are clipped to ``[0, ceiling]``. The ceiling lies above 1 so that a few wells brighter than the rest of
    the plate (a strong control) keep their order, while a hot pixel cannot reach far.

    Attributes
    ----------
    channel_names
        C names, in the order of ``low`` and ``high``.
    low, high
        (C,) float64, in stored intensities. Equal where a channel is constant: it then becomes 0 everywhere.
    ceiling
        Largest value that `apply` returns.
    """

    channel_names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    ceiling: float = 2.0

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
        width = np.where(self.high > self.low, self.high - self.low, np.inf)
        low, factor = self.low.astype(np.float32), (1.0 / width).astype(np.float32)
        scaled = image.astype(np.float32)
        scaled -= low[:, None, None]
        scaled *= factor[:, None, None]
        # fmax and fmin rather than clip: of a NaN and 0 they return the 0
        np.fmax(scaled, np.float32(0.0), out=scaled)
        np.fmin(scaled, np.float32(self.ceiling), out=scaled)
        return scaled

    def to_dict(self) -> dict[str, Any]:
        """Return the scale as plain lists and numbers, for JSON."""
        return {
            "channel_names": list(self.channel_names),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "ceiling": self.ceiling,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> IntensityScale:
        """Read what `to_dict` wrote."""
        return cls(tuple(data["channel_names"]), data["low"], data["high"], float(data.get("ceiling", 2.0)))


def estimate_intensity_scale(
    plate: Plate,
    channels: Sequence[str],
    *,
    low_percentile: float = 0.1,
    high_percentile: float = 99.9,
    max_fields: int = 24,
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
    low_percentile, high_percentile
        What becomes 0 and 1.
    max_fields
        How many fields to read. One is drawn from each of as many equal stretches of the plate.
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
    chosen = _spread(plate.fields, max_fields, seed)
    counts = [_Percentiles() for _ in channels]
    failed: list[str] = []
    for field in chosen:
        try:
            image = field.read(channels)
        except FieldReadError:
            failed.append(field.name)
            continue
        for count, plane in zip(counts, image, strict=True):
            count.add(plane)
    if len(failed) == len(chosen):
        raise PlateError(
            f"{plate.path}: none of the {len(failed)} fields sampled for the intensity scale can be read "
            f"({listing(failed)})."
        )
    bounds = np.array([count.at((low_percentile, high_percentile)) for count in counts]).reshape(-1, 2)
    return IntensityScale(tuple(channels), bounds[:, 0], bounds[:, 1])


def _spread(fields: Sequence[Field], count: int, seed: int) -> list[Field]:
    """Draw one field from each of ``count`` equal stretches: even over the plate, without locking on to a column."""
    if count >= len(fields):
        return list(fields)
    edges = np.linspace(0, len(fields), count + 1).astype(int)
    rng = np.random.default_rng(seed)
    return [fields[rng.integers(start, stop)] for start, stop in pairwise(edges)]


class _Percentiles:
    """Percentiles of pixels that come plane by plane, in bounded memory."""

    def __init__(self) -> None:
        self._histogram = np.zeros(0, np.int64)  # of 8- and 16-bit images
        self._values: list[np.ndarray] = []  # of all others

    def add(self, plane: np.ndarray) -> None:
        if plane.dtype in (np.uint8, np.uint16):
            counts = np.bincount(plane.ravel())
            if counts.size > self._histogram.size:
                self._histogram = np.pad(self._histogram, (0, counts.size - self._histogram.size))
            self._histogram[: counts.size] += counts
            return
        values = plane.ravel()
        values = values[:: max(1, values.size // (_SAMPLE // 16))].astype(np.float64)
        self._values.append(values[np.isfinite(values)])
        if sum(v.size for v in self._values) > _SAMPLE:
            self._values = [np.concatenate(self._values)[::2]]

    def at(self, percentiles: Iterable[float]) -> list[float]:
        if self._values:  # a plate may mix types: then the counted ones join as values
            counted = np.repeat(np.arange(self._histogram.size, dtype=np.float64), _thin(self._histogram))
            values = np.concatenate([*self._values, counted])
            return np.percentile(values, list(percentiles)).tolist() if values.size else [0.0 for _ in percentiles]
        total = np.cumsum(self._histogram)
        if not total.size or not total[-1]:
            return [0.0 for _ in percentiles]
        # the smallest value below which lies at least that share of the pixels
        return [float(np.searchsorted(total, max(1, np.ceil(p / 100 * total[-1])))) for p in percentiles]


def _thin(histogram: np.ndarray) -> np.ndarray:
    return np.ceil(histogram / max(1.0, histogram.sum() / _SAMPLE)).astype(np.int64)
