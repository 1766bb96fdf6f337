"""Write a plate atomically: OME-Zarr 0.5 HCS with one sharded, zstd-compressed array per field.

The metadata is built and validated with the models of yaozarrs. Its `PlateBuilder` is not used: it writes the metadata
of a well before the pixels and all fields of a well in one call, while fields arrive here one at a time from several
threads, resume after a kill, and share a display window that is known only after the last field; and its compression
has no checksums.
"""

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
from cellvim.files import replace_path

if TYPE_CHECKING:
    import pandas as pd

CHUNK_SIDE = 2048  # px: a larger field is divided evenly into several chunks per channel
ZSTD_LEVEL = 3
JOURNAL = "written.jsonl"  # in the partial plate: the fields that are complete


class PlateWriter:
    """Writes a plate to ``<target>.partial`` and renames it to ``target`` in `finish`.

    Used as a context manager: leaving the block without `finish` removes what was written. `write_field` may be
    called from several threads.

    Parameters
    ----------
    target
        Folder of the new plate.
    name
        Name of the plate in its metadata.
    channel_names
        Channel names in stored order.
    pixel_size_um
        Pixel size in µm, or None if it is unknown.
    overwrite
        Replace an existing OME-Zarr at ``target``. Anything else is never replaced.
    job
        Identifier of the input, such as a hash of the source files. The complete fields of an interrupted run with the
        same identifier are kept, and are listed in `done`.

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
        self._entries: dict[tuple[str, str], dict[str, Any]] = {}  # (well, site) -> line of the journal
        self._job = job
        self._lock = threading.Lock()
        self._finished = False

    @property
    def done(self) -> set[tuple[str, str]]:
        """(well, site) of the complete fields."""
        return set(self._entries)

    def __enter__(self) -> PlateWriter:
        import zarr

        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.partial.exists() and not self._resume():
                shutil.rmtree(self.partial)
            if not self.partial.exists():
                zarr.create_group(store=str(self.partial), zarr_format=3)
                self._append_to_journal({"job": self._job})
        except OSError as error:
            raise OutputError(f"{self.partial} cannot be written: {error.strerror or error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        can_resume = isinstance(error, KeyboardInterrupt) and self._job is not None
        if not self._finished and not can_resume:
            shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{self.target} cannot be written: {error.strerror or error}.") from error

    def write_field(
        self, well: str, site: str, image: np.ndarray, *, position_um: tuple[float, float] | None = None
    ) -> None:
        """Write the pixels of a field.

        Parameters
        ----------
        well
            Well in any spelling.
        site
            Site, of letters and digits.
        image
            (C, H, W).
        position_um
            Centre of the field (x, y).
        """
        import zarr
        from zarr.codecs import ZstdCodec

        if image.ndim != 3 or image.shape[0] != len(self.channel_names) or 0 in image.shape:
            raise ValueError(f"expected an image ({len(self.channel_names)}, H, W), not {image.shape}")
        if not site.isalnum():
            raise ValueError(f"expected a site of letters and digits, not {site!r}")
        parts = [math.ceil(n / CHUNK_SIDE) for n in image.shape[1:]]
        chunk = [math.ceil(n / p) for n, p in zip(image.shape[1:], parts, strict=True)]  # one channel, or a part of it
        zarr.create_array(
            store=str(self._field_folder(well, site) / "0"),
            data=np.ascontiguousarray(image),
            chunks=(1, *chunk),
            shards=(image.shape[0], *(c * p for c, p in zip(chunk, parts, strict=True))),
            compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
            dimension_names=("c", "y", "x"),
            fill_value=0,
            # All-zero fields are stored as well: an absent chunk is a lost one.
            config={"write_empty_chunks": True},
        )
        entry = {
            "well": well,
            "site": site,
            "window": _display_window(image).tolist(),
            "digest": _digest(image),
            "position": position_um,
        }
        if image.dtype.kind == "f":
            shares = [float(1 - np.isfinite(plane).mean()) for plane in image]
            if any(shares):
                entry["without_value"] = shares  # share of NaN and infinite pixels of each channel
        with self._lock:
            self._entries[well, site] = entry
            self._append_to_journal(entry)

    def _field_folder(self, well: str, site: str) -> Path:
        return self.partial.joinpath(*_well_path(well), site)

    def _append_to_journal(self, entry: dict[str, Any]) -> None:
        if self._job is not None:
            with (self.partial / JOURNAL).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _resume(self) -> bool:
        """Read the journal of an interrupted run of the same job; return whether any field is complete."""
        if self._job is None:
            return False
        try:
            lines = (self.partial / JOURNAL).read_text(encoding="utf-8").splitlines()
            if json.loads(lines[0]) != {"job": self._job}:
                return False
            for line in lines[1:]:
                entry = json.loads(line)
                key = (str(entry["well"]), str(entry["site"]))
                entry["window"], entry["position"] = np.array(entry["window"], float).tolist(), entry["position"]
                if entry["digest"] and (self._field_folder(*key) / "0" / "zarr.json").is_file():
                    self._entries[key] = entry
        except (OSError, IndexError, KeyError, TypeError, ValueError):
            pass  # an incomplete last line
        return bool(self._entries)

    def odd_pixels(self) -> list[str]:
        """Return in which fields pixels are NaN or infinite, as sentences."""
        odd = []
        shares = {"/".join(k): e["without_value"] for k, e in sorted(self._entries.items()) if "without_value" in e}
        for i, name in enumerate(self.channel_names):
            if every := [field for field, share in shares.items() if share[i] == 1]:
                odd.append(f"channel {name} is NaN or infinite in every pixel of {len(every)} fields: {listing(every)}")
            if some := [field for field, share in shares.items() if 0 < share[i] < 1]:
                odd.append(f"channel {name} is NaN or infinite in some pixels of {len(some)} fields: {listing(some)}")
        return odd

    def verify(self, count: int) -> int:
        """Read evenly spaced fields back and compare them with the pixels that were passed; return their number.

        Raises
        ------
        OutputError
            A field differs or cannot be read.
        """
        from cellvim.data.plate import open_plate

        fields = {(f.well, f.site): f for f in open_plate(self.partial).fields}
        keys = sorted(self._entries)
        chosen = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, min(count, len(keys))).astype(int))]
        for well, site in chosen:
            field = fields.get((canonical_well(well), site))
            try:
                same = field is not None and _digest(field.read()) == self._entries[well, site]["digest"]
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
        """Write the metadata, validate it, and rename the plate to its final name.

        Parameters
        ----------
        well_metadata
            Plate map with wells as the index.
        notes
            Sentences for `Plate.oddities`.
        provenance
            How the plate was made; JSON.
        verify
            Number of fields to read back before the plate is renamed.

        Raises
        ------
        OutputError
            A field does not read back as it was written.
        """
        from yaozarrs import v05

        if not self._entries:
            raise ValueError("no field was written")
        sites: dict[str, list[str]] = {}
        for well, site in self._entries:
            sites.setdefault(well, []).append(site)
        wells = sorted(sites, key=well_position)
        paths = {well: _well_path(well) for well in wells}
        rows = sorted({row for row, _ in paths.values()}, key=lambda r: (len(r), r))
        columns = sorted({column for _, column in paths.values()})
        channels = self._channel_metadata()
        for well in wells:
            for site in sites[well]:
                _write_group(self._field_folder(well, site), {"ome": self._image_metadata(well, site, channels)})
            ordered = sorted(sites[well], key=natural_key)
            ome = v05.Well.model_validate({"well": {"images": [{"path": s, "acquisition": 0} for s in ordered]}})
            _write_group(self.partial.joinpath(*paths[well]), {"ome": _dump(ome)})
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
        own: dict[str, Any] = {"format": 1, **_plate_map(well_metadata), "notes": [*notes, *self.odd_pixels()]}
        if provenance:
            verified = {"verified_fields": min(verify, len(self._entries))} if verify else {}
            own["provenance"] = {**provenance, **verified}
        _write_group(self.partial, {"ome": _dump(plate), "cellvim": own})
        if verify:
            self.verify(verify)
        (self.partial / JOURNAL).unlink(missing_ok=True)
        if self.target.exists():
            check_target(self.target, overwrite=self._overwrite)
        aside = self.target.with_name(self.target.name + ".replaced.partial")
        shutil.rmtree(aside, ignore_errors=True)
        replace_path(self.partial, self.target, aside=aside)
        self._finished = True
        return self.target

    def _channel_metadata(self) -> list[dict[str, Any]]:
        """Return the display settings of the channels; the display window is that of the plate."""
        windows = np.array([entry["window"] for entry in self._entries.values()])  # (fields, C, 4)
        channels = []
        for i, name in enumerate(self.channel_names):
            low, start, end, high = windows[:, i].min(0)[0], *np.median(windows[:, i, 1:3], axis=0), windows[:, i].max()
            window = {"min": low, "start": start, "end": max(end, start + 1e-6), "max": high}
            channels.append({"label": name, "color": display_color(name, i), "active": True, "window": window})
        return channels

    def _image_metadata(self, well: str, site: str, channels: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the OME attributes of a field, with its position on the plate if that is known."""
        from yaozarrs import v05

        size, position = float(self.pixel_size_um or 1.0), self._entries[well, site]["position"]
        unit = {"unit": "micrometer"} if self.pixel_size_um else {}
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": [1.0, size, size]}]
        if position is not None and self.pixel_size_um:
            shape = json.loads((self._field_folder(well, site) / "0" / "zarr.json").read_text())["shape"]
            corner = [c - size * (n - 1) / 2 for c, n in zip(reversed(position), shape[1:], strict=True)]
            transforms.append({"type": "translation", "translation": [0.0, *corner]})
        axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", **unit} for n in "yx")]
        multiscale = {"name": "0", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": transforms}]}
        rdefs = {"defaultT": 0, "defaultZ": 0, "model": "color"}
        omero = {"channels": channels, "rdefs": rdefs}
        return _dump(v05.Image.model_validate({"multiscales": [multiscale], "omero": omero}))


def _display_window(image: np.ndarray) -> np.ndarray:
    """Return the minimum, two percentiles for the display, and the maximum of each channel: (C, 4)."""
    sample = image.reshape(len(image), -1)
    sample = sample[:, :: max(1, sample.shape[1] // 20_000)].astype(np.float64)
    sample[~np.isfinite(sample)] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a channel without finite pixels
        return np.nan_to_num(np.nanpercentile(sample, (0, 0.5, 99.8, 100), axis=1).T)


def _digest(image: np.ndarray) -> str:
    content = np.ascontiguousarray(image)
    return blake2b(f"{content.dtype.str} {content.shape}".encode() + content.tobytes(), digest_size=16).hexdigest()


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` if a plate must not be written at ``target``, before any work is done."""
    if not target.name or target.name in (".", ".."):
        raise OutputError(f"'{target}' cannot be a plate's name; use a name such as plate.zarr.")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputError(f"{target} exists already; choose another name or replace it with --overwrite.")
    is_zarr = (target / "zarr.json").is_file() or (target / ".zgroup").is_file()
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.is_symlink() or not (is_zarr or is_empty):
        raise OutputError(f"{target} is not an OME-Zarr; --overwrite replaces plates only. Remove or rename it.")


def _well_path(well: str) -> tuple[str, str]:
    """Return the names of the row and column folders: ``("A", "01")``."""
    name = canonical_well(well)
    return name[:-2], name[-2:]


def _dump(model: Any) -> dict[str, Any]:
    return model.model_dump(mode="json", exclude_none=True, by_alias=True)


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (folder / "zarr.json").write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def _plate_map(table: pd.DataFrame | None) -> dict[str, Any]:
    """Return a plate map as JSON."""
    if table is None:
        return {"well_columns": [], "wells": {}}
    columns = [str(c) for c in table.columns]
    wells = {
        str(well): {c: _json_value(v) for c, v in zip(columns, row, strict=True)}
        for well, row in zip(table.index, table.itertuples(index=False, name=None), strict=True)
    }
    return {"well_columns": columns, "wells": wells}


def _json_value(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
