"""Segmentation of nuclei on the DNA channel, and of cells around them."""

from __future__ import annotations

import numpy as np
from scipy import ndimage as ndi
from skimage.feature import peak_local_max
from skimage.filters import threshold_li
from skimage.segmentation import watershed
from skimage.transform import downscale_local_mean, resize

NUCLEUS_DIAMETER_UM = 15.0  # of a typical cultured human cell; a first guess
SMALLEST_NUCLEUS_UM, LARGEST_NUCLEUS_UM = 6.0, 40.0  # diameters; anything outside is not a nucleus
DEFAULT_DIAMETER_PX = 20.0  # the first guess if the pixel size is unknown
LOCAL_SHARE = 0.85  # of the local mean; darker pixels lie between nuclei
MIN_CONTRAST = 4.0  # of the threshold above the background, in units of its noise
MIN_SIDE_PX = 8  # no nucleus with its background fits into a smaller image


def segment_nuclei(dna: np.ndarray, pixel_size_um: float | None = None) -> np.ndarray:
    """Segment nuclei on a DNA image.

    The steps are smoothing, subtraction of the uneven background, a global threshold by minimum cross entropy [1]_
    combined with a local one (so that gaps between touching nuclei are background), a watershed on the distance
    transform to split nuclei that still touch, and a filter by size. Lengths scale with the typical nucleus of the
    image. An image without contrast, such as an empty well, has no nuclei.

    Parameters
    ----------
    dna
        (H, W), any numeric type.
    pixel_size_um
        Side of a pixel, which bounds the size of nuclei; without it, the bounds depend on the image alone.

    Returns
    -------
    np.ndarray
        (H, W) int32: 0 is background, nuclei are numbered 1..n from top to bottom.

    References
    ----------
    .. [1] Li & Tam, "An iterative algorithm for minimum cross entropy thresholding", Pattern Recognition Letters, 1998.
    """
    labels = np.zeros(dna.shape, np.int32)
    image = np.nan_to_num(np.asarray(dna, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if min(image.shape) < MIN_SIDE_PX or image.max() <= image.min():
        return labels
    expected = NUCLEUS_DIAMETER_UM / pixel_size_um if pixel_size_um else DEFAULT_DIAMETER_PX

    smooth = ndi.gaussian_filter(image, max(0.7, expected / 20))
    smooth -= _background(smooth, expected, window=5 * expected if pixel_size_um else max(image.shape) / 4)
    bright = smooth > _threshold(smooth, least=1e-3 * float(image.max() - image.min()))
    if not bright.any() or bright.all():
        return labels
    diameter = _typical_diameter(bright, expected, bounded=pixel_size_um is not None)

    around = ndi.uniform_filter(smooth, int(2 * diameter) | 1)
    mask = bright & (smooth > LOCAL_SHARE * around)
    mask = ndi.binary_opening(mask, iterations=max(1, round(diameter / 16)))
    mask = _fill_small_holes(mask, diameter)

    distance = ndi.gaussian_filter(ndi.distance_transform_edt(mask).astype(np.float32), diameter / 12)
    peaks = peak_local_max(
        distance, min_distance=max(1, round(0.35 * diameter)), labels=mask.astype(np.int32), exclude_border=False
    )
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-distance, markers, mask=mask)

    smallest, largest = 0.5 * diameter, 3.0 * diameter
    if pixel_size_um:
        smallest, largest = SMALLEST_NUCLEUS_UM / pixel_size_um, LARGEST_NUCLEUS_UM / pixel_size_um
    return _keep_sizes(labels, np.pi / 4 * smallest**2, np.pi / 4 * largest**2)


def _background(smooth: np.ndarray, expected: float, *, window: float) -> np.ndarray:
    """Return the background: a trend over the field plus structures wider than ``window`` (px)."""
    factor = max(1, round(expected / 6))  # the resolution, a sixth of a nucleus
    small = downscale_local_mean(
        np.pad(smooth, [(0, -n % factor) for n in smooth.shape], mode="edge"), (factor, factor)
    )
    trend = _trend(small)
    # The opening alone would keep a bright edge of the field as an object; the trend alone misses haze around cells.
    size = max(3, round(max(window, 5 * expected) / factor)) | 1
    background = trend + ndi.gaussian_filter(ndi.grey_opening(small - trend, size), size / 6)
    full = [n * factor for n in small.shape]
    return resize(background, full, order=1, preserve_range=True)[: smooth.shape[0], : smooth.shape[1]]


def _trend(image: np.ndarray) -> np.ndarray:
    """Fit a quadratic surface to the darker pixels, repeatedly excluding outliers."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * y, x**2, y**2], axis=-1)
    steps = tuple(slice(None, None, max(1, n // 64)) for n in image.shape)  # some 4,000 pixels suffice
    values, known = image[steps].ravel().astype(np.float64), terms[steps].reshape(-1, 6)
    kept = values <= np.percentile(values, 60)
    for _ in range(6):
        coefficients = np.linalg.lstsq(known[kept], values[kept], rcond=None)[0]
        excess = values - known @ coefficients
        spread = 1.4826 * np.median(np.abs(excess[kept]))
        kept = np.abs(excess) <= 3 * spread + 1e-6 * np.abs(values).max()
        if kept.sum() < max(6, 0.05 * kept.size):
            return np.full(image.shape, np.percentile(values, 5))
    return terms @ coefficients


def _threshold(smooth: np.ndarray, *, least: float) -> float:
    """Return the threshold between background and nuclei, infinite for an image without contrast."""
    # Ignore the brightest 0.1%: hot pixels and dust would raise the threshold.
    low, high = float(smooth.min()), float(np.percentile(smooth, 99.9))
    if not high - low > least:
        return np.inf
    # Convert to integers, because scikit-image's iteration may not terminate on floats: it stops at a change of half
    # the smallest difference between two pixels, and rounding errors can exceed that.
    steps = np.clip((smooth - low) * (4095 / (high - low)), 0, 4095).astype(np.uint16)
    threshold = low + float(threshold_li(steps)) * (high - low) / 4095
    dark = smooth[smooth <= threshold]
    middle = np.median(dark)
    noise = 1.4826 * np.median(np.abs(dark - middle))
    return threshold if threshold > middle + MIN_CONTRAST * noise else np.inf


def _typical_diameter(mask: np.ndarray, expected: float, *, bounded: bool) -> float:
    """Return the diameter (px) of the largest circle inside a typical object, which clumps do not increase."""
    objects, count = ndi.label(mask)
    area = np.bincount(objects[mask], minlength=count + 1)
    inscribed = np.zeros(count + 1)
    np.maximum.at(inscribed, objects[mask], 2 * ndi.distance_transform_edt(mask)[mask])
    order = np.argsort(inscribed)
    weight = np.cumsum(area[order])  # a median by area, so that specks have no influence
    diameter = float(inscribed[order][np.searchsorted(weight, weight[-1] / 2)])
    low, high = (0.5 * expected, 2.0 * expected) if bounded else (6.0, max(mask.shape) / 3)
    return float(np.clip(diameter, low, max(low, high)))


def _fill_small_holes(mask: np.ndarray, diameter: float) -> np.ndarray:
    """Fill nucleoli and other holes smaller than a nucleus, but not the space inside a ring of cells."""
    holes, count = ndi.label(~mask)
    area = np.bincount(holes.ravel(), minlength=count + 1)
    small = area < np.pi / 4 * (0.6 * diameter) ** 2
    small[0] = False
    return mask | small[holes]


def _keep_sizes(labels: np.ndarray, smallest: float, largest: float) -> np.ndarray:
    """Remove labels whose area (px) is out of range and number the others 1..n in raster order."""
    area = np.bincount(labels.ravel())
    keep = (area >= smallest) & (area <= largest)
    keep[0] = False
    inside = np.flatnonzero(labels)
    first = np.zeros(len(area), np.int64)
    first[labels.ravel()[inside[::-1]]] = inside[::-1]  # the last write remains: the first pixel of each label
    ids = np.flatnonzero(keep)
    ids = ids[np.argsort(first[ids])]
    numbers = np.zeros(len(area), np.int32)
    numbers[ids] = np.arange(1, len(ids) + 1)
    return numbers[labels]


def segment_cells(nuclei: np.ndarray, body: np.ndarray, pixel_size_um: float | None = None) -> np.ndarray:
    """Grow cells around nuclei: a watershed on the mean of the stains, where they are brighter than the background.

    Every cell contains its nucleus and has its number. A cell extends at most two nuclear diameters from its nucleus;
    if the stains do not show a cell body, it is the nucleus alone.

    Parameters
    ----------
    nuclei
        (H, W) integers, 0 is background.
    body
        (C, H, W), stains of the cell body, any numeric type.
    pixel_size_um
        Side of a pixel.

    Returns
    -------
    np.ndarray
        (H, W) int32.
    """
    nuclei = np.asarray(nuclei, np.int32)
    if body.ndim != 3 or body.shape[1:] != nuclei.shape:
        raise ValueError(f"the stains have the shape {body.shape}; expected (C, {nuclei.shape[0]}, {nuclei.shape[1]})")
    if not nuclei.any():
        return nuclei.copy()
    image = np.nan_to_num(np.asarray(body, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = np.percentile(image.reshape(len(image), -1), (5, 99.5), axis=1)
    width = np.where(high > low, high - low, np.inf)
    image = np.clip((image - low[:, None, None]) / width[:, None, None], 0, 1).mean(axis=0)
    areas = np.bincount(nuclei.ravel())[1:]
    diameter = np.sqrt(4 / np.pi * np.median(areas[areas > 0]))
    smooth = ndi.gaussian_filter(image, max(0.7, diameter / 20))
    distance = ndi.distance_transform_edt(nuclei == 0)
    # No minimum contrast is required here: a confluent field does not have a background.
    steps = np.round(4095 * smooth).astype(np.uint16)
    bright = steps > threshold_li(steps) if steps.max() > steps.min() else np.zeros(steps.shape, bool)
    mask = bright & (distance <= 2 * diameter)
    mask = _fill_small_holes(mask | (nuclei > 0), diameter)
    # Brightness separates adjacent cells; distance prevents a bright cell from absorbing a dim neighbour.
    landscape = -smooth + 0.5 * distance.astype(np.float32) / diameter
    return watershed(landscape, nuclei, mask=mask).astype(np.int32)
