"""Classification with wells, plates or perturbations held out: logistic regression and nearest neighbours."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellvim.errors import InputError, MetadataError, listing
from cellvim.evaluate.features import Features

N_FOLDS = 5
N_NEIGHBOURS = 5
MAX_CLASSES = 1000  # a logistic regression with more takes hours and is not informative
CLASSIFIERS = ("logistic", "kNN")


@dataclass(frozen=True)
class Split:
    """Folds of rows that never split a group between training and test.

    Attributes
    ----------
    rows
        Positions of the rows used.
    target
        (len(rows),) class numbers.
    classes
        Names of the classes.
    folds
        Training and test rows of each fold, as positions in ``rows``.
    remark
        What was omitted, or "".
    """

    rows: np.ndarray
    target: np.ndarray
    classes: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    remark: str = ""


def split_by_group(labels: pd.Series, groups: pd.Series, *, n_folds: int = N_FOLDS, seed: int = 0) -> Split:
    """Split rows into folds by group, omitting classes that occur in one group only, which cannot be predicted.

    Parameters
    ----------
    labels, groups
        (n,) class of each row, and groups that are held out together, such as wells. Rows without either are ignored.
    n_folds
        Maximum number of folds; fewer if the rarest class occurs in fewer groups.
    seed
        Random seed of the split.

    Raises
    ------
    MetadataError
        Fewer than two classes occur in two groups, or no split is possible.
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
            f"{int(usable.sum())} of {len(classes)} classes occur in two or more of the {len(names)} held-out groups; "
            "expected at least 2 classes."
        )
    if usable.sum() > MAX_CLASSES:
        raise MetadataError(f"There are {usable.sum():,} classes; classification is limited to {MAX_CLASSES:,}.")
    rows = np.flatnonzero(known & np.r_[usable, False][class_of])
    number = np.cumsum(usable) - 1
    target, group = number[class_of[rows]], group_of[rows]
    splitter = StratifiedGroupKFold(min(n_folds, int(n_groups[usable].min())), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # for rare classes, which are checked below
        folds = [
            (train, test)
            for train, test in splitter.split(rows, target, group)
            if len(test) and len(np.unique(target[train])) > 1
        ]
    if not folds:
        raise MetadataError("No fold has two classes to train on.")
    omitted = listing(map(str, np.asarray(classes)[~usable]))
    remark = f"{(~usable).sum()} classes occur in one group only and were omitted: {omitted}."
    return Split(rows, target, np.asarray(classes)[usable].astype(str), folds, "" if usable.all() else remark)


def classify(features: Features, split: Split, *, seed: int = 0) -> pd.DataFrame:
    """Predict the class of held-out rows.

    Features are standardised on the training rows. The classifiers are logistic regression with the defaults of
    scikit-learn and equal class weights, and the 5 nearest neighbours by the distance of the features. There is no
    hyperparameter tuning.

    Parameters
    ----------
    features
        Features of the rows.
    split
        Returned by `split_by_group`; use the same split to compare sets of features.
    seed
        Random seed of the solver.

    Returns
    -------
    pandas.DataFrame
        One row per classifier: ``classifier``, ``balanced_accuracy``, ``accuracy``, ``macro_f1`` over all held-out
        rows; ``balanced_accuracy_std`` over the folds; ``chance`` (1 / classes), ``n_classes``, ``n_rows``,
        ``n_folds``.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise InputError("Classification requires scikit-learn: pip install 'cellvim[analysis]'.") from error

    values = features.values[split.rows]
    k = min(N_NEIGHBOURS, *(len(train) for train, _ in split.folds))
    weights = "uniform" if features.distance == "cosine" else "distance"
    models = (
        LogisticRegression(class_weight="balanced", max_iter=2000, random_state=seed),
        KNeighborsClassifier(k, metric=features.distance, weights=weights),
    )
    results = []
    for name, model in zip(CLASSIFIERS, models, strict=True):
        predicted = np.full(len(split.rows), -1)
        with warnings.catch_warnings():
            # for classes with few replicates, and predicted classes that do not occur in a fold
            warnings.simplefilter("ignore", UserWarning)
            for train, test in split.folds:
                fitted = make_pipeline(StandardScaler(), model).fit(values[train], split.target[train])
                predicted[test] = fitted.predict(values[test])
            held_out = predicted >= 0
            truth, guess = split.target[held_out], predicted[held_out]
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
