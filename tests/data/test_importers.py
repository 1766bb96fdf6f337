"""Microscope files become plates with every pixel where it belongs, or an error that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaozarrs

from cellvim.data.bundled import bundled_dataset
from cellvim.data.importers import import_plate, make_import_plan
from cellvim.data.importers.tiff_folder import PATTERNS
from cellvim.data.plate import open_plate
from cellvim.errors import ChannelError, InputError, MetadataError, OutputError, PlateError

PHENIX = ["r{:02d}c{:02d}f{:02d}p01-ch{}sk1fk1fl1.tiff"]


def phenix_names(wells=((1, 1), (2, 3)), sites=(1, 2), channels=(1, 2, 3)) -> list[str]:
    return [f"r{r:02d}c{c:02d}f{s:02d}p01-ch{ch}sk1fk1fl1.tiff" for r, c in wells for s in sites for ch in channels]


def index_xml(images: str, maps: str = "") -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?>'
        '<EvaluationInputData xmlns="http://www.perkinelmer.com/PEHH/HarmonyV5">'
        "<Plates><Plate><PlateID>P1</PlateID><Name>Plate one</Name></Plate></Plates>"
        '<Wells><Well><id>0101</id><Image id="0101K1F1P1R1" /></Well></Wells>'
        f"<Maps>{maps}</Maps><Images>{images}</Images></EvaluationInputData>"
    )


def index_image(url: str, row=1, column=1, site=1, channel=1, extra: str = "") -> str:
    return (
        f'<Image Version="1"><id>x</id><State>Ok</State><URL>{url}</URL><Row>{row}</Row><Col>{column}</Col>'
        f"<FieldID>{site}</FieldID><PlaneID>1</PlaneID><TimepointID>0</TimepointID>"
        f"<ChannelID>{channel}</ChannelID>{extra}</Image>"
    )


def test_bundled_plate_is_imported_pixel_for_pixel(tmp_path):
    source = bundled_dataset("sbs_translocation")
    steps = []
    plate = import_plate(
        source / "images",
        tmp_path / "sbs.zarr",
        metadata=source / "platemap.csv",
        channel_names="Channel1=GFP,Channel2=DNA",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(i, 29) for i in range(1, 30)]
    assert plate.channel_names == ["GFP", "DNA"] and len(plate.wells) == len(plate.fields) == 29
    assert plate.pixel_size_um is None and plate.name == "sbs"
    assert plate.well_metadata["Metadata_pert_type"].value_counts().to_dict() == {"negcon": 16, "poscon": 8, "trt": 5}
    assert plate.well_metadata.loc["A12", "SBS_Doses"] == 10
    for field in plate.fields:
        files = sorted((source / "images").glob(f"Channel?-*-{field.well[0]}-{field.well[1:]}.tif"))
        np.testing.assert_array_equal(field.read(), np.stack([tifffile.imread(f) for f in files]))
    yaozarrs.validate_zarr_store(plate.path)
    assert plate.oddities() == ["no pixel size: sizes can be given in pixels only"]


def test_real_plate_and_its_map(tmp_path, shared_data):
    source = shared_data / "sbs_fkhr_translocation_96well"
    plate = import_plate(
        source,
        tmp_path / "sbs.zarr",
        metadata=source / "1049_Metadata.csv",
        channel_names={"Channel1": "GFP", "Channel2": "DNA"},
        pert_type="SBS_Controls:-1=negcon,0=trt,1=poscon",
    )
    assert len(plate.fields) == 96
    assert plate.well_metadata["Metadata_pert_type"].value_counts().to_dict() == {"trt": 72, "negcon": 16, "poscon": 8}
    field = next(f for f in plate.fields if f.well == "G07")
    np.testing.assert_array_equal(field.read(["GFP"])[0], tifffile.imread(source / "Channel1-79-G-07.tif"))


def test_real_phenix_field(tmp_path, shared_data):
    source = shared_data / "jump_BR00117035_A01_8ch"
    plate = import_plate(source, tmp_path / "j.zarr", channel_names="jump", pixel_size_um=0.598)
    assert plate.channel_names == ["Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield"]
    field = plate.fields[0]
    assert (field.name, field.shape, field.dtype, field.pixel_size_um) == ("A01/1", (8, 1080, 1080), np.uint16, 0.598)
    np.testing.assert_array_equal(
        field.read(["Hoechst"])[0], tifffile.imread(source / "r01c01f01p01-ch5sk1fk1fl1.tiff")
    )


def test_phenix_file_names_do_not_identify_stains(tmp_path, make_tiffs):
    plate = import_plate(make_tiffs(phenix_names()), tmp_path / "p.zarr")
    assert plate.channel_names == ["ch1", "ch2", "ch3"] and plate.pixel_size_um is None
    assert [f.name for f in plate.fields] == ["A01/1", "A01/2", "B03/1", "B03/2"]
    with pytest.raises(ChannelError, match=r"Channel 'DNA' is not in p.zarr; it has ch1, ch2, ch3"):
        plate.fields[0].read(["DNA"])


def test_real_harmony_export(tmp_path, shared_data):
    source = shared_data / "operetta_export"
    plate = import_plate(source, tmp_path / "o.zarr", metadata=source / "drug_layout.csv")
    assert plate.name == "Test_Sample_BALL" and plate.channel_names == ["Fluorescein (FITC)"]
    assert plate.pixel_size_um == pytest.approx(1.1959521619135234, rel=1e-6)
    assert [f.name for f in plate.fields] == ["C03/1", "C03/2"] and plate.well_metadata.loc["C03", "drug"] == "DMSO"
    np.testing.assert_array_equal(
        plate.fields[1].read()[0], tifffile.imread(source / "Images" / "r03c03f02p01-ch1sk1fk1fl1.tiff")
    )


@pytest.mark.parametrize("layout", ["in the image", "in a map"])
def test_index_names_channels_and_pixel_size(tmp_path, make_tiffs, layout):
    folder = make_tiffs(["a.tiff", "b.tiff"])
    facts = [
        f"<ChannelName>{n}</ChannelName><ImageResolutionX>5.98E-07</ImageResolutionX>" for n in ("Alexa 488", "HOECHST")
    ]
    in_image = facts if layout == "in the image" else ["", ""]
    maps = (
        ""
        if layout == "in the image"
        else "<Map>" + "".join(f'<Entry ChannelID="{i + 1}">{fact}</Entry>' for i, fact in enumerate(facts)) + "</Map>"
    )
    images = "".join(index_image(u, channel=i + 1, extra=in_image[i]) for i, u in enumerate(("a.tiff", "b.tiff")))
    (folder / "Index.xml").write_text(index_xml(images, maps))
    plate = import_plate(folder, tmp_path / "p.zarr", channel_names={"Alexa 488": "ER"})
    assert plate.channel_names == ["ER", "HOECHST"] and plate.pixel_size_um == pytest.approx(0.598)
    assert plate.name == "Plate one"


def test_index_fields_without_files_are_reported_and_partial_ones_refused(tmp_path, make_tiffs):
    folder = make_tiffs(["a.tiff", "b.tiff"])
    images = [index_image("a.tiff", channel=1), index_image("b.tiff", channel=2)]
    images += [index_image("c.tiff", site=2, channel=1), index_image("d.tiff", site=2, channel=2)]
    (folder / "Index.idx.xml").write_text(index_xml("".join(images)))
    plate = import_plate(folder, tmp_path / "p.zarr")
    assert any("1 fields of Index.idx.xml have no files and were left out: A01/2" in odd for odd in plate.oddities())
    shutil.copy(folder / "a.tiff", folder / "c.tiff")
    with pytest.raises(PlateError, match=r"1 files .* are missing: d.tiff \(well A01 site 2 ch2\)"):
        import_plate(folder, tmp_path / "q.zarr")


BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<Images><Image><URL>&b;</URL></Image></Images>"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "cannot be read as Harmony's index"),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><Images/>', "cannot be read as Harmony's index"),
        ("<Images><Image>", "cannot be read as Harmony's index"),
        ("", "cannot be read as Harmony's index"),
        ("<Images/>", "lists no images"),
        (index_xml(index_image("../a.tiff")), "expected a name in the folder of the index"),
        (index_xml(index_image("/etc/passwd")), "expected a name in the folder of the index"),
        (index_xml(index_image("a.tiff", row=99)), "no valid Row"),
        (index_xml(index_image("a.tiff", channel="x")), "no valid Row, Col and ChannelID"),
        (index_xml(index_image("z.tiff")), "none of the files"),
    ],
)
def test_hostile_index_is_refused(tmp_path, make_tiffs, text, words):
    folder = make_tiffs(["a.tiff"])
    (folder / "Index.xml").write_text(text)
    with pytest.raises(PlateError, match=words):
        import_plate(folder, tmp_path / "p.zarr")
    assert not (tmp_path / "p.zarr").exists()


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("phenix", "r02c03f04p01-ch5sk1fk1fl1.tiff", ("B03", "4", "ch5")),
        ("sbs", "Channel2-13-B-01.tif", ("B01", "1", "Channel2")),
        ("imagexpress", "Week1_22123_B02_s3_w2A0-B1.TIF", ("B02", "3", "w2")),
        ("imagexpress", "Plate_P24_w1.tif", ("P24", "1", "w1")),
        ("cytation", "B7_01_1_3_DAPI_001.tif", ("B07", "3", "DAPI")),
        ("plain", "exp-1_C05_f02_DAPI.tif", ("C05", "2", "DAPI")),
        (r"(?P<channel>\w+)/(?P<well>[A-H]\d+)\.tif", "GFP/A1.tif", ("A01", "1", "GFP")),
    ],
)
def test_names_are_read(make_tiffs, pattern, name, found):
    plan = make_import_plan(make_tiffs([name]), pattern=pattern)
    (((well, site), files),) = plan.fields.items()
    assert (well, site, *files) == found
    if pattern in PATTERNS:
        assert make_import_plan(Path(next(iter(files.values()))).parent).fields == plan.fields


def test_missing_channel_names_the_site(tmp_path, make_tiffs):
    names = phenix_names()
    names.remove("r02c03f02p01-ch3sk1fk1fl1.tiff")
    with pytest.raises(PlateError, match=r"1 of 4 sites lack one: well B03 site 2 lacks ch3") as caught:
        import_plate(make_tiffs(names), tmp_path / "p.zarr")
    assert caught.value.exit_code == 2 and not (tmp_path / "p.zarr").exists()


def test_two_files_of_one_plane_are_an_error(make_tiffs):
    folder = make_tiffs(["r01c01f01p01-ch1sk1fk1fl1.tiff", "r01c01f01p02-ch1sk1fk1fl1.tiff"])
    with pytest.raises(
        PlateError, match=r"has 2 z planes, such as .*p01.* and .*p02.*Choose one with --z 0 to 1 or --z max"
    ):
        make_import_plan(folder)
    folder = make_tiffs(["x/Channel1-01-A-01.tif", "y/Channel1-01-A-01.tif"], folder="two")
    with pytest.raises(PlateError, match=r"has two files, x/Channel1-01-A-01.tif and y/Channel1-01-A-01.tif"):
        make_import_plan(folder)


def test_files_that_do_not_match_are_reported(tmp_path, make_tiffs):
    folder = make_tiffs([*phenix_names(), "overview.tif", "._r01c01f01p01-ch1sk1fk1fl1.tiff"])
    with pytest.raises(PlateError, match="no ready pattern fits all 13 TIFF files"):
        make_import_plan(folder)
    plate = import_plate(folder, tmp_path / "p.zarr", pattern="phenix")
    assert any("1 TIFF files do not fit the pattern and were left out: overview.tif" in o for o in plate.oddities())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "not a regular expression"),
        (r"(?P<well>\w+)", "expected channel, and well or row and column"),
        (r"(?P<row>\d)(?P<channel>\d)", "expected channel, and well or row and column"),
    ],
)
def test_unusable_pattern_is_an_input_error(make_tiffs, pattern, words):
    with pytest.raises(InputError, match=words):
        make_import_plan(make_tiffs(phenix_names()), pattern=pattern)


def test_pattern_that_fits_nothing_lists_ready_ones(make_tiffs):
    with pytest.raises(PlateError, match=r"fits none of its 12 TIFF files.*ready ones are phenix, sbs"):
        make_import_plan(make_tiffs(phenix_names()), pattern="sbs")
    with pytest.raises(PlateError, match="finds the well 'Z99'"):
        make_import_plan(make_tiffs(["Z99_1.tif"], folder="z"), pattern=r"(?P<well>\w\d\d)_(?P<channel>\d)")


def test_channel_names_must_refer_to_existing_channels(tmp_path, make_tiffs):
    folder = make_tiffs(phenix_names())
    for given, words in {
        "ch9=DNA": r"Channel 'ch9' is not in .*; the files have ch1, ch2, ch3",
        "ch1=DNA,ch2=DNA": "Channels ch1 and ch2 .* would both be named 'DNA'",
        "ch1": "expected KEY=NAME",
    }.items():
        with pytest.raises(ChannelError, match=words):
            import_plate(folder, tmp_path / "p.zarr", channel_names=given)
    assert import_plate(folder, tmp_path / "p.zarr", channel_names="jump").channel_names == ["Mito", "AGP", "RNA"]
    with pytest.raises(ChannelError, match="not in that preset"):
        import_plate(make_tiffs(["Channel1-01-A-01.tif"], folder="x"), tmp_path / "q.zarr", channel_names="jump")


def test_source_and_target_are_checked_first(tmp_path, make_tiffs):
    folder = make_tiffs(phenix_names())
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, words in {"nowhere": "does not exist", "file": "is a file", "empty": "has no TIFF files"}.items():
        with pytest.raises(PlateError, match=words):
            import_plate(tmp_path / source, tmp_path / "p.zarr")
    with pytest.raises(InputError, match="--format 'czi' is not known; choose auto, tiff, phenix"):
        import_plate(folder, tmp_path / "p.zarr", format="czi")
    with pytest.raises(InputError, match="--pixel-size"):
        import_plate(folder, tmp_path / "p.zarr", pixel_size_um=-1)
    with pytest.raises(OutputError, match="exists already"):
        import_plate(folder, folder)
    with pytest.raises(MetadataError, match="no column of wells"):
        (tmp_path / "m.csv").write_text("a,b\n1,2\n")
        import_plate(folder, tmp_path / "p.zarr", metadata=tmp_path / "m.csv")
    with pytest.raises(MetadataError, match="give one with --metadata"):
        import_plate(folder, tmp_path / "p.zarr", pert_type="a:1=trt")
    assert not (tmp_path / "p.zarr").exists() and not (tmp_path / "p.zarr.partial").exists()


def test_overwrite_does_not_remove_the_source(tmp_path, make_tiffs):
    inner = make_tiffs(phenix_names(), folder="old.zarr/images")
    (tmp_path / "old.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(OutputError, match="is or contains the source"):
        import_plate(inner, tmp_path / "old.zarr", overwrite=True)
    assert len(list(inner.iterdir())) == 12


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncated", r"ch2sk1fk1fl1.tiff \(well A01 site 1\) cannot be read as a TIFF"),
        ("text", "cannot be read as a TIFF"),
        ("empty", "cannot be read as a TIFF"),
        ("size", r"is 5 x 5 uint16; .* of the same site is 20 x 26 uint16"),
        ("type", "is 20 x 26 uint8"),
        ("rgb", r"has the shape \(20, 26, 3\); expected one greyscale plane"),
        ("pages", "has 2 pages"),
    ],
)
def test_bad_file_is_named_and_nothing_is_left(tmp_path, make_tiffs, damage, words):
    folder = make_tiffs(phenix_names())
    file = folder / "r01c01f01p01-ch2sk1fk1fl1.tiff"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:300])
    elif damage in ("text", "empty"):
        file.write_bytes(b"" if damage == "empty" else b"not an image")
    elif damage == "rgb":
        tifffile.imwrite(file, np.zeros((20, 26, 3), "uint8"), photometric="rgb")
    else:
        shape = {"size": (5, 5), "type": (20, 26), "pages": (2, 20, 26)}[damage]
        tifffile.imwrite(
            file, np.zeros(shape, "uint8" if damage == "type" else "uint16"), photometric="minisblack", metadata=None
        )
    with pytest.raises(PlateError, match=words):
        import_plate(folder, tmp_path / "p.zarr", workers=2)
    assert not list(tmp_path.glob("p.zarr*"))


def test_fields_of_unequal_size_are_kept_and_reported(tmp_path, make_tiffs):
    folder = make_tiffs(phenix_names(sites=(1,)))
    for channel in (1, 2, 3):
        tifffile.imwrite(folder / f"r02c03f01p01-ch{channel}sk1fk1fl1.tiff", np.ones((9, 8), "uint16"))
    plate = import_plate(folder, tmp_path / "p.zarr")
    assert [f.shape for f in plate.fields] == [(3, 20, 26), (3, 9, 8)]
    assert any("another size (9 x 8" in odd and "B03/1" in odd for odd in plate.oddities())


def test_same_input_gives_the_same_bytes_with_any_number_of_workers(tmp_path, make_tiffs):
    folder = make_tiffs(phenix_names(wells=[(r, c) for r in (1, 2, 3) for c in (1, 2, 3)]))
    contents = []
    for workers in (1, 5):
        plate = import_plate(folder, tmp_path / f"p{workers}" / "p.zarr", workers=workers)
        root = Path(plate.path)
        contents.append({p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]


def test_provenance_is_recorded(tmp_path, make_tiffs):
    plate = import_plate(make_tiffs(phenix_names()), tmp_path / "p.zarr", channel_names="ch1=DNA")
    made = open_plate(plate.path).cellvim_attributes["provenance"]
    assert made["format"] == "tiff_folder" and made["source"] == "images"
    assert made["channels"] == {"ch1": "DNA", "ch2": "ch2", "ch3": "ch3"}
    assert str(tmp_path) not in str(made)


def test_nan_and_infinite_pixels_are_reported(tmp_path):
    """Also after a kill: the journal of the first run has them."""
    from cellvim.data.plate_writer import PlateWriter

    values = np.random.default_rng(0).random((8, 9)).astype("float32")
    some = np.where(values < 0.1, np.inf, values)
    for well, er in {"A01": np.full((8, 9), np.nan, "float32"), "A02": some, "A03": values}.items():
        tifffile.imwrite(tmp_path / f"{well}_f1_DNA.tif", values)
        tifffile.imwrite(tmp_path / f"{well}_f1_ER.tif", er)
    expected = [
        "channel ER is NaN or infinite in every pixel of 1 fields: A01/1",
        "channel ER is NaN or infinite in some pixels of 1 fields: A02/1",
    ]
    plate = import_plate(tmp_path, tmp_path / "p.zarr")
    assert plate.cellvim_attributes["notes"] == expected
    assert any("ER has pixels that are NaN or infinite in 2 of 3 fields" in odd for odd in plate.oddities())

    with (
        pytest.raises(KeyboardInterrupt),
        PlateWriter(tmp_path / "q.zarr", name="q", channel_names=["a"], job="1") as one,
    ):
        one.write_field("A01", "1", np.full((1, 4, 4), np.nan, "float32"))
        raise KeyboardInterrupt
    with PlateWriter(tmp_path / "q.zarr", name="q", channel_names=["a"], job="1") as two:
        assert two.done == {("A01", "1")}
        two.finish()
    notes = open_plate(tmp_path / "q.zarr").cellvim_attributes["notes"]
    assert notes == ["channel a is NaN or infinite in every pixel of 1 fields: A01/1"]
