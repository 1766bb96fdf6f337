"""Harmony: batches are moved together, cluster by cluster; no controls are needed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import InputError
from cellvim.profiles.columns import Columns, find_columns, matrix
from cellvim.profiles.components import pca
from cellvim.profiles.fitting import _groups_of, note

if TYPE_CHECKING:
    from anndata import AnnData


def harmony(
    adata: AnnData,
    *,
    per: str = "batch",
    use: str = "X_pca",
    key: str = "harmony",
    seed: int = 0,
    columns: Columns | None = None,
) -> None:
    """Remove the differences between batches by Harmony [1]_, with harmonypy.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    per
        What is a batch: "batch", "plate" or a column of ``obs``.
    use
        What to correct; "X_pca" is made by `pca` from X where it is not there.
    key
        Name of the result.
    seed
        Of the clustering.
    columns
        Which columns say plate and batch.

    Returns
    -------
    None
        Sets

        ``obsm["X_" + key]``
            (n, K) float32.
        ``uns["cellvim"]["profile"][key]``
            ``settings`` (JSON), ``groups`` (G,) and ``shift`` (G, K), the mean correction of each batch.

    Raises
    ------
    CellvimError
        A column is not there, or there is only one batch.

    References
    ----------
    .. [1] Korsunsky et al., "Fast, sensitive and accurate integration of single-cell data with Harmony", Nature
       Methods, 2019.
    """
    try:
        import harmonypy
    except ImportError as error:
        raise InputError("Harmony needs harmonypy. Install it: pip install 'cellvim[profiles]'") from error
    groups, codes = _groups_of(adata.obs, per, columns or find_columns(adata.obs))
    if len(groups) < 2:
        raise InputError(f"Harmony moves batches together, but there is only one {per}: {groups[0] or 'all rows'}.")
    if use == "X_pca" and use not in adata.obsm:
        pca(adata)
    values = matrix(adata, use)
    if not np.isfinite(values).all():
        raise InputError(f"Harmony is not possible: '{use}' has values that are not finite. Use PCA of it first.")
    logging.getLogger("harmonypy").setLevel(logging.WARNING)  # it tells each iteration on the terminal
    # Batches by number: their names may be anything. Two clusters at least; harmonypy takes n / 30, at most 100.
    batches = pd.DataFrame({"batch": pd.Categorical(codes)})
    clusters = int(np.clip(round(len(values) / 30), 2, 100))
    model = harmonypy.run_harmony(values.T, batches, ["batch"], nclust=clusters, random_state=seed, verbose=False)
    corrected = np.asarray(model.Z_corr, dtype=np.float64)  # (n, K), though K x n goes in
    adata.obsm[f"X_{key}"] = corrected.astype(np.float32)
    shift = np.stack([(corrected - values)[codes == code].mean(axis=0) for code in range(len(groups))])
    settings = {"method": "harmony", "use": use, "per": per, "seed": seed, "clusters": clusters}
    note(adata, key, f"X_{key}", settings, {"groups": groups, "shift": shift})
