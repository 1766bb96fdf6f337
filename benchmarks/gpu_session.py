"""The first minutes on a GPU: build, check, time. ``python -m benchmarks.gpu_session`` from the repository's root.

Needs PyTorch, numpy and nvcc (or ``CELLVIM_CUDA_LIBRARY``), and takes less than ten minutes. Each step is a process of
its own that writes what it has as it goes, so that a step that dies or runs out of time loses nothing of the others:
the library, `benchmarks.gpu_check`, ``python -m benchmarks.gpu --quick``, and compute-sanitizer if time is left.
Prints a short table and ends with 0 if all that was asked for passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

CHECK, QUICK, SANITIZER = "gpu_check.json", "gpu_quick.json", "gpu_sanitizer.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (9.5)")
    parser.add_argument("--output", "-o", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes

    from benchmarks import cuda_library

    try:
        print(f"library: {cuda_library.provide()}", flush=True)  # what follows finds it by the environment
    except RuntimeError as error:
        print(f"{error}\nNothing was run.", file=sys.stderr)
        return 2
    for file in (CHECK, QUICK, SANITIZER):  # of an earlier run
        (options.output / file).unlink(missing_ok=True)
    check = ["-m", "benchmarks.gpu_check"]
    codes = {
        "check": run_step(
            "check",
            [*check, "--examples", "8", "--no-sanitizer", "-o", options.output / CHECK],
            min(180, end - time.monotonic()),
        ),
        "bench": run_step(
            "bench",
            ["-m", "benchmarks.gpu", "--quick", "-o", options.output / QUICK],
            min(180, end - time.monotonic()),
        ),
    }
    left = end - time.monotonic()
    each = str(max((left - 20) / 2, 1))  # memcheck and racecheck
    sanitizer = [*check, "--only-sanitizer", "--sanitizer-seconds", each, "-o", options.output / SANITIZER]
    codes["sanitizer"] = run_step("sanitizer", sanitizer, left)
    print(summary(options.output, codes))
    return int(any(code != 0 for code in codes.values()))


def run_step(name: str, command: list, seconds: float) -> int | None:
    """Run a step, at most so long; its exit code, None for one that was stopped or had no time."""
    print(f"\n=== {name}, at most {max(seconds, 0):.0f} s", flush=True)
    if seconds < 5:
        return None
    try:
        return subprocess.run(
            [sys.executable, *map(str, command)], cwd=REPOSITORY, timeout=seconds, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def summary(folder: Path, codes: dict[str, int | None]) -> str:
    """A short table of what the steps have written."""
    lines = ["", "=== summary"]
    for name, file in (("check", CHECK), ("sanitizer", SANITIZER)):
        if rows := _read(folder / file).get("checks"):
            failed = [row["what"] for row in rows if not row["ok"]]
            lines.append(f"{name}: {len(rows) - len(failed)} of {len(rows)} passed, exit code {codes[name]}")
            lines += [f"  FAILED {what}" for what in failed[:20]]
        else:
            lines.append(f"{name}: nothing written, exit code {codes[name]}")
    bench = _read(folder / QUICK)
    if bench:
        lines.append(f"bench: {len(bench['rows'])} rows on {bench['machine'].get('gpu')}, exit code {codes['bench']}")
        for target in bench["targets"]:
            found = "not measured" if target["found"] is None else f"{target['found']:,.2f}"
            verdict = {True: "met", False: "MISSED", None: ""}[target["met"]]
            lines.append(f"  {target['what']:<62} {target['is']} {target['target']:>8,g} {found:>14} {verdict}")
        lines += [f"  FAILED {row['what']}: {row['note']}" for row in bench["rows"] if row.get("failed")]
    else:
        lines.append(f"bench: nothing written, exit code {codes['bench']}")
    return "\n".join(lines)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    sys.exit(main())
