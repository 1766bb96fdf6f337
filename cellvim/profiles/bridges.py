"""Between AnnData and the table that pycytominer works on.

pycytominer's own conversion (1.7.1) turns names of rows into integers and metadata that are numbers into features, so
this goes through a table of ours: metadata columns begin with ``Metadata_``, all others are features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.anndata_io import is_parquet
from cellvim.errors import InputError, MetadataError, listing
from cellvim.profiles.columns import matrix
from cellvim.profiles.fitting import feature_names

if TYPE_CHECKING:
    from anndata import AnnData

OBS_NAMES = "Metadata_obs_names"
_COMPARTMENTS = ("Cells_", "Nuclei_", "Cytoplasm_", "emb_")
_NUMBERING = {"ImageNumber", "ObjectNumber", "TableNumber"}


def to_pycytominer(adata: AnnData, *, use: str = "X") -> pd.DataFrame:
    """Make the table of metadata and features that pycytominer and copairs work on.

    pycytominer finds features by the names of CellProfiler's compartments, so name ours:
    ``pycytominer.normalize(table, features=list(adata.var_names), …)``.

    Parameters
    ----------
    adata
        Profiles or embeddings.
    use
        Which features: "X", a layer such as "robustmad", or an entry of ``obsm``.

    Returns
    -------
    pandas.DataFrame
        One row a row of ``adata``. Columns of ``obs``, with ``Metadata_`` before those names that lack it; the names of
        the rows, as ``Metadata_obs_names``; and the features, under their own names. `from_pycytominer` turns it back.

    Raises
    ------
    MetadataError
        Two columns would have one name.
    """
    renamed = {str(name): str(name) if _is_metadata(name) else f"Metadata_{name}" for name in adata.obs.columns}
    features = [str(name) for name in feature_names(adata, use)]
    names = [*renamed.values(), OBS_NAMES, *features]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise MetadataError(f"The table would have two columns each of: {listing(twice)}. Rename them in obs or var.")
    metadata = adata.obs.rename(columns=renamed).reset_index(drop=True)
    metadata[OBS_NAMES] = adata.obs_names.to_numpy(dtype=object)
    # float32 stays float32: a table of 64-bit copies would be twice as large, and no more exact
    values = pd.DataFrame(matrix(adata, use).astype(_width(adata, use)), columns=features)
    table = pd.concat([metadata, values], axis=1)
    table.attrs["cellvim"] = {"renamed": {new: old for old, new in renamed.items() if old != new}}
    return table


def from_pycytominer(table: pd.DataFrame, *, features: Sequence[str] | None = None) -> AnnData:
    """Make an AnnData of a table of profiles.

    Parameters
    ----------
    table
        As pycytominer makes it, or any table of one row a profile.
    features
        Columns that are features. If not given: those that begin with ``Cells_``, ``Nuclei_``, ``Cytoplasm_`` or
        ``emb_``; where there are none, all columns of numbers whose names do not begin with ``Metadata_``.

    Returns
    -------
    AnnData
        ``X`` (n, D) float32; all other columns are in ``obs``, text as categoricals.

    Raises
    ------
    MetadataError
        There are no features, a feature is no number, or a column is there twice.
    """
    import anndata

    names = [str(c) for c in table.columns]
    if len(set(names)) < len(names):
        raise MetadataError(f"Columns are there twice: {listing(sorted({n for n in names if names.count(n) > 1}))}.")
    table = table.set_axis(names, axis=1)
    chosen = _features(table) if features is None else [str(f) for f in features]
    if lost := [f for f in chosen if f not in table]:
        raise MetadataError(f"The table has no column {listing(lost)}; it has {listing(names, 30)}.")
    if text := [f for f in chosen if not pd.api.types.is_numeric_dtype(table[f])]:
        raise MetadataError(f"Features have to be numbers, but these columns are not: {listing(text)}.")
    if not chosen:
        raise MetadataError(f"The table has no features, which are columns of numbers; it has {listing(names, 30)}.")
    obs = table.drop(columns=chosen).reset_index(drop=True)
    index = obs.pop(OBS_NAMES).astype(str) if OBS_NAMES in obs else pd.Series(obs.index.astype(str))
    obs = obs.rename(columns=table.attrs.get("cellvim", {}).get("renamed", {}))
    for name in obs.columns:
        if not (pd.api.types.is_numeric_dtype(obs[name]) or pd.api.types.is_bool_dtype(obs[name])):
            values = obs[name].astype(object)
            obs[name] = pd.Categorical(values.where(values.isna(), values.astype(str)))
    obs.index = pd.Index(index.to_numpy(dtype=object))
    return anndata.AnnData(
        X=table[chosen].to_numpy(dtype=np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(chosen, dtype=object))
    )


def read_table(path: str | Path) -> AnnData:
    """Read profiles from a ``.parquet``, ``.csv`` or ``.tsv`` file (also ``.gz``), as `from_pycytominer`.

    Raises
    ------
    CellvimError
        It cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet" or is_parquet(path):
            table, uns = pd.read_parquet(path), _parquet_uns(path)
        else:
            uns = {}
            table = pd.read_csv(path, sep="\t" if ".tsv" in path.suffixes else ",", low_memory=False)
    except ImportError as error:
        raise InputError(f"Reading {path.name} needs pyarrow. Install it: pip install 'cellvim[tables]'") from error
    except (OSError, ValueError) as error:  # pandas' and pyarrow's errors of parsing are ValueErrors
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    adata = from_pycytominer(table)
    adata.uns.update(uns)
    return adata


def _parquet_uns(path: Path) -> dict[str, object]:
    """Return what ``cellvim embed --format parquet`` notes of the run in the file's own metadata."""
    import pyarrow.parquet

    found = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"cellvim") if path.is_file() else None
    return {} if found is None else {"cellvim": json.loads(found)}


def write_table(adata: AnnData, path: Path) -> None:
    """Write profiles as ``.parquet``, ``.csv`` or ``.tsv``: the representation that was made last."""
    latest = adata.uns.get("cellvim", {}).get("profile", {}).get("latest", "X")
    table = to_pycytominer(adata, use=str(latest))
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, sep="\t" if ".tsv" in path.suffixes else ",", index=False)


def _is_metadata(name: object) -> bool:
    return str(name).startswith(("Metadata_", "Image_Metadata_"))


def _features(table: pd.DataFrame) -> list[str]:
    numeric = [
        name
        for name in table.columns
        if pd.api.types.is_numeric_dtype(table[name]) and not pd.api.types.is_bool_dtype(table[name])
    ]
    known = [name for name in numeric if name.startswith(_COMPARTMENTS)]
    return known or [name for name in numeric if not _is_metadata(name) and name not in _NUMBERING]


def _width(adata: AnnData, use: str) -> np.dtype:
    values = adata.X if use == "X" else adata.layers[use] if use in adata.layers else adata.obsm[use]
    return values.dtype if np.issubdtype(values.dtype, np.floating) else np.dtype(np.float64)
