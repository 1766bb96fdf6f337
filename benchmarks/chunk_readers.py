"""Compare the readers of sharded zstd fields: CellVim's chunk decoder, zarr-python and tensorstore, in turns.

Needs ``pip install tensorstore`` in addition to CellVim; the figures are in docs/architecture.md, "Decisions".

    python -m benchmarks.chunk_readers jump.zarr --repeats 7 --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore
import zarr

from cellvim.data.plate_store import plan_chunks


def main() -> None:
    """Read every stored field with each reader, in turns, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plate", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="threads that each read one field at a time")
    options = parser.parse_args()
    arrays = sorted(p.parent.parent.parent.parent for p in options.plate.glob("*/*/*/0/c/0/0/0"))
    context = {"data_copy_concurrency": {"limit": options.threads}, "file_io_concurrency": {"limit": options.threads}}
    shared = tensorstore.Context(context)

    def own(path: Path) -> np.ndarray:
        array = plan_chunks(path, path, json.loads((path / "zarr.json").read_text()))
        out = np.empty(array.shape, array.dtype)
        array.read([(0, n) for n in array.shape], out)
        return out

    def with_zarr(path: Path) -> np.ndarray:
        return zarr.open_array(str(path), mode="r")[...]

    def with_tensorstore(path: Path) -> np.ndarray:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        return tensorstore.open(spec, read=True, context=shared).result().read().result()

    def read_all(read: Callable[[Path], np.ndarray]) -> None:
        with ThreadPoolExecutor(options.threads) as pool:
            for _ in pool.map(lambda path: read(path).nbytes, arrays):
                pass

    readers = {
        "CellVim": (own, {}),
        "zarr-python": (with_zarr, {}),
        "zarr-python, 1 worker thread": (with_zarr, {"threading.max_workers": 1, "async.concurrency": 1}),
        "zarr-python, 16 worker threads": (with_zarr, {"threading.max_workers": 16, "async.concurrency": 64}),
        "tensorstore": (with_tensorstore, {}),
    }
    for read, _ in readers.values():
        assert np.array_equal(read(arrays[0]), own(arrays[0]))
    wall: dict[str, list[float]] = {name: [] for name in readers}
    processor: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.repeats):
        for name, (read, config) in readers.items():
            with zarr.config.set(config):
                start = time.perf_counter(), time.process_time()
                read_all(read)
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    for name in readers:
        ratios = [a / b for a, b in zip(wall[name], wall["CellVim"], strict=True)]
        print(
            f"{name:32} {len(arrays) / min(wall[name]):7.1f} fields/s  time {statistics.median(ratios):.2f}x "
            f"({min(ratios):.2f}-{max(ratios):.2f})  processor {min(processor[name]) / min(processor['CellVim']):.2f}x"
        )


if __name__ == "__main__":
    main()
