"""The map of cells: two coordinates for each, from the AnnData or by UMAP of a sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cellvim.errors import InputError
from cellvim.evaluate.features import sample_rows

MAX_CELLS = 20_000  # laid out by UMAP here; coordinates that the AnnData brings are shown up to MAX_SHOWN
MAX_SHOWN = 200_000
COMPONENTS = 50
NEIGHBOURS = 15


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Where each of the shown cells lies.

    Attributes
    ----------
    rows
        (m,) the cells' rows in the AnnData, ascending.
    coordinates
        (m, 2) float32.
    method
        "UMAP" or "PCA".
    notes
        What was sampled or left out, a sentence each.
    """

    rows: np.ndarray
    coordinates: np.ndarray
    method: str
    notes: list[str]


def lay_out(
    read: Callable[[np.ndarray], np.ndarray],
    groups: np.ndarray,
    *,
    existing: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    most: int = MAX_CELLS,
    seed: int = 0,
) -> EmbeddingMap:
    """Lay out cells in two dimensions.

    Parameters
    ----------
    read
        (m,) rows -> (m, D) embeddings.
    groups
        (n,) codes of the wells, to sample evenly.
    existing
        (n, 2) coordinates that the AnnData brings; None to make them.
    keep
        Rows that have to be shown.
    most
        Cells to lay out at most.
    seed
        Of the sample and of UMAP.

    Raises
    ------
    InputError
        There are no cells with finite numbers, or umap-learn is not installed.
    """
    total = len(groups)
    if total == 0:
        raise InputError("There are no rows to lay out.")
    notes = []
    shown = MAX_SHOWN if existing is not None else most
    rows = sample_rows(groups, shown, keep=keep, seed=seed)
    if len(rows) < total:
        notes.append(f"{len(rows):,} of {total:,} cells are shown, drawn evenly from the wells.")
    values = existing[rows] if existing is not None else read(rows)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        notes.append(f"{int((~finite).sum()):,} cells are left out: their numbers are not finite.")
        rows, values = rows[finite], values[finite]
    if not len(rows):
        raise InputError("No cell has finite numbers, so there is nothing to lay out.")
    if existing is not None:
        return EmbeddingMap(rows, np.asarray(values, np.float32), "UMAP", [*notes, "Coordinates: obsm['X_umap']."])
    reduced = _principal(values)
    if len(rows) < 3 * NEIGHBOURS:
        notes.append(f"{len(rows)} cells are too few for UMAP: these are the first two principal components.")
        return EmbeddingMap(rows, _two(reduced), "PCA", notes)
    return EmbeddingMap(rows, _umap(reduced, seed), "UMAP", notes)


def _principal(values: np.ndarray, count: int = COMPONENTS) -> np.ndarray:
    """(m, D) -> (m, up to ``count``) principal components, by the covariance: D is small beside m."""
    values = np.asarray(values, np.float64)
    centred = values - values.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    vectors = vectors[:, ::-1][:, :count]
    sign = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])  # else it is arbitrary
    return centred @ (vectors * sign)


def _two(reduced: np.ndarray) -> np.ndarray:
    out = np.zeros((len(reduced), 2), np.float32)
    out[:, : min(2, reduced.shape[1])] = reduced[:, :2]
    return out


def _umap(reduced: np.ndarray, seed: int) -> np.ndarray:
    """UMAP from exact neighbours: umap's own search would take a minute to compile, each time."""
    if np.ptp(reduced, axis=0).max(initial=0) == 0:  # all cells the same: there is nothing to unfold
        return _two(reduced)
    reduced = reduced.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of umap and numba
        try:
            from sklearn.neighbors import NearestNeighbors
            from umap import UMAP
        except ImportError as error:
            raise InputError("The map needs umap-learn. Install it: pip install 'cellvim[report]'") from error
        search = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(reduced)
        distances, neighbours = search.kneighbors(reduced)
        mapper = UMAP(
            n_neighbors=NEIGHBOURS,
            min_dist=0.3,
            init="pca",  # keeps the large picture, and is the same every time (Kobak, Linderman, Nat. Biotechnol. 2021)
            random_state=seed,
            precomputed_knn=(neighbours, distances),
        )
        return mapper.fit_transform(reduced)
