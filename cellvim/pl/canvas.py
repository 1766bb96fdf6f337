"""Shared by all plots: axes, labels without mathematical markup, and colours for colour-blind readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import InputError, MetadataError, listing

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

NEGATIVE, POSITIVE, TREATED = "#4477AA", "#EE6677", "#999999"
# Paul Tol's bright scheme; the first two as above
PALETTE = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
OTHER = "#DDDDDD"  # categories without a colour of their own


def new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """Return ``ax``, or the axes of a new figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError("Plots require matplotlib: pip install 'cellvim[analysis]'.") from error
    return plt.subplots(figsize=figsize, layout="constrained")[1]


def plain(text: object, limit: int = 40) -> str:
    """Return one line of limited length that matplotlib does not interpret as mathematics."""
    line = " ".join(str(text).split()).replace("$", r"\$")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def values_of(adata: AnnData, color: str) -> pd.Series:
    """Return a column of ``obs``, or a feature; raise if there is neither."""
    if color in adata.obs:
        return adata.obs[color]
    if color in adata.var_names:
        return pd.Series(np.asarray(adata.obs_vector(color)), index=adata.obs_names, name=color)
    raise MetadataError(
        f"'{color}' is neither a column of obs nor a feature; obs has {listing(adata.obs.columns, 30)}."
    )


def is_category(values: pd.Series) -> bool:
    """Return whether values are categories rather than numbers."""
    return not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values)


def category_colors(values: pd.Series) -> dict[str, object]:
    """Return a colour for each text, in descending order of frequency; `OTHER` for all but the 20 most frequent."""
    from matplotlib import colormaps

    names = list(values.value_counts().index)
    palette = list(PALETTE) if len(names) <= len(PALETTE) else [colormaps["tab20"](i) for i in range(20)]
    return {name: palette[i] if i < len(palette) else OTHER for i, name in enumerate(names)}
