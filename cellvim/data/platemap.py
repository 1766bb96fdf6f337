"""Plate maps: a table with one row a well, joined to a plate by its wells."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellvim.data.wells import canonical_well, row_number, well_name, well_position
from cellvim.errors import MetadataError, listing

if TYPE_CHECKING:
    import pandas as pd

_WELL = ("well", "wellposition", "metadatawell", "imagemetadatawell", "wellname", "wellid", "position", "wellno")
_ROW = ("row", "wellrow", "metadatarow", "platerow", "wellrowname", "imagemetadatarow")
_COLUMN = ("column", "col", "wellcolumn", "wellcol", "metadatacolumn", "metadatacol", "platecolumn")
_PLATE = ("plate", "metadataplate", "assayplatebarcode", "platename", "plateid", "barcode", "platebarcode")
_DELIMITERS = ",;\t|"
_LARGEST = 64 << 20  # bytes: JUMP's table of all its wells is a tenth of it


def read_platemap(path: str | Path, *, plate_name: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Read a plate map: CSV, TSV or semicolon-separated, wells written A1, A01, r01c01 or as a row and a column.

    Parameters
    ----------
    path
        The table.
    plate_name
        Which rows to take where the table has a column of plates with several of them.

    Returns
    -------
    table : pandas.DataFrame
        One row a well, index ``well`` (``A01``), all columns as they are in the file.
    notes : list of str
        What was odd: repeated and contradicting rows.

    Raises
    ------
    MetadataError
        The file cannot be read, or has no column that names wells.
    """
    import pandas as pd

    path = Path(path)
    table = _read(path)
    wells = _wells(table, path)
    notes: list[str] = []
    plates = next((c for c in table.columns if _plain(c) in _PLATE), None)
    if plates is not None and wells.duplicated().any() and table[plates].nunique() > 1:
        chosen = table[plates].astype(str) == str(plate_name)
        if not chosen.any():
            raise MetadataError(
                f"{path} describes several plates ({listing(sorted(table[plates].astype(str).unique()), 6)}) and none "
                f"is '{plate_name}'. Name the plate as in the map, or keep only its rows."
            )
        table, wells = table[chosen], wells[chosen]
    table = table.set_index(pd.Index(wells, name="well"))
    if not table.index.has_duplicates:
        return table, notes
    return _one_row_a_well(table, path.name, notes), notes


def join_platemap(table: pd.DataFrame, wells: list[str], *, source: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the plate map's rows for the wells of a plate, in their order, with what does not fit as notes.

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


def join_perturbations(
    table: pd.DataFrame, path: str | Path, *, source: str, on: str | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Add what a table of compounds or genes says of each well's perturbation, as JUMP's two tables are joined.

    Parameters
    ----------
    table
        A plate map, as `read_platemap` returns it.
    path
        One row a perturbation: CSV, TSV or semicolon-separated, such as ``JUMP-Target-1_compound_metadata.tsv``.
    source
        What to call the plate map in messages.
    on
        Column that both have; by default the one of the shared columns that names each perturbation once.

    Returns
    -------
    table : pandas.DataFrame
        The plate map with the perturbations' columns added. JUMP's ``pert_type`` and ``control_type`` become
        ``Metadata_pert_type`` (trt, poscon, negcon), and its ``Metadata_JCP2022`` is kept as it is.
    notes : list of str
        Wells whose perturbation has no row, rows that repeat and contradict each other, columns that both tables have
        with different values.

    Raises
    ------
    MetadataError
        The table cannot be read, or no column connects the two.

    Notes
    -----
    A well whose perturbation is empty in the plate map takes the row whose key is empty or ``NA`` too: that is how
    JUMP writes DMSO. Where there is no such row, and the table has a ``pert_type``, the well is ``empty``.
    """
    path = Path(path)
    other = _read(path)
    names = [c for c in other.columns if c in table.columns] if on is None else [on]
    keys = [c for c in names if c in other.columns and c in table.columns]
    if not keys:
        raise MetadataError(
            f"{path} has no column in common with {source}: it has {listing(other.columns)}; the plate map has "
            f"{listing(table.columns)}. Name a column the same in both."
        )
    # the one that tells perturbations apart, not one such as a source that all rows share
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
    """Say in one column what JUMP says in two: trt, or the kind of control."""
    if "Metadata_pert_type" in table or "pert_type" not in table:
        return table
    kind = table["pert_type"]
    if "control_type" in table:
        kind = table["control_type"].where(kind.eq("control") & table["control_type"].notna(), kind)
    # JUMP tells positive controls by how many compounds they share: poscon_cp, poscon_diverse, poscon_orf
    return table.assign(Metadata_pert_type=kind.replace(r"^(poscon|negcon).*", r"\1", regex=True))


def _key(column: pd.Series) -> pd.Series:
    text = column.map(_as_written, na_action="ignore").fillna("").astype(str).str.strip()
    return text.mask(text.isin(["NA", "N/A", "nan", "NaN"]), "")


def derive_pert_type(table: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Add ``Metadata_pert_type`` from another column by a rule such as ``"SBS_Controls:-1=negcon,0=trt,1=poscon"``.

    ``*`` stands for every value not named: ``"Compound:DMSO=negcon,*=trt"``. Wells without a value get no type.

    Raises
    ------
    MetadataError
        The rule cannot be read, its column is not there, or a value of the column is not in the rule.
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


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    if not path.is_file():
        raise MetadataError(f"{path} is not a file; expected a table (CSV or TSV), such as a plate map.")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise MetadataError(f"{path} is larger than {_LARGEST >> 20} MB; expected a table with one row a well.")
        text = _decode(content, path)
        header = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=header.count)
        # as text first: a column "01" must not become 1, nor a row "NA" of a 1536-well plate a missing value
        table = pd.read_csv(
            io.StringIO(text), sep=delimiter, dtype=str, keep_default_na=False, skip_blank_lines=False, header=None
        )
    except (EOFError, ValueError, zlib.error, csv.Error) as error:
        if isinstance(error, MetadataError):
            raise
        cause = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise MetadataError(f"{path} cannot be read as a table: {cause}.") from error
    except OSError as error:
        raise MetadataError(f"{path} cannot be read: {error.strerror or error}.") from error
    table.index += 1  # the line, as an editor counts it: a message can say where
    table = table.fillna("")
    table = table[(table != "").any(axis=1)]
    if len(table) < 2:
        raise MetadataError(f"{path} has no rows; expected one a well.")
    names = [str(name).strip() for name in table.iloc[0]]
    if repeated := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise MetadataError(f"{path} has columns more than once: {listing(repeated)}. Rename them, or leave one out.")
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    return table.iloc[1:].set_axis(names, axis=1)


def _decode(content: bytes, path: Path) -> str:
    """Return the text of a table: UTF-8, or UTF-16 as spreadsheets write it, with its byte order mark."""
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        seen = content.split(b"\n")[line - 1][:60].strip().decode("utf-8", "replace")
        raise MetadataError(
            f"{path}, line {line} is not UTF-8 text: {seen!r}. Save the table as CSV UTF-8, so that no name is misread."
        ) from error


def _wells(table: pd.DataFrame, path: Path) -> pd.Series:
    """Find each row's well, then give the other columns their types in place."""
    names = {_plain(c): c for c in reversed(list(table.columns))}
    well, row, column = (next((names[n] for n in known if n in names), None) for known in (_WELL, _ROW, _COLUMN))
    if well is not None:
        positions = table[well].copy()
        positions[:] = [_parse(canonical_well, text, path, line) for line, text in table[well].items()]
        keep = [well]
    elif row is not None and column is not None:
        both = zip(table[row], table[column], strict=True)
        positions = table[row].copy()
        positions[:] = [
            _parse(_from_row_and_column, pair, path, line) for line, pair in zip(table.index, both, strict=True)
        ]
        keep = [row, column]
    else:
        raise MetadataError(
            f"{path} has no column of wells; it has {listing(table.columns)}. Expected one named Well or "
            "well_position (A1, A01, r01c01), or two named Row and Column."
        )
    for name in table.columns:
        if name not in keep:
            table[name] = _typed(table[name])
    return positions


def _from_row_and_column(pair: tuple[str, str]) -> str:
    row, column = row_number(pair[0]), str(pair[1]).strip().strip("\"'")
    if not column.isdigit():
        raise MetadataError(f"'{column}' is not a plate column; expected a number.")
    return well_name(*well_position(f"r{row}c{int(column)}"))


def _parse(read: Any, value: Any, path: Path, line: int) -> str:
    try:
        return read(value)
    except MetadataError as error:
        raise MetadataError(f"{path}, line {line}: {error}") from error


def _typed(column: pd.Series) -> pd.Series:
    """Return numbers as numbers and gaps as missing; anything with leading zeros stays text."""
    import pandas as pd

    text = column.str.strip()
    text = text.mask(text.isin(["", "NA", "N/A", "NaN", "nan"]))
    if text.dropna().str.match(r"^[+-]?0\d").any():
        return text
    numbers = pd.to_numeric(text, errors="coerce")
    return numbers if numbers.notna().equals(text.notna()) and text.notna().any() else text


def _one_row_a_well(table: pd.DataFrame, source: str, notes: list[str]) -> pd.DataFrame:
    """Keep what all rows of a well agree on.

    A column that differs in most of the repeated wells belongs to the images, not to the wells, and is dropped;
    where few wells contradict themselves, their value is unknown. Both are noted.
    """
    groups = table.groupby(level=0, sort=False)
    differs = groups.nunique(dropna=False) > 1
    repeated = groups.size() > 1
    share = differs[repeated].mean()
    dropped = list(share.index[share > 0.5])
    one = groups.first() if not dropped else groups.first().drop(columns=dropped)
    notes.append(f"{source} has several rows for {int(repeated.sum())} wells: what they agree on is kept")
    if dropped:
        notes.append(f"{source}: columns that differ within wells are left out: {listing(dropped)}")
    for column in one.columns:
        wells = list(differs.index[differs[column]])
        if wells:
            one[column] = one[column].mask(one.index.isin(wells))
            notes.append(f"{source} contradicts itself in '{column}' for {listing(wells)}: left empty there")
    return one


def _as_written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(name: Any) -> str:
    return "".join(ch for ch in str(name).casefold() if ch.isalnum())
