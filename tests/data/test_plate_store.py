"""A plate reads the same from a folder, a zip file or a URL, at any resolution, with its labels; bombs are refused."""

from __future__ import annotations

import gzip
import http.server
import json
import pickle
import threading
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr
from numcodecs import Blosc, Zstd

from cellvim.data.plate import describe, open_plate
from cellvim.data.plate_store import Location
from cellvim.errors import FieldReadError, PlateError


def zipped(plate: Path, target: Path, *, top: bool = True, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(target, "w", compression) as file:
        for path in sorted(plate.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(plate.parent if top else plate).as_posix())
    return target


@pytest.fixture
def served(tmp_path):
    """Serve tmp_path over HTTP without listings of folders being promised; yield the URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_reads_as_the_folder(make_plate, tmp_path, top, compression):
    path = make_plate()
    plate, other = open_plate(path), open_plate(zipped(path, tmp_path / "p.zip", top=top, compression=compression))
    first, second = describe(plate), describe(other)
    assert {**first, "path": ""} == {**second, "path": ""}
    for field, same in zip(plate.fields, other.fields, strict=True):
        np.testing.assert_array_equal(field.read(["ER", "DNA"]), same.read(["ER", "DNA"]))
    again = pickle.loads(pickle.dumps(other))
    np.testing.assert_array_equal(again.fields[2].read(), plate.fields[2].read())


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_foreign_zip_reads_as_the_folder(make_foreign_plate, tmp_path, version):
    path, data = make_foreign_plate(version, "czyx")
    np.testing.assert_array_equal(open_plate(zipped(path, tmp_path / "f.zip")).fields[0].read(), data[:, 0])


def test_memory_and_http_read_as_the_folder(make_plate, tmp_path, served):
    fsspec = pytest.importorskip("fsspec")
    path = make_plate()
    expected = open_plate(path).fields[3].read()
    memory = fsspec.filesystem("memory")
    for file in path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/bucket/plate.zarr/{file.relative_to(path).as_posix()}", file.read_bytes())
    urls = ["memory://bucket/plate.zarr"]
    try:
        import aiohttp  # noqa: F401

        urls.append(f"{served}/plate.zarr")
    except ImportError:
        pass
    for url in urls:
        plate = open_plate(url)
        assert plate.name == "test" and plate.wells == ["A01", "A02", "B03"] and plate.path == url
        np.testing.assert_array_equal(plate.fields[3].read(), expected)
        np.testing.assert_array_equal(plate.fields[3].read(["RNA"]), expected[2:])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(plate)).fields[3].read(), expected)
    (path / "A/01/1/0/c/0/0/0").unlink()
    if len(urls) > 1:
        with pytest.raises(FieldReadError, match="A01/1"):
            open_plate(urls[1]).fields[0].read()
        with pytest.raises(PlateError, match="cannot be reached"):
            open_plate(f"{served}/nothing.zarr")
    memory.rm("/bucket", recursive=True)


def test_wells_behind_a_url_are_fetched_at_once(make_plate, monkeypatch):
    """One after the other, 384 wells would take 384 round trips."""
    fsspec = pytest.importorskip("fsspec")
    path = make_plate(wells=("A01", "A02", "B03"), sites=("1",))
    memory = fsspec.filesystem("memory")
    for file in path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/wells/plate.zarr/{file.relative_to(path).as_posix()}", file.read_bytes())
    memory.rm("/wells/plate.zarr/A/02/zarr.json")
    asked: list[str] = []
    together, alone = type(memory).cat_ranges, type(memory).cat_file

    def cat_ranges(self, paths, *args, **options):
        asked.append(f"{len(paths)} at once")
        return together(self, paths, *args, **options)

    def cat_file(self, path, *args, **options):
        asked.append(path)
        return alone(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "cat_ranges", cat_ranges)
    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    plate = open_plate("memory://wells/plate.zarr")
    assert plate.wells == ["A01", "A02", "B03"] and [f.name for f in plate.fields] == ["A01/1", "B03/1"]
    assert "3 at once" in asked
    one_by_one = asked[
        asked.index("3 at once") + 1 + 3 :
    ]  # after the memory file system's own implementation of cat_ranges
    assert not [p for p in one_by_one if p.endswith(("A/01/zarr.json", "B/03/zarr.json"))]
    memory.rm("/wells", recursive=True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/plate.zarr", "nonsense://x/plate.zarr", "file:///no/such.zarr"])
def test_url_that_cannot_be_opened_is_named(url):
    with pytest.raises(PlateError, match="://") as caught:
        open_plate(url)
    assert "\n" not in str(caught.value)


def test_broken_and_empty_zip_are_refused(tmp_path, make_plate):
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(PlateError, match="zip file"):
        open_plate(tmp_path / "broken.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(PlateError, match="neither zarr"):
        open_plate(tmp_path / "empty.zip")
    cut = zipped(make_plate(), tmp_path / "cut.zip", compression=zipfile.ZIP_DEFLATED)
    content = bytearray(cut.read_bytes())
    for i in range(200, 20_000, 37):
        content[i] ^= 0x55
    cut.write_bytes(content)
    with pytest.raises((PlateError, FieldReadError)):
        for field in open_plate(cut).fields:
            field.read()


def image_with_levels(path: Path, *, labels: np.ndarray | None = None) -> np.ndarray:
    """Write a plain image of two resolutions, and a label image of the coarser one's size."""
    data = np.random.default_rng(0).integers(1, 999, (2, 40, 60)).astype("uint16")
    root = zarr.open_group(str(path), mode="w", zarr_format=3)
    axes = [
        {"name": n, "type": "space" if n in "yx" else "channel", **({"unit": "micrometer"} if n in "yx" else {})}
        for n in "cyx"
    ]

    def datasets(sizes):
        return [
            {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": [1.0, s, s]}]}
            for i, s in enumerate(sizes)
        ]

    root.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": datasets([0.5, 1.0])}],
        "omero": {"channels": [{"label": "DNA"}, {"label": "ER"}]},
    }
    root.create_array("0", data=data)
    root.create_array("1", data=data[:, ::2, ::2].copy())
    if labels is not None:
        group = root.create_group("labels")
        group.attrs["ome"] = {"version": "0.5", "labels": ["nuclei"]}
        one = group.create_group("nuclei")
        one.attrs["ome"] = {
            "version": "0.5",
            "multiscales": [
                {
                    "axes": axes[1:],
                    "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0]}]}],
                }
            ],
            "image-label": {},
        }
        one.create_array("0", data=labels)
    return data


def test_resolution_can_be_chosen(tmp_path):
    data = image_with_levels(tmp_path / "i.zarr")
    for level, pixel in ((0, 0.5), (1, 1.0)):
        plate = open_plate(tmp_path / "i.zarr", level=level)
        assert plate.pixel_size_um == pixel
        np.testing.assert_array_equal(plate.fields[0].read(), data[:, :: level + 1, :: level + 1])
    with pytest.raises(FieldReadError, match="does not have level=2; it has level = 0 to 1"):
        open_plate(tmp_path / "i.zarr", level=2).fields[0].read()
    with pytest.raises(PlateError, match="level=-1"):
        open_plate(tmp_path / "i.zarr", level=-1)


def test_labels_have_the_size_of_the_image(tmp_path):
    labels = np.arange(600, dtype="int32").reshape(20, 30)
    image_with_levels(tmp_path / "i.zarr", labels=labels)
    field = open_plate(tmp_path / "i.zarr").fields[0]
    assert field.label_names == ["nuclei"]
    np.testing.assert_array_equal(field.read_labels("nuclei"), labels.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(open_plate(tmp_path / "i.zarr", level=1).fields[0].read_labels("nuclei"), labels)
    with pytest.raises(FieldReadError, match="no label image 'cells'; it has nuclei"):
        field.read_labels("cells")


def test_labels_of_real_plates_are_read(shared_data):
    folder = shared_data / "omezarr_foreign"
    name = "20200812-CardiomyocyteDifferentiation14-Cycle1_B_03_mip.zarr"
    field = open_plate(folder / name, level=1).fields[0]
    labels = field.read_labels(field.label_names[0])
    assert labels.shape == field.shape[1:] and labels.max() > 100
    # nuclei are where DAPI is bright: the labels are not shifted or turned
    dapi = field.read(["DAPI"])[0]
    assert dapi[labels > 0].mean() > 3 * dapi[labels == 0].mean()


def bomb(kind: str, size: int) -> bytes:
    zeros = bytes(size)
    if kind == "gzip":
        return gzip.compress(zeros)
    if kind == "zlib":
        return zlib.compress(zeros)
    if kind == "zstd":
        return Zstd().encode(zeros)
    if kind == "zstd without its size":  # RFC 8878: no content size, a window of 1 MB, then blocks of one byte repeated
        block = (128 << 10) << 3 | 1 << 1
        blocks = [(block | (i + 1 == size >> 17)).to_bytes(3, "little") + b"\0" for i in range(size >> 17)]
        return b"\x28\xb5\x2f\xfd\x00\x50" + b"".join(blocks)
    return bytes(Blosc().encode(zeros))


@pytest.mark.parametrize("kind", ["gzip", "zlib", "zstd", "zstd without its size", "blosc"])
@pytest.mark.parametrize("where", ["folder", "zip"])
def test_chunk_that_would_fill_memory_is_refused(make_foreign_plate, tmp_path, kind, where):
    path, data = make_foreign_plate("0.4", "cyx")
    array = path / "C/7/0/0"
    document = json.loads((array / ".zarray").read_text())
    codec = kind.split()[0]
    document["compressor"] = {"id": codec, **({"cname": "lz4", "clevel": 5, "shuffle": 1} if kind == "blosc" else {})}
    (array / ".zarray").write_text(json.dumps(document))
    for size in (16 << 20, 2 * 8 * 8 * 2) if kind != "zstd without its size" else (16 << 20, 0):
        content = bomb(kind, size) if size else Zstd().encode(bytes(2 * 8 * 8 * 2))
        for chunk in array.glob("[0-9]*"):
            chunk.write_bytes(content)
        field = open_plate(path if where == "folder" else zipped(path, tmp_path / f"{size}.zip")).fields[0]
        if size == 16 << 20:
            with pytest.raises(FieldReadError, match="would decompress to"):
                field.read()
        else:  # it is the size, not the codec, that was refused
            assert field.read().shape == data.shape


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_chunk_that_is_a_link_out_of_the_plate_is_refused(make_foreign_plate, tmp_path, version):
    path, _ = make_foreign_plate(version, "cyx")
    array = path / "C/7/0/0"
    chunk = array / ("0.0.0" if version == "0.4" else "c/0/0/0")
    chunk.rename(tmp_path / "secret")
    chunk.symlink_to(tmp_path / "secret")
    for file in (array / ".zarray", array / "zarr.json"):  # once as it is, once with a codec that Zarr decodes
        if file.exists():
            with pytest.raises(FieldReadError, match=r"link to .*secret, outside of the plate"):
                open_plate(path).fields[0].read()
            document = json.loads(file.read_text())
            if version == "0.4":
                document["compressor"] = {"id": "gzip", "level": 1}
            else:
                document["codecs"][-1] = {"name": "gzip", "configuration": {"level": 1}}
            file.write_text(json.dumps(document))
            with pytest.raises(FieldReadError, match=r"link to .*secret, outside of the plate"):
                open_plate(path).fields[0].read()


def test_bomb_in_a_shard_is_refused(make_plate):
    path = make_plate(wells=("A01",), sites=("1",))
    file = path / "A/01/1/0/c/0/0/0"
    content = file.read_bytes()
    evil = bomb("zstd", 64 << 20)
    table = np.frombuffer(content[-(16 * 3 + 4) : -4], "<u8").reshape(3, 2).copy()
    table[1] = [len(content) - 16 * 3 - 4, len(evil)]
    import google_crc32c

    index = table.tobytes()
    file.write_bytes(content[: -(16 * 3 + 4)] + evil + index + google_crc32c.value(index).to_bytes(4, "little"))
    for channels in (None, ["ER"]):
        with pytest.raises(FieldReadError, match="would decompress to"):
            open_plate(path).fields[0].read(channels)
    assert open_plate(path).fields[0].read(["DNA"]).any()


def test_declared_size_is_compared_with_the_stored_size(make_plate):
    path = make_plate(wells=("A01",), sites=("1",))
    file = path / "A/01/1/0/zarr.json"
    document = json.loads(file.read_text())
    document["shape"] = [3, 20_000, 20_000]
    file.write_text(json.dumps(document))
    with pytest.raises(FieldReadError, match=r"declares 2,400,000,000 bytes of pixels and stores"):
        open_plate(path).fields[0].read()
    document["shape"] = [3, 23, 31]
    document["chunk_grid"]["configuration"]["chunk_shape"] = [3, 100_000, 100_000]
    file.write_text(json.dumps(document))
    with pytest.raises(FieldReadError):
        open_plate(path).fields[0].read()


def test_invalid_ome_zarr_metadata_is_reported(make_plate):
    path = make_plate()
    assert not any("not valid OME-Zarr" in odd for odd in open_plate(path).oddities())
    document = json.loads((path / "zarr.json").read_text())
    del document["attributes"]["ome"]["plate"]["columns"]
    (path / "zarr.json").write_text(json.dumps(document))
    assert any("metadata of the plate is not valid OME-Zarr 0.5" in odd for odd in open_plate(path).oddities())


class _Answers(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


@pytest.mark.parametrize(
    "error", [PermissionError("no ListBucket"), NotImplementedError(), FileNotFoundError(), _Answers(403)]
)
def test_server_that_cannot_list_may_hold_the_chunks(error):
    place = Location(_Failing(error), "bucket/plate.zarr", "s3://bucket/plate.zarr")
    assert place.folders() == [] and place.stored_bytes() == 1


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionResetError("gone"), _Answers(503), KeyError("odd")])
def test_failed_listing_is_not_an_empty_folder(error):
    place = Location(_Failing(error), "bucket/plate.zarr", "s3://bucket/plate.zarr")
    for listed in (place.folders, place.stored_bytes):
        with pytest.raises(PlateError, match=r"s3://bucket/plate\.zarr cannot be listed"):
            listed()


@pytest.mark.parametrize("error", [NotImplementedError(), TypeError("on_error"), OSError("reset")])
def test_files_that_cannot_be_fetched_at_once_are_read_one_by_one(error):
    place = Location(_Failing(error), "bucket/plate.zarr", "s3://bucket/plate.zarr")
    place.prefetch(["zarr.json"])
    assert place.read("zarr.json") == b"{}"


def test_a_bug_in_fetching_is_not_hidden():
    with pytest.raises(AttributeError):
        Location(_Failing(AttributeError("bug")), "p", "s3://p").prefetch(["zarr.json"])


class _Failing:
    """A filesystem that reads single files and fails at all else."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def cat_file(self, path: str, **_: object) -> bytes:
        return b"{}"

    def fail(self, *_: object, **__: object) -> None:
        raise self.error

    ls = find = cat_ranges = fail
