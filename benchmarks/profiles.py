"""Memory and time of aggregating cells to wells, on synthetic embeddings of any number of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CELLS_PER_FIELD, FIELDS_PER_WELL, WELLS_PER_PLATE = 280, 9, 384
STATISTICS = ("mean", "median", "robust")


def run(
    rows: int = 10_000_000, width: int = 192, *, folder: str | Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Write a store of cells, aggregate it with each statistic in a separate process, and print time and memory.

    Parameters
    ----------
    rows
        Minimum number of cells; wells of 2,520 cells are written.
    width
        Number of features.
    folder
        Where to write the store, which is deleted afterwards; the system's temporary folder by default.
    say
        Called with each line of output.

    Returns
    -------
    dict
        ``rows``, ``width``, ``store_gb`` (float32), ``write_seconds``, and for each statistic ``seconds``,
        ``peak_rss_mb`` (of the process) and ``wells``; ``least`` is the peak of the same process for one well.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        store, least = Path(temporary) / "embeddings.zarr", Path(temporary) / "well.zarr"
        start = time.perf_counter()
        n = write_synthetic(store, rows, width)
        results: dict[str, Any] = {
            "rows": n,
            "width": width,
            "store_gb": round(4 * n * width / 1e9, 2),
            "write_seconds": round(time.perf_counter() - start, 1),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        }
        say(f"{n:,} cells x {width} features, {results['store_gb']} GB, written in {results['write_seconds']} s")
        write_synthetic(least, 1, width)
        results["least"] = _measured(least, "mean")
        say(f"one well: peak {results['least']['peak_rss_mb']:,.0f} MB")
        for statistic in STATISTICS:
            results[statistic] = _measured(store, statistic)
            say(
                f"{statistic:<7} {results[statistic]['wells']:,} wells in {results[statistic]['seconds']:,.0f} s, "
                f"peak {results[statistic]['peak_rss_mb']:,.0f} MB"
            )
    return results


def write_synthetic(store: Path, rows: int, width: int, seed: int = 0) -> int:
    """Write random embeddings in the format of `cellvim embed`; return the number of rows."""
    from cellvim.embedding.ledger import Rows
    from cellvim.embedding.output import PlateRows, write_embeddings

    per_well = CELLS_PER_FIELD * FIELDS_PER_WELL
    n_wells = -(-rows // per_well)
    well = np.repeat(np.arange(n_wells), FIELDS_PER_WELL)
    in_plate = well % WELLS_PER_PLATE
    fields = pd.DataFrame(
        {
            "Metadata_Plate": [f"P{w // WELLS_PER_PLATE:04d}" for w in well],
            "Metadata_Well": [f"{chr(65 + w // 24)}{w % 24 + 1:02d}" for w in in_plate],
            "Metadata_Site": np.tile(np.arange(1, FIELDS_PER_WELL + 1), n_wells),
            "Metadata_pert_type": np.where(in_plate % 24 < 2, "negcon", "trt"),
            "compound": [f"compound {w}" for w in in_plate],
        }
    )

    def load(field: int) -> Rows:
        rng = np.random.default_rng([seed, field])
        objects = pd.DataFrame(
            {
                "Metadata_ObjectNumber": np.arange(1, CELLS_PER_FIELD + 1),
                "area_um2": rng.uniform(50, 200, CELLS_PER_FIELD),
                "mean_intensity_DNA": rng.uniform(0, 1, CELLS_PER_FIELD),
            }
        )
        values = rng.standard_normal((CELLS_PER_FIELD, width), dtype=np.float32)
        return Rows(values, objects, rng.uniform(0, 600, (CELLS_PER_FIELD, 2)))

    plate = PlateRows(fields, dict.fromkeys(range(len(fields)), CELLS_PER_FIELD), load)
    uns = {"cellvim": {"unit": "cell"}}
    return write_embeddings(store, [lambda: plate], width, uns, format="zarr")


def _measured(store: Path, statistic: str) -> dict[str, Any]:
    """Aggregate in a separate process, to measure its peak memory."""
    code = "import sys; from benchmarks.profiles import aggregate_once; aggregate_once(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(store), statistic]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def aggregate_once(store: str, statistic: str) -> None:
    """Aggregate in this process and print the time, the peak memory and the number of wells as JSON."""
    import resource

    from cellvim.profiles import aggregate

    start = time.perf_counter()
    wells = aggregate(store, statistic=statistic)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    print(json.dumps({"seconds": round(seconds, 1), "peak_rss_mb": round(peak), "wells": wells.n_obs}))


def main() -> None:
    """Measure, print and write the figures."""
    from benchmarks.timing import check_output, parser, write_results

    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=10_000_000, help="number of cells (default: 10,000,000)")
    options.add_argument("--width", type=int, default=192, help="number of features (default: 192)")
    options.add_argument("--folder", type=Path, help="folder for the synthetic cells, 7.7 GB by default")
    arguments = options.parse_args()
    check_output(arguments.output)
    write_results(run(arguments.rows, arguments.width, folder=arguments.folder), arguments.output)


if __name__ == "__main__":
    main()
