"""Quality of cells: what tells a sharp, whole, unsaturated nucleus from debris, in columns ``qc_*``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

DEBRIS_SHARE = 0.4  # of the field's median area: what is smaller is no nucleus
CLUMP_SHARE = 3.0  # and what is larger is more than one
FEW = 5  # objects from which on a field has a median worth the name
SMALLEST_UM2, LARGEST_UM2 = 28.0, 1260.0  # areas of circles of 6 and 40 µm across


def measure_quality(
    labels: np.ndarray,
    image: np.ndarray,
    channel_names: Sequence[str],
    *,
    dna: int | None = None,
    pixel_size_um: float | None = None,
) -> pd.DataFrame:
    """Measure the quality of every labelled object.

    Parameters
    ----------
    labels
        (H, W) integers, 0 is background.
    image
        (C, H, W), any numeric type.
    channel_names
        C names.
    dna
        Index of the channel that focus is judged on; the first if None.
    pixel_size_um
        Side of a pixel: where a field has too few objects for a median, debris is told by absolute size.

    Returns
    -------
    pandas.DataFrame
        One row an object, by number:

        ``qc_focus``
            Variance of the Laplacian over the object's pixels by the square of its mean intensity: falls when the
            image is out of focus, whatever the exposure. NaN where the mean is 0.
        ``qc_saturated_<channel>``
            Share of its pixels at the largest value that the pixel type holds (0 for floats).
        ``qc_area_ratio``
            Its area by the median of the field.
        ``qc_border``
            It touches the border of the field.
        ``qc_debris``
            It is too small or too large for one nucleus: under 0.4 or over 3 medians, or, in a field of fewer than
            five objects, outside of 6 to 40 µm in diameter.

    References
    ----------
    Variance of the Laplacian as a measure of focus: Pech-Pacheco et al., ICPR 2000.
    """
    import pandas as pd
    from scipy import ndimage as ndi

    if image.shape != (len(channel_names), *labels.shape):
        raise ValueError(f"the image has the shape {image.shape}; expected ({len(channel_names)}, *{labels.shape})")
    inside = np.flatnonzero(labels)
    label = labels.ravel()[inside].astype(np.int64)
    count = int(label.max(initial=0)) + 1
    area = np.bincount(label, minlength=count)
    numbers = np.flatnonzero(area)
    n = area[numbers]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(label, weights=values, minlength=count)[numbers] / n

    plane = np.nan_to_num(np.asarray(image[dna or 0], np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    sharp = ndi.laplace(plane).ravel()[inside].astype(np.float64)
    level = mean(plane.ravel()[inside].astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        focus = np.where(level > 0, (mean(sharp**2) - mean(sharp) ** 2) / level**2, np.nan)
    edge = np.zeros(count, bool)
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]) if labels.size else ():
        edge[side] = True
    ratio = n / np.median(n) if len(n) else np.zeros(0)
    if len(n) >= FEW or not pixel_size_um:
        debris = (ratio < DEBRIS_SHARE) | (ratio > CLUMP_SHARE)
    else:
        um2 = n * pixel_size_um**2
        debris = (um2 < SMALLEST_UM2) | (um2 > LARGEST_UM2)
    table = {"qc_focus": focus, "qc_area_ratio": ratio, "qc_border": edge[numbers], "qc_debris": debris}
    most = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else np.inf
    for name, channel in zip(channel_names, image, strict=True):
        full = channel.ravel()[inside] == most if np.isfinite(most) else np.zeros(len(inside))
        table[f"qc_saturated_{name}"] = mean(full.astype(np.float64))
    return pd.DataFrame(table, index=pd.Index(numbers, name="object_number"))


def field_focus(plane: np.ndarray) -> float:
    """Return the slope of the power spectrum of a field in log-log: near -2 in focus, steeper when blurred.

    Parameters
    ----------
    plane
        (H, W), any numeric type. NaN for a constant or tiny image.

    References
    ----------
    Bray et al., "Workflow and metrics for image quality control in large-scale high-content screens", J. Biomol.
    Screen., 2012 (PowerLogLogSlope).
    """
    side = min(plane.shape)
    if side < 8:
        return float("nan")
    image = np.nan_to_num(plane[:side, :side].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    image = image - image.mean()
    if not image.any():
        return float("nan")
    power = np.abs(np.fft.rfft2(image)) ** 2
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    ring = np.rint(np.hypot(fy, fx) * side).astype(int).ravel()
    total = np.bincount(ring, weights=power.ravel())
    count = np.bincount(ring)
    radius = np.arange(1, side // 2)
    level = total[radius] / count[radius]
    good = level > 0
    return float(np.polyfit(np.log(radius[good]), np.log(level[good]), 1)[0]) if good.sum() > 2 else float("nan")
