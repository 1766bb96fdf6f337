"""Plot an attribution: the channels of the crop, and the contributions of their patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellvim.attribution.attention import AttentionScores
from cellvim.attribution.tokens import Attribution
from cellvim.errors import InputError, OutputError, listing
from cellvim.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
_COLUMNS = 6  # channels side by side
_METHODS = {
    "integrated_gradients": "integrated gradients",
    "gradient_times_input": "gradient × input",
    "occlusion": "occlusion",
}


def draw_attribution(
    found: Attribution | AttentionScores,
    image: np.ndarray,
    channel_names: Sequence[str],
    *,
    index: int = 0,
    title: str = "",
    um_per_px: float | None = None,
) -> Figure:
    """Plot the channels of a crop, the contributions of their patches, and those of the channels as bars.

    Parameters
    ----------
    found
        Returned by `attribute` or `attention_scores`.
    image
        (C, H, W), the explained crop.
    channel_names
        Names of the C channels.
    index
        Index of the image in the batch.
    title
        Title of the figure.
    um_per_px
        Pixel size in µm, for a scale bar; no scale bar if None.

    Returns
    -------
    matplotlib.figure.Figure
        All channels have the same colour scale: orange increases the explained value, purple decreases it. For
        attention scores, orange is more and purple less than an equal share.

    Raises
    ------
    InputError
        The image does not match the names, or matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Plots require matplotlib: pip install 'cellvim[analysis]'.") from error

    image = np.asarray(image)
    if image.ndim != 3 or len(image) != len(channel_names):
        raise InputError(f"The image has the shape {image.shape}; expected ({len(channel_names)}, height, width).")
    values, label, bars = _values(found, index)
    n_channels = len(image)
    columns, blocks = min(n_channels, _COLUMNS), -(-n_channels // _COLUMNS)
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    colors = colormaps["PuOr_r"]

    height, maps, beside = 3.3 * blocks * image.shape[1] / image.shape[2] + 1.1, 1.6 * columns + 1.2, 2.2
    size = (max(4.5, maps + (beside if bars is not None else 0)), max(2.5, min(height, 20)))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure, None
    if bars is not None:
        left, right = figure.subfigures(1, 2, width_ratios=[maps, beside])
    axes = left.subplots(2 * blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for c, (name, plane) in enumerate(zip(channel_names, image, strict=True)):
        block, column = divmod(c, _COLUMNS)
        grey = _scaled(plane)
        shown, explained = axes[2 * block, column], axes[2 * block + 1, column]
        shown.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        shown.set_title(_short(name), fontsize=9, parse_math=False)
        patches = _upsampled(values[c if len(values) > 1 else 0], found.patch_px, plane.shape)
        strength = np.abs(patches / limit)[..., None] ** 0.6
        tint = colors(0.5 + 0.5 * patches / limit)[..., :3]
        explained.imshow(grey[..., None] * 0.75 * (1 - 0.8 * strength) + tint * 0.8 * strength, interpolation="nearest")
        if c == 0 and um_per_px:
            _scale_bar(shown, plane.shape[1], um_per_px)
    bar = left.colorbar(
        ScalarMappable(Normalize(-limit, limit), colors), ax=axes.ravel().tolist(), shrink=0.8, pad=0.02, aspect=30
    )
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if right is not None:
        _draw_bars(right.subplots(), bars, channel_names, colors)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def check_picture(path: Path, *, overwrite: bool = False) -> None:
    """Raise if a picture cannot be written: unknown format, existing file without ``overwrite``, or missing folder."""
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path} is not a supported picture; expected a name ending in {listing(FORMATS)}.")
    if path.exists() and (path.is_dir() or not overwrite):
        raise OutputError(f"{path} exists already. Choose another --output, or replace it with --overwrite.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"The folder {path.parent} for the picture does not exist.")


def save_picture(figure: Figure, path: str | Path) -> None:
    """Write a picture atomically, in the format of the file name."""
    with atomic_path(path) as partial:
        figure.savefig(partial, format=partial.suffix.lower().removeprefix("."))


def _values(found: Attribution | AttentionScores, index: int) -> tuple[np.ndarray, str, np.ndarray | None]:
    """Return signed values (C or 1, rows, columns), their label, and the contributions of the channels (C,)."""
    if isinstance(found, AttentionScores):
        shares = found.patches[index]
        label = "log₂ of the share of attention / an equal share"
        return np.log2(np.maximum(shares, 1e-6)), label, None
    of = {"embedding": "distance from black", "direction": "component along the direction"}
    label = f"contribution to the {of.get(found.target, 'logit of ' + found.target)}\n({_METHODS[found.method]})"
    return found.patches[index], label, found.channels[index]


def _scaled(plane: np.ndarray) -> np.ndarray:
    """Scale a plane from 0 at its minimum to 1 at its 99.8th percentile."""
    plane = np.nan_to_num(plane.astype(np.float64))
    low, high = plane.min(), np.percentile(plane, 99.8)
    return ((plane - low) / (high - low)).clip(0, 1) ** 0.8 if high > low else np.zeros_like(plane)


def _upsampled(patches: np.ndarray, patch_px: int, shape: tuple[int, int]) -> np.ndarray:
    """Repeat patches (rows, columns) for their pixels."""
    y, x = (np.minimum(np.arange(n) // patch_px, m - 1) for n, m in zip(shape, patches.shape, strict=True))
    return patches[y[:, None], x]


def _scale_bar(axis, width_px: int, um_per_px: float) -> None:
    length_um = next((n for n in (100, 50, 20, 10, 5, 2, 1) if n / um_per_px < 0.5 * width_px), None)
    if length_um is None:
        return
    axis.plot([0.05 * width_px, 0.05 * width_px + length_um / um_per_px], [0.94 * width_px] * 2, color="white", lw=2)
    axis.text(0.05 * width_px, 0.90 * width_px, f"{length_um} µm", color="white", fontsize=7, va="bottom")


def _draw_bars(axis, values: np.ndarray, names: Sequence[str], colors) -> None:
    place = np.arange(len(values))[::-1]
    axis.barh(place, values, height=0.5, color=[colors(0.85) if v >= 0 else colors(0.15) for v in values])
    axis.set_yticks(place, [_short(name) for name in names], fontsize=8, parse_math=False)
    axis.set_ylim(-0.8, len(values) - 0.2)
    axis.axvline(0, color="0.5", lw=0.8)
    axis.set_title("by channel", fontsize=9)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
