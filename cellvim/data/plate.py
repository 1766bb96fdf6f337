"""Opening an OME-Zarr plate and reading its fields: the only module that opens Zarr images.

Metadata is read when it is asked for: `open_plate` reads the plate's and its wells', a field's own is read with
the field. Both OME-Zarr 0.4 (Zarr v2) and 0.5 (Zarr v3) are read, with any of the axes T, C, Z, Y, X, from a folder,
a zip file or a URL.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.channels import match_channels
from cellvim.data.chunks import ChunkedArray, plan_chunks
from cellvim.data.plate_store import Folder, Location, Remote, locate, open_array
from cellvim.data.wells import natural_key, well_name, well_position
from cellvim.errors import FieldReadError, MetadataError, PlateError, listing

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
MAX_FIELD_BYTES = 8 << 30  # a declared size beyond this is a mistake or an attack, not a field
SUSPICIOUS_BYTES = 256 << 20  # from here on what is declared is held against what is stored
MAX_COMPRESSION = 10_000  # even a black field is not stored smaller than this


def open_plate(
    path: str | Path,
    *,
    z: int | str | None = None,
    t: int | None = None,
    level: int = 0,
    storage_options: dict[str, Any] | None = None,
) -> Plate:
    """Open an OME-Zarr plate for reading.

    A plain OME-Zarr image opens as a plate of one field in well A01.

    Parameters
    ----------
    path
        Folder of the plate, such as ``plate.zarr``, a zip file of it, or a URL (``s3://``, ``https://`` and others
        that fsspec knows; ``pip install 'cellvim[cloud]'``).
    z
        Which plane of a z-stack to read, or ``"max"`` for the maximum projection. Needed only where there are several.
    t
        Which time point to read. Needed only where there are several.
    level
        Which resolution to read: 0 is the full one, 1 the next smaller. The pixel size is that level's.
    storage_options
        For fsspec, with a URL: ``{"anon": True}``. A public S3 bucket needs none.

    Raises
    ------
    PlateError
        The path does not exist or is not an OME-Zarr plate.
    """
    if not isinstance(level, int) or isinstance(level, bool) or level < 0:
        raise PlateError(f"level={level!r} was asked for; expected 0, the full resolution, or a number above.")
    return Plate(locate(path, storage_options), z=z, t=t, level=level)


def describe(plate: Plate) -> dict[str, Any]:
    """Return what `cellvim info` prints: counts, channels, sizes, µm/px, plate-map columns, and what is odd."""
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
    """A plate: wells, their fields, the channels, and the plate map's columns. Made by `open_plate`."""

    def __init__(
        self, path: Path | Location, *, z: int | str | None = None, t: int | None = None, level: int = 0
    ) -> None:
        path = path if isinstance(path, Location) else Folder(path)
        self.path = str(path)
        self._root = path
        self._z, self._t, self._level = z, t, level
        self._notes: list[str] = []
        attributes = read_attributes(path)
        if attributes is None:
            raise _not_a_plate(path)
        ome = attributes.get("ome") if isinstance(attributes.get("ome"), dict) else attributes
        version = ome.get("version") or _dig(ome, "plate", "version") or _dig(ome, "multiscales", 0, "version")
        self.ome_version = str(version or "0.4")
        own = attributes.get("cellvim")
        self.cellvim_attributes: dict[str, Any] = own if isinstance(own, dict) else {}
        self._wells: dict[str, list[Field]] = {}
        if isinstance(ome.get("plate"), dict):
            self._read_wells(ome["plate"])
        elif "multiscales" in ome:
            self._notes.append("a single image, not a plate: shown as well A01")
            self._wells["A01"] = [Field(self, "A01", "0", path)]
        elif "bioformats2raw.layout" in ome:
            self._notes.append("a set of images without a plate: shown as sites of well A01")
            self._wells["A01"] = [Field(self, "A01", image, path.child(image)) for image in _image_folders(path)]
        else:
            raise _not_a_plate(path)
        self.name = str(_dig(ome, "plate", "name") or "").strip() or _own_name(path).removesuffix(".ome.zarr")
        self.name = self.name.removesuffix(".zarr")
        self.wells: list[str] = sorted(self._wells, key=well_position)
        self.fields: list[Field] = [f for well in self.wells for f in self._wells[well]]
        if not self.fields:
            raise PlateError(f"{path} is an OME-Zarr plate without a single field; expected images in its wells.")

    def __repr__(self) -> str:
        return f"<Plate {self.name}: {len(self.wells)} wells, {len(self.fields)} fields>"

    def _read_wells(self, plate: dict[str, Any]) -> None:
        entries = plate.get("wells")
        if not isinstance(entries, list) or not entries:
            raise PlateError(f"{self.path} lists no wells in its plate metadata; expected at least one.")
        rows, columns = ([str(_dig(entry, "name")) for entry in _list(plate.get(key))] for key in ("rows", "columns"))
        paths = [str(_dig(entry, "path")) for entry in entries]
        files = ["zarr.json"] if self.ome_version == "0.5" else ["zarr.json", ".zattrs"]
        self._root.prefetch([f"{p}/{file}" for p in paths if self._root.inside(p) is not None for file in files])
        for entry in entries:
            well_path = str(_dig(entry, "path") or "")
            folder = self._root.inside(well_path)
            if folder is None:
                raise PlateError(f"{self.path} lists a well at '{well_path}'; expected a path such as A/1 inside it.")
            name = _well_of(entry, well_path, rows, columns)
            if name is None:
                raise PlateError(f"{self.path} has a well at '{well_path}' whose row and column cannot be told.")
            if name in self._wells:
                raise PlateError(f"{self.path} lists well {name} twice.")
            try:
                attributes = read_attributes(folder)
            except PlateError as error:
                self._notes.append(f"the metadata of well {name} is damaged: {error}")
                attributes = None
            ome = _dig(attributes, "ome") or attributes
            images = _list(_dig(ome, "well", "images"))
            sites = [str(_dig(image, "path")) for image in images]
            if not images and folder.exists():  # some writers leave the well's own metadata out
                sites = _image_folders(folder)
                if sites:
                    self._notes.append(f"well {name} lists no images: they were found by their folders")
            fields = []
            for site in sites:
                image_folder = folder.inside(site)
                if image_folder is None:
                    raise PlateError(f"{self.path}: well {name} lists an image at '{site}', outside of the well.")
                fields.append(Field(self, name, site, image_folder))
            self._wells[name] = sorted(fields, key=lambda f: natural_key(f.site))

    @cached_property
    def channel_names(self) -> list[str]:
        """Names of the channels, of the first field whose metadata can be read."""
        return list(self._first_layout.channel_names)

    @cached_property
    def channel_colors(self) -> list[str | None]:
        """Display colours (hex RGB) in the order of the channels; None where the plate gives none."""
        return list(self._first_layout.channel_colors)

    @cached_property
    def pixel_size_um(self) -> float | None:
        """Side of a pixel in µm, of the first field whose metadata can be read; None if the plate does not say."""
        return self._first_layout.pixel_size_um

    @cached_property
    def well_metadata(self) -> pd.DataFrame:
        """Plate map: one row a well (index ``well``), one column each; no columns if the plate has none."""
        import pandas as pd

        columns = [str(c) for c in _list(self.cellvim_attributes.get("well_columns"))]
        given = self.cellvim_attributes.get("wells")
        given = given if isinstance(given, dict) else {}
        rows = [given.get(well) if isinstance(given.get(well), dict) else {} for well in self.wells]
        values = {column: [row.get(column) for row in rows] for column in columns}
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
        """Read the metadata of every field: its layout, or None where it cannot be read."""
        layouts: list[_Layout | None] = []
        for field in self.fields:
            try:
                layouts.append(field.layout)
            except FieldReadError:
                layouts.append(None)
        return layouts

    def oddities(self, *, max_fields: int = 6) -> list[str]:
        """Return what is unusual about the plate, one sentence each; reads pixels of up to ``max_fields`` fields."""
        odd = [*self._notes, *self._against_specification()]
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
            values = Counter(get(layout) for _, layout in known)
            usual_value = values.most_common(1)[0][0] if values else None
            for value, count in values.most_common()[1:]:
                fields = [f.name for f, layout in known if get(layout) == value]
                odd.append(f"{count} fields have another {what} ({value}; most: {usual_value}): {listing(fields)}")
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
        return odd + self._odd_pixels([f for f, _ in known], max_fields)

    def _against_specification(self) -> list[str]:
        """Return where the metadata of the plate, its first well and its first field is not as OME-Zarr says."""
        from pydantic import ValidationError
        from yaozarrs import validate_ome_object

        folders = {"plate": self._root}
        if isinstance(self.fields[0]._folder, type(self._root)) and str(self.fields[0]._folder) != str(self._root):
            folders[f"field {self.fields[0].name}"] = self.fields[0]._folder
        odd = []
        for what, folder in folders.items():
            try:
                attributes = read_attributes(folder) or {}
                validate_ome_object(attributes.get("ome", attributes))
            except PlateError:
                continue  # told elsewhere
            except (ValidationError, TypeError, ValueError, KeyError) as error:
                first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
                where = ".".join(str(part) for part in first["loc"] if "-" not in str(part) or str(part) == "-")
                reason = " ".join(str(first["msg"]).split())[:160]
                odd.append(f"the metadata of the {what} is not as OME-Zarr {self.ome_version} says ({where}: {reason})")
        return odd

    def _odd_pixels(self, fields: list[Field], max_fields: int) -> list[str]:
        step = max(1, len(fields) // max_fields)
        constant: Counter[str] = Counter()
        saturated: Counter[str] = Counter()
        without_value: Counter[str] = Counter()
        odd, looked_at = [], 0
        for field in fields[::step][:max_fields]:
            try:
                image = field.read()
            except FieldReadError as error:
                odd.append(str(error))
                continue
            looked_at += 1
            flat = image.reshape(image.shape[0], -1)
            low, high = flat.min(axis=1), flat.max(axis=1)
            constant.update(n for n, same in zip(field.channel_names, low == high, strict=True) if same)
            if image.dtype.kind == "f":
                finite = np.isfinite(flat).all(axis=1)
                without_value.update(n for n, good in zip(field.channel_names, finite, strict=True) if not good)
            if np.issubdtype(image.dtype, np.unsignedinteger):
                share = (flat == np.iinfo(image.dtype).max).mean(axis=1)
                saturated.update(n for n, s in zip(field.channel_names, share, strict=True) if s > 0.01)
        for name, count in without_value.items():
            odd.append(f"channel {name} has pixels that are NaN or infinite in {count} of {looked_at} fields looked at")
        for name, count in constant.items():
            odd.append(f"channel {name} is constant in {count} of {looked_at} fields looked at")
        for name, count in saturated.items():
            odd.append(
                f"channel {name} is saturated in over 1% of the pixels of {count} of {looked_at} fields looked at"
            )
        return odd


class Field:
    """One field of view of a well. Its metadata is read when first asked for, its pixels with `read`."""

    def __init__(self, plate: Plate, well: str, site: str, folder: Location) -> None:
        self.well, self.site = well, site
        self._folder = folder
        self._plate_path = plate.path
        self._z, self._t, self._level = plate._z, plate._t, plate._level

    def __repr__(self) -> str:
        return f"<Field {self.name}>"

    @property
    def name(self) -> str:
        """``well/site``, unique on the plate."""
        return f"{self.well}/{self.site}"

    @cached_property
    def layout(self) -> _Layout:
        """Shape, type, channels and scale of the field, from its metadata alone."""
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
        """Side of a pixel in µm, or None if the plate does not say."""
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
            Names (matched as in `cellvim.channels.match_channels`) or indices; all if None.
        out
            Memory to decode into, (C, H, W) of the stored type, contiguous; it is what is returned then.

        Returns
        -------
        np.ndarray
            (C, H, W) in the stored type, channels in the order asked for.

        Raises
        ------
        ChannelError
            A channel is not there.
        FieldReadError
            The pixels are missing or cannot be decoded.
        """
        layout = self.layout
        indices = self._indices(channels)
        shape = (len(indices), layout.height, layout.width)
        if out is not None and (out.shape != shape or out.dtype != layout.dtype or not out.flags.c_contiguous):
            raise ValueError(f"out is {out.shape} {out.dtype}; expected {shape} {layout.dtype}, contiguous")
        try:
            array = layout.open()
            image = layout.to_chw(array, indices, z=self._z, t=self._t, out=out)
        except FieldReadError:
            raise
        except Exception as error:  # every codec has its own kinds; the field and the cause are named
            cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise self.error(f"its pixels cannot be read ({cause})") from error
        return image

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the label images that the field has."""
        try:
            attributes = read_attributes(self._folder.child("labels"))
        except PlateError as error:
            raise self.error(str(error).rstrip(".")) from error
        return [str(name) for name in _list(_dig(_dig(attributes, "ome") or attributes, "labels"))]

    def read_labels(self, name: str) -> np.ndarray:
        """Read a label image, at the resolution that the plate was opened at.

        Returns
        -------
        np.ndarray
            (H, W) whole numbers, 0 is background. Labels that are stored coarser than the image are repeated to its
            size, finer ones are thinned out.

        Raises
        ------
        FieldReadError
            There is no such label image, or it cannot be read.
        """
        folder = self._folder.child("labels").inside(name) if name in self.label_names else None
        if folder is None:
            raise self.error(f"it has no label image '{name}'; it has {listing(self.label_names)}")
        holder = Field.__new__(Field)
        holder.well, holder.site, holder._folder, holder._plate_path = self.well, self.site, folder, self._plate_path
        holder._z, holder._t, holder._level = self._z, self._t, 0
        height, width = self.layout.height, self.layout.width
        try:
            n_levels = holder.layout.n_levels
            for level in range(n_levels):  # the finest one that is no finer than the image
                holder._level = level
                holder.__dict__.pop("layout", None)
                if holder.layout.height <= height:
                    break
            labels = holder.read()[0]
        except FieldReadError as error:
            raise self.error(f"its labels '{name}': {str(error).partition('unreadable: ')[2].rstrip('.')}") from error
        if labels.dtype.kind not in "uib":
            raise self.error(f"its labels '{name}' are {labels.dtype}; expected whole numbers")
        if labels.shape == (height, width):
            return labels
        rows, columns = (
            np.minimum((np.arange(n) + 0.5) * m / n, m - 1).astype(np.intp)
            for n, m in zip((height, width), labels.shape, strict=True)
        )
        return labels[rows[:, None], columns]

    def error(self, found: str) -> FieldReadError:
        """Return the error that says what was found in this field."""
        return FieldReadError(f"Field {self.name} of {Path(self._plate_path).name} is unreadable: {found}.")

    def _indices(self, channels: Sequence[str | int] | None) -> list[int]:
        names = self.layout.channel_names
        if channels is None:
            return list(range(len(names)))
        if isinstance(channels, str):
            channels = [channels]
        where = Path(self._plate_path).name
        indices = []
        for channel in channels:
            if isinstance(channel, int | np.integer) and not isinstance(channel, bool):
                if not 0 <= channel < len(names):
                    raise _channel_error(channel, names, where)
                indices.append(int(channel))
            else:
                indices += match_channels([channel], names, where=where)
        return indices


class _Layout:
    """How a field is stored: the array of its full resolution, the axes, the channels and the scale."""

    def __init__(self, field: Field) -> None:
        self._field_error = field.error
        try:
            attributes = read_attributes(field._folder)
        except PlateError as error:
            raise field.error(str(error).rstrip(".")) from error
        if attributes is None:
            raise field.error("there is no OME-Zarr image in its folder")
        ome = attributes.get("ome") if isinstance(attributes.get("ome"), dict) else attributes
        multiscale = _dig(ome, "multiscales", 0)
        levels = _list(_dig(multiscale, "datasets"))
        dataset = _dig(levels, field._level)
        if levels and dataset is None:
            raise field.error(f"level={field._level} was asked for; it has level = 0 to {len(levels) - 1}")
        if not isinstance(dataset, dict):
            raise field.error("its metadata has no multiscales dataset")
        self.n_levels = len(levels)
        folder = field._folder.inside(str(dataset.get("path")))
        if folder is None:
            raise field.error(f"its array lies at '{dataset.get('path')}', outside of the field")
        self.folder = folder
        document = _array_document(folder, field)
        stored_shape, self.dtype = _array_shape_and_type(document, field)
        self.axes = _axes(multiscale, len(stored_shape), field)
        sizes = dict(zip(self.axes, stored_shape, strict=True))
        self.height, self.width = sizes["y"], sizes["x"]
        self.n_z, self.n_t = sizes.get("z", 1), sizes.get("t", 1)
        n_channels = sizes.get("c", 1)
        if 0 in stored_shape:
            raise field.error(f"its array is empty, of shape {stored_shape}")
        planes = n_channels if field._z != "max" else max(n_channels, self.n_z)
        self.n_bytes = planes * self.height * self.width * self.dtype.itemsize
        if self.n_bytes > MAX_FIELD_BYTES:
            raise field.error(f"its declared shape {stored_shape} is larger than any field")
        self._chunked = None
        if isinstance(folder, Folder) and self.axes == [a for a in "tczyx" if a in self.axes]:  # as OME-Zarr wants it
            self._chunked = plan_chunks(folder.path, folder.root, document)
        self.notes: list[str] = []
        self.channel_names, self.channel_colors = _channels(ome, n_channels, self.notes)
        self.pixel_size_um = _pixel_size(multiscale, dataset, self.axes, self.notes)
        if self.n_z > 1:
            self.notes.append(f"fields are stacks of {self.n_z} z planes: open the plate with z=... to choose")
        if self.n_t > 1:
            self.notes.append(f"fields are series of {self.n_t} time points: open the plate with t=... to choose")

    def open(self) -> Any:
        """Open the array of the chosen resolution: a `ChunkedArray` where that can decode its chunks, else Zarr's."""
        if self.n_bytes > SUSPICIOUS_BYTES and self.n_bytes > MAX_COMPRESSION * (stored := self.folder.stored_bytes()):
            raise self._field_error(f"it declares {self.n_bytes:,} bytes of pixels and stores {stored:,}")
        array = self._chunked or open_array(self.folder)
        chunk = int(np.prod(array.chunks, dtype=float)) * self.dtype.itemsize
        if chunk > SUSPICIOUS_BYTES and chunk > 4 * self.n_bytes:
            raise self._field_error(f"its chunks {array.chunks} are far larger than its pixels")
        return array

    def holds_data(self) -> bool:
        """Return whether any chunk of the array is stored."""
        return self.folder.stored_bytes() > 0

    def to_chw(
        self, array: Any, channels: list[int], *, z: int | str | None, t: int | None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read the (C, H, W) pixels of some channels, at one z plane (or projected over z) and one time point."""
        keys: dict[str, Any] = {"y": slice(None), "x": slice(None)}
        keys["t"] = self._choose("t", self.n_t, t)
        keys["z"] = slice(None) if z == "max" else self._choose("z", self.n_z, z)
        if isinstance(array, ChunkedArray):
            image = np.empty((len(channels), self.height, self.width), self.dtype) if out is None else out
            is_empty = self._decode(array, channels, keys, image) == 0
        else:
            image = self._from_zarr(array, channels, keys)
            if out is not None:
                out[:] = image
                image = out
            is_empty = not image.any()
        if is_empty and not self.holds_data():
            # Absent chunks are zeros, and so are empty files to Zarr; a field of nothing else was not written, or lost.
            raise self._field_error("none of its chunks is stored")
        return image

    def _from_zarr(self, array: Any, channels: list[int], keys: dict[str, Any]) -> np.ndarray:
        kept = [a for a in self.axes if a == "c" or isinstance(keys.get(a), slice)]
        order = [kept.index(a) for a in ("c", "z", "y", "x") if a in kept]

        def read(c: Any) -> np.ndarray:
            block = array[tuple(c if a == "c" else keys[a] for a in self.axes)]
            block = np.asarray(block).transpose(order)
            block = block if "c" in kept else block[None]
            return block.max(axis=1) if "z" in kept else block

        if "c" not in self.axes or channels == list(range(len(self.channel_names))):
            return np.ascontiguousarray(read(slice(None)))
        if not channels:
            return np.empty((0, self.height, self.width), self.dtype)
        return np.concatenate([read(slice(c, c + 1)) for c in channels])

    def _decode(self, array: ChunkedArray, channels: list[int], keys: dict[str, Any], image: np.ndarray) -> int:
        """Decode channels into an image, a stack channel by channel; return how many of its chunks are stored."""
        whole = {"y": (0, self.height), "x": (0, self.width), "t": (keys["t"], keys["t"] + 1)}
        stored: list[int] = []

        def read(target: np.ndarray, c: int, z: tuple[int, int]) -> None:
            at = whole | {"z": z, "c": (c, c + len(target) // (z[1] - z[0]))}
            ranges = [at[a] for a in self.axes]
            stored.append(array.read(ranges, target.reshape([stop - start for start, stop in ranges])))

        if isinstance(keys["z"], slice):
            stack = np.empty((self.n_z, self.height, self.width), self.dtype)
            for i, c in enumerate(channels):
                read(stack, c, (0, self.n_z))
                stack.max(axis=0, out=image[i])
            return sum(stored)
        z = (keys["z"], keys["z"] + 1)
        if channels == list(range(len(self.channel_names))):
            read(image, 0, z)
        else:
            for i, c in enumerate(channels):
                read(image[i : i + 1], c, z)
        return sum(stored)

    def _choose(self, axis: str, size: int, chosen: int | str | None) -> int:
        if chosen is None:
            if size > 1:
                what = "z planes" if axis == "z" else "time points"
                projection = " or z='max'" if axis == "z" else ""
                raise self._field_error(
                    f"it has {size} {what} and none was chosen; open the plate with {axis}=0{projection}"
                )
            return 0
        if not isinstance(chosen, int) or not 0 <= chosen < size:
            raise self._field_error(f"{axis}={chosen!r} was asked for; it has {axis} = 0 to {size - 1}")
        return chosen


def read_attributes(folder: Location) -> dict[str, Any] | None:
    """Return the attributes of the Zarr group in a folder (v3 or v2), or None if there is no group.

    Raises
    ------
    PlateError
        The metadata file is there but is not a JSON object.
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


def _not_a_plate(path: Location) -> PlateError:
    names = path.folders()
    arrays = [n for n in names if path.child(n).read("zarr.json") or path.child(n).read(".zarray")]
    if read_attributes(path) is not None or arrays:
        return PlateError(
            f"{path} is Zarr but not an OME-Zarr plate or image (it holds {listing(sorted(arrays)[:5])}); expected "
            "'plate' or 'multiscales' metadata. Convert it, or import its images with `cellvim import`."
        )
    if path.read("zarr.json") is not None or path.read(".zarray") is not None:
        return PlateError(f"{path} is a single Zarr array; expected the folder of a plate or of an OME-Zarr image.")
    if isinstance(path, Folder) and {p.suffix.lower() for p in path.path.iterdir()} & {".tif", ".tiff"}:
        return PlateError(f"{path} is a folder of TIFFs; make a plate of it first: cellvim import {path} plate.zarr")
    if isinstance(path, Remote):
        return PlateError(
            f"{path} is not an OME-Zarr plate, or cannot be reached: it has neither zarr.json nor .zgroup."
        )
    return PlateError(f"{path} is not an OME-Zarr plate: it has neither zarr.json nor .zgroup.")


def _own_name(path: Location) -> str:
    return path.path.resolve().name if isinstance(path, Folder) else path.name


def _dig(node: Any, *keys: str | int) -> Any:
    """Walk into nested JSON; None as soon as something is not there or of another kind."""
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
    """Return the sub-folders that are images, by number."""
    images = []
    for name in folder.folders():
        attributes = read_attributes(folder.child(name)) if name != "OME" else None
        if attributes is not None and "multiscales" in (_dig(attributes, "ome") or attributes):
            images.append(name)
    return sorted(images, key=natural_key)


def _array_document(folder: Location, field: Field) -> dict[str, Any]:
    try:
        document = _read_json(folder, "zarr.json") or _read_json(folder, ".zarray")
    except PlateError as error:
        raise field.error(str(error).rstrip(".")) from error
    if document is None:
        raise field.error(f"its array '{folder.name}' is not there")
    return document


def _array_shape_and_type(document: dict[str, Any], field: Field) -> tuple[tuple[int, ...], np.dtype]:
    shape, dtype = document.get("shape"), document.get("data_type", document.get("dtype"))
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise field.error(f"its array has the shape {shape!r}")
    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise field.error(f"its array has the type {dtype!r}") from error
    if kind.kind not in "uifb":
        raise field.error(f"its pixels are {kind}; expected integers or floats")
    return tuple(shape), kind


def _axes(multiscale: Any, ndim: int, field: Field) -> list[str]:
    axes = [str(_dig(a, "name") if isinstance(a, dict) else a).lower() for a in _list(_dig(multiscale, "axes"))]
    if not axes and ndim == 5:  # before OME-Zarr 0.3 the axes were always these
        axes = list("tczyx")
    if len(axes) != ndim or len(set(axes)) != ndim or not {"y", "x"} <= set(axes) <= set("tczyx"):
        raise field.error(f"its axes are ({', '.join(axes)}) for {ndim} dimensions; expected some of t, c, z, y, x")
    return axes


def _channels(ome: dict[str, Any], count: int, notes: list[str]) -> tuple[list[str], list[str | None]]:
    given = _list(_dig(ome, "omero", "channels"))
    labels = [_dig(c, "label") for c in given]
    colors = [_dig(c, "color") for c in given]
    if len(given) != count:
        notes.append(
            f"the plate names {len(given)} channels but stores {count}" if given else "the plate names no channels"
        )
    names = [
        str(labels[i]) if i < len(labels) and labels[i] not in (None, "") else f"channel_{i}" for i in range(count)
    ]
    return names, [str(colors[i]) if i < len(colors) and colors[i] else None for i in range(count)]


def _pixel_size(multiscale: Any, dataset: Any, axes: list[str], notes: list[str]) -> float | None:
    units = {str(_dig(a, "name")).lower(): _dig(a, "unit") for a in _list(_dig(multiscale, "axes"))}
    scale = {"y": 1.0, "x": 1.0}
    for holder in (dataset, multiscale):
        for transform in _list(_dig(holder, "coordinateTransformations")):
            values = _list(_dig(transform, "scale")) if _dig(transform, "type") == "scale" else []
            if len(values) == len(axes) and all(isinstance(v, int | float) and v > 0 for v in values):
                for axis in scale:
                    scale[axis] *= float(values[axes.index(axis)])
    for axis, unit in ((axis, units.get(axis)) for axis in scale):
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


def _channel_error(index: Any, names: Sequence[str], where: str) -> Exception:
    from cellvim.errors import ChannelError

    return ChannelError(f"Channel number {index} is not in {where}; it has {len(names)}: {listing(names)}.")
