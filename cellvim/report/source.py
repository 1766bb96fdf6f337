"""What a report is about: the rows of an AnnData, read when they are needed, and which column says what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.anndata_io import StoredAnnData, open_anndata
from cellvim.profiles.columns import Columns, find_columns, is_value, text
from cellvim.report.record import with_first_plate

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True, eq=False)
class Source:
    """The embeddings of a report.

    Attributes
    ----------
    name
        What to call them.
    store
        Their rows.
    obs
        All columns; the index is 0 … n − 1.
    columns
        Which column says what.
    uns
        ``uns["cellvim"]``.
    """

    name: str
    store: StoredAnnData
    obs: pd.DataFrame
    columns: Columns
    uns: dict[str, Any]

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return self.store.n_rows

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Return rows of X, (m, D) float32, in ascending order of ``index``."""
        return self.store.take(index)

    def matrix(self, name: str) -> np.ndarray | None:
        """Return a whole entry of obsm, or None where there is none of two or more columns."""
        values = self.store.obsm(name)
        return values if values is not None and values.ndim == 2 and values.shape[1] >= 2 else None

    def text(self, role: str) -> np.ndarray:
        """Return what a role's column says, (n,) text; None where nothing is said or there is no such column."""
        column = getattr(self.columns, role)
        if column is None:
            return np.full(len(self.obs), None, dtype=object)
        return text(self.obs[column]).to_numpy(dtype=object)

    def wells(self) -> np.ndarray:
        """Return a code for each row's plate and well, (n,), 0 and up."""
        plate, well = (pd.factorize(self.text(role), use_na_sentinel=False)[0] for role in ("plate", "well"))
        return pd.factorize(plate * (well.max(initial=0) + 1) + well)[0]

    def kinds(self) -> np.ndarray:
        """Return "negative", "positive" or "" for each row."""
        column = self.columns.pert_type
        if column is None:
            return np.full(len(self.obs), "", dtype=object)
        is_negative, is_positive = (
            is_value(self.obs[column], kind) for kind in (self.columns.negative, self.columns.positive)
        )
        return np.where(is_negative, "negative", np.where(is_positive, "positive", "")).astype(object)


@contextmanager
def open_source(source: str | Path | AnnData, **columns: str | None) -> Iterator[Source]:
    """Open embeddings for a report.

    Parameters
    ----------
    source
        An AnnData, or the path of one.
    **columns
        As for `cellvim.profiles.find_columns`.

    Raises
    ------
    CellvimError
        It cannot be read, or a column that was named is not there.
    """
    with open_anndata(source) as store:
        obs = store.obs()
        yield Source(
            name=Path(source).name if isinstance(source, str | Path) else "the AnnData",
            store=store,
            obs=obs,
            columns=find_columns(obs, **columns),
            uns=with_first_plate(store.uns()),
        )
