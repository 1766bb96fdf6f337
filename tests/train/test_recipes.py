"""Recipes contain the published values; errors of the command line are one line."""

from __future__ import annotations

import json

import pytest

from cellvim.errors import CellvimError
from cellvim.models.registry import model_config
from cellvim.train.recipes import parse_command_line, recipe_descriptions, recipe_settings

# Independent of the recipes: the tables of the paper and the published configurations.
JUMP = {
    "lr": 1e-3, "lr_batch": 256, "warmup_epochs": 10, "final_lr": 1e-6, "weight_decay": 0.04,
    "final_weight_decay": 0.4, "optimizer": "adamw", "max_epochs": 100, "batch_size": 256, "crop_size": 224,
    "pad_to": 256, "flips": True, "quarter_turns": True, "label_smoothing": 0.0, "drop_path_rate": 0.05,
    "mixup": None, "ema": None,
}  # fmt: skip
IMAGENET = {
    "lr": 1e-3, "lr_batch": 512, "weight_decay": 0.05, "max_epochs": 300, "batch_size": 1024, "crop_size": 224,
    "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "rand_augment": 2, "erasing": 0.25, "ema": 0.9999,
}  # fmt: skip
MAE = {
    "lr": 1.5e-4, "lr_batch": 256, "warmup_epochs": 40, "max_epochs": 1600, "betas": [0.9, 0.95], "mask_ratio": 0.75,
    "decoder_dim": 512, "decoder_depth": 2, "norm_pixels": True,
}  # fmt: skip
FINETUNE = {"drop_path_rate": 0.3, "pool_scale": 0.25}
HCS = {"channel_sampling": "sorted"}
EXPECTED = {
    **{f"jumpcp_fastchannelvim_s{p}{suffix}": JUMP | HCS | {"encoder": f"fastchannelvim_small_patch{p}"} | change
       for p in (16, 8)
       for suffix, change in (("", {"pool": "mean"}), ("_max", {"pool": "max"}), ("_attention", {"pool": "attention"}),
                              ("_2d", {"pool": "mean", "pool_axes": 2}))},
    **{f"jumpcp_channelvim_s{p}": JUMP | HCS | {"encoder": f"channelvim_small_patch{p}"} for p in (16, 8)},
    **{f"jumpcp_channelvit_s{p}": JUMP | HCS | {"encoder": f"channelvit_small_patch{p}"} for p in (16, 8)},
    **{f"jumpcp_vit_s{p}": JUMP | {"encoder": f"vit_small_patch{p}"} for p in (16, 8)},
    **{f"imagenet_fastvim_{s}": IMAGENET | {"encoder": f"fastvim_{s}_patch16", "drop_path_rate": rate}
       for s, rate in (("tiny", 0.05), ("small", 0.05), ("base", 0.4))},
    "imagenet_vim_base": IMAGENET | {"encoder": "vim_base_patch16", "drop_path_rate": 0.4, "ssm_norm": "layer"},
    **{f"mae_{s}": MAE | {"encoder": f"fastmaskvim_{s}_patch{p}"}
       for s, p in (("base", 16), ("large", 16), ("huge", 14))},
    **{f"finetune_{s}": FINETUNE | {"layer_decay": decay}
       for s, decay in (("base", 0.65), ("large", 0.75), ("huge", 0.75))},
    "finetune_huge_448": FINETUNE | {"layer_decay": 0.75, "gradient_clip_val": 3.0, "crop_size": 448},
    "linear_probe": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "max_epochs": 90, "pool_scale": 0.25},
}  # fmt: skip


def values(recipe: str) -> dict:
    """Return the values of a recipe by the last part of their name, which is unique in these."""
    read = recipe_settings(recipe)
    flat: dict = {}

    def visit(node):
        for key, value in node.items():
            visit(value) if isinstance(value, dict) else flat.setdefault(key, value)

    visit(read)
    callbacks = read["trainer"].get("callbacks") or []
    flat["ema"] = next((c["init_args"]["decay"] for c in callbacks if "WeightAverage" in c["class_path"]), None)
    return flat


@pytest.mark.parametrize("recipe", EXPECTED)
def test_recipes_contain_the_published_values(recipe):
    found = values(recipe)
    for name, expected in EXPECTED[recipe].items():
        assert found.get(name) == expected, name


@pytest.mark.parametrize("recipe", recipe_descriptions())
def test_recipes_use_existing_models(recipe):
    found = recipe_settings(recipe)["model"]["init_args"]
    model_config(found["encoder"], **found["changes"])


def test_there_are_thirty_described_recipes():
    assert len(recipe_descriptions()) == 30
    assert all(len(description) > 20 for description in recipe_descriptions().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "no recipe or file 'nosuch'"),
        (["nosuch.yaml"], r"no configuration nosuch\.yaml"),
        ([], "Nothing to train"),
        (["plate", "--output"], "--output needs a value"),
    ],
)
def test_missing_files_and_values_raise(arguments, message):
    with pytest.raises(CellvimError, match=message):
        parse_command_line(arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.encodr", "x"], r"no option 'encodr'\. Did you mean encoder"),
        (["--data.bach_size", "2"], r"no option 'bach_size'\. Did you mean batch_size"),
        (["--model.augmentation.flip", "true"], r"no option 'flip'\. Did you mean flips"),
        (["--trainer.max_epochs", "ten"], r"trainer\.max_epochs: Expected a int; found ten"),
        (["--model.optimization.lr", "-1"], r"optimization\.lr is -1\.0"),
        (["--model.encoder", "fastvim_tin_patch8"], "Model 'fastvim_tin_patch8' is unknown"),
        (["--modl", "x"], "no option '--modl'"),
    ],
)
def test_invalid_options_raise_one_line(options, message, tmp_path):
    from cellvim.train.training import train

    with pytest.raises(CellvimError, match=message) as caught:
        train(["plate", "--data.plates", "[a.zarr]", "--output", str(tmp_path / "run"), *options])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_recipe_takes_precedence_over_a_folder_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "crops").mkdir()
    command = parse_command_line(["crops"])
    assert command.name == "crops" and json.loads(command.options[1]) == recipe_settings("crops")
    assert "--data.plates" in parse_command_line(["./crops"]).options
