"""`cellvim train` on a user's own plate, from the plate to an embedding with the trained model."""

from __future__ import annotations

import json

import pytest

import cellvim
from cellvim.cli import main
from cellvim.models.weights import load_checkpoint

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
    assert model.config.channel_names == ("DNA", "GFP")  # the stain that the plate's Hoechst is
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
    assert "holds a training already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("compund", "has no column 'compund'; it has compound, constant, few, own"),
        ("constant", "is 'all' everywhere; expected at least two classes"),
        ("own", "lies in one well only"),
        ("few", "lies in one well only"),
    ],
)
def test_labels_that_cannot_be_learned_are_told(labelled_plate, tmp_path, capsys, label, message):
    output = tmp_path / "run"
    assert main(["train", str(labelled_plate), "--label", label, "--output", str(output), *QUICK]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
    assert not output.exists()


def test_too_few_wells_are_told(labelled_plate, tmp_path, capsys):
    arguments = ["train", str(labelled_plate), "--label", "compound", "--output", str(tmp_path / "run"), *QUICK]
    assert main([*arguments, "--data.wells", "[A01, A02]"]) == 2
    assert "2 wells; a split by well needs at least 3" in " ".join(capsys.readouterr().err.split())


def test_help_and_the_list_of_recipes(capsys):
    assert main(["train"]) == 0
    assert "cellvim train PLATE.zarr --label" in capsys.readouterr().out
    assert main(["train", "--list"]) == 0
    assert "jumpcp_fastchannelvim_s16 " in capsys.readouterr().out


def test_the_models_that_come_along_are_trained_and_have_cards(capsys):
    from cellvim.models.shipped import model_card, shipped_models

    assert len(shipped_models()) == 2
    assert sum(path.stat().st_size for path in shipped_models().values()) < 15e6
    for name, path in shipped_models().items():
        model = load_checkpoint(path)
        assert model.is_trained
        assert model.config.channel_names
        for about in ("licence", "figures", "Limits"):
            assert about in model_card(name), about
        assert main(["models", name]) == 0
        assert name in capsys.readouterr().out


def test_a_shipped_model_is_found_by_name(labelled_plate):
    adata = cellvim.embed(labelled_plate, model="fastchannelvim_multichannel", wells=["A01"])
    assert adata.uns["cellvim"]["weights"]["trained"]
