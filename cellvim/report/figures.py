"""Bokeh figures of a report: map of cells, plate maps, separation of controls, dose–response curves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from bokeh.document import Document
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    Label,
    LassoSelectTool,
    LinearColorMapper,
    Plot,
    Range1d,
    Span,
    TapTool,
    WheelZoomTool,
)
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from cellvim.data.wells import MAX_COLUMNS, MAX_ROWS, well_name, well_position
from cellvim.errors import InputError, MetadataError
from cellvim.evaluate.dose_response import logistic
from cellvim.profiles.columns import OBJECT_COUNT, Columns, is_value, text

if TYPE_CHECKING:
    from anndata import AnnData

# Rows and columns of the usual plates
FORMATS = ((2, 3), (4, 6), (6, 8), (8, 12), (16, 24), (MAX_ROWS, MAX_COLUMNS))
MAX_MEASURES, MAX_PLATES, MAX_CURVES = 12, 60, 24
MAX_COLOR_COLUMNS = 60
MAX_CATEGORIES = 4000  # a column with more is an identifier, not a group
TWO_BYTE_CELLS = 40_000  # above this number of cells, numbers take one byte instead of two
# Distinguishable without red–green vision (Okabe and Ito; Tol) and on a light and a dark page
CATEGORY_COLORS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"),
    *("#94679D", "#8C960F", "#AA4455", "#44AA99", "#7878DC", "#966439"),
)
NEUTRAL, ACCENT = "#9AA3AD", "#2F7FD1"
VIRIDIS = Viridis256[32:]  # without its darkest part, which is invisible on a dark page
_LABELS = {
    "qc_focus": ("Focus", "Variance of the Laplacian divided by the brightness, mean over the cells; low if blurred."),
    "qc_area_ratio": ("Area ratio", "Area divided by the median of the field."),
    "qc_border": ("At the border", "Fraction of cells that touch the border of their field."),
    "qc_debris": ("Debris", "Fraction of objects that are too small or too large for one nucleus."),
    "area_um2": ("Area, µm²", ""),
    "area_px": ("Area, px", ""),
}


def _new_figure(**options: Any) -> Plot:
    """Return an empty figure in the style of the page, by default without tools."""
    options = {"tools": "", "toolbar_location": None} | options
    return figure(
        sizing_mode="stretch_width",
        min_border=4,
        outline_line_color=None,
        background_fill_color=None,
        border_fill_color=None,
        **options,
    )


def _add_color_bar(plot: Plot, mapper: LinearColorMapper, place: str, **options: Any) -> None:
    bar = ColorBar(
        color_mapper=mapper,
        background_fill_color=None,
        bar_line_color=None,
        major_tick_line_color=None,
        major_label_text_font_size="11px",
        major_label_text_color=NEUTRAL,
        **options,
    )
    plot.add_layout(bar, place)


def to_document(figures: Mapping[str, Plot]) -> dict[str, Any]:
    """Return a Bokeh ``document`` as JSON values and its ``roots``: the ``id`` of each element by that of its figure.

    Models are renumbered, because Bokeh counts those of the process: the same figures make the same document.
    """
    document = Document()
    for plot in figures.values():
        document.add_root(plot)
    numbers: dict[str, str] = {}

    def renumber(match: re.Match) -> str:
        return f'"id": "{numbers.setdefault(match[1], f"p{len(numbers)}")}"'

    made = json.loads(re.sub(r'"id": "(p\d+)"', renumber, json.dumps(document.to_json(deferred=False))))
    return {"document": made, "roots": {numbers[plot.id]: element for element, plot in figures.items()}}


def cell_map(n_cells: int, method: str, arrays: Mapping[str, np.ndarray]) -> Plot:
    """Return the map of cells; the page's script fills its data source "cells" from the arrays, kept in its tags."""
    mapper = LinearColorMapper(palette=VIRIDIS, low=0, high=1, nan_color=NEUTRAL, name="cell-colors")
    lasso = LassoSelectTool(continuous=False)
    made = _new_figure(
        name="map",
        tags=[dict(arrays)],
        tools=[lasso, "box_select", "pan", WheelZoomTool(modifiers="ctrl"), "zoom_in", "zoom_out", "reset", "save"],
        active_drag=lasso,
        toolbar_location="above",
        aspect_ratio=1.3,
        lod_threshold=20_000,  # draw fewer cells while panning
        x_axis_label=f"{method} 1",
        y_axis_label=f"{method} 2",
    )
    made.axis.ticker = []
    made.toolbar.logo = None
    made.scatter(
        "x",
        "y",
        source=ColumnDataSource({"x": [], "y": [], "color": []}, name="cells"),
        size=float(np.clip(320 / np.sqrt(n_cells), 2, 10)),
        color={"field": "color", "transform": mapper},
        line_color=None,
        alpha=0.8,
        nonselection_alpha=0.15,
        nonselection_fill_color=NEUTRAL,
        nonselection_line_color=None,
    )
    _add_color_bar(made, mapper, "right", name="cell-color-bar", width=12, padding=4)
    return made


def plate_maps(n_measures: int) -> list[Plot]:
    """Return one plate map per measure; the page's script fills the shared data source "wells" of the chosen plate."""
    names = ("x", "y", "marker", "mark_size", *(f"value{i}" for i in range(n_measures)))
    source = ColumnDataSource({name: [] for name in names}, name="wells")
    x_range, y_range = Range1d(name="plate-columns"), Range1d(name="plate-rows")
    tickers = {axis: FixedTicker(ticks=[], name=f"plate-{axis}-ticks") for axis in ("column", "row")}
    maps = []
    for i in range(n_measures):
        mapper = LinearColorMapper(palette=VIRIDIS, nan_color="rgba(0, 0, 0, 0)", name=f"plate-colors-{i}")
        made = _new_figure(
            name=f"plate-map-{i}",
            x_range=x_range,
            y_range=y_range,
            tools=[TapTool()],
            x_axis_location="above",
            aspect_ratio=1.25,
        )
        made.grid.visible = False
        made.axis.axis_line_alpha = made.axis.major_tick_line_alpha = made.axis.minor_tick_line_alpha = 0
        made.xaxis.ticker, made.yaxis.ticker = tickers["column"], tickers["row"]
        made.yaxis.major_label_overrides = {r: well_name(r - 1, 0)[:-2] for r in range(1, MAX_ROWS + 1)}
        made.rect(
            "x",
            "y",
            0.9,
            0.9,
            source=source,
            fill_color={"field": f"value{i}", "transform": mapper},
            line_color=NEUTRAL,
            line_width=0.5,
            nonselection_fill_alpha=0.35,
            selection_line_color=ACCENT,
            selection_line_width=2.5,
        )
        made.scatter("x", "y", source=source, size="mark_size", marker="marker", color="white", line_color="black")
        _add_color_bar(made, mapper, "below", orientation="horizontal", height=8, padding=6)
        maps.append(made)
    return maps


def separation_chart(rows: Sequence[tuple[str, float, float]]) -> Plot:
    """Return a chart of the balanced accuracy with its standard deviation for each set of features.

    Parameters
    ----------
    rows
        Name, mean and standard deviation.
    """
    rows = [row for row in rows if np.isfinite(row[1])]
    names, mean, deviation = ([row[k] for row in rows] for k in range(3))
    deviation = np.nan_to_num(deviation)
    lowest = np.min(np.subtract(mean, deviation), initial=0.4)
    made = _new_figure(
        y_range=list(reversed(names)),
        x_range=(max(0.0, np.floor(lowest * 10) / 10), 1.02),
        x_axis_label="balanced accuracy",
        height=70 + 36 * len(rows),
    )
    made.add_layout(Span(location=0.5, dimension="height", line_dash="dashed", line_color=NEUTRAL))
    made.segment(np.subtract(mean, deviation), names, np.add(mean, deviation), names, line_width=2, line_color=NEUTRAL)
    made.scatter(mean, names, size=10, color=ACCENT)
    return made


def dose_charts(curves: pd.DataFrame, points: pd.DataFrame) -> list[tuple[str, str, Plot]]:
    """Return the name, a summary of the fit and a chart for each perturbation, the smallest p-value first.

    Parameters
    ----------
    curves, points
        Results of `cellvim.evaluate.dose_response.dose_response`.
    """
    numbers = ("bottom", "top", "ec50", "hill", "r_squared", "p_value")
    order = curves.astype(dict.fromkeys(numbers, float))  # a stored evaluation may contain None
    order = order.sort_values(["p_value", "perturbation"], na_position="last", kind="stable")
    points_of = dict(list(points.groupby("perturbation", observed=True)))
    charts = []
    for curve in order.head(MAX_CURVES).to_dict("records"):
        if curve["perturbation"] not in points_of:
            continue
        fitted = np.isfinite(curve["ec50"])
        fit = str(curve["remark"] or "No curve was fitted.")
        if fitted:
            fit = f"EC50 {curve['ec50']:.3g}" + ("" if curve["in_range"] else " (outside the doses)")
            fit += f", R² {curve['r_squared']:.2f}" if np.isfinite(curve["r_squared"]) else ""
            fit += f", p {curve['p_value']:.2g}" if np.isfinite(curve["p_value"]) else ""
            fit += f", {curve['n_wells']} wells"
        parameters = [curve[name] for name in ("bottom", "top", "ec50", "hill")] if fitted else None
        charts.append((str(curve["perturbation"]), fit, _dose_chart(points_of[curve["perturbation"]], parameters)))
    return charts


def _dose_chart(points: pd.DataFrame, parameters: Sequence[float] | None) -> Plot:
    """Draw the means of the wells and the logistic curve with these parameters, if any."""
    doses, means = points["dose"].to_numpy(float), points["mean"].to_numpy(float)
    positive = np.unique(doses[doses > 0])
    first, last = (positive[0], positive[-1]) if len(positive) else (1.0, 1.0)
    zero = first / 4  # a dose of 0 is drawn left of the lowest dose
    ticks = {zero: "0"} if (doses == 0).any() else {}
    chosen = positive[np.unique(np.linspace(0, len(positive) - 1, min(6, len(positive))).round().astype(int))]
    ticks |= {float(dose): f"{dose:g}" for dose in chosen}
    shown = np.append(means[np.isfinite(means)], [0.0, 1.0])
    margin = 0.08 * np.ptp(shown)
    made = _new_figure(
        x_axis_type="log",
        y_range=(shown.min() - margin, shown.max() + margin),
        x_range=(min(ticks, default=1.0) / 1.3, last * 1.3),
        x_axis_label="dose",
        y_axis_label="activity",
        aspect_ratio=1.6,
    )
    made.xaxis.ticker = list(ticks)
    made.xaxis.major_label_overrides = ticks
    for location, name in ((0, "negative control"), (1, "positive control")):
        made.add_layout(Span(location=location, dimension="width", line_dash="dashed", line_color=NEUTRAL))
        text_style = {"x_units": "screen", "y_offset": 1, "text_font_size": "10px", "text_color": NEUTRAL}
        made.add_layout(Label(x=6, y=location, text=name, **text_style))
    if parameters is not None:
        x = np.geomspace(first, last, 60)
        made.line(x, logistic(x, *parameters), line_width=2, color=ACCENT)
    made.scatter(np.where(doses > 0, doses, zero), means, size=7, color=ACCENT, alpha=0.75)
    return made


def plate_data(
    profiles: AnnData, columns: Columns, extra: Sequence[tuple[str, str, np.ndarray]]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the plate maps.

    Parameters
    ----------
    profiles
        One row per well.
    columns
        Roles of the columns.
    extra
        Additional measures: name, description and (n,) values.

    Returns
    -------
    data : dict
        ``measures`` (label, help, and whether the colour scale starts at 0), and ``list`` of plates with their size,
        wells and values.
    notes : list of str
        Rows and plates that are not shown.

    Raises
    ------
    InputError
        There is no column of wells, or it contains no position on a plate.
    """
    if columns.well is None:
        raise InputError("No column contains the well of each row, so there are no plate maps.")
    obs = profiles.obs
    wells = text(obs[columns.well]).to_numpy()
    positions = np.array([_position(well) for well in wells])
    known = (positions >= 0).all(axis=1)
    notes = []
    if not known.any():
        raise InputError(f"'{columns.well}' contains no well such as A01.")
    if not known.all():
        names = ", ".join(repr(name) for name in pd.unique(wells[~known])[:3])
        notes.append(f"{int((~known).sum())} rows have no position on a plate (such as {names}).")
    plate = text(obs[columns.plate]).fillna("").to_numpy() if columns.plate is not None else np.full(len(obs), "plate")
    names = pd.unique(plate[known])
    if len(names) > MAX_PLATES:
        notes.append(f"The first {MAX_PLATES} of {len(names)} plates are shown.")
    marks = np.full(len(obs), "", dtype=object)
    if columns.pert_type is not None:
        for kind in ("positive", "negative"):
            marks[is_value(obs[columns.pert_type], getattr(columns, kind))] = kind
    roles = {"perturbation": "Perturbation", "dose": "Dose", "mechanism": "Mechanism", "pert_type": "Kind"}
    about = [(label, text(obs[getattr(columns, r)]).to_numpy()) for r, label in roles.items() if getattr(columns, r)]
    measures = _measures(obs, extra)
    plates = []
    for name in names[:MAX_PLATES]:
        rows = np.flatnonzero(known & (plate == name))
        height, width = positions[rows].max(axis=0) + 1
        n_rows, n_columns = next(f for f in FORMATS if f[0] >= height and f[1] >= width)
        in_plate = [
            {
                "name": wells[i],
                "row": positions[i, 0],
                "column": positions[i, 1],
                "mark": marks[i],
                "about": [[label, values[i]] for label, values in about if values[i]],
            }
            for i in rows
        ]
        values = [[float(f"{value:.5g}") for value in values[rows]] for *_, values in measures]
        plates.append({"name": name, "rows": n_rows, "columns": n_columns, "wells": in_plate, "values": values})
    return {
        "measures": [{"label": label, "help": what, "zero": zero} for label, what, zero, _ in measures],
        "list": plates,
    }, notes


def _position(well: str | None) -> tuple[int, int]:
    try:
        return well_position(str(well))
    except MetadataError:
        return -1, -1


def _measures(
    obs: pd.DataFrame, extra: Sequence[tuple[str, str, np.ndarray]]
) -> list[tuple[str, str, bool, np.ndarray]]:
    """Return label, description, whether the scale starts at 0, and values of each plate map."""
    chosen = [(label, what, False, np.asarray(values, float)) for label, what, values in extra]
    if OBJECT_COUNT in obs:
        chosen.insert(0, ("Cells", "Number of cells in the well's profile.", True, obs[OBJECT_COUNT].to_numpy(float)))
    numeric = [str(n) for n in obs.columns if pd.api.types.is_numeric_dtype(obs[n])]
    for prefixes in (("qc_",), ("area_um2", "area_px"), ("mean_intensity_",)):
        for name in (n for n in numeric if n.startswith(prefixes)):
            values = obs[name].to_numpy(dtype=float, na_value=np.nan)
            saturated, intensity = (name.removeprefix(prefix) for prefix in ("qc_saturated_", "mean_intensity_"))
            label, what = _LABELS.get(name, (name, ""))
            if saturated != name:
                label, what = (
                    f"Saturated, {saturated}",
                    "Fraction of the cells' pixels at the maximum of the pixel type.",
                )
            elif intensity != name:
                label = f"Mean intensity, {intensity}"
            if np.isfinite(values).any() and (saturated == name or np.nanmax(values) > 0):
                chosen.append((label, what, saturated != name, values))
    return chosen[:MAX_MEASURES]


def encode_columns(table: pd.DataFrame) -> tuple[list[dict[str, Any]], list[np.ndarray], list[tuple[str, str]]]:
    """Encode columns for colouring the map.

    Parameters
    ----------
    table
        One row per displayed cell; any columns.

    Returns
    -------
    columns : list of dict
        ``name``, ``kind`` ("category" or "number") and ``missing``, the code of missing values. Categories have
        ``categories``; numbers have ``dark`` and ``bright`` (1st and 99th percentile), and either the ``levels`` of the
        codes, or ``low`` and ``step`` (value ≈ low + code · step) and ``whole``, whether all are integers.
    codes : list of numpy.ndarray
        (n,) uint8 or uint16 for each column.
    excluded : list of tuple
        Names of the columns that are not offered, and why.
    """
    columns, codes, excluded = [], [], []
    for name, values in table.items():
        if values.isna().all():
            excluded.append((str(name), "no values"))
        elif len(columns) == MAX_COLOR_COLUMNS:
            excluded.append((str(name), f"after the first {MAX_COLOR_COLUMNS}"))
        elif pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            about, encoded = _encode_numbers(values.to_numpy(dtype=np.float64, na_value=np.nan))
            columns.append({"name": str(name), "kind": "number", **about})
            codes.append(encoded)
        else:
            found, categories = pd.factorize(values.astype(object).where(values.isna(), values.astype(str)), sort=True)
            if len(categories) > MAX_CATEGORIES:
                excluded.append((str(name), f"more than {MAX_CATEGORIES:,} different values"))
                continue
            kind = np.uint8 if len(categories) < 255 else np.uint16
            missing = np.iinfo(kind).max
            about = {"kind": "category", "missing": missing, "categories": list(categories)}
            columns.append({"name": str(name), **about})
            codes.append(np.where(found < 0, missing, found).astype(kind))
    return columns, codes, excluded


def _encode_numbers(values: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    finite = np.isfinite(values)
    good = values[finite] if finite.any() else np.zeros(1)
    low, high = float(good.min()), float(good.max())
    dark, bright = np.percentile(good, [1, 99])
    about = {"dark": dark, "bright": bright} if dark < bright else {"dark": low, "bright": high}
    levels = np.unique(good)
    if len(levels) <= 255:  # such as doses: exact
        codes = np.where(finite, np.searchsorted(levels, values).clip(max=254), 255).astype(np.uint8)
        return {**about, "missing": 255, "levels": levels}, codes
    kind = np.uint16 if len(values) <= TWO_BYTE_CELLS else np.uint8
    missing = np.iinfo(kind).max
    step = (high / (missing - 1) - low / (missing - 1)) or 1.0  # high - low can overflow
    codes = np.full(len(values), missing, kind)
    codes[finite] = np.rint(values[finite] / step - low / step).clip(0, missing - 1)
    whole = bool((good == np.rint(good)).all())
    return {**about, "missing": missing, "low": low, "step": step, "whole": whole}, codes
