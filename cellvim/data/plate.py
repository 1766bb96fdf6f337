"""Open an OME-Zarr plate and read its fields: the only module that opens Zarr images.

Metadata is read lazily: `open_plate` reads that of the plate and its wells, and a field reads its own when it is first
used. OME-Zarr 0.4 (Zarr v2) and 0.5 (Zarr v3) are supported, with any of the axes T, C, Z, Y and X, in a folder, a zip
file or behind a URL.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.channels import match_channels
from cellvim.data.plate_store import ChunkedArray, LocalFolder, Location, locate, open_array, plan_chunks
from cellvim.data.wells import natural_key, well_name, well_position
from cellvim.errors import ChannelError, FieldReadError, MetadataError, PlateError, listing

if TYPE_CHECKING:
    import pandas as pd

MICROMETER = {  # unit of an OME-Zarr axis -> µm
    "angstrom": 1e-4,
    "picometer": 1e-6,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "micron": 1.0,
    "um": 1.0,
    "µm": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}
MAX_FIELD_BYTES = 8 << 30  # a larger declared size is a mistake or an attack
SUSPICIOUS_BYTES = 256 << 20  # larger declared sizes are compared with the stored size
MAX_COMPRESSION = 10_000  # even a black field does not compress better


def open_plate(
    path: str | Path,
    *,
    z: int | str | None = None,
    t: int | None = None,
    level: int = 0,
    storage_options: dict[str, Any] | None = None,
) -> Plate:
    """Open an OME-Zarr plate for reading.

    A single OME-Zarr image opens as a plate with one field in well A01.

    Parameters
    ----------
    path
        Folder of the plate, such as ``plate.zarr``, a zip file of it, or a URL (``s3://``, ``https://`` and others
        that fsspec knows; ``pip install 'cellvim[cloud]'``).
    z
        Plane to read from z-stacks, or ``"max"`` for the maximum projection. Required if there are several planes.
    t
        Time point to read. Required if there are several.
    level
        Resolution to read: 0 is the full one, 1 the next smaller. The pixel size is that of this level.
    storage_options
        Options for fsspec if ``path`` is a URL: ``{"anon": True}``. A public S3 bucket needs none.

    Raises
    ------
    PlateError
        The path does not exist or is not an OME-Zarr plate.
    """
    if not isinstance(level, int) or isinstance(level, bool) or level < 0:
        raise PlateError(f"level={level!r} is not a resolution; expected 0, the full resolution, or a larger number.")
    return Plate(locate(path, storage_options), z=z, t=t, level=level)


def sample_fields(fields: Sequence[Field], count: int, seed: int) -> list[Field]:
    """Draw one field from each of ``count`` equal sections of a plate: evenly spread, but not periodic."""
    if count >= len(fields):
        return list(fields)
    edges = np.linspace(0, len(fields), count + 1).astype(int)
    rng = np.random.default_rng(seed)
    return [fields[rng.integers(start, stop)] for start, stop in pairwise(edges)]


def describe(plate: Plate) -> dict[str, Any]:
    """Return what `cellvim info` prints: counts, channels, sizes, pixel size, plate-map columns and oddities."""
    layouts = [layout for layout in plate.layouts() if layout is not None]
    sizes = Counter(f"{layout.height} x {layout.width}" for layout in layouts)
    return {
        "path": plate.path,
        "name": plate.name,
        "ome_zarr_version": plate.ome_version,
        "n_wells": len(plate.wells),
        "wells": plate.wells,
        "n_fields": len(plate.fields),
        "fields_per_well": dict(sorted(Counter(Counter(f.well for f in plate.fields).values()).items())),
        "channel_names": plate.channel_names,
        "channel_colors": plate.channel_colors,
        "sizes": dict(sizes.most_common()),
        "dtypes": sorted({str(layout.dtype) for layout in layouts}),
        "pixel_size_um": plate.pixel_size_um,
        "well_metadata_columns": list(plate.well_metadata.columns),
        "oddities": plate.oddities(),
    }


class Plate:
    """The wells, fields, channels and plate map of a plate. Created by `open_plate`."""

    def __init__(self, folder: Location, *, z: int | str | None, t: int | None, level: int) -> None:
        self.path = str(folder)
        self._folder = folder
        self.selection: dict[str, Any] = {"z": z, "t": t, "level": level}
        self._notes: list[str] = []
        attributes = read_attributes(folder)
        if attributes is None:
            raise _not_a_plate(folder)
        ome = _ome(attributes)
        version = ome.get("version") or _dig(ome, "plate", "version") or _dig(ome, "multiscales", 0, "version")
        self.ome_version = str(version or "0.4")
        own = attributes.get("cellvim")
        self.cellvim_attributes: dict[str, Any] = own if isinstance(own, dict) else {}
        self._wells: dict[str, list[Field]] = {}
        if isinstance(ome.get("plate"), dict):
            self._read_wells(ome["plate"])
        elif "multiscales" in ome:
            self._notes.append("a single image, not a plate: shown as well A01")
            self._wells["A01"] = [self._field("A01", "0", folder)]
        elif "bioformats2raw.layout" in ome:
            self._notes.append("a set of images without a plate: shown as sites of well A01")
            self._wells["A01"] = [self._field("A01", image, folder.child(image)) for image in _image_folders(folder)]
        else:
            raise _not_a_plate(folder)
        own_name = folder.path.resolve().name if isinstance(folder, LocalFolder) else folder.name
        self.name = str(_dig(ome, "plate", "name") or "").strip() or own_name.removesuffix(".ome.zarr")
        self.name = self.name.removesuffix(".zarr")
        self.wells: list[str] = sorted(self._wells, key=well_position)
        self.fields: list[Field] = [f for well in self.wells for f in self._wells[well]]
        if not self.fields:
            raise PlateError(f"{folder} is an OME-Zarr plate without fields; expected images in its wells.")

    def __repr__(self) -> str:
        return f"<Plate {self.name}: {len(self.wells)} wells, {len(self.fields)} fields>"

    def _field(self, well: str, site: str, folder: Location) -> Field:
        return Field(well, site, folder, self.path, **self.selection)

    def _read_wells(self, plate: dict[str, Any]) -> None:
        entries = plate.get("wells")
        if not isinstance(entries, list) or not entries:
            raise PlateError(f"{self.path} lists no wells in its plate metadata; expected at least one.")
        rows, columns = ([str(_dig(entry, "name")) for entry in _list(plate.get(key))] for key in ("rows", "columns"))
        paths = [str(_dig(entry, "path") or "") for entry in entries]
        folders = [self._folder.inside(path) for path in paths]
        files = ["zarr.json"] if self.ome_version == "0.5" else ["zarr.json", ".zattrs"]
        self._folder.prefetch([f"{p}/{file}" for p, f in zip(paths, folders, strict=True) if f for file in files])
        for entry, path, folder in zip(entries, paths, folders, strict=True):
            if folder is None:
                raise PlateError(f"{self.path} lists a well at '{path}'; expected a path such as A/1 inside the plate.")
            name = _well_of(entry, path, rows, columns)
            if name is None:
                raise PlateError(f"{self.path} has a well at '{path}' without a valid row and column.")
            if name in self._wells:
                raise PlateError(f"{self.path} lists well {name} twice.")
            try:
                attributes = read_attributes(folder)
            except PlateError as error:
                self._notes.append(f"the metadata of well {name} is damaged: {error}")
                attributes = None
            sites = [str(_dig(image, "path")) for image in _list(_dig(_ome(attributes), "well", "images"))]
            if not sites and folder.exists():  # some writers omit the metadata of wells
                sites = _image_folders(folder)
                if sites:
                    self._notes.append(f"well {name} lists no images: they were found by their folders")
            fields = []
            for site in sites:
                image_folder = folder.inside(site)
                if image_folder is None:
                    raise PlateError(f"{self.path}: well {name} lists an image at '{site}', outside of the well.")
                fields.append(self._field(name, site, image_folder))
            self._wells[name] = sorted(fields, key=lambda f: natural_key(f.site))

    @cached_property
    def channel_names(self) -> list[str]:
        """Channel names of the first field whose metadata can be read."""
        return list(self._first_layout.channel_names)

    @cached_property
    def channel_colors(self) -> list[str | None]:
        """Display colours (hex RGB) in the order of the channels; None for channels without a colour."""
        return list(self._first_layout.channel_colors)

    @cached_property
    def pixel_size_um(self) -> float | None:
        """Pixel size in µm of the first field whose metadata can be read, or None if it is unknown."""
        return self._first_layout.pixel_size_um

    @cached_property
    def well_metadata(self) -> pd.DataFrame:
        """Plate map: one row per well (index ``well``); no columns if the plate has no plate map."""
        import pandas as pd

        columns = [str(c) for c in _list(self.cellvim_attributes.get("well_columns"))]
        rows = [_dig(self.cellvim_attributes, "wells", well) for well in self.wells]
        values = {column: [_dig(row, column) for row in rows] for column in columns}
        return pd.DataFrame(values, index=pd.Index(self.wells, name="well"))

    @cached_property
    def _first_layout(self) -> _Layout:
        problem: FieldReadError | None = None
        for field in self.fields:
            try:
                return field.layout
            except FieldReadError as error:
                problem = problem or error
        raise PlateError(f"None of the {len(self.fields)} fields of {self.path} can be opened. First: {problem}")

    def layouts(self) -> list[_Layout | None]:
        """Read the metadata of every field; None for fields whose metadata cannot be read."""
        return [field.layout if field.is_readable else None for field in self.fields]

    def oddities(self, *, max_fields: int = 6) -> list[str]:
        """Return what is unusual about the plate, as sentences; reads the pixels of up to ``max_fields`` fields."""
        odd = [*self._notes, *self._invalid_metadata()]
        odd += [str(note) for note in _list(self.cellvim_attributes.get("notes"))]
        layouts = self.layouts()
        unreadable = [f.name for f, layout in zip(self.fields, layouts, strict=True) if layout is None]
        if unreadable:
            odd.append(f"{len(unreadable)} fields have no readable metadata: {listing(unreadable)}")
        counts = {well: len(fields) for well, fields in self._wells.items()}
        usual = Counter(counts.values()).most_common(1)[0][0]
        for count in sorted(set(counts.values()) - {usual}):
            wells = [w for w in self.wells if counts[w] == count]
            odd.append(f"{len(wells)} wells have {count} fields where most have {usual}: {listing(wells)}")
        known = [(f, layout) for f, layout in zip(self.fields, layouts, strict=True) if layout is not None]
        for what, get in (
            ("size", lambda layout: f"{layout.height} x {layout.width}"),
            ("pixel type", lambda layout: str(layout.dtype)),
            ("channel names", lambda layout: ", ".join(layout.channel_names)),
            ("pixel size", lambda layout: str(layout.pixel_size_um)),
        ):
            values = Counter(get(layout) for _, layout in known).most_common()
            for value, count in values[1:]:
                fields = [f.name for f, layout in known if get(layout) == value]
                odd.append(f"{count} fields have another {what} ({value}; most: {values[0][0]}): {listing(fields)}")
        if known:
            first = known[0][1]
            odd += first.notes
            if first.pixel_size_um is None:
                odd.append("no pixel size: sizes can be given in pixels only")
            elif not 0.02 <= first.pixel_size_um <= 20:
                odd.append(f"a pixel of {first.pixel_size_um:g} µm is unusual for cells: check its unit")
            repeated = [name for name, n in Counter(first.channel_names).items() if n > 1]
            if repeated:
                odd.append(f"several channels have the same name: {listing(repeated)}")
        return odd + _odd_pixels([f for f, _ in known], max_fields)

    def _invalid_metadata(self) -> list[str]:
        """Return where the metadata of the plate and of its first field violates the OME-Zarr specification."""
        from pydantic import ValidationError
        from yaozarrs import validate_ome_object

        folders = {"plate": self._folder}
        if str(self.fields[0].folder) != str(self._folder):
            folders[f"field {self.fields[0].name}"] = self.fields[0].folder
        odd = []
        for what, folder in folders.items():
            try:
                attributes = read_attributes(folder) or {}
                validate_ome_object(attributes.get("ome", attributes))
            except PlateError:
                continue  # reported as unreadable
            except (ValidationError, TypeError, ValueError, KeyError) as error:
                first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
                where = ".".join(str(part) for part in first["loc"] if "-" not in str(part) or str(part) == "-")
                reason = " ".join(str(first["msg"]).split())[:160]
                odd.append(f"the metadata of the {what} is not valid OME-Zarr {self.ome_version} ({where}: {reason})")
        return odd


@dataclass(eq=False, repr=False)
class Field:
    """One field of view of a well. Its metadata is read when first used, its pixels by `read`."""

    well: str
    site: str
    folder: Location
    plate_path: str
    z: int | str | None = None
    t: int | None = None
    level: int = 0

    def __repr__(self) -> str:
        return f"<Field {self.name}>"

    @property
    def name(self) -> str:
        """``well/site``, unique on the plate."""
        return f"{self.well}/{self.site}"

    @cached_property
    def layout(self) -> _Layout:
        """Shape, type, channels and scale of the field, read from its metadata."""
        return _Layout(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return len(self.layout.channel_names), self.layout.height, self.layout.width

    @property
    def dtype(self) -> np.dtype:
        """Type of a stored pixel."""
        return self.layout.dtype

    @property
    def channel_names(self) -> list[str]:
        """Names of the channels in stored order."""
        return list(self.layout.channel_names)

    @property
    def pixel_size_um(self) -> float | None:
        """Pixel size in µm, or None if it is unknown."""
        return self.layout.pixel_size_um

    @property
    def is_readable(self) -> bool:
        """Whether the field's metadata can be read; its pixels may still be missing."""
        try:
            return self.layout is not None
        except FieldReadError:
            return False

    def read(self, channels: Sequence[str | int] | None = None, *, out: np.ndarray | None = None) -> np.ndarray:
        """Read the pixels.

        Parameters
        ----------
        channels
            Names (matched as in `cellvim.channels.match_channels`) or indices; all channels if None.
        out
            Array to decode into and to return: (C, H, W) of the stored type, contiguous.

        Returns
        -------
        np.ndarray
            (C, H, W) in the stored type, with the channels in the requested order.

        Raises
        ------
        ChannelError
            The field does not have a channel.
        FieldReadError
            The pixels are missing or cannot be decoded.
        """
        layout = self.layout
        indices = self._channel_indices(channels)
        shape = (len(indices), layout.height, layout.width)
        if out is not None and (out.shape != shape or out.dtype != layout.dtype or not out.flags.c_contiguous):
            raise ValueError(f"out is {out.shape} {out.dtype}; expected {shape} {layout.dtype}, contiguous")
        try:
            return layout.read(indices, z=self.z, t=self.t, out=out)
        except FieldReadError:
            raise
        except Exception as error:  # every codec has its own exceptions
            cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise self.error(f"its pixels cannot be read ({cause})") from error

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the field's label images."""
        ome = _ome(self.read_metadata(read_attributes, self.folder.child("labels")))
        return [str(name) for name in _list(_dig(ome, "labels"))]

    def read_labels(self, name: str) -> np.ndarray:
        """Read a label image at the resolution at which the plate was opened.

        Returns
        -------
        np.ndarray
            (H, W) integers, 0 is background. Labels stored at another resolution than the image are resampled to its
            size (nearest neighbour).

        Raises
        ------
        FieldReadError
            There is no such label image, or it cannot be read.
        """
        folder = self.folder.child("labels").inside(name) if name in self.label_names else None
        if folder is None:
            raise self.error(f"it has no label image '{name}'; it has {listing(self.label_names)}")
        size = self.layout.height, self.layout.width
        stored = replace(self, folder=folder, level=0)
        try:
            while stored.layout.height > size[0] and stored.level + 1 < stored.layout.n_levels:
                stored = replace(stored, level=stored.level + 1)  # the finest level that is not finer than the image
            labels = stored.read()[0]
        except FieldReadError as error:
            raise self.error(f"its labels '{name}': {str(error).partition('unreadable: ')[2].rstrip('.')}") from error
        if labels.dtype.kind not in "uib":
            raise self.error(f"its labels '{name}' are {labels.dtype}; expected integers")
        if labels.shape == size:
            return labels
        rows, columns = (
            np.minimum((np.arange(n) + 0.5) * m / n, m - 1).astype(np.intp)
            for n, m in zip(size, labels.shape, strict=True)
        )
        return labels[rows[:, None], columns]

    def read_metadata(self, read: Callable[..., dict[str, Any] | None], *args: Any) -> dict[str, Any] | None:
        """Call a function that reads metadata; its errors become errors of the field."""
        try:
            return read(*args)
        except PlateError as error:
            raise self.error(str(error).rstrip(".")) from error

    def error(self, problem: str) -> FieldReadError:
        """Return an error with the name of the field and the problem."""
        return FieldReadError(f"Field {self.name} of {Path(self.plate_path).name} is unreadable: {problem}.")

    def _channel_indices(self, channels: Sequence[str | int] | None) -> list[int]:
        names, plate = self.layout.channel_names, Path(self.plate_path).name
        if channels is None:
            return list(range(len(names)))
        indices = []
        for channel in [channels] if isinstance(channels, str) else channels:
            if not isinstance(channel, int | np.integer) or isinstance(channel, bool):
                indices += match_channels([channel], names, where=plate)
            elif 0 <= channel < len(names):
                indices.append(int(channel))
            else:
                raise ChannelError(
                    f"Channel number {channel} is not in {plate}; it has {len(names)}: {listing(names)}."
                )
        return indices


class _Layout:
    """How a field is stored: the array of the chosen resolution, the axes, the channels and the scale."""

    def __init__(self, field: Field) -> None:
        self._error = field.error
        attributes = field.read_metadata(read_attributes, field.folder)
        if attributes is None:
            raise field.error("there is no OME-Zarr image in its folder")
        ome = _ome(attributes)
        multiscale = _dig(ome, "multiscales", 0)
        levels = _list(_dig(multiscale, "datasets"))
        dataset = _dig(levels, field.level)
        if levels and dataset is None:
            raise field.error(f"it does not have level={field.level}; it has level = 0 to {len(levels) - 1}")
        if not isinstance(dataset, dict):
            raise field.error("its metadata has no multiscales dataset")
        self.n_levels = len(levels)
        folder = field.folder.inside(str(dataset.get("path")))
        if folder is None:
            raise field.error(f"its array lies at '{dataset.get('path')}', outside of the field")
        self.folder = folder
        document = field.read_metadata(_read_json, folder, "zarr.json") or field.read_metadata(
            _read_json, folder, ".zarray"
        )
        if document is None:
            raise field.error(f"its array '{folder.name}' does not exist")
        stored_shape, self.dtype = _shape_and_type(document, field)
        self.axes = _axes(multiscale, len(stored_shape), field)
        sizes = dict(zip(self.axes, stored_shape, strict=True))
        self.height, self.width = sizes["y"], sizes["x"]
        self.n_z, self.n_t = sizes.get("z", 1), sizes.get("t", 1)
        n_channels = sizes.get("c", 1)
        if 0 in stored_shape:
            raise field.error(f"its array is empty, of shape {stored_shape}")
        planes = n_channels if field.z != "max" else max(n_channels, self.n_z)
        self.n_bytes = planes * self.height * self.width * self.dtype.itemsize
        if self.n_bytes > MAX_FIELD_BYTES:
            raise field.error(f"its declared shape {stored_shape} is larger than any field")
        self._chunked = None
        if isinstance(folder, LocalFolder) and self.axes == [a for a in "tczyx" if a in self.axes]:
            self._chunked = plan_chunks(folder.path, folder.root, document)
        self.notes: list[str] = []
        self.channel_names, self.channel_colors = _channels(ome, n_channels, self.notes)
        self.pixel_size_um = _pixel_size(multiscale, dataset, self.axes, self.notes)
        if self.n_z > 1:
            self.notes.append(f"fields are stacks of {self.n_z} z planes: open the plate with z=... to choose")
        if self.n_t > 1:
            self.notes.append(f"fields are series of {self.n_t} time points: open the plate with t=... to choose")

    def open(self) -> Any:
        """Open the array: a `ChunkedArray` if it can decode the chunks, otherwise Zarr's."""
        if self.n_bytes > SUSPICIOUS_BYTES and self.n_bytes > MAX_COMPRESSION * (stored := self.folder.stored_bytes()):
            raise self._error(f"it declares {self.n_bytes:,} bytes of pixels and stores {stored:,}")
        array = self._chunked or open_array(self.folder)
        chunk = int(np.prod(array.chunks, dtype=float)) * self.dtype.itemsize
        if chunk > SUSPICIOUS_BYTES and chunk > 4 * self.n_bytes:
            raise self._error(f"its chunks {array.chunks} are far larger than its pixels")
        return array

    def read(
        self, channels: list[int], *, z: int | str | None, t: int | None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read the (C, H, W) pixels of some channels, at one z plane (or projected over z) and one time point."""
        array = self.open()
        at: dict[str, Any] = {"y": slice(0, self.height), "x": slice(0, self.width)}
        at["t"] = self._choose("t", self.n_t, t)
        at["z"] = slice(0, self.n_z) if z == "max" else self._choose("z", self.n_z, z)
        order = [self.axes.index(a) for a in "tczyx" if a in self.axes]

        def read(target: np.ndarray, c: slice) -> int:
            """Read a block of channels, and return how many of its chunks are stored (or whether any pixel is)."""
            places = [c if a == "c" else at[a] for a in self.axes]
            ranges = [(p.start, p.stop) if isinstance(p, slice) else (p, p + 1) for p in places]
            if isinstance(array, ChunkedArray):
                return array.read(ranges, target.reshape([stop - start for start, stop in ranges]))
            block = np.asarray(array[tuple(slice(*r) for r in ranges)])
            target[...] = block.transpose(order).reshape(target.shape)
            return int(block.any())

        image = np.empty((len(channels), self.height, self.width), self.dtype) if out is None else out
        if z == "max":  # stacks are read channel by channel
            n_stored, stack = 0, np.empty((self.n_z, self.height, self.width), self.dtype)
            for i, c in enumerate(channels):
                n_stored += read(stack, slice(c, c + 1))
                stack.max(axis=0, out=image[i])
        elif channels == list(range(len(self.channel_names))):
            n_stored = read(image, slice(0, len(channels)))
        else:
            n_stored = sum(read(image[i : i + 1], slice(c, c + 1)) for i, c in enumerate(channels))
        if n_stored == 0 and self.folder.stored_bytes() == 0:
            # absent chunks read as zeros, as do empty files in Zarr; if there are no others, the field was not written
            raise self._error("none of its chunks is stored")
        return image

    def _choose(self, axis: str, size: int, chosen: int | str | None) -> int:
        if chosen is None:
            if size > 1:
                what, projection = ("z planes", " or z='max'") if axis == "z" else ("time points", "")
                raise self._error(f"it has {size} {what} and none was chosen; open the plate with {axis}=0{projection}")
            return 0
        if not isinstance(chosen, int) or not 0 <= chosen < size:
            raise self._error(f"it does not have {axis}={chosen!r}; it has {axis} = 0 to {size - 1}")
        return chosen


def read_attributes(folder: Location) -> dict[str, Any] | None:
    """Return the attributes of the Zarr group in a folder (v3 or v2), or None if there is no group.

    Raises
    ------
    PlateError
        The metadata file exists but is not a JSON object.
    """
    document = _read_json(folder, "zarr.json")
    if document is not None:
        if document.get("node_type") != "group":
            return None
        attributes = document.get("attributes")
        return attributes if isinstance(attributes, dict) else {}
    attributes = _read_json(folder, ".zattrs")
    return attributes if attributes is not None or folder.read(".zgroup") is None else {}


def _read_json(folder: Location, name: str) -> dict[str, Any] | None:
    content = folder.read(name)
    if content is None:
        return None
    try:
        document = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlateError(f"{folder}/{name} is not JSON ({error}); the plate's metadata is damaged.") from error
    if not isinstance(document, dict):
        raise PlateError(f"{folder}/{name} holds a JSON {type(document).__name__}; expected an object.")
    return document


def _not_a_plate(folder: Location) -> PlateError:
    names = folder.folders()
    arrays = [n for n in names if folder.child(n).read("zarr.json") or folder.child(n).read(".zarray")]
    if read_attributes(folder) is not None or arrays:
        return PlateError(
            f"{folder} is Zarr but not an OME-Zarr plate or image (it holds {listing(sorted(arrays)[:5])}); expected "
            "'plate' or 'multiscales' metadata. Convert it, or import its images with `cellvim import`."
        )
    if folder.read("zarr.json") is not None or folder.read(".zarray") is not None:
        return PlateError(f"{folder} is a single Zarr array; expected the folder of a plate or of an OME-Zarr image.")
    if isinstance(folder, LocalFolder) and {p.suffix.lower() for p in folder.path.iterdir()} & {".tif", ".tiff"}:
        return PlateError(
            f"{folder} is a folder of TIFFs; make a plate of it first: cellvim import {folder} plate.zarr"
        )
    reached = "" if isinstance(folder, LocalFolder) or "://" not in str(folder) else ", or cannot be reached"
    return PlateError(f"{folder} is not an OME-Zarr plate{reached}: it has neither zarr.json nor .zgroup.")


def _ome(attributes: dict[str, Any] | None) -> dict[str, Any]:
    """Return the OME-Zarr metadata in the attributes of a group, of version 0.5 or before."""
    ome = _dig(attributes, "ome")
    return ome if isinstance(ome, dict) else attributes or {}


def _dig(node: Any, *keys: str | int) -> Any:
    """Return a value in nested JSON, or None if it does not exist."""
    for key in keys:
        if isinstance(key, str) and isinstance(node, dict):
            node = node.get(key)
        elif isinstance(key, int) and isinstance(node, list) and -len(node) <= key < len(node):
            node = node[key]
        else:
            return None
    return node


def _list(node: Any) -> list[Any]:
    return node if isinstance(node, list) else []


def _well_of(entry: Any, path: str, rows: list[str], columns: list[str]) -> str | None:
    """Return the canonical name of a well from its path (``A/1``), or else from its indices."""
    row, _, column = path.partition("/")
    try:
        return well_name(*well_position(row + column))
    except MetadataError:
        pass
    i, j = _dig(entry, "rowIndex"), _dig(entry, "columnIndex")
    if isinstance(i, int) and isinstance(j, int) and 0 <= i < 32 and 0 <= j < 48:
        try:
            return well_name(*well_position(rows[i] + columns[j]))
        except (MetadataError, IndexError):
            return well_name(i, j)
    return None


def _image_folders(folder: Location) -> list[str]:
    """Return the sub-folders that are images, in natural order."""
    names = (name for name in folder.folders() if name != "OME")
    return sorted((n for n in names if "multiscales" in _ome(read_attributes(folder.child(n)))), key=natural_key)


def _shape_and_type(document: dict[str, Any], field: Field) -> tuple[tuple[int, ...], np.dtype]:
    shape, name = document.get("shape"), document.get("data_type", document.get("dtype"))
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise field.error(f"its array has the shape {shape!r}")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError) as error:
        raise field.error(f"its array has the type {name!r}") from error
    if dtype.kind not in "uifb":
        raise field.error(f"its pixels are {dtype}; expected integers or floats")
    return tuple(shape), dtype


def _axes(multiscale: Any, ndim: int, field: Field) -> list[str]:
    axes = [str(_dig(a, "name") if isinstance(a, dict) else a).lower() for a in _list(_dig(multiscale, "axes"))]
    if not axes and ndim == 5:  # fixed before OME-Zarr 0.3
        axes = list("tczyx")
    if len(axes) != ndim or len(set(axes)) != ndim or not {"y", "x"} <= set(axes) <= set("tczyx"):
        raise field.error(f"its axes are ({', '.join(axes)}) for {ndim} dimensions; expected some of t, c, z, y, x")
    return axes


def _channels(ome: dict[str, Any], count: int, notes: list[str]) -> tuple[list[str], list[str | None]]:
    given = _list(_dig(ome, "omero", "channels"))
    if len(given) != count:
        notes.append(
            f"the plate names {len(given)} channels but stores {count}" if given else "the plate names no channels"
        )
    labels = [_dig(given, i, "label") for i in range(count)]
    colors = [_dig(given, i, "color") for i in range(count)]
    names = [f"channel_{i}" if label in (None, "") else str(label) for i, label in enumerate(labels)]
    return names, [str(color) if color else None for color in colors]


def _pixel_size(multiscale: Any, dataset: Any, axes: list[str], notes: list[str]) -> float | None:
    units = {str(_dig(a, "name")).lower(): _dig(a, "unit") for a in _list(_dig(multiscale, "axes"))}
    scale = {"y": 1.0, "x": 1.0}
    for holder in (dataset, multiscale):
        for transform in _list(_dig(holder, "coordinateTransformations")):
            values = _list(_dig(transform, "scale")) if _dig(transform, "type") == "scale" else []
            if len(values) == len(axes) and all(isinstance(v, int | float) and v > 0 for v in values):
                for axis in scale:
                    scale[axis] *= float(values[axes.index(axis)])
    for axis in scale:
        unit = units.get(axis)
        if unit is None:
            return None
        if str(unit).lower() not in MICROMETER:
            notes.append(f"the pixel size is in '{unit}', which is not a known unit of length")
            return None
        scale[axis] *= MICROMETER[str(unit).lower()]
    if not np.isclose(scale["y"], scale["x"], rtol=1e-3):
        notes.append(f"pixels are not square ({scale['y']:g} x {scale['x']:g} µm)")
    size = float(np.sqrt(scale["y"] * scale["x"])) if scale["y"] != scale["x"] else scale["x"]
    return size if np.isfinite(size) else None


def _odd_pixels(fields: list[Field], max_fields: int) -> list[str]:
    """Return which channels are constant, saturated or not finite in a sample of the fields."""
    step = max(1, len(fields) // max_fields)
    constant, saturated, not_finite = Counter(), Counter(), Counter()
    odd, n_read = [], 0
    for field in fields[::step][:max_fields]:
        try:
            image = field.read()
        except FieldReadError as error:
            odd.append(str(error))
            continue
        n_read += 1
        for name, plane in zip(field.channel_names, image, strict=True):
            constant[name] += bool(plane.min() == plane.max())
            if image.dtype.kind == "f":
                not_finite[name] += not np.isfinite(plane).all()
            if image.dtype.kind == "u":
                saturated[name] += bool((plane == np.iinfo(image.dtype).max).mean() > 0.01)
    for counts, what in (
        (not_finite, "has pixels that are NaN or infinite in"),
        (constant, "is constant in"),
        (saturated, "is saturated in over 1% of the pixels of"),
    ):
        odd += [f"channel {name} {what} {n} of {n_read} fields looked at" for name, n in counts.items() if n]
    return odd
