"""Feature selection: leave out features that say nothing, or what others say already."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cellvim.errors import InputError, listing
from cellvim.profiles.bridges import to_pycytominer

if TYPE_CHECKING:
    from anndata import AnnData

OPERATIONS = ("variance_threshold", "correlation_threshold", "drop_na_columns", "drop_outliers", "blocklist")
DEFAULT_OPERATIONS = ("variance_threshold", "correlation_threshold", "drop_na_columns")


def select_features(
    adata: AnnData, *, operations: Sequence[str] = DEFAULT_OPERATIONS, use: str = "X", subset: bool = True
) -> AnnData:
    """Select features by pycytominer's ``feature_select`` with its own thresholds.

    Made for hand-crafted features, many of which say the same; embeddings seldom need it.

    Parameters
    ----------
    adata
        Profiles.
    operations
        Of pycytominer: "variance_threshold", "correlation_threshold", "drop_na_columns", "drop_outliers", "blocklist".
    use
        What to select on: "X" or a layer.
    subset
        Return only the selected features, or all.

    Returns
    -------
    AnnData
        A copy, with ``var["selected"]`` (bool).

    Raises
    ------
    InputError
        An operation is not known, or nothing would be left.
    """
    if wrong := [name for name in operations if name not in OPERATIONS]:
        raise InputError(f"There is no operation {listing(wrong)}; there are {listing(OPERATIONS)}.")
    if use != "X" and use not in adata.layers:
        raise InputError(f"Features are selected on X or on a layer, not on '{use}'.")
    try:
        from pycytominer import feature_select
    except ImportError as error:
        raise InputError("Selecting features needs pycytominer: pip install 'cellvim[profiles]'") from error
    names = [str(name) for name in adata.var_names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of correlations with constant features
        table = feature_select(to_pycytominer(adata, use=use), features=names, operation=list(operations))
    kept = adata.var_names.isin(table.columns)
    if not kept.any():
        raise InputError(f"None of the {adata.n_vars} features is left after {listing(operations)}.")
    result = adata[:, kept].copy() if subset else adata.copy()
    result.var["selected"] = True if subset else kept
    return result
