"""How `cellvim train` is used, and the recipes that there are; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from cellvim.errors import InputError, listing, suggestion

RECIPES = Path(__file__).parent / "recipes"
PLATE_RECIPE = "plate"
SHORT_OPTIONS = ("--output", "--resume", "--label", "--epochs", "--print_config", "--list", "--help_all")
USAGE = """Usage: cellvim train RECIPE | CONFIG.yaml | PLATE.zarr [OPTIONS]

  cellvim train PLATE.zarr --label Metadata_pert_type      your own plate, wells held out
  cellvim train jumpcp_fastchannelvim_s16 --data.plates '[a.zarr, b.zarr]' --data.label Metadata_JCP2022
  cellvim train --config my.yaml --trainer.max_epochs 5    any value of a configuration can be given

Options:
  --output FOLDER    where model.safetensors, curves.png, metrics.json and checkpoints go [runs/RECIPE]
  --resume [PATH]    go on from a checkpoint: that of the output folder by default
  --label COLUMN     of the plate map: what to tell apart (--data.label) [Metadata_pert_type]
  --epochs N         length of the training (--trainer.max_epochs)
  --print_config     print the whole configuration, to save and change
  --list             list the recipes
  --help_all         every option; --model.help CLASS and --data.help CLASS say more
"""


def recipe_names() -> list[str]:
    """Return the names of the recipes."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe.

    Raises
    ------
    InputError
        There is no such recipe.
    """
    if name not in recipe_names():
        raise InputError(
            f"There is no recipe or file '{name}'.{suggestion(name, recipe_names())} A plate ends in .zarr, a "
            f"configuration in .yaml; recipes are {listing(recipe_names(), 30)}."
        )
    return RECIPES / f"{name}.yaml"


def describe_recipes() -> list[tuple[str, str]]:
    """Return each recipe's name and its first line, which says what it is."""
    return [(n, (RECIPES / f"{n}.yaml").read_text().splitlines()[0].lstrip("# ")) for n in recipe_names()]
