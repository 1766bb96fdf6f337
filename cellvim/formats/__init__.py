"""Files that embeddings are written to: AnnData in Zarr or HDF5, Parquet, and maps of tokens."""
