"""Plots of the separation of controls, and of dose-response curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import MetadataError, listing
from cellvim.evaluate.assay import ACTIVITY, activity_or_distance, activity_scores, assay_quality
from cellvim.evaluate.dose_response import dose_response as fit_curves
from cellvim.evaluate.dose_response import dosed_wells, logistic
from cellvim.evaluate.features import finite_representation
from cellvim.pl.canvas import NEGATIVE, PALETTE, POSITIVE, TREATED, new_axes, plain
from cellvim.profiles.columns import find_columns

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def controls(
    adata: AnnData,
    *,
    use: str | None = None,
    control: str = "negcon",
    positive: str = "poscon",
    ax: Axes | None = None,
) -> Axes:
    """Plot the activity of the wells of each plate relative to its controls, with Z′.

    Parameters
    ----------
    adata
        Profiles.
    use
        Representation; by default the latest.
    control, positive
        Values of the control column for negative and positive controls, or COLUMN:VALUE.
    ax
        Axes to plot on; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        One column of dots per plate; the activity is defined by `cellvim.evaluate.assay.activity_scores`.

    Raises
    ------
    CellvimError
        There are no negative or no positive controls.
    """
    columns = find_columns(adata.obs, negative=control, positive=positive)
    scores = activity_scores(finite_representation(adata, use), adata.obs, columns)
    quality = assay_quality(scores).set_index("plate")["z_prime"]
    plates = list(quality.index)
    axes = new_axes(ax, (min(14, 2.2 + 1.1 * len(plates)), 3.6))
    rng = np.random.default_rng(0)
    place = {plate: i for i, plate in enumerate(plates)}
    for kind, color, label, shift in (
        ("", TREATED, "treated", 0.0),
        ("negative", NEGATIVE, "negative control", -0.25),
        ("positive", POSITIVE, "positive control", 0.25),
    ):
        rows = scores[scores["kind"] == kind]
        x = rows["plate"].map(place) + shift + rng.uniform(-0.09, 0.09, len(rows))
        axes.scatter(x, rows[ACTIVITY], s=14, color=color, lw=0, alpha=0.8, label=label)
    for y in (0, 1):
        axes.axhline(y, color="0.8", lw=0.8, zorder=0)
    names = [f"{plain(plate, 14)}\nZ′ {z:.2f}" if np.isfinite(z) else plain(plate, 14) for plate, z in quality.items()]
    axes.set_xticks(range(len(plates)), names, fontsize=8, rotation=0 if len(plates) <= 8 else 90)
    axes.set(ylabel="activity (0 negative, 1 positive)", xlim=(-0.6, len(plates) - 0.4))
    axes.legend(fontsize=7, frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def dose_response(
    adata: AnnData,
    perturbations: Sequence[str] | str | None = None,
    *,
    use: str | None = None,
    control: str = "negcon",
    positive: str = "poscon",
    ax: Axes | None = None,
    **columns: str | None,
) -> Axes:
    """Plot activity against dose, with one curve per perturbation.

    Parameters
    ----------
    adata
        Profiles.
    perturbations
        Perturbations to plot; by default up to six with the lowest p values.
    use
        Representation; by default the latest.
    control, positive
        Values of the control column for negative and positive controls, or COLUMN:VALUE. Without positive controls,
        the distance from the negative controls is plotted.
    ax
        Axes to plot on; a new figure by default.
    **columns
        Names of the columns for ``dose``, ``perturbation`` and ``plate``.

    Returns
    -------
    matplotlib.axes.Axes
        Dots are wells; a dashed line is an EC50 within the doses.

    Raises
    ------
    CellvimError
        There are no doses, no controls, or a perturbation does not exist.
    """
    found = find_columns(adata.obs, negative=control, positive=positive, **columns)
    features = finite_representation(adata, use)
    scores, is_distance = activity_or_distance(features, adata.obs, found)
    label = "distance from negative controls (MADs)" if is_distance else "activity (0 negative, 1 positive control)"
    curves, _ = fit_curves(scores, adata.obs, found)
    curves = curves.set_index("perturbation")
    if perturbations is None:
        fitted = curves.dropna(subset=["r_squared"]).sort_values("p_value", kind="stable")
        perturbations = list(fitted.index[:6])
    chosen = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    if lost := [name for name in chosen if name not in curves.index]:
        raise MetadataError(f"There are no doses of {listing(lost)}; there are doses of {listing(curves.index)}.")
    wells = dosed_wells(scores, adata.obs, found)
    wells = wells[wells["dose"] > 0]
    axes = new_axes(ax, (5.2, 3.6))
    for i, name in enumerate(chosen):
        color = PALETTE[i % len(PALETTE)]
        own = wells[wells["perturbation"] == name]
        axes.plot(own["dose"], own[ACTIVITY], "o", color=color, ms=4, alpha=0.6, mew=0, label=plain(name, 24))
        curve = curves.loc[name]
        if np.isfinite(curve["ec50"]):
            dose = np.geomspace(curve["lowest_dose"], curve["highest_dose"], 200)
            axes.plot(
                dose, logistic(dose, *curve[["bottom", "top", "ec50", "hill"]].astype(float)), color=color, lw=1.5
            )
            if curve["in_range"]:
                axes.axvline(curve["ec50"], color=color, lw=0.8, ls="--", alpha=0.7)
    axes.set(xscale="log", xlabel=plain(found.dose), ylabel=label)
    doses = np.unique(wells.loc[wells["perturbation"].isin(chosen), "dose"])
    if len(doses) <= 12:
        axes.set_xticks(doses, [f"{d:g}" for d in doses], fontsize=7)
        axes.minorticks_off()
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
