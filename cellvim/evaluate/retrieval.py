"""Mean average precision, by copairs: do replicates find each other among the controls?"""

from __future__ import annotations

import pandas as pd

from cellvim.errors import InputError, MetadataError
from cellvim.evaluate.features import Features
from cellvim.evaluate.treatments import Treatments, find_treatments
from cellvim.profiles.columns import Columns, negative_controls, role, text

NULL_SIZE = 10_000
THRESHOLD = 0.05


def replicate_map(
    features: Features,
    obs: pd.DataFrame,
    columns: Columns,
    *,
    null_size: int = NULL_SIZE,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the mean average precision of each treatment's replicates against negative controls [1]_.

    Each replicate ranks the treatment's other replicates and the negative controls of its own plate (of all plates
    where obs has no plates) by similarity. The mean of the replicates' average precisions is compared with that of
    random ranks, and the p values are corrected by Benjamini and Hochberg. All of it is done by copairs.

    Parameters
    ----------
    features
        What is compared.
    obs
        The table of the same rows.
    columns
        Perturbation, dose, controls and plate.
    null_size
        Random ranks.
    seed
        Of these.

    Returns
    -------
    pandas.DataFrame
        One row a treatment of at least two replicates: its columns, ``n_replicates``, ``mean_average_precision``,
        ``mean_normalized_average_precision`` (0 for random ranks, 1 at best), ``p_value``, ``corrected_p_value``, and
        ``active``, whether the last is below 0.05. Sorted by mean average precision, highest first.

    Raises
    ------
    MetadataError
        A column is missing, no treatment has two replicates, or there are no controls to compare with.

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
        wanted="two replicates of one treatment, and negative controls on the same plate",
    )
    precision = precision[precision["reference"] == -1]
    result = mean_average_precision(precision, ["treatment"], null_size=null_size, seed=seed)
    result = result.rename(columns={"below_corrected_p": "active"})
    about = treatments.table.assign(n_replicates=treatments.counts)
    about = about.loc[result["treatment"].astype(int)].reset_index(drop=True)
    return pd.concat([about, result.drop(columns="treatment")], axis=1)


def _pairs_table(obs: pd.DataFrame, columns: Columns, treatments: Treatments) -> pd.DataFrame:
    """Return what copairs pairs by: treated rows have the reference −1, each control one of its own."""
    control = negative_controls(obs, columns)
    table = pd.DataFrame({"treatment": "", "reference": -1}, index=range(len(obs)))
    table.loc[control, "treatment"] = "control"
    table.loc[control, "reference"] = range(int(control.sum()))
    table.loc[treatments.rows, "treatment"] = treatments.codes.astype(str)
    if columns.plate is not None:
        table["plate"] = text(obs[role(columns, "plate", obs)]).fillna("").to_numpy()
    return table[table["treatment"] != ""]


def average_precision(table: pd.DataFrame, features: Features, *, wanted: str, **pairs: list[str]) -> pd.DataFrame:
    """Run copairs' ``average_precision`` on rows of a table, whose index are positions in ``features``.

    Raises
    ------
    MetadataError
        There are no pairs; ``wanted`` says of what.
    """
    try:
        from copairs import map as copairs_map
        from copairs.matching import UnpairedException
    except ImportError as error:
        raise InputError("Retrieval needs copairs. Install it: pip install 'cellvim[profiles]'") from error
    try:
        return copairs_map.average_precision(
            table.reset_index(drop=True),
            features.values[table.index.to_numpy()],
            distance=features.distance,
            progress_bar=False,
            **pairs,
        )
    except UnpairedException as error:
        raise MetadataError(f"Retrieval needs {wanted}, and there are none.") from error


def mean_average_precision(precision: pd.DataFrame, by: list[str], *, null_size: int, seed: int) -> pd.DataFrame:
    """Run copairs' ``mean_average_precision``; sorted, and without its lists of rows."""
    from copairs import map as copairs_map

    if not (precision["n_pos_pairs"] > 0).any():
        raise MetadataError("Retrieval needs two replicates of one treatment, and there are none.")
    result = copairs_map.mean_average_precision(
        precision, by, null_size=null_size, threshold=THRESHOLD, seed=seed, progress_bar=False
    )
    result = result.drop(columns=["indices", "below_p"], errors="ignore")
    return result.sort_values("mean_average_precision", ascending=False, kind="stable").reset_index(drop=True)
