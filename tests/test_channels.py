"""Channels are matched by name, never by position; ambiguous names raise errors that list the available ones."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvim.channels import (
    canonical_name,
    display_color,
    find_dna_channel,
    match_channels,
    parse_channel_names,
    parse_channel_overrides,
)
from cellvim.errors import ChannelError


@pytest.mark.parametrize(
    ("name", "stain"),
    [
        ("DNA", "DNA"),
        ("Hoechst 33342", "DNA"),
        ("HOECHST-33342", "DNA"),
        ("dapi", "DNA"),
        ("DRAQ5", "DNA"),
        ("OrigDNA", "DNA"),
        ("ORIGDNA", "DNA"),
        ("Alexa 488 ConA", "ER"),
        ("Concanavalin A", "ER"),
        ("SYTO 14", "RNA"),
        ("SYTO14", "RNA"),
        ("Phalloidin + WGA", "AGP"),
        ("Actin, Golgi, plasma membrane", "AGP"),
        ("MitoTracker Deep Red", "Mito"),
        ("MitoTrackerDeepRed", "Mito"),
        ("Brightfield", "Brightfield"),
        ("BF", "Brightfield"),
        ("BF high", "HighZBF"),
        ("OrigBrightfield_H", "HighZBF"),
        ("LowZBF", "LowZBF"),
        ("FKHR-EGFP", "GFP"),
        ("mCherry", "RFP"),
    ],
)
def test_synonym_names_its_stain(name, stain):
    assert canonical_name(name) == stain


@pytest.mark.parametrize("name", ["DNA2", "ch5", "Fluorescein (FITC)", "Alexa 488", "RNA/ER", "", "Ångström", "C01"])
def test_unknown_or_mixed_name_is_no_stain(name):
    assert canonical_name(name) is None


@given(st.text())
def test_any_text_is_handled(name):
    assert canonical_name(name) == canonical_name(name.strip())


def test_match_prefers_exact_then_case_then_meaning():
    assert match_channels(["dna"], ["DAPI", "DNA", "dna"], where="p") == [2]
    assert match_channels(["Dna"], ["DAPI", "DNA", "ER"], where="p") == [1]
    assert match_channels(["DNA", "Mito", "ER"], ["ConA", "Hoechst 33342", "MitoTracker"], where="p") == [1, 2, 0]


def test_unknown_channel_lists_what_there_is():
    with pytest.raises(ChannelError) as caught:
        match_channels(["DNA2"], ["DNA", "ER", "RNA"], where="plate.zarr")
    assert str(caught.value) == ("Channel 'DNA2' is not in plate.zarr; it has DNA, ER, RNA. Choose with --channels.")
    assert caught.value.exit_code == 2


def test_ambiguous_channel_lists_candidates():
    with pytest.raises(ChannelError, match="matches 2 channels of p: Hoechst, DAPI"):
        match_channels(["DNA"], ["Hoechst", "DAPI", "ER"], where="p")


def test_two_names_of_one_channel_are_an_error():
    with pytest.raises(ChannelError, match="'DNA' and 'Hoechst' are the same channel"):
        match_channels(["DNA", "ER", "Hoechst"], ["DAPI", "ER"], where="p")


def test_dna_channel_is_found_by_meaning():
    assert find_dna_channel(["GFP", "DRAQ5"], where="p") == 1
    assert find_dna_channel(["DAPI", "DNA"], where="p") == 1
    with pytest.raises(ChannelError, match=r"No channel name of p contains a DNA stain.*it has ch1, ch2"):
        find_dna_channel(["ch1", "ch2"], where="p")
    with pytest.raises(ChannelError, match="matches 2 channels"):
        find_dna_channel(["DAPI", "Hoechst"], where="p")


def test_overrides_are_read():
    assert parse_channel_overrides("DNA=ch5, ER=ch4") == [("DNA", "ch5"), ("ER", "ch4")]
    assert parse_channel_overrides("DNA,ER") == [(None, "DNA"), (None, "ER")]
    assert parse_channel_names("ch5=DNA,ch1=Mito") == {"ch5": "DNA", "ch1": "Mito"}


@pytest.mark.parametrize("text", ["", "DNA,,ER", "DNA=", "=ch5", "DNA=ch5,DNA=ch4", "DNA,DNA", "A=x,B=x"])
def test_malformed_overrides_are_errors(text):
    with pytest.raises(ChannelError):
        parse_channel_overrides(text)


@pytest.mark.parametrize("text", ["", "ch5", "ch5=", "ch5=DNA,ch5=ER"])
def test_malformed_channel_names_are_errors(text):
    with pytest.raises(ChannelError):
        parse_channel_names(text)


def test_every_channel_has_a_colour():
    assert display_color("Hoechst", 3) == "0000FF"
    assert display_color("BF high", 0) == "FFFFFF"
    assert len({display_color(f"ch{i}", i) for i in range(8)}) == 8


def test_module_is_light():
    code = "import sys, cellvim.channels; print(sorted({'numpy', 'pandas', 'torch', 'zarr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "stain"),
    [
        *[("OrigBrightfield", "Brightfield"), ("OrigHighZBF", "HighZBF"), ("OrigLowZBF", "LowZBF")],
        *[("Brightfield High", "HighZBF"), ("brightfield_low", "LowZBF"), ("BF", "Brightfield"), ("OrigDNA", "DNA")],
        *[("HOECHST 33342", "DNA"), ("SYTO 14", "RNA"), ("MitoTracker Deep Red", "Mito"), ("Concanavalin A", "ER")],
        *[("Phalloidin/WGA", "AGP"), ("568 Phalloidin + WGA", "AGP"), ("F-actin", "AGP"), ("Alexa 488", None)],
        *[("FITC", None), ("488 long", None), ("ch5", None), ("w1", None)],
    ],
)
def test_stains_of_cell_painting_and_brightfield_planes(name, stain):
    assert canonical_name(name) == stain
