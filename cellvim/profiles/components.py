"""Principal components of profiles: fewer, uncorrelated features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import InputError
from cellvim.profiles.columns import matrix
from cellvim.profiles.fitting import feature_names, finite_features, note

if TYPE_CHECKING:
    from anndata import AnnData

N_COMPONENTS = 50


def pca(adata: AnnData, *, use: str = "X", key: str = "pca", n_components: int | None = None, seed: int = 0) -> None:
    """Compute principal components of all rows, by scikit-learn.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    use
        "X", a layer such as "robustmad", or an entry of ``obsm``.
    key
        Name of the result.
    n_components
        How many; 50 or as many as there can be, if not given.
    seed
        Of the randomised solver that large tables are done with.

    Returns
    -------
    None
        Sets

        ``obsm["X_" + key]``
            (n, K) float32.
        ``uns["cellvim"]["profile"][key]``
            ``settings`` (JSON), ``mean`` (D',), ``components`` (K, D'), ``variance_ratio`` (K,), ``features`` (D',).

    Raises
    ------
    CellvimError
        There are fewer rows or features than components.
    """
    from sklearn.decomposition import PCA

    values = matrix(adata, use)
    names = feature_names(adata, use)
    kept = finite_features(values, names, "PCA")
    values = values[:, kept]
    most = min(values.shape[0] - 1, values.shape[1])
    if most < 1 or (n_components is not None and not 1 <= n_components <= most):
        raise InputError(
            f"{values.shape[0]} rows of {values.shape[1]} features have at most {most} principal components; "
            f"{n_components or 'at least 1'} asked for."
        )
    model = PCA(n_components or min(N_COMPONENTS, most), random_state=seed)
    adata.obsm[f"X_{key}"] = model.fit_transform(values).astype(np.float32)
    fitted = {
        "mean": model.mean_,
        "components": model.components_,
        "variance_ratio": model.explained_variance_ratio_,
        "features": names[kept],
    }
    note(adata, key, f"X_{key}", {"method": "pca", "use": use, "n_components": int(model.n_components_)}, fitted)
