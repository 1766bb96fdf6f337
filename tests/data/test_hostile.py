"""Over a thousand damaged inputs: each is read, or refused in one line, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from cellvim.data.cells import measure_cells, measure_quality, open_cells
from cellvim.data.centroids import read_centroids
from cellvim.data.crops import CropSpec, stream_crops
from cellvim.data.importers import import_plate, make_import_plan
from cellvim.data.intensity import estimate_intensity_scale
from cellvim.data.plate import describe, open_plate
from cellvim.data.platemap import join_perturbations, read_platemap
from cellvim.data.segmentation import segment_nuclei
from cellvim.errors import CellvimError

SECONDS, MEGABYTES = 5.0, 300
JUNK = [
    *[
        None,
        True,
        False,
        -1,
        0,
        1,
        2**31,
        2**63,
        10**30,
        1.5,
        -1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "0",
        "é\x00",
    ],
    *[
        "../..",
        "/etc/passwd",
        "A/1",
        "..\\..",
        "C:\\x",
        [],
        {},
        [[]],
        [None],
        {"name": None},
        ["t"] * 9,
        "9" * 400,
        [2**40] * 3,
    ],
]


def spoil(node, rng):
    """Replace, delete, repeat or swap one random part of a JSON document."""
    if isinstance(node, dict) and node and rng.random() < 0.92:
        key = list(node)[rng.integers(len(node))]
        if rng.random() < 0.12:
            return {k: v for k, v in node.items() if k != key}
        return {**node, key: spoil(node[key], rng)}
    if isinstance(node, list) and node and rng.random() < 0.9:
        i = int(rng.integers(len(node)))
        kind = rng.random()
        if kind < 0.1:
            return [*node, node[i]]
        if kind < 0.2:
            return node[:i]
        return [spoil(v, rng) if j == i else v for j, v in enumerate(node)]
    return JUNK[rng.integers(len(JUNK))]


def scramble(content: bytes, rng) -> bytes:
    """Cut short, flip bits, overwrite, repeat or replace bytes."""
    kind = rng.integers(6)
    data = bytearray(content)
    if kind == 0 or not data:
        return bytes(data[: rng.integers(len(data) + 1)])
    if kind == 1:
        for place in rng.integers(0, len(data), 1 + int(rng.integers(8))):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        start = int(rng.integers(len(data)))
        data[start : start + 64] = rng.bytes(min(64, len(data) - start))
    elif kind == 3:
        start = int(rng.integers(len(data)))
        data[start:start] = data[max(0, start - 100) : start]
    elif kind == 4:
        data = bytearray(rng.bytes(int(rng.integers(1, 400))))
    else:
        start = int(rng.integers(len(data)))
        data[start : start + 8] = b"\xff" * 8
    return bytes(data)


class Ledger:
    """Runs cases and counts the outcomes; fails on anything but a result or a CellvimError."""

    def __init__(self) -> None:
        self.cases, self.refused, self.slowest, self.largest = 0, 0, 0.0, 0.0

    def run(self, name: str, work) -> None:
        self.cases += 1
        tracemalloc.reset_peak()
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work()
        except CellvimError as error:
            self.refused += 1
            assert str(error) and "\n" not in str(error), f"{name}: {error!r}"
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__} escaped: {error}") from error
        self.slowest = max(self.slowest, time.process_time() - start)
        self.largest = max(self.largest, tracemalloc.get_traced_memory()[1] / 1e6)
        assert self.slowest < SECONDS, f"{name} took {self.slowest:.1f} s"
        assert self.largest < MEGABYTES, f"{name} took {self.largest:.0f} MB"


@pytest.fixture(scope="module")
def shared_warm_up():
    """Import lazily imported modules, so that no case is charged for them."""
    image = np.random.default_rng(0).random((64, 64))
    measure_quality(segment_nuclei(image, 0.6), image[None], ["DNA"])
    from cellvim.data.cells import discs

    discs(np.array([[5.0, 5.0]]), (20, 20), 5)


@pytest.fixture
def ledger(shared_warm_up):
    tracemalloc.start()
    yield Ledger()
    tracemalloc.stop()


def look_at(path: Path) -> None:
    """Do with a plate what a user does; errors of single fields do not stop it."""
    plate = open_plate(path)
    json.dumps(describe(plate))
    for field in plate.fields[:4]:
        try:
            assert field.read().ndim == 3
            for name in field.label_names[:2]:
                field.read_labels(name)
        except CellvimError as error:
            assert "\n" not in str(error)
    scale = estimate_intensity_scale(plate, plate.channel_names[:2], max_fields=2)
    for one in stream_crops(plate.fields[:2], plate.channel_names[:2], CropSpec("tile", 8), scale=scale, workers=1):
        assert one.failed is not None or one.crops.isfinite().all()


@pytest.mark.parametrize("cases", [40, pytest.param(160, marks=pytest.mark.slow)])
def test_spoiled_plates(make_plate, make_foreign_plate, ledger, cases):
    rng = np.random.default_rng(2026)
    table = pd.DataFrame({"d": [1, 2]}, index=["A01", "B03"])
    ours = make_plate(wells=("A01", "B03"), sites=("1",), size=(12, 14), well_metadata=table)
    foreign, _ = make_foreign_plate("0.4", "tczyx")
    for path, files in (
        (ours, ["zarr.json", "A/01/zarr.json", "A/01/1/zarr.json", "A/01/1/0/zarr.json"]),
        (foreign, [".zattrs", "C/7/.zattrs", "C/7/0/.zattrs", "C/7/0/0/.zarray"]),
    ):
        whole = {f: (path / f).read_bytes() for f in files}
        for case in range(cases):
            file = files[case % len(files)]
            if case % 5 == 4:
                content = scramble(whole[file], rng)
            else:
                document = json.loads(whole[file])
                for _ in range(1 + case % 3):
                    document = spoil(document, rng)
                content = json.dumps(document).encode()
            (path / file).write_bytes(content)
            ledger.run(f"{path.name} {file} case {case}", lambda path=path: look_at(path))
            (path / file).write_bytes(whole[file])
    assert ledger.cases == 2 * cases and ledger.refused > cases / 3


def test_spoiled_chunks(make_plate, make_foreign_plate, ledger):
    rng = np.random.default_rng(7)
    ours = make_plate(wells=("A01",), sites=("1",), size=(12, 14))
    foreign, _ = make_foreign_plate("0.4", "cyx")
    for path, file in ((ours, "A/01/1/0/c/0/0/0"), (foreign, "C/7/0/0/0.0.0")):
        whole = (path / file).read_bytes()
        for case in range(100):
            (path / file).write_bytes(scramble(whole, rng))

            def read(path=path) -> None:
                assert open_plate(path).fields[0].read().ndim == 3

            ledger.run(f"{path.name} chunk case {case}", read)
        (path / file).write_bytes(whole)
    assert ledger.cases == 200 and ledger.refused > 60


def test_spoiled_zip_files(make_plate, tmp_path, ledger):
    rng = np.random.default_rng(11)
    path = make_plate(wells=("A01",), sites=("1",), size=(12, 14))
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for one in sorted(path.rglob("*")):
            if one.is_file():
                file.write(one, one.relative_to(path).as_posix())
    whole = (tmp_path / "p.zip").read_bytes()
    for case in range(80):
        (tmp_path / "p.zip").write_bytes(scramble(whole, rng))
        ledger.run(f"zip case {case}", lambda: look_at(tmp_path / "p.zip"))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zarr.json", b" " * (200 << 20))
    ledger.run("zip bomb", lambda: look_at(tmp_path / "bomb.zip"))
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as file:
        file.writestr("../zarr.json", b"{}")
        file.writestr("/zarr.json", b"{}")
    ledger.run("zip with paths that lead out", lambda: look_at(tmp_path / "out.zip"))
    assert ledger.refused > 20


TABLES = {
    "map.csv": "Well,drug,dose\nA01,DMSO,0\nB03,x,1.5\n",
    "map.tsv": "well_position\tbroad_sample\nA01\tBRD-1\nB03\t\n",
    "cells.csv": "Well,Site,ObjectNumber,Location_Center_X,Location_Center_Y\nA01,1,1,3.5,4.5\nB03,1,2,5,6\n",
}


def test_spoiled_tables(make_plate, tmp_path, ledger):
    rng = np.random.default_rng(13)
    plate = open_plate(make_plate(wells=("A01", "B03"), sites=("1",), size=(12, 14)))
    image = plate.fields[0].read()
    (tmp_path / "compounds.csv").write_text("drug,pert_type\nDMSO,negcon\nx,trt\n")
    for name, text in TABLES.items():
        path = tmp_path / name
        for case in range(60):
            path.write_bytes(scramble(text.encode(), rng))
            if name == "cells.csv":
                ledger.run(
                    f"{name} case {case}",
                    lambda path=path: open_cells(path, plate).find(plate.fields[0], image, plate.channel_names),
                )
            else:

                def read(path=path) -> None:
                    table, _ = read_platemap(path)
                    join_perturbations(table, tmp_path / "compounds.csv", source=path.name)

                ledger.run(f"{name} case {case}", read)
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        pd.DataFrame({"ImageNumber": [1], "Nuclei_Location_Center_X": [1.0], "Nuclei_Location_Center_Y": [2.0]}).to_sql(
            "Nuclei", connection, index=False
        )
    connection.close()
    whole = (tmp_path / "c.sqlite").read_bytes()
    for case in range(40):
        (tmp_path / "c.sqlite").write_bytes(scramble(whole, rng))
        ledger.run(f"sqlite case {case}", lambda: read_centroids(tmp_path / "c.sqlite"))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"Well,x" + b"," * (100 << 20)))
    ledger.run("gzip bomb", lambda: read_platemap(tmp_path / "b.csv.gz"))


def test_spoiled_sources_of_an_import(tmp_path, make_tiffs, shared_data, ledger):
    rng = np.random.default_rng(17)
    folder = make_tiffs(["A01_f1_DNA.tif", "A01_f1_ER.tif"])
    whole = (folder / "A01_f1_ER.tif").read_bytes()
    for case in range(120):
        (folder / "A01_f1_ER.tif").write_bytes(scramble(whole, rng))
        ledger.run(f"tiff case {case}", lambda: import_plate(folder, tmp_path / "p.zarr", overwrite=True, verify=1))
        assert not (tmp_path / "p.zarr.partial").exists()
    export = tmp_path / "operetta"
    shutil.copytree(shared_data / "operetta_export" / "Images", export)
    index = export / "Index.idx.xml"
    whole = index.read_bytes()
    for case in range(60):
        index.write_bytes(scramble(whole, rng))
        ledger.run(f"index case {case}", lambda: make_import_plan(export))
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {chr(98 + i)} "{"&" + chr(97 + i) + ";" * 1}{("&" + chr(97 + i) + ";") * 9}">' for i in range(9)
    )
    index.write_text(f'<?xml version="1.0"?>{bomb}]><EvaluationInputData>&j;</EvaluationInputData>')
    ledger.run("entity bomb", lambda: make_import_plan(export))
    index.write_text('<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><E>&e;</E>')
    ledger.run("external entity", lambda: make_import_plan(export))
    assert ledger.refused > 80


ODD_IMAGES = {
    "nan": np.full((2, 30, 40), np.nan, "float32"),
    "inf": np.full((2, 30, 40), np.inf, "float32"),
    "negative": np.linspace(-1e6, 5, 2400).reshape(2, 30, 40),
    "huge": np.full((2, 30, 40), 1e300),
    "some nan": np.where(np.random.default_rng(0).random((2, 30, 40)) < 0.3, np.nan, 5.0),
    "int64": np.full((2, 30, 40), -(2**62), "int64"),
    "bool": np.random.default_rng(0).random((2, 30, 40)) < 0.5,
    "one pixel": np.ones((2, 1, 1), "uint16"),
    "one row": np.ones((2, 1, 999), "uint16"),
    "full": np.full((2, 30, 40), 65535, "uint16"),
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_pixels_end_in_finite_crops(name, tmp_path, ledger):
    from cellvim.data.plate_writer import PlateWriter

    image = ODD_IMAGES[name]

    def work() -> None:
        with PlateWriter(tmp_path / "p.zarr", name="p", channel_names=["DNA", "ER"], pixel_size_um=0.6) as writer:
            writer.write_field("A1", "1", image)
            writer.finish(verify=1)
        look_at(tmp_path / "p.zarr")
        plate = open_plate(tmp_path / "p.zarr")
        scale = estimate_intensity_scale(plate, ["DNA", "ER"])
        for unit, size in (("tile", 16), ("field", None), ("cell", 16)):
            cells = open_cells("nuclei", plate) if unit == "cell" else None
            for one in stream_crops(plate.fields, ["DNA", "ER"], CropSpec(unit, size), scale=scale, cells=cells):
                assert one.failed is None and bool(one.crops.isfinite().all())
        labels = segment_nuclei(image[0], 0.6)
        measure_cells(labels, image, ["DNA", "ER"])
        measure_quality(labels, image, ["DNA", "ER"])

    work()


def test_zero_sized_images_are_refused(tmp_path):
    path = tmp_path / "A01_f1_DNA.tif"
    tifffile.imwrite(path, np.zeros((1, 1), "uint8"))
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].tags["ImageWidth"].valueoffset
    content[offset : offset + 2] = b"\x00\x00"
    path.write_bytes(content)
    with pytest.raises(CellvimError):
        import_plate(tmp_path, tmp_path / "p.zarr")
