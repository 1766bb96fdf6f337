"""Nuclei found in real fields are those of the published tables; measurements are those of scikit-image."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import ndimage as ndi
from scipy.spatial import cKDTree
from skimage.measure import regionprops_table

from cellvim.data.bundled import bundled_dataset
from cellvim.data.cells import measure_cells
from cellvim.data.segmentation import segment_nuclei


def nuclei_image(centers, radius, shape=(200, 240), *, noise=2.0, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Draw blurred discs on a noisy background; return the image and the true labels."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    truth = np.zeros(shape, int)
    image = np.full(shape, 20.0)
    for n, (cy, cx) in enumerate(centers, start=1):
        inside = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
        truth[inside] = n
        image[inside] = 100 + 9 * n
    image = ndi.gaussian_filter(image, 1.0)
    return image + np.random.default_rng(seed).normal(0, noise, shape), truth


def f1(truth: np.ndarray, labels: np.ndarray) -> float:
    """Return the F1 of objects that overlap by more than half of their union."""
    overlap = np.zeros((truth.max() + 1, labels.max() + 1))
    np.add.at(overlap, (truth.ravel(), labels.ravel()), 1)
    iou = overlap / (overlap.sum(1)[:, None] + overlap.sum(0) - overlap)
    return 2 * (iou[1:, 1:] > 0.5).sum() / (truth.max() + labels.max())


@pytest.mark.parametrize("pixel_size_um", [None, 0.7])
@pytest.mark.parametrize("scale", [1, 250])  # 8 and 16 bit
def test_separate_nuclei_are_found(pixel_size_um, scale):
    centers = [(y, x) for y in (30, 80, 130, 175) for x in (25, 75, 140, 200)]
    image, truth = nuclei_image(centers, 11)
    labels = segment_nuclei((image * scale).clip(0).astype("uint16"), pixel_size_um)
    assert labels.dtype == np.int32 and labels.shape == image.shape
    assert labels.max() == 16 and f1(truth, labels) == 1.0
    first = ndi.minimum_position(np.arange(labels.size).reshape(labels.shape), labels, range(1, 17))
    assert first == sorted(first)  # numbered in the order in which they are met


def test_touching_nuclei_are_split_and_a_long_one_is_not():
    image, truth = nuclei_image([(60, 60), (60, 81), (150, 60), (168, 70), (150, 160)], 12)
    assert f1(truth, segment_nuclei(image, 0.65)) == 1.0
    y, x = np.mgrid[:200, :240]
    ellipse = ((y - 100) / 10) ** 2 + ((x - 120) / 17) ** 2 <= 1
    image = ndi.gaussian_filter(np.where(ellipse, 150.0, 20.0), 1) + np.random.default_rng(0).normal(0, 2, y.shape)
    assert segment_nuclei(image, 0.65).max() == 1


def test_uneven_background_dim_nuclei_and_debris():
    centers = [(y, x) for y in (30, 80, 130, 175) for x in (25, 75, 140, 200)]
    image, truth = nuclei_image(centers, 11)
    image += np.linspace(0, 60, image.shape[1])  # half as bright as the dimmest nucleus
    image[5:8, 100:103] += 300  # a speck
    assert f1(truth, segment_nuclei(image, 0.7)) > 0.9


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), "uint8"),
        np.full((64, 64), 4000, "uint16"),
        np.full((64, 64), np.nan),
        np.random.default_rng(0).poisson(100, (300, 300)).astype("uint16"),
        np.random.default_rng(0).normal(0, 1, (300, 300)),
        np.tile(np.arange(300.0), (300, 1)),
        np.tile(400 - 0.3 * np.arange(300), (300, 1)) + np.random.default_rng(0).normal(0, 5, (300, 300)),
        np.zeros((2, 2), "uint8"),
        np.zeros((0, 5), "uint8"),
    ],
    ids=["black", "flat", "nan", "poisson", "normal", "gradient", "vignette", "tiny", "empty"],
)
@pytest.mark.parametrize("pixel_size_um", [None, 0.6])
def test_field_without_nuclei_has_none(image, pixel_size_um):
    labels = segment_nuclei(image, pixel_size_um)
    assert labels.shape == image.shape and not labels.any()


def test_damaged_pixels_are_survived():
    image, _ = nuclei_image([(50, 50), (120, 150)], 12)
    image[::17, ::13] = np.nan
    image[3, 3], image[4, 4] = np.inf, -np.inf
    assert segment_nuclei(image, 0.65).max() == 2


@pytest.mark.parametrize(
    ("folder", "pixel_size_um"),
    [(f, p) for f in ("jump_BR00117035_A01_8ch", "jump_BR00116991_A01_5ch") for p in (0.598, None)],
)
def test_nuclei_of_published_tables_are_found(shared_data, folder, pixel_size_um):
    dna = tifffile.imread(shared_data / folder / "r01c01f01p01-ch5sk1fk1fl1.tiff")
    table = pd.read_csv(shared_data / folder / "Nuclei.csv")
    cells = measure_cells(segment_nuclei(dna, pixel_size_um), dna[None], ["DNA"], pixel_size_um)
    given = table[["AreaShape_Center_X", "AreaShape_Center_Y"]].to_numpy()
    distance, nearest = cKDTree(cells[["x_px", "y_px"]].to_numpy()).query(given)
    found = distance < 8  # a quarter of a nucleus
    # CellProfiler leaves out nuclei at the border, and it joins or splits a few clumps otherwise than we do
    assert len(set(nearest[found])) >= 0.92 * len(given)
    assert abs((~cells["touches_border"]).sum() - len(given)) <= 0.05 * len(given)
    assert np.median(distance) < 0.5
    ratio = cells["area_px"].to_numpy()[nearest[found]] / table["AreaShape_Area"].to_numpy()[found]
    assert 0.85 < np.median(ratio) < 1.1


def test_nuclei_of_the_bundled_plate_are_plausible():
    counts = []
    for well, number in (("A-01", "01"), ("A-12", "12"), ("H-12", "96")):
        dna = tifffile.imread(bundled_dataset() / "images" / f"Channel2-{number}-{well}.tif")
        labels = segment_nuclei(dna)
        counts.append(labels.max())
        area = np.bincount(labels.ravel())[1:]
        assert 12 < np.sqrt(np.median(area) * 4 / np.pi) < 24  # px: what one sees in the pictures
    assert all(120 < n < 340 for n in counts)


def test_brightfield_planes_have_no_nuclei_and_end_in_time(shared_data):
    # LowZBF sent scikit-image's threshold on floats into an endless loop
    for channel in (6, 7, 8):
        image = tifffile.imread(shared_data / "jump_BR00117035_A01_8ch" / f"r01c01f01p01-ch{channel}sk1fk1fl1.tiff")
        assert segment_nuclei(image, 0.598).max() == 0


def test_measurements_are_scikit_images():
    rng = np.random.default_rng(0)
    labels, _ = ndi.label(ndi.gaussian_filter(rng.random((80, 90)), 3) > 0.51)
    labels[labels == 3] = 0  # numbers may have gaps
    image = rng.integers(0, 60000, (2, 80, 90)).astype("uint16")
    cells = measure_cells(labels, image, ["DNA", "ER"], 0.5)
    expected = regionprops_table(
        labels, image.transpose(1, 2, 0), properties=("label", "centroid", "area", "bbox", "mean_intensity")
    )
    np.testing.assert_array_equal(cells["object_number"], expected["label"])
    np.testing.assert_allclose(cells["y_px"], expected["centroid-0"])
    np.testing.assert_allclose(cells["x_px"], expected["centroid-1"])
    np.testing.assert_array_equal(cells["area_px"], expected["area"])
    np.testing.assert_allclose(cells["area_um2"], expected["area"] * 0.25)
    np.testing.assert_allclose(cells["mean_intensity_DNA"], expected["mean_intensity-0"])
    np.testing.assert_allclose(cells["mean_intensity_ER"], expected["mean_intensity-1"])
    border = (
        (expected["bbox-0"] == 0) | (expected["bbox-1"] == 0) | (expected["bbox-2"] == 80) | (expected["bbox-3"] == 90)
    )
    np.testing.assert_array_equal(cells["touches_border"], border)


def test_no_cells_and_no_pixel_size():
    cells = measure_cells(np.zeros((5, 6), "int32"), np.ones((1, 5, 6)), ["DNA"])
    assert len(cells) == 0 and list(cells.columns) == [
        *("object_number", "x_px", "y_px", "area_px", "area_um2", "touches_border", "mean_intensity_DNA")
    ]
    labels = np.zeros((5, 6), "int32")
    labels[2, 3] = 4
    cell = measure_cells(labels, np.full((1, 5, 6), 9), ["DNA"]).iloc[0]
    assert (cell["object_number"], cell["y_px"], cell["x_px"], cell["area_px"]) == (4, 2, 3, 1)
    assert np.isnan(cell["area_um2"]) and not cell["touches_border"] and cell["mean_intensity_DNA"] == 9
    with pytest.raises(ValueError, match="for 2 channel names"):
        measure_cells(labels, np.ones((1, 5, 6)), ["DNA", "ER"])
