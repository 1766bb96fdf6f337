"""Perturbation consistency: the similarity of replicates, compared with randomly drawn rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from cellvim.errors import MetadataError
from cellvim.evaluate.features import Features, unit_rows
from cellvim.evaluate.retrieval import NULL_SIZE, THRESHOLD
from cellvim.profiles.columns import Columns, find_treatments


def replicate_consistency(
    features: Features, obs: pd.DataFrame, columns: Columns, *, null_size: int = NULL_SIZE, seed: int = 0
) -> pd.DataFrame:
    """Compare the similarity of the replicates of each treatment with that of randomly drawn treated rows [1]_.

    No controls are needed. The similarity of replicates on the same plate is not corrected for plate effects.

    Parameters
    ----------
    features
        Features of the rows.
    obs
        Table of the same rows.
    columns
        Columns of perturbations and doses.
    null_size
        Number of random draws for each number of replicates.
    seed
        Random seed.

    Returns
    -------
    pandas.DataFrame
        One row per treatment with at least two replicates: its columns, ``n_replicates``, ``mean_similarity`` (mean
        cosine of all pairs; for euclidean features the negative mean squared distance), ``p_value`` (share of draws
        that are at least as similar), ``corrected_p_value`` (Benjamini-Hochberg) and ``consistent`` (corrected p value
        below 0.05).

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
    null = {}
    for m in np.unique(counts[replicated]):
        draws = random_subsets(rng, len(values), int(m), null_size, values.shape[1])
        null[int(m)] = np.sort(np.concatenate([mean_similarity(values[draw], features.distance) for draw in draws]))
    similarity = np.array([mean_similarity(values[members[t]][None], features.distance)[0] for t in replicated])
    less = [np.searchsorted(null[int(counts[t])], s - 1e-12) for t, s in zip(replicated, similarity, strict=True)]
    p = (1 + null_size - np.array(less)) / (1 + null_size)
    q = false_discovery_control(p)
    result = treatments.table.loc[replicated].assign(
        n_replicates=counts[replicated],
        mean_similarity=similarity,
        p_value=p,
        corrected_p_value=q,
        consistent=q < THRESHOLD,
    )
    return result.sort_values("mean_similarity", ascending=False, kind="stable").reset_index(drop=True)


def mean_similarity(values: np.ndarray, distance: str) -> np.ndarray:
    """Return the mean similarity of all pairs of rows of each draw, (draws, m, D) -> (draws,).

    It is the cosine, or the negative squared distance. Computed from sums: for unit vectors z, the sum of the cosines
    of all pairs is (|Σz|² − m) / 2.
    """
    m = values.shape[1]
    if distance == "cosine":
        unit = unit_rows(values)
        total = (unit.sum(axis=1) ** 2).sum(axis=1)
        return (total - (unit**2).sum(axis=(1, 2))) / (m * (m - 1))
    return -2 * values.var(axis=1, ddof=1).sum(axis=1)


def random_subsets(rng: np.random.Generator, n: int, m: int, draws: int, width: int) -> Iterator[np.ndarray]:
    """Yield (some draws, m) positions below n, distinct within a draw, in batches to limit memory."""
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
