"""Batch effects: separation of batches that should be indistinguishable.

Silhouettes are computed by scikit-learn and LISI by harmonypy. kBET, a chi-squared test of each neighbourhood, is
computed here with scipy: scib-metrics, which implements it, depends on jax.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from cellvim.errors import InputError, MetadataError
from cellvim.evaluate.features import Features, unit_rows

MAX_ROWS = 5000  # silhouettes are quadratic in the rows; larger tables are sampled, as recorded in ``n_rows``
MIN_NEIGHBOURS = 5


def batch_effects(
    features: Features, batch: pd.Series, *, label: pd.Series | None = None, seed: int = 0
) -> pd.DataFrame:
    """Measure the separation of batches.

    Parameters
    ----------
    features
        Features of the rows, preferably of negative controls only, which are the same in all batches.
    batch
        (n,) batch of each row; rows without a batch are ignored.
    label
        (n,) treatments; if given, the silhouette of the treatments is measured as well.
    seed
        Random seed for sampling more than 5,000 rows.

    Returns
    -------
    pandas.DataFrame
        One row per measure: ``measure``, ``value``, ``best`` (its value without batch effects), ``n_rows``.

        ``batch silhouette``
            1 − |s|, s the mean silhouette of the batches [1]_; 1 is best.
        ``kBET acceptance``
            Share of rows whose nearest neighbours (a quarter of the mean batch size, at least 5) have the batch
            proportions of all rows, by a chi-squared test at 5 % [2]_; 0.95 is best.
        ``batch LISI``
            Effective number of batches in the neighbourhood of a row, scaled from 0 (one) to 1 (all) [3]_; 1 is best.
            NaN for fewer than 7 rows.
        ``label silhouette``
            Mean silhouette of the labels, scaled to 0 … 1 [1]_; 1 is best.

    Raises
    ------
    MetadataError
        There are fewer than two batches with at least two rows.

    References
    ----------
    .. [1] Luecken et al., "Benchmarking atlas-level data integration in single-cell genomics", Nature Methods, 2022.
    .. [2] Büttner et al., "A test metric for assessing single-cell RNA-seq batch correction", Nature Methods, 2019.
    .. [3] Korsunsky et al., "Fast, sensitive and accurate integration of single-cell data with Harmony", Nature
       Methods, 2019.
    """
    from sklearn.metrics import silhouette_score

    codes, names = pd.factorize(batch)
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    if (counts >= 2).sum() < 2:
        raise MetadataError(f"{len(names)} batches, {(counts >= 2).sum()} of them with two or more rows; expected two.")
    rows = np.flatnonzero((codes >= 0) & (np.r_[counts, 0][codes] >= 2))
    if len(rows) > MAX_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_ROWS, replace=False))
    values, (codes, _) = features.values[rows], pd.factorize(codes[rows])
    if features.distance == "cosine":  # Euclidean neighbours of unit vectors are neighbours by cosine
        values = unit_rows(values)
    n_batches = int(codes.max()) + 1
    results = [
        ("batch silhouette", 1 - abs(silhouette_score(values, codes)), 1.0),
        ("kBET acceptance", kbet_acceptance(values, codes), 0.95),
        ("batch LISI", (np.median(_lisi(values, codes)) - 1) / (n_batches - 1), 1.0),
    ]
    if label is not None:
        label_codes, _ = pd.factorize(label.to_numpy()[rows])
        known = label_codes >= 0
        n_labels = len(np.unique(label_codes[known]))
        if 2 <= n_labels < known.sum():
            score = silhouette_score(values[known], label_codes[known])
            results.append(("label silhouette", (score + 1) / 2, 1.0))
    return pd.DataFrame(results, columns=["measure", "value", "best"]).assign(n_rows=len(rows))


def kbet_acceptance(values: np.ndarray, codes: np.ndarray, *, neighbours: int | None = None) -> float:
    """Return the share of rows whose neighbourhood has the batch proportions of all rows (kBET).

    ``values`` is (n, D), ``codes`` (n,) are batch numbers from 0, and ``neighbours`` does not include the row itself.
    """
    from scipy.stats import chisquare
    from sklearn.neighbors import NearestNeighbors

    n, n_batches = len(codes), int(codes.max()) + 1
    k = neighbours or max(MIN_NEIGHBOURS, int(0.25 * n / n_batches))
    k = min(k, n - 1)
    near = NearestNeighbors(n_neighbors=k).fit(values).kneighbors(return_distance=False)  # without the row itself
    observed = np.stack([(codes[near] == b).sum(axis=1) for b in range(n_batches)], axis=1)
    expected = k * np.bincount(codes) / n
    return float((chisquare(observed, expected, axis=1).pvalue >= 0.05).mean())


def _lisi(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the LISI of each row; NaN if there are too few rows for a neighbourhood."""
    try:
        from harmonypy import compute_lisi
    except ImportError as error:
        raise InputError("Batch LISI requires harmonypy: pip install 'cellvim[profiles]'.") from error
    perplexity = min(30, (len(codes) - 1) // 3)
    if perplexity < 2:
        return np.full(len(codes), np.nan)
    return compute_lisi(values, pd.DataFrame({"batch": codes}), ["batch"], perplexity=perplexity)[:, 0]
