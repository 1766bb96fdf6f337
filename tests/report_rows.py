"""Embeddings of a small plate, with controls, a compound with several doses, and names that attempt an injection."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd

SCRIPT = "<script>window.pwned=1</script>"
CLOSING = "</script><img src=x onerror=window.pwned=1>"
QUOTES = "\"'><b onmouseover='window.pwned=1'>&amp; 名前 \u2028"
HOSTILE = (SCRIPT, CLOSING, QUOTES)
CHANNELS = ["DNA", "GFP"]

WELLS = {  # well -> kind, compound, dose
    **{w: ("negcon", "DMSO", 0.0) for w in ("A01", "A02", "B01")},
    **{w: ("poscon", CLOSING, 10.0) for w in ("A12", "B12")},
    **{f"C0{i}": ("trt", SCRIPT, float(i)) for i in (1, 2, 3, 4, 5)},
    **{f"D0{i}": ("trt", QUOTES, 2.0) for i in (1, 2)},
}
CELLS_EACH = 3


def make_embeddings(plate: Path | None = None, *, channels: list[str] | None = None, seed: int = 0) -> anndata.AnnData:
    """Return `CELLS_EACH` cells per well, whose embedding depends on the dose."""
    rng = np.random.default_rng(seed)
    rows = [(well, *about, n) for well, about in WELLS.items() for n in range(1, CELLS_EACH + 1)]
    wells, kinds, compounds, doses, numbers = (list(column) for column in zip(*rows, strict=True))
    obs = pd.DataFrame(
        {
            "Metadata_Plate": pd.Categorical(["plate"] * len(rows)),
            "Metadata_Well": pd.Categorical(wells),
            "Metadata_Site": 0,
            "Metadata_ObjectNumber": numbers,
            "Metadata_pert_type": pd.Categorical(kinds),
            "compound": pd.Categorical(compounds),
            "dose": doses,
            "mean_intensity_DNA": rng.random(len(rows)),
            "qc_focus": rng.random(len(rows)),
            "qc_border": np.zeros(len(rows), bool),
        },
        index=[f"plate__{w}__0__{n}" for w, n in zip(wells, numbers, strict=True)],
    )
    effect = np.array(doses)[:, None] * np.linspace(0.2, 1, 8)
    x = rng.normal(size=(len(rows), 8)) + effect
    adata = anndata.AnnData(x.astype(np.float32), obs, obsm={"spatial": rng.uniform(5, 59, (len(rows), 2))})
    channels = CHANNELS if channels is None else channels
    adata.uns["cellvim"] = {
        "model": {"name": "small", "config": "{}"},
        "weights": {"trained": False, "seed": 0, "sha256": "ab" * 32},
        "plate": {"name": "plate", "path": str(plate or "nowhere.zarr"), "pixel_size_um": 0.5},
        "unit": "cell",
        "channels": {"plate": np.array(channels, object), "model": np.array(channels, object)},
        "preprocessing": {
            "crop": {"size_px": 32, "input_px": 32, "size_um": 16.0},
            "intensity": {
                "channel_names": np.array(channels, object),
                "low": np.full(len(channels), 150.0),
                "high": np.full(len(channels), 1300.0),
            },
        },
        "spatial_unit": "micrometer",
        "failed_fields": pd.DataFrame({"plate": ["plate"], "field": ["D05/0"], "reason": [f"unreadable {SCRIPT}"]}),
        "versions": {"cellvim": "0"},
        "run": {"command": f"cellvim embed {SCRIPT}"},
    }
    return adata
