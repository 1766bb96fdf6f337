"""Thumbnails of cells: which cells, cut from the plate and scaled as for the model, in one image per channel."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.channels import COLORS, canonical_name
from cellvim.errors import CellvimError, ChannelError, FieldReadError, InputError, listing
from cellvim.report.record import CropRecord, plate_paths, read_crop_record
from cellvim.report.source import Source

if TYPE_CHECKING:
    from cellvim.data.plate import Plate

BUDGET_BYTES = 2_000_000  # of all images in the page, encoded
BYTES_PER_PIXEL = 0.17  # per channel: WebP in base64
MIN_PX, MAX_PX = 32, 72  # side of a thumbnail
MAX_THUMBNAILS, MAX_FIELDS = 2000, 400
SHEET_COLUMNS = 32
GAMMA = 0.7
QC_COLUMNS = ("qc_border", "qc_debris", "touches_border")
_EXTRA_COLORS = ("00FFFF", "FF00FF", "FFFF00", "00FF00", "FF8000", "4080FF", "FFFFFF", "FF4060")


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Thumbnails of some rows.

    Attributes
    ----------
    rows
        (k,) ascending rows of the AnnData.
    pixels
        (k, C, size, size) uint8.
    channels
        C names.
    colors
        C colours, hex RGB.
    crop_size
        Description of the size of a crop on the plate.
    notes
        Crops that could not be cut, and why.
    """

    rows: np.ndarray
    pixels: np.ndarray
    channels: list[str]
    colors: list[str]
    crop_size: str
    notes: list[str] = field(default_factory=list)

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the data for the page, given a name for each thumbnail."""
        return {
            "size": self.pixels.shape[-1],
            "columns": SHEET_COLUMNS,
            "channels": [{"name": n, "color": c} for n, c in zip(self.channels, self.colors, strict=True)],
            "sheets": [_sheet(self.pixels[:, c]) for c in range(len(self.channels))],
            "names": list(names),
        }


def make_thumbnails(source: Source, paths: Sequence[str], *, seed: int = 0) -> Thumbnails:
    """Choose cells and cut their crops from the plates.

    Parameters
    ----------
    source
        The embeddings.
    paths
        Plates named by the user; if there are none, the recorded paths are tried.
    seed
        Random seed for the choice.

    Raises
    ------
    InputError
        No crop can be cut; the message contains the reason. If the user named the plates, an invalid plate raises
        `PlateError` and a missing channel `ChannelError`.
    """
    from cellvim.data.plate import open_plate
    from cellvim.data.wells import canonical_well

    opened = [open_plate(path) for path in paths]  # raises for an invalid path, whatever else is missing
    if source.n_rows == 0:
        raise InputError("The AnnData has no rows.")
    if source.columns.well is None or source.site_column is None:
        raise InputError("No columns contain the well and site of each row (Metadata_Well, Metadata_Site).")
    record = read_crop_record(source.uns)
    table = _cell_table(source)
    if record.unit != "field" and not np.isfinite(table[["x", "y"]].to_numpy(float)).any():
        raise InputError("The positions of the cells within their fields are missing (obsm['spatial']).")
    names = [str(name) for name in pd.unique(table["plate"]) if name is not None]
    plates, notes = _match_plates(opened or _recorded_plates(source.uns), names or ["plate"])
    if not plates:
        raise InputError(" ".join(notes))
    if not names:
        table["plate"] = next(iter(plates))
    table["well"] = table["well"].map({w: canonical_well(w) for w in pd.unique(table["well"].dropna())})
    usable = table[table["plate"].isin(list(plates)) & table["well"].notna()]
    if not len(usable):
        raise InputError(f"No row belongs to a well of {listing(plates)}.")
    first = next(iter(plates.values()))
    count = max_thumbnails(len(record.channels or first.channel_names), _thumbnail_px(record.size_on(first)))
    chosen = usable.iloc[choose_cells(usable, count, seed=seed)]
    try:
        found = _cut_thumbnails(plates, record, chosen)
    except ChannelError as error:
        if paths:
            raise
        raise InputError(str(error)) from error
    if not len(found.rows):
        raise InputError(" ".join(found.notes) or "No crop could be cut.")
    found.notes[:0] = notes
    if len(plates) > 1:
        found.notes.append(f"The crops of all plates use the scaling of {next(iter(plates))}, for comparison.")
    return found


def max_thumbnails(n_channels: int, size_px: int) -> int:
    """Return the number of thumbnails that fit into the page."""
    return int(np.clip(BUDGET_BYTES / (n_channels * size_px**2 * BYTES_PER_PIXEL), 40, MAX_THUMBNAILS))


def choose_cells(table: pd.DataFrame, count: int, *, seed: int = 0) -> np.ndarray:
    """Choose cells from few fields, evenly over perturbations and wells.

    Parameters
    ----------
    table
        One row per cell with the columns ``plate``, ``well``, ``site``, ``perturbation`` (may be missing) and
        ``good``: whether the cell is complete and no debris. Good cells are preferred.
    count
        Maximum number of cells.
    seed
        Random seed.

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
    # The first field of each well before any second field, and among these one of each perturbation in turn.
    fields["of_well"] = fields.groupby(["plate", "well"], dropna=False).cumcount()
    fields = fields.sort_values("of_well", kind="stable")
    fields["of_perturbation"] = fields.groupby(["of_well", "perturbation"], dropna=False).cumcount()
    chosen = fields.sort_values(["of_well", "of_perturbation"], kind="stable").index.to_numpy()
    chosen = chosen[: min(MAX_FIELDS, max(1, count))]
    rows = np.flatnonzero(np.isin(field, chosen))
    rows = rows[rng.permutation(len(rows))]
    rows = rows[np.argsort(~table["good"].to_numpy(bool)[rows], kind="stable")]
    rank = pd.Series(field[rows]).groupby(field[rows]).cumcount().to_numpy()  # one of each field, then a second, …
    return np.sort(rows[np.argsort(rank, kind="stable")][:count])


def _cell_table(source: Source) -> pd.DataFrame:
    """Return the columns that `choose_cells` needs, and the position within the field."""
    spatial = source.matrix("spatial")
    flags = [source.obs[name].fillna(False).astype(bool) for name in QC_COLUMNS if name in source.obs]
    return pd.DataFrame(
        {
            **{role: source.text(role) for role in ("plate", "well", "perturbation")},
            "site": source.obs[source.site_column].astype(str).to_numpy(dtype=object),
            "good": ~np.any(flags, axis=0) if flags else True,
            "x": np.nan if spatial is None else spatial[:, 0],
            "y": np.nan if spatial is None else spatial[:, 1],
        },
        index=pd.RangeIndex(source.n_rows),
    )


def _recorded_plates(uns: Mapping[str, Any]) -> list[Plate]:
    from cellvim.data.plate import open_plate

    recorded, found, missing = plate_paths(uns), [], []
    if not recorded:
        raise InputError("The AnnData does not record its plate. Name it with --plate.")
    for path in recorded:
        try:
            found.append(open_plate(path))
        except CellvimError:
            missing.append(path)
    if not found:
        raise InputError(f"The plate is no longer at {listing(missing)}. Name its location with --plate.")
    return found


def _match_plates(plates: Sequence[Plate], names: Sequence[str]) -> tuple[dict[str, Plate], list[str]]:
    """Return the plates by the names that the rows use, and notes on plates without rows and rows without plates."""
    matched = {plate.name: plate for plate in plates if plate.name in names}
    others = [plate for plate in plates if plate.name not in names]
    missing = [name for name in names if name not in matched]
    if len(others) == 1 and len(missing) == 1:
        matched[missing[0]] = others[0]
        note = f"The rows are from plate {missing[0]}, the crops from a plate called {others[0].name}. "
        return matched, [note + "Check that it is the same plate."]
    notes = [f"No row is from plate {p.name} at {p.path}; the plates are {listing(names)}." for p in others]
    if missing and matched:
        notes.append(f"There are no images of {listing(missing)}; name their location with --plate.")
    return matched, notes


def _cut_thumbnails(plates: Mapping[str, Plate], record: CropRecord, chosen: pd.DataFrame) -> Thumbnails:
    first = next(iter(plates.values()))
    channels = record.channels or list(first.channel_names)
    side = record.size_on(first)
    notes: list[str] = []
    pixels: dict[int, np.ndarray] = {}
    missing_wells, unreadable = set(), []
    for (plate_name, well, site), part in chosen.groupby(["plate", "well", "site"], sort=False, observed=True):
        found = next((f for f in plates[plate_name].fields if f.well == well and str(f.site) == str(site)), None)
        if found is None:
            missing_wells.add(str(well))
            continue
        try:
            image = found.read(channels)
        except FieldReadError as error:
            unreadable.append(str(error))
            continue
        crops, inside = _cut(image, part, record, side, found.pixel_size_um)
        pixels.update(zip(part.index[inside], crops, strict=True))
        if not inside.all():
            notes.append(
                f"{int((~inside).sum())} cells are outside field {found.name}. Check that it is the same plate."
            )
    if missing_wells:
        notes.append(f"The plate has no field for {listing(sorted(missing_wells))}, so there are no crops of these.")
    if unreadable:
        notes.append(f"{len(unreadable)} fields could not be read. First: {unreadable[0]}")
    rows = np.array(sorted(pixels), np.int64)
    description = "whole fields" if side is None else f"{side} px"
    if side is not None and first.pixel_size_um:
        description += f" ({side * first.pixel_size_um:.3g} µm)"
    return Thumbnails(
        rows=rows,
        pixels=_to_bytes([pixels[row] for row in rows], record, channels),
        channels=list(channels),
        colors=_channel_colors(channels, first),
        crop_size=description,
        notes=list(dict.fromkeys(notes)),
    )


def _thumbnail_px(side: int | None) -> int:
    return MAX_PX if side is None else int(np.clip(side, MIN_PX, MAX_PX))


def _cut(
    image: np.ndarray, part: pd.DataFrame, record: CropRecord, side: int | None, pixel_size_um: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """(C, H, W) -> (m, C, size, size) float32 in stored intensities, and (n,) which rows are inside the field."""
    import torch

    from cellvim.data.crops import cut_crops, place_windows, resize_crops

    height, width = image.shape[1:]
    image = image.astype(np.float32)
    if side is None:  # a whole field, padded to a square
        length = max(height, width)
        top, left = (length - height) // 2, (length - width) // 2
        square = np.zeros((1, len(image), length, length), np.float32)
        square[0, :, top : top + height, left : left + width] = image
        crop = resize_crops(torch.from_numpy(square), MAX_PX).numpy()
        return np.repeat(crop, len(part), axis=0), np.ones(len(part), bool)
    scale = pixel_size_um if record.spatial_in_um and pixel_size_um else 1.0
    centers = part[["y", "x"]].to_numpy(np.float64) / scale
    inside = ((centers > -1) & (centers < (height, width))).all(1)
    first, _ = place_windows(centers[inside], side, (height, width))
    crops = torch.from_numpy(cut_crops(image, first, side))
    return resize_crops(crops, _thumbnail_px(side)).numpy(), inside


def _to_bytes(crops: Sequence[np.ndarray], record: CropRecord, channels: Sequence[str]) -> np.ndarray:
    """Scale stored intensities to (k, C, s, s) bytes: as for the model if recorded, otherwise by percentiles."""
    if not len(crops):
        return np.zeros((0, len(channels), MIN_PX, MIN_PX), np.uint8)
    values = np.stack(crops)
    if record.scale is not None and list(record.scale.channel_names) == list(channels):
        low, high = record.scale.low, record.scale.high
    else:
        low, high = np.nanpercentile(values, [0.1, 99.9], axis=(0, 2, 3))
    low, high = (np.asarray(v, np.float64)[:, None, None] for v in (low, high))
    scaled = (values - low) / np.where(high > low, high - low, np.inf)
    return np.rint(np.nan_to_num(scaled).clip(0, 1) ** GAMMA * 255).astype(np.uint8)


def _channel_colors(channels: Sequence[str], plate: Plate) -> list[str]:
    """Return distinct display colours: that of the stain, that of the plate, or an unused one."""
    of_plate = dict(zip(plate.channel_names, plate.channel_colors, strict=True))
    colors: list[str] = []
    for name in channels:
        stain = canonical_name(name)
        candidates = [COLORS.get(stain) if stain else None, of_plate.get(name)]
        candidates = [str(c)[:6].upper() for c in candidates if c] + list(_EXTRA_COLORS)
        candidates = ["4060FF" if c == "0000FF" else c for c in candidates]  # pure blue is too dark on black
        free = [c for c in candidates if c not in colors and not (c == "FFFFFF" and len(channels) > 1)]
        colors.append((free or candidates)[0])
    return colors


def _sheet(pixels: np.ndarray) -> str:
    """(k, size, size) -> data URI of one image with `SHEET_COLUMNS` thumbnails per row."""
    from PIL import Image

    count, size, _ = pixels.shape
    n_rows = -(-count // SHEET_COLUMNS)
    cells = np.zeros((n_rows * SHEET_COLUMNS, size, size), np.uint8)
    cells[:count] = pixels
    cells = cells.reshape(n_rows, SHEET_COLUMNS, size, size).transpose(0, 2, 1, 3)
    image = Image.fromarray(cells.reshape(n_rows * size, SHEET_COLUMNS * size))
    with io.BytesIO() as buffer:
        image.save(buffer, "WEBP", quality=78, method=4)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
