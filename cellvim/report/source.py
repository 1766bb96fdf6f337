"""The input of a report: rows of an AnnData, read on demand, and the roles of the columns of ``obs``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.anndata_io import StoredAnnData, open_anndata
from cellvim.profiles.columns import Columns, find_columns, text
from cellvim.report.record import with_first_plate

if TYPE_CHECKING:
    from anndata import AnnData

SITE_COLUMNS = ("Metadata_Site", "Metadata_Field", "Site")


@dataclass(frozen=True, eq=False)
class Source:
    """Embeddings to report on.

    Attributes
    ----------
    name
        Name for the subtitle.
    store
        The rows.
    obs
        All columns of ``obs``, with the index 0 … n − 1.
    columns
        Roles of the columns.
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
        """Number of rows."""
        return self.store.n_rows

    def matrix(self, name: str) -> np.ndarray | None:
        """Return an entry of obsm with two or more columns, or None."""
        values = self.store.obsm(name)
        return values if values is not None and values.ndim == 2 and values.shape[1] >= 2 else None

    def text(self, role: str) -> np.ndarray:
        """Return the column of a role as (n,) text; None for missing values or a missing column."""
        column = getattr(self.columns, role)
        if column is None:
            return np.full(len(self.obs), None, dtype=object)
        return text(self.obs[column]).to_numpy(dtype=object)

    @property
    def site_column(self) -> str | None:
        """Column with the site of each row."""
        return next((name for name in SITE_COLUMNS if name in self.obs), None)

    def wells(self) -> np.ndarray:
        """Return an integer code per plate and well, (n,), starting at 0."""
        plate, well = (pd.factorize(self.text(role), use_na_sentinel=False)[0] for role in ("plate", "well"))
        return pd.factorize(plate * (well.max(initial=0) + 1) + well)[0]


@contextmanager
def open_source(source: str | Path | AnnData, **columns: str | None) -> Iterator[Source]:
    """Open embeddings for a report.

    Parameters
    ----------
    source
        An AnnData or its path.
    **columns
        As for `cellvim.profiles.find_columns`.

    Raises
    ------
    CellvimError
        The embeddings cannot be read, or a named column does not exist.
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
