"""Synthetic cells and profiles for the tests of `cellvim.profiles` and `cellvim.evaluate`."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd

ROWS = "ABCDEFGHIJKLMNOP"


def make_profiles(
    *,
    plates: int = 3,
    controls: int = 24,
    compounds: int = 6,
    replicates: int = 2,
    doses: tuple[float, ...] = (1.0,),
    width: int = 8,
    effect: float = 4.0,
    plate_effect: float = 1.0,
    positives: int = 0,
    seed: int = 0,
) -> anndata.AnnData:
    """Profiles of wells: each plate has controls, and ``replicates`` wells of each compound and dose.

    Compounds 2i and 2i + 1 have mechanism i, and move the profile in one direction, the more the higher the dose. So do
    positive controls, in that of mechanism 0.
    """
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(compounds // 2 + 1, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = []
    for plate in range(plates):
        kinds = [("negcon", "DMSO", "", 0.0)] * controls + [("poscon", "positive", "", 0.0)] * positives
        kinds += [
            ("trt", f"compound {c}", f"mechanism {c // 2}", d)
            for c in range(compounds)
            for d in doses
            for _ in range(replicates)
        ]
        for i, (kind, compound, mechanism, dose) in enumerate(kinds):
            rows.append(
                (f"P{plate}", f"{ROWS[i // 12 % 8]}{i % 12 + 1:02d}", f"B{plate}", kind, compound, mechanism, dose)
            )
    names = ["Plate", "Well", "Batch", "pert_type", "Compound", "moa", "Dose"]
    obs = pd.DataFrame(rows, columns=[f"Metadata_{n}" for n in names])
    X = rng.normal(size=(len(obs), width))
    for i, row in enumerate(rows):
        if row[3] == "trt":
            X[i] += effect * row[6] / max(doses) * directions[int(row[4].split()[1]) // 2]
        elif row[3] == "poscon":
            X[i] += effect * directions[0]
    X += plate_effect * rng.normal(size=(plates, width))[[int(p[1:]) for p in obs["Metadata_Plate"]]]
    obs["Metadata_Object_Count"] = rng.integers(50, 200, len(obs))
    obs.index = obs["Metadata_Plate"] + "__" + obs["Metadata_Well"]
    obs.index.name = None
    for name in ("Plate", "Well", "Batch", "pert_type", "Compound", "moa"):
        obs[f"Metadata_{name}"] = obs[f"Metadata_{name}"].astype("category")
    var = pd.DataFrame(index=[f"emb_{i:04d}" for i in range(width)])
    return anndata.AnnData(X.astype(np.float32), obs=obs, var=var)


def make_cells(*, plates: int = 2, wells: int = 5, cells: int = 23, width: int = 6, seed: int = 0) -> anndata.AnnData:
    """Cells as `cellvim.embed` writes them; every well has another number of cells."""
    rng = np.random.default_rng(seed)
    table = [
        (f"P{plate}", f"A{well + 1:02d}", cell % 2, cell)
        for plate in range(plates)
        for well in range(wells)
        for cell in range(cells - 3 * well)
    ]
    obs = pd.DataFrame(table, columns=["Metadata_Plate", "Metadata_Well", "Metadata_Site", "Metadata_ObjectNumber"])
    for name in ("Metadata_Plate", "Metadata_Well"):
        obs[name] = obs[name].astype("category")
    compound = "compound " + obs["Metadata_Well"].astype(str)
    obs["compound"] = pd.Categorical(compound.where(obs["Metadata_Well"] != "A02"))
    obs["dose"] = obs["Metadata_Well"].astype(str).str[1:].astype(float)
    obs["Metadata_pert_type"] = pd.Categorical(np.where(obs["dose"] <= 3, "negcon", "trt"))
    obs["area_um2"] = rng.uniform(50, 200, len(obs))
    obs["touches_border"] = rng.random(len(obs)) < 0.5
    obs.index = [f"{p}__{w}__{s}__{c}" for p, w, s, c in table]
    X = rng.normal(size=(len(obs), width)).astype(np.float32)
    var = pd.DataFrame(index=[f"emb_{i:04d}" for i in range(width)])
    return anndata.AnnData(X, obs=obs, var=var, obsm={"spatial": rng.uniform(0, 100, (len(obs), 2))})
