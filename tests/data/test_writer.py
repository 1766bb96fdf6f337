"""A written plate is valid OME-Zarr 0.5, and is written atomically."""

from __future__ import annotations

import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaozarrs
import zarr

from cellvim.data.plate import open_plate
from cellvim.data.plate_writer import PlateWriter
from cellvim.errors import OutputError

IMAGE = np.arange(2 * 9 * 7, dtype="uint16").reshape(2, 9, 7)


def write(target, image=IMAGE, **options):
    with PlateWriter(target, name="p", channel_names=["DNA", "ER"], **options) as writer:
        writer.write_field("A1", "1", image)
        writer.finish()


def test_plate_is_valid_and_sharded(make_plate):
    path = make_plate(size=(64, 48))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yaozarrs.validate_zarr_store(str(path))
    array = zarr.open_array(str(path / "A/01/1/0"), mode="r")
    assert array.metadata.zarr_format == 3
    assert array.shards == (3, 64, 48) and array.chunks == (1, 64, 48)
    assert "zstd" in json.dumps(array.metadata.to_dict()["codecs"][0]["configuration"]["codecs"])
    image = json.loads((path / "A/01/1/zarr.json").read_text())["attributes"]["ome"]
    assert [a["name"] for a in image["multiscales"][0]["axes"]] == ["c", "y", "x"]
    assert [a.get("unit") for a in image["multiscales"][0]["axes"]] == [None, "micrometer", "micrometer"]
    for channel in image["omero"]["channels"]:
        window = channel["window"]
        assert window["min"] <= window["start"] < window["end"] <= window["max"]


def test_no_unit_when_the_pixel_size_is_unknown(make_plate):
    path = make_plate(pixel_size_um=None)
    axes = json.loads((path / "A/01/1/zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]["axes"]
    assert all("unit" not in a for a in axes)
    assert open_plate(path).pixel_size_um is None


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    target = tmp_path / "p.zarr"
    with PlateWriter(target, name="p", channel_names=["DNA", "ER"]) as writer:
        writer.write_field("A1", "1", IMAGE)
        assert not target.exists() and (tmp_path / "p.zarr.partial").is_dir()
        writer.finish()
        assert target.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["p.zarr"]


def test_failure_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError),
        PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA", "ER"]) as writer,
    ):
        writer.write_field("A1", "1", IMAGE)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_partial_plate_of_a_killed_run_is_replaced(tmp_path):
    (tmp_path / "p.zarr.partial" / "A").mkdir(parents=True)
    write(tmp_path / "p.zarr")
    assert open_plate(tmp_path / "p.zarr").wells == ["A01"]


def test_existing_plate_is_kept_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "p.zarr"
    write(target)
    with pytest.raises(OutputError, match=r"exists already; .*--overwrite"):
        write(target)
    with (
        pytest.raises(RuntimeError),
        PlateWriter(target, name="p", channel_names=["DNA", "ER"], overwrite=True),
    ):
        raise RuntimeError
    assert (open_plate(target).fields[0].read() == IMAGE).all()
    write(target, IMAGE + 1, overwrite=True)
    assert (open_plate(target).fields[0].read() == IMAGE + 1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["p.zarr"]


def test_overwrite_never_replaces_anything_but_a_plate(tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    link = tmp_path / "link.zarr"
    write(tmp_path / "p.zarr")
    link.symlink_to(tmp_path / "p.zarr")
    for target in (precious, precious / "thesis.tex", link):
        with pytest.raises(OutputError, match="replaces plates only"):
            write(target, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "x"
    for name in (".", ".."):
        with pytest.raises(OutputError, match="plate's name"):
            write(name, overwrite=True)


def test_unwritable_folder_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "file" / "p.zarr")


def test_fields_may_be_written_from_several_threads(tmp_path):
    barrier = threading.Barrier(4)
    wells = [f"{row}{column}" for row in "ABCD" for column in range(1, 5)]

    def one(item):
        i, well = item
        if i < 4:
            barrier.wait(timeout=10)
        writer.write_field(well, "1", IMAGE + i)

    with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA", "ER"]) as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, enumerate(wells)))
        writer.finish()
    for i, field in enumerate(open_plate(tmp_path / "p.zarr").fields):
        np.testing.assert_array_equal(field.read(), IMAGE + i)


@pytest.mark.parametrize(
    ("well", "site", "image"),
    [("A1", "1", IMAGE[0]), ("A1", "1", IMAGE[:1]), ("A1", "1", IMAGE[:, :0]), ("A1", "1/2", IMAGE), ("A1", "", IMAGE)],
)
def test_invalid_fields_are_refused(tmp_path, well, site, image):
    with (
        pytest.raises(ValueError),
        PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA", "ER"]) as writer,
    ):
        writer.write_field(well, site, image)
