"""Plate maps and other tables with one row per well or perturbation, joined to a plate by its wells."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cellvim.data.wells import canonical_well, row_number, well_name, well_position
from cellvim.errors import InputError, MetadataError, listing

if TYPE_CHECKING:
    import pandas as pd

# Accepted column names, in order of preference, without case, punctuation and prefixes (Metadata_, Image_Metadata_)
COLUMN_NAMES = {
    "well": ("well", "wellposition", "wellname", "wellid", "position", "wellno"),
    "row": ("row", "wellrow", "platerow", "wellrowname"),
    "column": ("column", "col", "wellcolumn", "wellcol", "platecolumn"),
    "plate": ("plate", "assayplatebarcode", "platename", "plateid", "barcode", "platebarcode"),
    "site": ("site", "fieldid", "field"),
    "z": ("planeid", "z", "plane", "zslice"),
    "t": ("t", "timepointid", "timepoint"),
}
MISSING = ("", "NA", "N/A", "NaN", "nan")
MAX_BYTES = 64 << 20  # JUMP's table of all its wells has a tenth of this


def find_column(names: Iterable[str], role: str) -> str | None:
    """Return the column that holds a role of `COLUMN_NAMES`, or None."""
    plain = {}
    for name in names:
        letters = "".join(ch for ch in str(name).casefold() if ch.isalnum())
        plain.setdefault(re.sub("^(image)?metadata", "", letters), name)
    return next((plain[known] for known in COLUMN_NAMES[role] if known in plain), None)


def read_table(path: Path, *, max_bytes: int = MAX_BYTES, columns: Callable[[str], bool] | None = None) -> pd.DataFrame:
    """Read a table as text: CSV, TSV or semicolon-separated, gzipped or not, or parquet.

    Parameters
    ----------
    path
        The file.
    max_bytes
        Largest size of a (decompressed) text file.
    columns
        Whether to read a column, by its name; for parquet only.

    Returns
    -------
    pandas.DataFrame
        All values as text, empty where they are missing; the index is the line in a text file.

    Raises
    ------
    MetadataError
        The file cannot be read as a table, or has no rows.
    """
    if not path.is_file():
        raise MetadataError(f"{path} is not a file; expected a table (CSV or TSV), such as a plate map.")
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path, columns)
    import pandas as pd

    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise MetadataError(f"{path} is larger than {max_bytes >> 20} MB; expected a table with one row per well.")
        text = _decode(content, path)
        delimiter = max(",;\t|", key=text.partition("\n")[0].count)
        # read as text first: a column "01" must not become 1, nor row "NA" of a 1536-well plate a missing value
        table = pd.read_csv(
            io.StringIO(text), sep=delimiter, dtype=str, keep_default_na=False, skip_blank_lines=False, header=None
        )
    except MetadataError:
        raise
    except OSError as error:
        raise MetadataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (EOFError, ValueError, zlib.error, csv.Error) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise MetadataError(f"{path} cannot be read as a table: {cause}.") from error
    table.index += 1  # the line in an editor, for messages
    table = table.fillna("")
    table = table[(table != "").any(axis=1)]
    if len(table) < 2:
        raise MetadataError(f"{path} has no rows; expected one per well.")
    names = [str(name).strip() for name in table.iloc[0]]
    if repeated := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise MetadataError(f"{path} has columns more than once: {listing(repeated)}. Rename or remove them.")
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    return table.iloc[1:].set_axis(names, axis=1)


def _read_parquet(path: Path, columns: Callable[[str], bool] | None) -> pd.DataFrame:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path} is parquet, which needs pyarrow: pip install 'cellvim[tables]'.") from error
    try:
        file = ParquetFile(path)
        names = [n for n in file.schema_arrow.names if columns is None or columns(n)]
        table = file.read(columns=names).to_pandas()
    except (ArrowException, OSError, ValueError) as error:
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise MetadataError(f"{path} cannot be read as parquet: {cause}.") from error
    return table.astype("string").fillna("").astype(object)


def _decode(content: bytes, path: Path) -> str:
    """Return the text of a table: UTF-8, or UTF-16 with a byte order mark as written by spreadsheets."""
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        seen = content.split(b"\n")[line - 1][:60].strip().decode("utf-8", "replace")
        raise MetadataError(
            f"{path}, line {line} is not UTF-8 text: {seen!r}. Save the table as CSV UTF-8 to preserve all names."
        ) from error


def read_wells(table: pd.DataFrame, path: Path) -> tuple[pd.Series, list[str]]:
    """Return the well of each row (``A01``), and the columns that contain it.

    Raises
    ------
    MetadataError
        There are no such columns, or a row has no valid well.
    """
    well, row, column = (find_column(table.columns, role) for role in ("well", "row", "column"))
    if well is not None:
        used, texts = [well], table[well]
    elif row is not None and column is not None:
        used, texts = [row, column], zip(table[row], table[column], strict=True)
    else:
        raise MetadataError(
            f"{path} has no column of wells; it has {listing(table.columns)}. Expected one named Well or "
            "well_position (A1, A01, r01c01), or two named Row and Column."
        )
    wells = table[used[0]].copy()
    for i, (line, text) in enumerate(zip(table.index, texts, strict=True)):
        try:
            wells.iloc[i] = canonical_well(text) if well is not None else _well_at(*text)
        except MetadataError as error:
            raise MetadataError(f"{path}, line {line}: {error}") from error
    return wells, used


def _well_at(row: str, column: str) -> str:
    number, column = row_number(row), str(column).strip().strip("\"'")
    if not column.isdigit():
        raise MetadataError(f"'{column}' is not a plate column; expected a number.")
    return well_name(*well_position(f"r{number}c{int(column)}"))


def read_platemap(path: str | Path, *, plate_name: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Read a plate map: a table with wells written A1, A01 or r01c01, or as a row and a column.

    Parameters
    ----------
    path
        The table, see `read_table`.
    plate_name
        Plate whose rows are taken if the table lists several.

    Returns
    -------
    table : pandas.DataFrame
        One row per well, index ``well`` (``A01``), with all columns of the file.
    notes : list of str
        Repeated and contradictory rows.

    Raises
    ------
    MetadataError
        The file cannot be read, or has no column of wells.
    """
    import pandas as pd

    path = Path(path)
    table = read_table(path)
    wells, used = read_wells(table, path)
    for name in table.columns:
        if name not in used:
            table[name] = _typed(table[name])
    plate = find_column(table.columns, "plate")
    if plate is not None and wells.duplicated().any() and table[plate].nunique() > 1:
        chosen = table[plate].astype(str) == str(plate_name)
        if not chosen.any():
            raise MetadataError(
                f"{path} lists several plates ({listing(sorted(table[plate].astype(str).unique()), 6)}), but not "
                f"'{plate_name}'. Name the plate as in the table, or keep only its rows."
            )
        table, wells = table[chosen], wells[chosen]
    table = table.set_index(pd.Index(wells, name="well"))
    notes: list[str] = []
    return (_one_row_per_well(table, path.name, notes) if table.index.has_duplicates else table), notes


def _typed(column: pd.Series) -> pd.Series:
    """Convert a column to numbers if all its values are; values with leading zeros remain text."""
    import pandas as pd

    text = column.str.strip()
    text = text.mask(text.isin(MISSING))
    if text.dropna().str.match(r"^[+-]?0\d").any():
        return text
    numbers = pd.to_numeric(text, errors="coerce")
    return numbers if numbers.notna().equals(text.notna()) and text.notna().any() else text


def _one_row_per_well(table: pd.DataFrame, source: str, notes: list[str]) -> pd.DataFrame:
    """Keep the values on which all rows of a well agree.

    A column that differs in most of the repeated wells describes images, not wells, and is dropped; where few wells
    are contradictory, their value is unknown. Both are noted.
    """
    groups = table.groupby(level=0, sort=False)
    differs = groups.nunique(dropna=False) > 1
    repeated = groups.size() > 1
    share = differs[repeated].mean()
    dropped = list(share.index[share > 0.5])
    one = groups.first().drop(columns=dropped)
    notes.append(f"{source} has several rows for {int(repeated.sum())} wells: what they agree on is kept")
    if dropped:
        notes.append(f"{source}: columns that differ within wells are left out: {listing(dropped)}")
    for column in one.columns:
        wells = list(differs.index[differs[column]])
        if wells:
            one[column] = one[column].mask(one.index.isin(wells))
            notes.append(f"{source} contradicts itself in '{column}' for {listing(wells)}: left empty there")
    return one


def join_platemap(table: pd.DataFrame, wells: list[str], *, source: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of a plate map for the wells of a plate, in their order, and notes on wells that do not match.

    Raises
    ------
    MetadataError
        No well of the plate is in the map.
    """
    without = [w for w in wells if w not in table.index]
    beyond = [w for w in table.index if w not in set(wells)]
    if len(without) == len(wells):
        raise MetadataError(
            f"{source} has no row for any of the plate's {len(wells)} wells ({listing(wells, 6)}); it has rows for "
            f"{listing(table.index, 6)}. Is it another plate's map?"
        )
    notes = []
    if without:
        notes.append(f"{len(without)} wells have no row in {source}: {listing(without)}")
    if beyond:
        notes.append(f"{source} has rows for {len(beyond)} wells without images: {listing(beyond)}")
    return table.reindex(wells), notes


def join_perturbations(table: pd.DataFrame, path: str | Path, *, source: str) -> tuple[pd.DataFrame, list[str]]:
    """Add the columns of a table of compounds or genes to a plate map, as JUMP's two tables are joined.

    Parameters
    ----------
    table
        A plate map, as `read_platemap` returns it.
    path
        Table with one row per perturbation, such as ``JUMP-Target-1_compound_metadata.tsv``; see `read_table`.
    source
        Name of the plate map for messages.

    Returns
    -------
    table : pandas.DataFrame
        The plate map with the perturbations' columns added. JUMP's ``pert_type`` and ``control_type`` become
        ``Metadata_pert_type`` (trt, poscon, negcon).
    notes : list of str
        Wells whose perturbation has no row, contradictory rows, columns with different values in the two tables.

    Raises
    ------
    MetadataError
        The table cannot be read, or has no column in common with the plate map.

    Notes
    -----
    A well without a perturbation in the plate map takes the row whose key is empty or ``NA``, as JUMP writes DMSO. If
    there is no such row, and the table has a ``pert_type``, the well is ``empty``.
    """
    path = Path(path)
    other = read_table(path)
    keys = [c for c in other.columns if c in table.columns]
    if not keys:
        raise MetadataError(
            f"{path} has no column in common with {source}: it has {listing(other.columns)}; the plate map has "
            f"{listing(table.columns)}. Name a column the same in both."
        )
    # the column that distinguishes perturbations, not one with the same value in all rows, such as a source
    key = max(keys, key=lambda c: (len(set(_key(table[c])) & set(_key(other[c]))), other[c].nunique()))
    known = other.set_index(_key(other[key])).drop(columns=key)
    for name in known.columns:
        known[name] = _typed(known[name])
    notes: list[str] = []
    if known.index.has_duplicates:
        differs = known.groupby(level=0).nunique(dropna=False).gt(1).any(axis=1)
        if differs.any():
            ids = listing(differs.index[differs])
            notes.append(f"{path.name} contradicts itself for {int(differs.sum())} {key}: {ids}. The first row counts")
        known = known[~known.index.duplicated()]
    values = _key(table[key])
    without = ~values.isin(known.index)
    if without.any():
        missing = values[without]
        named = listing(sorted(set(missing[missing != ""])), 6)
        wells = listing(missing.index)
        if (missing == "").all():
            notes.append(f"{len(missing)} wells have no {key} in {source}: {wells}")
        else:
            notes.append(f"{len(missing)} wells have a {key} without a row in {path.name} ({named}): {wells}")
    added = known.reindex(values).set_axis(table.index, axis=0)
    if "pert_type" in added:
        added["pert_type"] = added["pert_type"].mask(without & (values == ""), "empty")
    for name in [c for c in added.columns if c in table.columns]:
        clash = table[name].notna() & added[name].notna() & (table[name].astype(str) != added[name].astype(str))
        if clash.any():
            notes.append(
                f"{source} and {path.name} contradict each other in '{name}' for {listing(table.index[clash])}: "
                "the plate map's value is kept"
            )
        added[name] = table[name].where(table[name].notna(), added[name])
    joined = table.drop(columns=[c for c in added.columns if c in table.columns]).join(added)
    return _jump_pert_type(joined), notes


def _jump_pert_type(table: pd.DataFrame) -> pd.DataFrame:
    """Merge JUMP's two columns into ``Metadata_pert_type``: trt, or the kind of control."""
    if "Metadata_pert_type" in table or "pert_type" not in table:
        return table
    kind = table["pert_type"]
    if "control_type" in table:
        kind = table["control_type"].where(kind.eq("control") & table["control_type"].notna(), kind)
    # JUMP has several kinds of positive controls: poscon_cp, poscon_diverse, poscon_orf
    return table.assign(Metadata_pert_type=kind.replace(r"^(poscon|negcon).*", r"\1", regex=True))


def _key(column: pd.Series) -> pd.Series:
    text = column.map(_as_written, na_action="ignore").fillna("").astype(str).str.strip()
    return text.mask(text.isin(MISSING), "")


def derive_pert_type(table: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Add ``Metadata_pert_type``, derived by a rule such as ``"SBS_Controls:-1=negcon,0=trt,1=poscon"``.

    ``*`` stands for all other values: ``"Compound:DMSO=negcon,*=trt"``. Wells without a value get no type.

    Raises
    ------
    MetadataError
        The rule is not valid, its column does not exist, or a value of the column is not in the rule.
    """
    column, colon, pairs = rule.partition(":")
    mapping: dict[str, str] = {}
    for pair in pairs.split(","):
        value, equals, kind = (part.strip() for part in pair.partition("="))
        if not (colon and equals and kind):
            raise MetadataError(
                f"--pert-type '{rule}' cannot be read; expected COLUMN:VALUE=TYPE,..., as in "
                "Control:-1=negcon,0=trt,1=poscon."
            )
        mapping[value] = kind
    column = column.strip()
    if column not in table.columns:
        raise MetadataError(f"--pert-type names the column '{column}'; the plate map has {listing(table.columns)}.")
    values = table[column]
    text = values.map(_as_written, na_action="ignore")
    unknown = sorted(set(text.dropna()) - set(mapping))
    if unknown and "*" not in mapping:
        raise MetadataError(
            f"--pert-type has no type for {listing(unknown)} of column '{column}'; it has {listing(mapping)}. "
            "Add them, or *=trt for all others."
        )
    kinds = text.map(lambda value: mapping.get(value, mapping.get("*")), na_action="ignore")
    return table.assign(Metadata_pert_type=kinds)


def _as_written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
