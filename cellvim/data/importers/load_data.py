"""Import the images in CellProfiler's LoadData table, the reference for channels in the Cell Painting Gallery."""

from __future__ import annotations

import re
from pathlib import Path

from cellvim.data.importers import import_plan
from cellvim.data.importers.import_plan import FileFinder, ImportOptions, PlaneFile, choose_plate, make_plan, site_name
from cellvim.data.importers.tiff_folder import find_tiffs
from cellvim.data.platemap import find_column, read_table, read_wells
from cellvim.errors import InputError, MetadataError, PlateError, listing

TABLE_NAMES = tuple(
    f"{stem}{suffix}"
    for stem in ("load_data", "load_data_with_illum")
    for suffix in (".csv", ".csv.gz", ".parquet")  # parquet: cpg0016
)
MAX_TABLE_BYTES = 1 << 30
_FILE = re.compile(r"^(?:Image_)?FileName_(?P<channel>\w+)$")
_NEEDED = re.compile(r"^(?:Metadata_|PathName_|(?:Image_)?FileName_\w+$)")
_PLATE_LEVEL = ("Metadata_Source", "Metadata_Batch")


def find_load_data(source: Path) -> Path | None:
    """Return the LoadData table of a folder, or None."""
    return next((source / name for name in TABLE_NAMES if (source / name).is_file()), None)


def is_load_data(path: Path) -> bool:
    """Return whether a parquet file is a LoadData table, from its columns."""
    if path.suffix.lower() not in (".parquet", ".pq"):
        return False
    try:
        from pyarrow.parquet import ParquetFile

        return any(_FILE.match(name) for name in ParquetFile(path).schema_arrow.names)
    except (ImportError, OSError, ValueError):  # reported when it is read
        return False


def plan_load_data(source: Path, options: ImportOptions) -> import_plan.ImportPlan:
    """Plan the import of the files in a LoadData table.

    ``options.load_data``, or the folder's own LoadData table, is CSV, gzipped CSV or parquet, with columns such as
    ``FileName_OrigDNA``, and ``Metadata_Well`` or rows and columns. The files are searched for by name in ``source``
    and its sub-folders, whatever folders the table names; nothing outside of it is read.

    Raises
    ------
    PlateError
        The table cannot be read or lacks columns, or its files are missing or ambiguous.
    """
    path = options.load_data or find_load_data(source)
    if path is None or not path.is_file():
        raise InputError(f"{path or source} is not a LoadData CSV; give one with --load-data.")
    try:
        table = read_table(path, max_bytes=MAX_TABLE_BYTES, columns=_NEEDED.match)
        names = list(table.columns)
        channels = {m["channel"]: c for c in names if (m := _FILE.match(c)) and not m["channel"].startswith("Illum")}
        if not channels:
            raise PlateError(
                f"{path} has no FileName_ columns ({listing(names, 6)}); expected CellProfiler's LoadData CSV."
            )
        wells, _ = read_wells(table, path)
    except MetadataError as error:
        raise PlateError(str(error)) from error
    plate_column, site_column = find_column(names, "plate"), find_column(names, "site")
    if plate_column:
        kept = choose_plate(table[plate_column].astype(str), options.plate_name, path)
        table, wells = table[kept], wells[kept]
    finder = FileFinder(source, find_tiffs(source))
    files: list[PlaneFile] = []
    missing: list[PlaneFile] = []
    axes = {axis: column for axis in "zt" if (column := find_column(names, axis))}
    for row, well in zip(table.to_dict("records"), wells, strict=True):
        site = site_name(str(row[site_column]).removesuffix(".0")) if site_column else "1"
        plane = {axis: str(row[column]) for axis, column in axes.items()}
        for channel, column in channels.items():
            name = str(row[column]).strip()
            found = finder.find(name, str(row.get(f"PathName_{channel}", "")))
            (missing if found is None else files).append(PlaneFile(found or Path(name), well, site, channel, **plane))
    if not files:
        raise PlateError(
            f"{path} lists {len(table)} sites, and none of its files (such as "
            f"{table[next(iter(channels.values()))].iloc[0]}) is below {source}."
        )
    available = {f.channel for f in files}
    sites = {(f.well, f.site) for f in files}
    missing = [f for f in missing if f.channel in available or (f.well, f.site) not in sites]
    listed = f"sites of {path.name}"
    plan = make_plan(files, source=source, format="load_data", options=options, missing=missing, listed=listed)
    plan.channel_names = {c: c.removeprefix("Orig") or c for c in plan.channel_keys}
    plan.plate_name = str(table[plate_column].iloc[0]) if plate_column else None
    plan.plate_metadata = {c: str(table[c].iloc[0]) for c in _PLATE_LEVEL if c in table and table[c].nunique() == 1}
    if absent := [c for c in channels if c not in available]:
        plan.notes.append(f"{path.name} lists channels that have no files: {listing(absent)}")
    return plan
