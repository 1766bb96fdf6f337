"""Provenance of the embeddings, from ``uns["cellvim"]``: model, channels, intensities, crops, versions and failures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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
        return self.size_px or 64


def read_crop_record(uns: Mapping[str, Any]) -> CropRecord:
    """Read how crops were cut."""
    from cellvim.data.intensity import IntensityScale

    preprocessing = _dict(uns.get("preprocessing"))
    crop, intensity = _dict(preprocessing.get("crop")), _dict(preprocessing.get("intensity"))
    channels = _list(_dict(uns.get("channels")).get("plate"))
    try:
        scale = IntensityScale.from_dict(intensity) if intensity else None
    except (KeyError, TypeError, ValueError):
        scale = None
    size_px = _positive(crop.get("size_px"))
    return CropRecord(
        unit=str(uns.get("unit", "cell")),
        size_px=int(size_px) if size_px else None,
        size_um=_positive(crop.get("size_um")),
        channels=[str(c) for c in channels] or None,
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
    channels = _dict(uns.get("channels"))
    names, meanings = (_list(channels.get(key)) for key in ("plate", "model"))
    intensity = _dict(_dict(uns.get("preprocessing")).get("intensity"))
    low, high = (
        dict(zip(_list(intensity.get("channel_names")), _list(intensity.get(k)), strict=False)) for k in ("low", "high")
    )
    meanings += ["–"] * (len(names) - len(meanings))
    return [
        [str(name), str(meaning), _short(low.get(name)), _short(high.get(name))]
        for name, meaning in zip(names, meanings, strict=False)
    ]


def failure_table(uns: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the fields that could not be read."""
    failed = uns.get("failed_fields")
    if not isinstance(failed, pd.DataFrame):
        failed = pd.DataFrame({name: _list(values) for name, values in _dict(failed).items()})
    names = [name for name in ("plate", "field", "reason") if name in failed]
    return [name.capitalize() for name in names] or ["Field", "Reason"], failed[names].astype(str).to_numpy().tolist()


def plate_paths(uns: Mapping[str, Any]) -> list[str]:
    """Return the paths of the plates at the time of embedding."""
    plates = uns.get("plates")
    if isinstance(plates, pd.DataFrame) and "path" in plates:
        return [str(path) for path in plates["path"]]
    path = _dict(uns.get("plate")).get("path")
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
    trained = _dict(uns.get("weights")).get("trained")
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


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return [] if value is None else [v.item() if isinstance(v, np.generic) else v for v in value]


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None
