"""Windows cut in C++ hold exactly what a definition pixel by pixel says, for every type, border and mask."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cellvim.ops import native, windows

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

DTYPES = ("uint8", "uint16", "int16", "float32")
# whole, over each edge, over a corner, wholly outside on either side, and further out than the field is large
FIRST = np.array([[3, 4], [-2, 5], [5, -3], [9, 4], [4, 14], [-3, -3], [40, 40], [-30, 2], [1, -60]])


def draw(dtype: str, shape=(3, 13, 19), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = rng.integers(-300 if dtype in ("int16", "float32") else 0, 250, shape).astype(dtype)
    if dtype == "float32":
        image[:, 4:6, 5:8] = np.nan
        image[0, 7] = np.inf
    return image


def naive(
    image, first, size, *, low=None, factor=None, floor=0.0, ceiling=1.0, mirror=False, labels=None, numbers=None
):
    out = np.zeros((len(first), len(image), size, size), np.float32)
    height, width = image.shape[1:]
    for n, c, i, j in itertools.product(*map(range, out.shape)):
        y, x = first[n, 0] + i, first[n, 1] + j
        if mirror:
            y, x = (np.pad(np.arange(k), 200, mode="symmetric")[v + 200] for k, v in ((height, y), (width, x)))
        if not (0 <= y < height and 0 <= x < width):
            continue
        value = np.float32(image[c, y, x])
        if low is not None:
            with np.errstate(invalid="ignore"):
                value = (value - np.float32(low[c])) * np.float32(factor[c])
            if np.isnan(value):
                value = max(0.0, floor)
            value = min(max(value, floor), ceiling)
        if labels is not None and labels[y, x] not in (0, numbers[n]):
            value = 0
        out[n, c, i, j] = value
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("scaled", ["stored", "percentile", "zscore"])
def test_windows_are_those_of_the_definition(dtype, mirror, scaled):
    image = draw(dtype)
    options = {"mirror": mirror}
    if scaled != "stored":
        options |= {"low": [-20.0, 10.0, 3.0], "factor": [0.01, 0.004, 0.0]}
        options |= {"floor": -1.5 if scaled == "zscore" else 0.0, "ceiling": 1.5}
    rng = np.random.default_rng(1)
    options |= {"labels": rng.integers(0, 4, image.shape[1:]), "numbers": rng.integers(1, 4, len(FIRST))}
    size = 7
    out = np.full((len(FIRST), 3, size, size), np.nan, np.float32)
    got = windows.cut_windows(image, FIRST, out, **options)
    assert got is out
    np.testing.assert_array_equal(out, naive(image, FIRST, size, **options))


@pytest.mark.parametrize("size", [1, 16, 37])
def test_views_and_sizes_larger_than_the_field(size):
    whole = draw("uint16", (4, 26, 22))
    image = whole[::2, 3:16, 1:20]  # channels and rows that do not follow each other
    out = np.full((len(FIRST), 2, size, size), np.nan, np.float32)
    np.testing.assert_array_equal(windows.cut_windows(image, FIRST, out), naive(image, FIRST, size))


def test_no_window_is_an_empty_result():
    out = np.empty((0, 3, 5, 5), np.float32)
    assert windows.cut_windows(draw("uint8"), np.zeros((0, 2), int), out).shape == (0, 3, 5, 5)


def test_what_does_not_fit_is_refused():
    image, out = draw("uint16"), np.empty((1, 3, 4, 4), np.float32)
    first = np.zeros((1, 2), int)
    assert "float64 pixels" in windows.refusal(image.astype(float))
    assert "side by side" in windows.refusal(image[:, :, ::2])
    with pytest.raises(ValueError, match="float64 pixels"):
        windows.cut_windows(image.astype(float), first, out)
    with pytest.raises(ValueError, match=r"expected \(1, 3, S, S\) float32"):
        windows.cut_windows(image, first, out[:, :2])
    with pytest.raises(ValueError, match="each of 3 channels"):
        windows.cut_windows(image, first, out, low=[1.0], factor=[1.0])
    with pytest.raises(ValueError, match="labels of the field's size"):
        windows.cut_windows(image, first, out, labels=np.zeros((4, 4), int), numbers=[1])
