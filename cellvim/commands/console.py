"""What commands say and show on the terminal, and options that several of them read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellvim.errors import InputError

if TYPE_CHECKING:
    from cellvim.embedding import EmbeddingSummary

PlatePath = Annotated[str, typer.Argument(metavar="PLATE.zarr", help="An OME-Zarr plate: folder, zip file or URL.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output when it exists.")]
Control = Annotated[str, typer.Option(metavar="[COLUMN:]VALUE", help="Which rows are negative controls.")]
Batch = Annotated[str | None, typer.Option(metavar="COLUMN", help="Plates that were made together.")]


def plane_of(z: str | None) -> int | str | None:
    """Return the plane of a stack that ``--z`` names."""
    if z is not None and z != "max" and not z.isdigit():
        raise InputError(f"--z is '{z}'; expected the number of a plane, or max.")
    return int(z) if z and z.isdigit() else z


def check_file(output: Path) -> None:
    """Refuse, before any work, a file that could not be written after it."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InputError(f"The folder {folder} for the figures does not exist.")
    if output.is_dir():
        raise InputError(f"{output} is a folder; expected the name of a file for the figures.")
    if not os.access(folder, os.W_OK):
        raise InputError(f"The folder {folder} for the figures cannot be written to. Choose another --output.")


def print_summary(summary: EmbeddingSummary) -> None:
    """Print what became of an embedding, and what the user should know of it."""
    for remark in summary.remarks():
        warn(remark)
    print(summary)


def say(line: str) -> None:
    """Print a line that is no result: to where errors go."""
    print(line, file=sys.stderr)


def warn(line: str) -> None:
    """Print a warning that is not to be overlooked."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("Warning: " + line, style="bold yellow"))


@contextmanager
def remarks_shown() -> Iterator[None]:
    """Show warnings of our own as one line each, and none of the libraries'."""
    import warnings

    from cellvim.errors import CellvimWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CellvimWarning)
        yield
    for warning in caught:
        warn(" ".join(str(warning.message).split()))


def count(n: int, what: str) -> str:
    """Return ``1 field``, ``2 fields``."""
    return f"{n:,} {what}{'s' * (n != 1)}"


@contextmanager
def progress_bar(what: str, units: str) -> Iterator[Callable[..., None]]:
    """Yield a function of (done, total, rows) that moves a progress bar; nothing is shown but on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rows]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None, rows="")

        def update(done: int, total: int, rows: int | None = None) -> None:
            bar.update(task, completed=done, total=total, rows="" if rows is None else f"{rows:,} {units}")

        yield update
