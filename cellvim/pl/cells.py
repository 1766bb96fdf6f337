"""A map of the cells, and the cells themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellvim.channels import COLORS, canonical_name
from cellvim.errors import InputError, MetadataError, listing
from cellvim.pl.canvas import category_colors, is_category, new_axes, plain, values_of
from cellvim.profiles.columns import text

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from cellvim.data.plate import Plate

MAX_POINTS = 100_000


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
    """Draw the rows on a map that is in ``obsm``, in random order so that no group lies on top.

    Parameters
    ----------
    adata
        Cells or profiles, with a map such as scanpy's ``sc.tl.umap`` makes.
    color
        A column of ``obs``, or a feature.
    basis
        The map; its first two columns are drawn.
    size
        Of a dot; by the number of rows if not given.
    cmap
        Colours of numbers.
    seed
        Of the order, and of the sample where there are more than 100,000 rows; the title says how many are drawn.
    ax
        Axes to draw on; a new figure without.

    Raises
    ------
    CellvimError
        The map or the column is not there.
    """
    if basis not in adata.obsm:
        raise InputError(
            f"There is no map '{basis}' in obsm; there are {listing(adata.obsm)}. Make it: scanpy.pp.neighbors, then "
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
        for name in list(colors)[:20]:
            axes.scatter([], [], color=colors[name], s=20, label=plain(name, 24))
        if len(colors) > 20:
            axes.scatter([], [], color="#DDDDDD", s=20, label=f"{len(colors) - 20} more")
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
    """Draw cells as the model saw them: one row of pictures a cell, one column a channel, and all together.

    Parameters
    ----------
    adata
        Embeddings of cells or tiles, as `cellvim.embed` makes them.
    plate
        The OME-Zarr plate that they are from.
    rows
        Names of the rows to draw; drawn at random if not given.
    n
        How many, then.
    channels
        Names of channels; all that were embedded by default.
    title
        A column of ``obs`` to write beside each cell.
    seed
        Of the drawing.

    Returns
    -------
    numpy.ndarray
        (n, channels + 1) of matplotlib.axes.Axes; the last column has all channels in colour.

    Raises
    ------
    CellvimError
        The AnnData does not say how its crops were cut, or the plate has no such field.
    """
    chosen = _choose(adata, rows, n, seed)
    if title is not None:
        values_of(adata, title)
    pictures, names = _cut(adata, plate, chosen, channels)
    import matplotlib.pyplot as plt

    columns = len(names) + 1
    _, axes = plt.subplots(
        len(chosen),
        columns,
        figsize=(1.25 * columns + 0.8, 1.25 * len(chosen) + 0.3),
        squeeze=False,
        layout="constrained",
    )
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


def _choose(adata: AnnData, rows: Sequence[str] | None, n: int, seed: int) -> np.ndarray:
    if adata.n_obs == 0:
        raise InputError("There are no cells to draw: the AnnData has no rows.")
    if rows is None:
        return np.sort(np.random.default_rng(seed).choice(adata.n_obs, min(n, adata.n_obs), replace=False))
    positions = adata.obs_names.get_indexer(list(rows))
    if lost := [str(r) for r, p in zip(rows, positions, strict=True) if p < 0]:
        raise MetadataError(f"There are no rows {listing(lost)}; they are called such as {adata.obs_names[0]}.")
    return positions


def _cut(
    adata: AnnData, plate: str | Path | Plate, chosen: np.ndarray, channels: Sequence[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Return (n, C, S, S) from 0 to 1, and the channels' names."""
    from cellvim.data.crops import cut_crops
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
            "The AnnData does not say where its crops are and how they were cut; expected one of cells or tiles, as "
            f"cellvim embed makes it ({error})."
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
            raise InputError(f"The plate has no field {site} of well {well}; is it the one that was embedded?")
        if (well, site) not in images:
            images = {(well, site): scale.apply(field.read(list(scale.channel_names)))}  # one at a time is kept
        factor = field.pixel_size_um if in_um else 1.0
        pictures.append(cut_crops(images[well, site], np.array([[y / factor, x / factor]]), size)[0][shown])
    return np.stack(pictures).clip(0, 1), [scale.channel_names[i] for i in shown]


def _composite(channels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return (S, S, 3), each channel in its stain's colour."""
    spare = ["00FFFF", "FF00FF", "FFFF00", "00FF00", "FF8000"]
    picture = np.zeros((*channels.shape[1:], 3))
    for i, (plane, name) in enumerate(zip(channels, names, strict=True)):
        hexadecimal = COLORS.get(canonical_name(name) or "", spare[i % len(spare)])
        rgb = np.array([int(hexadecimal[k : k + 2], 16) for k in (0, 2, 4)]) / 255
        picture = np.maximum(picture, plane[..., None] ** 0.7 * rgb)
    return picture.clip(0, 1)
