"""Each crop is returned once and as defined with any number of workers; memory is bounded; bad fields are reported."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from cellvim.data.cells import open_cells
from cellvim.data.crops import CropSpec, cut_crops, cut_on_device, place_windows, stream_crops, tile_centers
from cellvim.data.intensity import IntensityScale
from cellvim.data.plate import open_plate

SCALE = IntensityScale(("RNA", "DNA"), [10, 20], [150, 190])


@pytest.fixture
def with_cells(make_plate, tmp_path):
    """Return a plate of random fields and cells at given places, some of them at the border."""
    path = make_plate(wells=("A01", "A02", "B03", "B04"), size=(40, 52))
    rng = np.random.default_rng(0)
    lines = ["well,site,number,x,y"]
    for well in ("A01", "A02", "B03", "B04"):
        for site in (1, 2):
            lines += [f"{well},{site},{k + 3},{rng.uniform(0, 51)},{rng.uniform(0, 39)}" for k in range(7)]
    (tmp_path / "cells.csv").write_text("\n".join(lines))
    plate = open_plate(path)
    return plate, open_cells(tmp_path / "cells.csv", plate)


@pytest.mark.parametrize("border", ["pad", "reflect", "shift", "drop"])
@pytest.mark.parametrize("masked", [False, True])
def test_crops_are_those_of_the_scaled_field(with_cells, border, masked):
    plate, cells = with_cells
    spec = CropSpec("cell", 12, border=border, mask_neighbours=masked)
    seen = list(stream_crops(plate.fields, ["RNA", "DNA"], spec, scale=SCALE, cells=cells, workers=3))
    assert [s.field.name for s in seen] == [f.name for f in plate.fields]
    for one in seen:
        raw = one.field.read(["RNA", "DNA"])
        found = cells.find(one.field, raw, ["RNA", "DNA"])
        first, kept = place_windows(found.centers, 12, raw.shape[1:], border=border)
        masks = {"labels": found.labels, "numbers": found.table["object_number"].to_numpy()[kept]} if masked else {}
        expected = cut_crops(SCALE.apply(raw), first, 12, border=border, **masks)
        np.testing.assert_array_equal(one.crops.numpy(), expected)
        assert len(one.table) == len(expected) and one.crops.dtype == torch.float32
    assert any(len(s.crops) < 7 for s in seen) == (border == "drop")


def test_tiles_and_whole_fields(with_cells):
    plate, _ = with_cells
    raw = plate.fields[2].read(["RNA", "DNA"])
    spec = CropSpec("tile", 16, overlap=0.5)
    (one,) = stream_crops(plate.fields[2:3], ["RNA", "DNA"], spec, scale=SCALE)
    centers = tile_centers(40, 52, 16, 8)
    first, _ = place_windows(centers, 16, (40, 52))
    np.testing.assert_array_equal(one.crops.numpy(), cut_crops(SCALE.apply(raw), first, 16))
    np.testing.assert_array_equal(one.table[["y_px", "x_px"]], centers)
    (one,) = stream_crops(plate.fields[2:3], ["RNA", "DNA"], CropSpec("field"), scale=SCALE)
    np.testing.assert_array_equal(one.crops.numpy(), SCALE.apply(raw)[None])


def test_resampled_crops_are_those_of_the_scaled_and_resampled_field(with_cells):
    plate, cells = with_cells
    raw = plate.fields[0].read(["RNA", "DNA"])
    found = cells.find(plate.fields[0], raw, ["RNA", "DNA"])
    spec = CropSpec("cell", 12, um_per_px=0.299)
    (one,) = stream_crops(plate.fields[:1], ["RNA", "DNA"], spec, scale=SCALE, cells=cells)
    assert one.crops.shape == (7, 2, 12, 12)
    np.testing.assert_allclose(one.table["x_px"], found.centers[:, 1])
    image = torch.nn.functional.interpolate(
        SCALE.apply_on_device(torch.from_numpy(raw))[None], size=(80, 104), mode="bilinear", antialias=True
    )[0]
    first = np.floor((found.centers + 0.5) * 2 - 0.5 + 0.5).astype(int) - 6
    np.testing.assert_allclose(one.crops, cut_on_device(image, torch.from_numpy(first), 12), atol=1e-6)


def test_bad_field_is_told_and_the_rest_goes_on(with_cells):
    plate, cells = with_cells
    from pathlib import Path

    chunk = Path(plate.path) / "A/02/1/0/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:30])
    seen = list(stream_crops(plate.fields, ["DNA", "RNA"], CropSpec("cell", 8), cells=cells))
    assert [s.failed is not None for s in seen] == [i == 2 for i in range(8)]
    assert "A02/1" in seen[2].failed and len(seen[2].table) == 0 and len(seen[3].crops) == 7


def test_stream_can_be_left_early(with_cells):
    plate, cells = with_cells
    for one in stream_crops(plate.fields, ["DNA"], CropSpec("cell", 8), cells=cells, ahead=2):
        assert len(one.crops)
        break
    with pytest.raises(ValueError, match="source of cells"):
        next(stream_crops(plate.fields, ["DNA"], CropSpec("cell", 8)))


def test_memory_is_that_of_a_few_fields(make_plate):
    """At most the fields read ahead, the one in use and the one being cut are in memory, each with its crops."""
    sites, ahead = 24, 3
    plate = open_plate(make_plate("plate.zarr", wells=("A01",), sites=tuple(map(str, range(sites))), size=(300, 300)))
    next(
        iter(stream_crops(plate.fields[:1], ["DNA", "ER"], CropSpec("tile", 64)))
    )  # imports and compiles what it needs
    tracemalloc.start()
    n = sum(len(s.crops) for s in stream_crops(plate.fields, ["DNA", "ER"], CropSpec("tile", 64), ahead=ahead))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 25 * sites
    bytes_per_field = 25 * 2 * 64**2 * 4 + 2 * 300**2 * 2
    assert peak < (ahead + 2) * bytes_per_field + 0.5e6
