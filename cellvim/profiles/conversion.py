"""Convert profiles to tables for pycytominer and SpatialData, and write them to files.

pycytominer's own conversion (1.7.1) turns row names into integers and numeric metadata into features. Here the columns
of metadata begin with ``Metadata_``, and all other columns are features; `cellvim.from_pycytominer` is the inverse.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.anndata_io import OBS_NAMES, check_output, is_metadata, suffix_of
from cellvim.errors import MetadataError, OutputError, listing
from cellvim.files import atomic_path
from cellvim.profiles.columns import PLATE, WELL, keys, require
from cellvim.profiles.representations import feature_names, matrix

if TYPE_CHECKING:
    from anndata import AnnData

REGION, INSTANCE = "region", "Metadata_ObjectNumber"


def to_pycytominer(adata: AnnData, *, use: str = "X") -> pd.DataFrame:
    """Convert to a table of metadata and features, as used by pycytominer and copairs.

    pycytominer recognises features by the names of CellProfiler's compartments, so pass the names:
    ``pycytominer.normalize(table, features=list(adata.var_names), …)``.

    Parameters
    ----------
    adata
        Profiles or embeddings.
    use
        Representation: "X", a layer such as "robustmad", or an entry of ``obsm``.

    Returns
    -------
    pandas.DataFrame
        One row per row of ``adata``: the columns of ``obs``, with ``Metadata_`` before names that lack it; the names of
        the rows, as ``Metadata_obs_names``; and the features. `cellvim.from_pycytominer` converts it back.

    Raises
    ------
    MetadataError
        Two columns would have the same name.
    """
    renamed = {str(name): str(name) if is_metadata(name) else f"Metadata_{name}" for name in adata.obs.columns}
    values = matrix(adata, use, dtype=None)
    features = [str(name) for name in feature_names(adata, use)]
    names = [*renamed.values(), OBS_NAMES, *features]
    if len(set(names)) < len(names):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise MetadataError(f"The table would have two columns {listing(duplicates)}. Rename them in obs or var.")
    metadata = adata.obs.rename(columns=renamed).reset_index(drop=True)
    metadata[OBS_NAMES] = adata.obs_names.to_numpy(dtype=object)
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    table = pd.concat([metadata, pd.DataFrame(values, columns=features)], axis=1)
    table.attrs["cellvim"] = {"renamed": {new: old for old, new in renamed.items() if old != new}}
    return table


def to_spatialdata_table(adata: AnnData) -> AnnData:
    """Convert to a table for ``spatialdata.models.TableModel``.

    A region is a field. Give the image or labels of a field the name of its region in the SpatialData object; the label
    values are the object numbers.

    Parameters
    ----------
    adata
        Embeddings of cells, as returned by `cellvim.embed`.

    Returns
    -------
    AnnData
        A copy with

        ``obs["region"]``
            ``plate_well_site`` of each row, categorical, as written by ``cellvim embed --spatialdata``. Characters that
            SpatialData does not allow in a name are replaced by _.
        ``uns["spatialdata_attrs"]``
            ``region`` (all regions), ``region_key`` ("region"), ``instance_key`` ("Metadata_ObjectNumber").

    Raises
    ------
    MetadataError
        A column does not exist, or two fields would have the same name.
    """
    columns = (PLATE, WELL, "Metadata_Site")
    for name in (*columns, INSTANCE):
        require(adata.obs, name, option="another AnnData, as written by cellvim embed")
    field = keys(adata.obs, columns, "_")
    if field.isna().any():
        raise MetadataError(f"{int(field.isna().sum()):,} rows have no plate, well or site; expected all three.")
    names = {name: re.sub(r"[^A-Za-z0-9_.-]", "_", name) for name in field.unique()}
    if len(set(names.values())) < len(names):
        same = [name for name, plain in names.items() if list(names.values()).count(plain) > 1]
        raise MetadataError(
            f"These fields would have the same name in SpatialData: {listing(same)}. Rename the plates."
        )
    table = adata.copy()
    table.obs[REGION] = pd.Categorical(field.map(names))
    regions = list(table.obs[REGION].cat.categories)
    table.uns["spatialdata_attrs"] = {"region": regions, "region_key": REGION, "instance_key": INSTANCE}
    return table


def check_profiles_output(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise if profiles cannot be written to a path: it exists and is not overwritten, or its folder is missing."""
    path = Path(path)
    if suffix_of(path) == ".zarr":
        check_output(path, overwrite=overwrite)
    elif path.is_dir():
        raise OutputError(f"{path} is a folder, so it is not replaced. Choose another --output.")
    elif path.exists() and not overwrite:
        raise OutputError(f"{path} exists already. Choose another --output, or replace it with --overwrite.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"The folder {path.absolute().parent} for the output does not exist.")


def write_profiles(adata: AnnData, path: str | Path, *, overwrite: bool = False) -> None:
    """Write profiles atomically: to ``.zarr`` or ``.h5ad``, or the latest representation to a table.

    Parameters
    ----------
    adata
        Profiles.
    path
        Output: ``.zarr``, ``.h5ad``, ``.parquet``, ``.csv`` or ``.tsv``.
    overwrite
        Replace an existing output.

    Raises
    ------
    OutputError
        The file exists and ``overwrite`` is off, or it cannot be written.
    """
    import anndata

    path = Path(path)
    check_profiles_output(path, overwrite=overwrite)
    suffix = suffix_of(path)
    with atomic_path(path) as partial:
        if suffix == ".zarr":
            with warnings.catch_warnings():
                # Zarr 2, which all current readers of AnnData support; anndata warns that its default will change
                warnings.filterwarnings("ignore", "Writing zarr v2", UserWarning)
                with anndata.settings.override(zarr_write_format=2):
                    adata.write_zarr(partial)
        elif suffix == ".h5ad":
            adata.write_h5ad(partial)
        else:
            latest = str(adata.uns.get("cellvim", {}).get("profile", {}).get("latest", "X"))
            table = to_pycytominer(adata, use=latest)
            if suffix == ".parquet":
                table.to_parquet(partial, index=False)
            else:
                table.to_csv(partial, sep="\t" if ".tsv" in suffix else ",", index=False)
