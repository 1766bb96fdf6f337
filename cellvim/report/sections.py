"""Sections of the page: the content of each, or the reason why it is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, ChannelError, InputError, PlateError, listing
from cellvim.evaluate.controls import separate_stored_controls
from cellvim.profiles.columns import text
from cellvim.profiles.representations import matrix
from cellvim.report import figures, record
from cellvim.report.findings import Findings, find, nearest_perturbations, typical_cells, without_columns
from cellvim.report.projection import Projection, project_cells
from cellvim.report.source import Source
from cellvim.report.thumbnails import Thumbnails, make_thumbnails

MAX_TABLE_ROWS = 2000
N_STEPS = 4


def make_sections(
    source: Source,
    embeddings: Any,
    *,
    paths: Sequence[str],
    profiles: Any,
    evaluation: Any,
    color_by: str | None,
    title: str | None,
    max_cells: int,
    seed: int,
    progress: Callable[[int, int], None],
    columns: dict[str, str],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the values for the template, the data for the page's script, and the counts for the summary.

    Parameters
    ----------
    source, embeddings
        The embeddings, opened and as given by the user.
    paths
        Plates named by the user.
    profiles, evaluation, color_by, title, max_cells, seed, progress
        As in `cellvim.report.write_report`.
    columns
        Roles named by the user.

    Raises
    ------
    CellvimError
        Something named by the user does not exist.
    """
    found = _findings(source, embeddings, profiles, evaluation, seed, columns)
    progress(1, N_STEPS)
    thumbnails, crops = _crops(source, paths, seed)
    projection, no_map = None, ""
    try:
        projection = project_cells(
            source.store.take,
            source.wells(),
            existing=source.matrix("X_umap"),
            keep=None if thumbnails is None else thumbnails.rows,
            max_cells=max_cells,
            seed=seed,
        )
    except InputError as error:
        no_map = str(error)
    progress(2, N_STEPS)
    data: dict[str, Any] = {}
    plots: dict[str, Any] = {}
    if thumbnails is not None:
        data["crops"] = thumbnails.to_dict(_row_names(source, thumbnails.rows))
    controls = _controls(source, seed, plots)
    progress(3, N_STEPS)
    warning = record.untrained_warning(source.uns)
    remarks = [warning] if warning else []
    uns = dict(source.uns)
    if found.profiles is not None:
        uns["profile"] = found.profiles.uns.get("cellvim", {}).get("profile", {})
    roles = found.columns.as_dict() if found.columns is not None else {}
    content = {
        "title": title or _title(source),
        "subtitle": _subtitle(source),
        "tiles": _tiles(source, found),
        "warnings": remarks + ([] if source.n_rows else ["The AnnData has no rows: no cells were found or embedded."]),
        "plates": _plates(found, data, plots),
        "map": (
            {"missing": no_map}
            if projection is None
            else _map(source, projection, thumbnails, found, color_by, data, plots)
        ),
        "crops": crops,
        "controls": controls,
        "assay": _assay(found),
        "retrieval": _retrieval(found),
        "summary": _summary(found),
        "doses": _doses(found, plots),
        "neighbors": _neighbors(source, found, thumbnails, data),
        "channels": make_table(
            "Channels in the order of the model, and the stored intensities that are mapped to 0 and 1.",
            ["On the plate", "In the model", "Mapped to 0", "Mapped to 1"],
            record.channel_rows(uns),
        ),
        "record": record.record_lines(uns if source.uns else {})
        + [(f"column of the {role}", name) for role, name in roles.items() if name is not None],
        "failed": make_table("Fields that could not be read.", *record.failure_table(source.uns)),
        "no_failures": (
            "All fields could be read." if "failed_fields" in source.uns else "Failed fields are not recorded."
        ),
    }
    data["figures"] = figures.to_document(plots)
    progress(N_STEPS, N_STEPS)
    summary = {
        "n_rows": source.n_rows,
        "n_shown": 0 if projection is None else len(projection.rows),
        "n_crops": 0 if thumbnails is None else len(thumbnails.rows),
        "remarks": remarks + ([f"No crops: {crops['missing']}"] if crops["missing"] else crops["notes"]),
    }
    return content, data, summary


def make_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return a table for the template.

    Parameters
    ----------
    caption
        Caption of the table.
    columns
        Headings.
    rows
        Values. A column is numeric if all its values are numbers or missing.
    """
    shown = list(rows[:MAX_TABLE_ROWS])
    if len(rows) > MAX_TABLE_ROWS:
        caption += f" The first {MAX_TABLE_ROWS:,} of {len(rows):,} rows are shown."
    numeric = [bool(shown) and all(_is_number(row[c]) for row in shown) for c in range(len(columns))]
    return {
        "caption": caption,
        "columns": [{"name": str(name), "number": number} for name, number in zip(columns, numeric, strict=True)],
        "rows": [[_cell(value, number) for value, number in zip(row, numeric, strict=True)] for row in shown],
        "search": len(shown) > 12,
    }


def format_value(value: Any) -> str:
    """Return a value as it is displayed in a table."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if value is None or pd.isna(value):
        return "–"
    if isinstance(value, float | np.floating):
        if not np.isfinite(value):
            return "–"
        if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
            return f"{value:.2e}"
        return f"{value:,.3f}" if value != round(value) or abs(value) < 10 else f"{value:,.0f}"
    return str(value)


def _frame_table(caption: str, frame: pd.DataFrame, names: dict[str, str]) -> dict[str, Any]:
    """Return a table of some columns, given as ``{column: heading}``; missing ones are left out."""
    names = {column: heading for column, heading in names.items() if column in frame}
    rows = [list(row) for row in frame[list(names)].astype(object).itertuples(index=False, name=None)]
    return make_table(caption, list(names.values()), rows)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    return value is None or value is pd.NA or isinstance(value, int | float | np.number)


def _cell(value: Any, number: bool) -> dict[str, Any]:
    key = None
    if number:
        key = repr(float(value)) if not pd.isna(value) and np.isfinite(float(value)) else ""
    return {"text": format_value(value), "value": key, "number": number}


def _findings(source: Source, embeddings, profiles, evaluation, seed: int, columns: dict[str, str]) -> Findings:
    if source.n_rows == 0 and profiles is None:
        return Findings(missing={"profiles": "The AnnData has no rows."})
    by = [name for name in (source.columns.plate, source.columns.well) if name is not None]
    by = by if source.columns.well is not None else []
    return find(embeddings, by=by, profiles=profiles, evaluation=evaluation, seed=seed, **columns)


def _title(source: Source) -> str:
    plates = [str(p) for p in pd.unique(source.text("plate")) if p is not None]
    if len(plates) == 1:
        return plates[0]
    return f"{len(plates)} plates" if plates else source.name


def _subtitle(source: Source) -> str:
    model = source.uns.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return source.name + (f", embedded with {name}" if name else "")


def _tiles(source: Source, found: Findings) -> list[tuple[str, str]]:
    tiles = [(f"{source.n_rows:,}", f"{source.uns.get('unit', 'cell')}s")]
    for role, name in (("well", "wells"), ("plate", "plates"), ("perturbation", "perturbations")):
        if getattr(source.columns, role) is not None:
            number = len(np.unique(source.wells())) if role == "well" else pd.Series(source.text(role)).nunique()
            tiles.append((f"{number:,}", name if number != 1 else name[:-1]))
    channels = record.channel_rows(source.uns)
    tiles += [(f"{len(channels)}", "channels")] if channels else []
    tiles.append((f"{source.store.matrices['X']:,}", "features"))
    table = found.table("retrieval")
    if table is not None:
        tiles.append((f"{int(table['active'].sum())} of {len(table)}", "treatments active"))
    return tiles


def _plates(found: Findings, data: dict[str, Any], plots: dict[str, Any]) -> dict[str, Any]:
    if found.profiles is None:
        return {"missing": found.missing["profiles"]}
    extra = [
        ("Activity", "0 is the median negative, 1 the median positive control.", found.activity()),
        (found.distance_label, "Root mean square of the profile's robust z-scores.", found.distances()),
        ("mAP of the treatment", "How well its replicates retrieve each other among controls.", found.precision()),
    ]
    try:
        data["plates"], notes = figures.plate_data(
            found.profiles, found.columns, [measure for measure in extra if measure[2] is not None]
        )
    except InputError as error:
        return {"missing": str(error)}
    measures, plates = data["plates"]["measures"], data["plates"]["list"]
    plots |= {f"plate-map-{i}": plot for i, plot in enumerate(figures.plate_maps(measures))}
    return {
        "missing": "",
        "measures": measures,
        "count": len(plates),
        "marks": any(well["mark"] for plate in plates for well in plate["wells"]),
        "notes": notes + found.notes,
    }


def _crops(source: Source, paths: Sequence[str], seed: int) -> tuple[Thumbnails | None, dict[str, Any]]:
    try:
        thumbnails = make_thumbnails(source, paths, seed=seed)
    except (PlateError, ChannelError):
        raise
    except InputError as error:
        return None, {"missing": str(error)}
    about = (
        f"{len(thumbnails.rows):,} crops of {thumbnails.crop_size}, sampled evenly from perturbations and wells, are "
        "included; the pointer finds the nearest cell with a crop. Intensities are scaled as for the model, and "
        "brightened (gamma 0.7)."
    )
    return thumbnails, {"missing": "", "about": about, "notes": thumbnails.notes}


def _map(
    source: Source,
    projection: Projection,
    thumbnails: Thumbnails | None,
    found: Findings,
    color_by: str | None,
    data: dict[str, Any],
    plots: dict[str, Any],
) -> dict[str, Any]:
    rows, roles, notes = projection.rows, source.columns, list(projection.notes)
    table = source.obs.iloc[rows].reset_index(drop=True)
    front = [roles.perturbation, roles.dose, roles.mechanism, roles.pert_type, roles.well, roles.plate]
    activity = found.activity()
    activity = found.distances() if activity is None else activity
    if activity is not None and found.columns.well is not None:
        front.append("Activity of the well")
        table[front[-1]] = _spread_over_cells(source, found, activity)[rows]
    front = list(dict.fromkeys(name for name in front if name is not None))
    table = table[front + [name for name in table.columns if name not in front]]
    columns, codes, excluded = figures.encode_columns(table)
    names = [column["name"] for column in columns]
    if color_by is not None and color_by not in names:
        reason = f" ({dict(excluded)[color_by]})" if color_by in dict(excluded) else ""
        raise InputError(f"The map cannot be coloured by '{color_by}'{reason}. Choose one of {listing(names, 40)}.")
    if excluded:
        notes.append(f"Not available as colours: {'; '.join(f'{name} ({why})' for name, why in excluded[:8])}.")
    if not columns:
        notes.append("There is no column to colour by.")
    wanted = [color_by, roles.pert_type, roles.perturbation, roles.dose, roles.well]
    plate = ["plate" if p is None else p for p in source.text("plate")[rows]]  # as `figures.plate_data` names it
    well_codes, well_names = pd.factorize(pd.MultiIndex.from_arrays([plate, source.text("well")[rows]]))
    arrays = {"x": projection.coordinates[:, 0], "y": projection.coordinates[:, 1]}
    arrays["well"] = well_codes.astype(np.uint16 if len(well_names) < 65_536 else np.int32)
    arrays |= {f"code{i}": values for i, values in enumerate(codes)}
    data["palettes"] = {"colors": figures.CATEGORY_COLORS, "numbers": figures.viridis()}
    data["map"] = {
        "n": len(rows),
        "columns": columns,
        "initial": next((names.index(name) for name in wanted if name in names), 0),
        "identity": [names.index(name) for name in (roles.perturbation, roles.dose) if name in names],
        "wells": [list(well) for well in well_names],
        "export": _export_columns(source, projection, arrays),
    }
    if thumbnails is not None:
        place = np.searchsorted(rows, thumbnails.rows).clip(max=len(rows) - 1)
        data["map"]["cropped"] = np.where(rows[place] == thumbnails.rows, place, -1)  # −1: not on the map
    plots["map-figure"] = figures.cell_map(len(rows), projection.method, arrays)
    n = f"{len(rows):,}"
    return {
        "missing": "",
        "n": n,
        "about": f"{projection.method} of {n} {source.uns.get('unit', 'cell')}s.",
        "notes": notes,
    }


def _export_columns(source: Source, projection: Projection, arrays: dict[str, np.ndarray]) -> list[list[str]]:
    """Add what identifies each displayed row to the arrays; return the headings of the CSV and the arrays' names.

    Texts are stored as the bytes of a JSON list, which Bokeh compresses.
    """
    rows = projection.rows
    texts = {"obs_name": source.store.row_names()[rows]}
    for name in (source.columns.plate, source.columns.well, source.site_column, "Metadata_ObjectNumber"):
        if name in source.obs:
            texts[name] = text(source.obs[name].iloc[rows]).to_numpy(dtype=object)
    export = []
    for i, (name, values) in enumerate(texts.items()):
        encoded = json.dumps([None if v is None else str(v) for v in values], separators=(",", ":"))
        arrays[f"text{i}"] = np.frombuffer(encoded.encode(), np.uint8)
        export.append([str(name), f"text{i}"])
    export += [[f"{projection.method}{i + 1}", axis] for i, axis in enumerate("xy")]
    spatial = source.matrix("spatial")
    if spatial is not None:
        unit = "um" if str(source.uns.get("spatial_unit", "micrometer")) == "micrometer" else "px"
        for axis, values in zip("xy", spatial[rows].T[:2], strict=True):
            arrays[f"spatial_{axis}"] = values.astype(np.float32)
            export.append([f"field_{axis}_{unit}", f"spatial_{axis}"])
    return export


def _row_names(source: Source, rows: np.ndarray) -> list[str]:
    """Return names such as "plate A01 site 1 object 3"."""
    parts = [source.text("plate")[rows], source.text("well")[rows]]
    for word, name in (("site", source.site_column), ("object", "Metadata_ObjectNumber")):
        if name in source.obs:
            parts.append([f"{word} {value}" for value in source.obs[name].iloc[rows]])
    return [" ".join(str(part) for part in name if part is not None) for name in zip(*parts, strict=True)]


def _spread_over_cells(source: Source, found: Findings, values: np.ndarray) -> np.ndarray:
    """Give each cell the value of its well, (wells,) -> (n,); NaN for wells without a value."""
    obs, columns = found.profiles.obs, found.columns
    plate = text(obs[columns.plate]).to_numpy() if columns.plate else np.full(len(obs), None)
    known = pd.Series(values, index=pd.MultiIndex.from_arrays([plate, text(obs[columns.well]).to_numpy()]))
    of_cells = pd.MultiIndex.from_arrays([source.text("plate"), source.text("well")])
    return known[~known.index.duplicated()].reindex(of_cells).to_numpy(np.float64)


def _controls(source: Source, seed: int, plots: dict[str, Any]) -> dict[str, Any]:
    if source.n_rows == 0:
        return {"missing": "The AnnData has no rows."}
    try:
        results, notes = separate_stored_controls(source.store, source.obs, source.columns, seed=seed)
    except CellvimError as error:
        return {"missing": without_columns(str(error))}
    first = results[0]
    plots["controls-figure"] = figures.separation_chart(
        [(r.features, r.balanced_accuracy, r.balanced_accuracy_std) for r in results]
    )
    return {
        "missing": "",
        "about": (
            f"Positive against negative controls, cell by cell: logistic regression on {first.n_rows:,} cells of "
            f"{first.n_wells} wells, with whole wells held out in {first.n_folds} folds. Chance is 0.5."
        ),
        "label": "Balanced accuracy: " + ", ".join(f"{r.features} {r.balanced_accuracy:.3f}" for r in results),
        "table": make_table(
            "Mean over the folds; ± is the standard deviation over the folds.",
            ["Features", "Dimensions", "Balanced accuracy", "±", "AUC"],
            [[r.features, r.n_features, r.balanced_accuracy, r.balanced_accuracy_std, r.auc] for r in results],
        ),
        "notes": notes,
    }


def _assay(found: Findings) -> dict[str, Any]:
    table = found.table("assay")
    if table is None:
        return {"missing": found.reason("assay")}
    names = {"plate": "Plate", "n_negative": "Negative", "n_positive": "Positive"}
    names |= {"z_prime": "Z′", "robust_z_prime": "Robust Z′", "ssmd": "SSMD"}
    caption = "Assay quality per plate: Z′ above 0.5 is excellent; below 0 the controls overlap."
    return {"missing": "", "table": _frame_table(caption, table, names)}


def _retrieval(found: Findings) -> dict[str, Any]:
    table = found.table("retrieval")
    if table is None:
        return {"missing": found.reason("retrieval")}
    roles = found.columns
    names = {c: c for c in (roles.perturbation, roles.dose, roles.mechanism) if c is not None}
    names |= {"n_replicates": "Wells", "mean_average_precision": "mAP"}
    names |= {"mean_normalized_average_precision": "Normalised mAP", "p_value": "p", "corrected_p_value": "q"}
    names |= {"active": "Active"}
    return {
        "missing": "",
        "about": (
            f"Mean average precision: how well the wells of a treatment retrieve each other among controls, from "
            f"{found.use}. Active: q < 0.05."
        ),
        "table": _frame_table("One row per treatment with at least two wells.", table, names),
    }


def _summary(found: Findings) -> dict[str, Any] | None:
    if found.evaluation is None or not len(found.evaluation.summary):
        return None
    wide = found.evaluation.wide()
    names = [str(name) for name in wide.columns]
    rows = [
        [f"{task}: {measure}" if task not in measure else measure, *row]
        for (task, measure), row in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return make_table("Embedding and baselines.", ["Measure", f"embedding ({names[0]})", *names[1:]], rows)


def _doses(found: Findings, plots: dict[str, Any]) -> dict[str, Any]:
    curves, points = found.table("dose_response"), found.table("dose_points")
    if curves is None or points is None:
        return {"missing": found.reason("dose_response")}
    charts = figures.dose_charts(curves, points)
    plots |= {f"dose-{i}": plot for i, (_, _, plot) in enumerate(charts)}
    names = {"perturbation": "Perturbation", "n_doses": "Doses", "n_wells": "Wells", "ec50": "EC50"}
    names |= {"hill": "Hill slope", "r_squared": "R²", "p_value": "p", "spearman": "Rank correlation"}
    names |= {"remark": "Remark"}
    return {
        "missing": "",
        "about": (
            "Activity against dose: 0 is the median negative, 1 the median positive control. Dots are means of wells; "
            "the line is a four-parameter logistic curve."
        ),
        "charts": [(name, fit) for name, fit, _ in charts],
        "table": _frame_table("One row per perturbation.", curves, names),
        "notes": [f"{len(charts)} of {len(curves)} curves are shown, by p-value."] if len(charts) < len(curves) else [],
    }


def _neighbors(source: Source, found: Findings, thumbnails: Thumbnails | None, data: dict[str, Any]) -> dict[str, Any]:
    if found.profiles is None or found.columns is None:
        return {"missing": found.missing["profiles"]}
    if found.columns.perturbation is None:
        return {"missing": "No column contains the perturbation. Name it with --perturbation COLUMN."}
    notes = []
    perturbation = text(found.profiles.obs[found.columns.perturbation]).to_numpy(dtype=object)
    try:
        values = matrix(found.profiles, found.use)
        if found.use == "X":  # not relative to the controls
            values = values - np.nanmean(values, axis=0)
            notes.append("Profiles are not normalised: their mean was subtracted.")
        names, nearest, similarity = nearest_perturbations(perturbation, values)
    except InputError as error:
        return {"missing": str(error)}
    typical = {}
    if thumbnails is not None:
        typical = typical_cells(source.text("perturbation")[thumbnails.rows], source.store.take(thumbnails.rows))
    wells = pd.Series(perturbation).value_counts()
    precision = found.precision()
    best = {} if precision is None else pd.Series(precision).groupby(perturbation).max().dropna().to_dict()
    data["neighbors"] = {
        "initial": max(range(len(names)), key=lambda i: (best.get(names[i], -np.inf), names[i] in typical, -i)),
        "list": [
            {
                "name": name,
                "crops": typical.get(name, []),
                "about": [["wells", f"{wells[name]:,}"]] + ([["mAP", f"{best[name]:.2f}"]] if name in best else []),
                "nearest": [[int(j), round(float(s), 4)] for j, s in zip(nearest[i], similarity[i], strict=True)],
            }
            for i, name in enumerate(names)
        ],
    }
    return {
        "missing": "",
        "about": (
            f"Cosine similarity of mean profiles ({found.use}). The crops show the cells nearest to the mean of the "
            "perturbation's cells on this page."
        ),
        "notes": notes,
    }
