"""Plate maps join by well in any spelling; mismatches are reported, never guessed."""

from __future__ import annotations

import gzip

import pandas as pd
import pytest

from cellvim.data.platemap import derive_pert_type, join_perturbations, join_platemap, read_platemap
from cellvim.errors import MetadataError


@pytest.fixture
def table(tmp_path):
    def write(text: str, name: str = "map.csv", encoding: str = "utf-8"):
        path = tmp_path / name
        path.write_text(text, encoding=encoding)
        return path

    return write


@pytest.mark.parametrize(
    "text",
    [
        "Well,dose\nA1,1\nB12,2\n",
        "well_position,dose\nA01,1\nB12,2\n",
        "Metadata_Well,dose\nr01c01,1\nr02c12,2\n",
        "Row,Column,dose\nA,01,1\nB,12,2\n",
        "dose,col,row\n1,1,1\n2,12,2\n",
        "row;col;dose\nA;1;1\nB;12;2\n",
        "well_position\tdose\nA01\t1\nB12\t2\n",
        'WellRow,WellCol,dose\nA,"""01""",1\nB,12,2\n',
    ],
)
def test_wells_in_any_spelling(table, text):
    frame, notes = read_platemap(table(text))
    assert list(frame.index) == ["A01", "B12"] and list(frame["dose"]) == [1, 2] and notes == []


def test_byte_order_mark_is_not_part_of_a_name(table):
    frame, _ = read_platemap(table("well,dose\nA1,1\n", encoding="utf-8-sig"))
    assert list(frame.columns) == ["well", "dose"]


def test_columns_keep_their_names_and_get_types(table):
    frame, _ = read_platemap(
        table("Well,Gene,dose,plate_no,Column,empty,mixed\nA1,NF1,0.5,0012,01,,1\nA2,,2,0013,02,,x\n")
    )
    assert list(frame.columns) == ["Well", "Gene", "dose", "plate_no", "Column", "empty", "mixed"]
    assert frame["dose"].dtype == float and list(frame["mixed"]) == ["1", "x"]
    assert list(frame["plate_no"]) == ["0012", "0013"] and list(frame["Column"]) == ["01", "02"]
    assert frame["Gene"].isna().tolist() == [False, True] and frame["empty"].isna().all()


def test_missing_well_column_lists_the_columns(table):
    with pytest.raises(MetadataError, match=r"no column of wells; it has compound, dose. Expected one named Well or"):
        read_platemap(table("compound,dose\nx,1\n"))
    with pytest.raises(MetadataError, match="no column of wells"):
        read_platemap(table("row,dose\nA,1\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as a table"),
        ("Well,dose\n", "has no rows"),
        ("Well,dose\nX99Y,1\n", "'X99Y' is not a well"),
        ("Row,Column\nA,x\n", "'x' is not a plate column"),
        ("Well,dose\nA1,1,2,3\nA2,1\n", "table|A1|not a well"),
    ],
)
def test_unreadable_maps_are_errors(table, text, words):
    with pytest.raises(MetadataError, match=words):
        read_platemap(table(text))


def test_missing_or_binary_file_is_an_error(tmp_path):
    with pytest.raises(MetadataError, match="is not a file"):
        read_platemap(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\x00\x80")
    with pytest.raises(MetadataError, match="line 1 is not UTF-8 text"):
        read_platemap(tmp_path / "b.csv")


def test_rows_of_images_become_rows_of_wells(table):
    text = "Well,Site,File,drug\n" + "".join(f"{w},{s},{w}_{s}.tif,{w}x\n" for w in ("A1", "A2") for s in (1, 2, 3))
    frame, notes = read_platemap(table(text))
    assert list(frame.columns) == ["Well", "drug"] and list(frame["drug"]) == ["A1x", "A2x"]
    assert any("several rows for 2 wells" in n for n in notes) and any("Site, File" in n for n in notes)


def test_contradiction_leaves_the_value_empty_and_is_reported(table):
    text = "Well,drug\nA1,x\nA1,y\nA2,x\nA2,x\nA3,z\nA3,z\n"
    frame, notes = read_platemap(table(text))
    assert frame["drug"].isna().tolist() == [True, False, False]
    assert any("contradicts itself in 'drug' for A01" in n for n in notes)


def test_only_the_plates_own_rows_are_taken(table):
    path = table("Metadata_Plate,Well,drug\nP1,A1,x\nP2,A1,y\n")
    assert list(read_platemap(path, plate_name="P2")[0]["drug"]) == ["y"]
    with pytest.raises(MetadataError, match=r"several plates \(P1, P2\), but not 'P3'"):
        read_platemap(path, plate_name="P3")


def test_wells_without_a_match_are_reported():
    frame = pd.DataFrame({"drug": ["x", "y"]}, index=["A01", "A02"])
    joined, notes = join_platemap(frame, ["A02", "A03"], source="map.csv")
    assert list(joined.index) == ["A02", "A03"] and joined["drug"].isna().tolist() == [False, True]
    assert notes == ["1 wells have no row in map.csv: A03", "map.csv has rows for 1 wells without images: A01"]
    with pytest.raises(MetadataError, match="no row for any of the plate's 1 wells"):
        join_platemap(frame, ["H12"], source="map.csv")


def test_pert_type_by_rule():
    frame = pd.DataFrame({"c": [-1, 0, 1, None], "t": ["a", "b", "b", "a"]})
    assert derive_pert_type(frame, "c:-1=negcon,0=trt,1=poscon")["Metadata_pert_type"].tolist()[:3] == [
        "negcon",
        "trt",
        "poscon",
    ]
    assert derive_pert_type(frame, "t:a=negcon,b=trt")["Metadata_pert_type"].tolist() == [
        "negcon",
        "trt",
        "trt",
        "negcon",
    ]
    assert derive_pert_type(frame, "c:0=negcon,*=trt")["Metadata_pert_type"].tolist()[:3] == ["trt", "negcon", "trt"]
    assert derive_pert_type(frame, "c:0=negcon,*=trt")["Metadata_pert_type"].isna().tolist() == [False] * 3 + [True]
    for rule, words in {
        "c": "cannot be read",
        "c:1": "cannot be read",
        "x:1=trt": "names the column 'x'; the plate map has c, t",
        "c:-1=negcon,0=trt": "no type for 1",
    }.items():
        with pytest.raises(MetadataError, match=words):
            derive_pert_type(frame, rule)


def test_published_maps_are_read(shared_data):
    frame, notes = read_platemap(shared_data / "jump_metadata/JUMP-Target/JUMP-Target-1_compound_platemap.tsv")
    assert len(frame) == 384 and frame.loc["A01", "broad_sample"] == "BRD-A86665761-001-01-1" and notes == []
    frame, _ = read_platemap(shared_data / "sbs_fkhr_translocation_96well/1049_Metadata.csv")
    assert len(frame) == 96 and frame.loc["A12", "SBS_Controls"] == 1 and frame.loc["H02", "SBS_Doses"] == 0
    frame, _ = read_platemap(shared_data / "operetta_export/drug_layout.csv")
    assert frame.loc["C03", "drug"] == "DMSO"
    frame, _ = read_platemap(shared_data / "operetta_export/drug_layout_utf8-dom.csv")
    assert frame.index[0] == "B03" and frame.loc["B03", "my_metadata"] == "example"
    frame, _ = read_platemap(shared_data / "nf1_schwann_plate2_3ch/platemap_NF1_plate2.csv")
    assert frame.loc["D06", "genotype"] == "WT"


@pytest.mark.parametrize(
    ("name", "negcon", "empty"),
    [
        ("JUMP-Target/JUMP-Target-1_compound", 64, 0),
        ("JUMP-Target/JUMP-Target-2_compound", 64, 0),
        ("JUMP-Target/JUMP-Target-1_crispr", 60, 4),
        ("JUMP-Target/JUMP-Target-1_orf", 60, 4),
        ("JUMP-MOA/JUMP-MOA_compound", 24, 0),
    ],
)
def test_published_perturbation_tables_join_to_their_plate_maps(shared_data, name, negcon, empty):
    folder = shared_data / "jump_metadata"
    frame, _ = read_platemap(folder / f"{name}_platemap.tsv")
    joined, notes = join_perturbations(frame, folder / f"{name}_metadata.tsv", source="map.tsv")
    kinds = joined["Metadata_pert_type"].value_counts()
    assert list(joined.index) == list(frame.index) and len(joined) == 384
    assert kinds["negcon"] == negcon and kinds.get("empty", 0) == empty and kinds.sum() == 384
    assert notes == ([] if not empty else ["4 wells have no broad_sample in map.tsv: E01, G04, J05, L08"])
    raw = pd.read_csv(folder / f"{name}_metadata.tsv", sep="\t", keep_default_na=False)
    raw = raw.drop_duplicates("broad_sample").set_index("broad_sample")
    what = "pert_iname" if "pert_iname" in raw else "gene"
    wells = joined.index[joined["broad_sample"].notna()][::7]
    expected = [raw.loc[joined.loc[w, "broad_sample"], what] for w in wells]
    assert [value if isinstance(value, str) else "" for value in joined.loc[wells, what]] == expected


def test_jump_wells_and_compounds_join_by_their_id(table, tmp_path):
    wells = (
        "Metadata_Source,Metadata_Plate,Metadata_Well,Metadata_JCP2022\nsource_4,P1,A01,JCP_1\nsource_4,P1,A2,JCP_9\n"
    )
    path = tmp_path / "well.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write(wells + "source_4,P2,A01,JCP_2\n")
    frame, _ = read_platemap(path, plate_name="P1")
    controls = table(
        "Metadata_JCP2022,Metadata_pert_type,Metadata_Source\nJCP_1,negcon,other\nJCP_1,negcon,x\nJCP_3,poscon,\n"
    )
    joined, notes = join_perturbations(frame, controls, source="well.csv.gz")
    assert joined.loc["A01", "Metadata_pert_type"] == "negcon" and joined["Metadata_pert_type"].isna()["A02"]
    assert joined["Metadata_Source"].tolist() == ["source_4", "source_4"]
    assert [n.split(":")[0] for n in notes] == [
        f"{controls.name} contradicts itself for 1 Metadata_JCP2022",
        f"1 wells have a Metadata_JCP2022 without a row in {controls.name} (JCP_9)",
        f"well.csv.gz and {controls.name} contradict each other in 'Metadata_Source' for A01",
    ]
    with pytest.raises(MetadataError, match="no column in common"):
        join_perturbations(frame, table("gene\nx\n"), source="well.csv.gz")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(MetadataError, match="cannot be read"):
        read_platemap(path)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "map.csv"
    text = "Well,drug\nA01,x\nA02,Café\n"
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(
        MetadataError, match=r"map.csv, line 3 is not UTF-8 text: 'A02,Caf.'\. Save the table as CSV UTF-8"
    ):
        read_platemap(path)
    for encoding in ("utf-16", "utf-8-sig"):  # as spreadsheets write it: with a mark of the encoding
        path.write_bytes(text.encode(encoding))
        assert list(read_platemap(path)[0]["drug"]) == ["x", "Café"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Well,drug\nA01,x\nZZ99,y\n", "line 3: 'ZZ99' is not a well"),
        ("Well,drug\n\nA01,x\n\nA55,y\n", "line 5: Well 'A55' is not on a plate"),
        ("Well,drug\nA01,x\n,total\n", "line 3: '' is not a well"),
        ("Row,Column,drug\nA,1,x\nA,one,y\n", "line 3: 'one' is not a plate column"),
    ],
)
def test_invalid_wells_are_refused_with_their_line(tmp_path, text, line):
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(MetadataError, match=line):
        read_platemap(tmp_path / "map.csv")


def test_repeated_columns_are_refused_and_blank_lines_are_not(tmp_path):
    (tmp_path / "map.csv").write_text("Well,drug,dose, drug \nA01,x,1,y\n")
    with pytest.raises(MetadataError, match=r"columns more than once: drug\."):
        read_platemap(tmp_path / "map.csv")
    (tmp_path / "map.csv").write_text("Well,drug,\nA01,x,\n,,\n\nA02,y\n")
    table, _ = read_platemap(tmp_path / "map.csv")
    assert list(table.index) == ["A01", "A02"] and list(table["drug"]) == ["x", "y"]
