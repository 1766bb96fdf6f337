"""Coordinates of the map of cells: from the AnnData, or by UMAP of a sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cellvim.errors import InputError
from cellvim.evaluate.features import sample_rows

MAX_CELLS = 20_000  # limit for UMAP; existing coordinates are shown up to MAX_SHOWN
MAX_SHOWN = 200_000
N_COMPONENTS = 50
N_NEIGHBORS = 15


@dataclass(frozen=True, eq=False)
class Projection:
    """Two-dimensional coordinates of the displayed cells.

    Attributes
    ----------
    rows
        (m,) ascending rows of the AnnData.
    coordinates
        (m, 2) float32.
    method
        "UMAP" or "PCA".
    notes
        Sentences on sampling and excluded cells.
    """

    rows: np.ndarray
    coordinates: np.ndarray
    method: str
    notes: list[str]


def project_cells(
    read: Callable[[np.ndarray], np.ndarray],
    groups: np.ndarray,
    *,
    existing: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    max_cells: int = MAX_CELLS,
    seed: int = 0,
) -> Projection:
    """Return two-dimensional coordinates of the cells.

    Parameters
    ----------
    read
        Function from (m,) rows to (m, D) embeddings.
    groups
        (n,) integer codes of the wells, for even sampling.
    existing
        (n, 2) coordinates stored in the AnnData; None to compute them.
    keep
        Rows to include in any case.
    max_cells
        Maximum number of cells for UMAP.
    seed
        Random seed for the sample and for UMAP.

    Raises
    ------
    InputError
        No cell has finite values, or umap-learn is not installed.
    """
    total = len(groups)
    if total == 0:
        raise InputError("The AnnData has no rows, so there is no map.")
    notes = []
    rows = sample_rows(groups, MAX_SHOWN if existing is not None else max_cells, keep=keep, seed=seed)
    if len(rows) < total:
        notes.append(f"{len(rows):,} of {total:,} cells are shown, sampled evenly from the wells.")
    values = existing[rows, :2] if existing is not None else read(rows)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        notes.append(f"{int((~finite).sum()):,} cells are excluded because their values are not finite.")
        rows, values = rows[finite], values[finite]
    if not len(rows):
        raise InputError("No cell has finite values, so there is no map.")
    if existing is not None:
        return Projection(rows, np.asarray(values, np.float32), "UMAP", [*notes, "Coordinates: obsm['X_umap']."])
    reduced = _principal_components(values)
    if len(rows) < 3 * N_NEIGHBORS:
        notes.append(f"{len(rows)} cells are too few for UMAP; the first two principal components are shown.")
        return Projection(rows, _first_two(reduced), "PCA", notes)
    return Projection(rows, _umap(reduced, seed), "UMAP", notes)


def _principal_components(values: np.ndarray) -> np.ndarray:
    """(m, D) -> (m, up to N_COMPONENTS), from the covariance, because D is much smaller than m."""
    values = np.asarray(values, np.float64)
    centered = values - values.mean(0)
    _, vectors = np.linalg.eigh(centered.T @ centered)
    vectors = vectors[:, ::-1][:, :N_COMPONENTS]
    sign = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])  # makes the signs reproducible
    return centered @ (vectors * sign)


def _first_two(reduced: np.ndarray) -> np.ndarray:
    out = np.zeros((len(reduced), 2), np.float32)
    out[:, : min(2, reduced.shape[1])] = reduced[:, :2]
    return out


def _umap(reduced: np.ndarray, seed: int) -> np.ndarray:
    """UMAP from exact neighbours; umap's own search would take a minute to compile in each run."""
    if np.ptp(reduced, axis=0).max(initial=0) == 0:  # UMAP fails on identical cells
        return _first_two(reduced)
    reduced = reduced.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of umap and numba
        try:
            from sklearn.neighbors import NearestNeighbors
            from umap import UMAP
        except ImportError as error:
            raise InputError("The map requires umap-learn. Install it: pip install 'cellvim[report]'") from error
        search = NearestNeighbors(n_neighbors=N_NEIGHBORS, algorithm="brute").fit(reduced)
        distances, neighbors = search.kneighbors(reduced)
        mapper = UMAP(
            n_neighbors=N_NEIGHBORS,
            min_dist=0.3,
            init="pca",  # keeps the global structure, reproducibly (Kobak, Linderman, Nat. Biotechnol. 2021)
            random_state=seed,
            precomputed_knn=(neighbors, distances),
        )
        return mapper.fit_transform(reduced)
