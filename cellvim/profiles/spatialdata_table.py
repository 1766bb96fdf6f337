"""The attributes by which SpatialData knows which image and which object a row is about."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pandas as pd

from cellvim.errors import MetadataError, listing
from cellvim.profiles.columns import keys, require

if TYPE_CHECKING:
    from anndata import AnnData

FIELD = ("Metadata_Plate", "Metadata_Well", "Metadata_Site")
REGION, INSTANCE = "region", "Metadata_ObjectNumber"


def to_spatialdata_table(adata: AnnData) -> AnnData:
    """Make a table that ``spatialdata.models.TableModel`` takes, as it is.

    A region is a field; name the image or the labels of that field likewise in the SpatialData object, and the labels'
    numbers are the objects'.

    Parameters
    ----------
    adata
        Embeddings of cells, as `cellvim.embed` makes them.

    Returns
    -------
    AnnData
        A copy with

        ``obs["region"]``
            ``plate_well_site`` of each row, categorical, as ``cellvim embed --spatialdata`` names it. What
            SpatialData does not allow in a name is replaced by _.
        ``uns["spatialdata_attrs"]``
            ``region`` (all of these), ``region_key`` ("region"), ``instance_key`` ("Metadata_ObjectNumber").

    Raises
    ------
    MetadataError
        A column is not there, or two fields would have one name.
    """
    for name in (*FIELD, INSTANCE):
        require(adata.obs, name, option="another AnnData: cellvim embed writes it")
    field = keys(adata.obs, FIELD, "_")
    if field.isna().any():
        raise MetadataError(f"{int(field.isna().sum()):,} rows have no plate, well or site; expected all three.")
    names = {name: re.sub(r"[^A-Za-z0-9_.-]", "_", name) for name in field.unique()}
    if len(set(names.values())) < len(names):
        twice = [name for name, plain in names.items() if list(names.values()).count(plain) > 1]
        raise MetadataError(f"These fields would have one name in SpatialData: {listing(twice)}. Rename the plates.")
    table = adata.copy()
    table.obs[REGION] = pd.Categorical(field.map(names))
    regions = list(table.obs[REGION].cat.categories)
    table.uns["spatialdata_attrs"] = {"region": regions, "region_key": REGION, "instance_key": INSTANCE}
    return table
