"""Speed of the CUDA kernels relative to the limits of one GPU, and the throughput comparisons of the paper.

The rates of the GPU are measured first, in the same run: a large copy in device memory (bytes read and written) and
large matrix products, on random data. The floor of a fused op is the time to read and write each of its arrays once at
the copy rate; the floor of a forward pass adds the matrix products of every block at the matrix rate. Times are medians
of CUDA events; models at inference are replayed as CUDA graphs.

Every group of rows runs in its own process, so that a crash costs one row (see `benchmarks.isolation`). Rows are
appended to a file of JSON lines; a repeated run continues. Requires only PyTorch, numpy and CellVim's CUDA library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import isolation
from benchmarks.gpu_models import inference, training, training_ratio
from benchmarks.gpu_ops import OPS, block_parts, op_rate, plain_parts, scan_times
from benchmarks.gpu_report import line, targets
from benchmarks.gpu_timing import Bench, machine, measure_rates
from cellvim.errors import BackendError
from cellvim.ops import cuda, mamba_ssm

QUICK_SECONDS = 140  # time limit of --quick
IMAGE_SIZES = (224, 512, 1024, 1536, 2048)  # Fig. 5, 8-11
PARTS = ("all", "headline", "rest")
_SMALL = "fastchannelvim_small_patch16"
_RATES = "CELLVIM_BENCHMARK_RATES"  # environment variable of the child processes: the rates of the GPU


@dataclass(frozen=True)
class Job:
    """One row of the results: its section, its name, and the function that measures it."""

    section: str
    what: str
    measure: Callable[[Bench], dict]


def open_bench(quick: bool, dry_run: bool) -> Bench:
    """Return the device and the settings of the measurements.

    Raises
    ------
    BackendError
        The CUDA kernels do not run here, and this is not a dry run.
    """
    if not dry_run and not cuda.available():
        raise BackendError(f"This benchmark needs the CUDA kernels: {cuda.reason()}. --dry-run runs anywhere.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_kernels = device.type == "cuda" and cuda.available()
    bench = Bench(device, "cuda" if on_kernels else None, 0.15 if quick else 0.6, dry_run)
    bench.rates.update(json.loads(os.environ.get(_RATES, "{}")))
    return bench


def measure(job: Job, bench: Bench) -> dict:
    """Return the row of one job. A row that does not fit into memory has a note; other errors are raised."""
    torch.manual_seed(0)
    try:
        return {"section": job.section, "what": job.what} | job.measure(bench)
    except torch.OutOfMemoryError:
        return {"section": job.section, "what": job.what, "note": "out of memory"}
    finally:
        bench.free()


def run(
    quick: bool,
    output: Path,
    *,
    part: str = "all",
    dry_run: bool = False,
    seconds: float = 3600,
    say: Callable[[str], None] = print,
) -> dict:
    """Measure every row in child processes and append it to a file.

    Parameters
    ----------
    quick
        Fewer repetitions, models and image sizes.
    output
        File of JSON lines. Rows that it contains are not measured again.
    part
        "headline": one model with its ops and a block of it. "rest": all other rows. "all": both.
    dry_run
        Run every row once at the smallest shapes, on any device. Times are meaningless.
    seconds
        Time limit; the remaining rows are left out.
    say
        Called with a line of text for each row.

    Returns
    -------
    dict
        ``machine``, ``rows`` and ``targets``.

    Raises
    ------
    BackendError
        The CUDA kernels do not run here, and this is not a dry run.
    """
    start = time.monotonic()
    bench = open_bench(quick, dry_run)
    if not any("machine" in row for row in isolation.read_rows(output)):
        about = {"machine": machine(bench.device), "quick": quick, "dry run": dry_run}
        isolation.append_row(output, about)
    options = ["--quick"] * quick + ["--dry-run"] * dry_run + ["--part", part, "--child"]
    command = [sys.executable, "-m", "benchmarks.gpu", *options]

    def show(group: str, row: dict) -> None:
        say(line({"section": group} | row))

    def record(tasks: list[tuple[str, str]]) -> list[dict]:
        left = seconds - (time.monotonic() - start)
        return isolation.record(command, tasks, output, seconds=left, say=show)

    tasks = [(job.section, job.what) for job in jobs(quick, part)]
    rows = record(tasks[:1])  # the rates, which all other rows need
    rates = next((row for row in rows if row.get("section") == "rates"), {})
    os.environ[_RATES] = json.dumps({name: value for name, value in rates.items() if isinstance(value, float)})
    return results_of(record(tasks))


def results_of(rows: list[dict]) -> dict:
    """Return the machine, the rows and the targets of the rows of a file."""
    about = next((row for row in rows if "machine" in row), {"machine": {}, "quick": False, "dry run": False})
    measured = [{"section": row.get("group")} | row for row in rows if "machine" not in row]
    return {**about, "rows": measured, "targets": [] if about["dry run"] else targets(measured)}


def jobs(quick: bool, part: str = "all") -> list[Job]:
    """Return the rows, those with targets first; the first row measures the rates of the GPU."""
    rates = Job("rates", "copy and matrix products", _rates)
    headline = [job for job in _all_jobs(quick) if _is_headline(job)]
    rest = [job for job in _all_jobs(quick) if not _is_headline(job)]
    return [rates, *({"all": headline + rest, "headline": headline, "rest": rest}[part])]


def _is_headline(job: Job) -> bool:
    """Whether a row belongs to FastChannelVim-S/16 in bfloat16: the model, its ops and its block."""
    in_bfloat16 = "bfloat16" in job.what and "transposed" not in job.what
    if job.section == "inference":
        return job.what == f"{_SMALL}, 224 px, bfloat16"
    return in_bfloat16 and (job.section == "ops" or job.what == f"block of {_SMALL}, 224 px, bfloat16")


def _all_jobs(quick: bool) -> Iterator[Job]:
    yield from _target_jobs(quick)
    if quick:
        yield from _op_jobs(("bfloat16",))
        yield from _image_jobs("bfloat16", (2048, 1024))
        yield from _precision_jobs((_SMALL, "fastvim_tiny_patch16"))
        yield from _scan_jobs(((14, 128), (128, 128)))
        return
    yield from _op_jobs(("bfloat16", "float32"))
    for precision in ("bfloat16", "float32"):
        yield from _channel_jobs(precision)
        yield from _image_jobs(precision, IMAGE_SIZES)
    yield from _precision_jobs((_SMALL, "fastvim_tiny_patch16", "vim_tiny_patch16", "vit_tiny_patch16"))
    yield from _kernel_jobs()
    yield from _scan_jobs(((14, 128), (32, 128), (64, 128), (128, 128), (196, 128), (1024, 32), (4096, 8), (16384, 4)))
    yield from _training_jobs()


def _rates(bench: Bench) -> dict:
    bench.rates.update(measure_rates(bench))
    return dict(bench.rates)


def _inference_job(name: str, side: int, batch: int, precision: str, section: str = "inference") -> Job:
    return Job(section, f"{name}, {side} px, {precision}", partial(_infer, name, side, batch, precision))


def _infer(name: str, side: int, batch: int, precision: str, bench: Bench) -> dict:
    return inference(bench, name, side, batch, precision)


def _target_jobs(quick: bool) -> Iterator[Job]:
    for name, side, batch in (
        (_SMALL, 224, 64),
        ("fastchannelvim_small_patch8", 224, 16),
        ("fastvim_tiny_patch16", 224, 1024),
        ("channelvit_small_patch16", 224, 64),
        ("channelvit_small_patch8", 224, 16),
    ):
        yield _inference_job(name, side, batch, "bfloat16")
    block = "block of fastvim_tiny_patch16, 2048 px, float32 (Table 23)"
    yield Job("breakdown", block, lambda bench: block_parts(bench, "fastvim_tiny_patch16", 2048, 128, "float32"))
    yield Job(
        "breakdown",
        "pool, repeat and skip of it as plain PyTorch",
        lambda bench: plain_parts(bench, "fastvim_tiny_patch16", 2048, 128),
    )
    for name, side, batch in (
        (_SMALL, 224, 64),
        ("fastchannelvim_small_patch8", 224, 16),
        ("fastvim_tiny_patch16", 224, 1024),
    ):
        what = f"block of {name}, {side} px, bfloat16"
        yield Job("breakdown", what, partial(_block, name, side, batch))
    yield Job(
        "training",
        f"{_SMALL}, 224 px, bfloat16, against plain PyTorch",
        lambda bench: training_ratio(bench, _SMALL, 224, 16),
    )
    if quick:
        yield _inference_job("fastchannelvim_tiny_patch16", 224, 128, "bfloat16")
        yield _inference_job("channelvim_small_patch16", 224, 64, "bfloat16")
        yield from _image_jobs("bfloat16", (224,), without=("fastvim",))


def _block(name: str, side: int, batch: int, bench: Bench) -> dict:
    return block_parts(bench, name, side, batch, "bfloat16")


def _op_jobs(precisions: tuple[str, ...]) -> Iterator[Job]:
    """The ops of FastChannelVim-S/16, batch 64; the odd block's grid is transposed."""
    for precision in precisions:
        for block in (0, 1):
            for op in OPS:
                if block and op in ("add_norm", "pooled_scan"):
                    continue  # they do not see the grid
                what = f"{op}, {precision}{', transposed grid' if block else ''}"
                yield Job("ops", what, partial(_op, op, precision, block))


def _op(op: str, precision: str, block: int, bench: Bench) -> dict:
    return op_rate(bench, op, _SMALL, 224, 64, precision, block)


def _channel_jobs(precision: str) -> Iterator[Job]:
    """Models of one token a patch and channel, 8 channels, but those that targets hang on: they have been measured."""
    for name, batch in (
        (_SMALL, 64),
        ("fastchannelvim_small_patch8", 16),
        ("fastchannelvim_tiny_patch16", 128),
        ("channelvim_small_patch16", 64),
        ("channelvim_small_patch8", 16),
        ("channelvit_small_patch16", 64),
        ("channelvit_small_patch8", 16),
    ):
        is_measured = precision == "bfloat16" and name.startswith(("fastchannelvim_small", "channelvit_small"))
        if not is_measured:
            yield _inference_job(name, 224, batch, precision)


def _image_jobs(precision: str, sides: tuple[int, ...], without: tuple[str, ...] = ()) -> Iterator[Job]:
    """Models of one token a patch against the image's side (Fig. 5, 8–11), and by size at 224 px."""
    for side in sides:
        for family in ("fastvim", "vim", "vit"):
            is_measured = precision == "bfloat16" and family == "fastvim" and side == 224
            if family not in without and not is_measured:
                yield _inference_job(f"{family}_tiny_patch16", side, max(4, 1024 * 224**2 // side**2), precision)
    if sides == IMAGE_SIZES:
        for size, batch in (("small", 512), ("base", 256)):
            for family in ("fastvim", "vim", "vit"):
                yield _inference_job(f"{family}_{size}_patch16", 224, batch, precision)


def _precision_jobs(names: tuple[str, ...]) -> Iterator[Job]:
    """The same model and batch in each precision (Table 24)."""
    for name in names:
        batch = 64 if "channel" in name else 512
        for precision in ("float32", "tf32", "float16", "bfloat16"):
            yield _inference_job(name, 224, batch, precision, "precision")


def _kernel_jobs() -> Iterator[Job]:
    """The same model with the scan, or all ops, of others (Table 22)."""
    for side, batch in ((224, 512), (512, 128), (1024, 32), (2048, 8)):
        for label, backend in (("our kernels", None), ("mamba-ssm's scan", "mamba_ssm"), ("plain ops", "reference")):
            if backend == "mamba_ssm" and not mamba_ssm.available():
                continue
            for precision in ("float32", "bfloat16"):
                what = f"fastvim_tiny_patch16, {side} px, {precision}: {label}"
                yield Job("kernels", what, partial(_kernel, side, batch, precision, backend))


def _kernel(side: int, batch: int, precision: str, backend: str | None, bench: Bench) -> dict:
    return inference(bench, "fastvim_tiny_patch16", side, batch, precision, backend)


def _scan_jobs(shapes: tuple[tuple[int, int], ...]) -> Iterator[Job]:
    """The scan alone, by its number of steps: pooled, 14 to 128; unpooled, 196 to 16,384."""
    for steps, batch in shapes:
        for precision in ("float32", "bfloat16"):
            what = f"scan of {steps} steps, E = 384, {precision}"
            yield Job("scan", what, partial(_scan, steps, batch, precision))


def _scan(steps: int, batch: int, precision: str, bench: Bench) -> dict:
    return scan_times(bench, steps, batch, 384, precision)


def _training_jobs() -> Iterator[Job]:
    for name, batch in (
        (_SMALL, 32),
        ("fastchannelvim_small_patch8", 8),
        ("channelvim_small_patch16", 32),
        ("channelvit_small_patch16", 32),
        ("channelvit_small_patch8", 8),
        ("fastvim_tiny_patch16", 512),
        ("vim_tiny_patch16", 512),
        ("vit_tiny_patch16", 512),
    ):
        for precision in ("bfloat16", "float32"):
            yield Job("training", f"{name}, 224 px, {precision}", partial(_train, name, batch, precision))


def _train(name: str, batch: int, precision: str, bench: Bench) -> dict:
    return training(bench, name, 224, batch, precision)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and return the exit code: 0 if all rows were measured, 3 if some failed, 2 if not usable here."""
    from benchmarks.gpu_report import report

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer models and repetitions: under 3 minutes")
    parser.add_argument("--part", choices=PARTS, default="all", help="headline: one model, its ops and a block")
    parser.add_argument("--dry-run", action="store_true", help="run every row once, at the smallest shapes")
    parser.add_argument("--seconds", type=float, help="time limit")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.jsonl"), help="JSON lines")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else 3600)
    try:
        if options.child:
            run_child(options.quick, options.part, options.dry_run, *options.child)
            return 0
        results = run(options.quick, options.output, part=options.part, dry_run=options.dry_run, seconds=seconds)
    except BackendError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(results))
    return 3 if any(row.get("failed") for row in results["rows"]) else 0


def run_child(quick: bool, part: str, dry_run: bool, first: int, last: int) -> None:
    """Measure some rows in this process for the parent process."""
    bench = open_bench(quick, dry_run)

    def is_usable() -> bool:
        try:
            return not bench.on_gpu or torch.cuda.synchronize() is None
        except RuntimeError:
            return False

    def task(job: Job) -> isolation.Task:
        return isolation.Task(job.section, job.what, lambda: [measure(job, bench)])

    isolation.run_tasks([task(job) for job in jobs(quick, part)[first:last]], is_usable)


if __name__ == "__main__":
    sys.exit(main())
