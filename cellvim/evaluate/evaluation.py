"""All figures about a table of profiles, baselines beside them. The job of ``cellvim evaluate``.

What cannot be computed, for want of a column or of replicates, is listed with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, InputError, MetadataError, OutputError, listing
from cellvim.evaluate.assay import activity_scores, assay_quality, distance_scores
from cellvim.evaluate.batch_effects import batch_effects
from cellvim.evaluate.classification import classify, split_by_group
from cellvim.evaluate.consistency import replicate_consistency
from cellvim.evaluate.dose_response import dose_response
from cellvim.evaluate.features import Features, feature_sets, latest_representation
from cellvim.evaluate.mechanism import mechanism_map, nearest_mechanism
from cellvim.evaluate.retrieval import NULL_SIZE, replicate_map
from cellvim.evaluate.treatments import find_treatments
from cellvim.profiles.columns import Columns, find_columns, is_value, keys, negative_controls, require, role, text

if TYPE_CHECKING:
    from anndata import AnnData

FORMAT = 1  # of the JSON
BETWEEN, DISTANCE = "between the controls", "distance from the negative controls"  # what activity is
TASKS = ("retrieval", "consistency", "mechanism", "classification", "batch_effects", "assay", "dose_response")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_profiles` found.

    Attributes
    ----------
    summary
        One row a measure and set of features: ``task``, ``measure``, ``features``, ``value``, ``n`` (what it is a mean
        over, or a share of), ``best`` (the value of a perfect result), ``is_baseline``.
    tables
        Details; each has a column ``features``. Those that could be computed, of:

        ``retrieval``
            By `replicate_map`, one row a treatment.
        ``consistency``
            By `replicate_consistency`, one row a treatment.
        ``mechanism``
            By `nearest_mechanism`, one row a treatment.
        ``mechanism_retrieval``
            By `mechanism_map`, one row a mechanism.
        ``classification``
            By `classify`, one row a classifier, with the columns ``label`` and ``held_out``.
        ``batch_effects``
            By `batch_effects`, one row a measure, with the column ``rows`` ("negative controls" or "all").
        ``activity``
            By `activity_scores`, or `distance_scores` where there are no positive controls (``score`` says which), one
            row a well, named by ``row``; of the first set of features alone.
        ``assay``
            By `assay_quality`, one row a plate.
        ``dose_response``, ``dose_points``
            By `dose_response`, one row a perturbation, and one a perturbation and dose.
    left_out
        What could not be computed: ``task`` and ``reason``.
    settings
        The representations, which columns were taken, the seed, how many rows and plates there were.
    """

    summary: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    left_out: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)

    def wide(self) -> pd.DataFrame:
        """Return the summary with a column for each set of features; rows are task and measure."""
        order = self.summary.drop_duplicates(["task", "measure"])[["task", "measure"]]
        table = self.summary.pivot(index=["task", "measure"], columns="features", values="value")
        return table.loc[pd.MultiIndex.from_frame(order), list(dict.fromkeys(self.summary["features"]))]

    def value(self, measure: str, features: str | None = None) -> float:
        """Return one figure of the summary; of the first set of features if none is named.

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
            raise InputError(f"'{measure}' was not computed; there are {known}.")
        return float(rows["value"].iloc[0])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; what is not finite becomes None."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "summary": _records(self.summary),
            "left_out": _records(self.left_out),
            "tables": {name: _records(table) for name, table in self.tables.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write everything as JSON.

        Raises
        ------
        OutputError
            It cannot be written.
        """
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            partial.write_text(text + "\n", "utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            It is not there, or is something else.
        """
        try:
            found = json.loads(Path(path).read_text("utf-8"))
            tables = {name: pd.DataFrame(rows) for name, rows in found["tables"].items()}
            summary, left_out, settings = (found[name] for name in ("summary", "left_out", "settings"))
            return cls(pd.DataFrame(summary), tables, pd.DataFrame(left_out, columns=["task", "reason"]), settings)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no evaluation as cellvim evaluate writes it.") from error


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
    """Compute all figures that the profiles allow, and the same for baselines.

    Parameters
    ----------
    adata
        Profiles, one row a well, as `cellvim.profile` makes them.
    use
        Representations to evaluate: "X", layers, entries of obsm. By default what was normalised last.
    tasks
        Which of `TASKS` to do.
    label
        Column of ``obs`` to classify; the treatment by default.
    control, positive
        Values of the column of controls, or COLUMN:VALUE.
    null_size
        Random ranks and draws for p values.
    seed
        Of all that is random.
    progress
        Takes the tasks done and their number.
    **columns
        ``plate``, ``well``, ``batch``, ``perturbation``, ``dose``, ``mechanism`` or ``pert_type``: names of columns of
        ``obs``; found by their usual names if not given.

    Returns
    -------
    Evaluation

    Raises
    ------
    CellvimError
        A column or representation that was named is not there, wells are there twice, or nothing can be computed.
    """
    if wrong := [task for task in tasks if task not in TASKS]:
        raise InputError(f"There is no task {listing(wrong)}; there are {listing(TASKS)}.")
    if adata.n_obs == 0:
        raise InputError("There are no profiles: the AnnData has no rows.")
    found = find_columns(adata.obs, negative=control, positive=positive, **columns)
    if label is not None:
        require(adata.obs, label, option="--label")
    _check_one_row_a_well(adata, found)
    names = [use] if isinstance(use, str) else list(use or [latest_representation(adata)])
    sets, reasons = feature_sets(adata, names, seed=seed)
    run = _Run(adata.obs, found, sets, label, null_size, seed)
    run.left_out += [{"task": "baselines", "reason": reason} for reason in reasons]
    run.left_out += [
        {"task": "features", "reason": f"{s.name}: {s.left_out} features are not finite and were left out."}
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
            "trained": _is_trained(adata),
        },
    )


def _is_trained(adata: AnnData) -> bool | None:
    trained = adata.uns.get("cellvim", {}).get("weights", {}).get("trained")
    return None if trained is None else bool(trained)


def _check_one_row_a_well(adata: AnnData, columns: Columns) -> None:
    if columns.plate is None or columns.well is None:
        return
    well = keys(adata.obs, [columns.plate, columns.well], " ")
    twice = well[well.duplicated() & well.notna()]
    if len(twice):
        raise MetadataError(
            f"{twice.nunique()} wells have more than one row ({listing(twice.unique(), 3)}); expected one profile a "
            "well, since rows of one well are no replicates. Aggregate first: cellvim profile."
        )


class _Run:
    """The tasks, each of which adds to the tables and the summary, or says why it cannot."""

    def __init__(self, obs, columns: Columns, sets: list[Features], label, null_size: int, seed: int):
        self.obs, self.columns, self.sets = obs, columns, sets
        self.label, self.null_size, self.seed = label, null_size, seed
        self.summary: list[dict[str, Any]] = []
        self.tables: dict[str, list[pd.DataFrame]] = {}
        self.left_out: list[dict[str, str]] = []

    def _each(self, task: str, work: Callable[[Features], pd.DataFrame]) -> list[tuple[Features, pd.DataFrame]]:
        """Do ``work`` for every set of features; note why if it cannot be done."""
        results = []
        for features in self.sets:
            try:
                results.append((features, work(features)))
            except CellvimError as error:
                if results or features is not self.sets[0]:  # the others can be done: it is this set
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
        options = {"null_size": self.null_size, "seed": self.seed}
        for features, table in self._each("retrieval", lambda f: replicate_map(f, self.obs, self.columns, **options)):
            self._keep("retrieval", features, table)
            precision, n = table["mean_average_precision"], len(table)
            self._note("retrieval", "mean average precision", features, precision.mean(), n)
            self._note("retrieval", "treatments active (q < 0.05)", features, table["active"].mean(), n)

    def consistency(self) -> None:
        options = {"null_size": self.null_size, "seed": self.seed}
        for features, table in self._each(
            "consistency", lambda f: replicate_consistency(f, self.obs, self.columns, **options)
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
            self.left_out.append({"task": "mechanism", "reason": "NSB: there are no two batches."})
        elif found[0][1]["nsb_correct"].isna().all():
            reason = "NSB: no treatment has another compound of its mechanism in another batch."
            self.left_out.append({"task": "mechanism", "reason": reason})
        options = {"null_size": self.null_size, "seed": self.seed}
        for features, table in self._each(
            "mechanism retrieval", lambda f: mechanism_map(f, self.obs, self.columns, **options)
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

    def _splits(self):
        """Yield (label's name, function of the labels, what is held out, function of the groups)."""
        obs, columns = self.obs, self.columns

        def wells() -> pd.Series:
            if columns.plate is not None and columns.well is not None:
                return keys(obs, [columns.plate, columns.well])
            return pd.Series(np.arange(len(obs)).astype(str), index=obs.index)  # a row is a well

        def treatments() -> pd.Series:
            if self.label is not None:
                return text(obs[self.label])
            found = find_treatments(obs, columns)
            names = keys(found.table.astype(str), [c for c in found.table if c != columns.mechanism], " ")
            labels = pd.Series(None, index=obs.index, dtype=object)
            labels.iloc[found.rows] = names.to_numpy()[found.codes]
            return labels

        def controls() -> pd.Series:
            column = obs[role(columns, "pert_type", obs)]
            known = is_value(column, columns.negative) | is_value(column, columns.positive)
            return text(column).where(known)

        def mechanisms() -> pd.Series:
            found = find_treatments(obs, columns)
            labels = pd.Series(None, index=obs.index, dtype=object)
            column = text(obs[role(columns, "mechanism", obs)])
            labels.iloc[found.rows] = column.iloc[found.rows].to_numpy()
            return labels

        name = self.label or "treatment"
        yield name, treatments, "wells", wells
        if columns.plate is not None:
            yield name, treatments, "plates", lambda: text(obs[columns.plate])
        yield "controls", controls, "wells", wells
        if columns.mechanism is not None:
            yield "mechanism", mechanisms, "perturbations", lambda: text(obs[role(columns, "perturbation", obs)])

    def batch_effects(self) -> None:
        columns, obs = self.columns, self.obs

        def of_rows(features: Features, rows: np.ndarray, label: pd.Series | None) -> pd.DataFrame:
            batch = text(obs[role(columns, "batch", obs)])
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

        def work(features: Features) -> pd.DataFrame:
            curves, points = dose_response(measure(features), self.obs, self.columns)
            self._keep("dose_points", features, points.assign(score=score))
            return curves.assign(score=score)

        found = self._each("dose response", work)
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
                reason = "No positive controls to scale by: activity is the distance from the negative ones."
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
