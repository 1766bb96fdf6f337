"""Intensity scales are the percentiles of the sampled pixels, reproducible, and defined for constant channels."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from cellvim.data import intensity
from cellvim.data.intensity import (
    IntensityScale,
    cached_intensity_scale,
    estimate_intensity_scale,
    reference_wells,
)
from cellvim.data.plate import open_plate
from cellvim.data.plate_writer import PlateWriter
from cellvim.errors import ChannelError, MetadataError, PlateError


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int32"])
def test_scale_is_the_percentiles_of_all_pixels(make_plate, dtype):
    plate = open_plate(make_plate(dtype=dtype))
    scale = estimate_intensity_scale(plate, ["RNA", "DNA"], low_percentile=5, high_percentile=90)
    pixels = np.stack([f.read(["RNA", "DNA"]) for f in plate.fields], axis=1).reshape(2, -1)
    # integers are counted: one of the pixels' own values; floats are interpolated as NumPy's default does
    method = "inverted_cdf" if dtype in ("uint8", "uint16") else "linear"
    np.testing.assert_allclose(np.stack([scale.low, scale.high]), np.percentile(pixels, (5, 90), axis=1, method=method))
    assert scale.channel_names == ("RNA", "DNA")


def test_apply_maps_low_to_zero_and_high_to_one():
    scale = IntensityScale(("a", "b"), [10, 100], [20, 300])
    image = np.array([[[10, 15, 20, 0, 255]], [[100, 200, 300, 5000, 0]]], dtype="uint16")
    expected = np.array([[[0, 0.5, 1, 0, 2]], [[0, 0.5, 1, 2, 0]]], dtype="float32")
    scaled = scale.apply(image)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    np.testing.assert_allclose(scale.apply(image.astype(float)[..., ::-1])[..., ::-1], expected, rtol=1e-6)


def test_constant_channel_becomes_zero_and_nan_too():
    scale = IntensityScale(("a",), [7], [7])
    assert not scale.apply(np.full((1, 4, 4), 7, "uint8")).any()
    assert not scale.apply(np.full((1, 4, 4), 250, "uint8")).any()
    image = np.array([[[np.nan, np.inf, -np.inf, 0.5]]])
    np.testing.assert_array_equal(IntensityScale(("a",), [0], [1]).apply(image), [[[0, 2, 0, 0.5]]])


def test_apply_leaves_the_image_alone_and_checks_its_channels():
    scale = IntensityScale(("a",), [0], [2])
    image = np.ones((1, 3, 3), "float32")
    scale.apply(image)
    assert (image == 1).all()
    with pytest.raises(ValueError, match=r"expected \(1, H, W\) for the channels a"):
        scale.apply(np.ones((2, 3, 3)))
    for low, high in (([0, 1], [1]), ([np.nan], [1])):
        with pytest.raises(ValueError, match="finite numbers"):
            IntensityScale(("a",), low, high)


def test_scale_survives_json(make_plate):
    scale = estimate_intensity_scale(open_plate(make_plate(dtype="float32")), ["DNA", "ER"])
    back = IntensityScale.from_dict(json.loads(json.dumps(scale.to_dict())))
    assert back.channel_names == scale.channel_names and back.ceiling == scale.ceiling
    np.testing.assert_array_equal(back.low, scale.low)
    np.testing.assert_array_equal(back.high, scale.high)


def wells_of_levels(tmp_path, levels) -> object:
    """Write a plate whose wells are each of one intensity."""
    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA"]) as writer:
        for i, level in enumerate(levels):
            writer.write_field(f"{chr(65 + i // 12)}{i % 12 + 1}", "1", np.full((1, 8, 8), level, "uint16"))
        writer.finish()
    return open_plate(tmp_path / "p.zarr")


def test_sample_is_spread_over_rows_and_columns(tmp_path, monkeypatch):
    plate = wells_of_levels(tmp_path, range(96))
    read = []
    original = type(plate.fields[0]).read
    monkeypatch.setattr(type(plate.fields[0]), "read", lambda f, c=None: read.append(f.well) or original(f, c))
    first = estimate_intensity_scale(plate, ["DNA"], max_fields=24)
    wells, read[:] = list(read), []
    again = estimate_intensity_scale(plate, ["DNA"], max_fields=24)
    assert wells == read and (first.low == again.low).all() and (first.high == again.high).all()
    assert len(wells) == 24 and {w[0] for w in wells} == set("ABCDEFGH") and len({w[1:] for w in wells}) >= 8
    read[:] = []
    estimate_intensity_scale(plate, ["DNA"], max_fields=24, seed=1)
    assert read != wells
    assert 0 <= first.low[0] <= 4 and 91 <= first.high[0] <= 95


def test_unreadable_fields_are_skipped(tmp_path):
    plate = wells_of_levels(tmp_path, [1, 2, 3])
    shard = tmp_path / "p.zarr/A/03/1/0/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:10])
    assert estimate_intensity_scale(plate, ["DNA"]).high[0] == 2
    for well in ("01", "02"):
        (tmp_path / f"p.zarr/A/{well}/1/0/c/0/0/0").unlink()
    with pytest.raises(PlateError, match=r"none of the 3 fields sampled .* can be read \(A01/1, A02/1, A03/1\)"):
        estimate_intensity_scale(plate, ["DNA"])


def test_unknown_channel_is_an_error(make_plate):
    with pytest.raises(ChannelError, match="AGP"):
        estimate_intensity_scale(open_plate(make_plate()), ["AGP"])


def test_fields_of_different_types_are_combined(tmp_path):
    """One field is counted, the other sampled; the percentiles are those of all pixels."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 200, (1, 40, 50)).astype("uint16"), rng.random((1, 40, 50)).astype("float32") * 300]
    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA"]) as writer:
        for i, image in enumerate(images):
            writer.write_field(f"A{i + 1}", "1", image)
        writer.finish()
    scale = estimate_intensity_scale(open_plate(tmp_path / "p.zarr"), ["DNA"], low_percentile=2, high_percentile=98)
    expected = np.percentile(np.concatenate([image.ravel().astype(float) for image in images]), (2, 98))
    np.testing.assert_allclose([scale.low[0], scale.high[0]], expected)


def test_large_float_images_are_thinned(tmp_path):
    rng = np.random.default_rng(0)
    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA"]) as writer:
        for i in range(3):
            writer.write_field(f"A{i + 1}", "1", rng.normal(size=(1, 1000, 1200)).astype("float32"))
        writer.finish()
    scale = estimate_intensity_scale(open_plate(tmp_path / "p.zarr"), ["DNA"], low_percentile=2, high_percentile=98)
    # quantiles of a normal distribution; the sample of 900,000 is good to about 0.005
    np.testing.assert_allclose([scale.low[0], scale.high[0]], [-2.0537, 2.0537], atol=0.02)


def varied_plate(tmp_path, n_wells=96, size=64, seed=0, **finish):
    """Write a plate whose fields differ in level, as wells do, and are alike in noise."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(1000, 60, n_wells)
    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA", "ER"], pixel_size_um=1.0) as writer:
        for i, level in enumerate(levels):
            image = np.stack([rng.normal(level, 150, (size, size)), rng.normal(2 * level, 100, (size, size))])
            writer.write_field(f"{chr(65 + i // 12)}{i % 12 + 1}", "1", image.clip(0).astype("uint16"))
        writer.finish(**finish)
    return open_plate(tmp_path / "p.zarr")


def test_impossible_percentiles_are_errors(make_plate):
    with pytest.raises(ValueError, match="0 <= low < high <= 100"):
        estimate_intensity_scale(open_plate(make_plate()), ["ER"], low_percentile=60, high_percentile=40)


def test_scale_from_controls_uses_only_their_wells(tmp_path):
    wells = [f"{chr(65 + i // 12)}{i % 12 + 1:02d}" for i in range(24)]
    kinds = ["negcon" if w.endswith("2") else "trt" for w in wells]
    table = pd.DataFrame({"Metadata_pert_type": kinds}, index=wells)
    plate = varied_plate(tmp_path, 24, well_metadata=table)
    chosen = reference_wells(plate)
    assert chosen == ["A02", "A12", "B02", "B12"]
    scale = estimate_intensity_scale(plate, ["DNA"], wells=chosen, low_percentile=5, high_percentile=95)
    pixels = np.stack([f.read(["DNA"]) for f in plate.fields if f.well in chosen])
    assert [scale.low[0], scale.high[0]] == np.percentile(pixels, (5, 95), method="inverted_cdf").tolist()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"Compound": ["DMSO", "x", "y"]}, ["A01"]),
        ({"control_type": ["negcon", None, "poscon_cp"]}, ["A01"]),
        ({"solvent": ["DMSO", "DMSO", "water"]}, None),
        ({"dose": [1, 2, 3]}, None),
    ],
)
def test_controls_are_found_in_the_plate_map(make_plate, columns, expected):
    plate = open_plate(make_plate(well_metadata=pd.DataFrame(columns, index=["A01", "A02", "B03"])))
    if expected is None:
        with pytest.raises(MetadataError, match="negative controls"):
            reference_wells(plate)
    else:
        assert reference_wells(plate) == expected


def test_scale_is_estimated_again_only_if_anything_differs(make_plate, tmp_path, monkeypatch):
    path = make_plate()
    calls = []
    original = intensity.estimate_intensity_scale
    monkeypatch.setattr(intensity, "estimate_intensity_scale", lambda *a, **k: calls.append(1) or original(*a, **k))
    cache = tmp_path / "out" / "scale.json"
    first = cached_intensity_scale(open_plate(path), ["DNA"], cache)
    again = cached_intensity_scale(open_plate(path), ["DNA"], cache)
    assert calls == [1] and first.to_dict() == again.to_dict()
    cached_intensity_scale(open_plate(path), ["DNA"], cache, low_percentile=2)
    cached_intensity_scale(open_plate(path), ["ER"], cache, low_percentile=2)
    cached_intensity_scale(open_plate(make_plate("plate2.zarr", wells=("A01",))), ["ER"], cache, low_percentile=2)
    assert len(calls) == 4
    cache.write_text("{")
    assert cached_intensity_scale(open_plate(path), ["DNA"], cache).to_dict() == first.to_dict() and len(calls) == 5
    assert [p.name for p in cache.parent.iterdir()] == ["scale.json"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16"])
def test_scale_on_the_device_is_the_same(dtype):
    image = np.random.default_rng(0).integers(0, 255, (2, 9, 11)).astype(dtype)
    for scale in (
        IntensityScale(("a", "b"), [10, 100], [200, 100]),
        IntensityScale(("a", "b"), [50, 100], [60, 130], 10.0),
    ):
        on_device = scale.apply_on_device(torch.from_numpy(image.copy()))
        np.testing.assert_array_equal(on_device.numpy(), scale.apply(image))
    floats = np.array([[[np.nan, np.inf, -np.inf, 0.5]]], "float32")
    scale = IntensityScale(("a",), [0], [1])
    np.testing.assert_array_equal(scale.apply_on_device(torch.from_numpy(floats)).numpy(), scale.apply(floats))
