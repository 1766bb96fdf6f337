"""Sections of the page: the content of each, or the reason why it is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, InputError, listing
from cellvim.evaluate.controls import separate_stored_controls
from cellvim.profiles.columns import text
from cellvim.profiles.representations import matrix
from cellvim.report import figures, record
from cellvim.report.findings import Findings, nearest_perturbations, typical_cells, without_columns
from cellvim.report.projection import Projection
from cellvim.report.source import Source
from cellvim.report.thumbnails import Thumbnails

MAX_TABLE_ROWS = 2000
OBJECT_COLUMN = "Metadata_ObjectNumber"


@dataclass(eq=False)
class Sections:
    """The content of the page. Each section is a method that returns its content or raises the reason for its absence.

    Attributes
    ----------
    source, found
        The embeddings and the results for their wells.
    projection, thumbnails
        Coordinates and crops of the cells; an error if there are none.
    color_by
        Column that initially colours the map.
    seed
        Random seed for the folds of the control separation.
    data
        Values for the page's script, filled by `content`.
    """

    source: Source
    found: Findings
    projection: Projection | CellvimError
    thumbnails: Thumbnails | CellvimError
    color_by: str | None = None
    seed: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    _plots: dict[str, figures.Plot] = field(default_factory=dict)

    def content(self, title: str | None = None) -> dict[str, Any]:
        """Return the values for the template.

        Raises
        ------
        InputError
            The map cannot be coloured by the column that the user named.
        """
        source, found = self.source, self.found
        warnings = [record.untrained_warning(source.uns)]
        warnings.append(None if source.n_rows else "The AnnData has no rows: no cells were found or embedded.")
        uns = dict(source.uns)
        if found.profiles is not None:
            uns["profile"] = found.profiles.uns.get("cellvim", {}).get("profile", {})
        roles = found.columns.as_dict() if found.columns is not None else {}
        channels = ["On the plate", "In the model", "Mapped to 0", "Mapped to 1"]
        about = "Channels in the order of the model, and the stored intensities that are mapped to 0 and 1."
        content = {
            **self._header(title),
            "warnings": [warning for warning in warnings if warning],
            "plates": _or_reason(self._plates),
            "map": self._map() if isinstance(self.projection, Projection) else _absent(self.projection),
            "crops": _or_reason(self._crops),
            "controls": _or_reason(self._controls),
            "assay": _or_reason(self._assay),
            "retrieval": _or_reason(self._retrieval),
            "summary": self._summary(),
            "doses": _or_reason(self._doses),
            "neighbors": _or_reason(self._neighbors),
            "channels": make_table(about, channels, record.channel_rows(uns)),
            "record": record.record_lines(uns if source.uns else {})
            + [(f"column of the {role}", name) for role, name in roles.items() if name is not None],
            "failed": make_table("Fields that could not be read.", *record.failure_table(source.uns)),
            "no_failures": (
                "All fields could be read." if "failed_fields" in source.uns else "Failed fields are not recorded."
            ),
        }
        self.data["figures"] = figures.to_document(self._plots)
        return content

    def _header(self, title: str | None) -> dict[str, Any]:
        source, unit = self.source, self.source.uns.get("unit", "cell")
        counts = {f"{unit}s": source.n_rows}
        for role in ("well", "plate", "perturbation"):
            if getattr(source.columns, role) is not None:
                number = len(np.unique(source.wells())) if role == "well" else pd.Series(source.text(role)).nunique()
                counts[role if number == 1 else f"{role}s"] = number
        counts |= {"channels": len(record.channel_rows(source.uns)), "features": source.store.matrices["X"]}
        tiles = [(f"{number:,}", name) for name, number in counts.items() if number or name != "channels"]
        table = self.found.table("retrieval")
        if table is not None:
            tiles.append((f"{int(table['active'].sum())} of {len(table)}", "treatments active"))
        plates = pd.Series(source.text("plate")).dropna().unique()
        name = f"{len(plates)} plates" if len(plates) > 1 else plates[0] if len(plates) else source.name
        model = source.uns.get("model")
        model = model.get("name") if isinstance(model, dict) else None
        subtitle = source.name + (f", embedded with {model}" if model else "")
        return {"title": title or name, "subtitle": subtitle, "tiles": tiles}

    def _plates(self) -> dict[str, Any]:
        found = self.found
        profiles = found.required_profiles()
        extra = [
            ("Activity", "0 is the median negative, 1 the median positive control.", found.activity()),
            (found.distance_label, "Root mean square of the profile's robust z-scores.", found.distances()),
            ("mAP of the treatment", "How well its replicates retrieve each other among controls.", found.precision()),
        ]
        extra = [measure for measure in extra if measure[2] is not None]
        self.data["plates"], notes = figures.plate_data(profiles, found.columns, extra)
        measures, plates = self.data["plates"]["measures"], self.data["plates"]["list"]
        self._plots |= {f"plate-map-{i}": plot for i, plot in enumerate(figures.plate_maps(len(measures)))}
        return {
            "measures": measures,
            "count": len(plates),
            "marks": any(well["mark"] for plate in plates for well in plate["wells"]),
            "notes": notes + found.notes,
        }

    def _crops(self) -> dict[str, Any]:
        if not isinstance(self.thumbnails, Thumbnails):
            raise self.thumbnails
        rows, obs = self.thumbnails.rows, self.source.obs
        parts = [self.source.text("plate")[rows], self.source.text("well")[rows]]
        for word, name in (("site", self.source.site_column), ("object", OBJECT_COLUMN)):
            parts += [[f"{word} {value}" for value in obs[name].iloc[rows]]] if name in obs else []
        names = [" ".join(str(part) for part in name if part is not None) for name in zip(*parts, strict=True)]
        self.data["crops"] = self.thumbnails.to_dict(names)
        about = (
            f"{len(rows):,} crops of {self.thumbnails.crop_size}, sampled evenly from perturbations and wells, are "
            "included; the pointer finds the nearest cell with a crop. Intensities are scaled as for the model, and "
            "brightened (gamma 0.7)."
        )
        return {"about": about, "notes": self.thumbnails.notes}

    def _map(self) -> dict[str, Any]:
        source, projection, roles = self.source, self.projection, self.source.columns
        rows, notes = projection.rows, list(projection.notes)
        columns, codes, excluded = figures.encode_columns(self._color_table())
        names = [column["name"] for column in columns]
        if self.color_by is not None and self.color_by not in names:
            reason = f" ({dict(excluded)[self.color_by]})" if self.color_by in dict(excluded) else ""
            message = f"The map cannot be coloured by '{self.color_by}'{reason}."
            raise InputError(f"{message} Choose one of {listing(names, 40)}.")
        if excluded:
            notes.append(f"Not available as colours: {'; '.join(f'{name} ({why})' for name, why in excluded[:8])}.")
        if not columns:
            notes.append("There is no column to colour by.")
        wanted = [self.color_by, roles.pert_type, roles.perturbation, roles.dose, roles.well]
        plate = ["plate" if p is None else p for p in source.text("plate")[rows]]  # as `figures.plate_data` names it
        well_codes, well_names = pd.factorize(pd.MultiIndex.from_arrays([plate, source.text("well")[rows]]))
        arrays = {"x": projection.coordinates[:, 0], "y": projection.coordinates[:, 1]}
        arrays["well"] = well_codes.astype(np.uint16 if len(well_names) < 65_536 else np.int32)
        arrays |= {f"code{i}": values for i, values in enumerate(codes)}
        self.data["palettes"] = {"colors": figures.CATEGORY_COLORS, "numbers": figures.VIRIDIS}
        self.data["map"] = {
            "n": len(rows),
            "columns": columns,
            "initial": next((names.index(name) for name in wanted if name in names), 0),
            "identity": [names.index(name) for name in (roles.perturbation, roles.dose) if name in names],
            "wells": [list(well) for well in well_names],
            "export": self._export_columns(arrays),
        }
        if isinstance(self.thumbnails, Thumbnails):
            self.data["map"]["cropped"] = pd.Index(rows).get_indexer(self.thumbnails.rows)  # −1: not on the map
        self._plots["map-figure"] = figures.cell_map(len(rows), projection.method, arrays)
        n = f"{len(rows):,}"
        about = f"{projection.method} of {n} {source.uns.get('unit', 'cell')}s."
        return {"missing": "", "n": n, "about": about, "notes": notes}

    def _color_table(self) -> pd.DataFrame:
        """Return the columns of obs and the activity of the wells for the displayed cells; columns with roles first."""
        source, found, roles = self.source, self.found, self.source.columns
        rows = self.projection.rows
        table = source.obs.iloc[rows].reset_index(drop=True)
        front = [roles.perturbation, roles.dose, roles.mechanism, roles.pert_type, roles.well, roles.plate]
        activity = found.activity()
        activity = found.distances() if activity is None else activity
        if activity is not None and found.columns.well is not None:
            obs, columns = found.profiles.obs, found.columns
            plate = text(obs[columns.plate]).to_numpy() if columns.plate else np.full(len(obs), None)
            known = pd.Series(activity, index=pd.MultiIndex.from_arrays([plate, text(obs[columns.well]).to_numpy()]))
            wells = pd.MultiIndex.from_arrays([source.text("plate")[rows], source.text("well")[rows]])
            front.append("Activity of the well")
            table[front[-1]] = known[~known.index.duplicated()].reindex(wells).to_numpy(np.float64)
        front = list(dict.fromkeys(name for name in front if name is not None))
        return table[front + [name for name in table.columns if name not in front]]

    def _export_columns(self, arrays: dict[str, np.ndarray]) -> list[list[str]]:
        """Add what identifies each displayed row to the arrays; return the headings of the CSV and the arrays' names.

        Texts are stored as the bytes of a JSON list, which Bokeh compresses.
        """
        source, rows = self.source, self.projection.rows
        texts = {"obs_name": source.store.row_names()[rows]}
        for name in (source.columns.plate, source.columns.well, source.site_column, OBJECT_COLUMN):
            if name in source.obs:
                texts[name] = text(source.obs[name].iloc[rows]).to_numpy(dtype=object)
        export = []
        for i, (name, values) in enumerate(texts.items()):
            encoded = json.dumps([None if v is None else str(v) for v in values], separators=(",", ":"))
            arrays[f"text{i}"] = np.frombuffer(encoded.encode(), np.uint8)
            export.append([str(name), f"text{i}"])
        export += [[f"{self.projection.method}{i + 1}", axis] for i, axis in enumerate("xy")]
        spatial = source.matrix("spatial")
        if spatial is not None:
            unit = "um" if str(source.uns.get("spatial_unit", "micrometer")) == "micrometer" else "px"
            for axis, values in zip("xy", spatial[rows].T[:2], strict=True):
                arrays[f"spatial_{axis}"] = values.astype(np.float32)
                export.append([f"field_{axis}_{unit}", f"spatial_{axis}"])
        return export

    def _controls(self) -> dict[str, Any]:
        source = self.source
        if source.n_rows == 0:
            raise InputError("The AnnData has no rows.")
        results, notes = separate_stored_controls(source.store, source.obs, source.columns, seed=self.seed)
        first = results[0]
        self._plots["controls-figure"] = figures.separation_chart(
            [(r.features, r.balanced_accuracy, r.balanced_accuracy_std) for r in results]
        )
        return {
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

    def _assay(self) -> dict[str, Any]:
        names = {"plate": "Plate", "n_negative": "Negative", "n_positive": "Positive"}
        names |= {"z_prime": "Z′", "robust_z_prime": "Robust Z′", "ssmd": "SSMD"}
        caption = "Assay quality per plate: Z′ above 0.5 is excellent; below 0 the controls overlap."
        return {"table": _frame_table(caption, self.found.required_table("assay"), names)}

    def _retrieval(self) -> dict[str, Any]:
        table, roles = self.found.required_table("retrieval"), self.found.columns
        names = {c: c for c in (roles.perturbation, roles.dose, roles.mechanism) if c is not None}
        names |= {"n_replicates": "Wells", "mean_average_precision": "mAP"}
        names |= {"mean_normalized_average_precision": "Normalised mAP", "p_value": "p", "corrected_p_value": "q"}
        names |= {"active": "Active"}
        about = (
            "Mean average precision: how well the wells of a treatment retrieve each other among controls, from "
            f"{self.found.use}. Active: q < 0.05."
        )
        return {"about": about, "table": _frame_table("One row per treatment with at least two wells.", table, names)}

    def _summary(self) -> dict[str, Any] | None:
        if self.found.evaluation is None or not len(self.found.evaluation.summary):
            return None
        wide = self.found.evaluation.wide()
        names = [str(name) for name in wide.columns]
        rows = [
            [f"{task}: {measure}" if task not in measure else measure, *row]
            for (task, measure), row in zip(wide.index, wide.to_numpy(), strict=True)
        ]
        return make_table("Embedding and baselines.", ["Measure", f"embedding ({names[0]})", *names[1:]], rows)

    def _doses(self) -> dict[str, Any]:
        curves, points = self.found.required_table("dose_response"), self.found.table("dose_points")
        charts = figures.dose_charts(curves, points)
        self._plots |= {f"dose-{i}": plot for i, (_, _, plot) in enumerate(charts)}
        names = {"perturbation": "Perturbation", "n_doses": "Doses", "n_wells": "Wells", "ec50": "EC50"}
        names |= {"hill": "Hill slope", "r_squared": "R²", "p_value": "p", "spearman": "Rank correlation"}
        names |= {"remark": "Remark"}
        fewer = len(charts) < len(curves)
        return {
            "about": (
                "Activity against dose: 0 is the median negative, 1 the median positive control. Dots are means of "
                "wells; the line is a four-parameter logistic curve."
            ),
            "charts": [(name, fit) for name, fit, _ in charts],
            "table": _frame_table("One row per perturbation.", curves, names),
            "notes": [f"{len(charts)} of {len(curves)} curves are shown, by p-value."] if fewer else [],
        }

    def _neighbors(self) -> dict[str, Any]:
        source, found = self.source, self.found
        profiles = found.required_profiles()
        if found.columns.perturbation is None:
            raise InputError("No column contains the perturbation. Name it with --perturbation COLUMN.")
        notes = []
        perturbation = text(profiles.obs[found.columns.perturbation]).to_numpy(dtype=object)
        values = matrix(profiles, found.use)
        if found.use == "X":  # not relative to the controls
            values = values - np.nanmean(values, axis=0)
            notes.append("Profiles are not normalised: their mean was subtracted.")
        names, nearest, similarity = nearest_perturbations(perturbation, values)
        typical = {}
        if isinstance(self.thumbnails, Thumbnails):
            rows = self.thumbnails.rows
            typical = typical_cells(source.text("perturbation")[rows], source.store.take(rows))
        wells = pd.Series(perturbation).value_counts()
        precision = found.precision()
        best = {} if precision is None else pd.Series(precision).groupby(perturbation).max().dropna().to_dict()
        self.data["neighbors"] = {
            "initial": max(range(len(names)), key=lambda i: (best.get(names[i], -np.inf), names[i] in typical, -i)),
            "list": [
                {
                    "name": name,
                    "crops": typical.get(name, []),
                    "about": [["wells", f"{wells[name]:,}"]] + ([["mAP", f"{best[name]:.2f}"]] if name in best else []),
                    "nearest": [[j, round(float(s), 4)] for j, s in zip(nearest[i], similarity[i], strict=True)],
                }
                for i, name in enumerate(names)
            ],
        }
        about = (
            f"Cosine similarity of mean profiles ({found.use}). The crops show the cells nearest to the mean of the "
            "perturbation's cells on this page."
        )
        return {"about": about, "notes": notes}


def _or_reason(section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a section with ``missing``, the reason why there is none or an empty text."""
    try:
        return {"missing": "", "about": "", "notes": [], **section()}
    except CellvimError as error:
        return _absent(error)


def _absent(error: CellvimError) -> dict[str, Any]:
    return {"missing": without_columns(str(error))}


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

    def cell(value: Any, number: bool) -> dict[str, Any]:
        key = None
        if number:  # the key for sorting
            key = "" if pd.isna(value) or not np.isfinite(value) else repr(float(value))
        return {"text": format_value(value), "value": key, "number": number}

    return {
        "caption": caption,
        "columns": [{"name": str(name), "number": number} for name, number in zip(columns, numeric, strict=True)],
        "rows": [[cell(value, number) for value, number in zip(row, numeric, strict=True)] for row in shown],
        "search": len(shown) > 12,
    }


def format_value(value: Any) -> str:
    """Return a value as it is displayed in a table."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if value is None or pd.isna(value) or (_is_number(value) and not np.isfinite(value)):
        return "–"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if not _is_number(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.3f}" if value != round(value) or abs(value) < 10 else f"{value:,.0f}"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    return value is None or value is pd.NA or isinstance(value, int | float | np.number)


def _frame_table(caption: str, frame: pd.DataFrame, names: dict[str, str]) -> dict[str, Any]:
    """Return a table of some columns, given as ``{column: heading}``; missing ones are left out."""
    names = {column: heading for column, heading in names.items() if column in frame}
    rows = list(frame[list(names)].astype(object).itertuples(index=False, name=None))
    return make_table(caption, list(names.values()), rows)
