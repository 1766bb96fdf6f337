"""Timing on a GPU, and the rates of that GPU as the reference for all other measurements.

Kernels of a few hundredths of a millisecond finish before Python has launched the next one. Several calls are
therefore enqueued while the GPU waits, so that the time between two events is that of the GPU only.
"""

from __future__ import annotations

import gc
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

import cellvim
from cellvim import ops

PRECISIONS = {  # autocast, and the precision of float32 matrix products
    "float32": (None, "highest"),
    "tf32": (None, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
}
_CALLS = 10  # enqueued together
_WAIT_CYCLES = 20_000_000  # about 10 ms, in which the CPU enqueues them
_MOST_ROUNDS = 30


@dataclass
class Bench:
    """Device, precision and duration of the measurements, and the measured rates."""

    device: torch.device
    backend: str | None = "cuda"  # None: the default
    seconds: float = 0.5  # per measurement
    is_dry: bool = False  # run everything once, at the smallest shapes, on any device
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU; anything else is a dry run."""
        return self.device.type == "cuda"

    def size(self, full: int, tiny: int) -> int:
        """``full``, or ``tiny`` in a dry run."""
        return min(full, tiny) if self.is_dry else full

    @contextmanager
    def using(self, precision: str = "float32", backend: str | None = None) -> Iterator[None]:
        """Run with a precision of `PRECISIONS`, on the given back end or that of the bench."""
        autocast, products = PRECISIONS[precision]
        backend = backend or self.backend
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(products)
        try:
            with (
                torch.autocast(self.device.type, autocast) if autocast else nullcontext(),
                ops.use_backend(backend) if backend else nullcontext(),
            ):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def free(self) -> None:
        """Release unused GPU memory."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def peak_memory(self, function: Callable[[], object]) -> float | None:
        """Return the peak of allocated memory in GB while the function ran; None without a GPU."""
        if not self.on_gpu:
            function()
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def milliseconds(self, function: Callable[[], object], calls: int = _CALLS) -> float:
        """Return the median time of a call in milliseconds.

        Parameters
        ----------
        function
            Function that enqueues work.
        calls
            Number of calls to enqueue while the GPU waits; 1 to include Python's time, as for a training step.
        """
        function()
        once = self._time(function, 1)
        if self.is_dry:
            return once
        if once > 5:  # Python's time is negligible
            calls = 1
        rounds = int(min(max(1e3 * self.seconds / (once * calls), 3), _MOST_ROUNDS))
        return statistics.median(self._time(function, calls) for _ in range(rounds))

    def _time(self, function: Callable[[], object], calls: int) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return 1e3 * (time.perf_counter() - start) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if calls > 1:
            torch.cuda._sleep(_WAIT_CYCLES)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls


def measure_rates(bench: Bench) -> dict[str, float]:
    """Measure GB/s of a copy in GPU memory (read and written), and TFLOP/s of large products of random numbers."""
    new = {"device": bench.device}
    rates = {"copy GB/s": _copy_rate(bench)}
    bench.free()
    n = bench.size(8192, 32)
    for precision, (autocast, products) in PRECISIONS.items():
        side = n if autocast or products == "high" else bench.size(4096, 32)  # plain float32 takes ten times as long
        a, b = (torch.randn(side, side, dtype=autocast or torch.float32, **new) for _ in range(2))
        with bench.using(precision):
            rates[f"{precision} TFLOP/s"] = 2 * side**3 / bench.milliseconds(lambda a=a, b=b: a @ b, 1) / 1e9
    return rates


def _copy_rate(bench: Bench) -> float:
    source = torch.randn(bench.size(2**29, 2**12), device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.milliseconds(lambda: target.copy_(source), 1) / 1e6


def machine(device: torch.device) -> dict[str, object]:
    """Describe the device and the versions that a result depends on."""
    about: dict[str, object] = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory GB": round(properties.total_memory / 1e9, 1),
            "driver, clocks, power limit": _state_of_gpu(),
        }
    return about | {
        "device": str(device),
        "cellvim": cellvim.__version__,
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
        "python": platform.python_version(),
    }


def _state_of_gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def fit_batch(bench: Bench, batch: int, measure: Callable[[int], dict]) -> dict:
    """Return ``measure(batch)`` with the batch size halved until it fits into memory; the row contains the size."""
    asked = batch = bench.size(batch, 2)
    while True:
        try:
            row = measure(batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            row = None  # release the error, whose frames hold tensors, before the next attempt
        if row is not None:
            return {"batch": batch} | row | ({} if batch == asked else {"asked for batch": asked})
        bench.free()
        if batch == 1:
            return {"batch": 1, "note": "out of memory", "asked for batch": asked}
        batch //= 2


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether memory ran out here or earlier: during a graph's capture another error follows."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
