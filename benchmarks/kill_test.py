"""Kill `cellvim embed` at random moments with SIGKILL, repeat the command, and compare the bytes of the output.

    python benchmarks/kill_test.py --kills 100 -o benchmarks/results/kill.json

Embeds some wells of the small real plate bundled with CellVim, with a small untrained model. Each run is forked from
a process that has loaded the modules, so that most kills occur during the work and not during the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "anndata", "zarr", "skimage.filters", "skimage.segmentation", "skimage.measure", "scipy.ndimage"]
PRELOADED += [
    "cellvim.embedding",
    "cellvim.embedding.encode",
    "cellvim.embedding.output",
    "cellvim.cli",
    "cellvim.data.cells",
]


def tree_sha256(path: Path) -> str:
    """Return one hash of all files below a folder: names and content."""
    digest = sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def run_command(arguments: list[str], errors: str) -> None:
    """Run the command line in this process and exit with its exit code; its messages are written to a file."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from cellvim.cli import main

    sys.exit(main(arguments))


def kill_often(arguments: list[str], output: Path, kills: int, *, seed: int = 0) -> dict[str, Any]:
    """Run a command that writes ``output``, then repeat it and kill it ``kills`` times.

    Returns
    -------
    dict
        ``kills``: progress at each kill; ``completed``: number of runs that finished before they were killed;
        ``equal``: whether all outputs have the same bytes; ``sha256``.
    """
    import random

    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    messages = str(output) + ".messages"

    def start() -> Any:
        process = context.Process(target=run_command, args=(arguments, messages))
        process.start()
        return process

    def finish() -> str:
        process = start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"exit code {process.exitcode}: {Path(messages).read_text()}")
        return tree_sha256(output)

    def clear() -> None:
        shutil.rmtree(output)
        for name in (".manifest.json", ".failures.csv"):
            Path(f"{output}{name}").unlink(missing_ok=True)

    finish()  # fills the caches
    clear()
    begun = time.perf_counter()
    reference = finish()
    duration = time.perf_counter() - begun
    clear()
    draw = random.Random(seed)
    found: list[str] = []
    hashes = []
    completed = 0
    while len(found) < kills:
        process = start()
        # early moments more often: less and less work remains
        process.join(duration * draw.random() * draw.choice((0.3, 1.0, 1.1)))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            found.append(_what_is_there(output))
        elif process.exitcode != 0:
            raise RuntimeError(f"exit code {process.exitcode}: {Path(messages).read_text()}")
        partial = Path(f"{output}.partial")
        if output.exists() and not partial.exists():
            completed += 1
            hashes.append(tree_sha256(output))
            clear()
    if not output.exists() or Path(f"{output}.partial").exists():
        hashes.append(finish())
    left = Path(f"{output}.partial").exists()
    return {
        "kills": found,
        "completed": completed,
        "equal": set(hashes) == {reference} and not left,
        "sha256": reference,
        "seconds_of_a_run": round(duration, 2),
    }


def _what_is_there(output: Path) -> str:
    """Return the progress of a run when it was killed."""
    partial = Path(f"{output}.partial")
    if output.exists():
        return "output complete, ledger left" if partial.exists() else "done"
    if not partial.exists():
        return "nothing"
    if any(partial.glob(".output-*")):
        return "writing the output"
    n = sum(1 for _ in partial.glob("fields-*/*/*.rows"))
    return f"{n} fields done"


def main() -> int:
    """Run the test on the bundled plate and print the results."""
    import torch

    import cellvim
    from benchmarks.timing import machine
    from cellvim.data.bundled import bundled_dataset
    from cellvim.data.importers import import_plate

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--wells", type=int, default=8, help="number of wells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plate, weights, output = (Path(folder) / name for name in ("plate.zarr", "small.safetensors", "out.zarr"))
        import_plate(bundled_dataset() / "images", plate, channel_names={"Channel1": "GFP", "Channel2": "DNA"})
        torch.manual_seed(0)
        config = cellvim.EncoderConfig(
            image_size=48, patch_size=16, in_channels=2, channel_names=("DNA", "GFP"), embed_dim=32, depth=2,
            num_classes=0,
        )  # fmt: skip
        cellvim.save_checkpoint(cellvim.Encoder(config), weights)
        wells = cellvim.open_plate(plate).wells[: options.wells]
        command = ["embed", str(plate), "-o", str(output), "--model", str(weights), "--wells", ",".join(wells)]
        result = kill_often(command, output, options.kills, seed=options.seed)
    moments: dict[str, int] = {}
    for moment in result["kills"]:
        moments[moment] = moments.get(moment, 0) + 1
    for moment, n in sorted(moments.items()):
        print(f"{n:4d} kills: {moment}")
    print(f"{len(result['kills'])} kills, {len(wells)} wells, {result['completed']} outputs completed; bytes equal: ")
    print("yes" if result["equal"] else "NO")
    if options.output:
        about = {**machine(), "kills": len(result["kills"]), "moments": moments, "wells": wells}
        about |= {k: v for k, v in result.items() if k != "kills"}
        options.output.write_text(json.dumps(about, indent=1) + "\n")
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
