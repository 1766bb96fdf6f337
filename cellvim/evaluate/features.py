"""What is evaluated, and the baselines that stand beside it: cell count, mean intensities, random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from cellvim.errors import InputError, listing
from cellvim.profiles.columns import OBJECT_COUNT, matrix, representations

if TYPE_CHECKING:
    from anndata import AnnData

Distance = Literal["cosine", "euclidean"]
CELL_COUNT, INTENSITIES, RANDOM = "cell count", "mean intensities", "random"


@dataclass(frozen=True)
class Features:
    """One set of numbers about each row.

    Attributes
    ----------
    name
        What it is called in tables.
    values
        (n, D) float64, finite.
    distance
        How rows are compared: "cosine"; "euclidean" for a handful of numbers, whose direction says little.
    left_out
        Features that were left out because they are not finite.
    is_baseline
        Whether it is there to be beaten.
    """

    name: str
    values: np.ndarray
    distance: Distance = "cosine"
    left_out: int = 0
    is_baseline: bool = False

    def __getitem__(self, rows: np.ndarray) -> Features:
        return Features(self.name, self.values[rows], self.distance, self.left_out, self.is_baseline)


def feature_sets(adata: AnnData, use: Sequence[str], *, seed: int = 0) -> tuple[list[Features], list[str]]:
    """Return the representations that were asked for, then the baselines.

    Parameters
    ----------
    adata
        Profiles.
    use
        Names of representations: "X", layers, entries of obsm.
    seed
        Of the random numbers.

    Returns
    -------
    list[Features]
        The representations; "mean intensities" (``obs`` columns ``mean_intensity_*``, standardised) and "cell count"
        where they are known; and "random", normal numbers as many as the first representation has.
    list[str]
        Why a baseline is missing, a line each.

    Raises
    ------
    CellvimError
        A representation is not there, or none of its features is finite.
    """
    sets, reasons = [], []
    for name in use:
        values = matrix(adata, name)
        finite = np.isfinite(values).all(axis=0)
        if adata.n_obs > 1 and not np.ptp(values[:, finite], axis=0).any() and finite.any():
            raise InputError(f"'{name}' is the same in every row; there is nothing to evaluate.")
        if not finite.any():
            raise InputError(f"'{name}' has no feature that is finite in every row; there is nothing to evaluate.")
        sets.append(Features(name, values[:, finite], left_out=int((~finite).sum())))
    known = [name for name in adata.obs.columns if str(name).startswith("mean_intensity_")]
    if known:
        values = adata.obs[known].to_numpy(np.float64)
        if np.isfinite(values).all():
            spread = values.std(axis=0)
            values = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)
            sets.append(Features(INTENSITIES, values, "euclidean", is_baseline=True))
        else:
            reasons.append(f"Baseline {INTENSITIES}: some are not finite.")
    if OBJECT_COUNT in adata.obs:
        count = adata.obs[OBJECT_COUNT].to_numpy(np.float64)[:, None]
        # Wells with as many cells are ties, and copairs ranks replicates first among ties: break them at random.
        count = count + np.random.default_rng(seed).uniform(-0.1, 0.1, count.shape)
        sets.append(Features(CELL_COUNT, count, "euclidean", is_baseline=True))
    else:
        reasons.append(f"Baseline {CELL_COUNT}: obs has no {OBJECT_COUNT} (cellvim profile adds it).")
    normal = np.random.default_rng(seed).normal(size=sets[0].values.shape)
    sets.append(Features(RANDOM, normal, is_baseline=True))
    return sets, reasons


def latest_representation(adata: AnnData) -> str:
    """Return the name of what was made last by `cellvim.profiles`, or "X"."""
    latest = str(adata.uns.get("cellvim", {}).get("profile", {}).get("latest", "X"))
    if latest not in representations(adata):
        raise InputError(
            f"'{latest}' was made last, but it is not there; there are {listing(representations(adata))}. Choose with "
            "--use."
        )
    return latest
