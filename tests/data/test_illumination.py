"""The light that was put on synthetic fields is found again and divided out."""

from __future__ import annotations

import numpy as np
import pytest

from cellvim.data.illumination import Illumination, estimate_illumination
from cellvim.data.intensity import estimate_intensity_scale
from cellvim.data.plate import open_plate
from cellvim.data.plate_writer import PlateWriter
from cellvim.errors import InputError, PlateError

SIZE = (256, 320)


def light() -> np.ndarray:
    """Return two shapes of light, one falling off to the corners, one tilted; each 1 on average."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SIZE), indexing="ij")
    shapes = np.stack([1 - 0.35 * (y**2 + x**2) / 2, 1 + 0.3 * x])
    return shapes / shapes.mean(axis=(1, 2), keepdims=True)


def plate_of_cells(tmp_path, n_fields=48):
    """Write fields of discs anywhere on a dim background, under the light, with noise; return plate and truth."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    truth = []
    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA", "ER"]) as writer:
        for i in range(n_fields):
            flat = np.full((2, *SIZE), 200.0)
            for _ in range(40):
                cy, cx = (rng.uniform(-14, n + 14) for n in SIZE)  # cut by the edge as often as anywhere
                r = rng.uniform(6, 14)
                near = tuple(slice(max(0, int(c - r)), max(0, int(c + r) + 2)) for c in (cy, cx))
                disc = (y[near] - cy) ** 2 + (x[near] - cx) ** 2 < r**2
                flat[(slice(None), *near)] += disc * rng.uniform(300, 900)
            truth.append(flat)
            image = rng.poisson(flat * light()).astype("uint16")
            writer.write_field(f"{chr(65 + i // 12)}{i % 12 + 1}", "1", image)
        writer.finish()
    return open_plate(tmp_path / "p.zarr"), truth


def test_light_is_found_and_divided_out(tmp_path):
    plate, truth = plate_of_cells(tmp_path)
    found = estimate_illumination(plate, ["DNA", "ER"])
    error = found.at(*SIZE) / light() - 1
    assert np.sqrt((error**2).mean()) < 0.04  # the light itself varies by 0.08 and 0.17
    for field, flat in list(zip(plate.fields, truth, strict=True))[:3]:
        raw, corrected = field.read().astype(float), found.apply(field.read())
        for c in range(2):
            before, after = (np.std(image[c] / flat[c]) for image in (raw, corrected))
            noise = np.std(np.random.default_rng(0).poisson(flat[c]) / flat[c])
            assert after**2 - noise**2 < 0.35 * (before**2 - noise**2)  # most of what is not noise is gone
    scale = estimate_intensity_scale(plate, ["DNA", "ER"], illumination=found)
    assert scale.high[0] > scale.low[0] > 0


def test_correction_survives_saving_and_checks_its_input(tmp_path):
    one = Illumination(("DNA",), np.linspace(0.5, 1.5, 12).reshape(1, 3, 4))
    one.save(tmp_path / "light.npz")
    back = Illumination.load(tmp_path / "light.npz")
    assert back.digest == one.digest and back.channel_names == ("DNA",)
    np.testing.assert_array_equal(back.apply(np.ones((1, 5, 7), "uint8")), 1 / one.at(5, 7))
    with pytest.raises(ValueError, match="above 0"):
        Illumination(("DNA",), np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match="expected"):
        one.apply(np.ones((2, 5, 7)))
    (tmp_path / "light.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="cannot be read"):
        Illumination.load(tmp_path / "light.npz")


def test_few_or_unequal_fields_are_refused(make_plate, tmp_path):
    with pytest.raises(PlateError, match="at least 8 are needed"):
        estimate_illumination(open_plate(make_plate()), ["DNA"])
    with PlateWriter(tmp_path / "u.zarr", name="u", channel_names=["DNA"]) as writer:
        for i in range(9):
            writer.write_field(f"A{i + 1}", "1", np.ones((1, 20 + i, 20), "uint8"))
        writer.finish()
    with pytest.raises(PlateError, match="fields of one size"):
        estimate_illumination(open_plate(tmp_path / "u.zarr"), ["DNA"])
