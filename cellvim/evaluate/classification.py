"""Classification with whole wells, plates or perturbations held out: logistic regression and nearest neighbours."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellvim.errors import InputError, MetadataError, listing
from cellvim.evaluate.features import Features

N_FOLDS = 5
N_NEIGHBOURS = 5
MAX_CLASSES = 1000  # beyond, a logistic regression takes hours and its figure says little
CLASSIFIERS = ("logistic", "kNN")


@dataclass(frozen=True)
class Split:
    """Rows dealt into folds, so that no group is on both sides.

    Attributes
    ----------
    rows
        Positions of the rows that take part.
    target
        (len(rows),) class numbers.
    classes
        Names of the classes.
    folds
        For each fold the training and the test rows, as positions in ``rows``.
    remark
        What was left out, or "".
    """

    rows: np.ndarray
    target: np.ndarray
    classes: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    remark: str = ""


def split_by_group(labels: pd.Series, groups: pd.Series, *, n_folds: int = N_FOLDS, seed: int = 0) -> Split:
    """Deal rows into folds by group; classes that are in one group only are left out, since none could predict them.

    Parameters
    ----------
    labels
        (n,) class of each row; rows without one take no part.
    groups
        (n,) what is held out together: wells, plates.
    n_folds
        Folds at most; fewer where the rarest class is in fewer groups.
    seed
        Of the dealing.

    Raises
    ------
    MetadataError
        Fewer than two classes are in two groups, or the folds cannot be dealt.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    known = labels.notna().to_numpy() & groups.notna().to_numpy()
    group_of, names = pd.factorize(groups.where(known))
    class_of, classes = pd.factorize(labels.where(known), sort=True)
    pairs = pd.DataFrame({"class": class_of, "group": group_of})[known].drop_duplicates()
    n_groups = np.bincount(pairs["class"], minlength=len(classes))
    usable = n_groups >= 2
    if usable.sum() < 2:
        raise MetadataError(
            f"{int(usable.sum())} of {len(classes)} classes are in two or more of the {len(names)} groups that are "
            "held out; expected at least 2 classes."
        )
    if usable.sum() > MAX_CLASSES:
        raise MetadataError(f"There are {usable.sum():,} classes; classification is limited to {MAX_CLASSES:,}.")
    rows = np.flatnonzero(known & np.r_[usable, False][class_of])
    number = np.cumsum(usable) - 1
    target, group = number[class_of[rows]], group_of[rows]
    folds = min(n_folds, int(n_groups[usable].min()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rare classes; they are checked below
        dealt = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(rows, target, group))
    dealt = [(train, test) for train, test in dealt if len(test) and len(np.unique(target[train])) > 1]
    if not dealt:
        raise MetadataError("No fold has two classes to learn from.")
    left = listing(map(str, np.asarray(classes)[~usable]))
    remark = f"{(~usable).sum()} classes are in one group only and were left out: {left}." if (~usable).any() else ""
    return Split(rows, target, np.asarray(classes)[usable].astype(str), dealt, remark)


def classify(features: Features, split: Split, *, seed: int = 0) -> pd.DataFrame:
    """Predict the class of held-out rows.

    Features are standardised on the training rows. Logistic regression has scikit-learn's defaults with classes
    weighted equally; the nearest neighbours are 5, by the distance of the features. Nothing is tuned.

    Parameters
    ----------
    features
        What the classifiers see.
    split
        By `split_by_group`; the same one for every set of features, so that their figures compare.
    seed
        Of the solver.

    Returns
    -------
    pandas.DataFrame
        One row a classifier: ``classifier``, ``balanced_accuracy``, ``accuracy``, ``macro_f1``, over all held-out rows
        together; ``balanced_accuracy_std`` over the folds; ``chance`` (1 / classes), ``n_classes``, ``n_rows``,
        ``n_folds``.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise InputError("Classifying needs scikit-learn. Install it: pip install 'cellvim[analysis]'") from error

    values = features.values[split.rows]
    fewest = min(len(train) for train, _ in split.folds)
    neighbours = KNeighborsClassifier(min(N_NEIGHBOURS, fewest), metric=features.distance, weights="distance")
    if features.distance == "cosine":
        neighbours = KNeighborsClassifier(min(N_NEIGHBOURS, fewest), metric="cosine")
    models = {
        CLASSIFIERS[0]: LogisticRegression(class_weight="balanced", max_iter=2000, random_state=seed),
        CLASSIFIERS[1]: neighbours,
    }
    results = []
    for name, model in models.items():
        predicted = np.full(len(split.rows), -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of more classes than half the rows: replicates are few
            for train, test in split.folds:
                fitted = make_pipeline(StandardScaler(), model).fit(values[train], split.target[train])
                predicted[test] = fitted.predict(values[test])
        held_out = predicted >= 0
        truth, guess = split.target[held_out], predicted[held_out]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes that were guessed but not there in a fold
            by_fold = [balanced_accuracy_score(split.target[test], predicted[test]) for _, test in split.folds]
            results.append(
                {
                    "classifier": name,
                    "balanced_accuracy": balanced_accuracy_score(truth, guess),
                    "balanced_accuracy_std": float(np.std(by_fold)),
                    "accuracy": accuracy_score(truth, guess),
                    "macro_f1": f1_score(truth, guess, average="macro", zero_division=0),
                    "chance": 1 / len(split.classes),
                    "n_classes": len(split.classes),
                    "n_rows": int(held_out.sum()),
                    "n_folds": len(split.folds),
                }
            )
    return pd.DataFrame(results)
