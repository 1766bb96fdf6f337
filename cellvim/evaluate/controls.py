"""Can positive and negative controls be told apart? A plain classifier on an AnnData, split by well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from cellvim.errors import InputError, listing

if TYPE_CHECKING:
    from anndata import AnnData

WELL = ["Metadata_Plate", "Metadata_Well"]


@dataclass(frozen=True)
class Separation:
    """How well one set of features separates two groups of wells that the classifier has not seen.

    Attributes
    ----------
    features
        What the classifier saw.
    n_features
        How many numbers that is.
    balanced_accuracy, auc
        Mean over the folds; chance is 0.5.
    balanced_accuracy_std
        Over the folds.
    n_rows, n_wells, n_folds
        Rows classified, the wells that they are from, and the folds the wells were dealt into.
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
    """Classify controls from embeddings, and from two baselines that any embedding has to beat.

    Logistic regression (scikit-learn's defaults, classes weighted equally) on standardised features. Whole wells are
    held out: cells of one well are never on both sides. Nothing is tuned.

    Parameters
    ----------
    adata
        As `cellvim.embed` makes it.
    label
        Column of ``obs`` that tells the groups.
    negative, positive
        Its values for the two groups; all other rows are left out.
    level
        What is classified: each "cell", or each "well" by the mean over its cells.
    n_folds
        Folds that the wells are dealt into; fewer if the smaller group has fewer wells.
    seed
        Of the dealing.

    Returns
    -------
    list[Separation]
        For "embedding"; "mean intensities" (``obs`` columns ``mean_intensity_*``), where they are known; and
        "cell count" (of the well).

    Raises
    ------
    InputError
        The column or a group is not there, or a group has fewer than two wells.
    """
    table = _controls(adata, label, negative, positive)
    target = table["target"].to_numpy()
    features = _features(adata, table)
    groups = table["well"].to_numpy()
    if level == "well":
        first = table.drop_duplicates("well").index
        wells = table.loc[first, "well"]
        features = {
            name: pd.DataFrame(values, index=groups).groupby(level=0, observed=True).mean().loc[wells].to_numpy()
            for name, values in features.items()
        }
        target, groups = table.loc[first, "target"].to_numpy(), wells.to_numpy()
    folds = _folds(target, groups, n_folds, seed)
    return [_separation(name, values, target, groups, folds) for name, values in features.items()]


def _controls(adata: AnnData, label: str, negative: object, positive: object) -> pd.DataFrame:
    """Return the rows of the two groups: their position in ``adata``, the target (1 positive) and the well."""
    for column in (label, *WELL):
        if column not in adata.obs:
            raise InputError(f"The AnnData has no column '{column}' in obs; it has {listing(adata.obs.columns)}.")
    values = adata.obs[label].astype(object)
    is_negative, is_positive = (_equal(values, group) for group in (negative, positive))
    chosen = is_negative | is_positive
    well = adata.obs[WELL[0]].astype(str) + "/" + adata.obs[WELL[1]].astype(str)
    table = pd.DataFrame(
        {"position": np.flatnonzero(chosen), "target": is_positive[chosen].astype(int), "well": well.to_numpy()[chosen]}
    )
    for group, number in ((negative, 0), (positive, 1)):
        n_wells = table.loc[table["target"] == number, "well"].nunique()
        if n_wells < 2:
            raise InputError(
                f"'{label}' is {group!r} in {n_wells} wells; expected at least 2, to hold wells out. It has the values "
                f"{listing(pd.unique(values.dropna()))}."
            )
    return table


def _equal(values: pd.Series, group: object) -> np.ndarray:
    """Compare as given or as text, so that -1, -1.0 and "-1" are one group."""
    numbers = pd.to_numeric(values, errors="coerce")
    try:
        as_number = numbers == float(str(group))
    except ValueError:
        as_number = pd.Series(False, index=values.index)
    return ((values == group) | as_number).to_numpy(dtype=bool)


def _features(adata: AnnData, table: pd.DataFrame) -> Mapping[str, np.ndarray]:
    position = table["position"].to_numpy()
    features = {"embedding": np.asarray(adata.X[position], dtype=np.float64)}
    intensities = [name for name in adata.obs.columns if name.startswith("mean_intensity_")]
    if intensities:
        features["mean intensities"] = adata.obs[intensities].to_numpy(np.float64)[position]
    features["cell count"] = table.groupby("well")["well"].transform("size").to_numpy(np.float64)[:, None]
    return features


def _folds(target: np.ndarray, groups: np.ndarray, n_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Deal whole wells into folds, each group's wells evenly."""
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
        raise InputError("Classifying needs scikit-learn. Install it: pip install 'cellvim[analysis]'") from error

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
