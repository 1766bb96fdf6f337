"""The cells of a field, from segmentation, label images, masks or tables of positions, and their measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
from scipy import ndimage as ndi

from cellvim.channels import canonical_name, find_dna_channel
from cellvim.data.centroids import SUFFIXES, read_centroids, site_text
from cellvim.data.segmentation import segment_cells, segment_nuclei
from cellvim.data.wells import canonical_well
from cellvim.errors import FieldReadError, InputError, MetadataError, PlateError, listing

if TYPE_CHECKING:
    from cellvim.data.plate import Field, Plate

POINT_DIAMETER_UM = 15.0  # of the disc that represents a cell given by its center
POINT_DIAMETER_PX = 24.0  # the same if the pixel size is unknown
MASK_SUFFIXES = (".tif", ".tiff", ".png", ".npy")
MAX_MASK_PIXELS = 1 << 28
DEBRIS_SHARE, CLUMP_SHARE = 0.4, 3.0  # smallest and largest area of a single nucleus, relative to the field's median
MIN_OBJECTS = 5  # for a meaningful median
SMALLEST_UM2, LARGEST_UM2 = 28.0, 1260.0  # areas of circles of 6 and 40 µm in diameter
_LARGEST_LABEL = 1 << 22  # measurements take memory proportional to the largest label
_NOT_CELL_BODY = ("Brightfield", "HighZBF", "LowZBF", "PhaseContrast")


@dataclass(frozen=True)
class Cells:
    """The cells of one field.

    Attributes
    ----------
    table
        One row per cell: ``object_number``, ``x_px``, ``y_px``, ``area_px``, ``area_um2``, ``touches_border``,
        ``mean_intensity_<channel>`` and ``qc_*``, see `measure_cells` and `measure_quality`.
    labels
        (H, W) int32 with each cell's number; discs if only positions were given.
    """

    table: pd.DataFrame
    labels: np.ndarray

    @property
    def centers(self) -> np.ndarray:
        """(n, 2) float64 as (y, x) in pixels."""
        return self.table[["y_px", "x_px"]].to_numpy(np.float64)


class CellSource(Protocol):
    """Finds the cells of a field, deterministically."""

    name: str
    needs_dna: bool
    notes: list[str]

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field with the pixels ``image`` (C, H, W)."""
        ...


def open_cells(spec: str | Path, plate: Plate, *, dna: str | None = None) -> CellSource:
    """Return the source of cells that a user names.

    Parameters
    ----------
    spec
        ``nuclei``: segment nuclei on the DNA channel (the default everywhere). ``cells``: also grow cells around them
        on the other stains. ``cellpose`` or ``cellpose:MODEL``: use cellpose, if installed. ``labels:NAME``: a label
        image of the plate. A table, see `read_centroids`; ``PATH#Cells`` takes the centers of another compartment. A
        folder of masks, one file per field with names like the images; ``PATH#Nuclei`` takes only files with that word
        in their names.
    plate
        The plate.
    dna
        The plate's channel that shows nuclei, if its name does not identify it.

    Raises
    ------
    InputError
        The source does not exist or does not fit the plate.
    """
    text = str(spec)
    kind, _, rest = text.partition(":")
    if text == "nuclei":
        return NucleusSegmentation(dna)
    if text == "cells":
        return CellSegmentation(dna)
    if kind == "cellpose" and not Path(text).exists():
        return CellposeSegmentation(rest or None, dna)
    if kind == "labels" and rest:
        return PlateLabels(rest, plate)
    path, _, word = text.rpartition("#") if "#" in text and not Path(text).exists() else (text, "", "")
    if Path(path).is_dir():
        return MaskFolder(Path(path), plate, word or None)
    if Path(path).is_file() and path.lower().endswith(SUFFIXES):
        return CentroidTable(Path(path), plate, word or None)
    raise InputError(
        f"--cells '{text}' is not nuclei, cells, cellpose, labels:NAME, a table ({listing(SUFFIXES)}) or a folder of "
        "masks."
    )


class NucleusSegmentation:
    """Nuclei, see `segment_nuclei`."""

    name = "nuclei"
    needs_dna = True

    def __init__(self, dna: str | None = None) -> None:
        self.dna = dna
        self.notes: list[str] = []

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field with the pixels ``image`` (C, H, W)."""
        if self.dna is None:
            dna = find_dna_channel(channel_names, where=field.name)
        else:
            dna = list(channel_names).index(self.dna)
        labels = self._segment(image, dna, channel_names, field.pixel_size_um)
        return cells_of_labels(labels, image, channel_names, field.pixel_size_um, dna=dna)

    def _segment(
        self, image: np.ndarray, dna: int, channel_names: Sequence[str], pixel_size_um: float | None
    ) -> np.ndarray:
        return segment_nuclei(image[dna], pixel_size_um)


class CellSegmentation(NucleusSegmentation):
    """Nuclei, grown over the other stains with `segment_cells`."""

    name = "cells"

    def _segment(
        self, image: np.ndarray, dna: int, channel_names: Sequence[str], pixel_size_um: float | None
    ) -> np.ndarray:
        stains = [
            plane
            for i, (name, plane) in enumerate(zip(channel_names, image, strict=True))
            if i != dna and canonical_name(name) not in _NOT_CELL_BODY
        ]
        nuclei = segment_nuclei(image[dna], pixel_size_um)
        return segment_cells(nuclei, np.stack(stains) if stains else image[dna][None], pixel_size_um)


class CellposeSegmentation(NucleusSegmentation):
    """Nuclei segmented by cellpose, which is not a dependency: ``pip install cellpose``."""

    def __init__(self, model: str | None = None, dna: str | None = None) -> None:
        super().__init__(dna)
        try:
            from cellpose import models
        except ImportError as error:
            raise InputError("--cells cellpose needs cellpose: pip install cellpose, or use --cells nuclei.") from error
        import torch

        self.name = f"cellpose:{model}" if model else "cellpose"
        named = {"pretrained_model": model} if model else {}
        self._model = models.CellposeModel(gpu=torch.cuda.is_available(), **named)

    def _segment(
        self, image: np.ndarray, dna: int, channel_names: Sequence[str], pixel_size_um: float | None
    ) -> np.ndarray:
        return np.asarray(self._model.eval(np.asarray(image[dna], np.float32))[0], np.int32)


class PlateLabels:
    """A label image of the plate."""

    needs_dna = False

    def __init__(self, label: str, plate: Plate) -> None:
        self.label, self.name = label, f"labels:{label}"
        self.notes: list[str] = []
        known: dict[str, None] = {}
        for field in plate.fields:
            known |= dict.fromkeys(field.label_names)
            if label in known:
                return
        raise InputError(f"{Path(plate.path).name} has no label image '{label}'; it has {listing(known)}.")

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field with the pixels ``image`` (C, H, W)."""
        labels = compact_labels(field.read_labels(self.label), field)
        if labels.shape != image.shape[1:]:
            raise field.error(f"its labels '{self.label}' are {labels.shape} where the image is {image.shape[1:]}")
        return cells_of_labels(labels, image, channel_names, field.pixel_size_um)


class MaskFolder:
    """A folder of label images or masks, one file per field, with names like those of the images.

    A file with a single value besides 0 is a mask whose connected parts are the cells; any other is a label image.
    """

    needs_dna = False

    def __init__(self, folder: Path, plate: Plate, word: str | None = None) -> None:
        self.folder, self.name = folder, f"masks:{folder.name}" + (f"#{word}" if word else "")
        files = [
            p for p in sorted(folder.rglob("*")) if p.suffix.lower() in MASK_SUFFIXES and not p.name.startswith(".")
        ]
        chosen = [p for p in files if word is None or word.lower() in p.name.lower()]
        if not chosen:
            named = f" with '{word}' in the name" if word else ""
            raise InputError(f"{folder} has no mask files{named}; it has {listing((p.name for p in files), 4)}.")
        sites: dict[str, set[str]] = {}
        for well, site in map(_position, plate.fields):
            sites.setdefault(well, set()).add(site)
        self._files: dict[tuple[str, str], Path] = {}
        unplaced = []
        for path in chosen:
            position = _position_in_name(path.name, sites)
            if position is None:
                unplaced.append(path.name)
                continue
            if position in self._files:
                raise InputError(
                    f"{folder}: {self._files[position].name} and {path.name} are both for field {'/'.join(position)}; "
                    f"choose with a word of the name, as in '{folder}#Nuclei'."
                )
            self._files[position] = path
        if not self._files:
            raise InputError(
                f"{folder}: none of its {len(chosen)} mask files ({listing(unplaced, 3)}) names a field of "
                f"{Path(plate.path).name}, such as {listing((f.name for f in plate.fields), 3)}."
            )
        missing = [f.name for f in plate.fields if _position(f) not in self._files]
        self.notes = [f"{len(missing)} fields have no mask in {folder.name}: {listing(missing)}"] if missing else []
        if unplaced:
            self.notes.append(f"{len(unplaced)} masks of {folder.name} belong to no field: {listing(unplaced, 4)}")

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field with the pixels ``image`` (C, H, W)."""
        path = self._files.get(_position(field))
        if path is None:
            raise field.error(f"there is no mask for it in {self.folder.name}")
        labels = read_mask(path, field)
        if labels.shape != image.shape[1:]:
            raise field.error(f"its mask {path.name} is {labels.shape} where the image is {image.shape[1:]}")
        return cells_of_labels(labels, image, channel_names, field.pixel_size_um)


class CentroidTable:
    """Positions from a table; each cell is represented by a disc of the size of a nucleus for its measurements."""

    needs_dna = False

    def __init__(self, path: Path, plate: Plate, object_name: str | None = None) -> None:
        self.name = f"table:{path.name}" + (f"#{object_name}" if object_name else "")
        table = read_centroids(path, plate_name=plate.name, object_name=object_name)
        if table["well"].isna().any():
            if len(plate.fields) > 1:
                raise MetadataError(
                    f"{path} has no well for its cells, and {Path(plate.path).name} has {len(plate.fields)} fields. "
                    "Add a column Well (and Site), or put CellProfiler's Image.csv beside the file."
                )
            well, site = _position(plate.fields[0])
            table = table.assign(well=well, site=site)
        if table["site"].isna().any():
            several = [w for w in plate.wells if sum(f.well == w for f in plate.fields) > 1]
            if several:
                raise MetadataError(f"{path} has no site for its cells, and {several[0]} has several fields.")
            table["site"] = table["well"].map(dict(map(_position, plate.fields)))
        self._tables = dict(iter(table.groupby(["well", "site"], sort=False)))
        fields = set(map(_position, plate.fields))
        if not fields & set(self._tables):
            raise MetadataError(
                f"{path} has cells of {listing(('/'.join(map(str, k)) for k in self._tables), 4)}; "
                f"{Path(plate.path).name} has the fields {listing((f.name for f in plate.fields), 4)}."
            )
        without = [f.name for f in plate.fields if _position(f) not in self._tables]
        others = ["/".join(map(str, k)) for k in self._tables if k not in fields]
        self.notes = [f"{len(without)} fields have no cells in {path.name}: {listing(without)}"] if without else []
        if others:
            self.notes.append(f"{path.name} has cells of {len(others)} fields without images: {listing(others)}")

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field with the pixels ``image`` (C, H, W)."""
        rows = self._tables.get(_position(field))
        if rows is None:
            rows = pd.DataFrame({"number": np.zeros(0, int), "x": np.zeros(0), "y": np.zeros(0)})
        pixel = field.pixel_size_um
        if "x" not in rows:
            if not pixel:
                raise field.error("the table of cells is in µm, and the plate has no pixel size")
            rows = rows.assign(x=rows["x_um"] / pixel - 0.5, y=rows["y_um"] / pixel - 0.5)
        height, width = image.shape[1:]
        inside = rows["x"].between(-0.5, width - 0.5) & rows["y"].between(-0.5, height - 0.5)
        if (~inside).any():
            self.notes.append(f"{int((~inside).sum())} cells of field {field.name} lie outside of it and were left out")
        rows = rows[inside]
        numbers = rows["number"].to_numpy()
        if pd.unique(numbers).size != numbers.size:
            raise field.error("the table of cells has two cells with the same number")
        positions = rows[["y", "x"]].to_numpy()
        labels = discs(positions, (height, width), POINT_DIAMETER_UM / pixel if pixel else POINT_DIAMETER_PX)
        cells = cells_of_labels(labels, image, channel_names, pixel)
        index = cells.table["object_number"].to_numpy() - 1
        y, x = positions[index].T
        lookup = np.concatenate([[0], numbers]).astype(np.int32)
        return Cells(cells.table.assign(object_number=numbers[index], x_px=x, y_px=y), lookup[cells.labels])


def cells_of_labels(
    labels: np.ndarray,
    image: np.ndarray,
    channel_names: Sequence[str],
    pixel_size_um: float | None = None,
    *,
    dna: int | None = None,
) -> Cells:
    """Measure labelled cells: position, size, intensity and quality.

    Parameters
    ----------
    labels
        (H, W) integers, 0 is background.
    image
        (C, H, W).
    channel_names
        C names.
    pixel_size_um
        Side of a pixel.
    dna
        Index of the channel on which focus is measured; by default the one named DNA, or the first.
    """
    labels = np.ascontiguousarray(labels, np.int32)
    measured = measure_cells(labels, image, channel_names, pixel_size_um)
    if dna is None:
        dna = next((i for i, name in enumerate(channel_names) if canonical_name(name) == "DNA"), None)
    quality = measure_quality(labels, image, channel_names, dna=dna, pixel_size_um=pixel_size_um)
    return Cells(measured.join(quality, on="object_number"), labels)


class _Objects:
    """The pixels of labelled objects: numbers (n,), areas (n,) in px, and flat indices of all pixels."""

    def __init__(self, labels: np.ndarray, image: np.ndarray, channel_names: Sequence[str]) -> None:
        if image.shape != (len(channel_names), *labels.shape):
            raise ValueError(
                f"the image has the shape {image.shape}; expected ({len(channel_names)}, {labels.shape[0]}, "
                f"{labels.shape[1]}) for {len(channel_names)} channel names and these labels"
            )
        self.pixels = np.flatnonzero(labels)
        self._label = labels.ravel()[self.pixels].astype(np.int64)
        self._count = int(self._label.max(initial=0)) + 1
        area = np.bincount(self._label, minlength=self._count)
        self.numbers = np.flatnonzero(area)
        self.area = area[self.numbers]
        touches = np.zeros(self._count, bool)
        for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]) if labels.size else ():
            touches[side] = True
        self.touches_border = touches[self.numbers]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of each object over values given per pixel."""
        return np.bincount(self._label, weights=values, minlength=self._count)[self.numbers] / self.area


def measure_cells(
    labels: np.ndarray, image: np.ndarray, channel_names: Sequence[str], pixel_size_um: float | None = None
) -> pd.DataFrame:
    """Measure the position, size and intensity of every labelled object.

    Parameters
    ----------
    labels
        (H, W) integers, 0 is background.
    image
        (C, H, W), any numeric type.
    channel_names
        C names.
    pixel_size_um
        Side of a pixel.

    Returns
    -------
    pandas.DataFrame
        One row per object, by number: ``object_number``, ``x_px`` and ``y_px`` (centroid; the center of the first
        pixel is 0), ``area_px``, ``area_um2`` (NaN without a pixel size), ``touches_border``, and
        ``mean_intensity_<channel>`` for each channel.
    """
    objects = _Objects(labels, image, channel_names)
    area = objects.area
    y, x = np.divmod(objects.pixels, labels.shape[1])
    table = {
        "object_number": objects.numbers,
        "x_px": objects.mean(x),
        "y_px": objects.mean(y),
        "area_px": area,
        "area_um2": area * float(pixel_size_um) ** 2 if pixel_size_um else np.full(len(area), np.nan),
        "touches_border": objects.touches_border,
    }
    for name, plane in zip(channel_names, image, strict=True):
        table[f"mean_intensity_{name}"] = objects.mean(plane.ravel()[objects.pixels])
    return pd.DataFrame(table)


def measure_quality(
    labels: np.ndarray,
    image: np.ndarray,
    channel_names: Sequence[str],
    *,
    dna: int | None = None,
    pixel_size_um: float | None = None,
) -> pd.DataFrame:
    """Measure the quality of every labelled object: focus, saturation, and signs of debris.

    Parameters
    ----------
    labels
        (H, W) integers, 0 is background.
    image
        (C, H, W), any numeric type.
    channel_names
        C names.
    dna
        Index of the channel on which focus is measured; the first by default.
    pixel_size_um
        Side of a pixel, for detecting debris by absolute size in fields with few objects.

    Returns
    -------
    pandas.DataFrame
        One row per object, indexed by number:

        ``qc_focus``
            Variance of the Laplacian over the object's pixels [1]_, divided by the square of its mean intensity: it
            decreases when the image is out of focus, independently of the exposure. NaN if the mean is 0.
        ``qc_saturated_<channel>``
            Fraction of its pixels with the largest value of the pixel type (0 for floats).
        ``qc_area_ratio``
            Its area divided by the median of the field.
        ``qc_border``
            Whether it touches the border of the field.
        ``qc_debris``
            Whether it is too small or too large for a single nucleus: below 0.4 or above 3 medians or, in a field
            with fewer than five objects, outside of 6 to 40 µm in diameter.

    References
    ----------
    .. [1] Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy: a comparative study", ICPR 2000.
    """
    objects = _Objects(labels, image, channel_names)
    area, pixels = objects.area, objects.pixels
    plane = np.nan_to_num(np.asarray(image[dna or 0], np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    laplacian = ndi.laplace(plane).ravel()[pixels].astype(np.float64)
    level = objects.mean(plane.ravel()[pixels].astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = objects.mean(laplacian**2) - objects.mean(laplacian) ** 2
        focus = np.where(level > 0, variance / level**2, np.nan)
    ratio = area / np.median(area) if len(area) else np.zeros(0)
    if len(area) >= MIN_OBJECTS or not pixel_size_um:
        debris = (ratio < DEBRIS_SHARE) | (ratio > CLUMP_SHARE)
    else:
        um2 = area * pixel_size_um**2
        debris = (um2 < SMALLEST_UM2) | (um2 > LARGEST_UM2)
    table = {"qc_focus": focus, "qc_area_ratio": ratio, "qc_border": objects.touches_border, "qc_debris": debris}
    largest = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else None
    for name, channel in zip(channel_names, image, strict=True):
        full = np.zeros(len(pixels)) if largest is None else channel.ravel()[pixels] == largest
        table[f"qc_saturated_{name}"] = objects.mean(full.astype(np.float64))
    return pd.DataFrame(table, index=pd.Index(objects.numbers, name="object_number"))


def discs(centers: np.ndarray, shape: tuple[int, int], diameter_px: float) -> np.ndarray:
    """Draw a disc around each position; a pixel in several discs belongs to the nearest center.

    Returns
    -------
    np.ndarray
        (H, W) int32 with 1..n in the order of the centers (n, 2), given as (y, x).
    """
    from scipy.spatial import cKDTree

    labels = np.zeros(shape, np.int32)
    if not len(centers):
        return labels
    radius = diameter_px / 2
    reach = int(np.ceil(radius))
    offset = np.arange(-reach, reach + 1)
    dy, dx = (a.ravel() for a in np.meshgrid(offset, offset, indexing="ij"))
    near = np.floor(np.asarray(centers, np.float64) + 0.5).astype(np.int64)
    y, x = near[:, :1] + dy, near[:, 1:] + dx  # (n, k)
    inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    pixels = np.unique(y[inside] * shape[1] + x[inside])
    points = np.stack(np.divmod(pixels, shape[1]), axis=1)
    distance, owner = cKDTree(centers).query(points, distance_upper_bound=radius + 0.5)
    close = distance <= radius + 1e-9
    labels.ravel()[pixels[close]] = owner[close] + 1
    own = np.clip(near, 0, np.array(shape) - 1)
    unseen = ~np.isin(np.arange(1, len(centers) + 1), labels)  # every cell has at least one pixel
    labels[tuple(own[unseen].T)] = np.flatnonzero(unseen) + 1
    return labels


def read_mask(path: Path, field: Field) -> np.ndarray:
    """Return the (H, W) int32 labels of a mask file: TIFF, PNG or npy."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.size > MAX_MASK_PIXELS:
                raise field.error(f"its mask {path.name} has the shape {array.shape}")
            array = np.array(array)
        elif path.suffix.lower() == ".png":
            from skimage.io import imread

            array = imread(path)
        else:
            import tifffile

            with tifffile.TiffFile(path) as tiff:
                if np.prod(tiff.pages[0].shape, dtype=float) > MAX_MASK_PIXELS:
                    raise field.error(f"its mask {path.name} has the shape {tiff.pages[0].shape}")
                array = tiff.pages[0].asarray()
    except (FieldReadError, PlateError):
        raise
    except Exception as error:  # every codec raises exceptions of its own
        raise field.error(f"its mask {path.name} cannot be read ({type(error).__name__}: {error})") from error
    return compact_labels(array, field, split_masks=True)


def compact_labels(array: np.ndarray, field: Field, *, split_masks: bool = False) -> np.ndarray:
    """Return labels as (H, W) int32, renumbered in their order if a number is very large.

    With ``split_masks``, the connected parts of an image with a single value besides 0 become the labels.
    """
    array = np.asarray(array).squeeze()
    if array.ndim != 2 or array.dtype.kind not in "uib":
        raise field.error(f"its labels are {array.shape} {array.dtype}; expected integers (height, width)")
    values = np.unique(array)
    if values.size and values[0] < 0:
        raise field.error(f"its labels are below 0 ({values[0]})")
    if split_masks and values[values > 0].size == 1:
        return ndi.label(array > 0)[0].astype(np.int32)
    if values.size and values[-1] > _LARGEST_LABEL:
        array = np.searchsorted(values, array) + (0 if values[0] == 0 else 1)
    return array.astype(np.int32)


_POSITIONS = (
    r"r(?P<row>\d{2})c(?P<column>\d{2})f(?P<site>\d+)",
    r"Channel\d+-\d+-(?P<row>[A-P])-(?P<column>\d{1,2})",
    r"(?<![A-Za-z0-9])(?P<well>[A-P]\d{1,2})_\d+_\d+_(?P<site>\d+)(?=_)",
    r"(?<![A-Za-z0-9])(?P<well>[A-P]\d{1,2})[_-](?:[sf]|site|field)?(?P<site>\d+)(?!\d)",
    r"(?<![A-Za-z0-9])(?P<well>[A-P]\d{1,2})(?![A-Za-z0-9])",
)


def _position(field: Field) -> tuple[str, str]:
    """Return the well and site of a field as they are written in tables and file names."""
    return field.well, str(site_text(field.site))


def _position_in_name(name: str, sites: dict[str, set[str]]) -> tuple[str, str] | None:
    """Return the (well, site) in a mask's name, if the plate has it."""
    for expression in _POSITIONS:
        match = re.search(expression, name)
        if match is None:
            continue
        groups = match.groupdict()
        text = groups.get("well") or f"{groups['row']}{groups['column']}"
        if "well" not in groups and groups["row"].isdigit():
            text = f"r{groups['row']}c{groups['column']}"
        try:
            well = canonical_well(text)
        except MetadataError:
            continue
        site = site_text(groups.get("site"))
        if site is None and len(sites.get(well, ())) == 1:
            site = next(iter(sites[well]))
        if site in sites.get(well, ()):
            return well, str(site)
    return None
