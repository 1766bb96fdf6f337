"""Compare readers of local fields: CellVim's chunk decoder, zarr-python and tensorstore, in alternating runs.

Needs ``pip install tensorstore`` in addition to CellVim. The figures are in docs/architecture.md, "Decisions".

    python -m benchmarks.chunk_readers plate.zarr --repeats 15
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import tensorstore
import zarr

from cellvim.data.plate_store import plan_chunks

ZARR_SETTINGS = {
    "zarr-python": {},
    "zarr-python, 1 thread, 1 request": {"threading.max_workers": 1, "async.concurrency": 1},
    "zarr-python, 16 threads, 64 requests": {"threading.max_workers": 16, "async.concurrency": 64},
}


def main() -> None:
    """Read fields into the same memory with each reader in turn, and print the processor times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plate", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--fields", type=int, default=27)
    options = parser.parse_args()
    arrays = sorted(p.parents[3] for p in options.plate.glob("*/*/*/0/c/0/0/0"))[: options.fields]
    first = zarr.open_array(str(arrays[0]), mode="r")
    context = tensorstore.Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}})

    def own(path: Path, n: int, out: np.ndarray) -> None:
        array = plan_chunks(path, path, json.loads((path / "zarr.json").read_text()))
        array.read([(0, n), *((0, size) for size in array.shape[1:])], out)

    def with_zarr(path: Path, n: int, out: np.ndarray) -> None:
        out[:] = zarr.open_array(str(path), mode="r")[:n]

    def with_tensorstore(path: Path, n: int, out: np.ndarray) -> None:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        out[:] = tensorstore.open(spec, read=True, context=context).result()[:n].read().result()

    readers = {"CellVim": (own, {})}
    readers |= {name: (with_zarr, settings) for name, settings in ZARR_SETTINGS.items()}
    readers["tensorstore"] = (with_tensorstore, {})
    for n in (first.shape[0], 1):
        out = np.empty((n, *first.shape[1:]), first.dtype)
        processor: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(options.repeats):
            for name, (read, settings) in readers.items():
                with zarr.config.set(settings):
                    start = time.process_time()
                    for path in arrays:
                        read(path, n, out)
                    processor[name].append((time.process_time() - start) / len(arrays))
        print(f"{n} of {first.shape[0]} channels of {first.shape[1]} x {first.shape[2]} {first.dtype}")
        for name in readers:
            ratio = statistics.median(a / b for a, b in zip(processor[name], processor["CellVim"], strict=True))
            print(f"  {name:38} {1e3 * min(processor[name]):6.2f} ms per field, {ratio:.2f}x")


if __name__ == "__main__":
    main()
