"""Plots: functions take an AnnData and return matplotlib axes, as scanpy's do.

>>> import cellvim
>>> axes = cellvim.pl.plate_map(profiles, "Metadata_Object_Count")  # doctest: +SKIP
"""

from cellvim.pl.assay import controls, dose_response
from cellvim.pl.cells import crops, umap
from cellvim.pl.plates import plate_map
from cellvim.pl.retrieval import mechanisms, retrieval

__all__ = ["controls", "crops", "dose_response", "mechanisms", "plate_map", "retrieval", "umap"]
