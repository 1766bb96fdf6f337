"""The meaning of the columns of ``obs``: plates, wells, perturbations, controls and treatments.

Column names differ between laboratories. A column that the caller does not name is searched for under its common names,
in a fixed order; every result records the columns that were used.
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

PLATE, WELL = "Metadata_Plate", "Metadata_Well"
OBJECT_COUNT = "Metadata_Object_Count"  # the name that pycytominer uses

# Compared without case, punctuation and the prefixes Image_ and Metadata_; the first name that exists is used.
_COMMON_NAMES = {
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


@dataclass(frozen=True)
class Columns:
    """The columns of ``obs`` by their role; None for a role without a column.

    Attributes
    ----------
    plate, well
        Position of a profile.
    batch
        Plates that were produced together; the plate if there is no column of batches.
    perturbation
        Compound, gene or other treatment of the cells.
    dose
        Dose of the perturbation.
    mechanism
        Known mechanism of action of the perturbation.
    pert_type
        Kind of row: control or treated.
    negative, positive
        Values of ``pert_type`` for negative and positive controls.
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
    obs: pd.DataFrame, *, negative: str = "negcon", positive: str = "poscon", **named: str | None
) -> Columns:
    """Find the column for each role.

    Parameters
    ----------
    obs
        Table of the rows.
    negative, positive
        Values of the control column; ``COLUMN:VALUE`` also names the column.
    **named
        Name of the column for ``plate``, ``well``, ``batch``, ``perturbation``, ``dose``, ``mechanism`` or
        ``pert_type``. By default it is searched for under its common names.

    Returns
    -------
    Columns

    Raises
    ------
    MetadataError
        A named column does not exist.
    """
    for value in (negative, positive):
        if ":" in value and named.get("pert_type") is None:
            named["pert_type"] = value.rsplit(":", 1)[0]
    by_plain_name: dict[str, str] = {}
    for name in obs.columns:
        plain = re.sub(r"[^a-z0-9]", "", re.sub(r"^(image_)?(metadata_)?", "", str(name).lower()))
        by_plain_name.setdefault(plain, name)
    columns = {}
    for role, names in _COMMON_NAMES.items():
        if named.get(role) is not None:
            option = "--control" if role == "pert_type" else f"--{role}"
            columns[role] = require(obs, named[role], option=option)
        else:
            columns[role] = next((by_plain_name[name] for name in names if name in by_plain_name), None)
    return Columns(**columns, negative=negative.rsplit(":", 1)[-1], positive=positive.rsplit(":", 1)[-1])


def require(obs: pd.DataFrame, name: str, *, option: str) -> str:
    """Return ``name`` if ``obs`` has that column; otherwise raise, with the ``option`` that names another one."""
    if name not in obs.columns:
        raise MetadataError(
            f"There is no column '{name}' in obs, which has {listing(obs.columns, 30)}. Name another with {option}."
            + suggestion(name, map(str, obs.columns))
        )
    return name


def column_of(columns: Columns, role: str, obs: pd.DataFrame) -> str:
    """Return the column for a role; raise if there is none."""
    column = getattr(columns, role)
    if column is None:
        what = {"pert_type": "of controls", "well": "of wells", "plate": "of plates"}.get(role, f"of the {role}")
        option = "--control COLUMN:VALUE" if role == "pert_type" else f"--{role} COLUMN"
        raise MetadataError(f"No column {what} was found in obs, which has {listing(obs.columns, 30)}. Use {option}.")
    return column


def text(column: pd.Series) -> pd.Series:
    """Return a column as text, with None for missing values and without a decimal point for integral numbers."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = text(pd.Series(column.cat.categories))
        values = np.append(categories.to_numpy(dtype=object), [None])[column.cat.codes]  # -1, missing, is the last
        return pd.Series(values, index=column.index, dtype=object)
    if pd.api.types.is_float_dtype(column):
        column = column.astype(object).where(column.isna(), column.map("{:.15g}".format))
    return column.astype(object).where(column.isna(), column.astype(str)).where(column.notna(), None)


def keys(obs: pd.DataFrame, names: Sequence[str], separator: str = "__") -> pd.Series:
    """Return the columns joined to one text per row, such as ``plate__well``; missing if one of them is missing."""
    joined, *rest = (text(obs[name]) for name in names)
    for part in rest:
        joined = joined.str.cat(part, sep=separator)
    return joined


def is_value(column: pd.Series, value: object) -> np.ndarray:
    """Return (n,) whether the column has a value, compared as text and as a number: -1, -1.0 and "-1" are equal."""
    values = text(column)
    found = (values == str(value)).to_numpy(dtype=bool)
    try:
        number = float(str(value))
    except ValueError:
        return found
    return found | (pd.to_numeric(values, errors="coerce") == number).to_numpy(dtype=bool)


def negative_controls(obs: pd.DataFrame, columns: Columns) -> np.ndarray:
    """Return (n,) whether a row is a negative control; raise if there are none."""
    return _controls(obs, columns, columns.negative, "negative", "--control")


def positive_controls(obs: pd.DataFrame, columns: Columns) -> np.ndarray:
    """Return (n,) whether a row is a positive control; raise if there are none."""
    return _controls(obs, columns, columns.positive, "positive", "--positive")


def _controls(obs: pd.DataFrame, columns: Columns, value: str, kind: str, option: str) -> np.ndarray:
    column = column_of(columns, "pert_type", obs)
    found = is_value(obs[column], value)
    if not found.any():
        values = listing(pd.unique(text(obs[column]).dropna()))
        raise MetadataError(
            f"No row is a {kind} control: '{column}' is never '{value}'; it has the values {values}. Choose another "
            f"with {option} COLUMN:VALUE."
        )
    return found


@dataclass(frozen=True)
class Treatments:
    """The treatment of each treated row. Rows with the same perturbation at the same dose are replicates.

    Attributes
    ----------
    rows
        Positions of the treated rows: those with a perturbation that are neither negative controls nor empty wells.
    codes
        (len(rows),) number of the treatment of each row.
    table
        One row per treatment: its perturbation and, if known, its dose and mechanism, in columns named as in ``obs``.
    """

    rows: np.ndarray
    codes: np.ndarray
    table: pd.DataFrame

    @property
    def counts(self) -> np.ndarray:
        """Number of replicates of each treatment."""
        return np.bincount(self.codes, minlength=len(self.table))

    def means(self, values: np.ndarray) -> np.ndarray:
        """Return the mean over the replicates of each treatment, (treatments, D)."""
        sums = np.zeros((len(self.table), values.shape[1]))
        np.add.at(sums, self.codes, values[self.rows])
        return sums / self.counts[:, None]


def find_treatments(obs: pd.DataFrame, columns: Columns) -> Treatments:
    """Group the treated rows by treatment; raise if there are none."""
    name = column_of(columns, "perturbation", obs)
    perturbation = text(obs[name])
    treated = perturbation.notna().to_numpy() & (perturbation != "").to_numpy()
    if columns.pert_type is not None:
        for kind in (columns.negative, "empty"):
            treated &= ~is_value(obs[columns.pert_type], kind)
    if not treated.any():
        raise MetadataError(f"There are no treated rows: '{name}' has no values except those of controls.")
    names = [name] + ([columns.dose] if columns.dose is not None and columns.dose != name else [])
    key = pd.DataFrame({n: text(obs[n])[treated].to_numpy() for n in names}).fillna("")
    codes, _ = pd.factorize(pd.MultiIndex.from_frame(key), sort=True)
    rows = np.flatnonzero(treated)
    first = rows[np.unique(codes, return_index=True)[1]]
    extra = [columns.mechanism] if columns.mechanism is not None and columns.mechanism not in names else []
    table = obs.iloc[first][names + extra].reset_index(drop=True)
    return Treatments(rows, codes, table.astype({n: object for n in (name, *extra)}))
