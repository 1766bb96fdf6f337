"""Where a field's cells come from: segmentation, label images, a folder of masks, or a table of positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cellvim.channels import canonical_name, find_dna_channel
from cellvim.data.centroids import SUFFIXES, read_centroids, site_text
from cellvim.data.segmentation import segment_cells, segment_nuclei
from cellvim.errors import FieldReadError, InputError, MetadataError, PlateError, listing

if TYPE_CHECKING:
    import pandas as pd

    from cellvim.data.plate import Field, Plate

POINT_DIAMETER_UM = 15.0  # of the disc that stands for a cell of which only the centre is known
POINT_DIAMETER_PX = 24.0  # and where the pixel size is unknown
MASK_SUFFIXES = (".tif", ".tiff", ".png", ".npy")
MAX_MASK_PIXELS = 1 << 28
_LARGEST_LABEL = 1 << 22  # measuring takes memory for each number up to the largest


@dataclass(frozen=True)
class Cells:
    """The cells of one field.

    Attributes
    ----------
    table
        One row a cell: ``object_number``, ``x_px``, ``y_px``, ``area_px``, ``area_um2``, ``touches_border``,
        ``mean_intensity_<channel>`` and ``qc_*``, see `measure_cells` and `measure_quality`.
    labels
        (H, W) int32 with each cell's number; discs where only positions were given.
    """

    table: pd.DataFrame
    labels: np.ndarray

    @property
    def centers(self) -> np.ndarray:
        """(n, 2) float64 as (y, x) in pixels."""
        return self.table[["y_px", "x_px"]].to_numpy(np.float64)


class CellSource(Protocol):
    """Finds the cells of a field; the same ones every time."""

    name: str
    needs_dna: bool
    notes: list[str]

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field whose pixels (C, H, W) have been read."""
        ...


def open_cells(spec: str | Path, plate: Plate, *, dna: str | None = None) -> CellSource:
    """Return the source of cells that a user names.

    Parameters
    ----------
    spec
        ``nuclei``: segment nuclei on the DNA channel (the default everywhere). ``cells``: grow cells around them on the
        other stains. ``cellpose`` or ``cellpose:MODEL``: when cellpose is installed. ``labels:NAME``: a label image of
        the plate. A table's path, see `read_centroids`; ``PATH#Cells`` takes the centres of another compartment. A
        folder's path: masks, one file a field, named like the images; ``PATH#Nuclei`` takes only files with that word
        in their names.
    plate
        The plate that they are for.
    dna
        The plate's channel that shows nuclei, where its name does not say so.

    Raises
    ------
    InputError
        There is no such source, or it does not fit the plate.
    """
    text = str(spec)
    kind, _, rest = text.partition(":")
    if text == "nuclei":
        return NucleusSegmentation(dna=dna)
    if text == "cells":
        return CellSegmentation(dna=dna)
    if kind == "cellpose" and not Path(text).exists():
        return CellposeSegmentation(rest or None, dna=dna)
    if kind == "labels" and rest:
        return PlateLabels(rest, plate)
    path, _, which = text.rpartition("#") if "#" in text and not Path(text).exists() else (text, "", "")
    if Path(path).is_dir():
        return MaskFolder(Path(path), plate, which or None)
    if Path(path).is_file() and path.lower().endswith(SUFFIXES):
        return CentroidTable(Path(path), plate, which or None)
    raise InputError(
        f"--cells '{text}' is none of nuclei, cells, cellpose, labels:NAME, a table ({listing(SUFFIXES)}) or a folder "
        "of masks."
    )


def cells_of_labels(
    labels: np.ndarray,
    image: np.ndarray,
    channel_names: Sequence[str],
    pixel_size_um: float | None = None,
    *,
    table: pd.DataFrame | None = None,
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
    table
        ``number``, ``x_px``, ``y_px``: given positions, which replace the labels' own centroids.
    dna
        Index of the channel that focus is judged on; by default the one whose name says so, or the first.
    """
    labels = np.ascontiguousarray(labels, np.int32)
    measured = measure_cells(labels, image, channel_names, pixel_size_um)
    if dna is None:
        dna = next((i for i, name in enumerate(channel_names) if canonical_name(name) == "DNA"), None)
    quality = measure_quality(labels, image, channel_names, dna=dna, pixel_size_um=pixel_size_um)
    measured = measured.join(quality, on="object_number")
    if table is not None:
        given = table.set_index("number").reindex(measured["object_number"])
        measured = measured.assign(x_px=given["x_px"].to_numpy(), y_px=given["y_px"].to_numpy())
    return Cells(measured, labels)


def discs(centers: np.ndarray, shape: tuple[int, int], diameter_px: float) -> np.ndarray:
    """Draw a disc for each position; where discs overlap, a pixel belongs to the nearest centre.

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
    own = np.clip(near, 0, np.array(shape) - 1)  # the smallest disc is one pixel
    unseen = ~np.isin(np.arange(1, len(centers) + 1), labels)
    labels[tuple(own[unseen].T)] = np.flatnonzero(unseen) + 1
    return labels


def _dna_channel(given: str | None, channel_names: Sequence[str], field: Field) -> int:
    if given is not None:
        return list(channel_names).index(given)
    return find_dna_channel(channel_names, where=field.name)


@dataclass
class NucleusSegmentation:
    """Nuclei by `cellvim.data.segmentation.segment_nuclei`."""

    name: str = "nuclei"
    needs_dna: bool = True
    notes: list[str] = default(default_factory=list)
    dna: str | None = None

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field whose pixels (C, H, W) have been read."""
        dna = _dna_channel(self.dna, channel_names, field)
        labels = segment_nuclei(image[dna], field.pixel_size_um)
        return cells_of_labels(labels, image, channel_names, field.pixel_size_um, dna=dna)


@dataclass
class CellSegmentation:
    """Nuclei, grown over the other stains by `cellvim.data.segmentation.segment_cells`."""

    name: str = "cells"
    needs_dna: bool = True
    notes: list[str] = default(default_factory=list)
    dna: str | None = None

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field whose pixels (C, H, W) have been read."""
        dna = _dna_channel(self.dna, channel_names, field)
        body = [
            plane
            for i, (name, plane) in enumerate(zip(channel_names, image, strict=True))
            if i != dna and canonical_name(name) not in ("Brightfield", "HighZBF", "LowZBF", "PhaseContrast")
        ]
        nuclei = segment_nuclei(image[dna], field.pixel_size_um)
        labels = segment_cells(nuclei, np.stack(body) if body else image[dna][None], field.pixel_size_um)
        return cells_of_labels(labels, image, channel_names, field.pixel_size_um, dna=dna)


class CellposeSegmentation:
    """Nuclei by cellpose, which is not a dependency: ``pip install cellpose``."""

    needs_dna = True

    def __init__(self, model: str | None = None, *, dna: str | None = None) -> None:
        self.dna = dna
        try:
            from cellpose import models
        except ImportError as error:
            raise InputError("--cells cellpose needs cellpose: pip install cellpose, or use --cells nuclei.") from error
        import torch

        self.name = f"cellpose:{model}" if model else "cellpose"
        self.notes: list[str] = []
        options: dict[str, Any] = {"gpu": torch.cuda.is_available()}
        self._model = models.CellposeModel(**options, **({"pretrained_model": model} if model else {}))

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field whose pixels (C, H, W) have been read."""
        dna = _dna_channel(self.dna, channel_names, field)
        masks = self._model.eval(np.asarray(image[dna], np.float32))[0]
        return cells_of_labels(np.asarray(masks, np.int32), image, channel_names, field.pixel_size_um, dna=dna)


class PlateLabels:
    """A label image that the plate itself holds."""

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
        """Return the cells of a field whose pixels (C, H, W) have been read."""
        labels = _compact(field.read_labels(self.label), field)
        if labels.shape != image.shape[1:]:
            raise field.error(f"its labels '{self.label}' are {labels.shape} where the image is {image.shape[1:]}")
        return cells_of_labels(labels, image, channel_names, field.pixel_size_um)


class MaskFolder:
    """A folder of label images or masks, one file a field, named as the images are.

    A file with one value besides 0 is a mask, and its connected parts are the cells; any other is a label image.
    """

    needs_dna = False

    def __init__(self, folder: Path, plate: Plate, which: str | None = None) -> None:
        self.folder, self.name = folder, f"masks:{folder.name}" + (f"#{which}" if which else "")
        files = [
            p for p in sorted(folder.rglob("*")) if p.suffix.lower() in MASK_SUFFIXES and not p.name.startswith(".")
        ]
        chosen = [p for p in files if which is None or which.lower() in p.name.lower()]
        if not chosen:
            named = f" with '{which}' in the name" if which else ""
            raise InputError(f"{folder} has no mask files{named}; it has {listing((p.name for p in files), 4)}.")
        sites: dict[str, set[str]] = {}
        for field in plate.fields:
            sites.setdefault(field.well, set()).add(str(site_text(field.site)))
        self._files: dict[tuple[str, str], Path] = {}
        unplaced = []
        for path in chosen:
            place = _place(path, sites)
            if place is None:
                unplaced.append(path.name)
                continue
            if place in self._files:
                raise InputError(
                    f"{folder}: {self._files[place].name} and {path.name} are both for field {'/'.join(place)}; choose "
                    f"with a word of the name, as in '{folder}#Nuclei'."
                )
            self._files[place] = path
        if not self._files:
            raise InputError(
                f"{folder}: none of its {len(chosen)} mask files ({listing(unplaced, 3)}) names a field of "
                f"{Path(plate.path).name}, such as {listing((f.name for f in plate.fields), 3)}."
            )
        missing = [f.name for f in plate.fields if (f.well, str(site_text(f.site))) not in self._files]
        self.notes = [f"{len(missing)} fields have no mask in {folder.name}: {listing(missing)}"] if missing else []
        if unplaced:
            self.notes.append(f"{len(unplaced)} masks of {folder.name} belong to no field: {listing(unplaced, 4)}")

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field whose pixels (C, H, W) have been read."""
        path = self._files.get((field.well, str(site_text(field.site))))
        if path is None:
            raise field.error(f"there is no mask for it in {self.folder.name}")
        labels = read_mask(path, field)
        if labels.shape != image.shape[1:]:
            raise field.error(f"its mask {path.name} is {labels.shape} where the image is {image.shape[1:]}")
        return cells_of_labels(labels, image, channel_names, field.pixel_size_um)


class CentroidTable:
    """Positions from a table; each cell is drawn as a disc of a nucleus' size for its measurements."""

    needs_dna = False

    def __init__(self, path: Path, plate: Plate, object_name: str | None = None) -> None:
        self.name = f"table:{path.name}" + (f"#{object_name}" if object_name else "")
        table = read_centroids(path, plate_name=plate.name, object_name=object_name)
        if table["well"].isna().any():
            if len(plate.fields) > 1:
                raise MetadataError(
                    f"{path} does not say which well a cell is in, and {Path(plate.path).name} has "
                    f"{len(plate.fields)} fields. Give it a column Well (and Site), or put CellProfiler's Image.csv "
                    "beside it."
                )
            table = table.assign(well=plate.fields[0].well, site=str(site_text(plate.fields[0].site)))
        if table["site"].isna().any():
            several = [w for w in plate.wells if sum(f.well == w for f in plate.fields) > 1]
            if several:
                raise MetadataError(
                    f"{path} does not say which site a cell is in, and {several[0]} has several fields."
                )
            only = {f.well: str(site_text(f.site)) for f in plate.fields}
            table["site"] = table["well"].map(only)
        self._tables = dict(iter(table.groupby(["well", "site"], sort=False)))
        fields = {(f.well, str(site_text(f.site))) for f in plate.fields}
        if not fields & set(self._tables):
            raise MetadataError(
                f"{path} has cells of {listing(('/'.join(map(str, k)) for k in self._tables), 4)}; "
                f"{Path(plate.path).name} has the fields {listing((f.name for f in plate.fields), 4)}."
            )
        without = [f.name for f in plate.fields if (f.well, str(site_text(f.site))) not in self._tables]
        beyond = ["/".join(map(str, k)) for k in self._tables if k not in fields]
        self.notes = [f"{len(without)} fields have no cells in {path.name}: {listing(without)}"] if without else []
        if beyond:
            self.notes.append(f"{path.name} has cells of {len(beyond)} fields without images: {listing(beyond)}")

    def find(self, field: Field, image: np.ndarray, channel_names: Sequence[str]) -> Cells:
        """Return the cells of a field whose pixels (C, H, W) have been read."""
        import pandas as pd

        rows = self._tables.get((field.well, str(site_text(field.site))))
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
            raise field.error("the table of cells numbers two of them the same")
        table = pd.DataFrame(
            {"number": np.arange(1, len(rows) + 1), "x_px": rows["x"].to_numpy(), "y_px": rows["y"].to_numpy()}
        )
        diameter = POINT_DIAMETER_UM / pixel if pixel else POINT_DIAMETER_PX
        labels = discs(rows[["y", "x"]].to_numpy(), (height, width), diameter)
        cells = cells_of_labels(labels, image, channel_names, pixel, table=table)
        own = numbers[cells.table["object_number"] - 1]
        lookup = np.concatenate([[0], numbers]).astype(np.int32)
        return Cells(cells.table.assign(object_number=own), lookup[cells.labels])


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
    except Exception as error:  # every codec has its own kinds
        raise field.error(f"its mask {path.name} cannot be read ({type(error).__name__}: {error})") from error
    return _compact(array, field, mask_too=True)


def _compact(array: np.ndarray, field: Field, *, mask_too: bool = False) -> np.ndarray:
    """Return int32 labels: parts of a mask are told apart, numbers beyond int32 are renumbered in their order."""
    from scipy import ndimage as ndi

    array = np.asarray(array).squeeze()
    if array.ndim != 2 or array.dtype.kind not in "uib":
        raise field.error(f"its labels are {array.shape} {array.dtype}; expected whole numbers (height, width)")
    values = np.unique(array)
    if values.size and values[0] < 0:
        raise field.error(f"its labels are below 0 ({values[0]})")
    if mask_too and values[values > 0].size == 1:
        return ndi.label(array > 0)[0].astype(np.int32)
    if values.size and values[-1] > _LARGEST_LABEL:
        array = np.searchsorted(values, array) + (0 if values[0] == 0 else 1)
    return array.astype(np.int32)


_PLACES = (
    r"r(?P<row>\d{2})c(?P<column>\d{2})f(?P<site>\d+)",
    r"Channel\d+-\d+-(?P<row>[A-P])-(?P<column>\d{1,2})",
    r"(?<![A-Za-z0-9])(?P<well>[A-P]\d{1,2})_\d+_\d+_(?P<site>\d+)(?=_)",
    r"(?<![A-Za-z0-9])(?P<well>[A-P]\d{1,2})[_-](?:[sf]|site|field)?(?P<site>\d+)(?!\d)",
    r"(?<![A-Za-z0-9])(?P<well>[A-P]\d{1,2})(?![A-Za-z0-9])",
)


def _place(path: Path, sites: dict[str, set[str]]) -> tuple[str, str] | None:
    """Return the (well, site) that a mask's name tells, if the plate has it."""
    from cellvim.data.wells import canonical_well

    for expression in _PLACES:
        match = re.search(expression, path.name)
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


def measure_cells(
    labels: np.ndarray, image: np.ndarray, channel_names: Sequence[str], pixel_size_um: float | None = None
) -> pd.DataFrame:
    """Measure every labelled object.

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
        One row an object, by number: ``object_number``, ``x_px`` and ``y_px`` (centroid; the middle of the first
        pixel is 0), ``area_px``, ``area_um2`` (NaN without a pixel size), ``touches_border``, and
        ``mean_intensity_<channel>`` for each channel.
    """
    import pandas as pd

    if image.shape != (len(channel_names), *labels.shape):
        raise ValueError(
            f"the image has the shape {image.shape}; expected ({len(channel_names)}, {labels.shape[0]}, "
            f"{labels.shape[1]}) for {len(channel_names)} channel names and these labels"
        )
    inside = np.flatnonzero(labels)
    label = labels.ravel()[inside].astype(np.int64)
    count = int(label.max(initial=0)) + 1
    area = np.bincount(label, minlength=count)
    numbers = np.flatnonzero(area)
    n = area[numbers]
    y, x = np.divmod(inside, labels.shape[1])

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(label, weights=values, minlength=count)[numbers] / n

    edge = np.zeros(count, bool)
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]) if labels.size else ():
        edge[side] = True
    table = {
        "object_number": numbers,
        "x_px": mean(x),
        "y_px": mean(y),
        "area_px": n,
        "area_um2": n * float(pixel_size_um) ** 2 if pixel_size_um else np.full(len(n), np.nan),
        "touches_border": edge[numbers],
    }
    for name, plane in zip(channel_names, image, strict=True):
        table[f"mean_intensity_{name}"] = mean(plane.ravel()[inside])
    return pd.DataFrame(table)


DEBRIS_SHARE = 0.4  # of the field's median area: what is smaller is no nucleus
CLUMP_SHARE = 3.0  # and what is larger is more than one
FEW = 5  # objects from which on a field has a median worth the name
SMALLEST_UM2, LARGEST_UM2 = 28.0, 1260.0  # areas of circles of 6 and 40 µm across


def measure_quality(
    labels: np.ndarray,
    image: np.ndarray,
    channel_names: Sequence[str],
    *,
    dna: int | None = None,
    pixel_size_um: float | None = None,
) -> pd.DataFrame:
    """Measure the quality of every labelled object.

    Parameters
    ----------
    labels
        (H, W) integers, 0 is background.
    image
        (C, H, W), any numeric type.
    channel_names
        C names.
    dna
        Index of the channel that focus is judged on; the first if None.
    pixel_size_um
        Side of a pixel: where a field has too few objects for a median, debris is told by absolute size.

    Returns
    -------
    pandas.DataFrame
        One row an object, by number:

        ``qc_focus``
            Variance of the Laplacian over the object's pixels by the square of its mean intensity: falls when the
            image is out of focus, whatever the exposure. NaN where the mean is 0.
        ``qc_saturated_<channel>``
            Share of its pixels at the largest value that the pixel type holds (0 for floats).
        ``qc_area_ratio``
            Its area by the median of the field.
        ``qc_border``
            It touches the border of the field.
        ``qc_debris``
            It is too small or too large for one nucleus: under 0.4 or over 3 medians, or, in a field of fewer than
            five objects, outside of 6 to 40 µm in diameter.

    References
    ----------
    Variance of the Laplacian as a measure of focus: Pech-Pacheco et al., ICPR 2000.
    """
    import pandas as pd
    from scipy import ndimage as ndi

    if image.shape != (len(channel_names), *labels.shape):
        raise ValueError(f"the image has the shape {image.shape}; expected ({len(channel_names)}, *{labels.shape})")
    inside = np.flatnonzero(labels)
    label = labels.ravel()[inside].astype(np.int64)
    count = int(label.max(initial=0)) + 1
    area = np.bincount(label, minlength=count)
    numbers = np.flatnonzero(area)
    n = area[numbers]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(label, weights=values, minlength=count)[numbers] / n

    plane = np.nan_to_num(np.asarray(image[dna or 0], np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    sharp = ndi.laplace(plane).ravel()[inside].astype(np.float64)
    level = mean(plane.ravel()[inside].astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        focus = np.where(level > 0, (mean(sharp**2) - mean(sharp) ** 2) / level**2, np.nan)
    edge = np.zeros(count, bool)
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]) if labels.size else ():
        edge[side] = True
    ratio = n / np.median(n) if len(n) else np.zeros(0)
    if len(n) >= FEW or not pixel_size_um:
        debris = (ratio < DEBRIS_SHARE) | (ratio > CLUMP_SHARE)
    else:
        um2 = n * pixel_size_um**2
        debris = (um2 < SMALLEST_UM2) | (um2 > LARGEST_UM2)
    table = {"qc_focus": focus, "qc_area_ratio": ratio, "qc_border": edge[numbers], "qc_debris": debris}
    most = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else np.inf
    for name, channel in zip(channel_names, image, strict=True):
        full = channel.ravel()[inside] == most if np.isfinite(most) else np.zeros(len(inside))
        table[f"qc_saturated_{name}"] = mean(full.astype(np.float64))
    return pd.DataFrame(table, index=pd.Index(numbers, name="object_number"))
