"""Plate maps: a number for each well of each plate, of how many cells, how good they are and what was done to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.data.wells import MAX_COLUMNS, MAX_ROWS, well_position
from cellvim.errors import InputError, MetadataError
from cellvim.profiles.columns import OBJECT_COUNT, Columns, is_value, text

if TYPE_CHECKING:
    from anndata import AnnData

FORMATS = ((2, 3), (4, 6), (6, 8), (8, 12), (16, 24), (MAX_ROWS, MAX_COLUMNS))  # rows and columns of usual plates
MAX_MEASURES, MAX_PLATES = 12, 60
_LABELS = {
    "qc_focus": "Focus",
    "qc_area_ratio": "Area ratio",
    "qc_border": "At the border",
    "qc_debris": "Debris",
    "area_um2": "Area, µm²",
    "area_px": "Area, px",
}
_HELP = {
    "qc_focus": "Mean over the well's cells of the Laplacian's variance by brightness; lower is blurred.",
    "qc_area_ratio": "Area by the median of the field.",
    "qc_border": "Share of cells that touch the border of their field.",
    "qc_debris": "Share of objects that are too small or too large for one nucleus.",
    "touches_border": "Share of cells that touch the border of their field.",
}


def plate_maps(
    profiles: AnnData, columns: Columns, extra: Sequence[tuple[str, str, np.ndarray]]
) -> tuple[dict[str, Any], list[str]]:
    """Return what the page draws plate maps from.

    Parameters
    ----------
    profiles
        One row a well, as `cellvim.profile` makes them.
    columns
        Which column says what.
    extra
        Further measures: name, what it is, and (n,) values.

    Returns
    -------
    maps : dict
        ``measures`` (label, help, zero: whether the scale begins at 0) and ``list`` of plates, each with its size,
        wells and values.
    notes : list of str
        What is not shown.

    Raises
    ------
    InputError
        There is no column of wells, or no well lies on a plate.
    """
    if columns.well is None:
        raise InputError("No column says which well a row is of, so there is nothing to place on a plate.")
    obs = profiles.obs
    position = pd.DataFrame([_position(well) for well in text(obs[columns.well])], columns=["row", "column"])
    known = position["row"].notna().to_numpy()
    notes = []
    if not known.all():
        names = text(obs[columns.well])[~known].dropna().unique()[:3]
        notes.append(f"{int((~known).sum())} rows have no well on a plate (such as {', '.join(map(repr, names))}).")
    if not known.any():
        raise InputError(f"No value of '{columns.well}' is a well such as A01.")
    plate = text(obs[columns.plate]).fillna("").to_numpy() if columns.plate is not None else np.full(len(obs), "plate")
    measures, values = _measures(obs, extra)
    names = pd.unique(plate[known])
    if len(names) > MAX_PLATES:
        notes.append(f"The first {MAX_PLATES} of {len(names)} plates are shown.")
    marks = _marks(obs, columns)
    about = _about(obs, columns)
    plates = []
    for name in names[:MAX_PLATES]:
        rows = np.flatnonzero(known & (plate == name))
        place = position.iloc[rows].astype(int)
        height, width = _size(int(place["row"].max()) + 1, int(place["column"].max()) + 1)
        wells = [
            {
                "name": str(obs[columns.well].iloc[i]),
                "row": int(position["row"].iloc[i]),
                "column": int(position["column"].iloc[i]),
                "mark": marks[i],
                "about": about[i],
            }
            for i in rows
        ]
        plates.append(
            {
                "name": str(name),
                "rows": height,
                "columns": width,
                "wells": wells,
                "values": [[_rounded(v) for v in column[rows]] for column in values],
            }
        )
    return {"measures": measures, "list": plates}, notes


def _measures(obs: pd.DataFrame, extra: Sequence[tuple[str, str, np.ndarray]]) -> tuple[list[dict], list[np.ndarray]]:
    """Choose the columns that are worth a map: the count, what was passed, quality, then size and intensities."""
    chosen: list[tuple[str, str, bool, np.ndarray]] = []
    if OBJECT_COUNT in obs:
        chosen.append(("Cells", "How many cells the well's profile is of.", True, obs[OBJECT_COUNT].to_numpy(float)))
    chosen += [(label, what, False, np.asarray(numbers, float)) for label, what, numbers in extra]
    numeric = [str(n) for n in obs.columns if pd.api.types.is_numeric_dtype(obs[n])]
    order = [n for n in numeric if n.startswith("qc_")] + [n for n in numeric if n in ("area_um2", "area_px")]
    order += [n for n in numeric if n.startswith("mean_intensity_")]
    for name in order:
        numbers = obs[name].to_numpy(dtype=float, na_value=np.nan)
        if not np.isfinite(numbers).any():
            continue
        what = _HELP.get(name, "")
        if name.startswith("qc_saturated_"):
            if not np.nanmax(numbers):
                continue  # nothing is saturated
            what = "Share of the cells' pixels at the largest value of the pixel type."
        chosen.append((_label(name), what, name.startswith("qc_saturated_"), numbers))
    chosen = chosen[:MAX_MEASURES]
    return [{"label": n, "help": h, "zero": z} for n, h, z, _ in chosen], [v for *_, v in chosen]


def _label(column: str) -> str:
    """Return a heading for a column that `cellvim embed` writes."""
    for prefix, words in (("qc_saturated_", "Saturated"), ("mean_intensity_", "Mean intensity")):
        if column.startswith(prefix):
            return f"{words}, {column.removeprefix(prefix)}"
    return _LABELS.get(column, column)


def _position(well: object) -> tuple[float, float]:
    try:
        return well_position(str(well)) if well is not None else (np.nan, np.nan)
    except MetadataError:
        return np.nan, np.nan


def _size(rows: int, columns: int) -> tuple[int, int]:
    """Return the smallest usual plate that holds these wells."""
    return next(size for size in FORMATS if size[0] >= rows and size[1] >= columns)


def _marks(obs: pd.DataFrame, columns: Columns) -> list[str]:
    if columns.pert_type is None:
        return [""] * len(obs)
    negative, positive = (is_value(obs[columns.pert_type], kind) for kind in (columns.negative, columns.positive))
    return np.where(negative, "negative", np.where(positive, "positive", "")).tolist()


def _about(obs: pd.DataFrame, columns: Columns) -> list[list[list[str]]]:
    """Return what is known of each well, as pairs of name and text."""
    roles = {"perturbation": "Perturbation", "dose": "Dose", "mechanism": "Mechanism", "pert_type": "Kind"}
    parts = [(label, text(obs[getattr(columns, role)])) for role, label in roles.items() if getattr(columns, role)]
    return [
        [[label, str(values.iloc[i])] for label, values in parts if values.iloc[i] not in (None, "")]
        for i in range(len(obs))
    ]


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None
