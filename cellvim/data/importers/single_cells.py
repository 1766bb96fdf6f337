"""Import single cells in the layout of ChannelViT's JUMP-CP release: a parquet table of paths, one .npy per cell."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from cellvim.data.importers import import_plan
from cellvim.data.importers.import_plan import CellStrip, FileFinder, ImportOptions, ImportPlan, site_name
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
    path = options.cell_table or _choose_table(source, options.plate_name)
    try:
        table = read_table(path, columns=COLUMNS.__contains__)
    except MetadataError as error:
        raise PlateError(f"{error} Expected parquet with the columns {listing(COLUMNS)}.") from error
    lacking = [name for name in COLUMNS if name not in table]
    if lacking or table.empty:
        raise PlateError(f"{path} lacks {listing(lacking) if lacking else 'rows'}; expected {listing(COLUMNS)}.")
    parts = table["ID"].str.split("_", expand=True)
    has_parts = parts.shape[1] >= 3
    if has_parts:
        kept = import_plan.choose_plate(parts[0], options.plate_name, path)
        table, parts = table[kept], parts[kept]
    finder = FileFinder(source, sorted(source.rglob("*.npy")))
    cells: dict[import_plan.Site, list[Path]] = {}
    lost = []
    sites = parts[2] if has_parts else ["1"] * len(table)
    for listed, well, site in zip(table["path"], table["well_loc"], sites, strict=True):
        found = None
        with suppress(PlateError):  # several files have this name
            found = finder.find(listed, str(PurePosixPath(listed.replace("\\", "/")).parent))
        if found is None:
            lost.append(listed.rpartition("/")[2])
            continue
        try:
            cells.setdefault((canonical_well(well), site_name(str(site))), []).append(found)
        except MetadataError as error:
            raise PlateError(f"{path}: {error}") from error
    if not cells:
        raise PlateError(
            f"{path} lists {len(table)} cells, and none of their files is below {source} ({listing(lost, 2)})."
        )
    strips = {site: CellStrip(tuple(cells[site])) for site in import_plan.sorted_sites(cells)}
    first = read_cell(next(iter(strips.values())).planes[0])
    keys = [f"c{i}" for i in range(len(first))]
    plan = ImportPlan("single_cells", {site: dict.fromkeys(keys, strip) for site, strip in strips.items()}, keys)
    plan.plate_name = str(parts[0].iloc[0]) if has_parts else None
    plan.notes = [f"each field is the cells of one site side by side, {first.shape[1]} px each"]
    plan.note_left_out(lost, f"cells of {path.name} have no file")
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
    for path in strip.planes:
        cells.append(read_cell(path))
        if cells[-1].shape != cells[0].shape or cells[-1].dtype != cells[0].dtype:
            raise PlateError(
                f"{path} is {cells[-1].shape} {cells[-1].dtype}; {strip.planes[0].name} is {cells[0].shape}."
            )
    return np.concatenate(cells, axis=2)
