"""From embeddings to profiles: aggregate the cells of each well, then normalise. The job of ``cellvim profile``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.anndata_io import read_anndata, stored_files
from cellvim.errors import InputError, MetadataError, listing, suggestion
from cellvim.profiles.aggregation import Statistic, aggregate
from cellvim.profiles.columns import PLATE, WELL, Columns, find_columns
from cellvim.profiles.components import pca
from cellvim.profiles.files import check_profiles_output, write_profiles
from cellvim.profiles.harmonization import harmony
from cellvim.profiles.scaling import robust_mad, standardize
from cellvim.profiles.selection import select_features
from cellvim.profiles.sphering import spherize
from cellvim.profiles.typical_variation import tvn

if TYPE_CHECKING:
    from anndata import AnnData

NORMALIZATIONS = ("robustmad", "standardize", "spherize", "tvn", "pca", "harmony")
SCALED = ("robustmad", "standardized")  # layers that later steps start from, the first that there is


def profile(
    source: str | Path | AnnData | Sequence[str | Path | AnnData],
    output: str | Path | None = None,
    *,
    aggregate_by: Sequence[str] = (PLATE, WELL),
    statistic: Statistic | None = "mean",
    normalize: Sequence[str] = ("robustmad",),
    fit_on: str = "negcon",
    per: str | None = None,
    select: bool = False,
    min_cells: int = 1,
    control: str = "negcon",
    batch: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> AnnData:
    """Make profiles of embeddings.

    Parameters
    ----------
    source
        Embeddings, or several of them (one a plate): AnnData, paths of ``.zarr``, ``.h5ad`` or tables, or a folder of
        such files.
    output
        Where to write the profiles: ``.zarr``, ``.h5ad``, or a table.
    aggregate_by
        Columns of ``obs`` that say which rows belong together.
    statistic
        "mean", "median" or "robust", see `aggregate`; None if the rows are profiles already.
    normalize
        Methods in this order: "robustmad", "standardize", "spherize", "tvn", "pca", "harmony"; ``METHOD@WHAT`` names
        what to start from, such as "spherize@X". Without it robustmad, standardize and tvn start from X, spherize and
        pca from what robustmad or standardize made, if either did, and harmony from X_pca.
    fit_on
        Fit on negative controls ("negcon") or on "all" rows.
    per
        Fit for each "plate", "batch", column of ``obs``, or once for "all". Without it each method's own: plates for
        robustmad and standardize, all for spherize, batches for tvn and harmony.
    select
        Leave out features by `select_features`, on what the first of the methods that scale has made.
    min_cells
        Wells with fewer cells get no profile.
    control
        Value of the column of controls, or COLUMN:VALUE.
    batch
        Column of the batches; ``Metadata_Batch`` by default, or the plate.
    seed
        Of PCA and Harmony.
    overwrite
        Replace ``output`` when it exists.
    progress
        Takes the rows aggregated and their number.

    Returns
    -------
    AnnData
        Rows are wells. ``X`` (n, D) float32 as aggregated; ``layers["robustmad"]``, ``["standardized"]`` and
        ``["spherized"]``; ``obsm["X_tvn"]``, ``["X_pca"]`` and ``["X_harmony"]``; ``uns["cellvim"]["profile"]`` with
        what was fitted, and ``latest``, the name of what was made last.

    Raises
    ------
    CellvimError
        Something given cannot be used; the message says what, and what to do.
    """
    steps = [_step(text) for text in normalize]
    if output is not None:
        check_profiles_output(output, overwrite=overwrite)
    sources = [source] if isinstance(source, str | Path) or hasattr(source, "obs") else list(source)
    sources = [file for one in sources for file in (stored_files(one) if isinstance(one, str | Path) else [one])]
    if not sources:
        raise InputError("There is nothing to make profiles of: no embeddings were given.")
    parts = [_wells(one, aggregate_by, statistic, min_cells, progress) for one in sources]
    adata = parts[0] if len(parts) == 1 else _concatenate(parts, [_name(one) for one in sources], statistic)
    columns = find_columns(adata.obs, negative=control, batch=batch)
    for method, use in steps:
        adata = _normalize(adata, method, use, fit_on, per, columns, seed)
        if select and method in ("robustmad", "standardize"):
            adata = select_features(adata, use=str(adata.uns["cellvim"]["profile"]["latest"]))
            select = False
    if select:
        raise InputError("Features are selected after robustmad or standardize; put one of them into --normalize.")
    if output is not None:
        write_profiles(adata, output, overwrite=overwrite)
    return adata


def _step(text: str) -> tuple[str, str | None]:
    method, _, use = text.strip().partition("@")
    if method not in NORMALIZATIONS:
        raise InputError(
            f"There is no normalisation '{method}'; there are {listing(NORMALIZATIONS)}."
            + suggestion(method, NORMALIZATIONS)
        )
    return method, use or None


def _name(source: str | Path | AnnData) -> str:
    return str(source) if isinstance(source, str | Path) else "an AnnData"


def _wells(source, by, statistic: Statistic | None, min_cells: int, progress) -> AnnData:
    if statistic is not None:
        return aggregate(source, by=by, statistic=statistic, min_cells=min_cells, progress=progress)
    adata = read_anndata(source) if isinstance(source, str | Path) else source.copy()
    if adata.n_obs == 0:
        raise InputError(f"{_name(source)} has no rows, so there are no profiles in it.")
    return adata


def _concatenate(parts: list[AnnData], names: list[str], statistic: Statistic | None) -> AnnData:
    import anndata

    first = parts[0]
    for part, name in zip(parts[1:], names[1:], strict=True):
        if list(part.var_names) != list(first.var_names):
            raise InputError(
                f"{name} has {part.n_vars} features and {names[0]} {first.n_vars}, or they have other names; only "
                "embeddings of one model go together."
            )
        hashes = [p.uns.get("cellvim", {}).get("weights", {}).get("sha256") for p in (first, part)]
        if hashes[0] != hashes[1]:
            raise InputError(
                f"{name} and {names[0]} were embedded by different weights ({str(hashes[1])[:12]} and "
                f"{str(hashes[0])[:12]}); they cannot be compared. Embed all plates by one model."
            )
    if statistic is not None:
        rows = pd.concat([pd.Series(part.obs_names) for part in parts])
        if twice := sorted(set(rows[rows.duplicated()])):
            raise MetadataError(
                f"{len(twice)} wells are in more than one of the inputs: {listing(twice)}. Plates need names of their "
                "own; was one given twice?"
            )
    joined = anndata.concat(parts, join="outer", merge="first")
    joined.uns = first.uns
    if statistic is not None:
        records = [p.uns["cellvim"]["profile"]["aggregate"] for p in parts]
        joined.uns["cellvim"]["profile"]["aggregate"] |= {
            "rows": sum(int(r["rows"]) for r in records),
            "values_not_finite": sum(int(r["values_not_finite"]) for r in records),
            "wells_left_out": np.concatenate([r["wells_left_out"] for r in records]),
            "sources": np.array(names, dtype=object),
        }
    return joined


def _normalize(adata: AnnData, method: str, use: str | None, fit_on, per, columns: Columns, seed: int) -> AnnData:
    scaled = next((name for name in SCALED if name in adata.layers), "X")
    grouping = {} if per is None else {"per": per}
    fitting = {"fit_on": fit_on, "columns": columns} | grouping
    if method == "robustmad":
        robust_mad(adata, use=use or "X", **fitting)
    elif method == "standardize":
        standardize(adata, use=use or "X", **fitting)
    elif method == "spherize":
        spherize(adata, use=use or scaled, **fitting)
    elif method == "tvn":
        tvn(adata, use=use or "X", **fitting)
    elif method == "pca":
        pca(adata, use=use or scaled, seed=seed)
    else:
        if use is None and "X_pca" not in adata.obsm:
            pca(adata, use=scaled, seed=seed)
        harmony(adata, use=use or "X_pca", seed=seed, columns=columns, **grouping)
    return adata
