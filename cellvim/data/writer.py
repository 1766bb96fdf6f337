"""Writing a plate: OME-Zarr 0.5 HCS, one sharded, zstd-compressed array a field, named as final only when whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.channels import display_color
from cellvim.data.wells import canonical_well, natural_key, well_position
from cellvim.errors import FieldReadError, OutputError, listing

if TYPE_CHECKING:
    import pandas as pd

CHUNK_SIDE = 2048  # px: a field up to this size is one chunk a channel, larger ones are divided evenly
ZSTD_LEVEL = 3
JOURNAL = "written.jsonl"  # in the partial plate: what is written already


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
    job
        What tells this writing from any other, such as a hash of the files it is made of. Fields that the same job
        left under ``<target>.partial`` when it was killed are kept, and are in `done`.

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
        job: str | None = None,
    ) -> None:
        self.target = Path(target)
        self.name = name
        self.channel_names = list(channel_names)
        self.pixel_size_um = pixel_size_um
        check_target(self.target, overwrite=overwrite)
        self.partial = self.target.with_name(self.target.name + ".partial")
        self._overwrite = overwrite
        self._windows: dict[tuple[str, str], np.ndarray] = {}  # (well, site) -> (C, 4) min, low, high, max
        self._digests: dict[tuple[str, str], str] = {}  # (well, site) -> hash of the pixels that were handed over
        self._positions: dict[tuple[str, str], tuple[float, float]] = {}
        self._without_value: dict[tuple[str, str], list[float]] = {}  # share of pixels a channel that are no number
        self._job = job
        self._journal = threading.Lock()
        self._finished = False

    @property
    def done(self) -> set[tuple[str, str]]:
        """(well, site) of the fields that are written."""
        return set(self._windows)

    def __enter__(self) -> PlateWriter:
        import zarr

        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.partial.exists() and not self._take_up():  # left by another run that was killed
                shutil.rmtree(self.partial)
            if not self.partial.exists():
                zarr.create_group(store=str(self.partial), zarr_format=3)
                if self._job is not None:
                    self._note({"job": self._job})
        except OSError as error:
            raise OutputError(f"{self.partial} cannot be written: {error.strerror or error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt) and self._job is not None
        if not self._finished and not interrupted:
            shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{self.target} cannot be written: {error.strerror or error}.") from error

    def write_field(
        self, well: str, site: str, image: np.ndarray, *, position_um: tuple[float, float] | None = None
    ) -> None:
        """Write the pixels (C, H, W) of one field; the well in any spelling, the site in letters and digits.

        ``position_um`` is where the field's middle lies, (x, y).
        """
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
        no_value = _share_without_value(image)
        sample = image.reshape(len(image), -1)
        sample = sample[:, :: max(1, sample.shape[1] // 20_000)].astype(np.float64)
        sample[~np.isfinite(sample)] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a channel without a single number
            window = np.nan_to_num(np.nanpercentile(sample, (0, 0.5, 99.8, 100), axis=1).T)
        digest = _digest(image)
        with self._journal:
            self._windows[well, site], self._digests[well, site] = window, digest
            if position_um is not None:
                self._positions[well, site] = position_um
            entry = {"well": well, "site": site, "window": window.tolist(), "digest": digest, "position": position_um}
            if any(no_value):
                self._without_value[well, site] = entry["without_value"] = no_value
            if self._job is not None:
                self._note(entry)

    def _note(self, entry: dict[str, Any]) -> None:
        with (self.partial / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _take_up(self) -> bool:
        """Read what the same job wrote before it was killed; say whether there is anything to go on from."""
        if self._job is None:
            return False
        try:
            lines = (self.partial / JOURNAL).read_text(encoding="utf-8").splitlines()
            if json.loads(lines[0]) != {"job": self._job}:
                return False
            for line in lines[1:]:
                entry = json.loads(line)
                key = (str(entry["well"]), str(entry["site"]))
                if not self.partial.joinpath(*_well_path(key[0]), key[1], "0", "zarr.json").is_file():
                    continue
                self._windows[key], self._digests[key] = np.array(entry["window"], float), str(entry["digest"])
                if entry["position"] is not None:
                    self._positions[key] = tuple(entry["position"])
                if "without_value" in entry:
                    self._without_value[key] = list(entry["without_value"])
        except (OSError, IndexError, KeyError, TypeError, ValueError):
            pass  # the line that was being written: up to there it is good
        return bool(self._windows)

    def odd_pixels(self) -> list[str]:
        """Say in which fields pixels are NaN or infinite, one sentence a channel."""
        odd = []
        for i, name in enumerate(self.channel_names):
            fields = {"/".join(key): shares[i] for key, shares in sorted(self._without_value.items()) if shares[i]}
            blank = [field for field, share in fields.items() if share == 1]
            if blank:
                odd.append(f"channel {name} is NaN or infinite in every pixel of {len(blank)} fields: {listing(blank)}")
            if some := [field for field, share in fields.items() if share < 1]:
                odd.append(f"channel {name} is NaN or infinite in some pixels of {len(some)} fields: {listing(some)}")
        return odd

    def verify(self, count: int) -> int:
        """Read fields back, evenly spread, and hold them against what was handed over; return how many.

        Raises
        ------
        OutputError
            A field does not read back as it was written.
        """
        from cellvim.data.plate import open_plate

        fields = {(f.well, f.site): f for f in open_plate(self.partial).fields}
        keys = sorted(self._digests)
        chosen = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, min(count, len(keys))).astype(int))]
        for well, site in chosen:
            field = fields.get((canonical_well(well), site))
            try:
                same = field is not None and _digest(field.read()) == self._digests[well, site]
            except FieldReadError as error:
                raise OutputError(f"{self.target}: field {well}/{site} cannot be read back: {error}") from error
            if not same:
                raise OutputError(
                    f"{self.target}: field {well}/{site} does not read back as it was written. Check the disk, and "
                    "import again."
                )
        return len(chosen)

    def finish(
        self,
        *,
        well_metadata: pd.DataFrame | None = None,
        notes: Sequence[str] = (),
        provenance: dict[str, Any] | None = None,
        verify: int = 0,
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
        verify
            How many fields to read back before the plate gets its name.

        Raises
        ------
        OutputError
            A field does not read back as it was written.
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
                _write_group(folder / site, {"ome": self._placed(image_ome, well, site)})
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
        if verify and provenance is not None:
            provenance = {**provenance, "verified_fields": min(verify, len(self._windows))}
        own: dict[str, Any] = {"format": 1, **_plate_map(well_metadata), "notes": [*notes, *self.odd_pixels()]}
        if provenance:
            own["provenance"] = provenance
        _write_group(self.partial, {"ome": _dump(plate), "cellvim": own})
        if verify:
            self.verify(verify)
        (self.partial / JOURNAL).unlink(missing_ok=True)
        self._rename()
        return self.target

    def _placed(self, ome: dict[str, Any], well: str, site: str) -> dict[str, Any]:
        """Return a field's metadata with the place of its first pixel in µm, where its position is known."""
        position = self._positions.get((well, site))
        if position is None or not self.pixel_size_um:
            return ome
        ome = json.loads(json.dumps(ome))
        shape = json.loads((self.partial.joinpath(*_well_path(well), site, "0", "zarr.json")).read_text())["shape"]
        (x, y), size = position, self.pixel_size_um
        corner = [0.0, y - size * (shape[1] - 1) / 2, x - size * (shape[2] - 1) / 2]
        transforms = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
        transforms.append({"type": "translation", "translation": corner})
        return ome

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
                "omero": {"channels": channels, "rdefs": {"defaultT": 0, "defaultZ": 0, "model": "color"}},
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


def _share_without_value(image: np.ndarray) -> list[float]:
    """Return the share of each channel's pixels that are NaN or infinite; only floats can be."""
    if image.dtype.kind != "f":
        return []
    return [float(1 - np.isfinite(plane).mean()) for plane in image]


def _digest(image: np.ndarray) -> str:
    content = np.ascontiguousarray(image)
    return blake2b(f"{content.dtype.str} {content.shape}".encode() + content.tobytes(), digest_size=16).hexdigest()


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
    name = canonical_well(well)
    return name[:-2], name[-2:]


def _dump(model: Any) -> dict[str, Any]:
    return model.model_dump(mode="json", exclude_none=True, by_alias=True)


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
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
