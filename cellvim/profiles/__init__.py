"""Profiles: embeddings aggregated to wells and normalised. AnnData in, AnnData out, without torch.

`profile` runs all steps. Each step is also a function of its own, which changes an AnnData in place, as in scanpy.
"""

from cellvim.anndata_io import from_pycytominer
from cellvim.anndata_io import read_anndata as read_profiles
from cellvim.profiles.aggregation import aggregate
from cellvim.profiles.columns import Columns, find_columns
from cellvim.profiles.conversion import to_pycytominer, to_spatialdata_table, write_profiles
from cellvim.profiles.harmonization import harmony
from cellvim.profiles.normalization import pca, robust_mad, select_features, standardize
from cellvim.profiles.pipeline import profile
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
