"""Time and size of `cellvim report` for simulated cells and images of a 384-well plate.

    python benchmarks/report_page.py -o benchmarks/results/report.json

One page shows all cells at coordinates stored in the AnnData, the other a sample with UMAP. Wall-clock time includes
waiting for other processes of the machine; processor time does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

import cellvim
from cellvim.data.plate_writer import PlateWriter

CHANNELS = ["DNA", "ER", "RNA", "AGP", "Mito"]
ROWS, COLUMNS, FIELD_PX, CROP_PX = 16, 24, 400, 64


def main() -> None:
    """Run both and print or write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "command": " ".join(["report_page.py", *sys.argv[1:]]),
            "cells": arguments.cells,
            "features": arguments.features,
            "wells": ROWS * COLUMNS,
            "channels": len(CHANNELS),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "cellvim": cellvim.__version__,
            "python": platform.python_version(),
            "pages": run(Path(folder), arguments.cells, arguments.features),
        }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


def run(folder: Path, n_cells: int, n_features: int) -> list[dict[str, Any]]:
    """Simulate a plate and its embeddings, and write a report of each kind in a separate process."""
    make_plate(folder / "plate.zarr")
    adata = make_embeddings(folder / "plate.zarr", n_cells, n_features)
    pages = []
    for coordinates in (True, False):
        if not coordinates:
            del adata.obsm["X_umap"]
        adata.write_zarr(folder / f"embeddings{coordinates}.zarr")
        page = folder / f"report{coordinates}.html"
        before = os.times()
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cellvim.cli", "report", str(folder / f"embeddings{coordinates}.zarr"), "-o", page],
            capture_output=True,
            text=True,
            check=True,
        )
        after = os.times()
        pages.append(
            {
                "coordinates": "stored, all cells shown" if coordinates else "UMAP of a sample",
                "summary": done.stdout.strip().rsplit(" in ", 1)[0],
                "megabytes": round(page.stat().st_size / 1e6, 2),
                "seconds": round(time.perf_counter() - start, 1),
                "processor_seconds": round(
                    after.children_user + after.children_system - before.children_user - before.children_system, 1
                ),
            }
        )
    return pages


def make_plate(path: Path) -> None:
    """Write one field per well, with round nuclei and cell bodies that differ between channels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:FIELD_PX, :FIELD_PX]
    with PlateWriter(path, name="simulated", channel_names=CHANNELS, pixel_size_um=0.6) as writer:
        for well in range(ROWS * COLUMNS):
            image = rng.normal(300, 15, (len(CHANNELS), FIELD_PX, FIELD_PX))
            for cy, cx in rng.uniform(0, FIELD_PX, (20, 2)):
                distance = (y - cy) ** 2 + (x - cx) ** 2
                for c in range(len(CHANNELS)):
                    image[c] += rng.uniform(500, 2500) * np.exp(-distance / rng.uniform(80, 400))
            writer.write_field(well_of(well), "1", image.clip(0, 65535).astype(np.uint16))
        writer.finish()


def well_of(number: int) -> str:
    """Return the name of a well, numbered row by row."""
    return f"{chr(ord('A') + number // COLUMNS)}{number % COLUMNS + 1:02d}"


def make_embeddings(plate: Path, n_cells: int, n_features: int) -> anndata.AnnData:
    """Return cells of 60 compounds in replicates and of controls, with the columns that `cellvim embed` writes."""
    rng = np.random.default_rng(0)
    well = np.sort(rng.integers(ROWS * COLUMNS, size=n_cells))
    column = well % COLUMNS
    kind = np.where(column < 2, "negcon", np.where(column > 21, "poscon", "trt"))
    compound = np.where(kind == "trt", well % 60, 60 + (kind == "poscon"))
    effects = rng.normal(size=(62, n_features)) * rng.uniform(0, 1, (62, 1))
    names = [f"compound {i}" for i in range(60)] + ["DMSO", "reference"]
    obs = pd.DataFrame(
        {
            "Metadata_Plate": pd.Categorical(["simulated"] * n_cells),
            "Metadata_Well": pd.Categorical.from_codes(well, [well_of(i) for i in range(ROWS * COLUMNS)]),
            "Metadata_Site": np.ones(n_cells, np.int64),
            "Metadata_ObjectNumber": np.arange(n_cells),
            "Metadata_pert_type": pd.Categorical(kind),
            "compound": pd.Categorical.from_codes(compound, names),
            "dose": 10.0 ** -(well // COLUMNS % 5),
            "area_um2": rng.gamma(8, 20, n_cells),
            **{f"mean_intensity_{name}": rng.gamma(8, 100, n_cells) for name in CHANNELS},
            **{f"qc_saturated_{name}": np.zeros(n_cells) for name in CHANNELS},
            "qc_focus": rng.gamma(4, 0.02, n_cells),
            "qc_area_ratio": rng.gamma(20, 0.05, n_cells),
            "qc_border": rng.random(n_cells) < 0.08,
            "qc_debris": rng.random(n_cells) < 0.05,
        },
        index=[f"simulated__{well_of(w)}__1__{i}" for i, w in enumerate(well)],
    )
    x = (rng.normal(size=(n_cells, n_features)) + effects[compound]).astype(np.float32)
    spatial = rng.uniform(0, FIELD_PX * 0.6, (n_cells, 2))
    umap = x[:, :2] + rng.normal(size=(62, 2))[compound] * 3
    adata = anndata.AnnData(x, obs, obsm={"spatial": spatial, "X_umap": umap})
    adata.uns["cellvim"] = {
        "model": {"name": "none: simulated"},
        "weights": {"trained": False, "seed": 0, "sha256": "0" * 64},
        "plate": {"name": "simulated", "path": str(plate), "pixel_size_um": 0.6},
        "unit": "cell",
        "channels": {"plate": np.array(CHANNELS, object), "model": np.array(CHANNELS, object)},
        "preprocessing": {
            "crop": {"size_px": CROP_PX},
            "intensity": {
                "channel_names": np.array(CHANNELS, object),
                "low": np.full(len(CHANNELS), 260.0),
                "high": np.full(len(CHANNELS), 3000.0),
            },
        },
        "spatial_unit": "micrometer",
    }
    return adata


if __name__ == "__main__":
    main()
