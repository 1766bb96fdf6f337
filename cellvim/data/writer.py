"""Writing a plate: OME-Zarr 0.5 HCS, one sharded, zstd-compressed array a field, named as final only when whole."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.channels import display_color
from cellvim.data.wells import natural_key, well_position
from cellvim.errors import OutputError

if TYPE_CHECKING:
    import pandas as pd

CHUNK_SIDE = 2048  # px: a field up to this size is one chunk a channel, larger ones are divided evenly
ZSTD_LEVEL = 3


class PlateWriter:
    """Writes a plate under ``<target>.partial`` and renames it to ``target`` in `finish`.

    Used as a context manager: leaving the block without `finish` removes what was written. `write_field` may be
    called from several threads.

    Parameters
    ----------
    target
        Folder of the new plate.
    name
        Name of the plate, kept in its metadata.
    channel_names
        In the order in which they are stored.
    pixel_size_um
        Side of a pixel, or None when unknown.
    overwrite
        Replace an OME-Zarr that lies at ``target``. Anything else is never replaced.

    Raises
    ------
    OutputError
        The target exists, or cannot be written.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        name: str,
        channel_names: Sequence[str],
        pixel_size_um: float | None = None,
        overwrite: bool = False,
    ) -> None:
        self.target = Path(target)
        self.name = name
        self.channel_names = list(channel_names)
        self.pixel_size_um = pixel_size_um
        check_target(self.target, overwrite=overwrite)
        self.partial = self.target.with_name(self.target.name + ".partial")
        self._overwrite = overwrite
        self._windows: dict[tuple[str, str], np.ndarray] = {}  # (well, site) -> (C, 4) min, low, high, max
        self._finished = False

    def __enter__(self) -> PlateWriter:
        import zarr

        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.partial.exists():  # left by a run that was killed
                shutil.rmtree(self.partial)
            zarr.create_group(store=str(self.partial), zarr_format=3)
        except OSError as error:
            raise OutputError(f"{self.partial} cannot be written: {error.strerror or error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{self.target} cannot be written: {error.strerror or error}.") from error

    def write_field(self, well: str, site: str, image: np.ndarray) -> None:
        """Write the pixels (C, H, W) of one field; the well in any spelling, the site in letters and digits."""
        import zarr
        from zarr.codecs import ZstdCodec

        if image.ndim != 3 or image.shape[0] != len(self.channel_names) or 0 in image.shape:
            raise ValueError(f"expected an image ({len(self.channel_names)}, H, W), not {image.shape}")
        if not site.isalnum():
            raise ValueError(f"a site is named by letters and digits, not {site!r}")
        chunk, shard = _layout(image.shape)
        zarr.create_array(
            store=str(self.partial.joinpath(*_well_path(well), site, "0")),
            data=np.ascontiguousarray(image),
            chunks=chunk,
            shards=shard,
            compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
            dimension_names=("c", "y", "x"),
            fill_value=0,
            # An all-zero field is stored too: a chunk that is absent has been lost.
            config={"write_empty_chunks": True},
        )
        sample = image.reshape(len(image), -1)
        sample = sample[:, :: max(1, sample.shape[1] // 20_000)].astype(np.float64)
        self._windows[well, site] = np.nan_to_num(np.nanpercentile(sample, (0, 0.5, 99.8, 100), axis=1).T)

    def finish(
        self,
        *,
        well_metadata: pd.DataFrame | None = None,
        notes: Sequence[str] = (),
        provenance: dict[str, Any] | None = None,
    ) -> Path:
        """Write all metadata, check it, and give the plate its final name.

        Parameters
        ----------
        well_metadata
            Plate map with wells as the index; columns are kept as they are.
        notes
            What `Plate.oddities` is to tell about this plate.
        provenance
            How the plate was made; JSON.
        """
        from yaozarrs import v05

        if not self._windows:
            raise ValueError("no field was written")
        sites: dict[str, list[str]] = {}
        for well, site in self._windows:
            sites.setdefault(well, []).append(site)
        wells = sorted(sites, key=well_position)
        paths = {well: _well_path(well) for well in wells}
        rows = sorted({row for row, _ in paths.values()}, key=lambda r: (len(r), r))
        columns = sorted({column for _, column in paths.values()})
        image_ome = self._image_metadata()
        for well in wells:
            folder = self.partial.joinpath(*paths[well])
            for site in sites[well]:
                _write_group(folder / site, {"ome": image_ome})
            ordered = sorted(sites[well], key=natural_key)
            ome = v05.Well.model_validate({"well": {"images": [{"path": s, "acquisition": 0} for s in ordered]}})
            _write_group(folder, {"ome": _dump(ome)})
        for row in rows:
            _write_group(self.partial / row, {})
        most = max(len(s) for s in sites.values())
        plate = v05.Plate.model_validate(
            {
                "plate": {
                    "name": self.name,
                    "rows": [{"name": r} for r in rows],
                    "columns": [{"name": c} for c in columns],
                    "wells": [
                        {"path": "/".join(p), "rowIndex": rows.index(p[0]), "columnIndex": columns.index(p[1])}
                        for p in paths.values()
                    ],
                    "field_count": most,
                    "acquisitions": [{"id": 0, "maximumfieldcount": most}],
                }
            }
        )
        own: dict[str, Any] = {"format": 1, **_plate_map(well_metadata), "notes": list(notes)}
        if provenance:
            own["provenance"] = provenance
        _write_group(self.partial, {"ome": _dump(plate), "cellvim": own})
        self._rename()
        return self.target

    def _image_metadata(self) -> dict[str, Any]:
        """Return the OME attributes that all fields share; the display window is the whole plate's."""
        from yaozarrs import v05

        unit = {"unit": "micrometer"} if self.pixel_size_um else {}
        size = float(self.pixel_size_um or 1.0)
        windows = np.stack(list(self._windows.values()))  # (fields, C, 4)
        channels = []
        for i, name in enumerate(self.channel_names):
            low, start, end, high = windows[:, i].min(0)[0], *np.median(windows[:, i, 1:3], axis=0), windows[:, i].max()
            channels.append(
                {
                    "label": name,
                    "color": display_color(name, i),
                    "active": True,
                    "window": {"min": low, "start": start, "end": max(end, start + 1e-6), "max": high},
                }
            )
        image = v05.Image.model_validate(
            {
                "multiscales": [
                    {
                        "name": "0",
                        "axes": [
                            {"name": "c", "type": "channel"},
                            {"name": "y", "type": "space", **unit},
                            {"name": "x", "type": "space", **unit},
                        ],
                        "datasets": [
                            {
                                "path": "0",
                                "coordinateTransformations": [{"type": "scale", "scale": [1.0, size, size]}],
                            }
                        ],
                    }
                ],
                "omero": {"channels": channels, "rdefs": {"model": "color"}},
            }
        )
        return _dump(image)

    def _rename(self) -> None:
        replaced = self.target.with_name(self.target.name + ".replaced.partial")
        if self.target.exists():
            check_target(self.target, overwrite=self._overwrite)
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.target, replaced)
        os.replace(self.partial, self.target)
        self._finished = True
        shutil.rmtree(replaced, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` unless a plate may be written at ``target``: early, before any work is done."""
    if not target.name or target.name in (".", ".."):
        raise OutputError(f"'{target}' cannot be a plate's name; give one such as plate.zarr.")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{target} exists already; choose another name or replace it with --overwrite.")
    is_zarr = (target / "zarr.json").is_file() or (target / ".zgroup").is_file()
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.is_symlink() or not (is_zarr or is_empty):
        raise OutputError(f"{target} is not an OME-Zarr; --overwrite replaces plates only. Remove it or rename.")


def _layout(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (chunk, shard): a chunk is one channel (or an even part of it), a shard is the whole field."""
    parts = [max(1, math.ceil(n / CHUNK_SIDE)) for n in shape[1:]]
    chunk = [math.ceil(n / p) for n, p in zip(shape[1:], parts, strict=True)]
    return (1, *chunk), (shape[0], *(c * p for c, p in zip(chunk, parts, strict=True)))


def _well_path(well: str) -> tuple[str, str]:
    """Return (row, column) folder names: ``("A", "01")``."""
    from cellvim.data.wells import canonical_well

    name = canonical_well(well)
    return name[:-2], name[-2:]


def _dump(model: Any) -> dict[str, Any]:
    return model.model_dump(mode="json", exclude_none=True, by_alias=True)


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    import json

    folder.mkdir(parents=True, exist_ok=True)
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (folder / "zarr.json").write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def _plate_map(table: pd.DataFrame | None) -> dict[str, Any]:
    if table is None:
        return {"well_columns": [], "wells": {}}
    columns = [str(c) for c in table.columns]
    wells = {
        str(well): {c: _plain(v) for c, v in zip(columns, row, strict=True)}
        for well, row in zip(table.index, table.itertuples(index=False, name=None), strict=True)
    }
    return {"well_columns": columns, "wells": wells}


def _plain(value: Any) -> Any:
    """Return a JSON value: NumPy scalars as Python's, missing as None, anything else as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
