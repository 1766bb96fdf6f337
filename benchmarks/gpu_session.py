"""Validate and measure the CUDA kernels on a GPU in at most seven minutes: ``python -m benchmarks.gpu_session``.

The steps run in order of importance: a smoke test of every op, the benchmark of FastChannelVim-S/16 with its ops,
correctness, Nsight Compute's counters if ``ncu`` is installed, the remaining benchmark rows, and compute-sanitizer.
Each step has a time limit, after which its whole process group is killed, and appends its rows to files in
``--output``. Run the command again to continue: finished rows are skipped.

Requires PyTorch and numpy. Uses the library that ``CELLVIM_CUDA_LIBRARY`` names, or the installed one; only without
either is it compiled with nvcc. The exit code is 0 if every step passed, 1 if not, and 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cuda_library, isolation

REPOSITORY = isolation.REPOSITORY
CHECKS, BENCHMARK, COUNTERS = "gpu_check.jsonl", "gpu.jsonl", "gpu_counters.csv"
KERNELS = "regex:add_norm|conv_pool|scan|gate"  # of the four ops


@dataclass(frozen=True)
class Step:
    """A command with a time limit in seconds."""

    name: str
    command: list[str]
    seconds: float


def steps(output: Path) -> list[Step]:
    """Return the steps in their order."""

    def check(name: str, groups: str, seconds: int) -> Step:
        options = ["--only", groups, "--examples", "8", "--seconds", str(seconds - 5), "-o", str(output / CHECKS)]
        return Step(name, [sys.executable, "-m", "benchmarks.gpu_check", *options], seconds)

    def benchmark(name: str, part: str, seconds: int) -> Step:
        options = ["--quick", "--part", part, "--seconds", str(seconds - 5), "-o", str(output / BENCHMARK)]
        return Step(name, [sys.executable, "-m", "benchmarks.gpu", *options], seconds)

    found = [
        check("smoke test", "smoke", 30),
        benchmark("benchmark of S/16", "headline", 90),
        check("correctness", "ops,determinism,batch,extremes,golden,graphs", 60),
    ]
    if ncu := shutil.which("ncu"):
        code = "from benchmarks.gpu_check import run_smoke; run_smoke()"
        counters = [ncu, "--clock-control", "none", "--csv", "--kernel-name", KERNELS, "--log-file"]
        found.append(Step("counters", [*counters, str(output / COUNTERS), sys.executable, "-c", code], 60))
    return [
        *found,
        benchmark("remaining targets", "rest", 60),
        check("memcheck", "memcheck", 60),
        check("racecheck", "racecheck", 60),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the steps, print a summary and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7, help="time limit for everything (default: 7)")
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder")
    options = parser.parse_args(argv)
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    try:
        print(f"library: {cuda_library.provide()}", flush=True)  # the steps find it through the environment
    except RuntimeError as error:
        print(f"{error}\nNothing was run.", file=sys.stderr)
        return 2
    codes = {step.name: run_step(step, deadline) for step in steps(output)}
    print(summary(output, codes))
    return int(any(code != 0 for code in codes.values()))


def run_step(step: Step, deadline: float) -> int | None:
    """Run a step and return its exit code; None if its time limit was reached or no time was left for it."""
    seconds = min(step.seconds, deadline - time.monotonic())
    print(f"\n=== {step.name}, at most {max(seconds, 0):.0f} s", flush=True)
    if seconds < 5:
        return None
    child = subprocess.Popen(step.command, cwd=REPOSITORY, start_new_session=True)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.returncode is None:
            isolation.kill_process_group(child)
            child.wait()


def summary(output: Path, codes: dict[str, int | None]) -> str:
    """Return a short table of the results in ``output``."""
    from benchmarks.gpu import results_of

    lines = ["", "=== summary"]
    lines += [f"{name}: {'time limit' if code is None else f'exit code {code}'}" for name, code in codes.items()]
    checks = [row for row in isolation.read_rows(output / CHECKS) if "what" in row]
    failed = [row for row in checks if not row.get("ok")]
    lines.append(f"checks: {len(checks) - len(failed)} of {len(checks)} passed")
    lines += [f"  FAILED {row['group']}: {row['what']} {row.get('note', '')}" for row in failed[:20]]
    results = results_of([row for row in isolation.read_rows(output / BENCHMARK) if "finished" not in row])
    lines.append(f"benchmark: {len(results['rows'])} rows on {results['machine'].get('gpu')}")
    for target in results["targets"]:
        found = "not measured" if target["found"] is None else f"{target['found']:,.2f}"
        verdict = {True: "met", False: "MISSED", None: ""}[target["met"]]
        lines.append(f"  {target['what']:<62} {target['is']} {target['target']:>8,g} {found:>14} {verdict}")
    lines += [f"  FAILED {row['what']}: {row['note']}" for row in results["rows"] if row.get("failed")]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
