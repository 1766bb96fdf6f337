"""Assay quality: activity of each well relative to the controls of its plate, and Z′, the separation of controls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from cellvim.errors import MetadataError
from cellvim.evaluate.features import Features
from cellvim.profiles.columns import Columns, negative_controls, positive_controls, text

ACTIVITY = "activity"
MAD_TO_STD = 1.4826


def activity_scores(features: Features, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Project each row onto the line from the negative to the positive controls of its plate.

    The score is 0 at the mean of the negative controls and 1 at the mean of the positive controls. Each control is
    projected onto the line defined by the *other* controls; otherwise, with more features than wells, controls would be
    separated by chance.

    Parameters
    ----------
    features
        Features of the rows.
    obs
        Table of the same rows.
    columns
        Columns of controls and plates (without a plate column, all rows are one plate).

    Returns
    -------
    pandas.DataFrame
        One row per row of ``obs``, with its index: ``plate``, ``kind`` ("negative", "positive" or ""), ``activity``
        (NaN on plates with fewer than two negative or positive controls).

    Raises
    ------
    MetadataError
        There are no negative or no positive controls, or no plate has two of each.
    """
    negative, positive = negative_controls(obs, columns), positive_controls(obs, columns)

    def score(rows: np.ndarray) -> np.ndarray | None:
        enough = negative[rows].sum() >= 2 and positive[rows].sum() >= 2
        return _project(features.values[rows], negative[rows], positive[rows]) if enough else None

    kind = np.where(negative, "negative", np.where(positive, "positive", ""))
    return _score_plates(obs, columns, kind, score, "No plate has two negative and two positive controls.")


def distance_scores(features: Features, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Measure the distance of each row from the negative controls of its plate; for plates without positive controls.

    The score is the Euclidean distance from the mean of the controls, minus the median of the distances of the
    controls, divided by their median absolute deviation (times 1.4826). The distance of a control is measured from the
    mean of the *other* controls.

    Parameters and returns are those of `activity_scores`; a plate needs three negative controls.

    Raises
    ------
    MetadataError
        There are no negative controls, or no plate has three.
    """
    from scipy.stats import median_abs_deviation

    negative = negative_controls(obs, columns)

    def score(rows: np.ndarray) -> np.ndarray | None:
        values, is_control, n = features.values[rows], negative[rows], int(negative[rows].sum())
        if n < 3:
            return None
        own, mean = values[is_control], values[is_control].mean(axis=0)
        distance = np.linalg.norm(values - mean, axis=1)
        distance[is_control] = np.linalg.norm(own - (n * mean - own) / (n - 1), axis=1)
        spread = MAD_TO_STD * median_abs_deviation(distance[is_control])
        return (distance - np.median(distance[is_control])) / spread if spread > 0 else np.full(len(rows), np.nan)

    kind = np.where(negative, "negative", "")
    return _score_plates(obs, columns, kind, score, "No plate has three negative controls.")


def activity_or_distance(features: Features, obs: pd.DataFrame, columns: Columns) -> tuple[pd.DataFrame, bool]:
    """Return `activity_scores` and False; or `distance_scores` and True, if there are no positive controls."""
    try:
        return activity_scores(features, obs, columns), False
    except MetadataError:
        return distance_scores(features, obs, columns), True


def _score_plates(
    obs: pd.DataFrame,
    columns: Columns,
    kind: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray | None],
    error: str,
) -> pd.DataFrame:
    plate = text(obs[columns.plate]).fillna("") if columns.plate is not None else pd.Series("", index=obs.index)
    scores = np.full(len(obs), np.nan)
    for name in plate.unique():
        rows = np.flatnonzero(plate == name)
        if (found := score(rows)) is not None:
            scores[rows] = found
    if np.isnan(scores).all():
        raise MetadataError(error)
    return pd.DataFrame({"plate": plate.to_numpy(), "kind": kind, ACTIVITY: scores}, index=obs.index)


def _project(values: np.ndarray, negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    low, high = values[negative].mean(axis=0), values[positive].mean(axis=0)
    projected = (values - (low + high) / 2) @ _direction(high - low)
    for rows, others, sign in ((negative, low, -1), (positive, high, 1)):
        n = int(rows.sum())
        own = values[rows]
        without = (n * others - own) / (n - 1)  # mean of the other controls of this kind
        ends = (without, np.broadcast_to(high, own.shape)) if sign < 0 else (np.broadcast_to(low, own.shape), without)
        line = _direction(ends[1] - ends[0])
        projected[rows] = ((own - (ends[0] + ends[1]) / 2) * line).sum(axis=1)
    return projected + 0.5


def _direction(difference: np.ndarray) -> np.ndarray:
    """Return the direction of a line, scaled so that projections are in units of its length."""
    length = (difference**2).sum(axis=-1, keepdims=True)
    return difference / np.where(length > 0, length, 1)


def assay_quality(scores: pd.DataFrame) -> pd.DataFrame:
    """Compute Z′ [1]_ of each plate from activity scores.

    Parameters
    ----------
    scores
        Returned by `activity_scores`.

    Returns
    -------
    pandas.DataFrame
        One row per plate: ``plate``, ``n_negative``, ``n_positive``; ``z_prime``, 1 − 3 (σ₊ + σ₋) / (μ₊ − μ₋), above
        0.5 for an excellent assay, below 0 if the controls overlap, −∞ if μ₊ ≤ μ₋; ``robust_z_prime``, the same with
        medians and median absolute deviations; ``ssmd``, (μ₊ − μ₋) / √(σ₊² + σ₋²). NaN for plates without scores.

    References
    ----------
    .. [1] Zhang, Chung and Oldenburg, "A simple statistical parameter for use in evaluation and validation of high
       throughput screening assays", Journal of Biomolecular Screening, 1999.
    """
    from scipy.stats import median_abs_deviation

    results = []
    for plate, table in scores.groupby("plate", sort=True):
        low, high = (table.loc[table["kind"] == kind, ACTIVITY].to_numpy() for kind in ("negative", "positive"))
        result = {"plate": plate, "n_negative": len(low), "n_positive": len(high)}
        if min(len(low), len(high)) >= 2 and np.isfinite([*low, *high]).all():
            spread = low.std(ddof=1), high.std(ddof=1)
            robust = tuple(MAD_TO_STD * median_abs_deviation(group) for group in (low, high))
            result |= {
                "z_prime": _z_prime(sum(spread), high.mean() - low.mean()),
                "robust_z_prime": _z_prime(sum(robust), float(np.median(high) - np.median(low))),
                "ssmd": (high.mean() - low.mean()) / np.hypot(*spread) if any(spread) else np.nan,
            }
        results.append(result)
    return pd.DataFrame(results, columns=["plate", "n_negative", "n_positive", "z_prime", "robust_z_prime", "ssmd"])


def _z_prime(spread: float, window: float) -> float:
    return 1 - 3 * spread / window if window > 0 else -np.inf
