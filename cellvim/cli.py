"""The command line: which commands there are, and how their errors are told. The commands are in `cellvim/commands`.

Only typer and rich are imported here, so that ``cellvim --help`` answers at once; each command imports what it runs.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from cellvim import __version__
from cellvim.commands import demo, embedding, pages, plates, profiles, training
from cellvim.commands.console import say
from cellvim.errors import CellvimError

INTERRUPTED = 130  # as shells report Ctrl-C


class _Commands(TyperGroup):
    """Commands whose errors are one clear line; anything but a `CellvimError` is a bug and keeps its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except CellvimError as error:
            say(f"Error: {' '.join(str(error).split())}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            raise typer.Exit(_interrupted(stop)) from None


app = typer.Typer(
    cls=_Commands,
    help="Microscopy plates to embeddings: OME-Zarr in, FastChannelVim, AnnData out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes 0.1 s more to appear
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 not usable, 3 done but for some fields, 130 Ctrl-C."""
    # Threads of torch and of our kernels wait for each other by spinning; for long, where other programs want the
    # processor too, and a model on the CPU is then up to ten times slower. Shorter costs nothing on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app(args=argv, prog_name="cellvim")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as stop:  # before a command ran, or after
        return _interrupted(stop)
    return 0


def _interrupted(stop: KeyboardInterrupt) -> int:
    say(str(stop) or "Interrupted: nothing unfinished bears an output's name.")
    return INTERRUPTED


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cellvim {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


app.command("import")(plates.import_command)
app.command()(plates.info)
app.command()(embedding.embed)
app.command()(embedding.status)
app.command()(profiles.profile)
app.command()(profiles.evaluate)
app.command()(pages.report)
app.command()(pages.attribute)
app.command(  # all that follows is for the training's own parser
    "train",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)(training.train_command)
app.command()(training.models)
app.command()(training.backends)
app.command()(plates.datasets)
app.command()(demo.demo)


if __name__ == "__main__":
    sys.exit(main())
