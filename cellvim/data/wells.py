"""Well names: the canonical spelling ``A01`` for all ways in which plates and plate maps write a position."""

from __future__ import annotations

import re

from cellvim.errors import MetadataError

_LETTERS = re.compile(r"^([A-Za-z]{1,2})[\s_-]*0*(\d{1,2})$")  # A1, A01, AF48, A-01
_NUMBERS = re.compile(r"^[Rr]0*(\d{1,2})[\s_-]*[Cc]0*(\d{1,2})$")  # r01c01
MAX_ROWS, MAX_COLUMNS = 32, 48  # a 1536-well plate


def well_name(row: int, column: int) -> str:
    """Return the name of the well at a zero-based row and column: (0, 0) is ``A01``, (26, 0) is ``AA01``."""
    letters = chr(ord("A") + row) if row < 26 else "A" + chr(ord("A") + row - 26)
    return f"{letters}{column + 1:02d}"


def well_position(name: str) -> tuple[int, int]:
    """Return the zero-based (row, column) of a well written ``A1``, ``A01`` or ``r01c01``.

    Raises
    ------
    MetadataError
        The text is not a position on a plate of up to 32 x 48 wells.
    """
    text = str(name).strip().strip("\"'")
    match = _NUMBERS.match(text) or _LETTERS.match(text)
    if match is None:
        raise MetadataError(f"'{name}' is not a well; expected a name such as A1, A01 or r01c01.")
    try:
        row, column = row_number(match[1]), int(match[2])
    except MetadataError as error:
        raise MetadataError(f"'{name}' is not a well: {error}") from error
    if not (1 <= row <= MAX_ROWS and 1 <= column <= MAX_COLUMNS):
        raise MetadataError(f"Well '{name}' is not on a plate of {MAX_ROWS} rows and {MAX_COLUMNS} columns.")
    return row - 1, column - 1


def canonical_well(name: str) -> str:
    """Return ``A01`` for ``A1``, ``a01`` or ``r01c01``; raise `MetadataError` for anything that is not a well."""
    return well_name(*well_position(name))


def row_number(text: str) -> int:
    """Return the one-based number of a row written as a letter (``A``, ``AA``) or as a number (``1``).

    Raises
    ------
    MetadataError
        The text is neither.
    """
    text = str(text).strip().strip("\"'").upper()
    if text.isdigit():
        return int(text)
    if re.fullmatch(r"[A-Z]|A[A-F]", text):
        return ord(text[-1]) - ord("A") + 1 + (26 if len(text) == 2 else 0)
    raise MetadataError(f"'{text}' is not a plate row; expected a letter (A, B, ..., AF) or a number.")


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts ``ch2`` before ``ch10``."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(text)) if part]
