"""How the embeddings were made: channels, intensities, crops, weights and versions, as lines of the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def record_lines(uns: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what ``uns["cellvim"]`` says, as names and texts; what is not there is left out."""
    model, weights, plate = (_dict(uns.get(k)) for k in ("model", "weights", "plate"))
    crop = _dict(_dict(uns.get("preprocessing")).get("crop"))
    run, profile = _dict(uns.get("run")), _dict(uns.get("profile"))
    lines = [
        ("Model", model.get("name")),
        ("Weights", _weights(weights)),
        ("Plate", plate.get("name")),
        ("Plate's path", plate.get("path")),
        ("Pixel size", _micrometres(plate.get("pixel_size_um"))),
        ("One row is", uns.get("unit")),
        ("Cells from", uns.get("cells")),
        ("About the cells", uns.get("cell_notes")),
        ("Crop", _crop(crop)),
        ("Intensities", _intensities(_dict(_dict(uns.get("preprocessing")).get("intensity")))),
        ("Profiles", _profile(profile)),
        ("Device", uns.get("device")),
        ("Seed", uns.get("seed")),
        ("Command", run.get("command")),
        ("Started", run.get("started")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in _dict(uns.get("versions")).items())),
    ]
    return [(name, str(value)) for name, value in lines if value is not None and str(value) != ""]


def channel_rows(uns: Mapping[str, Any]) -> list[list[str]]:
    """Return one row a channel: its name on the plate, the model's name, and the intensities that became 0 and 1."""
    channels = _dict(uns.get("channels"))
    names, meanings = (_list(channels.get(key)) for key in ("plate", "model"))
    intensity = _dict(_dict(uns.get("preprocessing")).get("intensity"))
    low, high = (
        dict(zip(_list(intensity.get("channel_names")), _list(intensity.get(k)), strict=False)) for k in ("low", "high")
    )
    rows = []
    for i, name in enumerate(names):
        meaning = meanings[i] if i < len(meanings) else "–"
        rows.append([str(name), str(meaning), _short(low.get(name)), _short(high.get(name))])
    return rows


def failures(uns: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings, and one row a field that could not be read: where it is, and the reason."""
    failed = uns.get("failed_fields")
    if not isinstance(failed, pd.DataFrame):
        failed = pd.DataFrame({name: _list(values) for name, values in _dict(failed).items()})
    names = [name for name in ("plate", "field", "reason") if name in failed]
    rows = [[str(value) for value in row] for row in failed[names].itertuples(index=False)]
    return [name.capitalize() for name in names] or ["Field", "Reason"], rows


def plate_paths(uns: Mapping[str, Any]) -> list[str]:
    """Return where the plates were when they were embedded."""
    plates = uns.get("plates")
    if isinstance(plates, pd.DataFrame) and "path" in plates:
        return [str(path) for path in plates["path"]]
    path = _dict(uns.get("plate")).get("path")
    return [str(path)] if path else []


def with_first_plate(uns: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``uns["cellvim"]`` with the channels, crop and intensities of the first plate, where there are several."""
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
    """Return what to say about weights that are not trained; None if they are."""
    weights = _dict(uns.get("weights"))
    if not weights:
        return "The AnnData does not say which weights made it: whether they were trained is not known."
    trained = weights.get("trained")
    if trained is None:
        return "The AnnData does not say whether the weights were trained."
    if bool(trained):
        return None
    return (
        "The weights are UNTRAINED (random). Everything on this page shows that the steps work, and is a baseline to "
        "beat; nothing here is a basis for a finding."
    )


def _weights(weights: Mapping[str, Any]) -> str | None:
    if not weights:
        return None
    kind = "trained" if bool(weights.get("trained")) else f"untrained, seed {weights.get('seed', '?')}"
    return f"{kind}; SHA-256 {weights.get('sha256', 'not known')}"


def _crop(crop: Mapping[str, Any]) -> str | None:
    if not crop:
        return None
    size = crop.get("size_px")
    text = f"{size} px" if not isinstance(size, str) else size
    if "size_um" in crop:
        text += f" ({_short(crop['size_um'])} µm)"
    if "input_px" in crop:
        text += f", seen by the model as {crop['input_px']} px"
    rest = [f"{k.replace('_', ' ')} {v}" for k, v in crop.items() if k not in ("size_px", "size_um", "input_px")]
    return ", ".join([text, *rest])


def _intensities(intensity: Mapping[str, Any]) -> str | None:
    if not intensity:
        return None
    method = str(intensity.get("method", "percentile"))
    what = "z-scores" if method == "zscore" else "robust percentiles of the plate became 0 and 1"
    return f"{what}; clipped at {_short(intensity.get('ceiling'))}"


def _profile(profile: Mapping[str, Any]) -> str | None:
    aggregate = _dict(profile.get("aggregate"))
    if not aggregate:
        return None
    return f"{aggregate.get('statistic', '?')} of each well's cells; made last: {profile.get('latest', 'X')}"


def _micrometres(value: Any) -> str | None:
    if value is None:
        return None
    return f"{_short(value)} µm/px" if not isinstance(value, str) else value


def _short(value: Any) -> str:
    return f"{float(value):.5g}" if isinstance(value, int | float | np.number) else "–" if value is None else str(value)


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return [] if value is None else [v.item() if isinstance(v, np.generic) else v for v in value]
