"""Which column of ``obs`` says what: plate, well, controls, perturbation, dose, mechanism.

Names differ from lab to lab. What is not named by the caller is looked for under the names that the field uses, in a
fixed order, and every result says which columns were taken.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import MetadataError, listing, suggestion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

PLATE, WELL, BATCH, PERT_TYPE = "Metadata_Plate", "Metadata_Well", "Metadata_Batch", "Metadata_pert_type"
OBJECT_COUNT = "Metadata_Object_Count"  # as pycytominer calls it

# Compared without case, underscores and the prefixes Image_ and Metadata_; the first that is there is taken.
_KNOWN_AS = {
    "plate": ("plate", "platebarcode", "assayplatebarcode"),
    "well": ("well", "wellposition"),
    "batch": ("batch", "plate"),
    "perturbation": (
        *("perturbation", "jcp2022", "broadsample", "pertiname", "pertname", "compound", "compoundname"),
        *("treatment", "gene", "genesymbol", "target"),
    ),
    "dose": ("dose", "doseum", "doses", "concentration", "concentrationum", "mmolesperliter", "pertdose"),
    "mechanism": ("moa", "mechanism", "mechanismofaction"),
    "pert_type": ("perttype", "controltype"),
}
_OPTION = {"pert_type": "--control"}  # other roles are named by an option of their own name


@dataclass(frozen=True)
class Columns:
    """The columns of ``obs`` that play a role; None where there is none.

    Attributes
    ----------
    plate, well
        Where a profile is from.
    batch
        Plates that were made together; the plate where nothing is said of batches.
    perturbation
        What was done to the cells.
    dose
        How much of it.
    mechanism
        The known mechanism of action of the perturbation.
    pert_type
        Which rows are controls.
    negative, positive
        Values of ``pert_type`` for the two kinds of controls.
    """

    plate: str | None = None
    well: str | None = None
    batch: str | None = None
    perturbation: str | None = None
    dose: str | None = None
    mechanism: str | None = None
    pert_type: str | None = None
    negative: str = "negcon"
    positive: str = "poscon"

    def as_dict(self) -> dict[str, str | None]:
        """Return the roles and their columns."""
        return asdict(self)


def find_columns(
    obs: pd.DataFrame,
    *,
    negative: str = "negcon",
    positive: str = "poscon",
    **named: str | None,
) -> Columns:
    """Say which column plays which role.

    Parameters
    ----------
    obs
        The table.
    negative, positive
        Values of the column of controls; ``COLUMN:VALUE`` names the column, too.
    **named
        ``plate``, ``well``, ``batch``, ``perturbation``, ``dose``, ``mechanism`` or ``pert_type``: the column's name.
        Without it the column is looked for under the usual names.

    Returns
    -------
    Columns

    Raises
    ------
    MetadataError
        A column that was named is not there.
    """
    columns = {}
    for value in (negative, positive):
        if ":" in value and named.get("pert_type") is None:
            named["pert_type"] = value.rsplit(":", 1)[0]
    by_plain_name: dict[str, str] = {}
    for name in obs.columns:
        by_plain_name.setdefault(_plain(name), name)
    for role, known in _KNOWN_AS.items():
        name = named.get(role)
        if name is not None:
            columns[role] = require(obs, name, option=_OPTION.get(role, f"--{role}"))
        else:
            columns[role] = next((by_plain_name[k] for k in known if k in by_plain_name), None)
    return Columns(**columns, negative=negative.rsplit(":", 1)[-1], positive=positive.rsplit(":", 1)[-1])


def require(obs: pd.DataFrame, name: str, *, option: str) -> str:
    """Return ``name`` if ``obs`` has that column.

    Raises
    ------
    MetadataError
        It has not; the message lists those that there are, and the option that names another.
    """
    if name not in obs.columns:
        raise MetadataError(
            f"There is no column '{name}' in obs; it has {listing(obs.columns, 30)}. Name another with {option}."
            + suggestion(name, map(str, obs.columns))
        )
    return name


def role(columns: Columns, name: str, obs: pd.DataFrame) -> str:
    """Return the column that plays a role.

    Raises
    ------
    MetadataError
        None does.
    """
    column = getattr(columns, name)
    if column is None:
        what = {"pert_type": "of controls", "well": "of wells", "plate": "of plates"}.get(name, f"of the {name}")
        raise MetadataError(
            f"No column {what} was found; obs has {listing(obs.columns, 30)}. Name it with "
            f"{'--control COLUMN:VALUE' if name == 'pert_type' else f'--{name} COLUMN'}."
        )
    return column


def text(column: pd.Series) -> pd.Series:
    """Return the column as text, missing values left missing; whole numbers without a decimal point."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = text(pd.Series(column.cat.categories))
        values = np.append(categories.to_numpy(dtype=object), [None])[column.cat.codes]  # -1, missing, is the last
        return pd.Series(values, index=column.index, dtype=object)
    if pd.api.types.is_float_dtype(column):
        column = column.astype(object).where(column.isna(), column.map("{:.15g}".format))
    return column.astype(object).where(column.isna(), column.astype(str)).where(column.notna(), None)


def is_value(column: pd.Series, value: str) -> np.ndarray:
    """Return where the column has a value, compared as text: -1, -1.0 and "-1" are one."""
    number = pd.to_numeric(pd.Series([value]), errors="coerce")
    as_text = str(value) if number.isna().all() else text(number.astype(float)).iloc[0]
    return (text(column) == as_text).to_numpy(dtype=bool) | (text(column) == str(value)).to_numpy(dtype=bool)


def negative_controls(obs: pd.DataFrame, columns: Columns) -> np.ndarray:
    """Return (n,) which rows are negative controls.

    Raises
    ------
    MetadataError
        No column tells controls, or none of its values is the negative control's.
    """
    return _controls(obs, columns, columns.negative, "negative")


def positive_controls(obs: pd.DataFrame, columns: Columns) -> np.ndarray:
    """Return (n,) which rows are positive controls; raises as `negative_controls`."""
    return _controls(obs, columns, columns.positive, "positive")


def _controls(obs: pd.DataFrame, columns: Columns, value: str, which: str) -> np.ndarray:
    column = role(columns, "pert_type", obs)
    found = is_value(obs[column], value)
    if not found.any():
        values = listing(pd.unique(text(obs[column]).dropna()))
        option = "--control" if which == "negative" else "--positive"
        raise MetadataError(
            f"No row is a {which} control: '{column}' is never '{value}'; it has the values {values}. Say which it is "
            f"with {option} COLUMN:VALUE."
        )
    return found


def keys(obs: pd.DataFrame, names: Sequence[str], separator: str = "__") -> pd.Series:
    """Return the columns joined to one text a row, such as ``plate__well``; missing where any of them is."""
    parts = [text(obs[name]) for name in names]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.str.cat(part, sep=separator)
    return joined


def matrix(adata: AnnData, use: str | None = None) -> np.ndarray:
    """Return one representation of the rows.

    Parameters
    ----------
    adata
        Profiles or embeddings.
    use
        "X", the name of a layer or of an entry of obsm; None is "X".

    Returns
    -------
    numpy.ndarray
        (n, D) float64.

    Raises
    ------
    MetadataError
        There is none of that name.
    """
    if use is None or use == "X":
        values = adata.X
    elif use in adata.layers:
        values = adata.layers[use]
    elif use in adata.obsm:
        values = adata.obsm[use]
    else:
        raise MetadataError(f"There is no representation '{use}'; there are {listing(representations(adata))}.")
    if values is None:
        raise MetadataError(f"The AnnData has no X; there are {listing(representations(adata))}.")
    values = values.toarray() if hasattr(values, "toarray") else values
    return np.asarray(values, dtype=np.float64)


def representations(adata: AnnData) -> list[str]:
    """Return the names that `matrix` knows: "X", layers, and matrices of obsm."""
    found = ["X"] if adata.X is not None else []
    found += [str(name) for name in adata.layers]
    return found + [str(name) for name in adata.obsm if name != "spatial" and getattr(adata.obsm[name], "ndim", 0) == 2]


def _plain(name: object) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(image_)?(metadata_)?", "", str(name).lower()))
