"""Harmony: align batches cluster by cluster, without controls."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import InputError
from cellvim.profiles.columns import Columns, find_columns
from cellvim.profiles.normalization import group_rows, pca
from cellvim.profiles.representations import matrix, store

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
    """Remove differences between batches by Harmony [1]_, computed by harmonypy.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    per
        Groups to align: "batch", "plate" or a column of ``obs``.
    use
        Representation to correct; if "X_pca" does not exist, it is computed from X by `pca`.
    key
        Name of the result.
    seed
        Random seed of the clustering.
    columns
        Columns by role; found by their common names by default.

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
        A column does not exist, or there is only one batch.

    References
    ----------
    .. [1] Korsunsky et al., "Fast, sensitive and accurate integration of single-cell data with Harmony", Nature
       Methods, 2019.
    """
    try:
        import harmonypy
    except ImportError as error:
        raise InputError("Harmony requires harmonypy: pip install 'cellvim[profiles]'.") from error
    groups, codes = group_rows(adata.obs, per, columns or find_columns(adata.obs))
    if len(groups) < 2:
        raise InputError(f"Harmony aligns batches, but there is only one {per}: {groups[0] or 'all rows'}.")
    if use == "X_pca" and use not in adata.obsm:
        pca(adata)
    values = matrix(adata, use)
    if not np.isfinite(values).all():
        raise InputError(f"Harmony is not possible: '{use}' has values that are not finite. Apply PCA first.")
    logging.getLogger("harmonypy").setLevel(logging.WARNING)  # it logs every iteration
    # Batches by number: their names are arbitrary. At least two clusters; harmonypy's default is n / 30, at most 100.
    batches = pd.DataFrame({"batch": pd.Categorical(codes)})
    clusters = int(np.clip(round(len(values) / 30), 2, 100))
    model = harmonypy.run_harmony(values.T, batches, ["batch"], nclust=clusters, random_state=seed, verbose=False)
    corrected = np.asarray(model.Z_corr, dtype=np.float64)  # (n, K), although the input is (K, n)
    shift = np.stack([(corrected - values)[codes == code].mean(axis=0) for code in range(len(groups))])
    settings = {"method": "harmony", "use": use, "per": per, "seed": seed, "clusters": clusters}
    store(adata, key, corrected, settings, {"groups": groups, "shift": shift})
