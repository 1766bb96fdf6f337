"""Results for a report: well profiles and their evaluation, and nearest perturbations."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, CellvimWarning, InputError
from cellvim.evaluate.features import unit_rows
from cellvim.profiles.columns import find_columns, keys
from cellvim.profiles.representations import latest_representation, matrix, settings_of
from cellvim.report.source import Source

if TYPE_CHECKING:
    from anndata import AnnData

    from cellvim.evaluate.evaluation import Evaluation
    from cellvim.profiles.columns import Columns

TASKS = ("retrieval", "mechanism", "assay", "dose_response")
MAX_PERTURBATIONS = 3000
N_NEAREST, N_TYPICAL = 5, 6


@dataclass(frozen=True, eq=False)
class Findings:
    """Well profiles and their evaluation.

    Attributes
    ----------
    profiles
        One row per well; None if there are none.
    use
        The evaluated representation.
    columns
        Roles of the columns of the profiles.
    evaluation
        None if nothing can be evaluated.
    missing
        Reasons for missing results, by name: "profiles" and the tasks of the evaluation.
    notes
        Remarks on the results.
    """

    profiles: AnnData | None = None
    use: str = "X"
    columns: Columns | None = None
    evaluation: Evaluation | None = None
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self, name: str) -> pd.DataFrame | None:
        """Return a table of the evaluation without the rows of baselines; None if it was not computed."""
        table = None if self.evaluation is None else self.evaluation.tables.get(name)
        return None if table is None or not len(table) else table[table["features"] == table["features"].iloc[0]]

    def required_table(self, task: str) -> pd.DataFrame:
        """Return the table of a task, or raise `InputError` with the reason why there is none."""
        table = self.table(task)
        if table is not None:
            return table
        reason = self.missing.get(task) or self.missing.get("profiles") or "It was not computed."
        if self.evaluation is not None:
            left_out = self.evaluation.left_out
            reasons = left_out.loc[left_out["task"].isin((task, task.replace("_", " "))), "reason"]
            reason = reasons.iloc[0] if len(reasons) else reason
        raise InputError(str(reason))

    def required_profiles(self) -> AnnData:
        """Return the profiles, or raise `InputError` with the reason why there are none."""
        if self.profiles is None:
            raise InputError(self.missing["profiles"])
        return self.profiles

    @property
    def distance_label(self) -> str:
        """Name of the `distances`, which are from the negative controls or from all wells of a plate."""
        if "robustmad" in self.profiles.layers and settings_of(self.profiles, "robustmad").get("fit_on") == "all":
            return "Distance from the plate's center"
        return "Distance from controls"

    def distances(self) -> np.ndarray | None:
        """Return the root mean square of each well's robust z-scores, or None."""
        if self.profiles is None or "robustmad" not in self.profiles.layers:
            return None
        scores = matrix(self.profiles, "robustmad")
        finite = np.isfinite(scores).all(axis=0)
        return np.sqrt(np.square(scores[:, finite]).mean(axis=1)) if finite.any() else None

    def activity(self) -> np.ndarray | None:
        """Return each well's activity relative to the controls, or None."""
        table = self.table("activity")
        if table is None or self.profiles is None:
            return None
        return table.set_index("row")["activity"].reindex(self.profiles.obs_names).to_numpy(float)

    def precision(self) -> np.ndarray | None:
        """Return the mean average precision of each well's treatment, or None."""
        table = self.table("retrieval")
        if table is None or self.columns is None or self.columns.perturbation is None:
            return None
        names = [n for n in (self.columns.perturbation, self.columns.dose) if n is not None and n in table]
        known = pd.Series(table["mean_average_precision"].to_numpy(float), index=keys(table, names).to_numpy())
        return keys(self.profiles.obs, names).map(known[~known.index.duplicated()]).to_numpy(float)


def without_columns(reason: str) -> str:
    """Return a message without the list of the columns of obs, which the page shows where the map is coloured."""
    return re.sub(r"(; (obs|it)|, which) has [^;]*?\. (?=[A-Z])", ". ", reason)


def find(
    source: Source,
    embeddings: str | Path | AnnData,
    *,
    profiles: str | Path | AnnData | None = None,
    evaluation: str | Path | Evaluation | None = None,
    seed: int = 0,
    **columns: str | None,
) -> Findings:
    """Read or compute the well profiles and their evaluation.

    Parameters
    ----------
    source, embeddings
        Cells to aggregate if no profiles are given, opened and as given: well means, with robust z-scores relative to
        the negative controls of each plate, or to all wells without controls.
    profiles
        Profiles made by `cellvim.profile`.
    evaluation
        Result of ``cellvim evaluate``.
    seed
        Random seed for the evaluation.
    **columns
        As for `find_columns`.

    Raises
    ------
    CellvimError
        A given file cannot be read, or a named column does not exist.
    """
    from cellvim.anndata_io import read_anndata
    from cellvim.evaluate.evaluation import Evaluation, evaluate_profiles

    notes: list[str] = []
    missing: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # of the libraries
        warnings.simplefilter("always", CellvimWarning)
        if isinstance(profiles, str | Path):
            profiles = read_anndata(profiles)
        elif profiles is None:
            try:
                profiles, notes = _make_profiles(source, embeddings, columns)
            except CellvimError as error:
                return Findings(missing={"profiles": str(error)})
        found = find_columns(profiles.obs, **columns)
        use = latest_representation(profiles)
        if isinstance(evaluation, str | Path):
            evaluation = Evaluation.load(evaluation)
        if evaluation is None:
            roles = {role: name for role, name in columns.items() if role not in ("negative", "positive")}
            roles |= {"pert_type": found.pert_type, "control": found.negative, "positive": found.positive}
            try:
                evaluation = evaluate_profiles(profiles, use=use, tasks=TASKS, seed=seed, **roles)
            except CellvimError:  # none of the tasks: find the reason of each
                for task in TASKS:
                    try:
                        evaluate_profiles(profiles, use=use, tasks=[task], **roles)
                    except CellvimError as error:
                        missing[task] = re.sub(r"^Nothing can be evaluated\. [a-z_ ]+: ", "", str(error))
    notes += list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, CellvimWarning)))
    return Findings(profiles, use, found, evaluation, missing, notes)


def _make_profiles(source: Source, embeddings: Any, columns: dict[str, str]) -> tuple[AnnData, list[str]]:
    """Return well profiles, scaled by the negative controls if possible, and a note if they are not."""
    from cellvim.profiles.pipeline import profile

    if source.n_rows == 0:
        raise InputError("The AnnData has no rows.")
    if source.columns.well is None:
        raise InputError("No column contains the well of each row (Metadata_Well), so there are no well profiles.")
    by = [name for name in (source.columns.plate, source.columns.well) if name is not None]
    control = columns["negative"]
    control = f"{columns['pert_type']}:{control}" if columns.get("pert_type") else control
    all_wells = (
        "Profiles are scaled by all wells of a plate, because there are not enough negative controls. Distances are "
        "from the plate's center."
    )
    for note, options in (
        ("", {"normalize": ("robustmad",)}),
        (all_wells, {"normalize": ("robustmad",), "fit_on": "all"}),
    ):
        try:
            return profile(embeddings, aggregate_by=by, control=control, **options), [note] if note else []
        except CellvimError:
            continue
    made = profile(embeddings, aggregate_by=by, control=control, normalize=())
    return made, ["Profiles are not scaled, because there are too few wells."]


def nearest_perturbations(names: np.ndarray, values: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the perturbations with the most similar mean profiles.

    Parameters
    ----------
    names
        (n,) perturbation of each row; None if missing.
    values
        (n, D) profiles, centered so that 0 is no effect.

    Returns
    -------
    names : list of str
        P perturbations.
    nearest, similarity : numpy.ndarray
        (P, up to 5) positions of the nearest perturbations, most similar first, and the cosine similarities.

    Raises
    ------
    InputError
        There are fewer than two perturbations, or more than 3,000.
    """
    finite = np.isfinite(values).all(axis=0)
    if not finite.any():
        raise InputError("No feature of the profiles is finite in every row, so they cannot be compared.")
    means = pd.DataFrame(values[:, finite]).groupby(pd.Series(names, dtype=object).mask(names == "")).mean()
    if len(means) < 2:
        raise InputError(f"There {'is 1 perturbation' if len(means) else 'are no perturbations'} to compare.")
    if len(means) > MAX_PERTURBATIONS:
        raise InputError(f"There are {len(means):,} perturbations; up to {MAX_PERTURBATIONS:,} are shown.")
    unit = unit_rows(means.to_numpy())
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : min(N_NEAREST, len(means) - 1)]
    return list(means.index), nearest, np.take_along_axis(cosine, nearest, axis=1)


def typical_cells(perturbation: np.ndarray, embeddings: np.ndarray, count: int = N_TYPICAL) -> dict[str, list[int]]:
    """Return the cells nearest to the mean embedding of their perturbation.

    Parameters
    ----------
    perturbation
        (k,) perturbation of each cell; None if missing.
    embeddings
        (k, D) embeddings of the cells.
    count
        Number of cells per perturbation.
    """
    finite = np.isfinite(embeddings).all(axis=1)
    typical = {}
    for name, rows in pd.Series(np.flatnonzero(finite)).groupby(perturbation[finite]):
        distance = np.linalg.norm(embeddings[rows] - embeddings[rows].mean(axis=0), axis=1)
        typical[name] = rows.to_numpy()[np.argsort(distance, kind="stable")[:count]].tolist()
    return typical
