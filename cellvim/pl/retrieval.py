"""Plots of the retrieval of perturbations, and of predicted mechanisms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import InputError
from cellvim.evaluate.features import finite_representation
from cellvim.evaluate.mechanism import nearest_mechanism
from cellvim.evaluate.retrieval import THRESHOLD, replicate_map
from cellvim.pl.canvas import POSITIVE, TREATED, new_axes, plain
from cellvim.profiles.columns import find_columns

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from cellvim.evaluate import Evaluation


def retrieval(
    adata: AnnData,
    *,
    use: str | None = None,
    label: int = 5,
    control: str = "negcon",
    evaluation: Evaluation | None = None,
    seed: int = 0,
    ax: Axes | None = None,
    **columns: str | None,
) -> Axes:
    """Plot the mean average precision of each treatment against its q value.

    Parameters
    ----------
    adata
        Profiles.
    use
        Representation; by default the latest.
    label
        Number of treatments to label, from the highest mean average precision.
    control
        Value of the control column for negative controls, or COLUMN:VALUE.
    evaluation
        Evaluation with the values; computed by default.
    seed
        Random seed for the p values.
    ax
        Axes to plot on; a new figure by default.
    **columns
        Names of the columns for ``perturbation``, ``dose`` and ``plate``.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    CellvimError
        There are no perturbations, replicates or controls.
    """
    features = finite_representation(adata, use)
    if evaluation is not None:
        table = evaluation.tables.get("retrieval", pd.DataFrame(columns=["features"]))
        table = table[table["features"] == features.name]
        if table.empty:
            raise InputError(f"The evaluation has no retrieval of '{features.name}'.")
    else:
        found = find_columns(adata.obs, negative=control, **columns)
        table = replicate_map(features, adata.obs, found, seed=seed)
    table = table.sort_values("mean_average_precision", ascending=False)
    axes = new_axes(ax, (4.6, 3.8))
    height = -np.log10(table["corrected_p_value"].astype(float))
    active = table["active"].astype(bool)
    axes.scatter(table["mean_average_precision"], height, s=18, c=np.where(active, POSITIVE, TREATED), lw=0, alpha=0.8)
    axes.axhline(-np.log10(THRESHOLD), color="0.6", lw=0.8, ls="--")
    about = table.columns[: list(table.columns).index("n_replicates")][:2]  # perturbation and dose
    names = [" ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row) for row in table[about].to_numpy()]
    for row in range(min(label, len(table))):
        x, y = table["mean_average_precision"].iloc[row], height.iloc[row]
        offset = (-4, -9 * (row + 1)) if x > 0.5 else (4, -9 * (row + 1))  # the best often coincide
        style = {"ha": "right" if x > 0.5 else "left", "fontsize": 6.5, "color": "0.25"}
        axes.annotate(plain(names[row], 28), (x, y), offset, textcoords="offset points", **style)
    axes.set(xlabel="mean average precision", ylabel="−log₁₀ q", xlim=(-0.03, 1.03))
    axes.set_title(f"{int(active.sum())} of {len(table)} treatments active (q < {THRESHOLD})", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def mechanisms(
    adata: AnnData, *, use: str | None = None, scheme: str = "nsc", ax: Axes | None = None, **columns: str | None
) -> Axes:
    """Plot the mechanism of the nearest other compound: rows are true, columns predicted mechanisms.

    Parameters
    ----------
    adata
        Profiles.
    use
        Representation; by default the latest.
    scheme
        "nsc" (not the same compound) or "nsb" (not the same compound or batch).
    ax
        Axes to plot on; a new figure by default.
    **columns
        Names of the columns for ``mechanism``, ``perturbation``, ``dose`` and ``batch``.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    CellvimError
        There are no mechanisms, or nothing can be predicted.
    """
    found = find_columns(adata.obs, **columns)
    table = nearest_mechanism(finite_representation(adata, use), adata.obs, found)
    if f"{scheme}_correct" not in table:
        raise InputError(f"The scheme '{scheme}' is not possible; expected nsc, or nsb if there are batches.")
    table = table.dropna(subset=[f"{scheme}_correct"])
    if table.empty:
        raise InputError(f"No treatment can be predicted with {scheme}.")
    counts = pd.crosstab(table[found.mechanism].astype(str), table[f"{scheme}_mechanism"].astype(str))
    names = sorted(set(counts.index) | set(counts.columns))
    counts = counts.reindex(index=names, columns=names, fill_value=0)
    axes = new_axes(ax, (0.32 * len(names) + 2.6, 0.32 * len(names) + 2.2))
    share = counts.div(counts.sum(axis=1).replace(0, 1), axis=0)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(counts.to_numpy()), strict=True):
        color = "white" if share.iat[i, j] > 0.5 else "0.2"
        axes.text(j, i, str(counts.iat[i, j]), ha="center", va="center", fontsize=7, color=color)
    labels = [plain(name, 26) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set(xlabel="mechanism of the nearest neighbour", ylabel="mechanism")
    accuracy = table[f"{scheme}_correct"].astype(bool).mean()
    axes.set_title(f"{scheme.upper()} accuracy {accuracy:.3f}, {len(table)} treatments", fontsize=9)
    return axes
