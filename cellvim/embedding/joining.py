"""Embeddings of many plates in several files, opened as one: rows are read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellvim.anndata_io import found_format
from cellvim.errors import InputError, listing

if TYPE_CHECKING:
    from anndata import AnnData
    from anndata.experimental import AnnCollection


def open_embeddings(paths: str | Path | Sequence[str | Path]) -> AnnCollection:
    """Join embeddings lazily: their rows' descriptions are in memory, the embeddings stay on disk.

    Parameters
    ----------
    paths
        AnnData in Zarr or HDF5, or a folder of them, such as ``cellvim embed --per-plate`` makes.

    Returns
    -------
    anndata.experimental.AnnCollection
        ``collection[rows].to_adata()`` reads those rows; ``collection.obs`` describes all of them.

    Raises
    ------
    InputError
        There is nothing of the kind, or the files have other features.
    """
    from anndata.experimental import AnnCollection

    if isinstance(paths, str | Path):
        folder = Path(paths)
        suffixes = (".zarr", ".h5ad")
        if folder.is_dir() and folder.suffix not in suffixes and not found_format(folder):
            paths = sorted(p for p in folder.iterdir() if p.suffix in suffixes)
            if not paths:
                raise InputError(f"{folder} holds no embeddings; expected files such as plate.zarr or plate.h5ad.")
        else:
            paths = [folder]
    opened = [_open(Path(p)) for p in paths]
    widths = {a.n_vars for a in opened}
    if len(widths) > 1:
        raise InputError(f"These embeddings are {listing(sorted(widths))} wide; only those of one model can be joined.")
    return AnnCollection(opened, join_obs="outer", join_vars="inner", join_obsm="inner", harmonize_dtypes=False)


def _open(path: Path) -> AnnData:
    """Open one AnnData whose X stays on disk."""
    import anndata
    import zarr
    from anndata.io import read_elem

    try:
        if path.suffix == ".h5ad" or found_format(path) == "h5ad":
            return anndata.read_h5ad(path, backed="r")
        group = zarr.open_group(path, mode="r")
        obsm = {name: group["obsm"][name] for name in group["obsm"]} if "obsm" in group else {}
        return anndata.AnnData(
            X=group["X"],
            obs=read_elem(group["obs"]),
            var=read_elem(group["var"]),
            obsm={name: read_elem(values) for name, values in obsm.items() if name == "spatial"},
        )
    except (OSError, KeyError, ValueError, FileNotFoundError) as error:
        raise InputError(f"{path} cannot be opened as embeddings: {error}.") from error
