"""Maps of plates, maps of embeddings, and crops of cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.channels import COLORS, canonical_name
from cellvim.data.wells import well_name, well_position
from cellvim.errors import InputError, MetadataError, listing
from cellvim.pl.canvas import OTHER, category_colors, is_category, new_axes, plain, values_of
from cellvim.profiles.columns import column_of, find_columns, text

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from cellvim.data.plate import Plate

PLATE_FORMATS = ((8, 12), (16, 24), (32, 48))  # rows and columns of plates with 96, 384 and 1536 wells
MAX_POINTS = 100_000
MAX_NAMES = 20  # in a legend


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
    """Plot a value of each well at its position on the plate.

    Parameters
    ----------
    adata
        Profiles or cells. For wells with several rows, numbers are averaged and the most frequent category is shown.
    color
        Column of ``obs``, or feature.
    plate
        Name of the plate; required if there are several.
    cmap, vmin, vmax
        Colour map and its range, for numbers.
    ax
        Axes to plot on; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        Wells without a row are white, wells with a missing value are crossed out.

    Raises
    ------
    CellvimError
        The column or the plate does not exist.
    """
    columns = find_columns(adata.obs)
    table = pd.DataFrame(
        {"well": text(adata.obs[column_of(columns, "well", adata.obs)]), "value": values_of(adata, color)}
    )
    if columns.plate is not None:
        plates = text(adata.obs[columns.plate])
        names = list(plates.dropna().unique())
        if plate is None and len(names) > 1:
            raise MetadataError(f"There are {len(names)} plates; choose one of {listing(names)} with plate=.")
        if plate is not None and plate not in names:
            raise MetadataError(f"There is no plate '{plate}'; expected one of {listing(names)}.")
        plate = plate if plate is not None else names[0] if names else ""
        table = table[(plates == plate).to_numpy()]
    table["row"], table["column"] = np.array([well_position(well) for well in table["well"]], int).reshape(-1, 2).T
    height, width = next(
        (f for f in PLATE_FORMATS if table["row"].max() < f[0] and table["column"].max() < f[1]),
        (table["row"].max() + 1, table["column"].max() + 1),
    )
    axes = new_axes(
        ax, (0.35 * width + 1.8, 0.35 * height + 0.8) if width <= 12 else (0.22 * width + 2, 0.22 * height + 1)
    )
    wells = table.groupby(["row", "column"])["value"]
    if is_category(table["value"]):
        from matplotlib.colors import to_rgba
        from matplotlib.patches import Patch

        values = wells.agg(lambda v: v.dropna().astype(str).mode().iloc[0] if v.notna().any() else None)
        colors = category_colors(values.dropna())
        number = {name: i for i, name in enumerate(colors)}
        grid = _grid(values.map(number, na_action="ignore"), height, width)
        picture = np.ones((height, width, 4))
        for name, i in number.items():
            picture[grid == i] = to_rgba(colors[name])
        axes.imshow(picture, aspect="equal")
        handles = [Patch(color=color, label=label) for label, color in _legend(colors).items()]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=7, frameon=False)
    else:
        values = wells.mean()
        grid = np.ma.masked_invalid(_grid(values, height, width))
        image = axes.imshow(grid, cmap=cmap, vmin=vmin, vmax=vmax, aspect="equal")
        axes.figure.colorbar(image, ax=axes, label=plain(color), shrink=0.8)
    missing = values.index[values.isna()]
    if len(missing):
        rows, positions = missing.get_level_values(0), missing.get_level_values(1)
        axes.plot(positions, rows, "x", color="0.5", ms=5, mew=1)
    step = 1 if width <= 24 else 2
    axes.set_xticks(range(0, width, step), [str(c + 1) for c in range(0, width, step)], fontsize=7)
    axes.set_yticks(range(0, height, step), [well_name(r, 0)[:-2] for r in range(0, height, step)], fontsize=7)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks(np.arange(-0.5, width), minor=True)
    axes.set_yticks(np.arange(-0.5, height), minor=True)
    axes.grid(which="minor", color="0.85", lw=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_title(plain(f"{color} · {plate}" if plate else color, 60), fontsize=10)
    return axes


def _grid(values: pd.Series, height: int, width: int) -> np.ndarray:
    grid = np.full((height, width), np.nan)
    grid[values.index.get_level_values(0), values.index.get_level_values(1)] = values.to_numpy(float)
    return grid


def _legend(colors: dict[str, Any]) -> dict[str, Any]:
    """Return the labels and colours of a legend."""
    shown = {plain(name, 24): colors[name] for name in list(colors)[:MAX_NAMES]}
    return shown | ({f"{len(colors) - MAX_NAMES} more": OTHER} if len(colors) > MAX_NAMES else {})


def umap(
    adata: AnnData,
    color: str | None = None,
    *,
    basis: str = "X_umap",
    size: float | None = None,
    cmap: str = "viridis",
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot the rows at coordinates in ``obsm``, in random order so that no group covers the others.

    Parameters
    ----------
    adata
        Cells or profiles with coordinates, such as those computed by ``scanpy.tl.umap``.
    color
        Column of ``obs``, or feature.
    basis
        Entry of ``obsm``; its first two columns are plotted.
    size
        Marker size; by default chosen from the number of rows.
    cmap
        Colour map for numbers.
    seed
        Random seed for the order, and for sampling more than 100,000 rows; the title contains the number of rows.
    ax
        Axes to plot on; a new figure by default.

    Raises
    ------
    CellvimError
        The coordinates or the column do not exist.
    """
    if basis not in adata.obsm:
        raise InputError(
            f"There is no '{basis}' in obsm, which has {listing(adata.obsm)}. Compute it with scanpy.pp.neighbors and "
            "scanpy.tl.umap."
        )
    points = np.asarray(adata.obsm[basis])[:, :2]
    order = np.random.default_rng(seed).permutation(len(points))[:MAX_POINTS]
    axes = new_axes(ax, (5, 4))
    style = {"s": size or float(np.clip(20_000 / len(points), 1, 40)), "lw": 0, "rasterized": True}
    x, y = points[order].T
    if color is None:
        axes.scatter(x, y, color="0.4", **style)
    elif is_category(values := values_of(adata, color)):
        names = text(values)
        colors = category_colors(names.dropna())
        axes.scatter(x, y, c=[colors.get(name, "#EEEEEE") for name in names.to_numpy()[order]], **style)
        for label, one in _legend(colors).items():
            axes.scatter([], [], color=one, s=20, label=label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)
    else:
        dots = axes.scatter(x, y, c=values.to_numpy(float)[order], cmap=cmap, **style)
        axes.figure.colorbar(dots, ax=axes, label=plain(color))
    axes.set(xticks=[], yticks=[], xlabel=f"{basis.removeprefix('X_')} 1", ylabel=f"{basis.removeprefix('X_')} 2")
    shown = f" ({MAX_POINTS:,} of {len(points):,})" if len(points) > MAX_POINTS else ""
    axes.set_title(plain(color or "", 40) + shown, fontsize=10)
    return axes


def crops(
    adata: AnnData,
    plate: str | Path | Plate,
    *,
    rows: Sequence[str] | None = None,
    n: int = 6,
    channels: Sequence[str] | None = None,
    title: str | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Plot cells as the model receives them: one row per cell, one column per channel, and a composite.

    Parameters
    ----------
    adata
        Embeddings of cells or tiles, as returned by `cellvim.embed`.
    plate
        The OME-Zarr plate of the embeddings.
    rows
        Names of the rows to plot; a random sample by default.
    n
        Size of the sample.
    channels
        Names of channels; by default all embedded channels.
    title
        Column of ``obs`` for the label of each cell.
    seed
        Random seed of the sample.

    Returns
    -------
    numpy.ndarray
        (n, channels + 1) of matplotlib.axes.Axes; the last column is the composite in colour.

    Raises
    ------
    CellvimError
        The AnnData does not describe its crops, or the plate does not have a field.
    """
    if adata.n_obs == 0:
        raise InputError("There are no cells to plot: the AnnData has no rows.")
    if rows is None:
        chosen = np.sort(np.random.default_rng(seed).choice(adata.n_obs, min(n, adata.n_obs), replace=False))
    else:
        chosen = adata.obs_names.get_indexer(list(rows))
        if lost := [str(row) for row, position in zip(rows, chosen, strict=True) if position < 0]:
            raise MetadataError(f"There are no rows {listing(lost)}; expected names such as {adata.obs_names[0]}.")
    if title is not None:
        values_of(adata, title)
    pictures, names = _cut(adata, plate, chosen, channels)
    import matplotlib.pyplot as plt

    columns = len(names) + 1
    size = 1.25 * columns + 0.8, 1.25 * len(chosen) + 0.3
    _, axes = plt.subplots(len(chosen), columns, figsize=size, squeeze=False, layout="constrained")
    for i, position in enumerate(chosen):
        for j, name in enumerate(names):
            axes[i, j].imshow(pictures[i, j], cmap="gray", vmin=0, vmax=1)
            if i == 0:
                axes[i, j].set_title(plain(name, 16), fontsize=8)
        axes[i, -1].imshow(_composite(pictures[i], names))
        about = adata.obs_names[position] if title is None else adata.obs[title].iloc[position]
        axes[i, 0].set_ylabel(plain(about, 18), fontsize=7)
    axes[0, -1].set_title("together", fontsize=8)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
    return axes


def _cut(
    adata: AnnData, plate: str | Path | Plate, chosen: np.ndarray, channels: Sequence[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Return (n, C, S, S) from 0 to 1, and the channels' names."""
    from cellvim.data.crops import cut_crops, place_windows
    from cellvim.data.intensity import IntensityScale
    from cellvim.data.plate import open_plate

    plate = open_plate(plate) if isinstance(plate, str | Path) else plate
    try:
        preprocessing = adata.uns["cellvim"]["preprocessing"]
        scale = IntensityScale.from_dict(preprocessing["intensity"])
        size = int(preprocessing["crop"]["size_px"])
        in_um = str(adata.uns["cellvim"].get("spatial_unit", "pixel")) != "pixel"
        spatial = np.asarray(adata.obsm["spatial"])[chosen]
        where = adata.obs.iloc[chosen][["Metadata_Well", "Metadata_Site"]].astype(str).to_numpy()
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "The AnnData does not describe the positions and sizes of its crops; expected embeddings of cells or tiles "
            f"from cellvim embed ({error})."
        ) from error
    if channels is not None and (lost := [c for c in channels if c not in scale.channel_names]):
        raise InputError(f"Channel {listing(lost)} was not embedded; there are {listing(scale.channel_names)}.")
    shown = [i for i, c in enumerate(scale.channel_names) if channels is None or c in channels]
    fields = {(str(f.well), str(f.site)): f for f in plate.fields}
    pictures = []
    images: dict[tuple[str, str], np.ndarray] = {}
    for (well, site), (x, y) in zip(where, spatial, strict=True):
        field = fields.get((well, site))
        if field is None:
            raise InputError(f"The plate has no field {site} of well {well}; is it the embedded plate?")
        if (well, site) not in images:
            images = {(well, site): scale.apply(field.read(list(scale.channel_names)))}  # keeps one field in memory
        factor = field.pixel_size_um if in_um else 1.0
        image = images[well, site]
        first, _ = place_windows(np.array([[y / factor, x / factor]]), size, image.shape[1:])
        pictures.append(cut_crops(image, first, size)[0][shown])
    return np.stack(pictures).clip(0, 1), [scale.channel_names[i] for i in shown]


def _composite(channels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return (S, S, 3), each channel in the colour of its stain."""
    spare = ["00FFFF", "FF00FF", "FFFF00", "00FF00", "FF8000"]
    picture = np.zeros((*channels.shape[1:], 3))
    for i, (plane, name) in enumerate(zip(channels, names, strict=True)):
        hexadecimal = COLORS.get(canonical_name(name) or "", spare[i % len(spare)])
        rgb = np.array([int(hexadecimal[k : k + 2], 16) for k in (0, 2, 4)]) / 255
        picture = np.maximum(picture, plane[..., None] ** 0.7 * rgb)
    return picture.clip(0, 1)
