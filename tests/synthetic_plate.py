"""A small OME-Zarr plate of drawn nuclei, for tests that need a plate but not the importer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr


def draw_field(seed: int, n_nuclei: int = 6, size: int = 128, n_channels: int = 2) -> np.ndarray:
    """(C, H, W) uint16: round nuclei on a grid in every channel, brighter in some channels than in others."""
    rng = np.random.default_rng(seed)
    image = rng.normal(200, 5, (n_channels, size, size))
    y, x = np.mgrid[:size, :size]
    spots = [(20 + 40 * i, 20 + 40 * j) for i in range(size // 40) for j in range(size // 40)]
    for k in rng.permutation(len(spots))[:n_nuclei]:
        cy, cx = spots[k] + rng.uniform(-4, 4, 2)
        inside = (y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(9, 11) ** 2
        for channel in range(n_channels):
            image[channel][inside] += rng.uniform(800, 1200) / (channel + 1)
    return image.clip(0, 65535).astype(np.uint16)


def write_plate(
    path: Path,
    fields: dict[str, list[np.ndarray]],
    channel_names: list[str],
    *,
    pixel_size_um: float | None = 0.5,
    plate_map: dict[str, dict[str, object]] | None = None,
) -> Path:
    """Write ``{"A01": [image of site 0, ...]}`` as OME-Zarr 0.5."""
    plate_map = plate_map or {}
    root = zarr.open_group(path, mode="w", zarr_format=3)
    rows, columns = sorted({w[0] for w in fields}), sorted({str(int(w[1:])) for w in fields}, key=int)
    root.attrs["ome"] = {
        "version": "0.5",
        "plate": {
            "name": path.name.removesuffix(".zarr"),
            "rows": [{"name": r} for r in rows],
            "columns": [{"name": c} for c in columns],
            "wells": [
                {
                    "path": f"{w[0]}/{int(w[1:])}",
                    "rowIndex": rows.index(w[0]),
                    "columnIndex": columns.index(str(int(w[1:]))),
                }
                for w in fields
            ],
        },
    }
    names = sorted({name for values in plate_map.values() for name in values})
    root.attrs["cellvim"] = {"well_columns": names, "wells": plate_map}
    unit = {} if pixel_size_um is None else {"unit": "micrometer"}
    for well, images in fields.items():
        group = root.create_group(f"{well[0]}/{int(well[1:])}")
        group.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": str(i)} for i in range(len(images))]}}
        for site, image in enumerate(images):
            one = group.create_group(str(site))
            one.attrs["ome"] = {
                "version": "0.5",
                "multiscales": [
                    {
                        "axes": [
                            {"name": "c", "type": "channel"},
                            {"name": "y", "type": "space", **unit},
                            {"name": "x", "type": "space", **unit},
                        ],
                        "datasets": [
                            {
                                "path": "0",
                                "coordinateTransformations": [
                                    {"type": "scale", "scale": [1.0, pixel_size_um or 1.0, pixel_size_um or 1.0]}
                                ],
                            }
                        ],
                    }
                ],
                "omero": {"channels": [{"label": name, "color": "FFFFFF"} for name in channel_names]},
            }
            one.create_array("0", data=image, chunks=image.shape)
    return path


def break_chunk(plate: Path, well: str, site: int = 0) -> None:
    """Overwrite the field's only chunk with bytes that are not a valid chunk."""
    chunk = plate / well[0] / str(int(well[1:])) / str(site) / "0" / "c" / "0" / "0" / "0"
    assert chunk.exists()
    chunk.write_bytes(b"not a chunk")
