"""Separation of positive and negative controls by a classifier, with wells held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from cellvim.errors import InputError, listing
from cellvim.evaluate.features import CELL_COUNT, INTENSITIES, intensity_columns, sample_rows
from cellvim.profiles.columns import (
    PLATE,
    WELL,
    Columns,
    column_of,
    is_value,
    negative_controls,
    positive_controls,
    require,
)

if TYPE_CHECKING:
    from anndata import AnnData

    from cellvim.anndata_io import StoredAnnData

MAX_CELLS = 10_000


@dataclass(frozen=True)
class Separation:
    """Separation of two groups of held-out wells by one set of features.

    Attributes
    ----------
    features
        Name of the features.
    n_features
        Number of features.
    balanced_accuracy, auc
        Mean over the folds; chance is 0.5.
    balanced_accuracy_std
        Standard deviation over the folds.
    n_rows, n_wells, n_folds
        Number of rows, of their wells, and of folds.
    """

    features: str
    n_features: int
    balanced_accuracy: float
    balanced_accuracy_std: float
    auc: float
    n_rows: int
    n_wells: int
    n_folds: int

    def __str__(self) -> str:
        return (
            f"{self.features:<18} balanced accuracy {self.balanced_accuracy:.3f} ± {self.balanced_accuracy_std:.3f}, "
            f"AUC {self.auc:.3f}"
        )


def separate_controls(
    adata: AnnData,
    label: str,
    *,
    negative: object,
    positive: object,
    level: Literal["well", "cell"] = "cell",
    n_folds: int = 5,
    seed: int = 0,
) -> list[Separation]:
    """Classify controls from embeddings, and from two baselines.

    The classifier is logistic regression (defaults of scikit-learn, equal class weights) on standardised features.
    Wells are held out: cells of one well are never in both training and test. There is no hyperparameter tuning.

    Parameters
    ----------
    adata
        Embeddings, as returned by `cellvim.embed`.
    label
        Column of ``obs`` with the groups.
    negative, positive
        Values of ``label`` for the two groups; other rows are ignored.
    level
        Classify each "cell", or each "well" by the mean over its cells.
    n_folds
        Number of folds; fewer if the smaller group has fewer wells.
    seed
        Random seed for assigning wells to folds.

    Returns
    -------
    list[Separation]
        For "embedding"; "mean intensities" (``obs`` columns ``mean_intensity_*``), if available; and "cell count" (of
        the well).

    Raises
    ------
    InputError
        The column or a group does not exist, or a group has fewer than two wells.
    """
    for column in (label, PLATE, WELL):
        require(adata.obs, column, option="another label, for embeddings of cells as returned by cellvim.embed")
    is_negative, is_positive = (is_value(adata.obs[label], value) for value in (negative, positive))
    rows = np.flatnonzero(is_negative | is_positive)
    target = is_positive[rows].astype(int)
    groups = _well_names(adata.obs, PLATE, WELL)[rows]
    for value, number in ((negative, 0), (positive, 1)):
        if (n_wells := len(np.unique(groups[target == number]))) < 2:
            raise InputError(
                f"'{label}' is {value!r} in {n_wells} wells; expected at least 2, to hold wells out. It has the values "
                f"{listing(pd.unique(adata.obs[label].astype(object).dropna()))}."
            )
    features = {"embedding": np.asarray(adata.X[rows], dtype=np.float64)}
    if intensities := intensity_columns(adata.obs):
        features[INTENSITIES] = adata.obs[intensities].to_numpy(np.float64)[rows]
    features[CELL_COUNT] = pd.Series(groups).map(pd.Series(groups).value_counts()).to_numpy(np.float64)[:, None]
    if level == "well":
        wells, first = pd.unique(groups), np.flatnonzero(~pd.Series(groups).duplicated())
        features = {
            name: pd.DataFrame(values, index=groups).groupby(level=0, observed=True).mean().loc[wells].to_numpy()
            for name, values in features.items()
        }
        target, groups = target[first], wells
    folds = split_wells(target, groups, n_folds, seed)
    return [_separation(name, values, target, groups, folds) for name, values in features.items()]


def separate_stored_controls(
    stored: StoredAnnData, obs: pd.DataFrame, columns: Columns, *, seed: int = 0
) -> tuple[list[Separation], list[str]]:
    """Classify positive and negative controls of stored embeddings, reading at most 10,000 cells.

    Parameters
    ----------
    stored
        Embeddings of cells.
    obs
        All columns of ``obs``.
    columns
        Columns of plates, wells and controls.
    seed
        Random seed of the sample.

    Returns
    -------
    list[Separation]
        As `separate_controls`, without "cell count" if cells were sampled.
    list[str]
        What was sampled or omitted, one sentence each.

    Raises
    ------
    CellvimError
        There are no controls of both kinds in two wells each, or scikit-learn is not installed.
    """
    import anndata

    label, plate, well = (column_of(columns, role, obs) for role in ("pert_type", "plate", "well"))
    rows = np.flatnonzero(negative_controls(obs, columns) | positive_controls(obs, columns))
    notes, total = [], len(rows)
    is_sampled = total > MAX_CELLS
    if is_sampled:
        wells, _ = pd.factorize(_well_names(obs, plate, well))
        rows = rows[sample_rows(wells[rows], MAX_CELLS, seed=seed)]
        notes.append(f"{len(rows):,} of {total:,} control cells, sampled evenly from the wells.")
    values = stored.take(rows)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        notes.append(f"{int((~finite).sum()):,} cells with values that are not finite are omitted.")
        rows, values = rows[finite], values[finite]
    table = obs.iloc[rows]  # with no rows, `assign` would extend it to those of a longer column
    table = table.assign(**{PLATE: table[plate], WELL: table[well]})
    intensities = intensity_columns(table)
    if intensities and not np.isfinite(table[intensities].to_numpy(np.float64)).all():
        table = table.drop(columns=intensities)
        notes.append("Mean intensities are omitted: some are not finite.")
    table.index = table.index.astype(str)
    results = separate_controls(
        anndata.AnnData(X=values, obs=table), label, negative=columns.negative, positive=columns.positive
    )
    if is_sampled:  # all wells have the same number of sampled cells
        results = [result for result in results if result.features != CELL_COUNT]
        notes.append("The baseline of cell counts is omitted: it does not apply to sampled cells.")
    return results, notes


def _well_names(obs: pd.DataFrame, plate: str, well: str) -> np.ndarray:
    return (obs[plate].astype(str) + "/" + obs[well].astype(str)).to_numpy(dtype=object)


def split_wells(target: np.ndarray, groups: np.ndarray, n_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Assign wells to folds, those of each target evenly; return training and test rows."""
    rng = np.random.default_rng(seed)
    wells_of = [np.unique(groups[target == number]) for number in (0, 1)]
    n_folds = min(n_folds, *map(len, wells_of))
    fold_of = {}
    for wells in wells_of:
        for position, well in enumerate(rng.permutation(wells)):
            fold_of[well] = position % n_folds
    fold = np.array([fold_of[well] for well in groups])
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(n_folds)]


def _separation(name: str, values: np.ndarray, target: np.ndarray, groups: np.ndarray, folds: list) -> Separation:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise InputError("Classification requires scikit-learn: pip install 'cellvim[analysis]'.") from error

    accuracies, areas = [], []
    for train, test in folds:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
        classifier.fit(values[train], target[train])
        accuracies.append(balanced_accuracy_score(target[test], classifier.predict(values[test])))
        areas.append(roc_auc_score(target[test], classifier.decision_function(values[test])))
    return Separation(
        features=name,
        n_features=values.shape[1],
        balanced_accuracy=float(np.mean(accuracies)),
        balanced_accuracy_std=float(np.std(accuracies)),
        auc=float(np.mean(areas)),
        n_rows=len(target),
        n_wells=len(np.unique(groups)),
        n_folds=len(folds),
    )
