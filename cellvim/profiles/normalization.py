"""Normalise profiles feature by feature, reduce them to principal components, and select features.

All normalisations are fitted on reference rows (usually the negative controls) within groups of rows (usually plates).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import CellvimWarning, InputError, MetadataError, listing
from cellvim.profiles.columns import Columns, column_of, find_columns, negative_controls, require, text
from cellvim.profiles.conversion import to_pycytominer
from cellvim.profiles.representations import feature_names, matrix, store

if TYPE_CHECKING:
    from anndata import AnnData

FIT_ON = ("negcon", "all")
N_COMPONENTS = 50
# reference rows (m, D) and the name of a group -> a transform of rows, and arrays that describe it
Fit = Callable[[np.ndarray, str], tuple[Callable[[np.ndarray], np.ndarray], dict[str, np.ndarray]]]
OPERATIONS = ("variance_threshold", "correlation_threshold", "drop_na_columns", "drop_outliers", "blocklist")


@dataclass(frozen=True)
class Reference:
    """Groups of rows, and the rows that transforms are fitted on.

    Attributes
    ----------
    groups
        (G,) names of the groups; a single empty name if all rows are one group.
    codes
        (n,) group of each row.
    fitted
        (n,) whether transforms are fitted on the row.
    """

    groups: np.ndarray
    codes: np.ndarray
    fitted: np.ndarray

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield for each group its name, its rows, and the rows that a transform is fitted on, as (n,) masks."""
        for code, name in enumerate(self.groups):
            rows = self.codes == code
            yield str(name), rows, rows & self.fitted

    def transform(self, values: np.ndarray, fit: Fit) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Transform the rows of each group by a function that ``fit`` derives from its reference rows.

        Returns (n, K) float32, and the arrays of ``fit``, stacked over the groups.
        """
        result, arrays = np.empty(values.shape, np.float32), []
        for name, rows, fitted in self:
            apply, recorded = fit(values[fitted], name)
            result[rows] = apply(values[rows])
            arrays.append(recorded)
        return result, {key: np.stack([recorded[key] for recorded in arrays]) for key in arrays[0]}


def reference_rows(
    adata: AnnData, *, fit_on: str, per: str, columns: Columns | None = None, at_least: int = 2
) -> Reference:
    """Return the groups of rows, and the rows to fit transforms on: the negative controls ("negcon") or "all".

    ``per`` is "plate", "batch", a column of ``obs``, or "all" for a single group.

    Raises
    ------
    MetadataError
        A column does not exist, there are no controls, or a group has fewer than ``at_least`` reference rows.
    """
    columns = columns or find_columns(adata.obs)
    if fit_on not in FIT_ON:
        raise MetadataError(f"A normalisation is fitted on {listing(FIT_ON)}, not on '{fit_on}'.")
    try:
        fitted = np.ones(adata.n_obs, bool) if fit_on == "all" else negative_controls(adata.obs, columns)
    except MetadataError as error:
        raise MetadataError(f"{error} Or fit on all rows with --fit-on all.") from error
    groups, codes = group_rows(adata.obs, per, columns)
    n_fitted = np.bincount(codes[fitted], minlength=len(groups))
    if (poor := groups[n_fitted < at_least]).size:
        what = "rows" if fit_on == "all" else "negative controls"
        where = listing(f"{name or 'all rows'} ({n_fitted[groups == name][0]})" for name in poor)
        raise MetadataError(
            f"Fewer than {at_least} {what} to fit on in {len(poor)} of {len(groups)} groups: {where}. "
            f"Fit on larger groups with --per batch or --per all{'' if fit_on == 'all' else ', or with --fit-on all'}."
        )
    return Reference(groups, codes, fitted)


def group_rows(obs: pd.DataFrame, per: str, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Return the names of the groups (G,), and the group of each row (n,); see `reference_rows`."""
    if per == "all":
        return np.array([""], dtype=object), np.zeros(len(obs), np.int64)
    name = column_of(columns, per, obs) if per in ("plate", "batch") else require(obs, per, option="--per")
    values = text(obs[name])
    if n := int(values.isna().sum()):
        raise MetadataError(f"{n:,} of {len(obs):,} rows have no {name}, so they have no group. Use --per all.")
    groups, codes = np.unique(values.to_numpy(dtype=str), return_inverse=True)
    return groups.astype(object), codes


def finite_matrix(adata: AnnData, use: str, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the features of a representation that are finite in all rows; warn if ``what`` has to omit some.

    Returns
    -------
    values, kept, names
        (n, D') float64; (D,) whether a feature is kept; (D,) names of all features.

    Raises
    ------
    MetadataError
        No feature is finite.
    """
    values, names = matrix(adata, use), feature_names(adata, use)
    finite = np.isfinite(values).all(axis=0)
    if not finite.any():
        raise MetadataError(f"Every feature has values that are not finite, so {what} is not possible.")
    if not finite.all():
        warnings.warn(
            f"{what}: {(~finite).sum()} of {len(finite)} features have values that are not finite and are omitted: "
            f"{listing(names[~finite])}.",
            CellvimWarning,
            stacklevel=3,
        )
    return values[:, finite], finite, names


def robust_mad(
    adata: AnnData,
    *,
    fit_on: str = "negcon",
    per: str = "plate",
    use: str = "X",
    key: str = "robustmad",
    columns: Columns | None = None,
) -> None:
    """Subtract the median of the reference rows and divide by their median absolute deviation (MAD).

    The MAD is multiplied by 1.4826 to equal the standard deviation of a normal distribution. Computed by pycytominer's
    ``RobustMAD`` [1]_, except that a feature with a MAD of 0 is only centred (pycytominer divides it by 1e-18).

    Parameters
    ----------
    adata
        Profiles; changed in place.
    fit_on
        Reference rows: "negcon" or "all".
    per
        "plate", "batch", "all" or a column of ``obs``; each group is fitted separately.
    use
        Representation to normalise: "X", a layer, or an entry of ``obsm``.
    key
        Name of the result.
    columns
        Columns by role; found by their common names by default.

    Returns
    -------
    None
        Sets

        ``layers[key]``
            (n, D) float32; ``obsm["X_" + key]`` if ``use`` is an entry of ``obsm``.
        ``uns["cellvim"]["profile"][key]``
            ``settings`` (JSON), ``groups`` (G,), ``center`` and ``scale`` (G, D).

    Warns
    -----
    CellvimWarning
        Features are constant among the reference rows; they are only centred.

    Raises
    ------
    CellvimError
        A column does not exist, or a group has fewer than 2 reference rows.

    References
    ----------
    .. [1] Serrano et al., "Reproducible image-based profiling with Pycytominer", Nature Methods, 2025.
    """
    transform = pycytominer_transform("RobustMAD")

    def location_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fitted = transform(epsilon=0).fit(pd.DataFrame(values))
        return fitted.median.to_numpy(), fitted.mad.to_numpy()

    _scale(adata, location_and_scale, "robust_mad", fit_on, per, use, key, columns)


def standardize(
    adata: AnnData,
    *,
    fit_on: str = "negcon",
    per: str = "plate",
    use: str = "X",
    key: str = "standardized",
    columns: Columns | None = None,
) -> None:
    """Subtract the mean of the reference rows and divide by their standard deviation.

    Computed by scikit-learn's ``StandardScaler``, as by pycytominer's ``standardize`` (population standard deviation,
    with n in the denominator). Parameters, results and errors are those of `robust_mad`.
    """

    def location_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.preprocessing import StandardScaler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # for features without finite values
            scaler = StandardScaler().fit(values)
        return scaler.mean_, np.sqrt(scaler.var_)

    _scale(adata, location_and_scale, "standardize", fit_on, per, use, key, columns)


def _scale(
    adata: AnnData,
    location_and_scale: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    method: str,
    fit_on: str,
    per: str,
    use: str,
    key: str,
    columns: Columns | None,
) -> None:
    values = matrix(adata, use)
    values = np.where(np.isfinite(values), values, np.nan)
    groups = reference_rows(adata, fit_on=fit_on, per=per, columns=columns)
    constant = np.zeros(values.shape[1], bool)

    def fit(reference: np.ndarray, _group: str) -> tuple[Callable, dict[str, np.ndarray]]:
        center, scale = location_and_scale(reference)
        # relative to the values: rounding errors of a constant feature must not be amplified
        flat = scale <= 1e-9 * np.abs(center)
        np.logical_or(constant, flat, out=constant)
        scale = np.where(flat, 1, scale)
        return lambda rows: (rows - center) / scale, {"center": center, "scale": scale}

    result, arrays = groups.transform(values, fit)
    if constant.any():
        names = feature_names(adata, use)
        warnings.warn(
            f"{key}: {constant.sum()} of {len(constant)} features are constant among the reference rows of a group; "
            f"there they are centred, but not scaled: {listing(names[constant])}.",
            CellvimWarning,
            stacklevel=3,
        )
    settings = {"method": method, "use": use, "fit_on": fit_on, "per": per, "constant_features": int(constant.sum())}
    store(adata, key, result, settings, {"groups": groups.groups} | arrays, as_layer=use == "X" or use in adata.layers)


def pycytominer_transform(name: str) -> type:
    """Return a class of ``pycytominer.operations``."""
    try:
        from pycytominer import operations
    except ImportError as error:
        raise InputError("This normalisation requires pycytominer: pip install 'cellvim[profiles]'.") from error
    return getattr(operations, name)


def pca(adata: AnnData, *, use: str = "X", key: str = "pca", n_components: int | None = None, seed: int = 0) -> None:
    """Compute the principal components of all rows with scikit-learn.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    use
        "X", a layer such as "robustmad", or an entry of ``obsm``.
    key
        Name of the result.
    n_components
        Number of components; by default 50, or fewer if the data have a lower rank.
    seed
        Random seed of the solver for large tables.

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

    values, kept, names = finite_matrix(adata, use, "PCA")
    most = min(values.shape[0] - 1, values.shape[1])
    if most < 1 or (n_components is not None and not 1 <= n_components <= most):
        raise InputError(
            f"{values.shape[0]} rows with {values.shape[1]} features have at most {most} principal components, not "
            f"{n_components or 1}."
        )
    model = PCA(n_components or min(N_COMPONENTS, most), random_state=seed)
    result = model.fit_transform(values)
    fitted = {
        "mean": model.mean_,
        "components": model.components_,
        "variance_ratio": model.explained_variance_ratio_,
        "features": names[kept],
    }
    store(adata, key, result, {"method": "pca", "use": use, "n_components": int(model.n_components_)}, fitted)


def select_features(
    adata: AnnData, *, operations: Sequence[str] = OPERATIONS[:3], use: str = "X", subset: bool = True
) -> AnnData:
    """Select features with pycytominer's ``feature_select`` and its default thresholds.

    Useful for hand-crafted features, many of which are redundant; rarely necessary for embeddings.

    Parameters
    ----------
    adata
        Profiles.
    operations
        Operations of pycytominer: "variance_threshold", "correlation_threshold", "drop_na_columns", "drop_outliers",
        "blocklist".
    use
        "X" or a layer.
    subset
        Return the selected features only.

    Returns
    -------
    AnnData
        A copy, with ``var["selected"]`` (bool).

    Raises
    ------
    InputError
        An operation does not exist, or no feature is left.
    """
    if wrong := [name for name in operations if name not in OPERATIONS]:
        raise InputError(f"There is no operation {listing(wrong)}; expected {listing(OPERATIONS)}.")
    if use != "X" and use not in adata.layers:
        raise InputError(f"Features are selected on X or on a layer, not on '{use}'.")
    try:
        from pycytominer import feature_select
    except ImportError as error:
        raise InputError("Selecting features requires pycytominer: pip install 'cellvim[profiles]'.") from error
    names = [str(name) for name in adata.var_names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for correlations with constant features
        table = feature_select(to_pycytominer(adata, use=use), features=names, operation=list(operations))
    kept = adata.var_names.isin(table.columns)
    if not kept.any():
        raise InputError(f"None of the {adata.n_vars} features is left after {listing(operations)}.")
    result = adata[:, kept].copy() if subset else adata.copy()
    result.var["selected"] = True if subset else kept
    return result
