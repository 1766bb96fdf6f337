"""Plate maps: a value for each well, where it lies on the plate."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.errors import MetadataError, listing
from cellvim.pl.canvas import category_colors, is_category, new_axes, plain, values_of
from cellvim.profiles.columns import find_columns, role, text

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

FORMATS = ((8, 12), (16, 24), (32, 48))  # 96, 384 and 1536 wells


def plate_map(
    adata: AnnData,
    color: str,
    *,
    plate: str | None = None,
    cmap: str = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a plate with each well in the colour of a value.

    Parameters
    ----------
    adata
        Profiles or cells; of several rows of a well the mean is shown, or, of names, the most frequent.
    color
        A column of ``obs``, or a feature.
    plate
        Which plate; needed only if there are several.
    cmap, vmin, vmax
        Colours of numbers.
    ax
        Axes to draw on; a new figure without.

    Returns
    -------
    matplotlib.axes.Axes
        Wells without a row are left white, wells whose value is missing are crossed out.

    Raises
    ------
    CellvimError
        The column or the plate is not there.
    """
    from matplotlib.patches import Patch

    columns = find_columns(adata.obs)
    table = pd.DataFrame({"well": text(adata.obs[role(columns, "well", adata.obs)]), "value": values_of(adata, color)})
    if columns.plate is not None:
        plates = text(adata.obs[columns.plate])
        names = list(plates.dropna().unique())
        if plate is None and len(names) > 1:
            raise MetadataError(f"There are {len(names)} plates; choose one with plate=: {listing(names)}.")
        if plate is not None and plate not in names:
            raise MetadataError(f"There is no plate '{plate}'; there are {listing(names)}.")
        plate = plate if plate is not None else names[0] if names else ""
        table = table[(plates == plate).to_numpy()]
    positions = [_position(well) for well in table["well"]]
    if bad := [str(w) for w, p in zip(table["well"], positions, strict=True) if p is None]:
        raise MetadataError(f"These are no names of wells: {listing(dict.fromkeys(bad))}; expected such as A01.")
    table["row"], table["column"] = np.array(positions, dtype=int).reshape(-1, 2).T
    height, width = next(
        (f for f in FORMATS if table["row"].max() < f[0] and table["column"].max() < f[1]),
        (table["row"].max() + 1, table["column"].max() + 1),
    )
    axes = new_axes(
        ax, (0.35 * width + 1.8, 0.35 * height + 0.8) if width <= 12 else (0.22 * width + 2, 0.22 * height + 1)
    )
    wells = table.groupby(["row", "column"])["value"]
    if is_category(table["value"]):
        values = wells.agg(lambda v: v.dropna().astype(str).mode().iloc[0] if v.notna().any() else None)
        colors = category_colors(values.dropna())
        number = {name: i for i, name in enumerate(colors)}
        grid = _grid(values.map(number, na_action="ignore"), height, width)
        picture = np.ones((height, width, 4))
        for name, i in number.items():
            picture[grid == i] = _rgba(colors[name])
        axes.imshow(picture, aspect="equal")
        shown = list(colors)[:20]
        handles = [Patch(color=colors[name], label=plain(name, 24)) for name in shown]
        handles += [Patch(color="#DDDDDD", label=f"{len(colors) - 20} more")] if len(colors) > 20 else []
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=7, frameon=False)
    else:
        values = wells.mean()
        image = axes.imshow(
            np.ma.masked_invalid(_grid(values, height, width)), cmap=cmap, vmin=vmin, vmax=vmax, aspect="equal"
        )
        axes.figure.colorbar(image, ax=axes, label=plain(color), shrink=0.8)
    missing = values.index[values.isna()]
    if len(missing):
        rows, positions = missing.get_level_values(0), missing.get_level_values(1)
        axes.plot(positions, rows, "x", color="0.5", ms=5, mew=1)
    _decorate(axes, height, width)
    axes.set_title(plain(f"{color} · {plate}" if plate else color, 60), fontsize=10)
    return axes


def _grid(values: pd.Series, height: int, width: int) -> np.ndarray:
    grid = np.full((height, width), np.nan)
    grid[values.index.get_level_values(0), values.index.get_level_values(1)] = values.to_numpy(float)
    return grid


def _decorate(axes: Axes, height: int, width: int) -> None:
    step = 1 if width <= 24 else 2
    axes.set_xticks(range(0, width, step), [str(c + 1) for c in range(0, width, step)], fontsize=7)
    axes.set_yticks(range(0, height, step), [_row_name(r) for r in range(0, height, step)], fontsize=7)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks(np.arange(-0.5, width), minor=True)
    axes.set_yticks(np.arange(-0.5, height), minor=True)
    axes.grid(which="minor", color="0.85", lw=0.5)
    axes.tick_params(which="minor", length=0)


def _position(well: object) -> tuple[int, int] | None:
    """Return (row, column) from 0 of a well such as A01 or AF48."""
    found = re.fullmatch(r"([A-Za-z]{1,2})0*(\d{1,2})", str(well).strip())
    if found is None or int(found[2]) == 0:
        return None
    row = 0
    for letter in found[1].upper():
        row = 26 * row + ord(letter) - ord("A") + 1
    return row - 1, int(found[2]) - 1


def _row_name(row: int) -> str:
    return chr(ord("A") + row) if row < 26 else "A" + chr(ord("A") + row - 26)


def _rgba(color: object) -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgba

    return to_rgba(color)
