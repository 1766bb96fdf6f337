"""The cells of a page: which are shown, where they lie, their crops, and the columns that colour them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from cellvim.errors import CellvimError, ChannelError, InputError, listing
from cellvim.report.coloring import encode_columns
from cellvim.report.crops import (
    SHEET_COLUMNS,
    Crops,
    choose_crops,
    crops_in_budget,
    cut_thumbnails,
    open_plates,
    read_record,
    side_px,
    thumbnail_px,
)
from cellvim.report.embedding_map import EmbeddingMap, lay_out
from cellvim.report.encoding import pack, quantise
from cellvim.report.record import plate_paths
from cellvim.report.source import Source


@dataclass(frozen=True, eq=False)
class Cells:
    """What is shown of the cells.

    Attributes
    ----------
    map
        Where they lie; None if nothing can be laid out.
    crops
        Thumbnails of some; None if there are none.
    missing
        Why there is no map ("map"), and why no crops ("crops").
    notes
        What is sampled, left out or doubtful, by "map" and "crops".
    """

    map: EmbeddingMap | None = None
    crops: Crops | None = None
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def show_cells(
    source: Source, plate_paths: Sequence[str], *, max_cells: int, umap_key: str = "X_umap", seed: int = 0
) -> Cells:
    """Choose the cells that are shown, cut crops of some, and lay them out.

    Parameters
    ----------
    source
        The embeddings.
    plate_paths
        Plates that the user named; those that the embeddings record otherwise.
    max_cells
        Cells to lay out by UMAP at most.
    umap_key
        Entry of obsm that is taken instead of a UMAP of our own, where there is one.
    seed
        Of what is drawn.

    Raises
    ------
    PlateError, ChannelError
        A plate that the user named is none, or lacks a channel of the embeddings.
    """
    missing: dict[str, str] = {}
    notes: dict[str, list[str]] = {"map": [], "crops": []}
    crops = _crops(source, plate_paths, missing, notes["crops"], seed)
    try:
        laid_out = lay_out(
            source.rows,
            source.wells(),
            existing=source.matrix(umap_key),
            keep=None if crops is None else crops.rows,
            most=max_cells,
            seed=seed,
        )
    except InputError as error:
        missing["map"] = str(error)
        return Cells(None, crops, missing, notes)
    notes["map"] += laid_out.notes
    return Cells(laid_out, crops, missing, notes)


def cell_table(source: Source) -> pd.DataFrame:
    """Return one row a cell: plate, well, site, perturbation, whether it is whole, and where it lies."""
    site = next((c for c in ("Metadata_Site", "Metadata_Field", "Site") if c in source.obs), None)
    spatial = source.matrix("spatial")
    bad = np.zeros(source.n_rows, bool)
    for name in ("qc_border", "qc_debris", "touches_border"):
        if name in source.obs:
            bad |= source.obs[name].fillna(False).astype(bool).to_numpy()
    return pd.DataFrame(
        {
            "plate": source.text("plate"),
            "well": source.text("well"),
            "site": source.obs[site].astype(str).to_numpy(dtype=object) if site is not None else None,
            "perturbation": source.text("perturbation"),
            "good": ~bad,
            "x": np.nan if spatial is None else spatial[:, 0],
            "y": np.nan if spatial is None else spatial[:, 1],
        },
        index=pd.RangeIndex(source.n_rows),
    )


def _crops(source: Source, paths: Sequence[str], missing: dict[str, str], notes: list[str], seed: int) -> Crops | None:
    from cellvim.data.wells import canonical_well

    def without(reason: str) -> None:
        missing["crops"] = reason

    if source.n_rows == 0:
        return without("There are no rows.")
    if source.columns.well is None or not any(c in source.obs for c in ("Metadata_Site", "Metadata_Field", "Site")):
        open_plates(paths, [], [])  # a path that is no plate is said in any case
        return without("No columns say which well and site a row is of (Metadata_Well, Metadata_Site).")
    record = read_record(source.uns)
    table = cell_table(source)
    if record.unit != "field" and not np.isfinite(table[["x", "y"]].to_numpy(float)).any():
        return without("The AnnData does not say where in its field a cell lies (obsm['spatial']).")
    recorded = plate_paths(source.uns)
    names = [str(n) for n in pd.unique(table["plate"]) if n is not None]
    plates, said = open_plates(paths, recorded, names or ["plate"])
    notes += said
    if not plates:
        notes.clear()
        return without(" ".join(said))
    if not names:
        table["plate"] = next(iter(plates))
    try:
        table["well"] = table["well"].map({w: canonical_well(w) for w in pd.unique(table["well"].dropna())})
    except CellvimError as error:
        return without(str(error))
    first = next(iter(plates.values()))
    n_channels = len(record.channels or first.channel_names)
    size = thumbnail_px(side_px(record, first))
    usable = table[table["plate"].isin(list(plates)) & table["well"].notna()]
    if not len(usable):
        return without(f"No row is of a well of {listing(plates)}.")
    rows = usable.index.to_numpy()[choose_crops(usable, crops_in_budget(n_channels, size), seed=seed)]
    try:
        crops = cut_thumbnails(plates, record, table, rows)
    except ChannelError as error:
        if paths:
            raise
        return without(str(error))
    if not len(crops.rows):
        return without(" ".join(crops.notes) or "No crop could be cut.")
    notes += crops.notes
    if len(plates) > 1:
        notes.append(f"Crops of all plates are scaled as those of {next(iter(plates))}, so that they compare.")
    return crops


def map_data(source: Source, cells: Cells, color_by: str | None, extra: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return what the page draws the map from.

    Parameters
    ----------
    source, cells
        The embeddings, and what is shown of them; there must be a map.
    color_by
        Column that colours the map at first; the perturbation, or the kind of control, or the first, if None.
    extra
        Further columns: (n,) values by name.

    Raises
    ------
    InputError
        There is no column ``color_by``.
    """
    rows = cells.map.rows
    table = source.obs.iloc[rows].reset_index(drop=True)
    table = table.assign(**{name: values[rows] for name, values in extra.items()})
    columns, front = source.columns, []
    for name in (columns.perturbation, columns.dose, columns.mechanism, columns.pert_type, columns.well, columns.plate):
        front += [name] if name is not None and name not in front else []
    front += [name for name in extra if name not in front]
    table = table[front + [name for name in table.columns if name not in front]]
    coloring = encode_columns(table)
    names = [column["name"] for column in coloring.columns]
    if color_by is not None and color_by not in names:
        reasons = dict(coloring.left_out)
        why = f" ({reasons[color_by]})" if color_by in reasons else ""
        raise InputError(f"The map cannot be coloured by '{color_by}'{why}; there are {listing(names, 40)}.")
    if coloring.left_out:
        left = "; ".join(f"{name} ({why})" for name, why in coloring.left_out[:8])
        cells.notes["map"].append(f"Not offered as colours: {left}.")
    wanted = [color_by, columns.pert_type, columns.perturbation, columns.dose, columns.well]
    initial = next((names.index(name) for name in wanted if name in names), 0)
    x, y = (quantise(axis)[0] for axis in cells.map.coordinates.T)
    identity = [n for n in (columns.plate, columns.well, "Metadata_Site", "Metadata_ObjectNumber") if n in names]
    identity += [n for n in (columns.perturbation, columns.dose) if n in names and n not in identity]
    data = {
        "n": len(rows),
        "x": pack(x),
        "y": pack(y),
        "columns": coloring.columns,
        "initial": initial,
        "identity": [names.index(n) for n in identity],
        "wells": _well_codes(source, rows),
    }
    if cells.crops is not None:
        place = np.searchsorted(rows, cells.crops.rows)
        place = np.minimum(place, len(rows) - 1)
        on_map = rows[place] == cells.crops.rows  # a crop's cell may lack finite numbers
        data["cropped"] = np.where(on_map, place, -1)
    return data


def crop_data(source: Source, crops: Crops) -> dict[str, Any]:
    """Return what the page draws crops from."""
    text = {name: source.text(name) for name in ("plate", "well")}
    site = source.obs["Metadata_Site"].astype(str).to_numpy() if "Metadata_Site" in source.obs else None
    number = (
        source.obs["Metadata_ObjectNumber"].astype(str).to_numpy() if "Metadata_ObjectNumber" in source.obs else None
    )
    names = []
    for row in crops.rows:
        parts = [text["plate"][row], text["well"][row]]
        parts += [f"site {site[row]}"] if site is not None else []
        parts += [f"object {number[row]}"] if number is not None else []
        names.append(" ".join(str(p) for p in parts if p is not None))
    return {
        "size": crops.size_px,
        "columns": SHEET_COLUMNS,
        "channels": [{"name": n, "color": c} for n, c in zip(crops.channels, crops.colors, strict=True)],
        "sheets": crops.sheets(),
        "names": names,
    }


def spread_over_cells(source: Source, wells: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    """Give each cell its well's value, (wells,) -> (n,); NaN where its well has none.

    Parameters
    ----------
    source
        The cells.
    wells
        (wells,) ``plate`` and ``well``.
    values
        One number a well.
    """
    keys = pd.MultiIndex.from_frame(wells)
    known = pd.Series(values, index=keys)
    known = known[~known.index.duplicated()]
    of_cells = pd.MultiIndex.from_arrays([source.text("plate"), source.text("well")])
    return known.reindex(of_cells).to_numpy(np.float64)


def _well_codes(source: Source, rows: np.ndarray) -> dict[str, Any]:
    """Return the well of each shown cell, as ``plate, NUL, well``."""
    plate = [("plate" if p is None else p) for p in source.text("plate")[rows]]
    keys = np.array([f"{p}\0{w}" for p, w in zip(plate, source.text("well")[rows], strict=True)], dtype=object)
    codes, names = pd.factorize(keys)
    if len(names) > 65534:
        return {"names": [], "codes": pack(np.zeros(len(rows), np.uint16))}
    return {"names": list(names), "codes": pack(codes.astype(np.uint16))}
