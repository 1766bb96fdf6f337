"""Treatments: rows that had the same perturbation at the same dose are replicates of each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellvim.errors import MetadataError
from cellvim.profiles.columns import Columns, is_value, role, text


@dataclass(frozen=True)
class Treatments:
    """Which treatment each treated row had.

    Attributes
    ----------
    rows
        Positions of treated rows: those that have a perturbation, and are neither negative controls nor empty.
    codes
        (len(rows),) the treatment of each.
    table
        One row a treatment: its perturbation and, where known, its dose and mechanism, under the names of the columns.
    """

    rows: np.ndarray
    codes: np.ndarray
    table: pd.DataFrame

    @property
    def counts(self) -> np.ndarray:
        """Replicates of each treatment."""
        return np.bincount(self.codes, minlength=len(self.table))

    def means(self, values: np.ndarray) -> np.ndarray:
        """Return (treatments, D), the mean over the replicates of each."""
        sums = np.zeros((len(self.table), values.shape[1]))
        np.add.at(sums, self.codes, values[self.rows])
        return sums / self.counts[:, None]


def find_treatments(obs: pd.DataFrame, columns: Columns) -> Treatments:
    """Group the treated rows by treatment.

    Raises
    ------
    MetadataError
        There is no column of perturbations, or no treated row.
    """
    name = role(columns, "perturbation", obs)
    perturbation = text(obs[name])
    treated = perturbation.notna().to_numpy() & (perturbation != "").to_numpy()
    if columns.pert_type is not None:
        for kind in (columns.negative, "empty"):
            treated &= ~is_value(obs[columns.pert_type], kind)
    if not treated.any():
        raise MetadataError(f"No row is treated: '{name}' has no values but those of controls.")
    names = [name] + ([columns.dose] if columns.dose is not None and columns.dose != name else [])
    key = pd.DataFrame({n: text(obs[n])[treated].to_numpy() for n in names}).fillna("")
    codes, _ = pd.factorize(pd.MultiIndex.from_frame(key), sort=True)
    rows = np.flatnonzero(treated)
    first = rows[np.unique(codes, return_index=True)[1]]
    extra = [columns.mechanism] if columns.mechanism is not None and columns.mechanism not in names else []
    table = obs.iloc[first][names + extra].reset_index(drop=True)
    return Treatments(rows, codes, table.astype({n: object for n in (name, *extra)}))
