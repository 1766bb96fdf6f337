"""``cellvim evaluate``: all measures that a table of profiles allows, for the profiles and for baselines.

Measures that cannot be computed, because a column or replicates are missing, are listed with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, InputError, MetadataError, listing
from cellvim.evaluate.assay import activity_scores, assay_quality, distance_scores
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
    Treatments,
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
        Tasks to compute, of `TASKS`.
    label
        Column of ``obs`` to classify; by default the treatment.
    control, positive
        Values of the control column for negative and positive controls, or COLUMN:VALUE.
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
    run.left_out += [{"task": "baselines", "reason": reason} for reason in reasons]
    run.left_out += [
        {"task": "features", "reason": f"{s.name}: {s.left_out} features are not finite and were omitted."}
        for s in sets
        if s.left_out
    ]
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
        self,
        obs: pd.DataFrame,
        columns: Columns,
        sets: list[Features],
        label: str | None,
        null_size: int,
        seed: int,
    ) -> None:
        self.obs, self.columns, self.sets = obs, columns, sets
        self.label, self.seed = label, seed
        self.random = {"null_size": null_size, "seed": seed}
        self.summary: list[dict[str, Any]] = []
        self.tables: dict[str, list[pd.DataFrame]] = {}
        self.left_out: list[dict[str, str]] = []

    def _each(self, task: str, work: Callable[[Features], pd.DataFrame]) -> list[tuple[Features, pd.DataFrame]]:
        """Call ``work`` for every set of features; record the reason if it fails."""
        results = []
        for features in self.sets:
            try:
                results.append((features, work(features)))
            except CellvimError as error:
                if results or features is not self.sets[0]:  # specific to this set
                    self.left_out.append({"task": task, "reason": f"{features.name}: {error}"})
                    continue
                self.left_out.append({"task": task, "reason": str(error)})
                break
        return results

    def _keep(self, name: str, features: Features, table: pd.DataFrame) -> None:
        self.tables.setdefault(name, []).append(table.assign(features=features.name))

    def _note(self, task: str, measure: str, features: Features, value: float, n: int, best: float = 1.0) -> None:
        self.summary.append(
            {
                "task": task,
                "measure": measure,
                "features": features.name,
                "value": float(value),
                "n": int(n),
                "best": best,
                "is_baseline": features.is_baseline,
            }
        )

    def retrieval(self) -> None:
        for features, table in self._each(
            "retrieval", lambda f: replicate_map(f, self.obs, self.columns, **self.random)
        ):
            self._keep("retrieval", features, table)
            precision, n = table["mean_average_precision"], len(table)
            self._note("retrieval", "mean average precision", features, precision.mean(), n)
            self._note("retrieval", "treatments active (q < 0.05)", features, table["active"].mean(), n)

    def consistency(self) -> None:
        for features, table in self._each(
            "consistency", lambda f: replicate_consistency(f, self.obs, self.columns, **self.random)
        ):
            self._keep("consistency", features, table)
            share = table["consistent"].mean()
            self._note("consistency", "treatments consistent (q < 0.05)", features, share, len(table))

    def mechanism(self) -> None:
        found = self._each("mechanism", lambda f: nearest_mechanism(f, self.obs, self.columns))
        for features, table in found:
            self._keep("mechanism", features, table)
            for scheme in ("nsc", "nsb"):
                if f"{scheme}_correct" in table:
                    correct = table[f"{scheme}_correct"].dropna()
                    if len(correct):
                        self._note("mechanism", f"{scheme.upper()} accuracy", features, correct.mean(), len(correct))
        if not found:
            return
        if "nsb_correct" not in found[0][1]:
            self.left_out.append({"task": "mechanism", "reason": "NSB: there are fewer than two batches."})
        elif found[0][1]["nsb_correct"].isna().all():
            reason = "NSB: no treatment has another compound with its mechanism in another batch."
            self.left_out.append({"task": "mechanism", "reason": reason})
        for features, table in self._each(
            "mechanism retrieval", lambda f: mechanism_map(f, self.obs, self.columns, **self.random)
        ):
            self._keep("mechanism_retrieval", features, table)
            precision = table["mean_average_precision"].mean()
            self._note("mechanism", "mechanism mAP", features, precision, len(table))

    def classification(self) -> None:
        for label, labels, held_out, groups in self._splits():
            what = f"classification of {label}, {held_out} held out"
            try:
                split = split_by_group(labels(), groups(), seed=self.seed)
            except CellvimError as error:
                self.left_out.append({"task": what, "reason": str(error)})
                continue
            if split.remark:
                self.left_out.append({"task": what, "reason": split.remark})
            for features in self.sets:
                table = classify(features, split, seed=self.seed).assign(label=label, held_out=held_out)
                self._keep("classification", features, table)
                for row in table.itertuples():
                    measure = f"{label}, {held_out} held out: {row.classifier}"
                    self._note("classification", measure, features, row.balanced_accuracy, row.n_rows)

    def _splits(self) -> Iterator[tuple[str, Callable[[], pd.Series], str, Callable[[], pd.Series]]]:
        """Yield the name of the label, a function for the labels, what is held out, and a function for the groups."""
        obs, columns = self.obs, self.columns

        def wells() -> pd.Series:
            if columns.plate is not None and columns.well is not None:
                return keys(obs, [columns.plate, columns.well])
            return pd.Series(np.arange(len(obs)).astype(str), index=obs.index)  # a row is a well

        def of_treated(names: Callable[[Treatments], np.ndarray]) -> pd.Series:
            found = find_treatments(obs, columns)
            labels = pd.Series(None, index=obs.index, dtype=object)
            labels.iloc[found.rows] = names(found)
            return labels

        def treatment_names(found: Treatments) -> np.ndarray:
            names = keys(found.table.astype(str), [c for c in found.table if c != columns.mechanism], " ")
            return names.to_numpy()[found.codes]

        def labels() -> pd.Series:
            return of_treated(treatment_names) if self.label is None else text(obs[self.label])

        def controls() -> pd.Series:
            column = obs[column_of(columns, "pert_type", obs)]
            known = is_value(column, columns.negative) | is_value(column, columns.positive)
            return text(column).where(known)

        def mechanisms() -> pd.Series:
            return of_treated(lambda found: text(obs[columns.mechanism]).iloc[found.rows].to_numpy())

        name = self.label or "treatment"
        yield name, labels, "wells", wells
        if columns.plate is not None:
            yield name, labels, "plates", lambda: text(obs[columns.plate])
        yield "controls", controls, "wells", wells
        if columns.mechanism is not None:
            yield "mechanism", mechanisms, "perturbations", lambda: text(obs[column_of(columns, "perturbation", obs)])

    def batch_effects(self) -> None:
        columns, obs = self.columns, self.obs

        def of_rows(features: Features, rows: np.ndarray, label: pd.Series | None) -> pd.DataFrame:
            batch = text(obs[column_of(columns, "batch", obs)])
            return batch_effects(features[rows], batch.iloc[rows], label=label, seed=self.seed)

        def of_controls(features: Features) -> pd.DataFrame:
            return of_rows(features, np.flatnonzero(negative_controls(obs, columns)), None)

        def of_all(features: Features) -> pd.DataFrame:
            rows = np.arange(len(obs))
            try:
                found = find_treatments(obs, columns)
            except CellvimError:
                return of_rows(features, rows, None)
            return of_rows(features, found.rows, pd.Series(found.codes))

        for which, work in (("negative controls", of_controls), ("all", of_all)):
            for features, table in self._each(f"batch effects of {which}", work):
                self._keep("batch_effects", features, table.assign(rows=which))
                for row in table.itertuples():
                    self._note("batch effects", f"{row.measure}, {which}", features, row.value, row.n_rows, row.best)

    def assay(self) -> None:
        for features, scores in self._each("assay", lambda f: activity_scores(f, self.obs, self.columns)):
            if features is self.sets[0]:
                self._keep("activity", features, scores.reset_index(names="row").assign(score=BETWEEN))
            table = assay_quality(scores)
            self._keep("assay", features, table)
            known = table["z_prime"].dropna()
            if len(known):
                self._note("assay", "Z′, median of plates", features, known.median(), len(known))
                robust = table["robust_z_prime"].median()
                self._note("assay", "robust Z′, median of plates", features, robust, len(known))
        if "activity" not in self.tables:
            for features, scores in self._each("activity", self._distances):
                if features is self.sets[0]:
                    self._keep("activity", features, scores.reset_index(names="row").assign(score=DISTANCE))

    def _distances(self, features: Features) -> pd.DataFrame:
        return distance_scores(features, self.obs, self.columns)

    def dose_response(self) -> None:
        try:
            activity_scores(self.sets[0], self.obs, self.columns)
            score, measure = BETWEEN, lambda f: activity_scores(f, self.obs, self.columns)
        except CellvimError:
            score, measure = DISTANCE, self._distances

        def fit(features: Features) -> pd.DataFrame:
            curves, points = dose_response(measure(features), self.obs, self.columns)
            self._keep("dose_points", features, points.assign(score=score))
            return curves.assign(score=score)

        found = self._each("dose response", fit)
        for features, table in found:
            self._keep("dose_response", features, table)
            fitted = table.dropna(subset=["r_squared", "p_value"])
            if len(fitted):
                responding = (fitted["p_value"] < 0.05).mean()
                self._note("dose response", "curves with a response (p < 0.05)", features, responding, len(fitted))
                r_squared = fitted["r_squared"].median()
                self._note("dose response", "R² of the curves, median", features, r_squared, len(fitted))
                rank = fitted["spearman"].abs().median()
                self._note("dose response", "|rank correlation| with the dose, median", features, rank, len(fitted))
        if found:
            if score == DISTANCE:
                reason = "There are no positive controls: activity is the distance from the negative controls."
                self.left_out.append({"task": "dose response", "reason": reason})
            remarks = found[0][1].loc[found[0][1]["remark"] != ""].groupby("remark")["perturbation"]
            for remark, names in remarks:
                self.left_out.append({"task": "dose response", "reason": f"{remark} ({listing(names)})"})


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)


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
