"""Parquet as pycytominer takes it: one table, metadata in columns ``Metadata_…``, then the features."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellvim.embedding.row_tables import Layout, PlateRows, blocks
from cellvim.errors import OutputError


def write_parquet(
    path: Path, plates: Sequence[Callable[[], PlateRows]], layout: Layout, n_features: int, uns: Mapping[str, Any]
) -> None:
    """Write one row group a block; ``uns`` goes into the file's own metadata, as JSON under ``cellvim``.

    Raises
    ------
    OutputError
        pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise OutputError("--format parquet needs pyarrow: pip install 'cellvim[tables]'.") from error
    schema = None
    metadata = {key: json.dumps(_plain(value), sort_keys=True) for key, value in uns.items()}
    with open(path, "wb") as file:
        writer = None
        for block in blocks(plates, layout, n_features):
            table = pyarrow.Table.from_pandas(_frame(block, layout, n_features), preserve_index=False)
            if writer is None:
                schema = table.schema.with_metadata(metadata)
                writer = pyarrow.parquet.ParquetWriter(file, schema)
            writer.write_table(table.cast(schema))
        if writer is None:
            empty = layout.empty_obs().rename(columns=_metadata_name)
            features = pd.DataFrame(np.zeros((0, n_features), np.float32), columns=_features(n_features))
            table = pyarrow.Table.from_pandas(pd.concat([empty, features], axis=1), preserve_index=False)
            writer = pyarrow.parquet.ParquetWriter(file, table.schema.with_metadata(metadata))
        writer.close()


def _frame(block: Any, layout: Layout, n_features: int) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for name, values in block.columns.items():
        column = layout.columns[name]
        coded = column.dtype is None
        columns[_metadata_name(name)] = (
            pd.Categorical.from_codes(values, categories=pd.Index(column.categories, dtype=object)) if coded else values
        )
    for name, values in block.obsm.items():
        axes = (
            ("x", "y")
            if name == "spatial"
            else tuple(f"{name.removeprefix('X_')}_{i:04d}" for i in range(values.shape[1]))
        )
        for i, axis in enumerate(axes):
            columns[f"Metadata_spatial_{axis}" if name == "spatial" else axis] = values[:, i]
    features = pd.DataFrame(block.X, columns=_features(n_features))
    return pd.concat([pd.DataFrame(columns), features], axis=1)


def _features(n: int) -> list[str]:
    return [f"emb_{i:04d}" for i in range(n)]


def _metadata_name(name: str) -> str:
    return name if name.startswith("Metadata_") else f"Metadata_{name}"


def _plain(value: Any) -> Any:
    """Return a value as JSON takes it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, pd.DataFrame):
        return value.to_dict(orient="list")
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
