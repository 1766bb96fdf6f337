"""Centre and scale each feature, on controls, plate by plate: by median and MAD, or by mean and standard deviation."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import CellvimWarning, InputError, listing
from cellvim.profiles.columns import Columns, matrix
from cellvim.profiles.fitting import feature_names, note, reference

if TYPE_CHECKING:
    from anndata import AnnData


def robust_mad(
    adata: AnnData,
    *,
    fit_on: str = "negcon",
    per: str = "plate",
    use: str = "X",
    key: str = "robustmad",
    columns: Columns | None = None,
) -> None:
    """Subtract the median of the controls and divide by their median absolute deviation.

    The deviation is multiplied by 1.4826, so that it equals the standard deviation of a normal distribution. By
    pycytominer's ``RobustMAD`` [1]_, but a feature whose deviation is 0 is centred only: pycytominer divides it by
    1e-18.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    fit_on
        "negcon" or "all".
    per
        "plate", "batch", "all" or a column of ``obs``: each group is fitted on its own.
    use
        What to normalise: "X", a layer, or an entry of ``obsm``.
    key
        Name of the result.
    columns
        Which columns say plate, batch and controls; found by their usual names if not given.

    Returns
    -------
    None
        Sets

        ``layers[key]``
            (n, D) float32; ``obsm["X_" + key]`` if ``use`` is an entry of obsm.
        ``uns["cellvim"]["profile"][key]``
            ``settings`` (JSON), ``groups`` (G,), ``center`` and ``scale`` (G, D).

    Warns
    -----
    CellvimWarning
        Features do not vary among the rows fitted on; they are only centred.

    Raises
    ------
    CellvimError
        A column is not there, or a group has fewer than 2 rows to fit on.

    References
    ----------
    .. [1] Serrano et al., "Reproducible image-based profiling with Pycytominer", Nature Methods, 2025.
    """
    transform = _pycytominer("RobustMAD")

    def fit(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fitted = transform(epsilon=0).fit(pd.DataFrame(values))
        return fitted.median.to_numpy(), fitted.mad.to_numpy()

    _scale(adata, fit, "robust_mad", fit_on, per, use, key, columns)


def standardize(
    adata: AnnData,
    *,
    fit_on: str = "negcon",
    per: str = "plate",
    use: str = "X",
    key: str = "standardized",
    columns: Columns | None = None,
) -> None:
    """Subtract the mean of the controls and divide by their standard deviation.

    By scikit-learn's ``StandardScaler``, as pycytominer's ``standardize`` does (the deviation is that of the
    population, with n in the denominator). Parameters, fields and errors are those of `robust_mad`.
    """

    def fit(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.preprocessing import StandardScaler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of features without any finite value
            scaler = StandardScaler().fit(values)
        return scaler.mean_, np.sqrt(scaler.var_)

    _scale(adata, fit, "standardize", fit_on, per, use, key, columns)


def _scale(adata, fit, method, fit_on, per, use, key, columns) -> None:
    values = matrix(adata, use)
    values[~np.isfinite(values)] = np.nan
    groups = reference(adata, fit_on=fit_on, per=per, columns=columns)
    names = feature_names(adata, use)
    result = np.empty(values.shape, np.float32)
    center, scale = (np.empty((len(groups.groups), values.shape[1])) for _ in range(2))
    constant = np.zeros(values.shape[1], bool)
    for number, (_, rows, fitted) in enumerate(groups):
        center[number], scale[number] = fit(values[fitted])
        # relative to the values: what is constant but for rounding must not be blown up
        flat = scale[number] <= 1e-9 * np.abs(center[number])
        scale[number, flat] = 1
        constant |= flat
        result[rows] = (values[rows] - center[number]) / scale[number]
    if constant.any():
        warnings.warn(
            f"{key}: {constant.sum()} of {len(constant)} features do not vary among the rows that a group is fitted "
            f"on, so they are centred but not scaled there: {listing(names[constant])}.",
            CellvimWarning,
            stacklevel=3,
        )
    where = put(adata, result, use, key)
    settings = {"method": method, "use": use, "fit_on": fit_on, "per": per, "constant_features": int(constant.sum())}
    note(adata, key, where, settings, {"groups": groups.groups, "center": center, "scale": scale})


def put(adata: AnnData, values: np.ndarray, use: str, key: str) -> str:
    """Set the result as a layer if it is X or a layer normalised, else as an entry of obsm; return its name there."""
    if use == "X" or use in adata.layers:
        adata.layers[key] = values
        return key
    adata.obsm[f"X_{key}"] = values
    return f"X_{key}"


def _pycytominer(name: str):
    try:
        from pycytominer import operations
    except ImportError as error:
        raise InputError("Normalising needs pycytominer. Install it: pip install 'cellvim[profiles]'") from error
    return getattr(operations, name)
