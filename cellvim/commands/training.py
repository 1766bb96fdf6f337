"""Models: train one, list them, and what runs them here."""

from __future__ import annotations

from shlex import quote
from typing import Annotated

import typer

from cellvim.errors import InputError, ModelError, listing, suggestion


def train_command(context: typer.Context) -> None:
    """Train a model: a recipe, a configuration, or your own plate and a column of labels."""
    from cellvim.train.recipes import USAGE, recipe_descriptions

    arguments = list(context.args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if "--list" in arguments:
        for name, description in recipe_descriptions().items():
            print(f"{name:<34} {description}")
        return
    try:
        from cellvim.train.training import train
    except ModuleNotFoundError as error:
        raise InputError(f"Training needs {error.name}. Install it: pip install 'cellvim[train]'") from error
    model = train([a if a != "--help_all" else "--help" for a in arguments])
    if model is not None:
        print(f"{model}\nNext: cellvim embed PLATE.zarr -o embeddings.zarr --model {quote(str(model))}")


def models(
    family: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this family, or the card of a trained model.")
    ] = None,
) -> None:
    """List the models that can be named, with their parameters and operations."""
    from rich.console import Console
    from rich.table import Table

    from cellvim.models.checkpoints import model_card, shipped_models
    from cellvim.models.flops import count_flops, count_parameters
    from cellvim.models.registry import DESCRIPTIONS, FAMILIES, list_models, model_config

    if family in shipped_models():
        print(model_card(family))
        return
    if family is not None and family not in FAMILIES:
        raise ModelError(f"There is no family {family!r}; there are {listing(FAMILIES)}.{suggestion(family, FAMILIES)}")
    for one in FAMILIES if family is None else (family,):
        table = Table("name", title=f"{one}: {DESCRIPTIONS[one]}", title_justify="left", box=None)
        for column in ("blocks × width", "parameters", "operations"):
            table.add_column(column, justify="right")
        for name in (n for n in list_models() if n.split("_")[0] == one):
            config = model_config(name)
            table.add_row(
                name,
                f"{config.depth} × {config.embed_dim}",
                f"{count_parameters(config) / 1e6:,.1f} M",
                f"{count_flops(config)['total'] / 1e9:,.2f} G",
            )
        Console().print(table, "")
    print("Operations are of one image of 224 × 224 pixels, 3 channels or 8 with a token a channel (docs/models.md).")
    print("Any other patch size works too, as in fastvim_tiny_patch14.")
    print("These names give random weights. `cellvim embed --model PATH` takes trained ones; so does the name of one")
    print("that comes with CellVim:")
    for name, path in shipped_models().items():
        print(f"  {name}  TRAINED, {path.stat().st_size / 1e6:.1f} MB (card: cellvim models {name})")


def backends() -> None:
    """Say which back-end runs the models here, and why."""
    from cellvim.ops.dispatch import describe_backends

    for backend in describe_backends():
        state = "runs" if backend.selected else "there" if backend.available else "not there"
        print(f"{backend.name:<12} {state:<10} {backend.reason}")
