"""Quality columns say what they are defined to say, and order images as the eye does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi

from cellvim.data.cells import measure_quality


def field(seed=0, n=8):
    """Draw textured nuclei; return (image (2, H, W) uint16, labels)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :160]
    labels = np.zeros((120, 160), "int32")
    for i in range(n):
        cy, cx = 16 + 30 * (i // 4), 20 + 40 * (i % 4)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < 10**2] = i + 1
    texture = ndi.gaussian_filter(rng.normal(0, 1, (2, 120, 160)), (0, 1, 1))
    return ((200 + (labels > 0) * (1000 + 900 * texture)).clip(0)).astype("uint16"), labels


def test_columns_are_as_defined_object_by_object():
    image, labels = field()
    image[1, 12:20, 15:25] = 65535
    labels[0, :] = 0
    labels[0:3, 100] = 9
    table = measure_quality(labels, image, ["DNA", "ER"], dna=0, pixel_size_um=0.65)
    laplace = ndi.laplace(image[0].astype(float))
    median = np.median([np.sum(labels == i) for i in table.index])
    for number, row in table.iterrows():
        inside = labels == number
        area = inside.sum()
        assert row["qc_focus"] == pytest.approx(laplace[inside].var() / image[0][inside].mean() ** 2, rel=1e-4)
        assert row["qc_saturated_ER"] == pytest.approx((image[1][inside] == 65535).mean())
        assert row["qc_area_ratio"] == pytest.approx(area / median)
        assert row["qc_debris"] == (area < 0.4 * median or area > 3 * median)
        edge = inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any()
        assert row["qc_border"] == edge
    assert list(table.index) == list(range(1, 10)) and table.loc[9, "qc_debris"] and table.loc[9, "qc_border"]
    assert table.loc[1, "qc_saturated_ER"] > 0 and (table["qc_saturated_DNA"] == 0).all()


def test_blur_lowers_focus_whatever_the_exposure():
    image, labels = field()
    sharp = measure_quality(labels, image, ["DNA", "ER"])["qc_focus"]
    for sigma in (1.0, 2.0):
        blurred = ndi.gaussian_filter(image.astype(float), (0, sigma, sigma))
        assert (measure_quality(labels, blurred, ["DNA", "ER"])["qc_focus"] < 0.6 * sharp).all()
    bright = measure_quality(labels, image * 3, ["DNA", "ER"])["qc_focus"]
    np.testing.assert_allclose(bright, sharp, rtol=1e-3)


def test_few_objects_are_judged_by_their_size_in_um():
    labels = np.zeros((100, 100), "int32")
    labels[10:12, 10:12], labels[40:60, 40:60] = 1, 2  # 2.6 and 13 µm
    table = measure_quality(labels, np.ones((1, 100, 100), "uint8"), ["DNA"], pixel_size_um=0.65)
    assert table["qc_debris"].tolist() == [True, False]


def test_damaged_and_empty_images_are_survived():
    image, labels = field()
    image = image.astype(float)
    image[0, ::7, ::5] = np.nan
    assert np.isfinite(measure_quality(labels, image, ["DNA", "ER"])["qc_focus"]).all()
    assert len(measure_quality(np.zeros((5, 5), int), np.zeros((1, 5, 5)), ["DNA"])) == 0
    zero = measure_quality(labels, np.zeros_like(image), ["DNA", "ER"])
    assert zero["qc_focus"].isna().all() and len(zero) == 8
