"""Mechanism of action: prediction from the nearest other compound, and retrieval of compounds by mechanism."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from cellvim.errors import MetadataError
from cellvim.evaluate.features import Features, unit_rows
from cellvim.evaluate.retrieval import NULL_SIZE, average_precision, mean_average_precision
from cellvim.profiles.columns import Columns, Treatments, column_of, find_treatments, text


def nearest_mechanism(features: Features, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Predict the mechanism of each treatment from its nearest neighbour, NSC and NSB [1]_ [2]_.

    The profile of a treatment is the mean of its replicates. Its neighbour is the nearest treatment with another
    compound (not-same-compound, NSC), or with another compound in other batches (not-same-compound-or-batch, NSB).
    Treatments without a possible neighbour of the same mechanism cannot be predicted and are not counted.

    Parameters
    ----------
    features
        Features of the rows.
    obs
        Table of the same rows.
    columns
        Columns of perturbations, doses, mechanisms, and batches for NSB.

    Returns
    -------
    pandas.DataFrame
        One row per treatment: its columns; ``n_replicates``; and for ``nsc`` and, with batches, ``nsb``:
        ``nsc_neighbour`` (the compound), ``nsc_mechanism``, ``nsc_similarity`` and ``nsc_correct`` (None if the
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
        raise MetadataError(f"No mechanism in '{columns.mechanism}' has two compounds, so none can be predicted.")
    result = treatments.table.assign(n_replicates=treatments.counts)
    schemes = {"nsc": other}
    batch = pd.Series("", index=obs.index) if columns.batch is None else text(obs[columns.batch]).fillna("")
    codes, batches = pd.factorize(batch.to_numpy()[treatments.rows])
    if len(batches) > 1:
        member = np.zeros((len(treatments.table), len(batches)))
        member[treatments.codes, codes] = 1
        schemes["nsb"] = other & (member @ member.T == 0)
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
    """Compute the mean average precision of each mechanism: the retrieval of its compounds among all others.

    Computed by copairs from the means of the replicates. Positive pairs are two compounds with the same mechanism,
    negative pairs two compounds with different mechanisms.

    Returns
    -------
    pandas.DataFrame
        One row per mechanism with at least two compounds: the mechanism, ``mean_average_precision``,
        ``mean_normalized_average_precision``, ``p_value``, ``corrected_p_value`` and ``retrieved`` (corrected p value
        below 0.05).

    Raises
    ------
    MetadataError
        As `nearest_mechanism`.
    """
    treatments = _with_mechanism(obs, columns)
    means = replace(features, values=treatments.means(features.values))
    table = treatments.table[[columns.mechanism, columns.perturbation]].astype(str)
    table.columns = ["mechanism", "compound"]
    precision = average_precision(
        table,
        means,
        pos_sameby=["mechanism"],
        pos_diffby=["compound"],
        neg_sameby=[],
        neg_diffby=["mechanism", "compound"],
        required="two compounds with the same mechanism, and one with another",
    )
    result = mean_average_precision(precision, ["mechanism"], null_size=null_size, seed=seed)
    return result.rename(columns={"mechanism": columns.mechanism, "below_corrected_p": "retrieved"})


def _with_mechanism(obs: pd.DataFrame, columns: Columns) -> Treatments:
    name = column_of(columns, "mechanism", obs)
    treatments = find_treatments(obs, columns)
    known = treatments.table[name].notna().to_numpy() & (treatments.table[name] != "").to_numpy()
    if not known.any():
        raise MetadataError(f"No treated row has a mechanism in '{name}'.")
    number = np.cumsum(known) - 1
    kept = known[treatments.codes]
    table = treatments.table[known].reset_index(drop=True)
    return Treatments(treatments.rows[kept], number[treatments.codes[kept]], table)


def _similarity(means: np.ndarray, distance: str) -> np.ndarray:
    if distance == "cosine":
        unit = unit_rows(means)
        return unit @ unit.T
    from scipy.spatial.distance import cdist

    return -cdist(means, means)
