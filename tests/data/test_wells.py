"""Wells have one canonical spelling, whatever the microscope or the plate map writes."""

from __future__ import annotations

import pytest

from cellvim.data.wells import MAX_COLUMNS, MAX_ROWS, canonical_well, natural_key, row_number, well_name, well_position
from cellvim.errors import MetadataError


@pytest.mark.parametrize(
    ("text", "well"),
    [
        ("A1", "A01"),
        ("a01", "A01"),
        ("A001", "A01"),
        ("r01c01", "A01"),
        ("R1C1", "A01"),
        ("P24", "P24"),
        ("r16c24", "P24"),
        ("AF48", "AF48"),
        ("r32c48", "AF48"),
        ("H-12", "H12"),
        (' "B3" ', "B03"),
    ],
)
def test_spellings_are_unified(text, well):
    assert canonical_well(text) == well


@pytest.mark.parametrize("text", ["", "A", "1", "A0", "A49", "AG01", "r00c01", "r01c49", "01A", "A1B2", "well", None])
def test_invalid_wells_are_errors(text):
    with pytest.raises(MetadataError):
        canonical_well(text)


def test_name_and_position_are_inverse():
    for row in range(MAX_ROWS):
        for column in range(MAX_COLUMNS):
            assert well_position(well_name(row, column)) == (row, column)


def test_rows_are_letters_or_numbers():
    assert [row_number(t) for t in ("A", "h", "AA", "AF", "3", "03")] == [1, 8, 27, 32, 3, 3]
    for text in ("", "AG", "?", "A1"):
        with pytest.raises(MetadataError):
            row_number(text)


def test_natural_order():
    assert sorted(["ch10", "ch2", "ch1", "2", "10"], key=natural_key) == ["2", "10", "ch1", "ch2", "ch10"]
