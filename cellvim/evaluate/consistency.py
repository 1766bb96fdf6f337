"""Perturbation consistency: are replicates more alike than rows drawn at random?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from cellvim.errors import MetadataError
from cellvim.evaluate.features import Features
from cellvim.evaluate.treatments import find_treatments
from cellvim.profiles.columns import Columns

NULL_SIZE = 10_000


def replicate_consistency(
    features: Features, obs: pd.DataFrame, columns: Columns, *, null_size: int = NULL_SIZE, seed: int = 0
) -> pd.DataFrame:
    """Compare the similarity of each treatment's replicates with that of as many treated rows drawn at random [1]_.

    Needs no controls. Replicates that share a plate are alike for that reason alone; this does not correct for it.

    Parameters
    ----------
    features
        What is compared.
    obs
        The table of the same rows.
    columns
        Perturbation and dose.
    null_size
        Random draws for each number of replicates.
    seed
        Of these.

    Returns
    -------
    pandas.DataFrame
        One row a treatment of at least two replicates: its columns, ``n_replicates``, ``mean_similarity`` (mean cosine
        of all pairs; for euclidean features the negative mean squared distance), ``p_value`` (share of draws that are
        at least as similar), ``corrected_p_value`` (Benjamini-Hochberg) and ``consistent``, whether that is below 0.05.

    Raises
    ------
    MetadataError
        There is no column of perturbations, or no treatment has two replicates.

    References
    ----------
    .. [1] Celik et al., "Building, benchmarking, and exploring perturbative maps of transcriptional and morphological
       data", PLoS Computational Biology, 2024.
    """
    from scipy.stats import false_discovery_control

    treatments = find_treatments(obs, columns)
    counts = treatments.counts
    replicated = np.flatnonzero(counts >= 2)
    if not replicated.size:
        raise MetadataError("No treatment has two replicates.")
    values = features.values[treatments.rows]
    order = np.argsort(treatments.codes, kind="stable")
    members = np.split(order, np.cumsum(counts)[:-1])
    rng = np.random.default_rng(seed)
    null = {
        int(m): np.sort(
            np.concatenate(
                [
                    _similarity(values[draw], features.distance)
                    for draw in _draws(rng, len(values), int(m), null_size, values.shape[1])
                ]
            )
        )
        for m in np.unique(counts[replicated])
    }
    similarity = np.array([_similarity(values[members[t]][None], features.distance)[0] for t in replicated])
    less = [np.searchsorted(null[int(counts[t])], s - 1e-12) for t, s in zip(replicated, similarity, strict=True)]
    p = (1 + null_size - np.array(less)) / (1 + null_size)
    q = false_discovery_control(p)
    result = treatments.table.loc[replicated].reset_index(drop=True)
    result = result.assign(
        n_replicates=counts[replicated], mean_similarity=similarity, p_value=p, corrected_p_value=q, consistent=q < 0.05
    )
    return result.sort_values("mean_similarity", ascending=False, kind="stable").reset_index(drop=True)


def _similarity(values: np.ndarray, distance: str) -> np.ndarray:
    """Return the mean similarity over all pairs of the m rows of each draw; values (draws, m, D).

    From sums alone: for unit vectors z, the sum of all pairs' cosines is (|Σz|² − m) / 2.
    """
    m = values.shape[1]
    if distance == "cosine":
        norm = np.linalg.norm(values, axis=2, keepdims=True)
        unit = values / np.where(norm > 0, norm, 1)
        total = (unit.sum(axis=1) ** 2).sum(axis=1)
        return (total - (unit**2).sum(axis=(1, 2))) / (m * (m - 1))
    return -2 * values.var(axis=1, ddof=1).sum(axis=1)


def _draws(rng: np.random.Generator, n: int, m: int, draws: int, width: int):
    """Yield (draws, m) positions, distinct within a draw, a few draws at a time so that memory stays small."""
    at_once = max(1, min(draws, 32_000_000 // max(1, m * width), 32_000_000 // n))
    for start in range(0, draws, at_once):
        size = min(at_once, draws - start)
        if 4 * m > n:
            yield rng.permuted(np.tile(np.arange(n), (size, 1)), axis=1)[:, :m]
            continue
        chosen = rng.integers(n, size=(size, m))
        while (again := (np.diff(np.sort(chosen, axis=1), axis=1) == 0).any(axis=1)).any():
            chosen[again] = rng.integers(n, size=(int(again.sum()), m))
        yield chosen
