"""Cell positions are found in the tables that other tools write, by the names of their columns."""

from __future__ import annotations

import sqlite3

import numpy as np
import pandas as pd
import pytest

from cellvim.data.centroids import read_centroids
from cellvim.errors import MetadataError

BODY = pd.DataFrame(
    {"ImageNumber": [1, 1, 2, 2], "ObjectNumber": [1, 2, 1, 2], "X": [3.5, 9.0, 4.0, np.nan], "Y": [5.5, 1.0, 2.0, 7.0]}
)
IMAGES = pd.DataFrame({"ImageNumber": [1, 2], "Metadata_Well": ["A1", "B02"], "Metadata_Site": [1, 2]})
EXPECTED = [("A01", "1", 1, 3.5, 5.5), ("A01", "1", 2, 9.0, 1.0), ("B02", "2", 1, 4.0, 2.0)]


def rows(table) -> list[tuple]:
    return list(table[["well", "site", "number", "x", "y"]].itertuples(index=False, name=None))


def named(prefix="", what="Location_Center_"):
    return BODY.rename(columns={"X": f"{prefix}{what}X", "Y": f"{prefix}{what}Y"})


@pytest.mark.parametrize("what", ["Location_Center_", "AreaShape_Center_"])
@pytest.mark.parametrize("image_table", ["Image.csv", "MyExpt_Image.csv"])
def test_cellprofiler_csv_takes_wells_from_the_image_table(tmp_path, what, image_table):
    named(what=what).to_csv(tmp_path / "MyExpt_Nuclei.csv", index=False)
    IMAGES.to_csv(tmp_path / image_table, index=False)
    assert rows(read_centroids(tmp_path / "MyExpt_Nuclei.csv")) == EXPECTED


@pytest.mark.parametrize(
    ("image_name", "object_name"), [("Image", "Nuclei"), ("MyExpt_Per_Image", "MyExpt_Per_Object")]
)
def test_cellprofiler_and_cytominer_sqlite(tmp_path, image_name, object_name):
    with sqlite3.connect(tmp_path / "p.sqlite") as connection:
        objects = named("Nuclei_").rename(
            columns={"ObjectNumber": "Nuclei_ObjectNumber"} if "Per" in object_name else {}
        )
        cells = BODY.assign(X=0.0, Y=0.0).rename(
            columns={"X": "Cells_Location_Center_X", "Y": "Cells_Location_Center_Y"}
        )
        images = IMAGES.add_prefix("Image_").rename(columns={"Image_ImageNumber": "ImageNumber"})
        images.assign(TableNumber="t").to_sql(image_name, connection, index=False)
        objects.assign(TableNumber="t").to_sql(object_name, connection, index=False)
        if "Per" not in object_name:
            cells.to_sql("Cells", connection, index=False)
    connection.close()
    assert rows(read_centroids(tmp_path / "p.sqlite")) == EXPECTED
    if "Per" not in object_name:
        assert (read_centroids(tmp_path / "p.sqlite", object_name="Cells")["x"] == 0).all()
    with pytest.raises(MetadataError, match="no table of Nothing"):
        read_centroids(tmp_path / "p.sqlite", object_name="Nothing")


def test_cytotable_parquet_prefers_nuclei(tmp_path):
    pytest.importorskip("pyarrow")
    table = pd.DataFrame(
        {
            "Metadata_ImageNumber": BODY["ImageNumber"],
            "Image_Metadata_Well": ["A01", "A01", "B02", "B02"],
            "Image_Metadata_Site": ["1", "1", "2", "2"],
            "Metadata_ObjectNumber": BODY["ObjectNumber"],
            "Metadata_Cells_Location_Center_X": 0.0,
            "Metadata_Cells_Location_Center_Y": 0.0,
            "Metadata_Nuclei_Location_Center_X": BODY["X"],
            "Metadata_Nuclei_Location_Center_Y": BODY["Y"],
            "Nuclei_AreaShape_Area": 5,
        }
    )
    table.to_parquet(tmp_path / "c.parquet")
    assert rows(read_centroids(tmp_path / "c.parquet")) == EXPECTED
    assert (read_centroids(tmp_path / "c.parquet", object_name="Cells")["x"] == 0).all()


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("names", [("x", "y"), ("X", "Y"), ("x_px", "y_px"), ("centroid_x", "centroid_y")])
def test_plain_tables(tmp_path, delimiter, names):
    table = BODY.drop(columns=["ImageNumber", "ObjectNumber"]).rename(columns=dict(zip("XY", names, strict=True)))
    table = table.assign(well=["r01c01", "a1", "B2", "B2"], Field=["01", "f1", "2.0", "2"])
    table.to_csv(tmp_path / "t.csv", sep=delimiter, index=False)
    assert rows(read_centroids(tmp_path / "t.csv")) == EXPECTED


def test_micrometers_and_scikit_image_names(tmp_path):
    pd.DataFrame({"x_um": [1.0], "y_um": [2.0], "Well": ["A1"]}).to_csv(tmp_path / "um.csv", index=False)
    assert read_centroids(tmp_path / "um.csv").iloc[0].to_dict() == {
        "well": "A01", "site": None, "number": 1, "x_um": 1.0, "y_um": 2.0,
    }  # fmt: skip
    pd.DataFrame({"label": [7], "centroid-0": [2.0], "centroid-1": [1.0]}).to_csv(tmp_path / "s.csv", index=False)
    assert rows(read_centroids(tmp_path / "s.csv")) == [(None, None, 7, 1.0, 2.0)]


def test_only_the_plates_own_cells_are_taken(tmp_path):
    table = named().assign(Metadata_Plate=["P1", "P1", "P2", "P2"], Metadata_Well=["A1"] * 4)
    table.to_csv(tmp_path / "t.csv", index=False)
    assert len(read_centroids(tmp_path / "t.csv", plate_name="P1")) == 2
    with pytest.raises(MetadataError, match=r"of the plates P1, P2.*'P3'"):
        read_centroids(tmp_path / "t.csv", plate_name="P3")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"a,b\n1,2\n", "no columns of cell positions"),
        ("t.csv", b"", "cannot be read"),
        ("t.csv", b"\xff\xfe\x00bad", "cannot be read|no columns"),
        ("t.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("t.sqlite", b"SQLite format 3\x00 no", "cannot be read"),
        ("t.csv", b"x,y,Well\n1,2,Z99\n", "Well 'Z99' is not|'Z99' is not a well"),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(MetadataError, match=words) as caught:
        read_centroids(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_published_nuclei_are_read(shared_data):
    for folder, count in (("jump_BR00117035_A01_8ch", 68), ("jump_BR00116991_A01_5ch", 109)):
        table = read_centroids(shared_data / folder / "Nuclei.csv")
        raw = pd.read_csv(shared_data / folder / "Nuclei.csv")
        assert len(table) == count
        for axis in ("X", "Y"):
            np.testing.assert_array_equal(table[axis.lower()], raw[f"Location_Center_{axis}"])


def test_cytotable_keeps_the_objects_own_numbers(tmp_path):
    """Columns as CytoTable makes them of CellProfiler's SQLite, whose numbers have another name than in its CSV."""
    pytest.importorskip("pyarrow")
    table = pd.DataFrame(
        {
            "Metadata_ImageNumber": [1, 1],
            "Image_Metadata_Well": ["A1", "A1"],
            "Image_Metadata_Plate": ["P", "P"],
            "Image_Metadata_Site": ["1", "1"],
            "Metadata_Cells_Number_Object_Number": [2, 4],
            "Metadata_Nuclei_Number_Object_Number": [5, 9],
            "Cytoplasm_AreaShape_Center_X": [0.0, 0.0],
            "Cytoplasm_AreaShape_Center_Y": [0.0, 0.0],
            "Metadata_Nuclei_Location_Center_X": [3.5, 4.0],
            "Metadata_Nuclei_Location_Center_Y": [5.5, 6.0],
        }
    )
    table.to_parquet(tmp_path / "converted.parquet")
    found = rows(read_centroids(tmp_path / "converted.parquet", plate_name="P"))
    assert found == [("A01", "1", 5, 3.5, 5.5), ("A01", "1", 9, 4.0, 6.0)]
