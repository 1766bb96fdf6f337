"""ImageXpress, LoadData, OME-TIFF, stacks and single cells are imported unchanged; a killed import resumes."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import tifffile

from cellvim.data.importers import import_plate, make_import_plan
from cellvim.data.plate_writer import JOURNAL, PlateWriter
from cellvim.errors import CellvimError, InputError, OutputError, PlateError


def pixels(path, source):
    return tifffile.imread(source / path)


HTD = (
    '"HTSInfoFile", Version 1.0\n"Description", "My plate"\n"Waves", TRUE\n"NWavelengths", 2\n'
    '"WaveName1", "DAPI"\n"WaveName2", "{}"\n"EndFile"\n'
)


def imagexpress(make_tiffs, second="FITC", names=None):
    names = names or [f"TimePoint_1/P_{w}_s{s}_w{c}.tif" for w in ("A01", "B12") for s in (1, 2) for c in (1, 2)]
    folder = make_tiffs(names)
    (folder / "P.HTD").write_text(HTD.format(second))
    return folder


def test_imagexpress_takes_wavelengths_from_the_htd(tmp_path, make_tiffs):
    folder = imagexpress(make_tiffs)
    thumb = folder / "TimePoint_1" / "P_A01_s1_w1_thumb0AB1C2D3-0000-1111-2222-333344445555.tif"
    tifffile.imwrite(thumb, np.zeros((4, 4), "uint8"))
    plate = import_plate(folder, tmp_path / "p.zarr")
    assert plate.channel_names == ["DAPI", "FITC"] and plate.name == "P"
    assert [f.name for f in plate.fields] == ["A01/1", "A01/2", "B12/1", "B12/2"]
    np.testing.assert_array_equal(plate.fields[3].read(["FITC"])[0], pixels("TimePoint_1/P_B12_s2_w2.tif", folder))
    assert make_import_plan(imagexpress(make_tiffs, "DAPI")).channel_names == {}  # two alike: they keep w1 and w2


def test_imagexpress_names_with_a_guid_and_rows_beyond_z(tmp_path, make_tiffs):
    guid = "0AB1C2D3-0000-1111-2222-33334444555"
    names = [f"TimePoint_1/Plate_7_{w}_s1_w{c}{guid}{c}.TIF" for w in ("A01", "AF48") for c in (1, 2)]
    folder = imagexpress(make_tiffs, names=names)
    (folder / "P.HTD").rename(folder / "TimePoint_1/Plate_7.htd")
    plan = make_import_plan(folder)
    assert list(plan.fields) == [("A01", "1"), ("AF48", "1")] and plan.channel_names == {"w1": "DAPI", "w2": "FITC"}
    assert plan.plate_name == "Plate_7"
    folder = make_tiffs([f"X_A01_s1_[{guid}1].tif", f"X_B02_s1_[{guid}2].tif"], folder="bracketed")
    (folder / "X.HTD").write_text(HTD.format("FITC"))
    assert list(make_import_plan(folder).fields) == [("A01", "1"), ("B02", "1")]


METASERIES = (
    "<MetaData><PlaneInfo>"
    '<prop id="spatial-calibration-state" type="bool" value="on"/>'
    '<prop id="spatial-calibration-x" type="float" value="0.7032"/>'
    '<prop id="spatial-calibration-units" type="string" value="um"/>'
    '<custom-prop id="_IllumSetting_" type="string" value="{}"/>'
    "</PlaneInfo></MetaData>"
)


def test_imagexpress_without_its_htd_as_in_jump(tmp_path):
    """JUMP's source_8: the plate folder alone, with thumbnails; the TIFFs themselves name the wavelengths."""
    for well in ("A01", "A02"):
        for wave, name in enumerate(("Cy5", "DAPI"), start=1):
            for kind, size in (("", 12), ("_thumb", 3)):
                path = tmp_path / f"HTS_{well}_s1_w{wave}{kind}0AB1C2D3-0000-1111-2222-333344445555.tif"
                image = np.full((size, size), 10 * wave, "uint16")
                tifffile.imwrite(path, image, description=METASERIES.format(name), software="MetaSeries", metadata=None)
    plate = import_plate(tmp_path, tmp_path.parent / "source_8.zarr")
    assert plate.channel_names == ["Cy5", "DAPI"] and plate.pixel_size_um == 0.7032 and plate.name == "source_8"
    assert plate.fields[1].read(["DAPI"]).tolist() == np.full((1, 12, 12), 20).tolist()
    plan = make_import_plan(tmp_path, format="tiff")  # thumbnails are left out of a folder of TIFFs as well
    assert list(plan.fields) == [("A01", "1"), ("A02", "1")] and plan.channel_keys == ["w1", "w2"]


def test_imagexpress_stacks_and_single_files(tmp_path, make_tiffs):
    names = [f"ZStep_{z}/P_A01_w{c}.tif" for z in (0, 1, 2) for c in (1, 2)]
    folder = imagexpress(make_tiffs, names=names)
    with pytest.raises(PlateError, match=r"has 2 z planes.*Choose one with --z 0 to 1 or --z max"):
        import_plate(folder, tmp_path / "p.zarr")
    plate = import_plate(folder, tmp_path / "p.zarr", z="max")
    expected = np.maximum(pixels("ZStep_1/P_A01_w2.tif", folder), pixels("ZStep_2/P_A01_w2.tif", folder))
    np.testing.assert_array_equal(plate.fields[0].read()[1], expected)
    assert make_import_plan(folder, z=1).fields[("A01", "1")]["w1"].parent.name == "ZStep_2"
    with pytest.raises(InputError, match="--z is 2; well A01 site 1"):
        make_import_plan(folder, z=2)
    (folder / "P.HTD").write_text("nonsense")
    with pytest.raises(PlateError, match="not an HTD file"):
        make_import_plan(folder)


def load_data(folder, *, wells=("A01", "P24"), missing=(), channels=("OrigDNA", "OrigER"), **extra):
    rows = []
    for well in wells:
        row = {
            "Metadata_Source": "source_4",
            "Metadata_Batch": "B1",
            "Metadata_Plate": "BR1",
            "Metadata_Well": well,
            "Metadata_Site": "3",
        }
        for i, channel in enumerate(channels):
            row[f"FileName_{channel}"] = f"{well}-ch{i + 1}.tiff"
            row[f"PathName_{channel}"] = "/home/ubuntu/bucket/projects/images/BR1/Images"
            row[f"FileName_Illum{channel[4:]}"] = "illum.npy"
        rows.append(row | extra)
        for i, channel in enumerate(channels):
            if (well, channel) not in missing:
                path = folder / "BR1" / "Images" / f"{well}-ch{i + 1}.tiff"
                path.parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(path, np.full((9, 11), 100 * i + len(rows), "uint16"))
    table = pd.DataFrame(rows)
    table.to_csv(folder / "load_data.csv", index=False)
    return folder


@pytest.mark.parametrize("how", ["folder", "csv", "gz", "elsewhere", "parquet", "parquet itself"])
def test_load_data_lists_the_channels(tmp_path, how):
    folder = load_data(tmp_path / "images", channels=("OrigER", "OrigDNA"))
    source, given = folder, None
    if how == "csv":
        source = folder / "load_data.csv"
    if how in ("gz", "elsewhere"):
        name = "load_data.csv.gz" if how == "gz" else "other.csv"
        given = (folder if how == "gz" else tmp_path) / name
        content = (folder / "load_data.csv").read_bytes()
        given.write_bytes(gzip.compress(content) if how == "gz" else content)
        (folder / "load_data.csv").unlink()
        given = None if how == "gz" else given
    if how.startswith("parquet"):  # as cpg0016 has it, with other columns and types
        pytest.importorskip("pyarrow")
        table = pd.read_csv(folder / "load_data.csv").assign(Metadata_Site=3, Count_Nuclei=1.5)
        table.to_parquet(folder / "load_data_with_illum.parquet")
        (folder / "load_data.csv").unlink()
        source = folder if how == "parquet" else folder / "load_data_with_illum.parquet"
    plate = import_plate(source, tmp_path / "p.zarr", load_data=given)
    assert plate.name == "BR1" and sorted(plate.channel_names) == ["DNA", "ER"]
    assert [f.name for f in plate.fields] == ["A01/3", "P24/3"]
    assert plate.fields[1].read(["DNA"]).max() == 102 and plate.fields[1].read(["ER"]).max() == 2
    assert plate.well_metadata.loc["P24", ["Metadata_Source", "Metadata_Batch"]].tolist() == ["source_4", "B1"]


def test_load_data_reports_missing_files(tmp_path):
    folder = load_data(tmp_path / "a", missing=[("P24", "OrigDNA"), ("P24", "OrigER")])
    notes = "\n".join(make_import_plan(folder).notes)
    assert "1 sites of load_data.csv have no files and were left out: P24/3" in notes
    folder = load_data(tmp_path / "b", missing=[("P24", "OrigDNA")])
    with pytest.raises(PlateError, match="well P24 site 3 OrigDNA"):
        make_import_plan(folder)
    folder = load_data(tmp_path / "c", missing=[(w, "OrigER") for w in ("A01", "P24")])
    plan = make_import_plan(folder)
    assert plan.channel_keys == ["OrigDNA"] and "channels that have no files: OrigER" in plan.notes[-1]
    (tmp_path / "c/load_data.csv").write_text("a,b\n1,2\n")
    with pytest.raises(PlateError, match="no FileName_ columns"):
        make_import_plan(folder)
    with pytest.raises(InputError, match="not a LoadData CSV"):
        make_import_plan(tmp_path, format="load_data")


def test_files_of_one_name_are_distinguished_by_their_folders_and_nothing_outside_is_read(tmp_path):
    folder = load_data(tmp_path / "images", wells=("A01",))
    shutil.copytree(folder / "BR1", folder / "BR2")
    outside = tmp_path / "secret" / "Images"
    shutil.copytree(folder / "BR1" / "Images", outside)
    plan = make_import_plan(folder)
    assert {p.parent.parent.name for p in plan.fields[("A01", "3")].values()} == {"BR1"}
    table = pd.read_csv(folder / "load_data.csv")
    table["PathName_OrigDNA"] = str(outside)
    table["FileName_OrigDNA"] = "../../secret/Images/A01-ch1.tiff"
    table.to_csv(folder / "load_data.csv", index=False)
    with pytest.raises(PlateError, match=r"2 files named A01-ch1\.tiff"):
        make_import_plan(folder)
    shutil.rmtree(folder / "BR2")
    assert all(p.is_relative_to(folder) for p in make_import_plan(folder).fields[("A01", "3")].values())


def test_ome_tiffs_contain_channels_planes_and_pixel_size(tmp_path):
    data = np.random.default_rng(0).integers(0, 999, (2, 3, 2, 12, 14)).astype("uint16")
    folder = tmp_path / "ome"
    folder.mkdir()
    metadata = {
        "axes": "TZCYX",
        "Channel": {"Name": ["DNA", "ER"]},
        "PhysicalSizeX": 650.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.65,
        "PhysicalSizeYUnit": "µm",
    }
    for well in ("A01", "B02"):
        for site in (1, 2):
            tifffile.imwrite(folder / f"x_{well}_s{site}.ome.tif", data + site, metadata=metadata, ome=True)
    with pytest.raises(PlateError, match="2 time points"):
        import_plate(folder, tmp_path / "p.zarr")
    plate = import_plate(folder, tmp_path / "p.zarr", z=2, t=1)
    assert plate.channel_names == ["DNA", "ER"] and plate.pixel_size_um == 0.65
    assert [f.name for f in plate.fields] == ["A01/1", "A01/2", "B02/1", "B02/2"]
    np.testing.assert_array_equal(plate.fields[1].read(), data[1, 2] + 2)
    plate = import_plate(folder, tmp_path / "q.zarr", z="max", t=0)
    np.testing.assert_array_equal(plate.fields[0].read(), data[0].max(0) + 1)


def test_ome_tiff_without_a_well_or_with_an_xml_bomb_is_refused(tmp_path):
    folder = tmp_path / "ome"
    folder.mkdir()
    tifffile.imwrite(folder / "picture.ome.tif", np.zeros((8, 8), "uint8"), ome=True)
    with pytest.raises(PlateError, match="neither its OME-XML nor its name contains a well"):
        make_import_plan(folder)
    bomb = '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">&b;</OME>'
    tifffile.imwrite(folder / "picture.ome.tif", np.zeros((8, 8), "uint8"), description=bomb)
    with pytest.raises(PlateError):
        make_import_plan(folder)


def test_single_cells_come_back_as_tiles(tmp_path):
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    folder = tmp_path / "jumpcp"
    rows, cells = [], {}
    for i, (well, site) in enumerate([("A01", 1), ("A01", 1), ("B02", 4), ("A01", 1)]):
        cell = rng.integers(0, 255, (8, 16, 16)).astype("uint8")
        path = folder / "numpy" / f"BR1_{well}_{site}_{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, cell)
        cells.setdefault((well, site), []).append(cell)
        rows.append({"path": f"s3://bucket/jumpcp/numpy/{path.name}", "ID": f"BR1_{well}_{site}_{i}", "well_loc": well})
    rows.append({"path": "s3://bucket/lost.npy", "ID": "BR1_A01_1_9", "well_loc": "A01"})
    pd.DataFrame(rows).to_parquet(folder / "BR1.pq")
    plate = import_plate(folder, tmp_path / "p.zarr", channel_names=",".join(f"c{i}=channel {i}" for i in range(8)))
    assert [f.name for f in plate.fields] == ["A01/1", "B02/4"] and plate.name == "BR1"
    strip = plate.fields[0].read()
    for i, cell in enumerate(cells["A01", 1]):
        np.testing.assert_array_equal(strip[:, :, 16 * i : 16 * i + 16], cell)
    assert any("1 cells of BR1.pq have no file" in odd for odd in plate.oddities())
    # the release has a table and a folder for each of its plates, side by side
    np.save(tmp_path / "jumpcp/BR2_B02_1_7.npy", np.zeros((16, 16, 8), "uint8"))
    pd.DataFrame([{"path": "BR2_B02_1_7.npy", "ID": "BR2_B02_1_7", "well_loc": "B02", "plate_id": "BR2"}]).to_parquet(
        folder / "BR2.pq"
    )
    with pytest.raises(PlateError, match=r"2 parquet tables \(BR1.pq, BR2.pq\); choose a plate with --plate-name"):
        make_import_plan(folder)
    for source, options in ((folder, {"plate_name": "BR2"}), (folder / "BR2.pq", {})):
        other = import_plate(source, tmp_path / "two.zarr", overwrite=True, **options)
        assert other.name == "BR2" and other.wells == ["B02"] and other.fields[0].shape == (8, 16, 16)
    np.save(folder / "numpy" / "BR1_A01_1_1.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(PlateError, match="cannot be read as"):
        import_plate(folder / "BR1.pq", tmp_path / "q.zarr")


def test_positions_of_an_operetta_export_are_kept(shared_data, tmp_path):
    plate = import_plate(shared_data / "operetta_export", tmp_path / "p.zarr")
    transforms = [
        json.loads((tmp_path / f"p.zarr/C/03/{site}/zarr.json").read_text())["attributes"]["ome"]["multiscales"][0][
            "datasets"
        ][0]["coordinateTransformations"]
        for site in (1, 2)
    ]
    places = [t[1]["translation"] for t in transforms]
    assert places[0] != places[1] and plate.pixel_size_um > 0
    assert not any("not valid OME-Zarr" in odd for odd in plate.oddities())  # the specification allows it


def names(n):
    return [f"{chr(65 + i // 12)}{i % 12 + 1:02d}_f1_{c}.tif" for i in range(n) for c in ("DNA", "ER")]


def test_killed_import_resumes_with_the_same_bytes(tmp_path, make_tiffs, monkeypatch):
    folder = make_tiffs(names(12))
    whole = import_plate(folder, tmp_path / "whole.zarr", plate_name="p")
    written = []
    original = PlateWriter.write_field

    def until(limit):
        def write(self, well, site, image, **options):
            if len(written) >= limit:
                raise KeyboardInterrupt
            written.append(well)
            original(self, well, site, image, **options)

        return write

    monkeypatch.setattr(PlateWriter, "write_field", until(5))
    with pytest.raises(KeyboardInterrupt):
        import_plate(folder, tmp_path / "p.zarr", plate_name="p", workers=1)
    assert (tmp_path / "p.zarr.partial" / JOURNAL).is_file() and not (tmp_path / "p.zarr").exists()
    with (tmp_path / "p.zarr.partial" / JOURNAL).open("a") as file:
        file.write('{"well": "A06", "si')  # a line cut short
    monkeypatch.setattr(PlateWriter, "write_field", until(99))
    plate = import_plate(folder, tmp_path / "p.zarr", plate_name="p")
    assert len(written) == 12 == len(set(written))  # nothing twice, nothing lost
    one, other = (
        {p.relative_to(r).as_posix(): p.read_bytes() for p in r.rglob("*") if p.is_file()}
        for r in (tmp_path / "whole.zarr", tmp_path / "p.zarr")
    )
    assert one == other and plate.wells == whole.wells


def test_another_import_does_not_resume_from_it(tmp_path, make_tiffs, monkeypatch):
    folder = make_tiffs(names(4))
    (tmp_path / "p.zarr.partial").mkdir()
    (tmp_path / "p.zarr.partial" / JOURNAL).write_text('{"job": "other"}\n')
    (tmp_path / "p.zarr.partial" / "junk").write_text("x")
    plate = import_plate(folder, tmp_path / "p.zarr")
    assert len(plate.fields) == 4 and not (tmp_path / "p.zarr" / "junk").exists()
    assert not (tmp_path / "p.zarr" / JOURNAL).exists()


def test_plate_that_does_not_read_back_is_removed(tmp_path, make_tiffs, monkeypatch):
    folder = make_tiffs(names(6))
    original = PlateWriter.write_field

    def spoiled(self, well, site, image, **options):
        original(self, well, site, image, **options)
        if well == "A01":
            chunk = self.partial / "A" / "01" / site / "0" / "c" / "0" / "0" / "0"
            chunk.write_bytes(chunk.read_bytes()[:-20])

    monkeypatch.setattr(PlateWriter, "write_field", spoiled)
    with pytest.raises(OutputError, match="A01/1 cannot be read back"):
        import_plate(folder, tmp_path / "p.zarr")
    assert not (tmp_path / "p.zarr").exists() and not (tmp_path / "p.zarr.partial").exists()


def test_memory_does_not_grow_with_the_plate(tmp_path, make_tiffs):
    peaks = []
    for n in (6, 36):
        folder = make_tiffs(names(n), folder=f"i{n}", size=(256, 256))
        tracemalloc.start()
        import_plate(folder, tmp_path / f"{n}.zarr", workers=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 2e6, peaks


def test_fields_are_written_by_several_threads(tmp_path, make_tiffs, monkeypatch):
    threads = set()
    original = PlateWriter.write_field
    barrier = threading.Barrier(2, timeout=20)

    def write(self, *args, **options):
        if len(threads) < 2:
            threads.add(threading.get_ident())
            barrier.wait()
        original(self, *args, **options)

    monkeypatch.setattr(PlateWriter, "write_field", write)
    assert len(import_plate(make_tiffs(names(8)), tmp_path / "p.zarr", workers=2).fields) == 8
    assert len(threads) == 2


def test_tiff_bombs_are_refused(tmp_path):
    folder = tmp_path / "i"
    folder.mkdir()
    path = folder / "A01_f1_DNA.tif"
    tifffile.imwrite(path, np.zeros((64, 64), "uint8"), compression="zlib")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tag = tiff.pages[0].tags[name]
            content[tag.valueoffset : tag.valueoffset + (2 if tag.dtype == 3 else 4)] = (60_000).to_bytes(
                2 if tag.dtype == 3 else 4, "little"
            )
    path.write_bytes(content)
    with pytest.raises(CellvimError, match="declares 3,600,000,000 bytes"):
        import_plate(folder, tmp_path / "p.zarr")


def test_real_jump_field_by_its_load_data(shared_data, tmp_path):
    """The Gallery's own index of BR00116991 lists the channel of each of the real files."""
    pytest.importorskip("pyarrow")
    index = pd.read_parquet(shared_data / "jump_metadata/CPJUMP1_image_index_BR00116991_extract.parquet")
    index = index[(index["Metadata_Well"] == "A01") & (index["Metadata_Site"] <= 2)]
    rows = []
    for (well, site), group in index.groupby(["Metadata_Well", "Metadata_Site"]):
        row = {"Metadata_Plate": "BR00116991", "Metadata_Well": well, "Metadata_Site": site}
        for name, url in zip(group["Metadata_ChannelURLName"], group["Metadata_FileUrl"], strict=True):
            folder, _, file = url.rpartition("/")
            row |= {name.replace("URL_", "FileName_"): file, name.replace("URL_", "PathName_"): folder}
        rows.append(row)
    pd.DataFrame(rows).to_csv(tmp_path / "load_data.csv", index=False)
    source = shared_data / "jump_BR00116991_A01_5ch"
    folder = shared_data / "jump_metadata" / "JUMP-Target"
    plate = import_plate(
        source,
        tmp_path / "p.zarr",
        load_data=tmp_path / "load_data.csv",
        pixel_size_um=0.598,
        metadata=folder / "JUMP-Target-1_compound_platemap.tsv",
        compounds=folder / "JUMP-Target-1_compound_metadata.tsv",
    )
    assert sorted(plate.channel_names) == ["AGP", "DNA", "ER", "Mito", "RNA"] and plate.name == "BR00116991"
    assert [f.name for f in plate.fields] == ["A01/1"]
    dna = tifffile.imread(source / "r01c01f01p01-ch5sk1fk1fl1.tiff")
    np.testing.assert_array_equal(plate.fields[0].read(["DNA"])[0], dna)
    assert plate.well_metadata.loc["A01", "pert_iname"] == "gabapentin-enacarbil"
    odd = "\n".join(plate.oddities())
    assert "1 sites of load_data.csv have no files" in odd and "channels that have no files" in odd
