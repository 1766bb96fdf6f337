"""Small plates and TIFF folders for the data tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from cellvim.data.plate_writer import PlateWriter


@pytest.fixture
def make_plate(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a plate of random fields: wells, sites a well, channels, size, type."""

    def make(
        name: str = "plate.zarr",
        *,
        wells: tuple[str, ...] = ("A01", "A02", "B03"),
        sites: tuple[str, ...] = ("1", "2"),
        channels: tuple[str, ...] = ("DNA", "ER", "RNA"),
        size: tuple[int, int] = (23, 31),
        dtype: str = "uint16",
        pixel_size_um: float | None = 0.598,
        seed: int = 0,
        **finish: object,
    ) -> Path:
        rng = np.random.default_rng(seed)
        target = tmp_path / name
        with PlateWriter(target, name="test", channel_names=channels, pixel_size_um=pixel_size_um) as writer:
            for well in wells:
                for site in sites:
                    writer.write_field(well, site, rng.integers(1, 200, (len(channels), *size)).astype(dtype))
            writer.finish(**finish)
        return target

    return make


@pytest.fixture
def make_foreign_plate(tmp_path: Path) -> Callable[..., tuple[Path, np.ndarray]]:
    """Return a function that writes a one-field plate as other tools do, straight with Zarr: 0.4 or 0.5, any axes."""

    def make(version: str, axes: str = "tczyx", sizes: dict[str, int] | None = None) -> tuple[Path, np.ndarray]:
        sizes = {"t": 1, "c": 2, "z": 1, "y": 12, "x": 17} | (sizes or {})
        data = np.random.default_rng(1).integers(1, 999, [sizes[a] for a in axes]).astype("uint16")
        path = tmp_path / f"foreign_{version}_{axes}.zarr"
        zarr_format = 2 if version == "0.4" else 3

        def attributes(content: dict) -> dict:
            return content if version == "0.4" else {"ome": {"version": version, **content}}

        types = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
        units = {"z": {"unit": "micrometer"}, "y": {"unit": "nanometer"}, "x": {"unit": "nanometer"}}
        scale = [{"y": 325.0, "x": 325.0}.get(a, 1.0) for a in axes]
        multiscales = [
            {
                "version": version,
                "axes": [{"name": a, "type": types[a], **units.get(a, {})} for a in axes],
                "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}],
            }
        ]
        omero = {
            "channels": [{"label": f"Dye {i}", "color": "00FF00"} for i in range(sizes["c"] if "c" in axes else 1)]
        }
        plate = {
            "rows": [{"name": "C"}],
            "columns": [{"name": "7"}],
            "wells": [{"path": "C/7", "rowIndex": 0, "columnIndex": 0}],
            "name": "",
        }
        root = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
        root.attrs.update(attributes({"plate": plate}))
        well = root.create_group("C/7")
        well.attrs.update(attributes({"well": {"images": [{"path": "0"}]}}))
        image = well.create_group("0")
        image.attrs.update(attributes({"multiscales": multiscales, "omero": omero}))
        image.create_array("0", data=data, chunks=tuple(min(8, n) for n in data.shape))
        return path, data

    return make


@pytest.fixture
def make_tiffs(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a folder of random TIFFs, one for each name."""

    def make(names: list[str], *, folder: str = "images", size: tuple[int, int] = (20, 26)) -> Path:
        rng = np.random.default_rng(3)
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, rng.integers(0, 4000, size).astype("uint16"), compression="zlib")
        return tmp_path / folder

    return make
