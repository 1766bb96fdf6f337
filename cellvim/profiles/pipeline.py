"""``cellvim profile``: aggregate the cells of each well, then normalise the profiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.anndata_io import read_anndata, stored_files
from cellvim.errors import InputError, MetadataError, check_seed, listing, suggestion
from cellvim.profiles.aggregation import Statistic, aggregate
from cellvim.profiles.columns import PLATE, WELL, Columns, find_columns
from cellvim.profiles.conversion import check_profiles_output, write_profiles
from cellvim.profiles.harmonization import harmony
from cellvim.profiles.normalization import pca, robust_mad, select_features, standardize
from cellvim.profiles.sphering import spherize
from cellvim.profiles.typical_variation import tvn

if TYPE_CHECKING:
    from anndata import AnnData

NORMALIZATIONS = ("robustmad", "standardize", "spherize", "tvn", "pca", "harmony")
SCALED = ("robustmad", "standardized")  # layers that later steps use, if they exist, in this order


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
    """Compute profiles from embeddings.

    Parameters
    ----------
    source
        Embeddings, or several (one per plate): AnnData, paths of ``.zarr``, ``.h5ad`` or tables, or folders of these.
    output
        Output file: ``.zarr``, ``.h5ad``, or a table.
    aggregate_by
        Columns of ``obs``; rows with equal values are aggregated.
    statistic
        "mean", "median" or "robust", see `aggregate`; None if the rows are profiles already.
    normalize
        Methods, in order: "robustmad", "standardize", "spherize", "tvn", "pca", "harmony". ``METHOD@REPRESENTATION``
        names the input, such as "spherize@X". By default, robustmad, standardize and tvn use X, spherize and pca the
        result of robustmad or standardize if it exists, and harmony X_pca.
    fit_on
        Fit on negative controls ("negcon") or on "all" rows.
    per
        Fit per "plate", "batch" or column of ``obs``, or once for "all". By default, plate for robustmad and
        standardize, all for spherize, batch for tvn and harmony.
    select
        Select features with `select_features`, based on the result of robustmad or standardize.
    min_cells
        Minimum number of cells; wells with fewer are omitted.
    control
        Value of the control column for negative controls, or COLUMN:VALUE.
    batch
        Column of batches; by default ``Metadata_Batch``, or the plate.
    seed
        Random seed for PCA and Harmony.
    overwrite
        Replace ``output`` if it exists.
    progress
        Called with the number of aggregated rows and the total.

    Returns
    -------
    AnnData
        One row per well. ``X`` (n, D) float32 as aggregated; ``layers["robustmad"]``, ``["standardized"]`` and
        ``["spherized"]``; ``obsm["X_tvn"]``, ``["X_pca"]`` and ``["X_harmony"]``; ``uns["cellvim"]["profile"]`` with
        the fitted parameters, and ``latest``, the name of the last result.

    Raises
    ------
    CellvimError
        An input or option is not valid.
    """
    check_seed(seed)
    steps = []
    for step in normalize:
        method, _, use = step.strip().partition("@")
        if method not in NORMALIZATIONS:
            known = f"{listing(NORMALIZATIONS)}.{suggestion(method, NORMALIZATIONS)}"
            raise InputError(f"There is no normalisation '{method}'; expected {known}")
        steps.append((method, use or None))
    if output is not None:
        check_profiles_output(output, overwrite=overwrite)
    given = [source] if isinstance(source, str | Path) or hasattr(source, "obs") else list(source)
    sources: list[Path | AnnData] = []
    for one in given:
        sources += stored_files(one) if isinstance(one, str | Path) else [one]
    if not sources:
        raise InputError("There are no embeddings to profile.")
    if statistic is None:
        parts = [read_anndata(one) if isinstance(one, Path) else one.copy() for one in sources]
    else:
        options = {"by": aggregate_by, "statistic": statistic, "min_cells": min_cells, "progress": progress}
        parts = [aggregate(one, **options) for one in sources]
    names = [str(one) if isinstance(one, Path) else "an AnnData" for one in sources]
    if empty := [name for name, part in zip(names, parts, strict=True) if part.n_obs == 0]:
        raise InputError(f"{empty[0]} has no rows, so it contains no profiles.")
    adata = parts[0] if len(parts) == 1 else _concatenate(parts, names, statistic)
    columns = find_columns(adata.obs, negative=control, batch=batch)
    for method, use in steps:
        _normalize(adata, method, use, fit_on, per, columns, seed)
        if select and method in ("robustmad", "standardize"):
            adata = select_features(adata, use=str(adata.uns["cellvim"]["profile"]["latest"]))
            select = False
    if select:
        raise InputError("Features are selected after robustmad or standardize; add one of them to --normalize.")
    if output is not None:
        write_profiles(adata, output, overwrite=overwrite)
    return adata


def _concatenate(parts: list[AnnData], names: list[str], statistic: Statistic | None) -> AnnData:
    import anndata

    first = parts[0]
    for part, name in zip(parts[1:], names[1:], strict=True):
        if list(part.var_names) != list(first.var_names):
            raise InputError(
                f"{name} has {part.n_vars} features and {names[0]} {first.n_vars}, or their names differ; only "
                "embeddings of the same model can be combined."
            )
        hashes = [p.uns.get("cellvim", {}).get("weights", {}).get("sha256") for p in (first, part)]
        if hashes[0] != hashes[1]:
            raise InputError(
                f"{name} and {names[0]} were embedded by different weights ({str(hashes[1])[:12]} and "
                f"{str(hashes[0])[:12]}); they cannot be compared. Embed all plates with the same model."
            )
    if statistic is not None:
        rows = pd.concat([pd.Series(part.obs_names) for part in parts])
        if repeated := sorted(set(rows[rows.duplicated()])):
            raise MetadataError(
                f"{len(repeated)} wells are in more than one input: {listing(repeated)}. Plates need different names; "
                "was a plate given twice?"
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


def _normalize(
    adata: AnnData, method: str, use: str | None, fit_on: str, per: str | None, columns: Columns, seed: int
) -> None:
    scaled = next((name for name in SCALED if name in adata.layers), "X")
    grouping = {} if per is None else {"per": per}
    fitting = {"fit_on": fit_on, "columns": columns} | grouping
    if method == "pca":
        pca(adata, use=use or scaled, seed=seed)
    elif method == "harmony":
        if use is None and "X_pca" not in adata.obsm:
            pca(adata, use=scaled, seed=seed)
        harmony(adata, use=use or "X_pca", seed=seed, columns=columns, **grouping)
    elif method == "spherize":
        spherize(adata, use=use or scaled, **fitting)
    else:
        {"robustmad": robust_mad, "standardize": standardize, "tvn": tvn}[method](adata, use=use or "X", **fitting)
