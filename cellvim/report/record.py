"""Provenance of the embeddings, from ``uns["cellvim"]``: model, channels, intensities, crops, versions and failures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from cellvim.data.intensity import IntensityScale
    from cellvim.data.plate import Plate

MAX_TEXT, MAX_ITEMS = 300, 20  # characters and items of a setting that is shown


@dataclass(frozen=True)
class CropRecord:
    """How crops were cut; None for what is not recorded.

    Attributes
    ----------
    unit
        "cell", "tile" or "field".
    size_px, size_um
        Side of a crop on the plate.
    channels
        Embedded channels of the plate.
    scale
        Intensities mapped to 0 and 1.
    spatial_in_um
        Whether ``obsm["spatial"]`` is in µm; otherwise in pixels.
    """

    unit: str
    size_px: int | None
    size_um: float | None
    channels: list[str] | None
    scale: IntensityScale | None
    spatial_in_um: bool

    def size_on(self, plate: Plate) -> int | None:
        """Return the side of a crop in pixels of a plate; None for whole fields."""
        if self.unit == "field":
            return None
        if self.size_um and plate.pixel_size_um:
            return max(1, round(self.size_um / plate.pixel_size_um))
        return int(self.size_px or 64)


def read_crop_record(uns: Mapping[str, Any]) -> CropRecord:
    """Read how crops were cut."""
    from cellvim.data.intensity import IntensityScale

    crop = _entry(uns, "preprocessing", "crop") or {}
    try:
        scale = IntensityScale.from_dict(_entry(uns, "preprocessing", "intensity"))
    except (KeyError, TypeError, ValueError):
        scale = None
    return CropRecord(
        unit=str(uns.get("unit", "cell")),
        size_px=crop.get("size_px"),
        size_um=crop.get("size_um"),
        channels=[str(channel) for channel in _list(_entry(uns, "channels", "plate"))] or None,
        scale=scale,
        spatial_in_um=str(uns.get("spatial_unit", "micrometer")) == "micrometer",
    )


def record_lines(uns: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return names and values of the recorded settings; tables, long texts and long lists are left out."""
    lines = []
    for key, value in uns.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += record_lines(value, f"{name}: ")
        elif isinstance(value, np.ndarray | list | tuple) and len(_list(value)) <= MAX_ITEMS:
            lines.append((name, ", ".join(map(_short, _list(value)))))
        elif value is not None and not isinstance(value, pd.DataFrame | np.ndarray | list | tuple):
            lines.append((name, _short(value)))
    return [(name, text) for name, text in lines if 0 < len(text) <= MAX_TEXT]


def channel_rows(uns: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per channel: names on the plate and in the model, and the intensities mapped to 0 and 1."""
    names, meanings = (_list(_entry(uns, "channels", key)) for key in ("plate", "model"))
    scaled, low, high = (
        _list(_entry(uns, "preprocessing", "intensity", key)) for key in ("channel_names", "low", "high")
    )
    limits = dict(zip(scaled, zip(low, high, strict=True), strict=True))
    return [
        [str(name), str(meaning), *map(_short, limits.get(name, (None, None)))]
        for name, meaning in zip_longest(names, meanings[: len(names)], fillvalue="–")
    ]


def failure_table(uns: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the fields that could not be read."""
    failed = uns.get("failed_fields")
    if not isinstance(failed, pd.DataFrame):
        failed = pd.DataFrame(failed)
    names = [name for name in ("plate", "field", "reason") if name in failed]
    return [name.capitalize() for name in names] or ["Field", "Reason"], failed[names].astype(str).to_numpy().tolist()


def plate_paths(uns: Mapping[str, Any]) -> list[str]:
    """Return the paths of the plates at the time of embedding."""
    plates = uns.get("plates")
    if isinstance(plates, pd.DataFrame) and "path" in plates:
        return [str(path) for path in plates["path"]]
    path = _entry(uns, "plate", "path")
    return [str(path)] if path else []


def with_first_plate(uns: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``uns["cellvim"]``; for several plates, with channels, crop and intensities of the first one."""
    plates = uns.get("plates")
    if "channels" in uns or not isinstance(plates, pd.DataFrame) or not len(plates):
        return dict(uns)
    first = plates.iloc[0].to_dict()
    try:
        channels, crop, intensity = (json.loads(str(first[key])) for key in ("channels", "crop", "intensity"))
    except (KeyError, ValueError):
        return dict(uns)
    return {
        **uns,
        "cells": first.get("cells"),
        "channels": {"plate": list(channels), "model": list(channels.values())},
        "preprocessing": {"crop": crop, "intensity": intensity},
    }


def untrained_warning(uns: Mapping[str, Any]) -> str | None:
    """Return a warning for weights that are untrained or not recorded, otherwise None."""
    trained = _entry(uns, "weights", "trained")
    if trained is None:
        return "The AnnData does not record whether the weights were trained."
    if trained:
        return None
    return (
        "The weights are UNTRAINED (random). This page demonstrates the pipeline and is a baseline; do not draw "
        "biological conclusions from it."
    )


def _short(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{float(value):.5g}"
    return "–" if value is None else str(value)


def _entry(value: Any, *keys: str) -> Any:
    """Return a nested entry; None if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _list(values: Any) -> list[Any]:
    return [] if values is None else np.asarray(values).tolist()
