"""The demo: import a small real plate that ships with CellVim, embed its cells, and inspect the result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellvim.data.bundled import bundled_dataset
from cellvim.data.importers import import_plate
from cellvim.data.intensity import IntensityScale
from cellvim.data.plate import open_plate
from cellvim.embedding.plan import plan_embedding
from cellvim.embedding.run import run_embedding
from cellvim.errors import OutputError

if TYPE_CHECKING:
    from anndata import AnnData

CHANNELS = {"Channel1": "GFP", "Channel2": "DNA"}
MODEL = "fastchannelvim_multichannel"  # ships with CellVim; trained on wells of this plate that are not in the demo
CROP_PX = 48  # nuclei of this plate are 20 to 25 px wide, cells about twice that
LABEL, NEGATIVE, POSITIVE, DOSE = "Metadata_pert_type", "negcon", "poscon", "SBS_Doses"

Say = Callable[[str], None]
Progress = Callable[[str, str], AbstractContextManager[Callable[..., None]]]


def run_demo(output: str | Path, *, overwrite: bool, say: Say, warn: Say, progress: Progress) -> Path:
    """Import the bundled plate, embed its cells and inspect the result. Existing results are kept.

    Parameters
    ----------
    output
        Folder for ``plate.zarr``, ``embeddings.zarr`` and ``demo.png``.
    overwrite
        Repeat all steps and replace existing results.
    say, warn
        Called with a line for the user.
    progress
        ``progress(what, units)`` opens a progress bar and yields its update function.

    Returns
    -------
    Path
        Path of the AnnData.

    Raises
    ------
    CellvimError
        The folder cannot be used.
    """
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {output} cannot be created: {error.strerror}. Choose another --output."
        ) from error
    plate, embeddings, picture = (output / name for name in ("plate.zarr", "embeddings.zarr", "demo.png"))
    if overwrite or not plate.exists():
        say("1. Import: 58 TIFFs of a translocation screen → OME-Zarr")
        source = bundled_dataset()
        with progress("Importing", "") as update:
            import_plate(
                source / "images",
                plate,
                metadata=source / "platemap.csv",
                channel_names=CHANNELS,
                plate_name="FKHR",
                overwrite=overwrite,
                progress=update,
            )
    else:
        say(f"1. Import: {plate} exists already (repeat with --overwrite)")
    if overwrite or not embeddings.exists():
        say(f"2. Embed: crops of {CROP_PX} x {CROP_PX} pixels around the cells → {MODEL}")
        plan = plan_embedding(plate, model=MODEL, crop_size=CROP_PX)
        with progress("Embedding", "cells") as update:
            summary = run_embedding(plan, embeddings, overwrite=overwrite, progress=update)
        for remark in summary.remarks():
            warn(remark)
        say(f"   {summary}")
    else:
        say(f"2. Embed: {embeddings} exists already (repeat with --overwrite)")
    if all(map(find_spec, ("scanpy", "umap", "sklearn", "matplotlib"))):
        say("3. Inspect: separation of the controls, a UMAP of the cells, a PCA of the wells")
        _inspect(plate, embeddings, picture, say)
    else:
        say("3. Inspect: skipped, because it requires scanpy. Install it: pip install 'cellvim[analysis]'")
    say(f"""
The AnnData is {embeddings}. Continue in scanpy:

    import anndata, scanpy as sc
    adata = anndata.read_zarr("{embeddings}")
    sc.pp.pca(adata); sc.pp.neighbors(adata); sc.tl.umap(adata)
    sc.pl.umap(adata, color=["{LABEL}", "{DOSE}"])

Your own plate: cellvim import FOLDER plate.zarr, then cellvim embed plate.zarr -o embeddings.zarr""")
    return embeddings


def _inspect(plate: Path, embeddings: Path, picture: Path, say: Say) -> None:
    import anndata

    from cellvim.evaluate.controls import separate_controls

    adata = anndata.read_zarr(embeddings)
    results = separate_controls(adata, LABEL, negative=NEGATIVE, positive=POSITIVE)
    say(
        f"   Positive against negative control, per cell ({results[0].n_rows:,} cells of {results[0].n_wells} wells; "
        "logistic regression, wells held out; chance is 0.5):"
    )
    for result in results:
        say(f"     {result}")
    _draw(adata, plate, picture)
    say(f"   Picture: {picture}")


def _draw(adata: AnnData, plate: Path, picture: Path) -> None:
    """Draw a field of each control, a UMAP of the cells and a PCA of the wells."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(
        [["negative", "cells", "wells"], ["positive", "cells", "wells"]], width_ratios=[1, 2, 2]
    )
    for name, group in (("negative", NEGATIVE), ("positive", POSITIVE)):
        axes[name].imshow(_composite(adata, plate, adata.obs.loc[adata.obs[LABEL] == group, "Metadata_Well"].iloc[0]))
        axes[name].set_title(f"{name} control", fontsize=10)
        axes[name].axis("off")
    umap, wells = _umap(adata), _wells(adata)
    order = np.random.default_rng(0).permutation(len(umap))  # so that no dose hides the others
    axes["cells"].scatter(
        *umap[order].T, c=adata.obs[DOSE].to_numpy()[order], s=3, lw=0, cmap="viridis", rasterized=True
    )
    axes["cells"].set_title(f"{len(umap):,} cells (UMAP)", fontsize=10)
    for group, marker, label in (
        (NEGATIVE, "s", "negative control"),
        ("trt", "o", "dose"),
        (POSITIVE, "^", "positive control"),
    ):
        rows = wells[wells[LABEL] == group]
        dots = axes["wells"].scatter(
            rows["PC1"], rows["PC2"], c=rows[DOSE], marker=marker, s=45, vmin=0, vmax=10, ec="0.3", lw=0.5, label=label
        )
    axes["wells"].set_title(f"{len(wells)} wells (mean of their cells, PCA)", fontsize=10)
    axes["wells"].legend(fontsize=8, frameon=False)
    for name in ("cells", "wells"):
        axes[name].set(xticks=[], yticks=[])
    figure.colorbar(dots, ax=[axes["wells"]], label="dose")
    trained = adata.uns["cellvim"]["weights"]["trained"]
    figure.suptitle(
        f"FKHR-EGFP translocation, U2OS: {adata.uns['cellvim']['model']['name']}"
        + ("" if trained else ", untrained (random) weights"),
        fontsize=11,
    )
    figure.savefig(picture, dpi=110)


def _composite(adata: AnnData, plate: Path, well: str, size: int = 240) -> np.ndarray:
    """Return a corner of the first field of a well, scaled as for the model, (size, size, 3): GFP green, DNA blue."""
    scale = IntensityScale.from_dict(adata.uns["cellvim"]["preprocessing"]["intensity"])
    field = next(f for f in open_plate(plate).fields if f.well == well)
    image = dict(zip(scale.channel_names, scale.apply(field.read(scale.channel_names)), strict=True))
    gfp, dna = ((1.5 * image[name][:size, :size]).clip(0, 1) ** 0.7 for name in ("GFP", "DNA"))
    return np.stack([0.2 * dna, np.maximum(gfp, 0.2 * dna), dna], axis=-1)


def _umap(adata: AnnData) -> np.ndarray:
    import warnings

    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scanpy and numba
        copy = adata.copy()
        scanpy.pp.pca(copy, n_comps=50, random_state=0)
        scanpy.pp.neighbors(copy, random_state=0)
        scanpy.tl.umap(copy, random_state=0)
    return copy.obsm["X_umap"]


def _wells(adata: AnnData) -> pd.DataFrame:
    """Return one row per well: label, dose, and two principal components of the mean embedding."""
    key = adata.obs["Metadata_Well"].astype(str).to_numpy()
    mean = pd.DataFrame(np.asarray(adata.X), index=key).groupby(level=0).mean()
    about = adata.obs.set_index(key)[[LABEL, DOSE]].groupby(level=0).first().loc[mean.index]
    centered = mean.to_numpy(np.float64) - mean.to_numpy(np.float64).mean(0)
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    return about.assign(PC1=u[:, 0] * s[0], PC2=u[:, 1] * s[1])
