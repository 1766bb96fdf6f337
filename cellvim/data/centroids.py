"""Cell positions from tables: CellProfiler's CSV and SQLite, CytoTable's parquet, or any table with x and y."""

from __future__ import annotations

import gzip
import re
import sqlite3
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellvim.data.wells import canonical_well
from cellvim.errors import InputError, MetadataError, listing

SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".parquet", ".pq", ".sqlite", ".sqlite3", ".db")
COMPARTMENTS = ("Nuclei", "Nucleus", "Cells", "Cell", "Cytoplasm")  # in order of preference

# Known names of columns, without prefixes such as Metadata_ and Image_, case and punctuation
_X = ("locationcenterx", "areashapecenterx", "xpx", "centroidx", "centerx", "x", "posx", "centroid1")
_Y = ("locationcentery", "areashapecentery", "ypx", "centroidy", "centery", "y", "posy", "centroid0")
_X_UM, _Y_UM = ("xum", "centroidxum", "centerxum"), ("yum", "centroidyum", "centeryum")
_WELL = ("well", "wellposition", "wellname", "wellid", "wellloc")
_SITE = ("site", "field", "fieldid", "fov", "siteid", "siteidx")
_PLATE = ("plate", "platename", "plateid", "barcode", "assayplatebarcode")
_NUMBER = ("objectnumber", "numberobjectnumber", "object", "label", "objectid", "number")
_IMAGE = ("imagenumber",)
_TABLE = ("tablenumber",)


def read_centroids(path: str | Path, *, plate_name: str | None = None, object_name: str | None = None) -> pd.DataFrame:
    """Read cell positions from a table.

    Parameters
    ----------
    path
        ``Nuclei.csv`` of CellProfiler (with its ``Image.csv`` beside it for wells and sites), CellProfiler's or
        cytominer's SQLite, CytoTable's parquet, or any CSV or parquet with columns for x, y, well and site.
    plate_name
        Plate whose rows to take, if the table has several.
    object_name
        Compartment whose center to take, such as ``Cells``; nuclei by default.

    Returns
    -------
    pandas.DataFrame
        One row per cell: ``well`` (A01, or None if the table has no wells), ``site`` (text, or None), ``number``, and
        ``x`` and ``y`` in pixels (the center of the first pixel is 0), or ``x_um`` and ``y_um`` if the columns are in
        µm. Rows without a position are omitted.

    Raises
    ------
    MetadataError
        The file cannot be read or does not have columns of positions.
    """
    path = Path(path)
    if not path.is_file():
        raise MetadataError(f"{path} is not a file; expected a table of cell positions ({listing(SUFFIXES)}).")
    suffix = path.suffix.lower()
    try:
        if suffix in (".sqlite", ".sqlite3", ".db"):
            table, columns = _from_sqlite(path, object_name)
        else:
            table, columns = _from_file(path, object_name)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, EOFError, zlib.error, sqlite3.Error) as error:
        if isinstance(error, InputError):
            raise
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise MetadataError(f"{path} cannot be read as a table of cells ({cause}).") from error
    return _standard(table, columns, path, plate_name)


def _from_file(path: Path, object_name: str | None) -> tuple[pd.DataFrame, dict[str, str]]:
    names = _header(path)
    columns = _find(names, path, object_name)
    table = _read(path, list(dict.fromkeys(columns.values())))
    if "well" not in columns and "image" in columns:
        images = next((p for p in sorted(path.parent.iterdir()) if _is_image_table(p, path)), None)
        if images is not None:
            found = _roles(_header(images))
            keys = [k for k in ("image", "table") if k in found and k in columns]
            wanted = {k: found[k] for k in (*keys, "well", "site", "plate") if k in found}
            other = _read(images, list(wanted.values()))
            other = other.rename(columns={v: f"image_{k}" for k, v in wanted.items()}).drop_duplicates(
                [f"image_{k}" for k in keys]
            )
            table = table.merge(
                other, how="left", left_on=[columns[k] for k in keys], right_on=[f"image_{k}" for k in keys]
            )
            columns |= {k: f"image_{k}" for k in ("well", "site", "plate") if k in wanted}
    return table, columns


def _is_image_table(candidate: Path, path: Path) -> bool:
    stem = candidate.name.split(".")[0].lower()
    return (
        candidate.suffix == path.suffix
        and re.fullmatch(r"(.*_)?image", stem) is not None
        and "well" in _roles(_header(candidate))
    )


def _from_sqlite(path: Path, object_name: str | None) -> tuple[pd.DataFrame, dict[str, str]]:
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table','view')")]
        names = {t: [r[1] for r in connection.execute(f"PRAGMA table_info({_quoted(t)})")] for t in tables}
        objects = _object_table(names, path, object_name)
        columns = _find(names[objects], path, object_name)
        selected = [f"o.{_quoted(c)} AS {_quoted(k)}" for k, c in columns.items()]
        joined = ""
        images = next((t for t in tables if t != objects and re.search(r"(^|_)(per_)?image$", t, re.I)), None)
        if images is not None and "image" in columns:
            found = _roles(names[images])
            keys = [k for k in ("image", "table") if k in found and k in columns]
            if "image" in keys:
                added = [k for k in ("well", "site", "plate") if k in found and k not in columns]
                selected += [f"i.{_quoted(found[k])} AS {_quoted(k)}" for k in added]
                same = [f"o.{_quoted(columns[k])} = i.{_quoted(found[k])}" for k in keys]
                joined = f" LEFT JOIN {_quoted(images)} i ON {' AND '.join(same)}"
                columns |= {k: k for k in added}
        query = f"SELECT {', '.join(selected)} FROM {_quoted(objects)} o{joined}"
        table = pd.read_sql_query(query, connection)
    connection.close()
    return table, {k: k for k in columns}


def _object_table(names: dict[str, list[str]], path: Path, object_name: str | None) -> str:
    wanted = [object_name] if object_name else [*COMPARTMENTS, "Object"]
    for name in wanted:
        for table in names:
            if re.fullmatch(rf"(.*_)?(per_)?{re.escape(name)}", table, re.I) and {"x", "y"} <= set(
                _roles(names[table], object_name)
            ):
                return table
    raise MetadataError(
        f"{path} has no table of {object_name or 'nuclei or cells'} with positions; it has {listing(names)}."
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _header(path: Path) -> list[str]:
    if path.suffix.lower() in (".parquet", ".pq"):
        return list(_parquet(path).schema_arrow.names)
    return [str(c) for c in pd.read_csv(path, nrows=0, sep=_delimiter(path), encoding="utf-8-sig").columns]


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    if path.suffix.lower() in (".parquet", ".pq"):
        return _parquet(path).read(columns=columns).to_pandas()
    return pd.read_csv(path, usecols=columns, sep=_delimiter(path), encoding="utf-8-sig", low_memory=False)


def _delimiter(path: Path) -> str:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        header = file.readline(1 << 20)
    return max(",;\t|", key=header.count)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path} is parquet, which needs pyarrow: pip install 'cellvim[tables]'.") from error
    try:
        return ParquetFile(path)
    except ArrowException as error:
        raise MetadataError(f"{path} cannot be read as parquet ({str(error).splitlines()[0][:200]}).") from error


def _find(names: list[str], path: Path, object_name: str | None) -> dict[str, str]:
    columns = _roles(names, object_name)
    if not ({"x", "y"} <= set(columns) or {"x_um", "y_um"} <= set(columns)):
        positions = [n for n in names if re.search(r"[xy]($|_)", n, re.I)] or names
        whose = f" of {object_name}" if object_name else ""
        raise MetadataError(
            f"{path} has no columns of cell positions{whose}; it has {listing(positions, 8)}. Expected a pair such as "
            "Location_Center_X and Location_Center_Y, or x and y."
        )
    return columns


def _roles(names: Iterable[str], object_name: str | None = None) -> dict[str, str]:
    """Return the columns by their role: role -> name."""
    names = list(names)
    plain = {n: _plain(n, object_name) for n in names}
    roles: dict[str, str] = {}
    for role, known in {"well": _WELL, "site": _SITE, "plate": _PLATE, "image": _IMAGE, "table": _TABLE}.items():
        found = next((n for k in known for n in names if _plain(n, "") == k), None)
        if found is not None:
            roles[role] = found
    compartments = [object_name.lower()] if object_name else ["", *(c.lower() for c in COMPARTMENTS)]
    for x_role, y_role, xs, ys in (("x", "y", _X, _Y), ("x_um", "y_um", _X_UM, _Y_UM)):
        for compartment in compartments:
            for known_x, known_y in zip(xs, ys, strict=True):
                x = next((n for n in names if plain[n] == (compartment, known_x)), None)
                y = next((n for n in names if plain[n] == (compartment, known_y)), None)
                if x is not None and y is not None and x_role not in roles:
                    roles |= {x_role: x, y_role: y}
    number_of = _plain(roles["x"], object_name)[0] if "x" in roles else ""
    for compartment in dict.fromkeys((number_of, "")):
        number = next((n for k in _NUMBER for n in names if plain[n] == (compartment, k)), None)
        if number is not None:
            roles["number"] = number
            break
    return roles


def _plain(name: str, object_name: str | None) -> Any:
    """Return (compartment, simplified name) of a column; only the latter if ``object_name`` is an empty string."""
    text = re.sub(r"^(Image_)?(Metadata_)?", "", str(name).strip(), flags=re.I)
    compartment = ""
    for known in [object_name] if object_name else COMPARTMENTS:
        match = re.match(rf"({re.escape(known)})_", text, re.I)
        if match:
            compartment, text = known.lower(), text[match.end() :]
            break
        match = re.search(rf"_({re.escape(known)})$", text, re.I)  # CytoTable: Metadata_ObjectNumber_nuclei
        if match:
            compartment, text = known.lower(), text[: match.start()]
            break
    simplified = "".join(ch for ch in text.casefold() if ch.isalnum())
    return simplified if object_name == "" else (compartment, simplified)


def _standard(table: pd.DataFrame, columns: dict[str, str], path: Path, plate_name: str | None) -> pd.DataFrame:
    if "plate" in columns and plate_name is not None:
        plates = table[columns["plate"]].astype(str)
        if plates.nunique() > 1:
            table = table[plates == plate_name]
            if table.empty:
                raise MetadataError(
                    f"{path} has cells of the plates {listing(sorted(plates.unique()), 6)}, but not of '{plate_name}'."
                )
    unit = ("x", "y") if "x" in columns else ("x_um", "y_um")
    out = pd.DataFrame({u: pd.to_numeric(table[columns[u]], errors="coerce").to_numpy(float) for u in unit})
    known = np.isfinite(out).all(axis=1)
    wells = table[columns["well"]] if "well" in columns else pd.Series([None] * len(table))
    names = {w: _well(w, path) for w in pd.unique(wells)}
    out.insert(0, "well", [names[w] for w in wells])
    sites = table[columns["site"]] if "site" in columns else pd.Series([None] * len(table))
    sites_named = {s: site_text(s) for s in pd.unique(sites)}
    out.insert(1, "site", [sites_named[s] for s in sites])
    numbers = pd.to_numeric(table[columns["number"]], errors="coerce") if "number" in columns else None
    groups = out.groupby(["well", "site"], dropna=False, sort=False)
    out.insert(2, "number", groups.cumcount() + 1 if numbers is None or numbers.isna().any() else numbers.to_numpy(int))
    return out[known.to_numpy()].reset_index(drop=True)


def _well(value: Any, path: Path) -> str | None:
    if value is None or pd.isna(value):
        return None
    try:
        return canonical_well(value)
    except MetadataError as error:
        raise MetadataError(f"{path}: {error}") from error


def site_text(value: Any) -> str | None:
    """Return a site as text: 1, 1.0, "01" and "f01" all give ``"1"``; missing values give None."""
    if value is None or pd.isna(value):
        return None
    text = str(value).strip()
    match = re.fullmatch(r"(?:site|field|[sf])?[_ -]?0*(\d+)(?:\.0+)?", text, re.I)
    return match[1] if match else text
