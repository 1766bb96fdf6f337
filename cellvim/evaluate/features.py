"""Features to evaluate, and the baselines to compare them with: cell count, mean intensities, random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from cellvim.errors import InputError
from cellvim.profiles.columns import OBJECT_COUNT
from cellvim.profiles.representations import latest_representation, matrix

if TYPE_CHECKING:
    from anndata import AnnData

Distance = Literal["cosine", "euclidean"]
CELL_COUNT, INTENSITIES, RANDOM = "cell count", "mean intensities", "random"


@dataclass(frozen=True)
class Features:
    """A set of features.

    Attributes
    ----------
    name
        Name in tables.
    values
        (n, D) float64, finite.
    distance
        Distance between rows: "cosine", or "euclidean" for few features, whose direction is not informative.
    left_out
        Number of features that were omitted because they are not finite.
    is_baseline
        Whether this is a baseline.
    """

    name: str
    values: np.ndarray
    distance: Distance = "cosine"
    left_out: int = 0
    is_baseline: bool = False

    def __getitem__(self, rows: np.ndarray) -> Features:
        return replace(self, values=self.values[rows])


def feature_sets(adata: AnnData, use: Sequence[str], *, seed: int = 0) -> tuple[list[Features], list[str]]:
    """Return the representations ``use`` and the baselines, and why baselines are missing, one sentence each.

    The baselines are "mean intensities" (``obs`` columns ``mean_intensity_*``, standardised) and "cell count", if
    available; and "random", as many normal random numbers as the first representation has features.

    Raises
    ------
    CellvimError
        A representation does not exist, or none of its features is finite and varies.
    """
    sets, reasons = [], []
    for name in use:
        features = finite_representation(adata, name)
        if not features.values.shape[1]:
            raise InputError(f"'{name}' has no feature that is finite in every row; there is nothing to evaluate.")
        if adata.n_obs > 1 and not np.ptp(features.values, axis=0).any():
            raise InputError(f"'{name}' is the same in every row; there is nothing to evaluate.")
        sets.append(features)
    if known := intensity_columns(adata.obs):
        values = adata.obs[known].to_numpy(np.float64)
        if np.isfinite(values).all():
            spread = values.std(axis=0)
            values = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)
            sets.append(Features(INTENSITIES, values, "euclidean", is_baseline=True))
        else:
            reasons.append(f"Baseline {INTENSITIES}: some are not finite.")
    if OBJECT_COUNT in adata.obs:
        count = adata.obs[OBJECT_COUNT].to_numpy(np.float64)[:, None]
        # copairs ranks replicates first among ties, so ties of wells with equal counts are broken at random
        count = count + np.random.default_rng(seed).uniform(-0.1, 0.1, count.shape)
        sets.append(Features(CELL_COUNT, count, "euclidean", is_baseline=True))
    else:
        reasons.append(f"Baseline {CELL_COUNT}: obs has no {OBJECT_COUNT} (cellvim profile adds it).")
    normal = np.random.default_rng(seed).normal(size=sets[0].values.shape)
    sets.append(Features(RANDOM, normal, is_baseline=True))
    return sets, reasons


def finite_representation(adata: AnnData, use: str | None = None) -> Features:
    """Return the features of a representation (by default the latest) that are finite in all rows."""
    use = use or latest_representation(adata)
    values = matrix(adata, use)
    finite = np.isfinite(values).all(axis=0)
    return Features(use, values[:, finite], left_out=int((~finite).sum()))


def intensity_columns(obs: pd.DataFrame) -> list[str]:
    """Return the columns with the mean intensities of the channels."""
    return [name for name in obs.columns if str(name).startswith("mean_intensity_")]


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Scale vectors along the last axis to length 1; zero vectors remain zero."""
    norm = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(norm > 0, norm, 1)


def sample_rows(groups: np.ndarray, most: int, *, keep: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Sample up to ``most`` rows evenly from groups, given as codes (n,), and return them in ascending order.

    The rows ``keep`` are always included; they may exceed ``most``.
    """
    keep = np.empty(0, np.int64) if keep is None else np.unique(np.asarray(keep, np.int64))
    if len(groups) <= most:
        return np.arange(len(groups))
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(groups))
    shuffled = shuffled[np.argsort(groups[shuffled], kind="stable")]  # group by group, in random order within
    place = np.arange(len(shuffled)) - np.searchsorted(groups[shuffled], groups[shuffled])  # 0, 1, … in each group
    place = place + rng.random(len(place))  # breaks the ties of the last round at random
    order = shuffled[np.argsort(place, kind="stable")]
    order = order[~np.isin(order, keep)]
    return np.sort(np.concatenate([keep, order[: max(0, most - len(keep))]]))
