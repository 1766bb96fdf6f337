"""What every plot needs: axes to draw on, labels taken as they are, colours that color-blind readers tell apart."""

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
MAX_CATEGORIES = 20


def new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """Return ``ax``, or the axes of a new figure.

    Raises
    ------
    InputError
        matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError("Plots need matplotlib. Install it: pip install 'cellvim[analysis]'") from error
    return plt.subplots(figsize=figsize, layout="constrained")[1]


def plain(text: object, limit: int = 40) -> str:
    """Return text that matplotlib shows as it is: no mathematics between dollar signs, one line, not endless."""
    line = " ".join(str(text).split()).replace("$", r"\$")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def values_of(adata: AnnData, color: str) -> pd.Series:
    """Return a column of ``obs``, or a feature by its name.

    Raises
    ------
    MetadataError
        There is none of that name.
    """
    if color in adata.obs:
        return adata.obs[color]
    if color in adata.var_names:
        return pd.Series(np.asarray(adata.obs_vector(color)), index=adata.obs_names, name=color)
    raise MetadataError(f"'{color}' is no column of obs and no feature; obs has {listing(adata.obs.columns, 30)}.")


def is_category(values: pd.Series) -> bool:
    """Whether values are names rather than amounts."""
    return not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values)


def category_colors(values: pd.Series) -> dict[str, object]:
    """Return a colour for each category, most frequent first; beyond 20 the rest is one grey "other".

    ``values`` are texts.
    """
    from matplotlib import colormaps

    names = list(values.value_counts().index)
    palette = list(PALETTE) if len(names) <= len(PALETTE) else [colormaps["tab20"](i) for i in range(20)]
    return {name: palette[i] if i < len(palette) else "#DDDDDD" for i, name in enumerate(names)}
