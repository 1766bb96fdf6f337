"""The main job on a small real plate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cellvim.commands.console import progress_bar, warn


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what the demo makes.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew when the folder exists.")] = False,
) -> None:
    """Run the main job on a small real plate: import, embed, look at the result."""
    from cellvim.demo import run_demo

    run_demo(output, overwrite=overwrite, say=print, warn=warn, progress=progress_bar)
