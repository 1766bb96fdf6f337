"""Intensity scales are the percentiles of the sampled pixels, the same every time, and never divide by nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cellvim.data.normalize import IntensityScale, estimate_intensity_scale
from cellvim.data.plate import open_plate
from cellvim.data.writer import PlateWriter
from cellvim.errors import ChannelError, PlateError


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


def test_unreadable_fields_are_passed_over(tmp_path):
    plate = wells_of_levels(tmp_path, [1, 2, 3])
    shard = tmp_path / "p.zarr/A/03/1/0/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:10])
    assert estimate_intensity_scale(plate, ["DNA"]).high[0] == 2
    for well in ("01", "02"):
        (tmp_path / f"p.zarr/A/{well}/1/0/c/0/0/0").unlink()
    with pytest.raises(PlateError, match=r"none of the 3 fields sampled .* can be read \(A01/1, A02/1, A03/1\)"):
        estimate_intensity_scale(plate, ["DNA"])


def test_unknown_channel_is_not_passed_over(make_plate):
    with pytest.raises(ChannelError, match="AGP"):
        estimate_intensity_scale(open_plate(make_plate()), ["AGP"])


def test_large_float_images_are_thinned(tmp_path):
    rng = np.random.default_rng(0)
    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA"]) as writer:
        for i in range(3):
            writer.write_field(f"A{i + 1}", "1", rng.normal(size=(1, 1000, 1200)).astype("float32"))
        writer.finish()
    scale = estimate_intensity_scale(open_plate(tmp_path / "p.zarr"), ["DNA"], low_percentile=2, high_percentile=98)
    # quantiles of a normal distribution; the sample of 900,000 is good to about 0.005
    np.testing.assert_allclose([scale.low[0], scale.high[0]], [-2.0537, 2.0537], atol=0.02)
