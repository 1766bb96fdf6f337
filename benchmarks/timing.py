"""Compare the times of several functions, and describe the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cellvim
from cellvim.embedding.output import processor_name
from cellvim.ops import native


def fastest(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the shortest time of each function in seconds, over ``rounds`` in which they alternate.

    Alternating exposes all of them to other load on the machine; the shortest time is the least affected.
    See `clock`.
    """
    now = clock()
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()  # warm-up
    for _ in range(rounds):
        for name, function in functions.items():
            start = now()
            function()
            best[name] = min(best[name], now() - start)
    return best


def clock() -> Callable[[], float]:
    """Return the processor time with one thread, which other programs affect least; otherwise the wall time."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def machine() -> dict[str, object]:
    """Describe the processor and the versions that a result depends on."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock().__name__,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "kernels": native.reason(),
        "cellvim": cellvim.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the first line of a module's docstring as description, and the option ``--output``."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    return made


def check_output(output: Path | None) -> None:
    """Exit before the measurements if the figures cannot be written after them."""
    if output is None:
        return
    folder = output.absolute().parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        sys.exit(f"The figures cannot be written to {output}. Choose a file in an existing, writable folder.")


def write_results(results: object, output: Path | None) -> None:
    """Write the figures as JSON, if an output was given."""
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Wrote {output}")
