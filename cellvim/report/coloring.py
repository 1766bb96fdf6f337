"""Columns of obs that the map can be coloured by: codes of categories, or numbers in steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellvim.report.encoding import pack, quantise

MAX_COLUMNS = 60
MAX_CATEGORIES = 4000  # a column of more is a name, not a group
FEW_CELLS = 40_000  # from here on numbers take one byte, not two


@dataclass(frozen=True)
class Coloring:
    """The columns for the page, and the names of those that are not shown, with why."""

    columns: list[dict[str, Any]]
    left_out: list[tuple[str, str]]


def encode_columns(table: pd.DataFrame) -> Coloring:
    """Encode the columns of the shown rows.

    Parameters
    ----------
    table
        One row a shown cell; any columns.

    Returns
    -------
    Coloring
        Each column has ``name``, ``kind`` ("category" or "number") and ``codes``; categories also ``categories``;
        numbers ``low`` and ``high``, the ends of the codes, and ``dark`` and ``bright``, the 1st and 99th percentile.
    """
    columns, left_out = [], []
    for name in table.columns:
        values = table[name]
        if values.isna().all():
            left_out.append((str(name), "no values"))
        elif len(columns) == MAX_COLUMNS:
            left_out.append((str(name), f"after the first {MAX_COLUMNS}"))
        elif (column := _encode(values)) is None:
            left_out.append((str(name), f"more than {MAX_CATEGORIES:,} different values"))
        else:
            columns.append({"name": str(name), **column})
    return Coloring(columns, left_out)


def _encode(values: pd.Series) -> dict[str, Any] | None:
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return _numbers(values)
    if pd.api.types.is_datetime64_any_dtype(values):
        values = values.astype(str)
    codes, categories = pd.factorize(values.astype(object).where(values.notna(), None).map(_text), sort=True)
    if len(categories) > MAX_CATEGORIES:
        return None
    kind = np.uint8 if len(categories) < 255 else np.uint16
    codes = np.where(codes < 0, np.iinfo(kind).max, codes).astype(kind)
    return {"kind": "category", "categories": [str(c) for c in categories], "codes": pack(codes)}


def _numbers(values: pd.Series) -> dict[str, Any]:
    numbers = pd.to_numeric(values, errors="coerce").astype("float64").to_numpy(dtype=np.float64, na_value=np.nan)
    codes, low, high = quantise(numbers, np.uint16 if len(numbers) <= FEW_CELLS else np.uint8)
    finite = numbers[np.isfinite(numbers)]
    dark, bright = np.percentile(finite, [1, 99]) if len(finite) else (0.0, 0.0)
    if dark == bright:
        dark, bright = low, high
    whole = bool(len(finite)) and bool((finite == np.rint(finite)).all())
    return {
        "kind": "number",
        "low": low,
        "high": high,
        "dark": float(dark),
        "bright": float(bright),
        "whole": whole,
        "codes": pack(codes),
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)
