"""Import single cells in the layout of ChannelViT's JUMP-CP release: a parquet table of paths, one .npy per cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cellvim.data.importers.import_plan import CellStrip, ImportOptions, ImportPlan, Site, site_name, sorted_sites
from cellvim.data.platemap import read_table
from cellvim.data.wells import canonical_well
from cellvim.errors import MetadataError, PlateError, listing

MAX_CELL_BYTES = 64 << 20
COLUMNS = ("path", "ID", "well_loc")


def find_cell_tables(source: Path) -> list[Path]:
    """Return the parquet tables in a folder."""
    return sorted(p for p in source.glob("*") if p.suffix.lower() in (".pq", ".parquet"))


def plan_single_cells(source: Path, options: ImportOptions) -> ImportPlan:
    """Plan the import of a table of cells: ``path`` (.npy, (C, S, S)), ``well_loc``, ``ID`` (plate_well_site_object).

    ``source`` is the folder of the release, with one table and one folder of cells per plate (``options.plate_name``
    then chooses), or that of a single plate. The cells of a site become one image, side by side in the order of the
    table: ``--unit tile`` with the size of a cell returns exactly these. Paths, also ``s3://`` ones, are searched for
    below the folder by their last parts.

    Raises
    ------
    PlateError
        There is no such table, or cells are missing or differ in size.
    """
    path = options.table or _choose_table(source, options.plate_name)
    try:
        table = read_table(path, columns=COLUMNS.__contains__)
    except MetadataError as error:
        raise PlateError(f"{error} Expected parquet with the columns {listing(COLUMNS)}.") from error
    lacking = [name for name in COLUMNS if name not in table]
    if lacking or table.empty:
        raise PlateError(f"{path} lacks {listing(lacking) if lacking else 'rows'}; expected {listing(COLUMNS)}.")
    parts = table["ID"].str.split("_", expand=True)
    has_parts = parts.shape[1] >= 3
    if has_parts and parts[0].nunique() > 1:
        chosen = parts[0] == options.plate_name
        if not chosen.any():
            plates = listing(sorted(set(parts[0])), 6)
            raise PlateError(f"{path} has the plates {plates}; choose one with --plate-name.")
        table, parts = table[chosen], parts[chosen]
    by_name: dict[str, list[Path]] = {}
    for file in sorted(source.rglob("*.npy")):
        by_name.setdefault(file.name, []).append(file)
    cells: dict[Site, list[Path]] = {}
    lost = []
    sites = parts[2] if has_parts else ["1"] * len(table)
    for listed, well, site in zip(table["path"], table["well_loc"], sites, strict=True):
        *folders, name = listed.replace("\\", "/").split("/")
        found = by_name.get(name, [])
        if len(found) > 1:
            found = [p for p in found if folders and p.parent.name == folders[-1]]
        if len(found) != 1:
            lost.append(name)
            continue
        try:
            cells.setdefault((canonical_well(well), site_name(str(site))), []).append(found[0])
        except MetadataError as error:
            raise PlateError(f"{path}: {error}") from error
    if not cells:
        raise PlateError(
            f"{path} lists {len(table)} cells, and none of their files is below {source} ({listing(lost, 2)})."
        )
    strips = {site: CellStrip(tuple(cells[site])) for site in sorted_sites(cells)}
    first = read_cell(next(iter(strips.values())).files[0])
    keys = [f"c{i}" for i in range(len(first))]
    plan = ImportPlan("single_cells", {site: dict.fromkeys(keys, strip) for site, strip in strips.items()}, keys)
    plan.plate_name = str(parts[0].iloc[0]) if has_parts else None
    plan.notes = [f"each field is the cells of one site side by side, {first.shape[1]} px each"]
    if lost:
        plan.notes.append(f"{len(lost)} cells of {path.name} have no file and were left out: {listing(lost, 4)}")
    return plan


def _choose_table(source: Path, plate_name: str | None) -> Path:
    tables = find_cell_tables(source)
    named = [p for p in tables if p.stem == plate_name]
    if len(named) == 1 or len(tables) == 1:
        return (named or tables)[0]
    found = listing(p.name for p in tables)
    if not tables:
        raise PlateError(f"{source} has no parquet table; expected one that lists the cells.")
    raise PlateError(f"{source} has {len(tables)} parquet tables ({found}); choose a plate with --plate-name.")


def read_cell(path: Path) -> np.ndarray:
    """Return the (C, S, S) pixels of one cell."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim == 3 and array.shape[0] == array.shape[1] != array.shape[2]:  # channels last
            array = array.transpose(2, 0, 1)
        if array.ndim != 3 or array.shape[1] != array.shape[2] or array.nbytes > MAX_CELL_BYTES or 0 in array.shape:
            raise PlateError(f"{path} has the shape {array.shape}; expected a cell (channels, size, size).")
        if array.dtype.kind not in "uif":
            raise PlateError(f"{path} has pixels of type {array.dtype}; expected integers or floats.")
        return np.array(array)
    except PlateError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise PlateError(f"{path} cannot be read as .npy: {error}.") from error


def read_strip(strip: CellStrip) -> np.ndarray:
    """Return the cells of a field side by side: (C, S, n · S)."""
    cells = []
    for path in strip.files:
        cells.append(read_cell(path))
        if cells[-1].shape != cells[0].shape or cells[-1].dtype != cells[0].dtype:
            raise PlateError(
                f"{path} is {cells[-1].shape} {cells[-1].dtype}; {strip.files[0].name} is {cells[0].shape}."
            )
    return np.concatenate(cells, axis=2)
