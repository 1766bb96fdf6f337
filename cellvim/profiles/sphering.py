"""Sphering: remove the covariance of the features among the reference rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import CellvimWarning, InputError, listing
from cellvim.profiles.columns import Columns
from cellvim.profiles.normalization import finite_matrix, pycytominer_transform, reference_rows
from cellvim.profiles.representations import store

if TYPE_CHECKING:
    from anndata import AnnData

METHODS = ("ZCA", "PCA", "ZCA-cor", "PCA-cor")


def spherize(
    adata: AnnData,
    *,
    fit_on: str = "negcon",
    per: str = "all",
    use: str = "X",
    key: str = "spherized",
    method: str = "ZCA",
    epsilon: float = 1e-6,
    columns: Columns | None = None,
) -> None:
    """Rotate and scale the features to be uncorrelated with variance 1 among the reference rows.

    Computed by pycytominer's ``Spherize`` [1]_ [2]_. With more reference rows than features, their covariance becomes
    the identity. With fewer, it does so only in the directions in which they vary; all other directions are scaled like
    the weakest of these, which amplifies noise and raises a warning.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    fit_on
        Reference rows: "negcon" or "all".
    per
        "plate", "batch", "all" or a column of ``obs``.
    use
        "X", a layer such as "robustmad", or an entry of ``obsm``.
    key
        Name of the result.
    method
        "ZCA" (closest to the original features) or "PCA"; with "-cor", of the standardised features.
    epsilon
        Added to the singular values.
    columns
        Columns by role; found by their common names by default.

    Returns
    -------
    None
        Sets

        ``layers[key]``
            (n, D) float32; or ``obsm["X_" + key]``, (n, D'), if ``use`` is an entry of ``obsm`` or if only D' features
            are finite and vary.
        ``uns["cellvim"]["profile"][key]``
            ``settings`` (JSON), ``groups`` (G,), ``center`` and ``scale`` (G, D'), ``transform`` (G, D', D'); the
            result is ((x − center) / scale) @ transform; ``features`` (D',), their names.

    Warns
    -----
    CellvimWarning
        Features were omitted, or there are fewer reference rows than features.

    Raises
    ------
    CellvimError
        A column does not exist, there are too few reference rows, or features are linearly dependent.

    References
    ----------
    .. [1] Serrano et al., "Reproducible image-based profiling with Pycytominer", Nature Methods, 2025.
    .. [2] Kessy, Lewin and Strimmer, "Optimal whitening and decorrelation", The American Statistician, 2018.
    """
    if method not in METHODS:
        raise InputError(f"There is no sphering method '{method}'; expected {listing(METHODS)}.")
    transform = pycytominer_transform("Spherize")
    values, kept, names = finite_matrix(adata, use, "Sphering")
    groups = reference_rows(adata, fit_on=fit_on, per=per, columns=columns, at_least=3)
    varying = np.all([np.ptp(values[fitted], axis=0) > 0 for _, _, fitted in groups], axis=0)
    if not varying.all():
        warnings.warn(
            f"Sphering: {(~varying).sum()} features are constant among the reference rows and are omitted: "
            f"{listing(names[kept][~varying])}.",
            CellvimWarning,
            stacklevel=2,
        )
    kept[kept] = varying
    values = values[:, varying]
    fewest = min(int(fitted.sum()) for _, _, fitted in groups)
    if fewest <= values.shape[1]:
        warnings.warn(
            f"Sphering {values.shape[1]} features on {fewest} rows: the covariance becomes the identity only in the "
            f"{fewest - 1} directions in which these rows vary. Use fewer features (PCA first) or more controls.",
            CellvimWarning,
            stacklevel=2,
        )

    def fit(reference: np.ndarray, name: str) -> tuple[Callable, dict[str, np.ndarray]]:
        try:
            _check_independent(reference)
            sphering = transform(method=method, epsilon=epsilon, return_numpy=True).fit(pd.DataFrame(reference))
        except ValueError as error:
            group = f" of {per} {name}" if name else ""
            raise InputError(
                f"Sphering{group} is not possible: {' '.join(str(error).split())} Select features first "
                "(--select-features), or use PCA."
            ) from error
        scaler = getattr(sphering, "standard_scaler", None)
        arrays = {
            "center": scaler.mean_ if scaler else sphering.mean_centerer.mean_,
            "scale": scaler.scale_ if scaler else np.ones(reference.shape[1]),
            "transform": sphering.W.astype(np.float32),
        }
        return lambda rows: sphering.transform(pd.DataFrame(rows)), arrays

    result, arrays = groups.transform(values, fit)
    settings = {"method": f"spherize {method}", "use": use, "fit_on": fit_on, "per": per, "epsilon": epsilon}
    arrays |= {"groups": groups.groups, "features": names[kept]}
    store(adata, key, result, settings, arrays, as_layer=bool(kept.all()) and (use == "X" or use in adata.layers))


def _check_independent(values: np.ndarray) -> None:
    """Raise if a direction has no variance except rounding errors; pycytominer checks with the precision of float64."""
    singular = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    rank = min(len(values) - 1, values.shape[1])
    if singular[rank - 1] < 1e-6 * singular[0]:
        n_independent = int((singular[:rank] >= 1e-6 * singular[0]).sum())
        raise ValueError(f"{values.shape[1]} features, but only {n_independent} are linearly independent.")
