"""Mean average precision of replicates among controls, computed by copairs."""

from __future__ import annotations

import pandas as pd

from cellvim.errors import InputError, MetadataError
from cellvim.evaluate.features import Features
from cellvim.profiles.columns import Columns, Treatments, find_treatments, negative_controls, text

NULL_SIZE = 10_000
THRESHOLD = 0.05


def replicate_map(
    features: Features, obs: pd.DataFrame, columns: Columns, *, null_size: int = NULL_SIZE, seed: int = 0
) -> pd.DataFrame:
    """Compute the mean average precision of the replicates of each treatment against negative controls [1]_.

    Each replicate ranks the other replicates of the treatment and the negative controls on its plate (on all plates if
    obs has no plate column) by similarity. The mean of the average precisions is compared with that of random ranks,
    and the p values are corrected by the method of Benjamini and Hochberg. Computed by copairs.

    Parameters
    ----------
    features
        Features of the rows.
    obs
        Table of the same rows.
    columns
        Columns of perturbations, doses, controls and plates.
    null_size
        Number of random ranks.
    seed
        Random seed.

    Returns
    -------
    pandas.DataFrame
        One row per treatment with at least two replicates: its columns, ``n_replicates``, ``mean_average_precision``,
        ``mean_normalized_average_precision`` (0 for random ranks, 1 at best), ``p_value``, ``corrected_p_value``, and
        ``active`` (corrected p value below 0.05). Sorted by mean average precision, in descending order.

    Raises
    ------
    MetadataError
        A column is missing, no treatment has two replicates, or there are no controls.

    References
    ----------
    .. [1] Kalinin et al., "A versatile information retrieval framework for evaluating profile strength and similarity",
       Nature Communications, 2025.
    """
    treatments = find_treatments(obs, columns)
    table = _pairs_table(obs, columns, treatments)
    same_plate = ["plate"] if columns.plate is not None else []
    precision = average_precision(
        table,
        features,
        pos_sameby=["treatment", "reference"],
        pos_diffby=[],
        neg_sameby=same_plate,
        neg_diffby=["treatment", "reference"],
        required="two replicates of a treatment, and negative controls on the same plate",
    )
    precision = precision[precision["reference"] == -1]
    result = mean_average_precision(precision, ["treatment"], null_size=null_size, seed=seed)
    result = result.rename(columns={"below_corrected_p": "active"})
    about = treatments.table.assign(n_replicates=treatments.counts)
    about = about.loc[result["treatment"].astype(int)].reset_index(drop=True)
    return pd.concat([about, result.drop(columns="treatment")], axis=1)


def _pairs_table(obs: pd.DataFrame, columns: Columns, treatments: Treatments) -> pd.DataFrame:
    """Return the columns that copairs pairs by: ``reference`` is −1 for treated rows, and unique for each control."""
    control = negative_controls(obs, columns)
    table = pd.DataFrame({"treatment": "", "reference": -1}, index=range(len(obs)))
    table.loc[control, "treatment"] = "control"
    table.loc[control, "reference"] = range(int(control.sum()))
    table.loc[treatments.rows, "treatment"] = treatments.codes.astype(str)
    if columns.plate is not None:
        table["plate"] = text(obs[columns.plate]).fillna("").to_numpy()
    return table[table["treatment"] != ""]


def average_precision(table: pd.DataFrame, features: Features, *, required: str, **pairs: list[str]) -> pd.DataFrame:
    """Run copairs on the rows of a table, whose index contains positions in ``features``.

    If there are no pairs, a MetadataError names what is ``required``.
    """
    try:
        from copairs import map as copairs_map
        from copairs.matching import UnpairedException
    except ImportError as error:
        raise InputError("Retrieval requires copairs: pip install 'cellvim[profiles]'.") from error
    try:
        return copairs_map.average_precision(
            table.reset_index(drop=True),
            features.values[table.index.to_numpy()],
            distance=features.distance,
            progress_bar=False,
            **pairs,
        )
    except UnpairedException as error:
        raise MetadataError(f"Retrieval requires {required}; there are none.") from error


def mean_average_precision(precision: pd.DataFrame, by: list[str], *, null_size: int, seed: int) -> pd.DataFrame:
    """Run copairs' ``mean_average_precision``, and sort the result in descending order."""
    from copairs import map as copairs_map

    if not (precision["n_pos_pairs"] > 0).any():
        raise MetadataError("Retrieval requires two replicates of a treatment; there are none.")
    result = copairs_map.mean_average_precision(
        precision, by, null_size=null_size, threshold=THRESHOLD, seed=seed, progress_bar=False
    )
    result = result.drop(columns=["indices", "below_p"], errors="ignore")
    return result.sort_values("mean_average_precision", ascending=False, kind="stable").reset_index(drop=True)
