"""How well the controls are told apart, in wells that the classifier has not seen, beside what needs no embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import InputError, MetadataError
from cellvim.report.embedding_map import sample_rows

if TYPE_CHECKING:
    from cellvim.evaluate.controls import Separation
    from cellvim.report.source import Source

MAX_CELLS = 10_000


@dataclass(frozen=True)
class ControlSeparation:
    """Figures of `cellvim.evaluate.controls.separate_controls`, and what is to be said about them."""

    results: list[Separation]
    notes: list[str] = field(default_factory=list)


def tell_controls_apart(source: Source, *, seed: int = 0) -> ControlSeparation:
    """Classify the cells of positive and negative controls with whole wells held out.

    Raises
    ------
    CellvimError
        There are no controls of both kinds in two wells each, or scikit-learn is not installed.
    """
    import anndata

    from cellvim.evaluate.controls import WELL, separate_controls

    columns = source.columns
    if columns.pert_type is None:
        raise MetadataError(
            "No column says which wells are controls (such as Metadata_pert_type). Name it with --control COLUMN:VALUE."
        )
    kinds = source.kinds()
    rows = np.flatnonzero(kinds != "")
    for kind, value in (("negative", columns.negative), ("positive", columns.positive)):
        if not (kinds == kind).any():
            option = "--control" if kind == "negative" else "--positive"
            raise MetadataError(
                f"'{columns.pert_type}' is '{value}' in no row, so there is no {kind} control. Say which it is with "
                f"{option} COLUMN:VALUE."
            )
    notes = []
    total = len(rows)
    sampled = total > MAX_CELLS
    if sampled:
        rows = rows[sample_rows(source.wells()[rows], MAX_CELLS, seed=seed)]
        notes.append(f"{len(rows):,} of {total:,} control cells, drawn evenly from the wells.")
    values = source.rows(rows)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        notes.append(f"{int((~finite).sum()):,} cells are left out: their numbers are not finite.")
        rows, values = rows[finite], values[finite]
    obs = source.obs.iloc[rows].copy()
    for wanted, column in zip(WELL, (columns.plate, columns.well), strict=True):
        if column is None and wanted not in obs:
            raise InputError("Wells are held out, and no columns say which plate and well a row is of.")
        obs[wanted] = obs[column if column is not None else wanted].to_numpy()
    intensities = [name for name in obs if str(name).startswith("mean_intensity_")]
    if intensities and not np.isfinite(obs[intensities].to_numpy(np.float64)).all():
        obs = obs.drop(columns=intensities)
        notes.append("Mean intensities are left out: some are not finite.")
    obs.index = obs.index.astype(str)
    results = separate_controls(
        anndata.AnnData(X=values, obs=obs), columns.pert_type, negative=columns.negative, positive=columns.positive
    )
    if sampled:  # the sample is even, so its counts say nothing
        results = [r for r in results if r.features != "cell count"]
        notes.append("The baseline of cell counts is left out: sampled wells have the same number of cells.")
    return ControlSeparation(results, notes)
