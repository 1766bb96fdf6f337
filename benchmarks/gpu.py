"""How near the CUDA kernels run to the floor of one GPU, and the paper's throughput comparisons.

Rates are measured first, in the same run: a large copy in device memory (bytes read and written) and large matrix
products, on random data. The floor of a fused op is its arrays, each read and written once, over the copy rate; that of
a forward pass adds the matrix products of every block over the matrix rate. Times are medians of CUDA events; models at
inference are replayed as CUDA graphs. Every row is written as soon as it is there, a row that fails says so, and the
rest goes on.

``python -m benchmarks.gpu`` is ``python -m benchmarks.gpu`` for machines that have only PyTorch and numpy.
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

from benchmarks.gpu_models import inference, training, training_ratio
from benchmarks.gpu_ops import OPS, block_parts, op_rate, plain_parts, scan_times
from benchmarks.gpu_report import line, targets
from benchmarks.gpu_timing import Bench, machine, measure_rates
from cellvim.errors import BackendError, CellvimError
from cellvim.ops import cuda, mamba_ssm

QUICK_SECONDS = 140  # after which no further row is begun; the command then ends within three minutes
IMAGE_SIZES = (224, 512, 1024, 1536, 2048)  # Fig. 5, 8–11
_SMALL = "fastchannelvim_small_patch16"


@dataclass(frozen=True)
class Job:
    """One row of the results: its section, what it is, and the function that measures it."""

    section: str
    what: str
    measure: Callable[[Bench], dict]


def run(
    quick: bool = False,
    output: Path | None = None,
    dry_run: bool = False,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Measure every row.

    Parameters
    ----------
    quick
        Fewer repetitions, models and image sizes: under three minutes.
    output
        JSON file that is written anew after every row.
    dry_run
        Every row once, at the smallest shapes, on whatever device there is: does everything run? Times mean nothing.
    seconds
        No row is begun after so many; None for no limit, or `QUICK_SECONDS` of a quick run.
    say
        Is given a line a row.

    Returns
    -------
    dict
        ``machine``, ``rows`` (``section``, ``what``, and numbers or a ``note``) and ``targets``.

    Raises
    ------
    BackendError
        The CUDA kernels do not run here, and it is no dry run.
    """
    if not dry_run and not cuda.available():
        raise BackendError(
            f"python -m benchmarks.gpu needs the CUDA kernels: {cuda.reason()}. --dry-run runs anywhere."
        )
    start = time.monotonic()
    seconds = QUICK_SECONDS if seconds is None and quick else seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_kernels = device.type == "cuda" and cuda.available()
    bench = Bench(device, "cuda" if on_kernels else None, 0.15 if quick else 0.6, dry_run)
    torch.manual_seed(0)
    results: dict = {"machine": machine(device), "quick": quick, "dry run": dry_run, "rows": [], "targets": []}
    for job in jobs(quick):
        is_late = seconds is not None and time.monotonic() - start > seconds
        row = {"note": "left out: the time was up"} if is_late else _measure(job, bench)
        row = {"section": job.section, "what": job.what} | row | {"after s": round(time.monotonic() - start, 1)}
        results["rows"].append(row)
        results["targets"] = [] if dry_run else targets(results["rows"])
        if output is not None:
            _write(output, results)
        say(line(row))
    return results


def _measure(job: Job, bench: Bench) -> dict:
    try:
        return job.measure(bench)
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    except (RuntimeError, ValueError, MemoryError, CellvimError) as error:  # of CUDA, too; the other rows are not lost
        return {"note": f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}", "failed": True}
    finally:
        bench.free()


def _write(output: Path, results: dict) -> None:
    unfinished = output.with_name(f"{output.name}.{os.getpid()}.partial")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(output)


def jobs(quick: bool) -> Iterator[Job]:
    """All rows, those that targets hang on first."""
    yield Job("rates", "copy and matrix products", _rates)
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
    """The same without typer and rich; 0 all rows measured, 3 some failed, 2 not usable here."""
    from benchmarks.gpu_report import report

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer models and repetitions: under 3 minutes")
    parser.add_argument("--dry-run", action="store_true", help="every row once at the smallest shapes, on any device")
    parser.add_argument("--seconds", type=float, help="begin no row after so many")
    parser.add_argument("--output", "-o", type=Path, help="JSON file, written after every row")
    options = parser.parse_args(argv)
    try:
        results = run(options.quick, options.output, options.dry_run, options.seconds)
    except BackendError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(results))
    return 3 if any(row.get("failed") for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
