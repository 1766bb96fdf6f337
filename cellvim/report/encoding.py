"""How numbers and names travel into the page: arrays as base64, names as JSON that no HTML can break out of."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def to_json(data: Any) -> str:
    """Return JSON that can stand in a ``<script>`` element: no ``<``, ``>`` or ``&`` is left in it.

    Parameters
    ----------
    data
        Dicts, lists, text, numbers (NaN and infinity become null), NumPy scalars and arrays (become lists).
    """
    text = json.dumps(_plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def pack(values: np.ndarray) -> dict[str, str]:
    """Return an array of unsigned numbers as ``{"type": "u8" | "u16", "data": base64}``, little-endian."""
    kinds = {np.dtype(np.uint8): "u8", np.dtype(np.uint16): "u16"}
    data = np.ascontiguousarray(values)
    return {
        "type": kinds[data.dtype],
        "data": base64.b64encode(data.astype(data.dtype.newbyteorder("<")).tobytes()).decode("ascii"),
    }


def quantise(values: np.ndarray, kind: type[np.unsignedinteger] = np.uint16) -> tuple[np.ndarray, float, float]:
    """Return numbers in equal steps from their least to their greatest, and these two.

    Parameters
    ----------
    values
        (n,) numbers.
    kind
        Unsigned type of the result; its largest value stands for what is not finite.

    Returns
    -------
    codes, low, high
        ``low + codes / (largest − 1) · (high − low)`` is the value again, to half a step.
    """
    missing = np.iinfo(kind).max
    values = np.asarray(values, dtype=np.float64)
    good = np.isfinite(values)
    low, high = (float(values[good].min()), float(values[good].max())) if good.any() else (0.0, 0.0)
    codes = np.full(len(values), missing, kind)
    width = high - low
    if width > 0 and math.isfinite(width):
        codes[good] = np.rint((values[good] - low) / width * (missing - 1)).astype(kind)
    else:
        codes[good] = 0
    return codes, low, high


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, np.ndarray):
        return _plain(data.tolist())
    if isinstance(data, bool | np.bool_):
        return bool(data)
    if isinstance(data, int | np.integer):
        return int(data)
    if isinstance(data, float | np.floating):
        return float(data) if math.isfinite(data) else None
    return None if data is None else str(data)
