"""Plates written by CellVim and by other tools are read correctly; errors name the field and the cause."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellvim.data.plate import describe, open_plate
from cellvim.errors import ChannelError, FieldReadError, PlateError


def shard(plate: Path, well: str = "A/01", site: str = "1") -> Path:
    return plate / well / site / "0" / "c" / "0" / "0" / "0"


def edit(file: Path, change) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_plate_attributes(make_plate):
    plate = open_plate(make_plate())
    assert plate.wells == ["A01", "A02", "B03"]
    assert [f.name for f in plate.fields] == ["A01/1", "A01/2", "A02/1", "A02/2", "B03/1", "B03/2"]
    assert plate.channel_names == ["DNA", "ER", "RNA"]
    assert plate.channel_colors == ["0000FF", "00FF00", "FFFF00"]
    assert plate.pixel_size_um == 0.598
    assert plate.name == "test" and plate.ome_version == "0.5"
    field = plate.fields[0]
    assert field.shape == (3, 23, 31) and field.dtype == np.uint16
    assert list(plate.well_metadata.index) == plate.wells and plate.well_metadata.shape[1] == 0
    assert plate.oddities() == []


def test_fields_are_in_well_order_then_site(make_plate):
    plate = open_plate(make_plate(wells=("AA02", "B10", "B02", "A11"), sites=("10", "9", "2")))
    assert plate.wells == ["A11", "B02", "B10", "AA02"]
    assert [f.site for f in plate.fields[:3]] == ["2", "9", "10"]


def test_channels_are_read_by_name_in_the_requested_order(make_plate):
    field = open_plate(make_plate()).fields[0]
    whole = field.read()
    assert whole.shape == (3, 23, 31) and whole.flags.c_contiguous
    np.testing.assert_array_equal(field.read(["RNA", "Hoechst"]), whole[[2, 0]])
    np.testing.assert_array_equal(field.read([1]), whole[[1]])
    assert field.read([]).shape == (0, 23, 31)
    with pytest.raises(ChannelError, match=r"Channel 'AGP' is not in plate.zarr"):
        field.read(["AGP"])
    with pytest.raises(ChannelError, match="number 3"):
        field.read([3])


def test_large_field_is_several_chunks_in_one_file(make_plate, monkeypatch):
    monkeypatch.setattr("cellvim.data.plate_writer.CHUNK_SIDE", 10)
    path = make_plate(wells=("A01",), sites=("1",), size=(23, 31), seed=5)
    rng = np.random.default_rng(5)
    np.testing.assert_array_equal(open_plate(path).fields[0].read(), rng.integers(1, 200, (3, 23, 31)))
    assert len([p for p in (path / "A/01/1/0/c").rglob("*") if p.is_file()]) == 1


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_pixel_types_survive(make_plate, dtype):
    assert open_plate(make_plate(dtype=dtype)).fields[0].read().dtype == dtype


def test_field_survives_pickling(make_plate):
    plate = open_plate(make_plate())
    before = plate.fields[3].read()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(plate.fields[3])).read(), before)
    assert pickle.loads(pickle.dumps(plate)).wells == plate.wells


def test_well_metadata_comes_back(make_plate):
    table = pd.DataFrame(
        {"Metadata_pert_type": ["negcon", "trt", None], "dose": [0.0, 1.0, 2.5], "n": [1, 2, 3], "Column": ["01"] * 3},
        index=["A01", "A02", "B03"],
    )
    back = open_plate(make_plate(well_metadata=table)).well_metadata
    pd.testing.assert_frame_equal(back, table.rename_axis("well"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["tczyx", "czyx", "cyx", "yx", "zyx", "tyx"])
def test_other_writers_versions_and_axes(make_foreign_plate, version, axes):
    path, data = make_foreign_plate(version, axes)
    plate = open_plate(path)
    assert plate.wells == ["C07"] and plate.ome_version == version
    assert plate.pixel_size_um == pytest.approx(0.325)
    expected = data.reshape(-1, 12, 17)
    np.testing.assert_array_equal(plate.fields[0].read(), expected)
    assert plate.channel_names == [f"Dye {i}" for i in range(len(expected))]


def test_stack_asks_for_a_plane(make_foreign_plate):
    path, data = make_foreign_plate("0.5", "tczyx", {"z": 4, "t": 2})
    with pytest.raises(FieldReadError, match=r"2 time points and none was chosen; open the plate with t=0"):
        open_plate(path).fields[0].read()
    with pytest.raises(FieldReadError, match=r"4 z planes and none was chosen.*z='max'"):
        open_plate(path, t=1).fields[0].read()
    np.testing.assert_array_equal(open_plate(path, t=1, z=2).fields[0].read(), data[1, :, 2])
    np.testing.assert_array_equal(open_plate(path, t=1, z="max").fields[0].read([1]), data[1, 1:, :].max(axis=1))
    with pytest.raises(FieldReadError, match="does not have z=4"):
        open_plate(path, t=0, z=4).fields[0].read()
    assert any("stacks of 4 z planes" in note for note in open_plate(path).oddities())


def test_single_image_opens_as_one_field(make_plate):
    plate = open_plate(make_plate() / "A/02/1")
    assert [f.name for f in plate.fields] == ["A01/0"] and plate.fields[0].read().shape == (3, 23, 31)
    assert any("not a plate" in odd for odd in plate.oddities())


def test_plates_of_other_tools_open(shared_data):
    folder = shared_data / "omezarr_foreign"
    plate = open_plate(folder / "bf2raw_hcs_v04.zarr")
    assert (len(plate.wells), len(plate.fields), plate.fields[0].shape) == (4, 8, (3, 64, 64))
    assert all(f.read().any() for f in plate.fields)
    plate = open_plate(folder / "fractal_plate_ones_mip_v04.zarr")  # its well has no metadata, its paths are numbers
    assert plate.wells == ["B03"] and plate.pixel_size_um == 0.1625
    assert (plate.fields[0].read() == 1).all()
    assert any("constant" in odd for odd in plate.oddities())
    plate = open_plate(folder / "xyz_8bit__mitotic_plate_calibrated.ome.zarr", z="max")
    assert plate.fields[0].read().max() == 162
    plate = open_plate(folder / "6001240_labels_v0.5.zarr", z=118)
    assert plate.channel_names == ["LaminB1", "Dapi"] and plate.fields[0].read(["DNA"]).any()
    missing = open_plate(folder / "20200812-CardiomyocyteDifferentiation14-Cycle1_B_03_mip.zarr")
    with pytest.raises(FieldReadError, match="none of its chunks is stored"):
        missing.fields[0].read()


def test_metadata_of_every_foreign_file_opens_or_is_refused(shared_data):
    folder = shared_data / "omezarr_foreign" / "yaozarrs_idr_metadata"
    for path in sorted(p for p in folder.glob("*/*") if p.is_dir()):
        try:
            assert open_plate(path).fields
        except PlateError as error:
            assert path.name in str(error)


def test_errors_describe_what_is_not_a_plate(tmp_path, shared_data):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.zarr").write_text("x")
    (tmp_path / "tiffs").mkdir()
    (tmp_path / "tiffs" / "a.tif").write_bytes(b"")
    mini = shared_data / "jump_rab30_mini" / "jump_rab30_mini" / "images.zarr"
    for path, words in {
        tmp_path / "nothing.zarr": "does not exist",
        tmp_path / "file.zarr": "is a file; expected the folder",
        tmp_path / "empty": "neither zarr.json nor .zgroup",
        tmp_path / "tiffs": "folder of TIFFs.*cellvim import",
        mini: r"Zarr but not an OME-Zarr plate or image \(it holds images\)",
        mini / "images": "single Zarr array",
        "http://127.0.0.1:9/plate.zarr": "://",
    }.items():
        with pytest.raises(PlateError, match=words) as caught:
            open_plate(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "delete"])
def test_damaged_chunk_names_the_field_and_other_fields_are_read(make_plate, damage):
    path = make_plate()
    file = shard(path, "A/02", "2")
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "flip":
        content[len(content) // 3] ^= 0xFF
        file.write_bytes(content)
    else:
        file.unlink()
    plate = open_plate(path)
    with pytest.raises(FieldReadError, match=r"Field A02/2 of plate.zarr is unreadable") as caught:
        plate.fields[3].read()
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    for i in (0, 1, 2, 4, 5):
        plate.fields[i].read()


def test_black_field_differs_from_a_lost_one(tmp_path):
    from cellvim.data.plate_writer import PlateWriter

    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA"]) as writer:
        writer.write_field("A1", "1", np.zeros((1, 16, 16), "uint8"))
        writer.finish()
    assert not open_plate(tmp_path / "p.zarr").fields[0].read().any()


def test_oddities_are_listed(make_plate):
    path = make_plate(pixel_size_um=None, notes=["2 TIFF files were left out"])
    shutil.rmtree(path / "B/03/2")
    edit(path / "B/03/zarr.json", lambda d: d["attributes"]["ome"]["well"]["images"].pop())
    edit(
        path / "A/01/2/zarr.json",
        lambda d: d["attributes"]["ome"]["omero"]["channels"][0].update(label="Hoechst"),
    )
    (path / "A/02/1/zarr.json").write_text("{")
    odd = "\n".join(open_plate(path).oddities())
    assert "2 TIFF files were left out" in odd
    assert "1 wells have 1 fields where most have 2: B03" in odd
    assert "no pixel size" in odd
    assert "another channel names" in odd and "A01/2" in odd
    assert "1 fields have no readable metadata: A02/1" in odd


def test_constant_and_saturated_channels_are_listed(tmp_path):
    from cellvim.data.plate_writer import PlateWriter

    image = np.random.default_rng(0).integers(0, 200, (3, 20, 20)).astype("uint8")
    image[1] = 7
    image[2, :2] = 255
    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA", "ER", "RNA"], pixel_size_um=1) as writer:
        writer.write_field("A1", "1", image)
        writer.finish()
    odd = open_plate(tmp_path / "p.zarr").oddities()
    assert "channel ER is constant in 1 of 1 fields looked at" in odd
    assert any("channel RNA is saturated in over 1%" in o for o in odd)


def test_describe_is_what_info_prints(make_plate):
    info = describe(open_plate(make_plate()))
    assert info["n_wells"] == 3 and info["n_fields"] == 6 and info["fields_per_well"] == {2: 3}
    assert info["sizes"] == {"23 x 31": 6} and info["dtypes"] == ["uint16"]
    assert info["pixel_size_um"] == 0.598 and info["channel_names"] == ["DNA", "ER", "RNA"]
    json.dumps(info)


def test_opening_reads_no_field_metadata(make_plate):
    path = make_plate()
    for file in path.glob("*/*/*/zarr.json"):
        file.write_text("not json")
    plate = open_plate(path)
    assert len(plate.fields) == 6
    with pytest.raises(PlateError, match="None of the 6 fields"):
        _ = plate.channel_names


def test_paths_that_lead_out_of_the_plate_are_refused(make_plate, tmp_path):
    other = make_plate("other.zarr")
    path = make_plate()
    edit(path / "zarr.json", lambda d: d["attributes"]["ome"]["plate"]["wells"][0].update(path="../other.zarr/A/01"))
    with pytest.raises(PlateError, match=r"lists a well at '\.\./other.zarr/A/01'"):
        open_plate(path)
    path = make_plate("second.zarr")
    edit(path / "A/01/zarr.json", lambda d: d["attributes"]["ome"]["well"]["images"][0].update(path="../02/1"))
    with pytest.raises(PlateError, match="outside of the well"):
        open_plate(path)
    path = make_plate("third.zarr")
    shutil.rmtree(path / "A/01/1")
    (path / "A/01/1").symlink_to(other / "A/01/1")
    with pytest.raises(PlateError, match="outside of the well"):
        open_plate(path)
    path = make_plate("fourth.zarr")
    edit(
        path / "A/01/1/zarr.json",
        lambda d: d["attributes"]["ome"]["multiscales"][0]["datasets"][0].update(path="../../02/1/0"),
    )
    with pytest.raises(FieldReadError, match="outside of the field"):
        open_plate(path).fields[0].read()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [3, 10**9, 10**9]}, "larger than any field"),
        ({"shape": [3, 0, 31]}, "empty"),
        ({"shape": [23, 31]}, r"axes are \(c, y, x\) for 2 dimensions"),
        ({"shape": "big"}, "has the shape 'big'"),
        ({"data_type": "string"}, "type"),
        ({"data_type": "complex64"}, "expected integers or floats"),
        ({"codecs": [{"name": "unheard_of"}]}, "pixels cannot be read"),
    ],
)
def test_invalid_array_is_refused(make_plate, change, words):
    path = make_plate()
    edit(path / "A/01/1/0/zarr.json", lambda d: d.update(change))
    with pytest.raises(FieldReadError, match=words):
        open_plate(path).fields[0].read()


def test_damaged_metadata_is_named(make_plate):
    path = make_plate()
    (path / "A/02/zarr.json").write_text("[1]")
    plate = open_plate(path)  # the images of the well are found by their folders, and this is noted
    assert len(plate.fields) == 6
    assert {"the metadata of well A02 is damaged", "well A02 lists no images"} <= {
        odd.split(":")[0] for odd in plate.oddities()
    }
    (path / "zarr.json").write_text("{")
    with pytest.raises(PlateError, match="not JSON"):
        open_plate(path)


@pytest.mark.parametrize(
    "wells", [None, [], "A/1", [{}], [{"path": "A"}], [{"path": "x/y"}], [{"path": 5}], [{"path": "A/1"}] * 2]
)
def test_invalid_well_lists_are_refused(make_plate, wells):
    path = make_plate()
    edit(path / "zarr.json", lambda d: d["attributes"]["ome"]["plate"].update(wells=wells))
    with pytest.raises(PlateError):
        open_plate(path)


def test_fields_are_read_into_given_memory(make_plate, make_foreign_plate):
    field = open_plate(make_plate(wells=("A01",), sites=("1",))).fields[0]
    out = np.empty((2, 23, 31), "uint16")
    assert field.read(["RNA", "DNA"], out=out) is out
    np.testing.assert_array_equal(out, field.read()[[2, 0]])
    for wrong in (out[:1], out.astype("int32"), np.empty((2, 23, 62), "uint16")[:, :, ::2]):
        with pytest.raises(ValueError, match=r"expected \(2, 23, 31\) uint16"):
            field.read(["RNA", "DNA"], out=wrong)
    path, data = make_foreign_plate("0.5", "yxc")  # axes that Zarr itself reads
    out = np.empty((2, 12, 17), "uint16")
    assert open_plate(path).fields[0].read(out=out) is out
    np.testing.assert_array_equal(out, data.transpose(2, 0, 1))
