"""Small labelled crops and plates to train on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # synthetic_plate


def write_crops(folder: Path, *, plates: int = 4, per_class: int = 4, size: int = 16, seed: int = 0) -> Path:
    """Write one folder per class: bright squares ("large") or dots ("small"), ``per_class`` of each per plate."""
    rng = np.random.default_rng(seed)
    for name, half in (("small", 1), ("large", 4)):
        (folder / name).mkdir(parents=True)
        for plate in range(plates):
            for number in range(per_class):
                image = rng.normal(40, 5, (size, size))
                y, x = rng.integers(5, size - 5, 2)
                image[y - half : y + half, x - half : x + half] += 150
                tifffile.imwrite(folder / name / f"P{plate}_{number}.tif", image.clip(0, 255).astype(np.uint8))
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Small models are slower with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def crop_folder(tmp_path_factory) -> Path:
    return write_crops(tmp_path_factory.mktemp("crops") / "labelled")


@pytest.fixture(scope="session")
def labelled_plate(tmp_path_factory) -> Path:
    """12 wells with 2 channels, half of them controls; one column of labels for each kind of error."""
    from synthetic_plate import draw_field, write_plate

    wells = [f"{row}{column:02d}" for row in "ABC" for column in range(1, 5)]
    fields, plate_map = {}, {}
    for number, well in enumerate(wells):
        image = draw_field(number)
        treated = number % 2 == 1
        if treated:
            image[1] = 2 * image[1]
        fields[well] = [image]
        plate_map[well] = {
            "compound": "drug" if treated else "DMSO",
            "constant": "all",
            "own": f"compound {well}",
            "few": "a" if number == 0 else "b" if number == 1 else "",
        }
    return write_plate(
        tmp_path_factory.mktemp("plates") / "labelled.zarr", fields, ["Hoechst", "GFP"], plate_map=plate_map
    )
