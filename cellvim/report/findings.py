"""The figures of a report: profiles of the wells and their evaluation, given or made here; why one is missing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, CellvimWarning
from cellvim.profiles.columns import find_columns
from cellvim.profiles.representations import latest_representation, matrix, settings_of

if TYPE_CHECKING:
    from anndata import AnnData

    from cellvim.evaluate.evaluation import Evaluation
    from cellvim.profiles.columns import Columns

TASKS = ("retrieval", "mechanism", "assay", "dose_response")


@dataclass(frozen=True, eq=False)
class Findings:
    """What is known of the wells.

    Attributes
    ----------
    profiles
        One row a well; None if there are none.
    use
        The representation that everything is computed from.
    columns
        Which column of the profiles says what.
    evaluation
        Figures; None if nothing can be evaluated.
    missing
        Why something is not there, by its name: "profiles", and the tasks of the evaluation.
    notes
        What the reader must know about the figures.
    """

    profiles: AnnData | None = None
    use: str = "X"
    columns: Columns | None = None
    evaluation: Evaluation | None = None
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self, name: str) -> pd.DataFrame | None:
        """Return a table of the evaluation, of the embedding alone and without baselines; None if there is none."""
        if self.evaluation is None or name not in self.evaluation.tables:
            return None
        table = self.evaluation.tables[name]
        return table[table["features"] == table["features"].iloc[0]] if len(table) else None

    def reason(self, task: str) -> str:
        """Return why a task has no table."""
        if self.evaluation is not None:
            left_out = self.evaluation.left_out
            names = {task, task.replace("_", " ")}
            reasons = left_out.loc[left_out["task"].isin(names), "reason"]
            if len(reasons):
                return _brief(reasons.iloc[0])
        return _brief(self.missing.get(task) or self.missing.get("profiles") or "It was not computed.")

    @property
    def is_on_controls(self) -> bool:
        """Whether the robust z scores are against the negative controls; else against all wells of a plate."""
        return settings_of(self.profiles, "robustmad").get("fit_on") != "all"

    def values(self) -> np.ndarray:
        """Return the representation, (wells, D) float64."""
        return matrix(self.profiles, self.use)

    def distances(self) -> np.ndarray | None:
        """Return each well's distance from the controls: root mean square of its robust z scores; None without them."""
        if self.profiles is None or "robustmad" not in self.profiles.layers:
            return None
        scores = matrix(self.profiles, "robustmad")
        finite = np.isfinite(scores).all(axis=0)
        return np.sqrt(np.square(scores[:, finite]).mean(axis=1)) if finite.any() else None


def find(
    embeddings: str | Path | AnnData,
    *,
    by: Sequence[str],
    profiles: str | Path | AnnData | None = None,
    evaluation: str | Path | Evaluation | None = None,
    seed: int = 0,
    **columns: str | None,
) -> Findings:
    """Take or compute the profiles of the wells and their evaluation.

    Parameters
    ----------
    embeddings
        Cells, from which profiles are made where none are given: means of wells, robust z scores against the negative
        controls of each plate, or against all wells where there are none.
    by
        Columns that say which well a row is of; none if there are none.
    profiles
        Profiles as `cellvim.profile` makes them.
    evaluation
        What `cellvim evaluate` wrote.
    seed
        Of the evaluation.
    **columns
        As for `find_columns`.

    Raises
    ------
    CellvimError
        Something that was given cannot be read, or lacks a column that was named.
    """
    from cellvim.anndata_io import read_anndata
    from cellvim.evaluate.evaluation import Evaluation, evaluate_profiles

    notes: list[str] = []
    missing: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # the libraries'
        warnings.simplefilter("always", CellvimWarning)
        if profiles is not None:
            made = read_anndata(profiles) if isinstance(profiles, str | Path) else profiles
        else:
            made = _make(embeddings, by, notes, missing, columns.get("negative") or "negcon", columns.get("pert_type"))
        if made is None:
            return Findings(missing=missing, notes=notes)
        found = find_columns(made.obs, **columns)
        use = latest_representation(made)
        result = None
        if evaluation is not None:
            result = Evaluation.load(evaluation) if isinstance(evaluation, str | Path) else evaluation
        else:
            try:
                result = evaluate_profiles(made, use=use, tasks=TASKS, seed=seed, **_options(found, columns))
            except CellvimError:  # of every task, so that each can be told why
                missing |= _reasons(made, use, found, columns)
    notes += list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, CellvimWarning)))
    return Findings(made, use, found, result, missing, notes)


def _brief(reason: str) -> str:
    """Return the reason without the list of columns: the page shows these where the map is coloured."""
    return re.sub(r"; (obs|it) has [^;]*?\. (?=[A-Z])", ". ", str(reason))


def _options(found: Columns, columns: dict[str, str]) -> dict[str, str | None]:
    named = {role: name for role, name in columns.items() if role not in ("negative", "positive")}
    return {**named, "pert_type": found.pert_type, "control": found.negative, "positive": found.positive}


def _reasons(profiles: AnnData, use: str, found: Columns, columns: dict[str, str]) -> dict[str, str]:
    """Return why each task cannot be done, where none can."""
    from cellvim.evaluate.evaluation import evaluate_profiles

    reasons = {}
    for task in TASKS:
        try:
            evaluate_profiles(profiles, use=use, tasks=[task], **_options(found, columns))
        except CellvimError as error:
            reasons[task] = re.sub(r"^Nothing can be evaluated\. [a-z_ ]+: ", "", str(error))
    return reasons


def _make(
    embeddings,
    by: Sequence[str],
    notes: list[str],
    missing: dict[str, str],
    control: str,
    pert_type: str | None,
) -> AnnData | None:
    """Make profiles as well as the embeddings allow."""
    from cellvim.profiles.pipeline import profile

    if not by:
        missing["profiles"] = (
            "No column says which well a row is of (such as Metadata_Well), so wells have no profiles."
        )
        return None
    control = f"{pert_type}:{control}" if pert_type else control
    for options, note in (
        ({"normalize": ("robustmad",)}, ""),
        (
            {"normalize": ("robustmad",), "fit_on": "all"},
            "Profiles are scaled by all wells of a plate, because there are not enough negative controls to scale by: "
            "distances are from the plate's middle.",
        ),
        ({"normalize": ()}, "Profiles are not scaled: there are too few wells to scale by."),
    ):
        try:
            made = profile(embeddings, aggregate_by=by, control=control, **options)
        except CellvimError as error:
            problem = str(error)
        else:
            if note:
                notes.append(note)
            return made
    missing["profiles"] = problem
    return None


def summary_table(evaluation: Evaluation) -> tuple[list[str], list[list[object]]]:
    """Return the evaluation's figures as a table: measures by sets of features, baselines last."""
    wide = evaluation.wide()
    features = [str(name) for name in wide.columns]
    rows = [
        [f"{task}: {measure}" if task not in measure else measure, *row]
        for (task, measure), row in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return features, rows
