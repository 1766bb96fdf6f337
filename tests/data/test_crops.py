"""Crops are the pixels around their centers, zero outside of the field; tiles cover every pixel."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching

import cellvim.data.crops
from cellvim.data.crops import (
    CropSpec,
    cut_crops,
    cut_on_device,
    place_windows,
    resample_field,
    resampled_centers,
    resize_crops,
    tile_centers,
)
from cellvim.data.intensity import IntensityScale
from cellvim.errors import InputError


def cut_around(image: np.ndarray, centers: np.ndarray, size: int, border: str = "pad", **masks) -> np.ndarray:
    """Cut windows around centers."""
    first, _ = place_windows(centers, size, image.shape[-2:], border=border)
    return cut_crops(image, first, size, border=border, **masks)


def crop_pixel_by_pixel(image: np.ndarray, centers: np.ndarray, size: int) -> np.ndarray:
    """Cut crops by the definition: pixel S // 2 of the crop lies on the rounded center."""
    channels, height, width = image.shape
    out = np.zeros((len(centers), channels, size, size), image.dtype)
    for n, (y, x) in enumerate(centers):
        for i in range(size):
            for j in range(size):
                row = int(np.floor(y + 0.5)) - size // 2 + i
                column = int(np.floor(x + 0.5)) - size // 2 + j
                if 0 <= row < height and 0 <= column < width:
                    out[n, :, i, j] = image[:, row, column]
    return out


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    size=st.integers(1, 13),
    seed=st.integers(0, 99),
    count=st.integers(0, 4),
)
def test_crops_are_what_the_definition_says(height, width, size, seed, count):
    rng = np.random.default_rng(seed)
    image = rng.random((3, height, width)).astype("float32")
    centers = rng.random((count, 2)) * (height - 1, width - 1)
    crops = cut_around(image, centers, size)
    assert crops.shape == (count, 3, size, size) and crops.flags.c_contiguous
    np.testing.assert_array_equal(crops, crop_pixel_by_pixel(image, centers, size))


def test_views_are_cut_and_the_field_itself_is_untouched():
    image = np.arange(2 * 30 * 40, dtype="uint16").reshape(2, 30, 40)
    centers = np.array([[0.0, 0.0], [29.0, 39.0], [14.5, 20.49]])
    view = image[:, ::2, ::-1]
    np.testing.assert_array_equal(
        cut_around(view, centers / (2, 1), 8), crop_pixel_by_pixel(np.array(view), centers / (2, 1), 8)
    )
    crops = cut_around(image, centers, 8)
    np.testing.assert_array_equal(crops, crop_pixel_by_pixel(image, centers, 8))
    crops[:] = 0
    assert image.any()


def test_impossible_centers_are_errors():
    image = np.zeros((1, 10, 10))
    for centers, words in (([[np.nan, 1]], "finite"), ([[1e12, 0]], "outside of the field"), ([[-50, 0]], "outside")):
        with pytest.raises(ValueError, match=words):
            cut_around(image, np.array(centers), 4)
    with pytest.raises(ValueError, match="expected an image"):
        cut_around(image[0], np.zeros((1, 2)), 4)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.data())
def test_tiles_cover_every_pixel_and_stay_inside(height, width, size, data):
    stride = data.draw(st.integers(1, size))
    centers = tile_centers(height, width, size, stride)
    assert len(np.unique(centers, axis=0)) == len(centers)
    covered = np.zeros((height, width), bool)
    for y, x in centers.astype(int) - size // 2:
        assert 0 <= y <= max(0, height - size) and 0 <= x <= max(0, width - size)
        covered[y : y + size, x : x + size] = True
    assert covered.all()


def test_tiles_of_a_multiple_are_a_grid():
    field = np.arange(12 * 8, dtype="float32").reshape(1, 12, 8)
    tiles = cut_around(field, tile_centers(12, 8, 4), 4)
    assert tiles.shape == (6, 1, 4, 4)
    whole = tiles.reshape(3, 2, 4, 4).transpose(0, 2, 1, 3).reshape(12, 8)
    np.testing.assert_array_equal(whole, field[0])


def test_stride_that_leaves_gaps_is_an_error():
    for stride in (0, 5):
        with pytest.raises(InputError, match="do not cover"):
            tile_centers(10, 10, 4, stride)


def test_crop_spec_says_what_is_wrong():
    assert CropSpec("cell", 64).size_px == 64 and CropSpec("field").size_px is None
    for unit, size, words in (
        ("nucleus", 8, "choose cell, tile or field"),
        ("cell", None, "crop size"),
        ("tile", 0, "0"),
    ):
        with pytest.raises(InputError, match=words):
            CropSpec(unit, size)


def test_resize_is_torchs_antialiased_bilinear():
    crops = np.random.default_rng(0).random((3, 2, 20, 20)).astype("float32")
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(crops).double(), (8, 8), mode="bilinear", align_corners=False, antialias=True
    )
    crops = torch.from_numpy(crops)
    torch.testing.assert_close(resize_crops(crops, 8), expected.float(), atol=1e-6, rtol=0)
    assert resize_crops(crops, 20) is crops
    assert resize_crops(crops[:0], 8).shape == (0, 2, 8, 8)
    np.testing.assert_allclose(resize_crops(torch.full((1, 1, 5, 5), 0.25), 13), 0.25, atol=1e-6)


def test_a_field_of_cells_is_cut_in_milliseconds():
    image = np.random.default_rng(0).random((5, 1080, 1080)).astype("float32")
    centers = np.random.default_rng(1).random((300, 2)) * 1079
    cut_around(image, centers, 64)
    start = time.perf_counter()
    cut_around(image, centers, 64)
    # 25 MB: about 20 ms here; a loop over pixels takes a thousand times as long
    assert time.perf_counter() - start < 1.0


def naive_crop(image, center, size, border):
    """Cut one window pixel by pixel."""
    _, height, width = image.shape
    y0, x0 = (int(np.floor(c + 0.5)) - size // 2 for c in center)
    if border == "shift":
        y0, x0 = min(max(y0, 0), height - size), min(max(x0, 0), width - size)
    out = np.zeros((len(image), size, size), image.dtype)
    for i in range(size):
        for j in range(size):
            y, x = y0 + i, x0 + j
            if border == "reflect":
                y, x = (-1 - v if v < 0 else 2 * n - 1 - v if v >= n else v for v, n in ((y, height), (x, width)))
            if 0 <= y < height and 0 <= x < width:
                out[:, i, j] = image[:, y, x]
    return out


CENTERS = np.array([[0.0, 0.0], [10.4, 12.6], [19.0, 25.0], [7.5, 3.49], [18.2, 1.0]])


@pytest.mark.parametrize("border", ["pad", "reflect", "shift", "drop"])
@pytest.mark.parametrize("size", [5, 8])
def test_borders_are_as_defined_on_both_devices_paths(border, size):
    image = np.random.default_rng(0).integers(1, 99, (2, 20, 26)).astype("float32")
    crops = cut_around(image, CENTERS, size, border=border)
    first, kept = place_windows(CENTERS, size, (20, 26), border=border)
    assert len(crops) == kept.sum() == (len(CENTERS) if border != "drop" else 1 + (size == 5))
    expected = np.stack([naive_crop(image, c, size, border) for c in CENTERS[kept]])
    np.testing.assert_array_equal(crops, expected)
    np.testing.assert_array_equal(
        cut_on_device(torch.from_numpy(image), torch.from_numpy(first), size, border=border).numpy(), expected
    )


@pytest.mark.parametrize("border", ["pad", "reflect", "shift"])
def test_field_smaller_than_the_window(border):
    image = np.arange(1, 13, dtype="float32").reshape(1, 3, 4)
    crops = cut_around(image, np.array([[1.0, 2.0]]), 6, border=border)
    first, _ = place_windows(np.array([[1.0, 2.0]]), 6, (3, 4), border=border)
    on_device = cut_on_device(torch.from_numpy(image), torch.from_numpy(first), 6, border=border)
    np.testing.assert_array_equal(on_device.numpy(), crops)
    assert set(image.ravel()) <= set(crops.ravel())  # all of it is there


def test_neighbours_are_masked_and_the_cell_is_not():
    image = np.full((2, 20, 26), 7.0, "float32")
    labels = np.zeros((20, 26), "int32")
    labels[4:9, 4:9], labels[4:9, 10:14] = 3, 9
    centers, numbers = np.array([[6.0, 6.0], [6.0, 12.0]]), np.array([3, 9])
    crops = cut_around(image, centers, 12, labels=labels, numbers=numbers)
    for crop, center, own in zip(crops, centers, numbers, strict=True):
        around = naive_crop(labels[None], center, 12, "pad")[0]
        inside = naive_crop(image, center, 12, "pad")[0] > 0
        np.testing.assert_array_equal(crop[0] > 0, inside & ((around == 0) | (around == own)))
    first, _ = place_windows(centers, 12, (20, 26))
    on_device = cut_on_device(
        torch.from_numpy(image),
        torch.from_numpy(first),
        12,
        labels=torch.from_numpy(labels),
        numbers=torch.from_numpy(numbers),
    )
    np.testing.assert_array_equal(on_device.numpy(), crops)
    with pytest.raises(ValueError, match="one number per window"):
        cut_around(image, centers, 12, labels=labels)


def test_sizes_in_um_and_a_common_pixel_size():
    assert CropSpec("cell", size_um=40.0).pixels(0.5) == (1.0, 80)
    assert CropSpec("cell", size_um=40.0, um_per_px=1.0).pixels(0.5) == (0.5, 40)
    assert CropSpec("tile", 64, um_per_px=0.25).pixels(0.5) == (2.0, 64)
    assert CropSpec("field").pixels(None) == (1.0, None)
    with pytest.raises(InputError, match="no pixel size"):
        CropSpec("cell", size_um=40.0).pixels(None)
    for wrong, words in (
        ({"size_px": 8, "size_um": 4.0}, "give only one"),
        ({"size_px": 8, "border": "wrap"}, "choose pad, reflect, shift, drop"),
        ({"size_px": 8, "overlap": 1.0}, "expected 0 to below 1"),
        ({"size_um": -4.0}, "expected a length above 0"),
        ({"size_px": 8, "unit": "tile", "mask_neighbours": True}, "for cells only"),
    ):
        with pytest.raises(InputError, match=words):
            CropSpec(**({"unit": "cell"} | wrong))


def test_fields_of_two_pixel_sizes_show_the_same_cells_at_a_common_one():
    """A disc of 6 µm radius, seen at 0.5 and at 0.8 µm/px, is as large and in the same place at 1 µm/px."""
    crops = []
    for pixel in (0.5, 0.8):
        n = round(100 / pixel)
        y, x = (np.mgrid[:n, :n] + 0.5) * pixel
        disc = ((y - 40) ** 2 + (x - 60) ** 2 < 36).astype("float32")
        factor, size = CropSpec("cell", size_um=24.0, um_per_px=1.0).pixels(pixel)
        field, factors = resample_field(torch.from_numpy(disc[None]), factor)
        center = resampled_centers(np.array([[40 / pixel - 0.5, 60 / pixel - 0.5]]), factors)
        np.testing.assert_allclose(center, [[39.5, 59.5]])
        first, _ = place_windows(center, size, tuple(field.shape[1:]))
        crops.append(cut_on_device(field, torch.from_numpy(first), size)[0, 0].numpy())
    assert crops[0].shape == crops[1].shape == (24, 24)
    for crop in crops:
        assert crop.sum() == pytest.approx(np.pi * 36, rel=0.04)  # the drawn discs themselves differ by 3%
    np.testing.assert_allclose(*crops, atol=0.45)  # an edge pixel may differ, by less than half
    assert np.abs(crops[0] - crops[1]).mean() < 0.02


def test_resampling_by_one_changes_nothing():
    image = torch.rand(2, 7, 9)
    same, factors = resample_field(image, 1.0)
    assert same is image and factors == (1.0, 1.0)


def test_overlapping_tiles_cover_and_overlap():
    spec = CropSpec("tile", 64, overlap=0.5)
    centers = tile_centers(200, 300, 64, round(64 * spec.stride))
    first, kept = place_windows(centers, 64, (200, 300))
    assert kept.all() and first.min() == 0 and (first.max(axis=0) == (200 - 64, 300 - 64)).all()
    assert set(np.diff(np.unique(first[:, 0]))) <= {32, 200 - 64 - 128}
    seen = np.zeros((200, 300), int)
    for y, x in first:
        seen[y : y + 64, x : x + 64] += 1
    assert seen.min() >= 1 and np.median(seen) == 4


# inside, over each edge, over a corner, entirely outside on either side, and further out than the field is large
FIRST = np.array([[3, 4], [-2, 5], [5, -3], [9, 4], [4, 14], [-3, -3], [40, 40], [-30, 2], [1, -60]])


def draw_field(dtype: str, shape=(3, 13, 19), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    is_signed = np.dtype(dtype).kind in "if"
    image = rng.integers(-100 if is_signed else 0, 120, shape).astype(dtype)
    if np.dtype(dtype).kind == "f":
        image[:, 4:6, 5:8] = np.nan
        image[0, 7] = np.inf
    return image


def windows_pixel_by_pixel(image, first, size, scale=None, border="pad", labels=None, numbers=None):
    """Cut, scale and mask windows by their definition."""
    out = np.zeros((len(first), len(image), size, size), np.float32)
    height, width = image.shape[1:]
    for n, c, i, j in itertools.product(*map(range, out.shape)):
        y, x = first[n, 0] + i, first[n, 1] + j
        if border == "reflect":
            y, x = (np.pad(np.arange(k), 200, mode="symmetric")[v + 200] for k, v in ((height, y), (width, x)))
        if not (0 <= y < height and 0 <= x < width):
            continue
        value = np.float32(image[c, y, x])
        if scale is not None:
            low, high = scale.low[c], scale.high[c]
            factor = np.float32(1 / (high - low)) if high > low else np.float32(0)
            with np.errstate(invalid="ignore"):
                value = (value - np.float32(low)) * factor
            value = np.float32(0) if np.isnan(value) else min(max(value, np.float32(0)), np.float32(scale.ceiling))
        if labels is not None and labels[y, x] not in (0, numbers[n]):
            value = 0
        out[n, c, i, j] = value
    return out


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "float32", "int8", "uint32", "int64", "float16", "float64", ">u2", "bool"]
)
@pytest.mark.parametrize("border", ["pad", "reflect"])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_windows_are_as_defined_for_every_type(dtype, border, is_scaled, is_masked):
    image = draw_field(dtype)
    scale = IntensityScale(("a", "b", "c"), [-20, 10, 3], [80, 260, 3], ceiling=1.5) if is_scaled else None
    rng = np.random.default_rng(1)
    masks = {"labels": rng.integers(0, 4, image.shape[1:]), "numbers": rng.integers(1, 4, len(FIRST))}
    masks = masks if is_masked else {}
    crops = cut_crops(image, FIRST, 7, scale, border=border, **masks)
    assert crops.dtype == np.float32
    np.testing.assert_array_equal(crops, windows_pixel_by_pixel(image, FIRST, 7, scale, border, **masks))


@pytest.mark.parametrize("size", [1, 16, 37])
def test_views_and_windows_larger_than_the_field(size):
    image = draw_field("uint16", (4, 26, 22))[::2, 3:16, 1:20]
    np.testing.assert_array_equal(cut_crops(image, FIRST, size, None), windows_pixel_by_pixel(image, FIRST, size))


def test_no_window_gives_an_empty_result():
    assert cut_crops(draw_field("uint8"), np.zeros((0, 2), int), 5, None).shape == (0, 3, 5, 5)


def test_arguments_that_do_not_fit_are_errors():
    image, first = draw_field("uint16"), np.zeros((1, 2), int)
    with pytest.raises(ValueError, match="the scale has 1 channels, the image 3"):
        cut_crops(image, first, 4, IntensityScale(("a",), [0], [1]))
    with pytest.raises(ValueError, match="labels of the field's size"):
        cut_crops(image, first, 4, None, labels=np.zeros((4, 4), int), numbers=np.array([1]))


@pytest.mark.parametrize(
    ("owner", "method"), [(caching._CacheLocator, "ensure_cache_path"), (caching.IndexDataCacheFile, "save")]
)
def test_cutting_does_not_need_a_cache_of_compiled_code(owner, method, tmp_path, monkeypatch):
    """The folder is not writable, or the disk is full: then the function is compiled in every process."""
    failures = []

    def fail(*args, **options):
        failures.append(method)
        raise OSError("no space left on device")

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(owner, method, fail)
    spec = importlib.util.spec_from_file_location("crops_without_cache", cellvim.data.crops.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    image = draw_field("uint8", (3, 20, 26))
    np.testing.assert_array_equal(module.cut_crops(image, FIRST, 5), windows_pixel_by_pixel(image, FIRST, 5))
    assert failures and not list(tmp_path.rglob("*.nb?"))
