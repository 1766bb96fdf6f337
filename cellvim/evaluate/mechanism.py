"""Mechanism of action: is the nearest other compound one of the same mechanism?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from cellvim.errors import MetadataError
from cellvim.evaluate.features import Features
from cellvim.evaluate.retrieval import average_precision, mean_average_precision
from cellvim.evaluate.treatments import Treatments, find_treatments
from cellvim.profiles.columns import Columns, role, text

NULL_SIZE = 10_000


def nearest_mechanism(features: Features, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Predict each treatment's mechanism by its nearest neighbour, NSC and NSB [1]_ [2]_.

    A treatment's profile is the mean of its replicates. Its neighbour is the nearest treatment by another compound
    (not-same-compound, NSC), or by another compound and in none of its own batches (not-same-compound-or-batch, NSB).
    Treatments that have no such neighbour of their own mechanism cannot be predicted and do not count.

    Parameters
    ----------
    features
        What is compared.
    obs
        The table of the same rows.
    columns
        Perturbation, dose, mechanism, and batch for NSB.

    Returns
    -------
    pandas.DataFrame
        One row a treatment: its columns; ``n_replicates``; and for ``nsc`` and, with batches, ``nsb``:
        ``nsc_neighbour`` (the compound), ``nsc_mechanism``, ``nsc_similarity`` and ``nsc_correct`` (None where the
        treatment cannot be predicted).

    Raises
    ------
    MetadataError
        There is no column of perturbations or mechanisms, or no mechanism has two compounds.

    References
    ----------
    .. [1] Ljosa et al., "Comparison of methods for image-based profiling of cellular morphological responses to
       small-molecule treatment", Journal of Biomolecular Screening, 2013.
    .. [2] Ando, McLean and Berndl, "Improving phenotypic measurements in high-content imaging screens", bioRxiv, 2017.
    """
    treatments = _with_mechanism(obs, columns)
    similarity = _similarity(treatments.means(features.values), features.distance)
    compound = treatments.table[columns.perturbation].to_numpy()
    mechanism = treatments.table[columns.mechanism].to_numpy()
    other = compound[:, None] != compound[None]
    same_mechanism = mechanism[:, None] == mechanism[None]
    if not (other & same_mechanism).any():
        raise MetadataError(f"No mechanism of '{columns.mechanism}' has two compounds, so none can be predicted.")
    result = treatments.table.assign(n_replicates=treatments.counts)
    schemes = {"nsc": other} | _other_batch(obs, columns, treatments, other)
    for name, allowed in schemes.items():
        masked = np.where(allowed, similarity, -np.inf)
        nearest = masked.argmax(axis=1)
        possible = (allowed & same_mechanism).any(axis=1)
        rows = np.arange(len(nearest))
        result[f"{name}_neighbour"] = np.where(possible, compound[nearest], None)
        result[f"{name}_mechanism"] = np.where(possible, mechanism[nearest], None)
        result[f"{name}_similarity"] = np.where(possible, masked[rows, nearest], np.nan)
        result[f"{name}_correct"] = np.where(possible, mechanism[nearest] == mechanism, None)
    return result


def mechanism_map(
    features: Features, obs: pd.DataFrame, columns: Columns, *, null_size: int = NULL_SIZE, seed: int = 0
) -> pd.DataFrame:
    """Compute the mean average precision of each mechanism: do its compounds find each other among all others?

    By copairs, on the means of the treatments' replicates. Positive pairs are two compounds of one mechanism, negative
    ones two compounds of two mechanisms.

    Returns
    -------
    pandas.DataFrame
        One row a mechanism of at least two compounds: the mechanism, ``mean_average_precision``,
        ``mean_normalized_average_precision``, ``p_value``, ``corrected_p_value`` and ``retrieved``, whether the last is
        below 0.05.

    Raises
    ------
    MetadataError
        As `nearest_mechanism`.
    """
    treatments = _with_mechanism(obs, columns)
    means = Features(features.name, treatments.means(features.values), features.distance)
    table = pd.DataFrame(
        {
            "mechanism": treatments.table[columns.mechanism].astype(str),
            "compound": treatments.table[columns.perturbation].astype(str),
        }
    )
    precision = average_precision(
        table,
        means,
        pos_sameby=["mechanism"],
        pos_diffby=["compound"],
        neg_sameby=[],
        neg_diffby=["mechanism", "compound"],
        wanted="two compounds of one mechanism, and one of another",
    )
    result = mean_average_precision(precision, ["mechanism"], null_size=null_size, seed=seed)
    return result.rename(columns={"mechanism": columns.mechanism, "below_corrected_p": "retrieved"})


def _with_mechanism(obs: pd.DataFrame, columns: Columns) -> Treatments:
    name = role(columns, "mechanism", obs)
    treatments = find_treatments(obs, columns)
    known = treatments.table[name].notna().to_numpy() & (treatments.table[name] != "").to_numpy()
    if not known.any():
        raise MetadataError(f"No treated row has a mechanism in '{name}'.")
    number = np.cumsum(known) - 1
    kept = known[treatments.codes]
    table = treatments.table[known].reset_index(drop=True)
    return Treatments(treatments.rows[kept], number[treatments.codes[kept]], table)


def _other_batch(obs: pd.DataFrame, columns: Columns, treatments: Treatments, other: np.ndarray):
    """Return which pairs have no batch in common either, unless there is one batch only."""
    if columns.batch is None:
        return {}
    codes, batches = pd.factorize(text(obs[columns.batch]).fillna("").to_numpy()[treatments.rows])
    if len(batches) < 2:
        return {}
    member = np.zeros((len(treatments.table), len(batches)))
    member[treatments.codes, codes] = 1
    return {"nsb": other & (member @ member.T == 0)}


def _similarity(means: np.ndarray, distance: str) -> np.ndarray:
    if distance == "cosine":
        norm = np.linalg.norm(means, axis=1, keepdims=True)
        unit = means / np.where(norm > 0, norm, 1)
        return unit @ unit.T
    from scipy.spatial.distance import cdist

    return -cdist(means, means)
