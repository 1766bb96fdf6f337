"""Importing single cells as ChannelViT's JUMP-CP release keeps them: a parquet of paths, and one .npy a cell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellvim.data.importers.import_plan import ImportPlan, site_name
from cellvim.data.wells import canonical_well, natural_key, well_position
from cellvim.errors import InputError, MetadataError, PlateError, listing

MAX_CELL_BYTES = 64 << 20


@dataclass(frozen=True)
class CellStrip:
    """The cells of one field, to be laid side by side in one image: (C, S, n · S)."""

    files: tuple[Path, ...]
    ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"{self.files[0].name} and {len(self.files) - 1} more cells"


def find_cell_tables(source: Path) -> list[Path]:
    """Return the parquet tables in a folder."""
    return sorted(p for p in source.glob("*") if p.suffix.lower() in (".pq", ".parquet"))


def plan_single_cells(source: Path, *, table_path: Path | None = None, plate_name: str | None = None) -> ImportPlan:
    """Read the table: ``path`` of each cell's .npy (C, S, S), ``well_loc``, and ``ID`` as plate_well_site_object.

    ``source`` is the folder of the release, with a table and a folder of cells a plate (``plate_name`` then chooses),
    or one of a single plate. The cells of a site become one image, side by side in the order of the table: ``--unit
    tile`` with the cells' own size gives exactly them back. Paths, also ``s3://`` ones, are looked for below the folder
    by their last parts.

    Raises
    ------
    PlateError
        There is no such table, or cells are missing or differ in size.
    """
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError as error:
        raise InputError(
            f"{source} is described by parquet, which needs pyarrow: pip install 'cellvim[tables]'."
        ) from error
    table_path = table_path or _table_of(source, plate_name)
    try:
        file = parquet.ParquetFile(table_path)
        table = file.read(columns=[n for n in ("path", "ID", "well_loc") if n in file.schema_arrow.names]).to_pandas()
    except (ArrowException, OSError, KeyError, ValueError) as error:
        raise PlateError(
            f"{table_path} cannot be read; expected parquet with the columns path, ID and well_loc "
            f"({str(error).splitlines()[0][:120]})."
        ) from error
    missing_columns = {"path", "ID", "well_loc"} - set(table.columns)
    if missing_columns or table.empty:
        raise PlateError(
            f"{table_path} lacks {listing(sorted(missing_columns)) or 'rows'}; expected path, ID and well_loc."
        )
    by_name: dict[str, list[Path]] = {}
    for path in sorted(source.rglob("*.npy")):
        by_name.setdefault(path.name, []).append(path)
    parts = table["ID"].astype(str).str.split("_", expand=True)
    plates = parts[0] if parts.shape[1] >= 3 else None
    if plates is not None and plates.nunique() > 1:
        if plate_name not in set(plates):
            raise PlateError(
                f"{table_path} has the plates {listing(sorted(set(plates)), 6)}; choose one with --plate-name."
            )
        table, parts = table[plates == plate_name], parts[plates == plate_name]
    sites = parts[2] if parts.shape[1] >= 3 else ["1"] * len(table)
    cells: dict[tuple[str, str], list[tuple[Path, str]]] = {}
    lost = []
    for told, well, site, number in zip(table["path"], table["well_loc"], sites, table["ID"], strict=True):
        path = _find(str(told), by_name)
        if path is None:
            lost.append(str(told).rpartition("/")[2])
            continue
        try:
            place = (canonical_well(well), site_name(str(site)))
        except MetadataError as error:
            raise PlateError(f"{table_path}: {error}") from error
        cells.setdefault(place, []).append((path, str(number)))
    if not cells:
        raise PlateError(
            f"{table_path} lists {len(table)} cells, and none of their files is below {source} ({listing(lost, 2)})."
        )
    ordered = sorted(cells, key=lambda ws: (well_position(ws[0]), natural_key(ws[1])))
    strips = {p: CellStrip(*map(tuple, zip(*cells[p], strict=True))) for p in ordered}
    first = read_cell(strips[ordered[0]].files[0])
    keys = [f"c{i}" for i in range(len(first))]
    plan = ImportPlan("single_cells", {p: dict.fromkeys(keys, s) for p, s in strips.items()}, keys)
    plan.plate_name = str(parts[0].iloc[0]) if parts.shape[1] >= 3 else None
    plan.notes = [f"each field is the cells of one site side by side, {first.shape[1]} px each"]
    if lost:
        plan.notes.append(f"{len(lost)} cells of {table_path.name} have no file and were left out: {listing(lost, 4)}")
    return plan


def _table_of(source: Path, plate_name: str | None) -> Path:
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
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, PlateError):
            raise
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


def _find(told: str, by_name: dict[str, list[Path]]) -> Path | None:
    parts = told.replace("\\", "/").split("/")
    found = by_name.get(parts[-1], [])
    if len(found) > 1:
        found = [p for p in found if p.parent.name == parts[-2]] if len(parts) > 1 else []
    return found[0] if len(found) == 1 else None
