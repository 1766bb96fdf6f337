"""From the rows of fields to blocks of a table: one set of columns for all plates, whatever each has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pandas as pd

OBJECT_COLUMN = "Metadata_ObjectNumber"
KEY_COLUMNS = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
ROWS_PER_BLOCK = 8192  # and of a chunk


class FieldRows(Protocol):
    """Rows of one field, as `cellvim.embedding.ledger.Rows`."""

    embeddings: np.ndarray
    objects: pd.DataFrame
    spatial: np.ndarray
    obsm: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PlateRows:
    """The rows of one plate, read field by field.

    Attributes
    ----------
    fields
        One row a field, in the order that the output will have. ``Metadata_Plate``, ``Metadata_Well`` and
        ``Metadata_Site`` name the field; these and all others become columns.
    counts
        Number of a field -> its number of rows; a field that is not there has none.
    load
        Reads a field's rows.
    """

    fields: pd.DataFrame
    counts: Mapping[int, int]
    load: Callable[[int], FieldRows]

    @property
    def with_rows(self) -> list[int]:
        """The fields that have rows, in order."""
        return [f for f in range(len(self.fields)) if self.counts.get(f, 0) > 0]


@dataclass
class Column:
    """One column of the table: its type in all plates together."""

    dtype: np.dtype | None  # None: text, a categorical
    of_objects: bool
    categories: list[str] = field(default_factory=list)


@dataclass
class Layout:
    """What the table will look like: its columns, arrays and length."""

    columns: dict[str, Column]
    obsm: dict[str, tuple[int, np.dtype]]  # name -> width and type
    n_rows: int

    @classmethod
    def of(cls, plates: Sequence[Callable[[], PlateRows]]) -> Layout:
        """Look at every plate once, keeping only what they have in common."""
        dtypes: dict[str, list[np.dtype | None]] = {}
        of_objects: dict[str, bool] = {}
        categories: dict[str, set[str]] = {}
        obsm: dict[str, tuple[int, np.dtype]] = {"spatial": (2, np.dtype(np.float64))}
        n_rows = n_plates = 0
        for open_plate in plates:
            plate = open_plate()
            used = plate.with_rows
            n_rows += sum(plate.counts[f] for f in used)
            shown = plate.fields.iloc[used] if used else plate.fields
            seen: dict[str, tuple[np.dtype | None, bool]] = {}
            for name, column in shown.items():
                dtype = _constant_type(column)
                seen[str(name)] = (dtype, False)
                if dtype is None and used:
                    categories.setdefault(str(name), set()).update(column.dropna().astype(str).unique())
            sample = next(iter(used or sorted(plate.counts)), None)
            if sample is not None:
                rows = plate.load(sample)
                seen |= {str(n): (rows.objects[n].dtype, True) for n in rows.objects.columns}
                obsm |= {n: (values.shape[1], values.dtype) for n, values in rows.obsm.items()}
            if used or not n_rows:
                n_plates += 1
                for name, (dtype, own) in seen.items():
                    dtypes.setdefault(name, []).append(dtype)
                    of_objects[name] = own
        columns = {}
        first = [*KEY_COLUMNS, OBJECT_COLUMN]
        dtypes.setdefault(OBJECT_COLUMN, [np.dtype(np.int64)])
        of_objects.setdefault(OBJECT_COLUMN, True)
        for name in first + [n for n in dtypes if n not in first]:
            dtype = _common(dtypes[name], everywhere=len(dtypes[name]) >= n_plates)
            if dtype is None and not all(d is None for d in dtypes[name]):  # numbers here, text there: as text
                categories[name] = _values_as_text(plates, name)
            columns[name] = Column(dtype, of_objects[name], sorted(categories.get(name, ())))
        return cls(columns, obsm, n_rows)

    def empty_obs(self) -> pd.DataFrame:
        """Return obs with every column's type and categories, and no rows."""
        return pd.DataFrame(
            {
                name: pd.Categorical([], categories=c.categories) if c.dtype is None else np.zeros(0, c.dtype)
                for name, c in self.columns.items()
            },
            index=pd.Index([], dtype=object),
        )


def blocks(plates: Sequence[Callable[[], PlateRows]], layout: Layout, n_features: int) -> Iterator[Block]:
    """Yield the table in blocks of the same number of rows, the last one shorter."""
    waiting: list[Block] = []
    n = 0
    for open_plate in plates:
        plate = open_plate()
        constants = _constants(plate.fields, layout)
        for number in plate.with_rows:
            block = _block(plate, number, constants, layout, n_features)
            waiting.append(block)
            n += len(block.X)
            while n >= ROWS_PER_BLOCK:
                whole = _joined(waiting)
                yield whole[:ROWS_PER_BLOCK]
                rest = whole[ROWS_PER_BLOCK:]
                n = len(rest.X)
                waiting = [rest] if n else []
    if waiting:
        yield _joined(waiting)


@dataclass
class Block:
    """Some rows of the table: names, columns (codes of categories for text), embeddings and further arrays."""

    names: np.ndarray
    columns: dict[str, np.ndarray]
    X: np.ndarray
    obsm: dict[str, np.ndarray]

    def __getitem__(self, rows: slice) -> Block:
        return Block(
            self.names[rows],
            {n: v[rows] for n, v in self.columns.items()},
            self.X[rows],
            {n: v[rows] for n, v in self.obsm.items()},
        )


def _block(plate: PlateRows, number: int, constants: dict[str, np.ndarray], layout: Layout, n_features: int) -> Block:
    rows = plate.load(number)
    n = plate.counts[number]
    if rows.embeddings.shape != (n, n_features) or rows.spatial.shape != (n, 2) or len(rows.objects) != n:
        raise ValueError(
            f"field {number}: embeddings {rows.embeddings.shape}, objects {rows.objects.shape} and spatial "
            f"{rows.spatial.shape} do not fit together; expected {n} rows and {n_features} features"
        )
    columns = {}
    for name, column in layout.columns.items():
        if column.of_objects and name in rows.objects:
            values = rows.objects[name].to_numpy()
            columns[name] = _coded(pd.Series(values), column) if column.dtype is None else values.astype(column.dtype)
        elif name in constants:
            columns[name] = np.repeat(constants[name][number : number + 1], n)
        else:
            columns[name] = _missing(column, n)
    obsm = {}
    for name, (width, dtype) in layout.obsm.items():
        values = rows.spatial if name == "spatial" else rows.obsm.get(name)
        obsm[name] = np.full((n, width), np.nan, dtype) if values is None else values.astype(dtype)
    keys = [str(plate.fields[name].iloc[number]) for name in KEY_COLUMNS]
    objects = rows.objects[OBJECT_COLUMN].to_numpy()
    names = "__".join(keys) + "__" + objects.astype(str).astype(object)
    return Block(names, columns, rows.embeddings, obsm)


def _constants(fields: pd.DataFrame, layout: Layout) -> dict[str, np.ndarray]:
    found = {}
    for name, values in fields.items():
        column = layout.columns.get(str(name))
        if column is None:
            continue
        if column.dtype is None:
            found[str(name)] = _coded(values, column)
        elif column.dtype.kind == "f":
            found[str(name)] = pd.to_numeric(values).to_numpy(np.float64, na_value=np.nan).astype(column.dtype)
        elif values.isna().any():  # of fields without rows, which are never looked at
            found[str(name)] = values.fillna(0).to_numpy().astype(column.dtype)
        else:
            found[str(name)] = values.to_numpy().astype(column.dtype)
    return found


def _coded(values: pd.Series, column: Column) -> np.ndarray:
    text = values.where(values.isna(), values.astype(str))
    coded = pd.Categorical(text, categories=column.categories).codes
    return coded.astype(_code_type(len(column.categories)))


def _code_type(n: int) -> np.dtype:
    """Return the type that pandas, and so anndata, gives to the codes of n categories."""
    return pd.Categorical.from_codes([], categories=pd.RangeIndex(n)).codes.dtype


def _missing(column: Column, n: int) -> np.ndarray:
    if column.dtype is None:
        return np.full(n, -1, _code_type(len(column.categories)))
    return np.full(n, np.nan, column.dtype)  # a column that some plate lacks is of floats


def _joined(parts: list[Block]) -> Block:
    if len(parts) == 1:
        return parts[0]
    return Block(
        np.concatenate([p.names for p in parts]),
        {n: np.concatenate([p.columns[n] for p in parts]) for n in parts[0].columns},
        np.concatenate([p.X for p in parts]),
        {n: np.concatenate([p.obsm[n] for p in parts]) for n in parts[0].obsm},
    )


def _constant_type(column: pd.Series) -> np.dtype | None:
    if pd.api.types.is_bool_dtype(column) and not column.isna().any():
        return np.dtype(bool)
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return np.dtype(np.float64) if column.isna().any() else np.dtype(column.to_numpy().dtype)
    return None


def _common(dtypes: list[np.dtype | None], *, everywhere: bool) -> np.dtype | None:
    """Return the type that holds a column of all plates; None for text."""
    if any(d is None for d in dtypes):  # not `None in dtypes`: to NumPy, None is float64
        return None
    kinds = {d.kind == "b" for d in dtypes}
    if len(kinds) > 1 or (kinds == {True} and not everywhere):
        return None
    dtype = np.result_type(*dtypes)
    return dtype if everywhere or dtype.kind == "f" else np.dtype(np.float64)


def _values_as_text(plates: Sequence[Callable[[], PlateRows]], name: str) -> set[str]:
    found: set[str] = set()
    for open_plate in plates:
        plate = open_plate()
        if name in plate.fields:
            found |= set(plate.fields.iloc[plate.with_rows][name].dropna().astype(str))
        else:
            for number in plate.with_rows:
                rows = plate.load(number)
                if name in rows.objects:
                    found |= set(rows.objects[name].dropna().astype(str))
    return found
