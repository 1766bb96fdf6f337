"""Importing what CellProfiler's LoadData CSV lists: the truth about channels in the Cell Painting Gallery."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellvim.data.importers.import_plan import Choice, ImportPlan, PlaneFile, make_plan, site_name
from cellvim.data.importers.tiff_folder import find_tiffs
from cellvim.data.wells import canonical_well
from cellvim.errors import InputError, MetadataError, PlateError, listing

if TYPE_CHECKING:
    import pandas as pd

CSV_NAMES = tuple(
    f"{stem}{suffix}"
    for stem in ("load_data", "load_data_with_illum")
    for suffix in (".csv", ".csv.gz", ".parquet")  # the last is how cpg0016 has them
)
_FILE = re.compile(r"^(?:Image_)?FileName_(?P<channel>\w+)$")
_PLATE_LEVEL = ("Metadata_Source", "Metadata_Batch")


def find_load_data(source: Path) -> Path | None:
    """Return a folder's LoadData table, or None."""
    return next((source / name for name in CSV_NAMES if (source / name).is_file()), None)


def is_load_data(path: Path) -> bool:
    """Return whether a parquet file is a LoadData table, by its columns."""
    if path.suffix.lower() not in (".parquet", ".pq"):
        return False
    try:
        from pyarrow.parquet import ParquetFile

        return any(_FILE.match(name) for name in ParquetFile(path).schema_arrow.names)
    except (ImportError, OSError, ValueError):  # its reader will say what is wrong
        return False


def plan_load_data(
    table_path: Path,
    images: Path,
    *,
    plate_name: str | None = None,
    choice: Choice | None = None,
) -> ImportPlan:
    """Read a LoadData CSV; its files are looked for by name below ``images``, wherever they lay when it was written.

    Parameters
    ----------
    table_path
        CSV, also gzipped, or parquet, with ``FileName_OrigDNA`` … columns, and ``Metadata_Well`` or rows and columns.
    images
        Folder with the images; sub-folders are searched too. Nothing outside of it is read.
    plate_name
        Which plate's rows to take where the table has several.
    choice
        Which z plane and time point, if there are ``Metadata_Z`` or ``Metadata_T`` columns.

    Raises
    ------
    PlateError
        The table cannot be read or lacks columns, or its files are missing or ambiguous.
    """
    table = _read(table_path)
    channels = {
        m["channel"]: c for c in table.columns if (m := _FILE.match(c)) and not m["channel"].startswith("Illum")
    }
    if not channels:
        raise PlateError(
            f"{table_path} has no FileName_ columns ({listing(table.columns, 6)}); expected CellProfiler's LoadData "
            "CSV."
        )
    wells = _wells(table, table_path)
    site = next(
        (c for c in ("Metadata_Site", "Metadata_FieldID", "Metadata_Field", "Metadata_site") if c in table), None
    )
    plates = table["Metadata_Plate"].astype(str) if "Metadata_Plate" in table else None
    if plates is not None and plates.nunique() > 1:
        if plate_name is None or not (plates == plate_name).any():
            raise PlateError(
                f"{table_path} lists the plates {listing(sorted(plates.unique()), 6)}; choose one with --plate-name."
            )
        kept = plates == plate_name
        table, wells, plates = table[kept], wells[kept], plates[kept]
    finder = _Finder(images)
    files: list[PlaneFile] = []
    missing: dict[tuple[str, str], list[str]] = {}
    axes = {a: next((c for c in names if c in table), None) for a, names in _AXES.items()}
    for row, well in zip(table.to_dict("records"), wells, strict=True):
        place = (well, site_name(str(row[site]).removesuffix(".0")) if site else "1")
        plane = {axis: str(row[column]) for axis, column in axes.items() if column}
        for channel, column in channels.items():
            name = str(row[column]).strip()
            path = finder.find(name, str(row.get(f"PathName_{channel}", "")))
            if path is None:
                missing.setdefault(place, []).append(channel)
            else:
                files.append(PlaneFile(path, *place, channel, **plane))
    if not files:
        raise PlateError(
            f"{table_path} lists {len(table)} sites, and none of its files (such as "
            f"{table[next(iter(channels.values()))].iloc[0]}) is below {images}."
        )
    there = {f.channel for f in files}
    absent = [c for c in channels if c not in there]
    found = {(f.well, f.site) for f in files}
    partly = {p: [c for c in cs if c in there] for p, cs in missing.items() if p in found}
    partly = {p: cs for p, cs in partly.items() if cs}
    if partly:
        lacking = listing((f"well {w} site {s} lacks {listing(cs)}" for (w, s), cs in partly.items()), 4)
        raise PlateError(
            f"{images}: files of {len(partly)} sites of {table_path.name} are missing: {lacking}. Add them."
        )
    plan = make_plan(files, source=images, format="load_data", choice=choice)
    plan.channel_names = {c: c.removeprefix("Orig") or c for c in plan.channel_keys}
    plan.plate_name = str(plates.iloc[0]) if plates is not None else None
    plan.plate_metadata = {c: str(table[c].iloc[0]) for c in _PLATE_LEVEL if c in table and table[c].nunique() == 1}
    left_out = [f"{w}/{s}" for w, s in missing if (w, s) not in found]
    if left_out:
        plan.notes.append(
            f"{len(left_out)} sites of {table_path.name} have no files and were left out: {listing(left_out)}"
        )
    if absent:
        plan.notes.append(f"{table_path.name} lists channels that have no files: {listing(absent)}")
    return plan


_AXES = {
    "z": ("Metadata_PlaneID", "Metadata_Z", "Metadata_Plane", "Metadata_ZSlice"),
    "t": ("Metadata_T", "Metadata_TimepointID", "Metadata_Timepoint"),
}


class _Finder:
    """Finds files by name below a folder; where several have the name, the one whose folders fit the path best."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[Path]] = {}
        for path in find_tiffs(folder):
            self._by_name.setdefault(path.name, []).append(path)

    def find(self, name: str, folder: str) -> Path | None:
        name = name.replace("\\", "/").rpartition("/")[2]
        found = self._by_name.get(name, [])
        if len(found) < 2:
            return found[0] if found else None
        told = [p for p in folder.replace("\\", "/").split("/") if p]

        def alike(path: Path) -> int:
            parts = path.parent.parts
            return next((i for i in range(min(len(parts), len(told))) if parts[-1 - i] != told[-1 - i]), len(told))

        best = max(alike(p) for p in found)
        fits = [p for p in found if alike(p) == best]
        if len(fits) > 1:
            raise PlateError(
                f"{self.folder} has {len(found)} files named {name}, and their folders do not tell which is meant: "
                f"{listing((p.relative_to(self.folder) for p in fits), 2)}. Import one of those folders."
            )
        return fits[0]


def _read(path: Path) -> pd.DataFrame:
    import zlib

    import pandas as pd

    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path)
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError, EOFError, zlib.error) as error:
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise PlateError(f"{path} cannot be read as a LoadData CSV: {cause}.") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError as error:
        raise InputError(f"{path} is parquet, which needs pyarrow: pip install 'cellvim[tables]'.") from error
    try:
        names = parquet.ParquetFile(path).schema_arrow.names
        wanted = [n for n in names if n.startswith("Metadata_") or n.startswith("PathName_") or _FILE.match(n)]
        table = parquet.ParquetFile(path).read(columns=wanted).to_pandas()
    except (ArrowException, OSError, ValueError) as error:
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise PlateError(f"{path} cannot be read as a LoadData table: {cause}.") from error
    return table.astype("string").fillna("").astype(object)


def _wells(table: pd.DataFrame, path: Path) -> Any:
    import pandas as pd

    name = next((c for c in ("Metadata_Well", "Metadata_well", "Metadata_WellPosition") if c in table), None)
    try:
        if name is not None:
            return table[name].map(canonical_well)
        rows = next((c for c in ("Metadata_Row", "Metadata_row") if c in table), None)
        columns = next((c for c in ("Metadata_Col", "Metadata_Column", "Metadata_col") if c in table), None)
        if rows and columns:
            pairs = zip(table[rows], table[columns], strict=True)
            texts = [f"r{r}c{c}" if str(r).isdigit() else f"{r}{c}" for r, c in pairs]
            return pd.Series([canonical_well(t) for t in texts], index=table.index)
    except MetadataError as error:
        raise PlateError(f"{path}: {error}") from error
    raise PlateError(f"{path} has no Metadata_Well column; it has {listing(table.columns, 8)}.")
