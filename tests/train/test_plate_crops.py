"""Crops of plates: the same values as in `cellvim embed`, stored in memory or files; trained models in `embed`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import cellvim
from cellvim.data.crops import stream_crops
from cellvim.embedding import plan_embedding
from cellvim.errors import InputError
from cellvim.models.checkpoints import save_checkpoint
from cellvim.models.registry import create_model
from cellvim.train import plates
from cellvim.train.augment import middle_window
from cellvim.train.plates import PlateCrops


def trained(data: PlateCrops, path: Path) -> Path:
    """Save a model with the card that a training on these data would write."""
    description = data.description
    model = create_model(
        "fastchannelvim_tiny_patch8", channel_names=description.channel_names, image_size=description.crop_px,
        num_classes=0, depth=1, embed_dim=16,
    )  # fmt: skip
    model.is_trained = True
    return save_checkpoint(model, path, card=asdict(description))


def in_training(data: PlateCrops, group: int = 0) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the model's input in evaluation, and the channel ids."""
    found = data.groups[group]
    images = found.scaled(torch.from_numpy(found.images[:]))
    return middle_window(images, data.description.crop_px).numpy(), found.channel_ids


def in_embed(plate, model, **options) -> tuple[np.ndarray, list[int]]:
    """Return the model's input in an embedding, and the channel ids."""
    plan = plan_embedding(plate, model=model, device="cpu", **options)
    one = plan.plates[0]
    streamed = stream_crops(
        one.fields, one.channels, one.cutting, scale=one.scale, cells=one.cells, extra_channels=one.extra_channels
    )
    return np.concatenate([c.crops.numpy() for c in streamed]), one.channel_ids


def test_training_and_embedding_use_the_same_crops(tmp_path):
    """The second plate has its channels in another order, with other names, and in floating point."""
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
        tolerance = 0 if number == 0 else 2.0**-10  # crops of float images are stored as float16
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * tolerance)


def test_crops_that_exceed_the_memory_are_stored_in_files_and_reused(labelled_plate, tmp_path, monkeypatch):
    """The same crops and table, read from files; another training with the same crops does not cut them again."""
    import pickle

    options = {"label": "compound", "crop_size": 16, "margin": 2}
    data = PlateCrops([str(labelled_plate)], **options)
    data.read()
    monkeypatch.setattr(plates, "MEMORY_BYTES", 20_000)
    monkeypatch.setattr(plates.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000_000}))
    stored = PlateCrops([str(labelled_plate)], **options, cache=str(tmp_path / "cache"))
    with pytest.warns(match=r"The crops need about 0\.0 GB, more than"):
        stored.read()
    assert isinstance(stored.groups[0].images, plates.CropFile)
    assert len(pickle.dumps(stored.groups[0].images)) < 1000  # loading processes receive the path, not the pixels
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".npy", ".npz"]
    monkeypatch.setattr(plates, "stream_crops", None)
    again = PlateCrops([str(labelled_plate)], **options, cache=str(tmp_path / "cache"))
    again.read()
    for other in (stored, again):
        assert other.table.equals(data.table)
        np.testing.assert_array_equal(other.groups[0].images[np.arange(40)], data.groups[0].images[np.arange(40)])
    different = PlateCrops([str(labelled_plate)], **options | {"margin": 3}, cache=str(tmp_path / "cache"))
    with pytest.raises(TypeError):  # they are cut again
        different.read()


def test_too_little_disk_space_raises_early(labelled_plate, tmp_path, monkeypatch):
    monkeypatch.setattr(plates, "MEMORY_BYTES", 20_000)
    monkeypatch.setattr(plates.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 30_000}))
    data = PlateCrops([str(labelled_plate)], unlabelled=True, crop_size=16, cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"need about 0\.0 GB of disk \(\d of 12 fields.*Choose a --data\.cache on"):
        data.read()
    assert not list((tmp_path / "cache").iterdir())


def test_embed_applies_the_intensity_levels_of_a_folder_of_crops(tmp_path):
    """Levels of single-cell images are stored with the weights; implausible ones raise."""
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


def test_differences_from_training_are_noted(tmp_path, labelled_plate):
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
def test_probabilities_are_those_of_the_model(labelled_plate, tmp_path, readout):
    from cellvim.errors import ModelError

    data = PlateCrops([str(labelled_plate)], label="compound", crop_size=16)
    data.read()
    model = create_model(
        "fastchannelvim_tiny_patch8", channel_names=data.description.channel_names, image_size=16, num_classes=2,
        depth=1, embed_dim=16, readout=readout,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    model.is_trained = True
    path = save_checkpoint(model, tmp_path / "m.safetensors", card=asdict(data.description))
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
