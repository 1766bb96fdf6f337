"""Tables of the page: what a cell shows, and the number that it is sorted by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

MAX_ROWS = 2000


def make_table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, search: bool | None = None
) -> dict[str, Any]:
    """Return a table for the template.

    Parameters
    ----------
    caption
        What it shows.
    columns
        Headings.
    rows
        Values; a column is one of numbers if all its values are numbers or missing.
    search
        Whether rows can be searched; by default if there are more than a dozen.
    """
    shown = list(rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        caption += f" The first {MAX_ROWS:,} of {len(rows):,} rows are shown."
    numeric = [bool(shown) and all(_is_number(row[c]) for row in shown) for c in range(len(columns))]
    return {
        "caption": caption,
        "columns": [{"name": str(name), "number": number} for name, number in zip(columns, numeric, strict=True)],
        "rows": [[_cell(value, number) for value, number in zip(row, numeric, strict=True)] for row in shown],
        "search": len(shown) > 12 if search is None else search,
    }


def frame_table(caption: str, frame: pd.DataFrame, names: dict[str, str]) -> dict[str, Any]:
    """Return a table of chosen columns, ``{column: heading}``; those that are not there are left out."""
    known = {column: heading for column, heading in names.items() if column in frame}
    rows = [list(row) for row in frame[list(known)].astype(object).itertuples(index=False, name=None)]
    return make_table(caption, list(known.values()), rows)


def short(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None or value is pd.NA:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        if not np.isfinite(value):
            return "–"
        if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
            return f"{value:.2e}"
        return f"{value:,.3f}" if value != round(value) or abs(value) < 10 else f"{value:,.0f}"
    return str(value)


def _cell(value: Any, number: bool) -> dict[str, Any]:
    key = None
    if number:
        finite = value is not None and value is not pd.NA and np.isfinite(float(value))
        key = repr(float(value)) if finite else ""
    return {"text": short(value), "value": key, "number": number}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    return value is None or value is pd.NA or isinstance(value, int | float | np.number)
