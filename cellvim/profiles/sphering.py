"""Sphering: remove the covariance that features have among the controls."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import CellvimWarning, InputError, listing
from cellvim.profiles.columns import Columns, matrix
from cellvim.profiles.fitting import feature_names, finite_features, note, reference
from cellvim.profiles.scaling import _pycytominer, put

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
    """Rotate and scale so that the features of the controls are uncorrelated and have variance 1.

    By pycytominer's ``Spherize`` [1]_ [2]_. With more controls than features, the covariance of the controls becomes
    the identity; with fewer, it does so only in the directions in which the controls vary, and all others are scaled as
    the weakest of these. That amplifies noise, and is warned of.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    fit_on
        "negcon" or "all".
    per
        "plate", "batch", "all" or a column of ``obs``.
    use
        "X", a layer such as "robustmad", or an entry of ``obsm``.
    key
        Name of the result.
    method
        "ZCA" (closest to the features as they are), "PCA", or with "-cor" of the standardised features.
    epsilon
        Added to the singular values.
    columns
        Which columns say plate, batch and controls.

    Returns
    -------
    None
        Sets

        ``layers[key]``
            (n, D) float32; or ``obsm["X_" + key]``, (n, D'), where ``use`` is an entry of obsm or where only D'
            features are finite and vary.
        ``uns["cellvim"]["profile"][key]``
            ``settings`` (JSON), ``groups`` (G,), ``center`` and ``scale`` (G, D'), ``transform`` (G, D', D'):
            the result is ((x − center) / scale) @ transform; ``features``, the names of the D'.

    Warns
    -----
    CellvimWarning
        Features were left out, or there are fewer controls than features.

    Raises
    ------
    CellvimError
        A column is not there, there are too few rows to fit on, or features depend on each other exactly.

    References
    ----------
    .. [1] Serrano et al., "Reproducible image-based profiling with Pycytominer", Nature Methods, 2025.
    .. [2] Kessy, Lewin and Strimmer, "Optimal whitening and decorrelation", The American Statistician, 2018.
    """
    if method not in METHODS:
        raise InputError(f"Sphering is {listing(METHODS)}; there is no '{method}'.")
    transform = _pycytominer("Spherize")
    values = matrix(adata, use)
    names = feature_names(adata, use)
    kept = finite_features(values, names, "Sphering")
    groups = reference(adata, fit_on=fit_on, per=per, columns=columns, at_least=3)
    kept &= _varying(values, groups, names, kept)
    values = values[:, kept]
    result = np.empty(values.shape, np.float32)
    fitted_arrays = {"center": [], "scale": [], "transform": []}
    fewest = min(int(fitted.sum()) for _, _, fitted in groups)
    if fewest <= values.shape[1]:
        warnings.warn(
            f"Sphering {values.shape[1]} features on {fewest} rows: the covariance becomes the identity only in the "
            f"{fewest - 1} directions in which these rows vary. Use fewer features (PCA first) or more controls.",
            CellvimWarning,
            stacklevel=2,
        )
    for name, rows, fitted in groups:
        try:
            _check_independent(values[fitted])
            sphering = transform(method=method, epsilon=epsilon, return_numpy=True).fit(pd.DataFrame(values[fitted]))
        except ValueError as error:
            group = f" of {per} {name}" if name else ""
            raise InputError(
                f"Sphering{group} is not possible: {' '.join(str(error).split())} Select features first "
                "(--select-features), or use PCA."
            ) from error
        scaler = getattr(sphering, "standard_scaler", None)
        fitted_arrays["center"].append(scaler.mean_ if scaler else sphering.mean_centerer.mean_)
        fitted_arrays["scale"].append(scaler.scale_ if scaler else np.ones(values.shape[1]))
        fitted_arrays["transform"].append(sphering.W.astype(np.float32))
        result[rows] = sphering.transform(pd.DataFrame(values[rows]))
    where = put(adata, result, use if kept.all() else "", key)
    settings = {"method": f"spherize {method}", "use": use, "fit_on": fit_on, "per": per, "epsilon": epsilon}
    arrays = {name: np.stack(arrays) for name, arrays in fitted_arrays.items()}
    note(adata, key, where, settings, arrays | {"groups": groups.groups, "features": names[kept]})


def _check_independent(values: np.ndarray) -> None:
    """Raise if a direction has no variance but rounding, which would be blown up; pycytominer looks at float64's."""
    singular = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    rank = min(len(values) - 1, values.shape[1])
    if singular[rank - 1] < 1e-6 * singular[0]:
        n_independent = int((singular[:rank] >= 1e-6 * singular[0]).sum())
        raise ValueError(f"{values.shape[1]} features, but only {n_independent} do not depend on the others exactly.")


def _varying(values: np.ndarray, groups, names: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return (D,) which features vary in what every group is fitted on; warns of the others."""
    varying = np.ones(values.shape[1], bool)
    for _, _, fitted in groups:
        varying &= np.ptp(np.where(kept, values[fitted], 0), axis=0) > 0
    if (kept & ~varying).any():
        warnings.warn(
            f"Sphering: {(kept & ~varying).sum()} features do not vary among the rows that are fitted on and are left "
            f"out: {listing(names[kept & ~varying])}.",
            CellvimWarning,
            stacklevel=3,
        )
    return varying
