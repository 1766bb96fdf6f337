"""What each part of the page says: its content, or why it has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, InputError
from cellvim.evaluate.controls import separate_stored_controls
from cellvim.profiles.columns import keys, text
from cellvim.report import charts, neighbours, record
from cellvim.report.cells import Cells, crop_data, map_data, show_cells, spread_over_cells
from cellvim.report.findings import Findings, find, summary_table
from cellvim.report.platemaps import plate_maps
from cellvim.report.source import Source
from cellvim.report.tables import frame_table, make_table

ACTIVITY = "Activity of the well"
STEPS = 4


def make(
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
    """Return what the template shows, what the script draws from, and the figures of the summary.

    Parameters
    ----------
    source, embeddings
        The embeddings, opened and as they were given.
    paths
        Plates that the user named.
    profiles, evaluation, color_by, title, max_cells, seed
        As in `cellvim.report.write_report`.
    progress
        Takes the parts done and their number.
    columns
        Roles that the user named.

    Raises
    ------
    CellvimError
        Something that the user named is not there.
    """
    found = _findings(source, embeddings, profiles, evaluation, seed, columns)
    progress(1, STEPS)
    cells = show_cells(source, paths, max_cells=max_cells, seed=seed)
    progress(2, STEPS)
    controls = _controls(source, seed)
    progress(3, STEPS)
    data: dict[str, Any] = {}
    remarks = [warning] if (warning := record.untrained_warning(source.uns)) else []
    content = {
        "title": title or _title(source),
        "warnings": remarks + ([] if source.n_rows else ["The AnnData has no rows: nothing was found, or embedded."]),
        "tiles": _tiles(source, found),
        "subtitle": _subtitle(source),
        "plates": _plates(found, data),
        "map": _map(source, cells, found, color_by, data),
        "crops": _crops(source, cells, data),
        "controls": controls,
        "assay": _assay(found),
        "retrieval": _retrieval(found),
        "summary": _summary(found),
        "doses": _doses(found),
        "neighbours": _neighbours(source, found, cells, data),
        "record": _record(source, found),
        "failed": make_table("Fields that could not be read.", *record.failures(source.uns)),
        "no_failures": (
            "Every field could be read." if "failed_fields" in source.uns else "Nothing is recorded of failed fields."
        ),
    }
    progress(STEPS, STEPS)
    return (
        content,
        data,
        {
            "n_rows": source.n_rows,
            "n_shown": 0 if cells.map is None else len(cells.map.rows),
            "n_crops": 0 if cells.crops is None else len(cells.crops.rows),
            "remarks": remarks
            + [f"No crops: {cells.missing['crops']}" for _ in range("crops" in cells.missing)]
            + cells.notes.get("crops", []),
        },
    )


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
    return f"{source.name}" + (f", embedded by {name}" if name else "")


def _tiles(source: Source, found: Findings) -> list[dict[str, str]]:
    unit = str(source.uns.get("unit", "cell"))
    tiles = [(f"{source.n_rows:,}", f"{unit}s")]
    for role, name in (("well", "wells"), ("plate", "plates"), ("perturbation", "perturbations")):
        if getattr(source.columns, role) is not None:
            number = len(np.unique(source.wells())) if role == "well" else pd.Series(source.text(role)).nunique()
            tiles.append((f"{number:,}", name if number != 1 else name[:-1]))
    channels = source.uns.get("channels")
    if isinstance(channels, dict) and channels.get("plate") is not None:
        tiles.append((f"{len(channels['plate'])}", "channels"))
    tiles.append((f"{source.store.matrices['X']:,}", "features"))
    table = found.table("retrieval")
    if table is not None:
        tiles.append((f"{int(table['active'].sum())} of {len(table)}", "treatments active"))
    return [{"value": value, "name": name} for value, name in tiles]


def _plates(found: Findings, data: dict[str, Any]) -> dict[str, Any]:
    if found.profiles is None:
        return {"missing": found.missing.get("profiles", "There are no profiles of wells.")}
    extra = []
    activity = _activity(found)
    if activity is not None:
        extra.append(
            (
                ACTIVITY.removesuffix(" of the well"),
                "0 is the median negative, 1 the median positive control.",
                activity,
            )
        )
    distance = found.distances()
    if distance is not None:
        label = "Distance from controls" if found.is_on_controls else "Distance from the plate's middle"
        extra.append((label, "Root mean square of the profile's robust z scores.", distance))
    precision = _precision(found)
    if precision is not None:
        extra.append(("mAP of the treatment", "How well its replicates find each other among controls.", precision))
    try:
        data["plates"], notes = plate_maps(found.profiles, found.columns, extra)
    except CellvimError as error:
        return {"missing": str(error)}
    plates = data["plates"]["list"]
    return {
        "missing": "",
        "count": len(plates),
        "marks": any(well["mark"] for plate in plates for well in plate["wells"]),
        "notes": notes + found.notes,
    }


def _activity(found: Findings) -> np.ndarray | None:
    """Return each well's activity between the controls; None where it was not computed."""
    table = found.table("activity")
    if table is None or found.profiles is None:
        return None
    return table.set_index("row")["activity"].reindex(found.profiles.obs_names).to_numpy(float)


def _precision(found: Findings) -> np.ndarray | None:
    """Return for each well the mean average precision of its treatment; None where it was not computed."""
    table = found.table("retrieval")
    if table is None or found.columns is None or found.columns.perturbation is None:
        return None
    names = [n for n in (found.columns.perturbation, found.columns.dose) if n is not None and n in table]
    known = pd.Series(table["mean_average_precision"].to_numpy(float), index=keys(table, names).to_numpy())
    of_wells = keys(found.profiles.obs, names)
    return of_wells.map(known[~known.index.duplicated()]).to_numpy(float)


def _map(source: Source, cells: Cells, found: Findings, color_by: str | None, data: dict[str, Any]) -> dict[str, Any]:
    if cells.map is None:
        return {"missing": cells.missing["map"]}
    extra = {}
    values = _activity(found)
    values = found.distances() if values is None else values
    if values is not None and found.columns.well is not None:
        obs = found.profiles.obs
        plate = text(obs[found.columns.plate]).to_numpy() if found.columns.plate else None
        wells = pd.DataFrame({"plate": plate, "well": text(obs[found.columns.well]).to_numpy()}, dtype=object)
        extra[ACTIVITY] = spread_over_cells(source, wells, values)
    data["map"] = map_data(source, cells, color_by, extra)
    n = len(cells.map.rows)
    shaded = " There are so many that each pixel shows the mean colour of its cells." if n > 20_000 else ""
    if not data["map"]["columns"]:
        cells.notes["map"].append("There is no column to colour by.")
    return {
        "missing": "",
        "n": f"{n:,}",
        "about": f"{cells.map.method} of {n:,} {source.uns.get('unit', 'cell')}s.{shaded}",
        "notes": cells.notes["map"],
    }


def _crops(source: Source, cells: Cells, data: dict[str, Any]) -> dict[str, Any]:
    if cells.crops is None:
        return {"missing": cells.missing.get("crops", "None were cut."), "shown": False}
    data["crops"] = crop_data(source, cells.crops)
    n, side = len(cells.crops.rows), cells.crops.side
    return {
        "missing": "",
        "shown": True,
        "about": (
            f"{n:,} crops of {side} are in this page, drawn evenly from perturbations and wells; the pointer finds the "
            "nearest cell that has one. Intensities are scaled as for the model, and brightened (gamma 0.7)."
        ),
        "notes": cells.notes["crops"],
    }


def _controls(source: Source, seed: int) -> dict[str, Any]:
    if source.n_rows == 0:
        return {"missing": "There are no rows."}
    try:
        results, notes = separate_stored_controls(source.store, source.obs, source.columns, seed=seed)
    except CellvimError as error:
        return {"missing": str(error)}
    first = results[0]
    return {
        "missing": "",
        "about": (
            f"Positive against negative control, cell by cell: logistic regression on {first.n_rows:,} cells of "
            f"{first.n_wells} wells, whole wells held out in {first.n_folds} folds. Chance is 0.5."
        ),
        "chart": charts.dot_chart(
            [(r.features, r.balanced_accuracy, r.balanced_accuracy_std) for r in results],
            label="Balanced accuracy of telling controls apart: "
            + ", ".join(f"{r.features} {r.balanced_accuracy:.3f}" for r in results),
            zero=0.5,
        ),
        "table": make_table(
            "Mean over the folds; ± is the standard deviation over the folds.",
            ["Features", "Numbers", "Balanced accuracy", "±", "AUC"],
            [[r.features, r.n_features, r.balanced_accuracy, r.balanced_accuracy_std, r.auc] for r in results],
        ),
        "notes": notes,
    }


def _assay(found: Findings) -> dict[str, Any]:
    table = found.table("assay")
    if table is None:
        return {"missing": found.reason("assay")}
    names = {
        "plate": "Plate",
        "n_negative": "Negative",
        "n_positive": "Positive",
        "z_prime": "Z′",
        "robust_z_prime": "Robust Z′",
        "ssmd": "SSMD",
    }
    caption = "Assay quality by plate: Z′ above 0.5 is excellent, below 0 the controls overlap."
    return {"missing": "", "table": frame_table(caption, table, names)}


def _retrieval(found: Findings) -> dict[str, Any]:
    table = found.table("retrieval")
    if table is None:
        return {"missing": found.reason("retrieval")}
    columns = found.columns
    names = {c: c for c in (columns.perturbation, columns.dose, columns.mechanism) if c is not None}
    names |= {
        "n_replicates": "Wells",
        "mean_average_precision": "mAP",
        "mean_normalized_average_precision": "Normalised mAP",
        "p_value": "p",
        "corrected_p_value": "q",
        "active": "Active",
    }
    return {
        "missing": "",
        "about": (
            f"Mean average precision: how well the wells of a treatment find each other among controls, from "
            f"{found.use}. Active is q < 0.05."
        ),
        "table": frame_table("One row a treatment of at least two wells.", table, names),
        "notes": [],
    }


def _summary(found: Findings) -> dict[str, Any] | None:
    if found.evaluation is None or not len(found.evaluation.summary):
        return None
    features, rows = summary_table(found.evaluation)
    names = [f"embedding ({features[0]})", *features[1:]]
    return make_table("Each figure for the embedding and for what needs none.", ["Figure", *names], rows)


def _doses(found: Findings) -> dict[str, Any]:
    curves, points = found.table("dose_response"), found.table("dose_points")
    if curves is None or points is None:
        return {"missing": found.reason("dose_response")}
    drawn = charts.dose_charts(curves, points)
    names = {
        "perturbation": "Perturbation",
        "n_doses": "Doses",
        "n_wells": "Wells",
        "ec50": "EC50",
        "hill": "Hill slope",
        "r_squared": "R²",
        "p_value": "p",
        "spearman": "Rank correlation",
        "remark": "Remark",
    }
    notes = [] if len(drawn) == len(curves) else [f"{len(drawn)} of {len(curves)} curves are drawn, the surest first."]
    return {
        "missing": "",
        "about": (
            "Activity against dose: 0 is the median negative, 1 the median positive control. Dots are means of wells; "
            "the line is a four-parameter logistic curve."
        ),
        "charts": drawn,
        "table": frame_table("One row a perturbation.", curves, names),
        "notes": notes,
    }


def _neighbours(source: Source, found: Findings, cells: Cells, data: dict[str, Any]) -> dict[str, Any]:
    if found.profiles is None or found.columns is None:
        return {"missing": found.missing.get("profiles", "There are no profiles of wells.")}
    column = found.columns.perturbation
    if column is None:
        return {"missing": "No column says what was done to the cells. Name it with --perturbation COLUMN."}
    try:
        values = found.values()
        note = []
        if found.use == "X":  # not centred on the controls
            values = values - np.nanmean(values, axis=0)
            note.append("Profiles are not normalised: they are compared after subtracting their mean.")
        perturbation = text(found.profiles.obs[column]).to_numpy(dtype=object)
        names, nearest, similarity = neighbours.nearest_perturbations(perturbation, values)
    except InputError as error:
        return {"missing": str(error)}
    if len(names) > neighbours.MAX_PERTURBATIONS:
        return {"missing": f"There are {len(names):,} perturbations; up to {neighbours.MAX_PERTURBATIONS:,} are shown."}
    crops = {}
    if cells.crops is not None:
        rows = cells.crops.rows
        crops = neighbours.typical_crops(source.text("perturbation")[rows], source.rows(rows))
    wells = pd.Series(perturbation).value_counts()
    about = {name: [["wells", f"{wells[name]:,}"]] for name in names}
    precision, strength = _precision(found), {}
    if precision is not None:
        best = pd.Series(precision).groupby(perturbation).max().dropna()
        strength = best.to_dict()
        for name, value in strength.items():
            about.get(name, []).append(["mAP", f"{value:.2f}"])
    data["neighbours"] = neighbours.neighbour_data(names, nearest, similarity, crops, about, strength)
    return {
        "missing": "",
        "about": (
            f"Cosine similarity of mean profiles ({found.use}). Crops are of the cells nearest to the mean of the "
            "perturbation's cells in this page."
        ),
        "notes": note,
    }


def _record(source: Source, found: Findings) -> dict[str, Any]:
    uns = dict(source.uns)
    if found.profiles is not None:
        uns["profile"] = found.profiles.uns.get("cellvim", {}).get("profile", {})
    table = make_table(
        "Channels in the model's order, and the stored intensities that became 0 and 1.",
        ["On the plate", "To the model", "Becomes 0", "Becomes 1"],
        record.channel_rows(uns),
    )
    lines = record.record_lines(uns) if source.uns else []
    if lines and found.columns is not None:
        taken = ", ".join(f"{role} {name}" for role, name in found.columns.as_dict().items() if name is not None)
        lines.append(("Columns taken", taken))
    return {"channels": table, "lines": lines}
