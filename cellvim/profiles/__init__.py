"""Profiles: embeddings aggregated to wells and normalised. AnnData in, AnnData out; never torch.

`profile` does all of it; each step is a function of its own, which changes an AnnData in place as scanpy's do.
"""

from cellvim.anndata_io import from_pycytominer
from cellvim.anndata_io import read_anndata as read_profiles
from cellvim.profiles.aggregation import aggregate
from cellvim.profiles.bridges import to_pycytominer
from cellvim.profiles.columns import Columns, find_columns
from cellvim.profiles.components import pca
from cellvim.profiles.files import write_profiles
from cellvim.profiles.harmonization import harmony
from cellvim.profiles.pipeline import profile
from cellvim.profiles.scaling import robust_mad, standardize
from cellvim.profiles.selection import select_features
from cellvim.profiles.spatialdata_table import to_spatialdata_table
from cellvim.profiles.sphering import spherize
from cellvim.profiles.typical_variation import tvn

__all__ = [
    "Columns",
    "aggregate",
    "find_columns",
    "from_pycytominer",
    "harmony",
    "pca",
    "profile",
    "read_profiles",
    "robust_mad",
    "select_features",
    "spherize",
    "standardize",
    "to_pycytominer",
    "to_spatialdata_table",
    "tvn",
    "write_profiles",
]
