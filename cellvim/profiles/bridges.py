"""Between AnnData and the table that pycytominer works on.

pycytominer's own conversion (1.7.1) turns names of rows into integers and metadata that are numbers into features, so
this goes through a table of ours: metadata columns begin with ``Metadata_``, all others are features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.anndata_io import OBS_NAMES, is_metadata
from cellvim.errors import MetadataError, listing
from cellvim.profiles.columns import matrix
from cellvim.profiles.fitting import feature_names

if TYPE_CHECKING:
    from anndata import AnnData


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
        One row per row of ``adata``: the columns of ``obs``, with ``Metadata_`` before names that lack it; the names of
        the rows, as ``Metadata_obs_names``; and the features. `cellvim.from_pycytominer` converts it back.

    Raises
    ------
    MetadataError
        Two columns would have one name.
    """
    renamed = {str(name): str(name) if is_metadata(name) else f"Metadata_{name}" for name in adata.obs.columns}
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


def write_table(adata: AnnData, path: Path) -> None:
    """Write profiles as ``.parquet``, ``.csv`` or ``.tsv``: the representation that was made last."""
    latest = adata.uns.get("cellvim", {}).get("profile", {}).get("latest", "X")
    table = to_pycytominer(adata, use=str(latest))
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, sep="\t" if ".tsv" in path.suffixes else ",", index=False)


def _width(adata: AnnData, use: str) -> np.dtype:
    values = adata.X if use == "X" else adata.layers[use] if use in adata.layers else adata.obsm[use]
    return values.dtype if np.issubdtype(values.dtype, np.floating) else np.dtype(np.float64)
