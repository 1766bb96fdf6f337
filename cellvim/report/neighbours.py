"""Which perturbations look most alike: cosine similarity of their mean profiles, and crops of their cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cellvim.errors import InputError

NEAREST, CROPS_EACH = 5, 6
MAX_PERTURBATIONS = 3000


def nearest_perturbations(names: np.ndarray, values: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return for each perturbation those whose mean profiles are most similar.

    Parameters
    ----------
    names
        (n,) perturbation of each row; None for rows that have none.
    values
        (n, D) profiles, centred so that 0 is no effect (the controls).

    Returns
    -------
    names : list of str
        P perturbations.
    nearest : numpy.ndarray
        (P, up to 5) their nearest, best first.
    similarity : numpy.ndarray
        (P, up to 5) cosine similarity.

    Raises
    ------
    InputError
        There are fewer than two perturbations.
    """
    finite = np.isfinite(values).all(axis=0)
    treated = np.array([name is not None and name != "" for name in names], bool)
    codes, found = pd.factorize(names[treated], sort=True)
    if len(found) < 2:
        raise InputError(f"There {'is 1 perturbation' if len(found) == 1 else 'are no perturbations'} to compare.")
    if not finite.any():
        raise InputError("No feature of the profiles is finite in every row, so they cannot be compared.")
    chosen = values[treated][:, finite]
    means = np.zeros((len(found), chosen.shape[1]))
    np.add.at(means, codes, chosen)
    means /= np.bincount(codes)[:, None]
    length = np.linalg.norm(means, axis=1, keepdims=True)
    unit = means / np.where(length > 0, length, 1)
    count = min(NEAREST, len(found) - 1)
    nearest = np.empty((len(found), count), np.int64)
    similarity = np.empty((len(found), count))
    for start in range(0, len(found), 512):
        cosine = unit[start : start + 512] @ unit.T
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = -np.inf
        best = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        of_best = np.take_along_axis(cosine, best, axis=1)
        order = np.argsort(-of_best, axis=1, kind="stable")
        nearest[start : start + 512] = np.take_along_axis(best, order, axis=1)
        similarity[start : start + 512] = np.take_along_axis(of_best, order, axis=1)
    return [str(name) for name in found], nearest, similarity


def typical_crops(perturbation: np.ndarray, embeddings: np.ndarray, count: int = CROPS_EACH) -> dict[str, list[int]]:
    """Return the crops that are nearest to the mean of their perturbation, among those of the page.

    Parameters
    ----------
    perturbation
        (k,) of each crop; None for none.
    embeddings
        (k, D) of the crops' cells.
    count
        Crops of each.
    """
    typical: dict[str, list[int]] = {}
    finite = np.isfinite(embeddings).all(axis=1)
    for name in sorted({str(n) for n in perturbation if n is not None and n != ""}):
        own = np.flatnonzero((perturbation == name) & finite)
        if len(own):
            distance = np.linalg.norm(embeddings[own] - embeddings[own].mean(axis=0), axis=1)
            typical[name] = own[np.argsort(distance, kind="stable")[:count]].tolist()
    return typical


def neighbour_data(
    names: list[str],
    nearest: np.ndarray,
    similarity: np.ndarray,
    crops: dict[str, list[int]],
    about: dict[str, list[list[str]]],
    strength: dict[str, float],
) -> dict[str, Any]:
    """Put together what the page shows; the strongest perturbation comes first."""
    initial = max(range(len(names)), key=lambda i: (strength.get(names[i], -np.inf), bool(crops.get(names[i])), -i))
    return {
        "initial": initial,
        "without": "No crops of it are in this page.",
        "list": [
            {
                "name": name,
                "crops": crops.get(name, []),
                "about": about.get(name, []),
                "nearest": [[int(j), round(float(s), 4)] for j, s in zip(nearest[i], similarity[i], strict=True)],
            }
            for i, name in enumerate(names)
        ],
    }
