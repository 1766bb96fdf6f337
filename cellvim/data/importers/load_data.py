"""Import the images in CellProfiler's LoadData table, the reference for channels in the Cell Painting Gallery."""

from __future__ import annotations

import re
from pathlib import Path

from cellvim.data.importers.import_plan import (
    ImportOptions,
    ImportPlan,
    PlaneFile,
    check_missing,
    make_plan,
    site_name,
)
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


def plan_load_data(source: Path, options: ImportOptions) -> ImportPlan:
    """Plan the import of the files in a LoadData table.

    ``options.table``, or the folder's own LoadData table, is CSV, gzipped CSV or parquet, with columns such as
    ``FileName_OrigDNA``, and ``Metadata_Well`` or rows and columns. The files are searched for by name in ``source``
    and its sub-folders, whatever folders the table names; nothing outside of it is read.

    Raises
    ------
    PlateError
        The table cannot be read or lacks columns, or its files are missing or ambiguous.
    """
    path = options.table or find_load_data(source)
    if path is None or not path.is_file():
        raise InputError(f"{path or source} is not a LoadData CSV; give one with --load-data.")
    try:
        table = read_table(path, max_bytes=MAX_TABLE_BYTES, columns=_is_needed)
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
    plates = table[plate_column].astype(str) if plate_column else None
    if plates is not None and plates.nunique() > 1:
        kept = plates == options.plate_name
        if not kept.any():
            raise PlateError(
                f"{path} lists the plates {listing(sorted(plates.unique()), 6)}; choose one with --plate-name."
            )
        table, wells, plates = table[kept], wells[kept], plates[kept]
    finder = _Finder(source)
    files: list[PlaneFile] = []
    missing: list[PlaneFile] = []
    axes = {axis: column for axis in "zt" if (column := find_column(names, axis))}
    for row, well in zip(table.to_dict("records"), wells, strict=True):
        site = site_name(str(row[site_column]).removesuffix(".0")) if site_column else "1"
        plane = {axis: str(row[column]) for axis, column in axes.items()}
        for channel, column in channels.items():
            name = str(row[column]).strip()
            found = finder.find(name, str(row.get(f"PathName_{channel}", "")))
            if found is None:
                missing.append(PlaneFile(Path(name), well, site, channel, **plane))
            else:
                files.append(PlaneFile(found, well, site, channel, **plane))
    if not files:
        raise PlateError(
            f"{path} lists {len(table)} sites, and none of its files (such as "
            f"{table[next(iter(channels.values()))].iloc[0]}) is below {source}."
        )
    available = {f.channel for f in files}
    absent = [c for c in channels if c not in available]
    sites = {(f.well, f.site) for f in files}
    missing = [f for f in missing if f.channel in available or (f.well, f.site) not in sites]
    left_out = check_missing(files, missing, source, path.name)
    plan = make_plan(files, source=source, format="load_data", options=options)
    plan.channel_names = {c: c.removeprefix("Orig") or c for c in plan.channel_keys}
    plan.plate_name = str(plates.iloc[0]) if plates is not None else None
    plan.plate_metadata = {c: str(table[c].iloc[0]) for c in _PLATE_LEVEL if c in table and table[c].nunique() == 1}
    if left_out:
        plan.notes.append(f"{len(left_out)} sites of {path.name} have no files and were left out: {listing(left_out)}")
    if absent:
        plan.notes.append(f"{path.name} lists channels that have no files: {listing(absent)}")
    return plan


def _is_needed(column: str) -> bool:
    return column.startswith(("Metadata_", "PathName_")) or _FILE.match(column) is not None


class _Finder:
    """Finds files by name below a folder; of several with the name, the one whose path has the most in common."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[Path]] = {}
        for path in find_tiffs(folder):
            self._by_name.setdefault(path.name, []).append(path)

    def find(self, name: str, folder: str) -> Path | None:
        """Return the file with a name whose parent folders match the end of ``folder`` best, or None."""
        name = name.replace("\\", "/").rpartition("/")[2]
        found = self._by_name.get(name, [])
        if len(found) < 2:
            return found[0] if found else None
        wanted = [p for p in folder.replace("\\", "/").split("/") if p]

        def n_common(path: Path) -> int:
            parts = path.parent.parts
            return next(
                (i for i in range(min(len(parts), len(wanted))) if parts[-1 - i] != wanted[-1 - i]), len(wanted)
            )

        best = max(map(n_common, found))
        matches = [p for p in found if n_common(p) == best]
        if len(matches) > 1:
            raise PlateError(
                f"{self.folder} has {len(found)} files named {name}, and their folders do not identify the right one: "
                f"{listing((p.relative_to(self.folder) for p in matches), 2)}. Import one of those folders."
            )
        return matches[0]
