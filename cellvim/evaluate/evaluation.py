"""``cellvim evaluate``: all measures that a table of profiles allows, for the profiles and for baselines.

Measures that cannot be computed, because a column or replicates are missing, are listed with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, InputError, MetadataError, listing
from cellvim.evaluate.assay import activity_or_distance, activity_scores, assay_quality, distance_scores
from cellvim.evaluate.batch_effects import batch_effects
from cellvim.evaluate.classification import classify, split_by_group
from cellvim.evaluate.consistency import replicate_consistency
from cellvim.evaluate.dose_response import dose_response
from cellvim.evaluate.features import Features, feature_sets
from cellvim.evaluate.mechanism import mechanism_map, nearest_mechanism
from cellvim.evaluate.retrieval import NULL_SIZE, replicate_map
from cellvim.files import write_atomic
from cellvim.profiles.columns import (
    Columns,
    column_of,
    find_columns,
    find_treatments,
    is_value,
    keys,
    negative_controls,
    require,
    text,
)
from cellvim.profiles.representations import latest_representation

if TYPE_CHECKING:
    from anndata import AnnData
    from rich.table import Table

FORMAT = 1  # of the JSON
BETWEEN, DISTANCE = "between the controls", "distance from the negative controls"  # definitions of activity
TASKS = ("retrieval", "consistency", "mechanism", "classification", "batch_effects", "assay", "dose_response")


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_profiles`.

    Attributes
    ----------
    summary
        One row per measure and set of features: ``task``, ``measure``, ``features``, ``value``, ``n`` (number of
        values averaged, or the denominator of a share), ``best`` (value of a perfect result), ``is_baseline``.
    tables
        Details, each with a column ``features``. Those that could be computed of:

        ``retrieval``
            From `replicate_map`, one row per treatment.
        ``consistency``
            From `replicate_consistency`, one row per treatment.
        ``mechanism``
            From `nearest_mechanism`, one row per treatment.
        ``mechanism_retrieval``
            From `mechanism_map`, one row per mechanism.
        ``classification``
            From `classify`, one row per classifier, with the columns ``label`` and ``held_out``.
        ``batch_effects``
            From `batch_effects`, one row per measure, with the column ``rows`` ("negative controls" or "all").
        ``activity``
            From `activity_scores`, or `distance_scores` if there are no positive controls (see ``score``), one row per
            well, named by ``row``; for the first set of features only.
        ``assay``
            From `assay_quality`, one row per plate.
        ``dose_response``, ``dose_points``
            From `dose_response`, one row per perturbation, and one per perturbation and dose.
    left_out
        What could not be computed: ``task`` and ``reason``.
    settings
        Representations, columns, seed, and numbers of rows and plates.
    """

    summary: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    left_out: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)

    def wide(self) -> pd.DataFrame:
        """Return the summary with one column per set of features; the index is task and measure."""
        order = self.summary.drop_duplicates(["task", "measure"])[["task", "measure"]]
        table = self.summary.pivot(index=["task", "measure"], columns="features", values="value")
        return table.loc[pd.MultiIndex.from_frame(order), list(dict.fromkeys(self.summary["features"]))]

    def value(self, measure: str, features: str | None = None) -> float:
        """Return one value of the summary, by default for the first set of features.

        Raises
        ------
        InputError
            It was not computed.
        """
        rows = self.summary[self.summary["measure"] == measure]
        if features is not None:
            rows = rows[rows["features"] == features]
        if rows.empty:
            known = listing(self.summary["measure"].unique(), 40)
            raise InputError(f"'{measure}' was not computed; available: {known}.")
        return float(rows["value"].iloc[0])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; numbers that are not finite become None."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "summary": _records(self.summary),
            "left_out": _records(self.left_out),
            "tables": {name: _records(table) for name, table in self.tables.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, atomically.

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        write_atomic(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read a file written by `save`.

        Raises
        ------
        InputError
            The file does not exist, or is not an evaluation.
        """
        try:
            found = json.loads(Path(path).read_text("utf-8"))
            tables = {name: pd.DataFrame(rows) for name, rows in found["tables"].items()}
            summary, left_out, settings = (found[name] for name in ("summary", "left_out", "settings"))
            return cls(pd.DataFrame(summary), tables, pd.DataFrame(left_out, columns=["task", "reason"]), settings)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not an evaluation written by cellvim evaluate.") from error


def evaluate_profiles(
    adata: AnnData,
    *,
    use: str | Sequence[str] | None = None,
    tasks: Sequence[str] = TASKS,
    label: str | None = None,
    control: str = "negcon",
    positive: str = "poscon",
    null_size: int = NULL_SIZE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **columns: str | None,
) -> Evaluation:
    """Compute all measures that the profiles allow, for the profiles and for baselines.

    Parameters
    ----------
    adata
        Profiles, one row per well, as returned by `cellvim.profile`.
    use
        Representations to evaluate: "X", layers, entries of ``obsm``. By default the latest.
    tasks
        Tasks to compute.
    label
        Column of ``obs`` to classify; by default the treatment.
    control
        Value of the control column for negative controls, or COLUMN:VALUE.
    positive
        Value of the control column for positive controls, or COLUMN:VALUE.
    null_size
        Number of random ranks and draws for p values.
    seed
        Random seed.
    progress
        Called with the number of tasks done and the total.
    **columns
        Name of the column of ``obs`` for ``plate``, ``well``, ``batch``, ``perturbation``, ``dose``, ``mechanism`` or
        ``pert_type``; found by their common names by default.

    Returns
    -------
    Evaluation

    Raises
    ------
    CellvimError
        A named column or representation does not exist, a well has several rows, or nothing can be computed.
    """
    if wrong := [task for task in tasks if task not in TASKS]:
        raise InputError(f"There is no task {listing(wrong)}; expected {listing(TASKS)}.")
    if adata.n_obs == 0:
        raise InputError("There are no profiles: the AnnData has no rows.")
    found = find_columns(adata.obs, negative=control, positive=positive, **columns)
    if label is not None:
        require(adata.obs, label, option="--label")
    _check_one_row_per_well(adata, found)
    names = [use] if isinstance(use, str) else list(use or [latest_representation(adata)])
    sets, reasons = feature_sets(adata, names, seed=seed)
    run = _Run(adata.obs, found, sets, label, null_size, seed)
    for reason in reasons:
        run.omit("baselines", reason)
    for features in sets:
        if features.left_out:
            run.omit("features", f"{features.name}: {features.left_out} features are not finite and were omitted.")
    for done, task in enumerate(tasks):
        getattr(run, task)()
        if progress is not None:
            progress(done + 1, len(tasks))
    if not run.summary:
        reasons = " ".join(f"{r['task']}: {r['reason']}" for r in run.left_out if r["task"].replace(" ", "_") in tasks)
        raise InputError(f"Nothing can be evaluated. {reasons}")
    trained = adata.uns.get("cellvim", {}).get("weights", {}).get("trained")
    return Evaluation(
        summary=pd.DataFrame(run.summary),
        tables={name: pd.concat(tables, ignore_index=True) for name, tables in run.tables.items()},
        left_out=pd.DataFrame(run.left_out, columns=["task", "reason"]),
        settings={
            "use": names,
            "columns": found.as_dict(),
            "label": label,
            "null_size": null_size,
            "seed": seed,
            "n_rows": adata.n_obs,
            "n_plates": int(adata.obs[found.plate].nunique()) if found.plate else None,
            "trained": None if trained is None else bool(trained),
        },
    )


def _check_one_row_per_well(adata: AnnData, columns: Columns) -> None:
    if columns.plate is None or columns.well is None:
        return
    well = keys(adata.obs, [columns.plate, columns.well], " ")
    repeated = well[well.duplicated() & well.notna()]
    if len(repeated):
        raise MetadataError(
            f"{repeated.nunique()} wells have more than one row ({listing(repeated.unique(), 3)}); expected one "
            "profile per well, because rows of one well are not replicates. Aggregate first: cellvim profile."
        )


class _Run:
    """The tasks; each adds to the tables and the summary, or records why it cannot be computed."""

    def __init__(
        self, obs: pd.DataFrame, columns: Columns, sets: list[Features], label: str | None, null_size: int, seed: int
    ) -> None:
        self.obs, self.columns, self.sets = obs, columns, sets
        self.label, self.seed = label, seed
        self.random = {"null_size": null_size, "seed": seed}
        self.summary: list[dict[str, Any]] = []
        self.tables: dict[str, list[pd.DataFrame]] = {}
        self.left_out: list[dict[str, str]] = []

    def omit(self, task: str, reason: str) -> None:
        self.left_out.append({"task": task, "reason": reason})

    def _keep(self, name: str, features: Features, table: pd.DataFrame) -> None:
        self.tables.setdefault(name, []).append(table.assign(features=features.name))

    def _note(self, task: str, features: Features, n: int, values: dict[str, float], best: float = 1.0) -> None:
        about = {"n": int(n), "best": best, "is_baseline": features.is_baseline}
        for measure, value in values.items():
            row = {"task": task, "measure": measure, "features": features.name, "value": float(value)}
            self.summary.append(row | about)

    def _each(
        self, task: str, measure: Callable[..., pd.DataFrame], *, keep: str | None = None, **options: Any
    ) -> list[tuple[Features, pd.DataFrame]]:
        """Compute ``measure(features, obs, columns, **options)`` for every set of features, and keep the tables.

        If it fails for the first set, the reason is recorded once; the others would fail for the same reason.
        """
        results = []
        for features in self.sets:
            try:
                results.append((features, measure(features, self.obs, self.columns, **options)))
            except CellvimError as error:
                self.omit(task, f"{features.name}: {error}" if results else str(error))
                if not results:
                    break
        if keep is not None:
            for features, table in results:
                self._keep(keep, features, table)
        return results

    def retrieval(self) -> None:
        for features, table in self._each("retrieval", replicate_map, keep="retrieval", **self.random):
            values = {
                "mean average precision": table["mean_average_precision"].mean(),
                "treatments active (q < 0.05)": table["active"].mean(),
            }
            self._note("retrieval", features, len(table), values)

    def consistency(self) -> None:
        for features, table in self._each("consistency", replicate_consistency, keep="consistency", **self.random):
            share = table["consistent"].mean()
            self._note("consistency", features, len(table), {"treatments consistent (q < 0.05)": share})

    def mechanism(self) -> None:
        found = self._each("mechanism", nearest_mechanism, keep="mechanism")
        for features, table in found:
            for scheme in ("nsc", "nsb"):
                correct = table.get(f"{scheme}_correct", pd.Series(dtype=object)).dropna()
                if len(correct):
                    self._note("mechanism", features, len(correct), {f"{scheme.upper()} accuracy": correct.mean()})
        if not found:
            return
        first = found[0][1]
        if "nsb_correct" not in first:
            self.omit("mechanism", "NSB: there are fewer than two batches.")
        elif first["nsb_correct"].isna().all():
            self.omit("mechanism", "NSB: no treatment has another compound with its mechanism in another batch.")
        retrieved = self._each("mechanism retrieval", mechanism_map, keep="mechanism_retrieval", **self.random)
        for features, table in retrieved:
            precision = table["mean_average_precision"].mean()
            self._note("mechanism", features, len(table), {"mechanism mAP": precision})

    def classification(self) -> None:
        obs, columns = self.obs, self.columns
        wells = pd.Series(np.arange(len(obs)).astype(str), index=obs.index)  # without their names, a row is a well
        if columns.plate is not None and columns.well is not None:
            wells = keys(obs, [columns.plate, columns.well])

        def labels() -> pd.Series:
            if self.label is not None:
                return text(obs[self.label])
            found = find_treatments(obs, columns)
            names = keys(found.table.astype(str), [c for c in found.table if c != columns.mechanism], " ")
            treatments = pd.Series(None, index=obs.index, dtype=object)
            treatments.iloc[found.rows] = names.to_numpy()[found.codes]
            return treatments

        def controls() -> pd.Series:
            column = obs[column_of(columns, "pert_type", obs)]
            return text(column).where(is_value(column, columns.negative) | is_value(column, columns.positive))

        def mechanisms() -> pd.Series:
            is_treated = np.isin(np.arange(len(obs)), find_treatments(obs, columns).rows)
            return text(obs[columns.mechanism]).where(is_treated)

        name = self.label or "treatment"
        self._classify(name, labels, "wells", wells)
        if columns.plate is not None:
            self._classify(name, labels, "plates", text(obs[columns.plate]))
        self._classify("controls", controls, "wells", wells)
        if columns.mechanism is not None:
            groups = wells if columns.perturbation is None else text(obs[columns.perturbation])
            self._classify("mechanism", mechanisms, "perturbations", groups)  # raises if there are no perturbations

    def _classify(self, label: str, labels: Callable[[], pd.Series], held_out: str, groups: pd.Series) -> None:
        task = f"classification of {label}, {held_out} held out"
        try:
            split = split_by_group(labels(), groups, seed=self.seed)
        except CellvimError as error:
            self.omit(task, str(error))
            return
        if split.remark:
            self.omit(task, split.remark)
        for features in self.sets:
            table = classify(features, split, seed=self.seed).assign(label=label, held_out=held_out)
            self._keep("classification", features, table)
            for row in table.itertuples():
                measure = f"{label}, {held_out} held out: {row.classifier}"
                self._note("classification", features, row.n_rows, {measure: row.balanced_accuracy})

    def batch_effects(self) -> None:
        def of_rows(
            features: Features, obs: pd.DataFrame, columns: Columns, rows: np.ndarray, label: pd.Series | None = None
        ) -> pd.DataFrame:
            batch = text(obs[column_of(columns, "batch", obs)])
            return batch_effects(features[rows], batch.iloc[rows], label=label, seed=self.seed)

        def of_controls(features: Features, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
            return of_rows(features, obs, columns, np.flatnonzero(negative_controls(obs, columns)))

        def of_all(features: Features, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
            try:
                found = find_treatments(obs, columns)
            except CellvimError:
                return of_rows(features, obs, columns, np.arange(len(obs)))
            return of_rows(features, obs, columns, found.rows, pd.Series(found.codes))

        for which, work in (("negative controls", of_controls), ("all", of_all)):
            for features, table in self._each(f"batch effects of {which}", work):
                self._keep("batch_effects", features, table.assign(rows=which))
                for row in table.itertuples():
                    value = {f"{row.measure}, {which}": row.value}
                    self._note("batch effects", features, row.n_rows, value, row.best)

    def assay(self) -> None:
        found = self._each("assay", activity_scores)
        score = BETWEEN if found else DISTANCE
        for features, scores in (found or self._each("activity", distance_scores))[:1]:
            self._keep("activity", features, scores.reset_index(names="row").assign(score=score))
        for features, scores in found:
            table = assay_quality(scores)
            self._keep("assay", features, table)
            known = table["z_prime"].dropna()
            if len(known):
                values = {
                    "Z′, median of plates": known.median(),
                    "robust Z′, median of plates": table["robust_z_prime"].median(),
                }
                self._note("assay", features, len(known), values)

    def dose_response(self) -> None:
        def fit(features: Features, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
            scores, is_distance = activity_or_distance(features, obs, columns)
            curves, points = dose_response(scores, obs, columns)
            score = DISTANCE if is_distance else BETWEEN
            self._keep("dose_points", features, points.assign(score=score))
            return curves.assign(score=score)

        found = self._each("dose response", fit, keep="dose_response")
        for features, table in found:
            fitted = table.dropna(subset=["r_squared", "p_value"])
            if len(fitted):
                values = {
                    "curves with a response (p < 0.05)": (fitted["p_value"] < 0.05).mean(),
                    "R² of the curves, median": fitted["r_squared"].median(),
                    "|rank correlation| with the dose, median": fitted["spearman"].abs().median(),
                }
                self._note("dose response", features, len(fitted), values)
        if found:
            if (found[0][1]["score"] == DISTANCE).all():
                reason = "There are no positive controls: activity is the distance from the negative controls."
                self.omit("dose response", reason)
            first = found[0][1]
            for remark, names in first[first["remark"] != ""].groupby("remark")["perturbation"]:
                self.omit("dose response", f"{remark} ({listing(names)})")


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        value = value.item() if isinstance(value, np.generic) else value
        if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
            return None
        return value if isinstance(value, bool | int | float | str) else str(value)

    return [{str(name): plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def summary_tables(evaluation: Evaluation) -> list[Table]:
    """Return one table per task for the terminal: one row per measure, one column per set of features, baselines last.

    Names originate from files and are not interpreted as markup.
    """
    from rich.table import Table
    from rich.text import Text

    wide = evaluation.wide()
    counts = evaluation.summary.drop_duplicates(["task", "measure"]).set_index(["task", "measure"])
    baselines = set(evaluation.summary.loc[evaluation.summary["is_baseline"], "features"])
    tables = []
    for task in dict.fromkeys(wide.index.get_level_values(0)):
        title = f"{task}: balanced accuracy" if task == "classification" else str(task)
        table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in wide.columns:
            table.add_column(Text(str(name), style="dim" if name in baselines else "bold"), justify="right")
        table.add_column("best", justify="right", style="dim")
        table.add_column("n", justify="right", style="dim")
        for measure, row in wide.loc[task].iterrows():
            about = counts.loc[(task, measure)]
            cells = [Text("–" if math.isnan(value) else f"{value:.3f}") for value in row]
            table.add_row(Text(str(measure)), *cells, f"{about['best']:g}", f"{about['n']:,}")
        tables.append(table)
    return tables
