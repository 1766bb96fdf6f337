"""Bokeh figures of a report: map of cells, plate maps, separation of controls, dose–response curves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.data.wells import MAX_COLUMNS, MAX_ROWS, well_name, well_position
from cellvim.errors import InputError, MetadataError
from cellvim.profiles.columns import OBJECT_COUNT, Columns, is_value, text

if TYPE_CHECKING:
    from anndata import AnnData
    from bokeh.models import Plot

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
_LABELS = {
    "qc_focus": ("Focus", "Variance of the Laplacian divided by the brightness, mean over the cells; low if blurred."),
    "qc_area_ratio": ("Area ratio", "Area divided by the median of the field."),
    "qc_border": ("At the border", "Fraction of cells that touch the border of their field."),
    "qc_debris": ("Debris", "Fraction of objects that are too small or too large for one nucleus."),
    "area_um2": ("Area, µm²", ""),
    "area_px": ("Area, px", ""),
}


@cache
def viridis() -> tuple[str, ...]:
    """Return the colours for numbers: viridis without its darkest part, which is invisible on a dark page."""
    from bokeh.palettes import Viridis256

    return tuple(Viridis256[32:])


@cache
def bokeh_script() -> str:
    """Return BokehJS, to be embedded in the page.

    Raises
    ------
    InputError
        Bokeh is not installed.
    """
    try:
        import bokeh
    except ImportError as error:
        raise InputError("A report requires Bokeh. Install it: pip install 'cellvim[report]'") from error
    return (Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js").read_text("utf-8")


def to_document(figures: Mapping[str, Plot]) -> dict[str, Any]:
    """Return a Bokeh document as JSON values, the same for the same figures.

    Parameters
    ----------
    figures
        Figures by the ``id`` of their element in the page.

    Returns
    -------
    dict
        ``document``, and ``roots``: the ``id`` of each element by that of its figure.
    """
    from bokeh.document import Document

    document = Document()
    for figure in figures.values():
        document.add_root(figure)
    roots = {figure.id: element for element, figure in figures.items()}
    numbers: dict[str, str] = {}

    def renumber(match: re.Match) -> str:  # Bokeh counts the models of a process
        return f'"id":"{numbers.setdefault(match[1], f"p{len(numbers)}")}"'

    dumped = json.dumps(document.to_json(deferred=False))
    made = json.loads(re.sub(r'"id": "(p\d+)"', renumber, dumped))
    return {"document": made, "roots": {numbers[model]: element for model, element in roots.items()}}


def cell_map(n_cells: int, method: str, arrays: Mapping[str, np.ndarray]) -> Plot:
    """Return the map of cells; the page's script fills its data source "cells" from the arrays, kept in its tags."""
    from bokeh.models import ColorBar, ColumnDataSource, LassoSelectTool, LinearColorMapper, WheelZoomTool
    from bokeh.plotting import figure

    mapper = LinearColorMapper(palette=viridis(), low=0, high=1, nan_color=NEUTRAL, name="cell-colors")
    lasso = LassoSelectTool(continuous=False)
    made = figure(
        name="map",
        tags=[dict(arrays)],
        tools=[lasso, "box_select", "pan", WheelZoomTool(modifiers="ctrl"), "zoom_in", "zoom_out", "reset", "save"],
        active_drag=lasso,
        toolbar_location="above",
        aspect_ratio=1.3,
        lod_threshold=20_000,  # draw fewer cells while panning
        x_axis_label=f"{method} 1",
        y_axis_label=f"{method} 2",
        **_STYLE,
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
    made.add_layout(ColorBar(color_mapper=mapper, name="cell-color-bar", width=12, padding=4, **_BAR), "right")
    return made


def plate_maps(measures: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Return one plate map per measure; the page's script fills the shared data source "wells" of the chosen plate."""
    from bokeh.models import ColorBar, ColumnDataSource, FixedTicker, LinearColorMapper, Range1d, TapTool
    from bokeh.plotting import figure

    names = ("x", "y", "marker", "mark_size", *(f"value{i}" for i in range(len(measures))))
    source = ColumnDataSource({name: [] for name in names}, name="wells")
    x_range, y_range = Range1d(name="plate-columns"), Range1d(name="plate-rows")
    tickers = {axis: FixedTicker(ticks=[], name=f"plate-{axis}-ticks") for axis in ("column", "row")}
    maps = []
    for i in range(len(measures)):
        mapper = LinearColorMapper(palette=viridis(), nan_color="rgba(0, 0, 0, 0)", name=f"plate-colors-{i}")
        made = figure(
            name=f"plate-map-{i}",
            x_range=x_range,
            y_range=y_range,
            tools=[TapTool()],
            toolbar_location=None,
            x_axis_location="above",
            aspect_ratio=1.25,
            **_STYLE,
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
        made.add_layout(ColorBar(color_mapper=mapper, orientation="horizontal", height=8, padding=6, **_BAR), "below")
        maps.append(made)
    return maps


def separation_chart(rows: Sequence[tuple[str, float, float]]) -> Plot:
    """Return a chart of the balanced accuracy with its standard deviation for each set of features.

    Parameters
    ----------
    rows
        Name, mean and standard deviation.
    """
    from bokeh.models import Span
    from bokeh.plotting import figure

    rows = [row for row in rows if np.isfinite(row[1])]
    names, mean, deviation = ([row[k] for row in rows] for k in range(3))
    deviation = np.nan_to_num(deviation)
    lowest = np.min(np.subtract(mean, deviation), initial=0.4)
    made = figure(
        y_range=list(reversed(names)),
        x_range=(max(0.0, np.floor(lowest * 10) / 10), 1.02),
        x_axis_label="balanced accuracy",
        height=70 + 36 * len(rows),
        tools="",
        toolbar_location=None,
        **_STYLE,
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
    order = curves.sort_values(["p_value", "perturbation"], na_position="last", kind="stable")
    charts = []
    for curve in order.head(MAX_CURVES).to_dict("records"):
        own = points[points["perturbation"] == curve["perturbation"]]
        if len(own):
            charts.append((str(curve["perturbation"]), _fit_summary(curve), _dose_chart(curve, own)))
    return charts


def _dose_chart(curve: dict[str, Any], points: pd.DataFrame) -> Plot:
    from bokeh.models import Label, Span
    from bokeh.plotting import figure

    from cellvim.evaluate.dose_response import logistic

    doses, means = points["dose"].to_numpy(float), points["mean"].to_numpy(float)
    positive = np.unique(doses[doses > 0])
    first, last = (positive[0], positive[-1]) if len(positive) else (1.0, 1.0)
    zero = first / 4  # a dose of 0 is drawn left of the lowest dose
    ticks = {zero: "0"} if (doses == 0).any() else {}
    chosen = positive[np.unique(np.linspace(0, len(positive) - 1, min(6, len(positive))).round().astype(int))]
    ticks |= {float(dose): f"{dose:g}" for dose in chosen}
    shown = np.append(means[np.isfinite(means)], [0.0, 1.0])
    margin = 0.08 * np.ptp(shown)
    made = figure(
        x_axis_type="log",
        y_range=(shown.min() - margin, shown.max() + margin),
        x_range=(min(ticks, default=1.0) / 1.3, last * 1.3),
        x_axis_label="dose",
        y_axis_label="activity",
        aspect_ratio=1.6,
        tools="",
        toolbar_location=None,
        **_STYLE,
    )
    made.xaxis.ticker = list(ticks)
    made.xaxis.major_label_overrides = ticks
    for location, name in ((0, "negative control"), (1, "positive control")):
        made.add_layout(Span(location=location, dimension="width", line_dash="dashed", line_color=NEUTRAL))
        text_style = {"x_units": "screen", "y_offset": 1, "text_font_size": "10px", "text_color": NEUTRAL}
        made.add_layout(Label(x=6, y=location, text=name, **text_style))
    if all(_is_finite(curve.get(name)) for name in ("bottom", "top", "ec50", "hill")):
        x = np.geomspace(first, last, 60)
        y = logistic(x, curve["bottom"], curve["top"], curve["ec50"], curve["hill"])
        made.line(x, y, line_width=2, color=ACCENT)
    made.scatter(np.where(doses > 0, doses, zero), means, size=7, color=ACCENT, alpha=0.75)
    return made


def _fit_summary(curve: dict[str, Any]) -> str:
    if not _is_finite(curve.get("ec50")):
        return str(curve.get("remark") or "No curve was fitted.")
    parts = [f"EC50 {curve['ec50']:.3g}" + ("" if curve.get("in_range") else " (outside the doses)")]
    parts += [f"R² {curve['r_squared']:.2f}"] if _is_finite(curve.get("r_squared")) else []
    parts += [f"p {curve['p_value']:.2g}"] if _is_finite(curve.get("p_value")) else []
    return ", ".join([*parts, f"{curve['n_wells']} wells"])


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
    wells = text(obs[columns.well])
    positions = {well: _position(well) for well in pd.unique(wells)}
    known = wells.map(lambda well: positions[well] is not None).to_numpy(bool)
    notes = []
    if not known.all():
        names = ", ".join(map(repr, wells[~known].dropna().unique()[:3]))
        notes.append(f"{int((~known).sum())} rows have no position on a plate (such as {names}).")
    if not known.any():
        raise InputError(f"'{columns.well}' contains no well such as A01.")
    plate = text(obs[columns.plate]).fillna("").to_numpy() if columns.plate is not None else np.full(len(obs), "plate")
    names = pd.unique(plate[known])
    if len(names) > MAX_PLATES:
        notes.append(f"The first {MAX_PLATES} of {len(names)} plates are shown.")
    measures = _measures(obs, extra)
    marks = np.full(len(obs), "", dtype=object)
    if columns.pert_type is not None:
        for kind in ("positive", "negative"):
            marks[is_value(obs[columns.pert_type], getattr(columns, kind))] = kind
    roles = {"perturbation": "Perturbation", "dose": "Dose", "mechanism": "Mechanism", "pert_type": "Kind"}
    about = [(label, text(obs[getattr(columns, r)]).to_numpy()) for r, label in roles.items() if getattr(columns, r)]
    plates = []
    for name in names[:MAX_PLATES]:
        rows = np.flatnonzero(known & (plate == name))
        places = [positions[wells.iloc[i]] for i in rows]
        height, width = np.max(places, axis=0) + 1
        n_rows, n_columns = next(f for f in FORMATS if f[0] >= height and f[1] >= width)
        plates.append(
            {
                "name": str(name),
                "rows": n_rows,
                "columns": n_columns,
                "wells": [
                    {
                        "name": str(wells.iloc[i]),
                        "row": row,
                        "column": column,
                        "mark": marks[i],
                        "about": [[label, str(values[i])] for label, values in about if values[i] not in (None, "")],
                    }
                    for i, (row, column) in zip(rows, places, strict=True)
                ],
                "values": [
                    [float(f"{v:.5g}") if np.isfinite(v) else None for v in values[rows]] for *_, values in measures
                ],
            }
        )
    return {
        "measures": [{"label": label, "help": what, "zero": zero} for label, what, zero, _ in measures],
        "list": plates,
    }, notes


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
            if not np.isfinite(values).any():
                continue
            if name.startswith("qc_saturated_"):
                if np.nanmax(values):
                    what = "Fraction of the cells' pixels at the maximum of the pixel type."
                    chosen.append((f"Saturated, {name.removeprefix('qc_saturated_')}", what, True, values))
            elif name.startswith("mean_intensity_"):
                chosen.append((f"Mean intensity, {name.removeprefix('mean_intensity_')}", "", False, values))
            else:
                label, what = _LABELS.get(name, (name, ""))
                chosen.append((label, what, False, values))
    return chosen[:MAX_MEASURES]


def _position(well: object) -> tuple[int, int] | None:
    try:
        return well_position(str(well)) if well is not None else None
    except MetadataError:
        return None


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
    for name in table.columns:
        values = table[name]
        encoded = None
        if values.isna().all():
            excluded.append((str(name), "no values"))
        elif len(columns) == MAX_COLOR_COLUMNS:
            excluded.append((str(name), f"after the first {MAX_COLOR_COLUMNS}"))
        elif pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            encoded = _encode_numbers(values.to_numpy(dtype=np.float64, na_value=np.nan))
        elif (encoded := _encode_categories(values)) is None:
            excluded.append((str(name), f"more than {MAX_CATEGORIES:,} different values"))
        if encoded is not None:
            columns.append({"name": str(name), **encoded[0]})
            codes.append(encoded[1])
    return columns, codes, excluded


def _encode_categories(values: pd.Series) -> tuple[dict[str, Any], np.ndarray] | None:
    names = values.astype(object).where(values.notna(), None).map(lambda v: None if v is None else str(v))
    codes, categories = pd.factorize(names, sort=True)
    if len(categories) > MAX_CATEGORIES:
        return None
    kind = np.uint8 if len(categories) < 255 else np.uint16
    missing = np.iinfo(kind).max
    about = {"kind": "category", "missing": missing, "categories": [str(c) for c in categories]}
    return about, np.where(codes < 0, missing, codes).astype(kind)


def _encode_numbers(values: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    kind = np.uint16 if len(values) <= TWO_BYTE_CELLS else np.uint8
    missing = np.iinfo(kind).max
    finite = np.isfinite(values)
    good = values[finite] if finite.any() else np.zeros(1)
    low, high = float(good.min()), float(good.max())
    step = (high / (missing - 1) - low / (missing - 1)) or 1.0  # high - low can overflow
    dark, bright = np.percentile(good, [1, 99])
    if dark == bright:
        dark, bright = low, high
    about = {"kind": "number", "dark": float(dark), "bright": float(bright)}
    levels = np.unique(good)
    if len(levels) <= 255:  # such as doses: exact
        codes = np.where(finite, np.searchsorted(levels, values).clip(max=254), 255).astype(np.uint8)
        return {**about, "missing": 255, "levels": levels}, codes
    codes = np.full(len(values), missing, kind)
    codes[finite] = np.rint(values[finite] / step - low / step).clip(0, missing - 1)
    whole = bool((good == np.rint(good)).all())
    return {**about, "missing": missing, "low": low, "step": step, "whole": whole}, codes


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


_BAR = {
    "background_fill_color": None,
    "bar_line_color": None,
    "major_tick_line_color": None,
    "major_label_text_font_size": "11px",
    "major_label_text_color": NEUTRAL,
}
_STYLE = {
    "sizing_mode": "stretch_width",
    "min_border": 4,
    "outline_line_color": None,
    "background_fill_color": None,
    "border_fill_color": None,
}
