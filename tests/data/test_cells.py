"""Cells come the same from labels, masks and tables; how well found ones agree with given ones is printed."""

from __future__ import annotations

import sys
import types

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

from cellvim.data.cells import cells_of_labels, compact_labels, discs, open_cells
from cellvim.data.importers import import_plate
from cellvim.data.plate import open_plate
from cellvim.data.plate_writer import PlateWriter
from cellvim.data.segmentation import segment_cells, segment_nuclei
from cellvim.errors import FieldReadError, InputError, MetadataError


def drawn(seed=0):
    """Draw two channels of nuclei and cells; return (image, nuclei labels)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:160, :200]
    nuclei, body = np.zeros((160, 200), "int32"), np.zeros((160, 200), bool)
    for i, (cy, cx) in enumerate((a, b) for a in (35, 85, 130) for b in (40, 100, 165)):
        nuclei[(y - cy) ** 2 + (x - cx) ** 2 < 11**2] = i + 1
        body |= (y - cy) ** 2 + (x - cx) ** 2 < 20**2
    image = np.stack([100 + 900 * (nuclei > 0), 100 + 500 * body]) + rng.normal(0, 8, (2, 160, 200))
    return image.clip(0).astype("uint16"), nuclei


@pytest.fixture
def plate(tmp_path):
    with PlateWriter(tmp_path / "p.zarr", name="P1", channel_names=["DNA", "ER"], pixel_size_um=0.65) as writer:
        for i, well in enumerate(("A01", "B02")):
            for site in ("1", "2"):
                writer.write_field(well, site, drawn(i)[0])
        writer.finish()
    return open_plate(tmp_path / "p.zarr")


def test_segmentation_label_image_masks_and_table_agree(plate, tmp_path):
    field = plate.fields[0]
    image = field.read()
    found = open_cells("nuclei", plate).find(field, image, plate.channel_names)
    assert len(found.table) == 9 and found.labels.max() == 9
    group = zarr.open_group(str(tmp_path / "p.zarr/A/01/1"), mode="a").create_group("labels")
    group.attrs["ome"] = {"version": "0.5", "labels": ["mine"]}
    one = group.create_group("mine")
    axes = [{"name": n, "type": "space"} for n in "yx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0]}]
    one.attrs["ome"] = {
        "multiscales": [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]
    }
    one.create_array("0", data=found.labels)
    (tmp_path / "masks").mkdir()
    for name in ("A01_s1", "A01_s2", "B02_s1"):
        tifffile.imwrite(tmp_path / "masks" / f"{name}_mask.tif", found.labels.astype("uint16"))
    np.save(tmp_path / "masks" / "B02_s2_mask.npy", (found.labels > 0).astype("uint8") * 255)
    table = found.table.rename(columns={"x_px": "x", "y_px": "y"})[["object_number", "x", "y"]]
    table.assign(well="A1", site=1).to_csv(tmp_path / "t.csv", index=False)
    plate = open_plate(plate.path)
    for spec in ("labels:mine", tmp_path / "masks"):
        same = open_cells(spec, plate).find(plate.fields[0], image, plate.channel_names)
        pd.testing.assert_frame_equal(same.table, found.table)
        np.testing.assert_array_equal(same.labels, found.labels)
    parts = open_cells(tmp_path / "masks", plate).find(plate.fields[3], plate.fields[3].read(), plate.channel_names)
    assert len(parts.table) == 9  # a mask's connected parts
    points = open_cells(tmp_path / "t.csv", plate)
    same = points.find(plate.fields[0], image, plate.channel_names)
    np.testing.assert_array_equal(same.centers, found.centers)
    assert list(same.table["object_number"]) == list(found.table["object_number"])
    assert points.notes == ["3 fields have no cells in t.csv: A01/2, B02/1, B02/2"]
    assert len(points.find(plate.fields[1], image, plate.channel_names).table) == 0
    assert same.table.columns.tolist() == found.table.columns.tolist()
    assert {"qc_focus", "qc_saturated_ER", "qc_border", "qc_debris"} <= set(found.table)


def test_numbers_and_positions_of_a_table_are_kept(plate, tmp_path):
    rows = pd.DataFrame(
        {"ObjectNumber": [40, 7, 8], "x": [100.0, 40.0, 900.0], "y": [35.2, 35.0, 5.0], "well": "B02", "site": 2}
    )
    rows.to_csv(tmp_path / "t.csv", index=False)
    source = open_cells(tmp_path / "t.csv", plate)
    cells = source.find(plate.fields[3], plate.fields[3].read(), plate.channel_names)
    assert cells.table["object_number"].tolist() == [40, 7] and set(np.unique(cells.labels)) == {0, 7, 40}
    np.testing.assert_array_equal(cells.centers, [[35.2, 100.0], [35.0, 40.0]])
    assert cells.labels[35, 100] == 40 and cells.labels[35, 40] == 7
    assert source.notes[-1] == "1 cells of field B02/2 lie outside of it and were left out"
    um = pd.DataFrame({"x_um": [(40 + 0.5) * 0.65], "y_um": [(35 + 0.5) * 0.65], "well": "A01", "site": 1})
    um.to_csv(tmp_path / "um.csv", index=False)
    cells = open_cells(tmp_path / "um.csv", plate).find(plate.fields[0], plate.fields[0].read(), plate.channel_names)
    np.testing.assert_allclose(cells.centers, [[35.0, 40.0]])


def test_discs_belong_to_the_nearest_centre():
    centers = np.array([[10.0, 10.0], [10.0, 16.0], [0.2, 0.1], [39.0, 49.0], [25.3, 30.6]])
    labels = discs(centers, (40, 50), 11.0)
    y, x = np.mgrid[:40, :50]
    distance = np.hypot(y[..., None] - centers[:, 0], x[..., None] - centers[:, 1])
    expected = np.where(distance.min(-1) <= 5.5, distance.argmin(-1) + 1, 0)
    ties = np.isclose(*np.sort(distance, axis=-1)[..., :2].transpose(2, 0, 1))
    np.testing.assert_array_equal(labels[~ties], expected[~ties])
    assert discs(np.zeros((0, 2)), (5, 5), 3).sum() == 0
    assert set(np.unique(discs(centers, (40, 50), 0.1))) == {0, 1, 2, 3, 4, 5}  # never less than a pixel


def test_cells_grow_around_their_nuclei_and_no_further():
    image, nuclei = drawn()
    cells = segment_cells(nuclei, image[1:], 0.65)
    assert set(np.unique(cells)) == set(np.unique(nuclei))
    assert (cells[nuclei > 0] == nuclei[nuclei > 0]).all()
    truth = image[1] > 350
    assert 2 * (truth & (cells > 0)).sum() / (truth.sum() + (cells > 0).sum()) > 0.94
    alone = segment_cells(nuclei, np.full((1, *nuclei.shape), 5.0))
    assert (alone >= nuclei).all() and not segment_cells(np.zeros((9, 9), int), np.zeros((1, 9, 9))).any()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing", "nuclei, cells, cellpose, labels:NAME"),
        ("labels:cells", "has no label image 'cells'; it has none"),
        ("cellpose", "needs cellpose"),
    ],
)
def test_unknown_sources_say_what_there_is(plate, spec, words):
    with pytest.raises(InputError, match=words):
        open_cells(spec, plate)


def test_masks_and_tables_that_do_not_fit_say_why(plate, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(InputError, match="has no mask files"):
        open_cells(folder, plate)
    tifffile.imwrite(folder / "C09_s1.tif", np.zeros((4, 4), "uint8"))
    with pytest.raises(InputError, match="names a field"):
        open_cells(folder, plate)
    tifffile.imwrite(folder / "A01_s1_Nuclei.tif", np.zeros((4, 4), "uint8"))
    tifffile.imwrite(folder / "A01_s1_Cells.tif", np.zeros((4, 4), "uint8"))
    with pytest.raises(InputError, match="choose with a word of the name"):
        open_cells(folder, plate)
    source = open_cells(f"{folder}#Cells", plate)
    assert any("fields have no mask" in note for note in source.notes)
    image = plate.fields[0].read()
    with pytest.raises(FieldReadError, match=r"is \(4, 4\) where the image is \(160, 200\)"):
        source.find(plate.fields[0], image, plate.channel_names)
    with pytest.raises(FieldReadError, match="no mask for it"):
        source.find(plate.fields[1], image, plate.channel_names)
    (folder / "A01_s1_Cells.tif").write_bytes(b"II*\x00 no")
    with pytest.raises(FieldReadError, match="cannot be read"):
        source.find(plate.fields[0], image, plate.channel_names)
    pd.DataFrame({"x": [1.0], "y": [2.0]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(MetadataError, match="no well"):
        open_cells(tmp_path / "t.csv", plate)
    pd.DataFrame({"x": [1.0], "y": [2.0], "well": ["A1"]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(MetadataError, match="no site"):
        open_cells(tmp_path / "t.csv", plate)
    pd.DataFrame({"x": [1.0], "y": [2.0], "well": ["H9"], "site": [1]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(MetadataError, match="has cells of H09/1"):
        open_cells(tmp_path / "t.csv", plate)


def test_cellpose_is_used_as_it_is_documented(plate, monkeypatch):
    """cellpose itself is not installed here: this holds our call to its documented one, eval(image)[0] = masks."""

    created = []

    class CellposeModel:
        def __init__(self, gpu=False, pretrained_model="cpsam"):
            created.append(pretrained_model)

        def eval(self, x, **options):
            return (segment_nuclei(x, 0.65).astype("uint16"), None, None)

    module = types.ModuleType("cellpose")
    module.models = types.SimpleNamespace(CellposeModel=CellposeModel)
    monkeypatch.setitem(sys.modules, "cellpose", module)
    source = open_cells("cellpose:mine", plate)
    cells = source.find(plate.fields[0], plate.fields[0].read(), plate.channel_names)
    assert len(cells.table) == 9 and source.name == "cellpose:mine" and created == ["mine"]


def f1(truth: np.ndarray, labels: np.ndarray) -> float:
    """Return the F1 of objects that overlap by more than half of their union."""
    overlap = np.zeros((truth.max() + 1, labels.max() + 1))
    np.add.at(overlap, (truth.ravel(), labels.ravel()), 1)
    iou = overlap / (overlap.sum(1)[:, None] + overlap.sum(0) - overlap)
    return 2 * (iou[1:, 1:] > 0.5).sum() / (len(np.unique(truth)) + len(np.unique(labels)) - 2)


def test_real_masks_are_met_and_the_agreement_is_printed(shared_data, tmp_path, capsys):
    folder = shared_data / "nf1_schwann_plate2_3ch"
    names = "DAPI=DNA,GFP=ER,RFP=Actin"
    plate = import_plate(folder / "Plate_2_images", tmp_path / "nf1.zarr", channel_names=names)
    given_nuclei = open_cells(f"{folder / 'Plate_2_masks'}#Nuclei", plate)
    given_cells = open_cells(f"{folder / 'Plate_2_masks'}#MaskCells", plate)
    for field in plate.fields:
        image = field.read()
        given, found = (s.find(field, image, plate.channel_names) for s in (given_nuclei, open_cells("nuclei", plate)))
        border = found.table["object_number"][found.table["touches_border"]]
        inner = np.where(np.isin(found.labels, border), 0, found.labels)
        body = given_cells.find(field, image, plate.channel_names).labels > 0
        grown = segment_cells(found.labels, image[1:], None) > 0
        score, covered = f1(given.labels, inner), (grown & body).sum() / body.sum()
        with capsys.disabled():
            print(
                f"\n  {field.name}: nuclei F1 at IoU 0.5 = {score:.3f}; {covered:.1%} of the given cells' area covered",
                end="",
            )
        assert score > 0.9 and covered > 0.9


def test_real_tables_are_cells_of_their_field(shared_data, tmp_path):
    folder = shared_data / "jump_BR00117035_A01_8ch"
    plate = import_plate(folder, tmp_path / "p.zarr", channel_names="jump", pixel_size_um=0.598)
    field = plate.fields[0]
    image = field.read()
    cells = open_cells(folder / "Nuclei.csv", plate).find(field, image, plate.channel_names)
    assert len(cells.table) == 68
    outside = image[plate.channel_names.index("DNA")][cells.labels == 0]
    assert (cells.table["mean_intensity_DNA"] > 2 * np.median(outside)).mean() > 0.95  # x and y are not swapped


def test_labels_far_apart_in_number_take_no_memory():
    labels = np.zeros((20, 20), "uint64")
    labels[2:9, 2:9], labels[12:18, 12:18] = 2**40, 2**60
    small = compact_labels(labels, None)
    assert set(np.unique(small)) == {0, 1, 2}
    assert len(cells_of_labels(small, np.ones((1, 20, 20)), ["DNA"]).table) == 2


def test_cells_of_a_confluent_field_are_more_than_nuclei():
    _, nuclei = drawn()
    y, x = np.mgrid[:160, :200]
    body = 1000 + 300 * np.sin(y / 9) + 300 * np.sin(x / 7)
    body += np.random.default_rng(0).normal(0, 10, body.shape)
    assert (segment_cells(nuclei, body[None], 0.65) > 0).sum() > 1.5 * (nuclei > 0).sum()
