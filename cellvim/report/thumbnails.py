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
    from cellvim.data.intensity import IntensityScale
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
    spatial = source.matrix("spatial")
    flags = [source.obs[name].fillna(False).astype(bool) for name in QC_COLUMNS if name in source.obs]
    table = pd.DataFrame(
        {
            **{role: source.text(role) for role in ("plate", "well", "perturbation")},
            "site": source.obs[source.site_column].astype(str).to_numpy(dtype=object),
            "good": ~np.any(flags, axis=0) if flags else True,
            "x": np.nan if spatial is None else spatial[:, 0],
            "y": np.nan if spatial is None else spatial[:, 1],
        }
    )
    if record.unit != "field" and not np.isfinite(table[["x", "y"]].to_numpy(float)).any():
        raise InputError("The positions of the cells within their fields are missing (obsm['spatial']).")
    names = [str(name) for name in pd.unique(table["plate"]) if name is not None]
    plates, notes = _match_plates(opened or _recorded_plates(source.uns), names or ["plate"])
    if not plates:
        raise InputError(" ".join(notes))
    first_name, first = next(iter(plates.items()))
    if not names:
        table["plate"] = first_name
    table["well"] = table["well"].map({w: canonical_well(w) for w in pd.unique(table["well"].dropna())})
    usable = table[table["plate"].isin(list(plates)) & table["well"].notna()]
    if not len(usable):
        raise InputError(f"No row belongs to a well of {listing(plates)}.")
    count = max_thumbnails(len(record.channels or first.channel_names), record.size_on(first) or MAX_PX)
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
        found.notes.append(f"The crops of all plates use the scaling of {first_name}, for comparison.")
    return found


def max_thumbnails(n_channels: int, size_px: int) -> int:
    """Return the number of thumbnails of crops of this size that fit into the page."""
    size_px = np.clip(size_px, MIN_PX, MAX_PX)
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


def _recorded_plates(uns: Mapping[str, Any]) -> list[Plate]:
    from cellvim.data.plate import open_plate

    found, missing = [], []
    for path in plate_paths(uns):
        try:
            found.append(open_plate(path))
        except CellvimError:
            missing.append(path)
    if not found and not missing:
        raise InputError("The AnnData does not record its plate. Name it with --plate.")
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
    fields = {(name, f.well, str(f.site)): f for name, plate in plates.items() for f in plate.fields}
    notes: list[str] = []
    rows: list[int] = []
    crops: list[np.ndarray] = []
    missing_wells, unreadable = set(), []
    for key, part in chosen.groupby(["plate", "well", "site"], sort=False, observed=True):
        found = fields.get(key)
        if found is None:
            missing_wells.add(str(key[1]))
            continue
        try:
            image = found.read(channels).astype(np.float32)
        except FieldReadError as error:
            unreadable.append(str(error))
            continue
        scale = found.pixel_size_um if record.spatial_in_um and found.pixel_size_um else 1.0
        centers = part[["y", "x"]].to_numpy(np.float64) / scale
        inside = ((centers > -1) & (centers < image.shape[1:])).all(axis=1) | (side is None)
        rows += part.index[inside].tolist()
        crops.append(_cut(image, centers[inside], side))
        if not inside.all():
            notes.append(
                f"{int((~inside).sum())} cells are outside field {found.name}. Check that it is the same plate."
            )
    if missing_wells:
        notes.append(f"The plate has no field for {listing(sorted(missing_wells))}, so there are no crops of these.")
    if unreadable:
        notes.append(f"{len(unreadable)} fields could not be read. First: {unreadable[0]}")
    size = "whole fields" if side is None else f"{side} px"
    if side is not None and first.pixel_size_um:
        size += f" ({side * first.pixel_size_um:.3g} µm)"
    order = np.argsort(rows)
    pixels = np.concatenate(crops)[order] if crops else np.zeros((0, len(channels), MIN_PX, MIN_PX))
    scale = record.scale if record.scale and list(record.scale.channel_names) == channels else None
    colors = _channel_colors(channels, first)
    rows = np.array(rows, np.int64)[order]
    return Thumbnails(rows, _to_bytes(pixels, scale), channels, colors, size, list(dict.fromkeys(notes)))


def _cut(image: np.ndarray, centers: np.ndarray, side: int | None) -> np.ndarray:
    """(C, H, W), (m, 2) -> (m, C, size, size) in stored intensities; the field padded to a square if side is None."""
    import torch

    from cellvim.data.crops import cut_crops, place_windows, resize_crops

    if side is not None:
        first, _ = place_windows(centers, side, image.shape[1:])
        crops = torch.from_numpy(cut_crops(image, first, side))
        return resize_crops(crops, int(np.clip(side, MIN_PX, MAX_PX))).numpy()
    length = max(image.shape[1:])
    before = [(length - side) // 2 for side in image.shape[1:]]
    after = [length - side - b for side, b in zip(image.shape[1:], before, strict=True)]
    square = np.pad(image, ((0, 0), (before[0], after[0]), (before[1], after[1])))
    return np.repeat(resize_crops(torch.from_numpy(square[None]), MAX_PX).numpy(), len(centers), axis=0)


def _to_bytes(values: np.ndarray, scale: IntensityScale | None) -> np.ndarray:
    """Scale stored intensities to (k, C, s, s) bytes: as for the model if recorded, otherwise by percentiles."""
    if not len(values):
        return np.zeros(values.shape, np.uint8)
    low, high = np.nanpercentile(values, [0.1, 99.9], axis=(0, 2, 3)) if scale is None else (scale.low, scale.high)
    low, high = (np.asarray(v, np.float64)[:, None, None] for v in (low, high))
    scaled = (values - low) / np.where(high > low, high - low, np.inf)
    return np.rint(np.nan_to_num(scaled).clip(0, 1) ** GAMMA * 255).astype(np.uint8)


def _channel_colors(channels: Sequence[str], plate: Plate) -> list[str]:
    """Return distinct display colours: that of the stain, that of the plate, or an unused one."""
    of_plate = dict(zip(plate.channel_names, plate.channel_colors, strict=True))
    colors: list[str] = []
    for name in channels:
        own = [COLORS.get(canonical_name(name) or ""), of_plate.get(name)]
        candidates = [str(color)[:6].upper() for color in own if color] + list(_EXTRA_COLORS)
        candidates = ["4060FF" if color == "0000FF" else color for color in candidates]  # pure blue is dark on black
        free = [c for c in candidates if c not in colors and (c != "FFFFFF" or len(channels) == 1)]
        colors.append((free or candidates)[0])
    return colors


def _sheet(pixels: np.ndarray) -> str:
    """(k, size, size) -> data URI of one image with `SHEET_COLUMNS` thumbnails per row."""
    from PIL import Image

    count, size, _ = pixels.shape
    n_rows = -(-count // SHEET_COLUMNS)
    cells = np.pad(pixels, ((0, n_rows * SHEET_COLUMNS - count), (0, 0), (0, 0)))
    cells = cells.reshape(n_rows, SHEET_COLUMNS, size, size).transpose(0, 2, 1, 3)
    image = Image.fromarray(cells.reshape(n_rows * size, SHEET_COLUMNS * size))
    with io.BytesIO() as buffer:
        image.save(buffer, "WEBP", quality=78, method=4)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
