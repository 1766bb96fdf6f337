"""Example crops for the page: which cells, cut from the plate as the model saw them, in one picture a channel."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.channels import COLORS, canonical_name
from cellvim.errors import CellvimError, FieldReadError, listing

if TYPE_CHECKING:
    from cellvim.data.intensity import IntensityScale
    from cellvim.data.plate import Plate

BUDGET_BYTES = 2_000_000  # of all pictures together, as they stand in the page
BYTES_PER_PIXEL = 0.17  # of a channel of a crop: WebP, then base64
SMALLEST, LARGEST = 32, 72  # side of a thumbnail, px
MOST_CROPS, MOST_FIELDS = 2000, 400
SHEET_COLUMNS = 32
GAMMA = 0.7
_SPARE_COLORS = ("00FFFF", "FF00FF", "FFFF00", "00FF00", "FF8000", "4080FF", "FFFFFF", "FF4060")


@dataclass(frozen=True, eq=False)
class Crops:
    """Thumbnails of some rows.

    Attributes
    ----------
    rows
        (k,) rows of the AnnData.
    size_px
        Side of a thumbnail.
    pixels
        (k, C, size, size) uint8.
    channels
        C names.
    colors
        C colours, hex RGB.
    side
        Side of a crop on the plate, in words.
    notes
        What could not be shown, and why.
    """

    rows: np.ndarray
    size_px: int
    pixels: np.ndarray
    channels: list[str]
    colors: list[str]
    side: str
    notes: list[str] = field(default_factory=list)

    def sheets(self) -> list[str]:
        """Return one data URI a channel: all thumbnails, `SHEET_COLUMNS` a row."""
        from PIL import Image

        count, n_channels = self.pixels.shape[:2]
        n_rows = -(-count // SHEET_COLUMNS)
        sheets = []
        for c in range(n_channels):
            cells = np.zeros((n_rows * SHEET_COLUMNS, self.size_px, self.size_px), np.uint8)
            cells[:count] = self.pixels[:, c]
            cells = cells.reshape(n_rows, SHEET_COLUMNS, self.size_px, self.size_px).transpose(0, 2, 1, 3)
            picture = Image.fromarray(cells.reshape(n_rows * self.size_px, SHEET_COLUMNS * self.size_px))
            with io.BytesIO() as buffer:
                picture.save(buffer, "WEBP", quality=78, method=4)
                sheets.append("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))
        return sheets


@dataclass(frozen=True)
class CropRecord:
    """How the rows were cut, from ``uns["cellvim"]``; what is not known is None.

    Attributes
    ----------
    unit
        "cell", "tile" or "field".
    size_px, size_um
        Side of a crop on the plate.
    channels
        The plate's channels that were embedded.
    scale
        Intensities that became 0 and 1.
    spatial_in_um
        Whether ``obsm["spatial"]`` is in µm; else in pixels.
    """

    unit: str
    size_px: int | None
    size_um: float | None
    channels: list[str] | None
    scale: IntensityScale | None
    spatial_in_um: bool


def read_record(uns: Mapping[str, Any]) -> CropRecord:
    """Read ``uns["cellvim"]`` as far as it goes."""
    from cellvim.data.intensity import IntensityScale

    preprocessing = _dict(uns.get("preprocessing"))
    crop, intensity = _dict(preprocessing.get("crop")), _dict(preprocessing.get("intensity"))
    channels = _dict(uns.get("channels")).get("plate")
    try:
        scale = IntensityScale.from_dict(intensity) if intensity else None
    except (KeyError, TypeError, ValueError):
        scale = None
    return CropRecord(
        unit=str(uns.get("unit", "cell")),
        size_px=int(size) if (size := _number(crop.get("size_px"))) else None,
        size_um=_number(crop.get("size_um")),
        channels=[str(c) for c in channels] if channels is not None and len(channels) else None,
        scale=scale,
        spatial_in_um=str(uns.get("spatial_unit", "micrometer")) == "micrometer",
    )


def crops_in_budget(n_channels: int, size_px: int) -> int:
    """Return how many crops fit into the page."""
    return int(np.clip(BUDGET_BYTES / (n_channels * size_px**2 * BYTES_PER_PIXEL), 40, MOST_CROPS))


def thumbnail_px(crop_px: int | None) -> int:
    """Return the side of a thumbnail for crops of a size; of whole fields for None."""
    return LARGEST if crop_px is None else int(np.clip(crop_px, SMALLEST, LARGEST))


def choose_crops(table: pd.DataFrame, count: int, *, seed: int = 0) -> np.ndarray:
    """Choose rows to show, from few fields, evenly over perturbations and wells.

    Parameters
    ----------
    table
        One row a cell, columns ``plate``, ``well``, ``site``, ``perturbation`` (may be missing values) and ``good``:
        whole cells are preferred over debris and such as touch the border.
    count
        How many rows to choose at most.
    seed
        Of the draw.

    Returns
    -------
    (k,) ascending positions in the table.
    """
    if not len(table) or count < 1:
        return np.empty(0, np.int64)
    rng = np.random.default_rng(seed)
    field = table.groupby(["plate", "well", "site"], sort=True, dropna=False).ngroup().to_numpy()
    first = np.unique(field, return_index=True)[1]
    fields = table.iloc[first][["plate", "well", "perturbation"]].reset_index(drop=True)
    fields = fields.iloc[rng.permutation(len(fields))]
    # The first field of each well before any second one, and among these each perturbation in turn.
    fields["of_well"] = fields.groupby(["plate", "well"], dropna=False).cumcount()
    fields = fields.sort_values("of_well", kind="stable")
    fields["of_perturbation"] = fields.groupby(["of_well", "perturbation"], dropna=False).cumcount()
    chosen = fields.sort_values(["of_well", "of_perturbation"], kind="stable").index.to_numpy()
    chosen = chosen[: min(MOST_FIELDS, max(1, count))]
    rows = np.flatnonzero(np.isin(field, chosen))
    rows = rows[rng.permutation(len(rows))]
    rows = rows[np.argsort(~table["good"].to_numpy(bool)[rows], kind="stable")]
    turn = pd.Series(field[rows]).groupby(field[rows]).cumcount().to_numpy()  # one of each field, then another …
    return np.sort(rows[np.argsort(turn, kind="stable")][:count])


def cut_thumbnails(plates: Mapping[str, Plate], record: CropRecord, table: pd.DataFrame, rows: np.ndarray) -> Crops:
    """Cut thumbnails of rows from their plates, as the model saw them.

    Parameters
    ----------
    plates
        By the name that ``table["plate"]`` calls them.
    record
        How the rows were cut.
    table
        As for `choose_crops`, and ``x``, ``y``: the centre within the field, in µm or pixels.
    rows
        (k,) positions in the table.

    Returns
    -------
    Crops
        Of those rows that could be read; ``notes`` says what could not.

    Raises
    ------
    CellvimError
        A channel is not on the plate.
    """
    chosen = table.iloc[rows].assign(position=rows)
    notes: list[str] = []
    pixels: dict[int, np.ndarray] = {}
    first = next(iter(plates.values()))
    channels = record.channels or list(first.channel_names)
    side = side_px(record, first)
    size = thumbnail_px(side)
    lost_wells, unread = set(), []
    for (plate_name, well, site), part in chosen.groupby(["plate", "well", "site"], sort=False, observed=True):
        fields = {(f.well, str(f.site)): f for f in plates[plate_name].fields} if plate_name in plates else {}
        found = fields.get((well, str(site)))
        if found is None:
            lost_wells.add(str(well))
            continue
        try:
            image = found.read(channels)
        except FieldReadError as error:
            unread.append(str(error))
            continue
        positions = part["position"].to_numpy()
        crops, inside = _cut(image, part, record, side, found.pixel_size_um, size)
        for position, crop in zip(positions[inside], crops, strict=True):
            pixels[int(position)] = crop
        if not inside.all():
            notes.append(f"{int((~inside).sum())} cells lie outside of field {found.name}: is this the right plate?")
    kept = np.array(sorted(pixels), np.int64)
    if lost_wells:
        notes.append(f"The plate has no field for {listing(sorted(lost_wells))}: no crops of these.")
    if unread:
        notes.append(f"{len(unread)} fields could not be read. First: {unread[0]}")
    stacked = np.stack([pixels[k] for k in kept]) if len(kept) else np.zeros((0, len(channels), size, size), np.float32)
    return Crops(
        rows=kept,
        size_px=size,
        pixels=_to_bytes(stacked, record, channels),
        channels=list(channels),
        colors=channel_colors(channels, first),
        side=_side(record, first),
        notes=list(dict.fromkeys(notes)),
    )


def channel_colors(channels: Sequence[str], plate: Plate) -> list[str]:
    """Return a display colour for each channel: the stain's own, the plate's, or one that is not taken yet."""
    given = dict(zip(plate.channel_names, plate.channel_colors, strict=True))
    colors: list[str] = []
    for name in channels:
        stain = canonical_name(name)
        wanted = [COLORS.get(stain) if stain else None, given.get(name)]
        wanted = [str(c)[:6].upper() for c in wanted if c] + list(_SPARE_COLORS)
        if wanted[0] == "0000FF":
            wanted[0] = "4060FF"  # pure blue is hardly seen on black
        colors.append(
            next((c for c in wanted if c not in colors and not (c == "FFFFFF" and len(channels) > 1)), wanted[0])
        )
    return colors


def open_plates(
    paths: Sequence[str], recorded: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, Plate], list[str]]:
    """Open the plates that crops are cut from.

    Parameters
    ----------
    paths
        Given by the user; a path that is none raises.
    recorded
        Where the plates were when they were embedded; used when no path is given, those that are still there.
    names
        Plates that the rows are of.

    Returns
    -------
    plates, notes
        By the names of the rows' plates, and what is to be said about them.

    Raises
    ------
    PlateError
        A given path is no plate.
    """
    from cellvim.data.plate import open_plate

    notes: list[str] = []
    opened: list[Plate] = [open_plate(path) for path in paths]
    if not paths:
        if not recorded:
            return {}, ["The AnnData does not say which plate it is of. Name it with --plate."]
        gone = []
        for path in recorded:
            try:
                opened.append(open_plate(path))
            except CellvimError:
                gone.append(path)
        if gone:
            notes.append(f"The plate is no longer at {listing(gone)}. Say where it is with --plate.")
        if not opened:
            return {}, notes
    plates = {plate.name: plate for plate in opened if plate.name in names}
    strangers = [plate for plate in opened if plate.name not in names]
    missing = [name for name in names if name not in plates]
    if len(strangers) == 1 and len(missing) == 1:
        plates[missing[0]] = strangers[0]
        notes.append(
            f"The rows are of plate {missing[0]}, the crops of a plate called {strangers[0].name}: is it the right one?"
        )
    else:
        notes += [f"The plate {p.name} at {p.path} is none that the rows are of ({listing(names)})." for p in strangers]
        if missing and plates:
            notes.append(f"No images were given for {listing(missing)}; name them with --plate.")
    return plates, notes


def _cut(
    image: np.ndarray, part: pd.DataFrame, record: CropRecord, side: int | None, pixel_size_um: float | None, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(C, H, W) -> (m, C, size, size) float32 in stored intensities, and which of the rows lie in the field."""
    from cellvim.data.crops import cut_crops, resize_crops

    height, width = image.shape[1:]
    image = image.astype(np.float32)
    if record.unit == "field" or side is None:
        long = max(height, width)
        square = np.zeros((1, len(image), long, long), np.float32)
        square[0, :, (long - height) // 2 :, (long - width) // 2 :][:, :height, :width] = image
        return np.repeat(resize_crops(square, size), len(part), axis=0), np.ones(len(part), bool)
    per_px = pixel_size_um if record.spatial_in_um and pixel_size_um else 1.0
    centers = part[["y", "x"]].to_numpy(np.float64) / per_px
    inside = np.isfinite(centers).all(1)
    inside &= ((centers > -1) & (centers < (height, width))).all(1)
    return resize_crops(cut_crops(image, centers[inside], side), size), inside


def side_px(record: CropRecord, plate: Plate) -> int | None:
    """Return the side of a crop in pixels of the plate; None for whole fields."""
    if record.unit == "field":
        return None
    if record.size_um and plate.pixel_size_um:
        return max(1, round(record.size_um / plate.pixel_size_um))
    return record.size_px or 64


def _side(record: CropRecord, plate: Plate) -> str:
    px = side_px(record, plate)
    if px is None:
        return "whole fields"
    return f"{px} px" + (f" ({px * plate.pixel_size_um:.3g} µm)" if plate.pixel_size_um else "")


def _to_bytes(values: np.ndarray, record: CropRecord, channels: Sequence[str]) -> np.ndarray:
    """Scale (k, C, s, s) stored intensities to bytes: as for the model where that is known, else by percentiles."""
    if not len(values):
        return values.astype(np.uint8)
    if record.scale is not None and list(record.scale.channel_names) == list(channels):
        low, high = record.scale.low, record.scale.high
    else:
        low, high = np.nanpercentile(values, [0.1, 99.9], axis=(0, 2, 3))
    low, high = (np.asarray(v, np.float64)[:, None, None] for v in (low, high))
    scaled = (values - low) / np.where(high > low, high - low, np.inf)
    return np.rint(np.nan_to_num(scaled).clip(0, 1) ** GAMMA * 255).astype(np.uint8)


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None
