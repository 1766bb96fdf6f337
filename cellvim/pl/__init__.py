"""Plots: functions that take an AnnData and return matplotlib axes, as in scanpy.

>>> import cellvim
>>> axes = cellvim.pl.plate_map(profiles, "Metadata_Object_Count")  # doctest: +SKIP
"""

from cellvim.pl.assay import controls, dose_response
from cellvim.pl.maps import crops, plate_map, umap
from cellvim.pl.retrieval import mechanisms, retrieval

__all__ = ["controls", "crops", "dose_response", "mechanisms", "plate_map", "retrieval", "umap"]
