"""`cellvim train` on a plate, from the plate to an embedding with the trained model, and its errors."""

from __future__ import annotations

import json

import pytest

import cellvim
from cellvim.cli import main
from cellvim.models.registry import load_checkpoint

QUICK = [
    "--epochs", "1", "--data.crop_size", "16", "--data.margin", "0", "--data.val", "0.25", "--data.test", "0.25",
    "--model.changes", "{depth: 2, embed_dim: 16}", "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def test_a_plate_and_a_column_become_a_model_that_embeds(labelled_plate, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", str(labelled_plate), "--label", "compound", "--output", str(output), *QUICK]) == 0
    assert "Next: cellvim embed" in capsys.readouterr().out
    model = load_checkpoint(output / "model.safetensors")
    assert model.is_trained
    assert model.config.channel_names == ("DNA", "GFP")  # the plate's Hoechst stains DNA
    assert model.card["class_names"] == ["DMSO", "drug"]
    assert model.card["crop_px"] == model.config.image_size == 16
    assert model.card["pixel_size_um"] == 0.5
    assert model.card["intensity"]["method"] == "percentile"
    metrics = json.loads((output / "metrics.json").read_text())
    assert {"test_accuracy", "test_macro_f1", "val_weighted_f1"} <= metrics.keys()
    assert set(metrics["accuracy_by_channels"]) == {"1", "2"}
    for name in ("curves.png", "curves.json", "channels.csv", "config.yaml", "checkpoints/last.ckpt"):
        assert (output / name).stat().st_size > 0, name
    assert list(output.glob("logs/csv/*/metrics.csv")) and list(output.glob("logs/tensorboard/*/events*"))
    adata = cellvim.embed(labelled_plate, model=output / "model.safetensors", wells=["A01"])
    assert adata.shape[1] == 16

    assert main(["train", str(labelled_plate), "--label", "compound", "--output", str(output), *QUICK]) == 2
    assert "already contains a training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("compund", "has no column 'compund'; it has compound, constant, few, own"),
        ("constant", "is 'all' everywhere; expected at least two classes"),
        ("own", "lies in one well only"),
        ("few", "lies in one well only"),
    ],
)
def test_unusable_labels_raise_before_anything_is_written(labelled_plate, tmp_path, capsys, label, message):
    output = tmp_path / "run"
    assert main(["train", str(labelled_plate), "--label", label, "--output", str(output), *QUICK]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not output.exists()


def test_too_few_wells_raise(labelled_plate, tmp_path, capsys):
    arguments = ["train", str(labelled_plate), "--label", "compound", "--output", str(tmp_path / "run"), *QUICK]
    assert main([*arguments, "--data.wells", "[A01, A02]"]) == 2
    assert "2 wells; a split by well requires at least 3" in " ".join(capsys.readouterr().err.split())


def test_help_and_the_list_of_recipes(capsys):
    assert main(["train"]) == 0
    assert "cellvim train PLATE.zarr --label" in capsys.readouterr().out
    assert main(["train", "--list"]) == 0
    assert "jumpcp_fastchannelvim_s16 " in capsys.readouterr().out


def test_shipped_models_are_trained_and_have_cards(capsys):
    from cellvim.models.checkpoints import model_card, shipped_models

    assert len(shipped_models()) == 2
    assert sum(path.stat().st_size for path in shipped_models().values()) < 15e6
    for name, path in shipped_models().items():
        model = load_checkpoint(path)
        assert model.is_trained
        assert model.config.channel_names
        for about in ("licence", "performance", "Limitations"):
            assert about in model_card(name), about
        assert main(["models", name]) == 0
        assert name in capsys.readouterr().out


def test_a_shipped_model_is_found_by_name(labelled_plate):
    adata = cellvim.embed(labelled_plate, model="fastchannelvim_multichannel", wells=["A01"])
    assert adata.uns["cellvim"]["weights"]["trained"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.channels", "[DNA, Mito]"], "Channel 'Mito' is not in labelled.zarr; it has Hoechst, GFP"),
        (["--data.wells", "[A01, H12]"], "has no well H12; it has A01"),
        (["--data.classes", "[DMSO, nothing]"], "Label 'compound' of labelled.zarr has no value nothing"),
        (["--data.split", "wel"], "no split by 'wel'"),
        (["--data.val", "1.5"], "val is 1.5 and test 0.25; expected fractions"),
        (["--data.crop_size", "4000"], "The crop is 4000 pixels, but the fields are 128 x 128"),
        (["--epochs", "0"], "The training has no steps"),
        (["--model.weights", "nowhere.safetensors"], "no weights nowhere.safetensors"),
        (["--trainer.devices", "0"], "devices='0'"),
        (["--resume"], "no checkpoint"),
    ],
)
def test_invalid_options_raise_before_any_crop_is_cut(labelled_plate, tmp_path, capsys, options, message, monkeypatch):
    from cellvim.train.plates import PlateCrops

    monkeypatch.setattr(PlateCrops, "_cut", None)
    output = tmp_path / "run"
    assert main(["train", str(labelled_plate), "--label", "compound", "--output", str(output), *QUICK, *options]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not output.exists()


def test_plates_without_cells_raise_and_unreadable_fields_give_a_warning(tmp_path, capsys, labelled_plate):
    import shutil

    import numpy as np
    from synthetic_plate import break_chunk, write_plate

    wells = [f"A{i:02d}" for i in range(1, 7)]
    labels = {well: {"compound": "ab"[i % 2]} for i, well in enumerate(wells)}
    dark = {well: [np.full((2, 64, 64), 200, np.uint16)] for well in wells}
    empty = write_plate(tmp_path / "empty.zarr", dark, ["DNA", "GFP"], plate_map=labels)
    arguments = ["--label", "compound", "--output", str(tmp_path / "run"), *QUICK]
    assert main(["train", str(empty), *arguments]) == 2
    assert "No cell was found in empty.zarr" in " ".join(capsys.readouterr().err.split())
    broken = tmp_path / "broken.zarr"
    shutil.copytree(labelled_plate, broken)
    break_chunk(broken, "A01")
    assert main(["train", str(broken), *arguments]) == 0  # the other fields are used
    assert "Warning: 1 of 12 fields of" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_an_unreadable_crop_is_named(crop_folder, tmp_path, capsys, lazy):
    import shutil

    folder = tmp_path / "crops"
    shutil.copytree(crop_folder, folder)
    (folder / "small" / "P1_2.tif").write_bytes(b"no image")
    arguments = [
        "--data.folder",
        str(folder),
        "--data.pattern",
        r"(?P<Metadata_Plate>P\d)_",
        "--data.channels",
        "[DNA]",
    ]
    options = [o for o in QUICK if o not in ("--data.margin", "0")]
    assert main(["train", "crops", *arguments, "--output", str(tmp_path / "run"), *options, f"--data.lazy={lazy}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "P1_2.tif cannot be read (not a TIFF file" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [}", "is not valid YAML, line 1"), ("", "is not a configuration"), ("nothing: 3", "no option 'nothing'")],
)
def test_invalid_configurations_raise(tmp_path, capsys, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["train", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_crops_that_exceed_the_memory_raise(crop_folder, monkeypatch):
    from cellvim.errors import InputError
    from cellvim.train import folders

    monkeypatch.setattr(folders.os, "sysconf", {"SC_PHYS_PAGES": 2, "SC_PAGE_SIZE": 4096}.get)
    with pytest.raises(InputError, match=r"The 32 crops need .* GB of memory.*--data\.lazy true"):
        folders.read_crops(folders.find_crops(crop_folder)["path"])


def test_the_summary_lists_channels_classes_and_split():
    import pandas as pd

    from cellvim.train.batches import DataDescription, TrainingData

    class Wells(TrainingData):
        label = "Metadata_compound"

        def read(self):
            self.table = pd.DataFrame(
                {
                    "Metadata_Plate": "P",
                    "Metadata_Well": [f"A{i:02d}" for i in range(1, 11) for _ in range(3)],
                    "label": [name for name in ("dmso", "drug") for _ in range(3)] * 5,
                }
            )
            self.description = DataDescription(channel_names=("DNA", "GFP"), class_names=("dmso", "drug"), crop_px=48)

    data = Wells(batch_size=4, split="well", val=0.2, test=0.2, seed=0)
    data.read()
    description, data.description = data.description, None
    data.read = lambda: setattr(data, "description", description)
    data.setup()
    lines = data.summary().splitlines()
    counts = {part: len(rows) for part, rows in data.rows.items()}
    dmso, drug = ((data.table["label"].iloc[data.rows["train"]] == name).sum() for name in ("dmso", "drug"))
    assert lines == [
        "Channels: DNA, GFP; crops of 48 x 48 pixels.",
        f"Classes (Metadata_compound), with their training crops: dmso {dmso}, drug {drug}.",
        f"Split by well: {counts['train']} crops from {counts['train'] // 3} wells for training, {counts['val']} crops "
        f"from {counts['val'] // 3} wells for validation, {counts['test']} crops from {counts['test'] // 3} wells for "
        "test.",
    ]
