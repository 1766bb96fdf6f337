"""Kill `cellvim embed` at random moments with SIGKILL, go on with the same command, and compare the output's bytes.

    python benchmarks/kill_test.py --kills 100 -o benchmarks/results/kill.json

Runs on the small real plate that comes with CellVim, some wells of it, with a small untrained model. Each run is forked
from a process that has its modules loaded, so that most kills meet the work and not the start of Python.
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
    """Run the command line in this process, and leave with its exit code; what it says goes to a file."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from cellvim.cli import main

    sys.exit(main(arguments))


def kill_often(arguments: list[str], output: Path, kills: int, *, seed: int = 0) -> dict[str, Any]:
    """Run a command that writes ``output`` to its end, then kill it ``kills`` times on the way there again.

    Returns
    -------
    dict
        ``kills``: what was there after each; ``completed``: how often a run was through before it was killed, and a
        new one was begun; ``equal``: whether every output was the same bytes; ``sha256``.
    """
    import random

    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    said = str(output) + ".said"

    def start() -> Any:
        process = context.Process(target=run_command, args=(arguments, said))
        process.start()
        return process

    def finish() -> str:
        process = start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"exit code {process.exitcode}: {Path(said).read_text()}")
        return tree_sha256(output)

    def clear() -> None:
        shutil.rmtree(output)
        for name in (".manifest.json", ".failures.csv"):
            Path(f"{output}{name}").unlink(missing_ok=True)

    finish()  # what is cached is there for all
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
        # early moments more often: each meets less that is left to do
        process.join(duration * draw.random() * draw.choice((0.3, 1.0, 1.1)))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            found.append(_what_is_there(output))
        elif process.exitcode != 0:
            raise RuntimeError(f"exit code {process.exitcode}: {Path(said).read_text()}")
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
    """Say how far a run was when it was killed."""
    partial = Path(f"{output}.partial")
    if output.exists():
        return "named, not cleared up" if partial.exists() else "done"
    if not partial.exists():
        return "nothing yet"
    if any(partial.glob("whole-*")):
        return "rows being put together"
    n = sum(1 for _ in partial.glob("fields-*/*/*.rows"))
    return f"{n} fields done"


def main() -> int:
    """Run it on the bundled plate and print what came out."""
    import torch

    import cellvim
    from benchmarks.timing import machine
    from cellvim.data.bundled import bundled_dataset
    from cellvim.data.importers import import_plate

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--wells", type=int, default=8, help="how many of the plate's wells")
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
    print(f"{len(result['kills'])} kills, {len(wells)} wells, {result['completed']} outputs on the way; bytes equal: ")
    print("yes" if result["equal"] else "NO")
    if options.output:
        about = {**machine(), "kills": len(result["kills"]), "moments": moments, "wells": wells}
        about |= {k: v for k, v in result.items() if k != "kills"}
        options.output.write_text(json.dumps(about, indent=1) + "\n")
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
