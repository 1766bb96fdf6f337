"""Aggregate cells to wells, in memory that does not grow with the number of cells.

Means are computed in one pass over the rows. Medians and trimmed means require all cells of a well at once and are
exact: wells are processed in batches, in their order in the store, by reading the rows from the first to the last cell
of each batch. `cellvim embed` writes the cells of a well consecutively, so this is one pass, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from cellvim.anndata_io import StoredAnnData, open_anndata
from cellvim.errors import CellvimWarning, InputError, MetadataError, listing
from cellvim.profiles.columns import OBJECT_COUNT, PLATE, WELL, keys, require

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

Statistic = Literal["mean", "median", "robust"]
STATISTICS = ("mean", "median", "robust")
TRIM = 0.1  # share of cells that "robust" omits at either end
CHUNK_BYTES = 64 << 20  # per read
WELLS_BYTES = 256 << 20  # per batch of wells; a larger well is a batch of its own

Progress = Callable[[int, int], None]


def aggregate(
    source: str | Path | AnnData,
    *,
    by: Sequence[str] = (PLATE, WELL),
    statistic: Statistic = "mean",
    min_cells: int = 1,
    progress: Progress | None = None,
) -> AnnData:
    """Aggregate the cells of each well to one profile.

    Parameters
    ----------
    source
        Embeddings: an AnnData or the path of one, which is read in chunks of rows.
    by
        Columns of ``obs``; rows with equal values are aggregated.
    statistic
        "mean"; "median"; or "robust", the mean of each feature after omitting a tenth of the cells at either end [1]_.
    min_cells
        Minimum number of cells; wells with fewer are omitted and recorded in ``uns``.
    progress
        Called with the number of rows done and the total.

    Returns
    -------
    AnnData
        Rows are sorted by ``by``.

        ``X``
            (wells, D) float32. Values that are not finite are ignored; NaN if a well has no finite value.
        ``obs``
            ``by``; ``Metadata_Object_Count``, the number of cells; all columns with a single value per well; the mean
            of other numeric columns (such as ``area_um2``), except ``Metadata_…``, which are identifiers.
        ``obsm["X_emb_<channel>"]``
            As X, if the cells have them.
        ``uns["cellvim"]``
            Of the cells; with ``profile``, which records the aggregation.

    Warns
    -----
    CellvimWarning
        Some values are not finite, or wells were omitted.

    Raises
    ------
    CellvimError
        A column does not exist, rows have no well, or there are no rows.

    References
    ----------
    .. [1] Tukey and McLaughlin, "Less vulnerable confidence and significance procedures for location based on a single
       sample: Trimming/Winsorization 1", Sankhya A, 1963.
    """
    if statistic not in STATISTICS:
        raise InputError(f"There is no statistic '{statistic}'; expected {listing(STATISTICS)}.")
    if min_cells < 1:
        raise InputError(f"--min-cells is {min_cells}; expected at least 1.")
    import anndata

    with open_anndata(source) as store:
        groups = _groups(store, list(by))
        total = store.n_rows * len(store.matrices)
        done = 0

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            if progress is not None:
                progress(min(done, total), total)

        # profiles of each matrix, (wells, D), and its number of values that are not finite
        results = {
            name: _means(store, groups, name, advance)
            if statistic == "mean"
            else _order_statistics(store, groups, name, statistic, advance)
            for name in store.matrices
        }
        obs, dropped_columns = _obs(store, groups)
        cellvim = store.uns()
    enough = groups.counts >= min_cells
    obs.index = pd.Index(keys(obs, list(by)).to_numpy(dtype=str).astype(object))
    if not enough.any():
        raise InputError(
            f"No well of {store.name} has {min_cells} cells; the maximum is {groups.counts.max()}. Lower --min-cells."
        )
    if (left_out := obs.index[~enough]).size:
        warnings.warn(
            f"{len(left_out)} wells have fewer than {min_cells} cells and are omitted: {listing(left_out)}.",
            CellvimWarning,
            stacklevel=2,
        )
    n_missing = sum(bad for _, bad in results.values())
    if n_missing:
        warnings.warn(
            f"{n_missing:,} values of {store.name} are not finite and are ignored.", CellvimWarning, stacklevel=2
        )
    cellvim["profile"] = {
        "aggregate": {
            "statistic": statistic,
            "trim": TRIM if statistic == "robust" else 0.0,
            "by": np.array(list(by), dtype=object),
            "rows": store.n_rows,
            "values_not_finite": n_missing,
            "min_cells": min_cells,
            "wells_left_out": np.array(left_out, dtype=object),
            "columns_left_out": np.array(dropped_columns, dtype=object),
        }
    }
    for name, column in obs.items():  # text is repeated across plates
        if pd.api.types.is_object_dtype(column):
            obs[name] = pd.Categorical(column)
    return anndata.AnnData(
        X=results["X"][0][enough].astype(np.float32),
        obs=obs[enough],
        var=pd.DataFrame(index=pd.Index(store.var_names, dtype=object)),
        obsm={k: values[enough].astype(np.float32) for k, (values, _) in results.items() if k != "X"},
        uns={"cellvim": cellvim},
    )


@dataclass(frozen=True)
class _Groups:
    """The group of each row."""

    codes: np.ndarray  # (rows,) int32
    keys: pd.DataFrame  # one row per group
    counts: np.ndarray  # (groups,) number of rows
    first: np.ndarray  # (groups,) first row

    def __len__(self) -> int:
        return len(self.counts)


def _groups(store: StoredAnnData, by: list[str]) -> _Groups:
    if store.n_rows == 0:
        raise InputError(f"{store.name} has no rows, so there is nothing to aggregate.")
    columns = {}
    for name in by:
        require(pd.DataFrame(columns=store.obs_columns), name, option="--by")
        columns[name] = store.column(name)
        if n := int(columns[name].isna().sum()):
            raise MetadataError(f"{n:,} of {store.n_rows:,} rows of {store.name} have no {name}, which is required.")
    code = np.zeros(store.n_rows, np.int64)
    for column in columns.values():
        codes, values = pd.factorize(column)
        code = code * len(values) + codes
    code, _ = pd.factorize(code)
    n = int(code.max()) + 1
    first = np.full(n, store.n_rows, np.int64)
    np.minimum.at(first, code, np.arange(store.n_rows))
    table = pd.DataFrame({name: column.iloc[first].to_numpy() for name, column in columns.items()})
    order = table.sort_values(by).index.to_numpy()
    rank = np.empty(n, np.int32)
    rank[order] = np.arange(n, dtype=np.int32)
    codes = rank[code]
    return _Groups(codes, table.loc[order].reset_index(drop=True), np.bincount(codes, minlength=n), first[order])


def _chunks(store: StoredAnnData, matrix: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, CHUNK_BYTES // (8 * max(1, store.matrices[matrix])))
    for begin in range(start, stop, rows):
        yield begin, store.rows(begin, min(begin + rows, stop), matrix)


def _means(
    store: StoredAnnData, groups: _Groups, matrix: str, advance: Callable[[int], None]
) -> tuple[np.ndarray, int]:
    sums = np.zeros((len(groups), store.matrices[matrix]))
    missing = np.zeros(sums.shape, np.int64)
    n_missing = 0
    for begin, values in _chunks(store, matrix, 0, store.n_rows):
        codes = groups.codes[begin : begin + len(values)]
        if (np.diff(codes) < 0).any():
            order = np.argsort(codes, kind="stable")
            codes, values = codes[order], values[order]
        starts = np.flatnonzero(np.r_[True, np.diff(codes) > 0])
        with np.errstate(invalid="ignore", over="ignore"):
            part = np.add.reduceat(values, starts, axis=0, dtype=np.float64)
        if not np.isfinite(part).all():
            bad = ~np.isfinite(values)
            n_missing += int(bad.sum())
            missing[codes[starts]] += np.add.reduceat(bad, starts, axis=0, dtype=np.int64)
            part = np.add.reduceat(np.where(bad, 0, values), starts, axis=0, dtype=np.float64)
        sums[codes[starts]] += part
        advance(len(values))
    counts = groups.counts[:, None] - missing
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), n_missing


def _order_statistics(
    store: StoredAnnData, groups: _Groups, matrix: str, statistic: Statistic, advance: Callable[[int], None]
) -> tuple[np.ndarray, int]:
    result = np.empty((len(groups), store.matrices[matrix]))
    n_missing = 0
    for members, start, stop in _batches(groups, 8 * store.matrices[matrix]):
        parts = []
        for begin, values in _chunks(store, matrix, start, stop):
            codes = groups.codes[begin : begin + len(values)]
            chosen = np.isin(codes, members)
            parts.append((codes[chosen], values[chosen]))
        codes, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(codes, kind="stable")
        members = np.sort(members)
        for member, rows in zip(members, np.split(order, np.cumsum(groups.counts[members])[:-1]), strict=True):
            result[member], bad = _location(values[rows], statistic)
            n_missing += bad
        advance(len(values))
    return result, n_missing


def _batches(groups: _Groups, bytes_per_row: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield groups whose rows fit into memory together, and the range of rows that contains them."""
    first, last = groups.first, np.zeros(len(groups), np.int64)
    np.maximum.at(last, groups.codes, np.arange(len(groups.codes)))
    order = np.argsort(first, kind="stable")
    limit = max(1, WELLS_BYTES // bytes_per_row)
    batch, size = [], 0
    for group in order:
        if batch and size + groups.counts[group] > limit:
            yield np.array(batch), int(first[batch].min()), int(last[batch].max()) + 1
            batch, size = [], 0
        batch.append(group)
        size += groups.counts[group]
    yield np.array(batch), int(first[batch].min()), int(last[batch].max()) + 1


def _location(values: np.ndarray, statistic: Statistic) -> tuple[np.ndarray, int]:
    """Return the median or trimmed mean of each column, and the number of values that are not finite."""
    values = values.astype(np.float64)
    bad = ~np.isfinite(values)
    n_bad = int(bad.sum())
    if n_bad:
        values[bad] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for columns without finite values
        if statistic == "median":
            return (np.nanmedian if n_bad else np.median)(values, axis=0), n_bad
        if not n_bad:
            return _trimmed_mean(values), 0
        columns = [_trimmed_mean(column[np.isfinite(column)][:, None])[0] for column in values.T]
        return np.array(columns), n_bad


def _trimmed_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of each column without its ``int(TRIM n)`` lowest and highest values."""
    if int(TRIM * len(values)) == 0:
        return values.mean(axis=0) if len(values) else np.full(values.shape[1], np.nan)
    from scipy.stats import trim_mean

    return trim_mean(values, TRIM, axis=0)


def _obs(store: StoredAnnData, groups: _Groups) -> tuple[pd.DataFrame, list[str]]:
    """Return one row per group, and the names of the columns that vary within groups and are not averaged."""
    columns: dict[str, object] = dict(groups.keys.items())
    columns[OBJECT_COUNT] = groups.counts.astype(np.int64)
    dropped = []
    for name in store.obs_columns:
        if name in columns:
            continue
        column = store.column(name)
        constant = _constant(column, groups)
        if constant is not None:
            columns[name] = constant
        elif name.startswith("Metadata_") or not _is_number(column):
            dropped.append(name)
        else:
            values = column.to_numpy(np.float64, na_value=np.nan)
            known = np.isfinite(values)
            n = np.bincount(groups.codes[known], minlength=len(groups))
            sums = np.bincount(groups.codes[known], weights=values[known], minlength=len(groups))
            columns[name] = np.where(n > 0, sums / np.maximum(n, 1), np.nan)
    return pd.DataFrame(columns), dropped


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)


def _constant(column: pd.Series, groups: _Groups) -> pd.Series | None:
    """Return the value of each group, or None if the rows of a group differ."""
    value = column.iloc[groups.first].reset_index(drop=True)
    of_rows = value.iloc[groups.codes].array
    is_equal = pd.Series(column.array == of_rows).fillna(False).to_numpy(bool)
    if not (is_equal | (column.isna() & pd.isna(of_rows)).to_numpy(bool)).all():
        return None
    if isinstance(column.dtype, pd.CategoricalDtype):  # categories in order of appearance
        return value.cat.set_categories(pd.unique(column.dropna()).astype(column.cat.categories.dtype), ordered=False)
    if _is_number(column) and value.isna().any():
        return pd.Series(value.to_numpy(np.float64, na_value=np.nan))
    return value
