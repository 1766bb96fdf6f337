"""Crops are the pixels around their centers, zero outside of the field; tiles cover every pixel."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellvim.data.crops import CropSpec, cut_crops, resize_crops, tile_centers
from cellvim.errors import InputError


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
    crops = cut_crops(image, centers, size)
    assert crops.shape == (count, 3, size, size) and crops.flags.c_contiguous
    np.testing.assert_array_equal(crops, crop_pixel_by_pixel(image, centers, size))


def test_types_views_and_the_field_itself_are_untouched():
    image = np.arange(2 * 30 * 40, dtype="uint16").reshape(2, 30, 40)
    centers = np.array([[0.0, 0.0], [29.0, 39.0], [14.5, 20.49]])
    view = image[:, ::2, ::-1]
    np.testing.assert_array_equal(
        cut_crops(view, centers / (2, 1), 8), crop_pixel_by_pixel(np.array(view), centers / (2, 1), 8)
    )
    crops = cut_crops(image, centers, 8)
    assert crops.dtype == np.uint16
    crops[:] = 0
    assert image.any()


def test_impossible_centers_are_errors():
    image = np.zeros((1, 10, 10))
    for centers, words in (([[np.nan, 1]], "finite"), ([[1e12, 0]], "outside of the field"), ([[-50, 0]], "outside")):
        with pytest.raises(ValueError, match=words):
            cut_crops(image, np.array(centers), 4)
    with pytest.raises(ValueError, match="expected an image"):
        cut_crops(image[0], np.zeros((1, 2)), 4)


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
    tiles = cut_crops(field, tile_centers(12, 8, 4), 4)
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
    np.testing.assert_allclose(resize_crops(crops, 8), expected.numpy(), atol=1e-6)
    assert resize_crops(crops, 20) is crops
    assert resize_crops(crops[:0], 8).shape == (0, 2, 8, 8)
    np.testing.assert_allclose(resize_crops(np.full((1, 1, 5, 5), 0.25, "float32"), 13), 0.25, atol=1e-6)


def test_a_field_of_cells_is_cut_in_milliseconds():
    image = np.random.default_rng(0).random((5, 1080, 1080)).astype("float32")
    centers = np.random.default_rng(1).random((300, 2)) * 1079
    cut_crops(image, centers, 64)
    start = time.perf_counter()
    cut_crops(image, centers, 64)
    # 25 MB: about 20 ms here; a loop over pixels takes a thousand times as long
    assert time.perf_counter() - start < 1.0
