"""What a normalisation is fitted on: which rows, in which groups; and how it is noted in ``uns``."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.errors import CellvimWarning, MetadataError, listing
from cellvim.profiles.columns import Columns, find_columns, negative_controls, require, role, text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pandas as pd
    from anndata import AnnData

FIT_ON = ("negcon", "all")


@dataclass(frozen=True)
class Reference:
    """Groups of rows, and the rows of each that a transform is fitted on.

    Attributes
    ----------
    groups
        Names of the groups, (G,); one without a name when all rows are one group.
    codes
        (n,) each row's group.
    fitted
        (n,) whether a transform is fitted on the row.
    fit_on, per
        What was asked for.
    """

    groups: np.ndarray
    codes: np.ndarray
    fitted: np.ndarray
    fit_on: str
    per: str

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield each group's name, its rows, and which rows it is fitted on, as (n,) masks."""
        for code, name in enumerate(self.groups):
            rows = self.codes == code
            yield str(name), rows, rows & self.fitted


def reference(
    adata: AnnData, *, fit_on: str = "negcon", per: str = "plate", columns: Columns | None = None, at_least: int = 2
) -> Reference:
    """Say which rows a transform is fitted on.

    Parameters
    ----------
    adata
        Profiles.
    fit_on
        "negcon", the negative controls, or "all" rows.
    per
        "plate", "batch", "all" for one fit over everything, or the name of a column of ``obs``.
    columns
        Which columns these are; found by their usual names if not given.
    at_least
        Rows that each group must be fitted on.

    Returns
    -------
    Reference

    Raises
    ------
    MetadataError
        A column is missing, there are no controls, or a group has too few rows to be fitted on.
    """
    columns = columns or find_columns(adata.obs)
    if fit_on not in FIT_ON:
        raise MetadataError(f"A normalisation is fitted on {listing(FIT_ON)}, not on '{fit_on}'.")
    try:
        fitted = np.ones(adata.n_obs, bool) if fit_on == "all" else negative_controls(adata.obs, columns)
    except MetadataError as error:
        raise MetadataError(f"{error} Or fit on all rows with --fit-on all.") from error
    groups, codes = _groups_of(adata.obs, per, columns)
    n_fitted = np.bincount(codes[fitted], minlength=len(groups))
    if (poor := groups[n_fitted < at_least]).size:
        what = "rows" if fit_on == "all" else "negative controls"
        where = listing(f"{name or 'all rows together'} ({n_fitted[groups == name][0]})" for name in poor)
        raise MetadataError(
            f"Fewer than {at_least} {what} to fit on in {len(poor)} of {len(groups)} groups: {where}. "
            f"Fit on larger groups with --per batch or --per all{'' if fit_on == 'all' else ', or with --fit-on all'}."
        )
    return Reference(groups, codes, fitted, fit_on, per)


def _groups_of(obs: pd.DataFrame, per: str, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    if per == "all":
        return np.array([""], dtype=object), np.zeros(len(obs), np.int64)
    name = role(columns, per, obs) if per in ("plate", "batch") else require(obs, per, option="--per")
    values = text(obs[name])
    if n := int(values.isna().sum()):
        raise MetadataError(f"{n:,} of {len(obs):,} rows have no {name}, so they belong to no group. Use --per all.")
    groups, codes = np.unique(values.to_numpy(dtype=str), return_inverse=True)
    return groups.astype(object), codes


def finite_features(values: np.ndarray, names: Any, what: str) -> np.ndarray:
    """Return (D,) which features are finite in every row; warns of the others, which a transform has to leave out.

    Raises
    ------
    MetadataError
        None is.
    """
    finite = np.isfinite(values).all(axis=0)
    if not finite.any():
        raise MetadataError(f"Every feature has values that are not finite, so {what} is not possible.")
    if not finite.all():
        bad = listing(np.asarray(names)[~finite])
        warnings.warn(
            f"{what}: {(~finite).sum()} of {len(finite)} features have values that are not finite and are left out: "
            f"{bad}.",
            CellvimWarning,
            stacklevel=3,
        )
    return finite


def feature_names(adata: AnnData, use: str) -> np.ndarray:
    """Return what to call the columns of a representation."""
    if use == "X" or use in adata.layers:
        return adata.var_names.to_numpy(dtype=object)
    return np.array([f"{use}_{i}" for i in range(adata.obsm[use].shape[1])], dtype=object)


def note(adata: AnnData, key: str, where: str, settings: Mapping[str, Any], fitted: Mapping[str, np.ndarray]) -> None:
    """Write what a method did to ``uns["cellvim"]["profile"]``.

    Under ``key`` are ``settings`` (as JSON) and the arrays ``fitted``; ``latest`` is ``where`` the result lies.
    """
    profile = adata.uns.setdefault("cellvim", {}).setdefault("profile", {})
    profile[key] = {"settings": json.dumps(dict(settings))} | {
        name: np.asarray(value) for name, value in fitted.items()
    }
    profile["latest"] = where


def settings_of(adata: AnnData, key: str) -> dict[str, Any]:
    """Return the settings that `note` wrote."""
    return json.loads(str(adata.uns["cellvim"]["profile"][key]["settings"]))
