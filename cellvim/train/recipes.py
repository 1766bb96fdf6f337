"""Recipes and the command line of `cellvim train`; imports nothing heavy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cellvim.errors import InputError, listing, suggestion

SHORT_OPTIONS = ("--output", "--resume", "--label", "--epochs", "--print_config", "--list", "--help_all")
USAGE = """Usage: cellvim train RECIPE | CONFIG.yaml | PLATE.zarr [OPTIONS]

  cellvim train PLATE.zarr --label Metadata_pert_type      your own plate, wells held out
  cellvim train jumpcp_fastchannelvim_s16 --data.plates '[a.zarr, b.zarr]' --data.label Metadata_JCP2022
  cellvim train --config my.yaml --trainer.max_epochs 5    any setting can be overridden

Options:
  --output FOLDER    folder for model.safetensors, curves.png, metrics.json and checkpoints [runs/RECIPE]
  --resume [PATH]    resume from a checkpoint [the checkpoint in the output folder]
  --label COLUMN     plate map column with the classes (--data.label) [Metadata_pert_type]
  --epochs N         number of epochs (--trainer.max_epochs)
  --print_config     print all settings, to save and edit
  --list             list the recipes
  --help_all         list all options; --model.help CLASS and --data.help CLASS describe one class
"""


@cache
def _entries() -> dict[str, dict[str, Any]]:
    import yaml

    return yaml.safe_load((Path(__file__).parent / "recipes.yaml").read_text(encoding="utf-8"))


def recipe_descriptions() -> dict[str, str]:
    """Return the description of each recipe by its name."""
    return {name: entry["description"] for name, entry in sorted(_entries()["recipes"].items())}


def recipe_settings(name: str) -> dict[str, Any]:
    """Return the settings of a recipe, with those that it extends."""
    recipes = _entries()["recipes"]
    if name not in recipes:
        raise InputError(
            f"There is no recipe or file '{name}'.{suggestion(name, recipes)} A plate ends in .zarr, a configuration "
            f"in .yaml; the recipes are {listing(sorted(recipes), 30)}."
        )
    return _resolved(recipes[name])


def _resolved(entry: Mapping[str, Any]) -> dict[str, Any]:
    extended = entry.get("extends", [])
    settings: dict[str, Any] = {}
    for name in [extended] if isinstance(extended, str) else extended:
        settings = _merged(settings, _resolved((_entries()["bases"] | _entries()["recipes"])[name]))
    return _merged(settings, {k: v for k, v in entry.items() if k not in ("extends", "description")})


def _merged(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


@dataclass
class CommandLine:
    """Parsed arguments of `cellvim train`."""

    options: list[str]  # for the configuration parser, --config first
    name: str  # of the recipe, configuration or plate
    output: Path  # folder of the run
    resume: str | None  # checkpoint to resume from: "" for that of the output folder, None for a new training


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Expand the short forms of the command line into options of the configuration parser."""
    rest, options, name = list(arguments), [], ""
    output: str | None = None
    resume: str | None = None
    if rest and not rest[0].startswith("-"):
        first = rest.pop(0)
        if first.endswith((".yaml", ".yml")):
            rest = ["--config", first, *rest]
        elif first in recipe_descriptions():  # takes precedence over a folder of the same name
            options, name = ["--config", json.dumps(recipe_settings(first))], first
        elif first.rstrip("/").endswith((".zarr", ".zarr.zip", ".ozx")) or Path(first).is_dir():
            options = ["--config", json.dumps(recipe_settings("plate")), "--data.plates", json.dumps([first])]
            name = Path(first.rstrip("/")).name.split(".")[0]
        else:
            recipe_settings(first)  # raises
    short = {"--label": "--data.label", "--epochs": "--trainer.max_epochs"}
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option == "--resume":
            has_value = equals or (rest and not rest[0].startswith("-"))
            resume = (value if equals else rest.pop(0)) if has_value else ""
        elif option in ("--output", "-o", *short):
            if not equals and (not rest or re.match(r"-(?![0-9])", rest[0])):
                raise InputError(f"{option} needs a value.")
            value = value if equals else rest.pop(0)
            if option in short:
                options += [short[option], value]
            else:
                output = value
        else:
            options.append(option + equals + value)
            if option in ("--config", "-c"):
                path = value or (rest[0] if rest else "")
                _check_yaml(path)
                name = name or Path(path).stem
    folder = Path(output or f"runs/{name or 'training'}")
    if resume is not None and not _has_configuration(options):  # the run folder holds all that is needed to resume it
        folder = Path(resume).parent.parent if resume and output is None else folder
        if (folder / "config.yaml").is_file():
            options, name = ["--config", str(folder / "config.yaml"), *options], folder.name
    if not _has_configuration(options):
        raise InputError("Nothing to train: give a recipe, a configuration or a plate. See `cellvim train --list`.")
    return CommandLine(options, name or "training", folder, resume)


def _has_configuration(options: Sequence[str]) -> bool:
    return any(option.split("=")[0] in ("--config", "-c") for option in options)


def _check_yaml(path: str) -> None:
    """Raise for a file that is not a configuration; the parser's own message names neither file nor line."""
    import yaml

    if not Path(path).is_file():
        raise InputError(f"There is no configuration {path}.")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise InputError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(settings, dict):
        raise InputError(
            f"{path} is not a configuration; expected sections model, data and trainer. `--print_config` prints one."
        )
