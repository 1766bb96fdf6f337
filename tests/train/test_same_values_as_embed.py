"""A crop of a plate is the same values in `cellvim train` and in `cellvim embed` with the trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cellvim
from cellvim.data.crops import stream_crops
from cellvim.data.importers import import_plate
from cellvim.embedding import plan_embedding
from cellvim.errors import InputError
from cellvim.models.checkpoints import save_checkpoint
from cellvim.models.registry import create_model
from cellvim.train import crop_store
from cellvim.train.augment import middle_window
from cellvim.train.plates import PlateCrops

SBS = Path(cellvim.__file__).parents[1] / "datasets" / "sbs_translocation"


def trained(data: PlateCrops, path: Path) -> Path:
    """A model with the card that a training on these data would give it."""
    description = data.description
    model = create_model(
        "fastchannelvim_tiny_patch8", channel_names=description.channel_names, image_size=description.crop_px,
        num_classes=0, depth=1, embed_dim=16,
    )  # fmt: skip
    model.is_trained = True
    return save_checkpoint(model, path, card=description.to_dict())


def in_training(data: PlateCrops, group: int = 0) -> tuple[np.ndarray, tuple[int, ...]]:
    """What the model gets in evaluation, as `TrainingModule.prepare` and `_evaluation_step` make it."""
    found = data.groups[group]
    images = found.scaled(torch.from_numpy(found.images[np.arange(len(found.images))]))
    return middle_window(images, data.description.crop_px).numpy(), found.channel_ids


def in_embed(plate, model, **options) -> tuple[np.ndarray, list[int]]:
    """What the model gets in an embedding."""
    plan = plan_embedding(plate, model=model, device="cpu", **options)
    one = plan.plates[0]
    streamed = stream_crops(
        one.fields, one.channels, one.cutting, scale=one.scale, cells=one.cells, extra_channels=one.extra_channels
    )
    return np.concatenate([c.crops.numpy() for c in streamed]), one.channel_ids


@pytest.fixture(scope="module")
def sbs(tmp_path_factory):
    plate = tmp_path_factory.mktemp("sbs") / "sbs.zarr"
    import_plate(
        SBS / "images", plate, metadata=SBS / "platemap.csv", channel_names={"Channel1": "GFP", "Channel2": "DNA"},
        pert_type="SBS_Controls:-1=negcon,0=trt,1=poscon",
    )  # fmt: skip
    return plate


@pytest.mark.parametrize("scale_by", ["all", "controls"])
def test_crops_of_a_real_plate_reach_the_model_alike(sbs, tmp_path, scale_by):
    """Bitwise, channel by channel, padding at the rim of fields included; and the rule travels with the weights."""
    wells = list(cellvim.open_plate(sbs).wells)[:2]
    data = PlateCrops([str(sbs)], unlabelled=True, crop_size=48, margin=4, wells=wells, scale_by=scale_by)
    data.read()
    expected, ids = in_training(data)
    found, own = in_embed(sbs, trained(data, tmp_path / "m.safetensors"), wells=wells)
    assert tuple(own) == ids
    assert found.shape == expected.shape and len(found) > 20
    for channel, name in enumerate(data.description.channel_names):
        np.testing.assert_array_equal(found[:, channel], expected[:, channel], err_msg=name)
    if scale_by == "controls":  # the plate's own choice can still be made
        other, _ = in_embed(sbs, tmp_path / "m.safetensors", wells=wells, scale_by="all")
        assert not np.array_equal(other, found)


def test_plates_with_other_orders_of_channels_reach_the_model_alike(tmp_path):
    """The second plate stores its channels the other way round, under other names, and in floating point."""
    from synthetic_plate import draw_field, write_plate

    images = {well: [draw_field(i)] for i, well in enumerate(("A01", "A02"))}
    turned = {well: [image[::-1].astype(np.float32)] for well, [image] in images.items()}
    plates = [
        write_plate(tmp_path / "one.zarr", images, ["DNA", "GFP"]),
        write_plate(tmp_path / "two.zarr", turned, ["EGFP", "Hoechst"]),
    ]
    data = PlateCrops([str(p) for p in plates], unlabelled=True, crop_size=32)
    data.read()
    model = trained(data, tmp_path / "m.safetensors")
    for number, plate in enumerate(plates):
        expected, ids = in_training(data, number)
        found, own = in_embed(plate, model)
        assert tuple(own) == ids == (0, 1)
        tolerance = 0 if number == 0 else 2.0**-10  # crops of float images are kept as float16
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * tolerance)


def test_crops_that_are_more_than_memory_lie_in_files_and_are_found_again(labelled_plate, tmp_path, monkeypatch):
    """The same crops and table, read from the disk; another training that cuts the same does not cut again."""
    import pickle

    options = {"label": "compound", "crop_size": 16, "margin": 2}
    data = PlateCrops([str(labelled_plate)], **options)
    data.read()
    monkeypatch.setattr(crop_store, "MEMORY", 20_000)
    monkeypatch.setattr(crop_store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000_000}))
    stored = PlateCrops([str(labelled_plate)], **options, cache=str(tmp_path / "cache"))
    with pytest.warns(match=r"The crops need about 0\.0 GB, more than"):
        stored.read()
    assert isinstance(stored.groups[0].images, crop_store.CropFile)
    assert len(pickle.dumps(stored.groups[0].images)) < 1000  # loading processes get its name, not its pixels
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".crops", ".npz"]
    monkeypatch.setattr(PlateCrops, "_collect", None)
    again = PlateCrops([str(labelled_plate)], **options, cache=str(tmp_path / "cache"))
    again.read()
    for other in (stored, again):
        assert other.table.equals(data.table)
        np.testing.assert_array_equal(other.groups[0].images[np.arange(40)], data.groups[0].images[np.arange(40)])
    different = PlateCrops([str(labelled_plate)], **options | {"margin": 3}, cache=str(tmp_path / "cache"))
    with pytest.raises(TypeError):  # they are cut anew
        different.read()


def test_crops_that_no_disk_holds_are_told_beforehand(labelled_plate, tmp_path, monkeypatch):
    monkeypatch.setattr(crop_store, "MEMORY", 20_000)
    monkeypatch.setattr(crop_store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 30_000}))
    data = PlateCrops([str(labelled_plate)], unlabelled=True, crop_size=16, cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"need about 0\.0 GB of disk \(\d of 12 fields.*Choose a --data\.cache on"):
        data.read()
    assert not list((tmp_path / "cache").iterdir())


def test_levels_of_a_folder_of_crops_are_those_that_embed_applies(tmp_path):
    """Single cells that were cut elsewhere: their levels travel with the weights, unless they cannot be meant."""
    import tifffile
    from synthetic_plate import draw_field, write_plate

    from cellvim.data.cells import open_cells
    from cellvim.data.crops import CropSpec
    from cellvim.train.folders import LabelledCrops

    images = {well: [draw_field(i)] for i, well in enumerate(("A01", "A02"))}
    plate = write_plate(tmp_path / "plate.zarr", images, ["DNA", "GFP"])
    opened = cellvim.open_plate(plate)
    streamed = stream_crops(
        opened.fields, ["DNA", "GFP"], CropSpec("cell", 32), cells=open_cells("nuclei", opened, dna="DNA")
    )
    raw = np.concatenate([c.crops.numpy() for c in streamed]).astype(np.uint16)
    for number, crop in enumerate(raw):
        (tmp_path / "crops" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(tmp_path / "crops" / "ab"[number % 2] / f"{number:02d}.tif", crop)
    data = LabelledCrops(
        str(tmp_path / "crops"), channels=["DNA", "GFP"], split="random_by_cell", val=0, test=0, pixel_size_um=0.5
    )
    with pytest.warns(match="leaks"):
        data.setup()
    model = trained(data, tmp_path / "m.safetensors")
    expected, _ = in_training(data)
    order = np.argsort([Path(p).name for p in data.table["path"]])
    found, _ = in_embed(plate, model)
    np.testing.assert_array_equal(found, expected[order])

    bright = {well: [20 * image.astype(np.uint16)] for well, [image] in images.items()}
    other = write_plate(tmp_path / "bright.zarr", bright, ["DNA", "GFP"])
    with pytest.raises(InputError, match=r"with intensities of .*channel DNA of bright\.zarr.*--scale-by all"):
        plan_embedding(other, model=model)
    by_plate, _ = in_embed(other, model, scale_by="all")
    assert 0.5 < by_plate.max() < 2
    by_model, _ = in_embed(other, model, scale_by="model")
    assert by_model.max() == 2  # the ceiling
    with pytest.raises(InputError, match="no intensity levels"):
        plan_embedding(other, scale_by="model")


def test_what_differs_from_training_is_told(tmp_path, labelled_plate):
    data = PlateCrops([str(labelled_plate)], unlabelled=True, crop_size=32)
    data.read()
    assert not plan_embedding(labelled_plate, model=trained(data, tmp_path / "m.safetensors")).notes
    data.description.pixel_size_um = 0.25
    model = trained(data, tmp_path / "m.safetensors")
    [note] = plan_embedding(labelled_plate, model=model).notes
    assert "0.25 µm" in note and "0.5 µm" in note
    assert not plan_embedding(labelled_plate, model=model, um_per_px=0.25).notes
    [note] = plan_embedding(labelled_plate, model=model, unit="tile", um_per_px=0.25).notes
    assert "unit cell" in note and "tile" in note


@pytest.mark.parametrize("readout", ["mean", "max"])
def test_probabilities_of_the_learned_classes_are_the_models(labelled_plate, tmp_path, readout):
    from cellvim.errors import ModelError

    data = PlateCrops([str(labelled_plate)], label="compound", crop_size=16)
    data.read()
    model = create_model(
        "fastchannelvim_tiny_patch8", channel_names=data.description.channel_names, image_size=16, num_classes=2,
        depth=1, embed_dim=16, readout=readout,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    model.is_trained = True
    path = save_checkpoint(model, tmp_path / "m.safetensors", card=data.description.to_dict())
    adata = cellvim.embed(labelled_plate, tmp_path / "out.zarr", model=path, probabilities=True, wells=["A01", "A02"])
    images, ids = in_training(data)
    chosen = data.table["Metadata_Well"].isin(["A01", "A02"]).to_numpy()
    with torch.inference_mode():
        expected = model(torch.from_numpy(images[chosen]), channels=list(ids)).softmax(1).numpy()
    np.testing.assert_allclose(adata.obsm["probabilities"], expected, rtol=1e-5, atol=1e-6)
    assert list(adata.uns["cellvim"]["class_names"]) == ["DMSO", "drug"]
    assert "probabilities" not in cellvim.embed(labelled_plate, model=path, wells=["A01"]).obsm
    with pytest.raises(ModelError, match="classes"):
        plan_embedding(labelled_plate, probabilities=True)
