"""What rows were made with: the columns that describe a field, and ``uns``, enough to repeat a run.

Nothing here depends on who ran it, when, where or in how many pieces: that is in the run's manifest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from cellvim.data.intensity import IntensityScale
    from cellvim.embedding.plan import EmbeddingPlan, PlatePlan


def untrained_remark(plan: EmbeddingPlan) -> str | None:
    """Return what to say about weights that are not trained."""
    if plan.trained:
        return None
    return (
        f"{plan.model_name} has UNTRAINED weights (random, seed {plan.seed}). They show that everything works and are "
        "a baseline to beat; they are no basis for a finding. --model takes the path of a trained checkpoint."
    )


def provenance(
    plan: EmbeddingPlan, failures: Sequence[tuple[str, str, str]], *, spatialdata: bool = False
) -> dict[str, Any]:
    """Return uns: enough to repeat the run, and nothing that depends on who ran it, when and where.

    Parameters
    ----------
    plan
        Of the run.
    failures
        (plate, field, reason) of fields without rows.
    spatialdata
        Also say what SpatialData needs to know.
    """
    first = plan.plates[0]
    config = plan.model.config
    about: dict[str, Any] = {
        "model": {"name": plan.model_name, "config": json.dumps(config.to_dict())},
        "weights": {
            "trained": plan.trained,
            "sha256": plan.weights_sha256,
            **({} if plan.trained else {"seed": plan.seed, "warning": untrained_remark(plan)}),
        },
        "options": json.dumps(plan.options),
        "unit": plan.unit,
        "precision": plan.precision,
        "seed": plan.seed,
        "spatial_unit": "pixel" if any(p.pixel_size_um is None for p in plan.plates) else "micrometer",
        "versions": plan.versions,
        "plates": _plates_table(plan),
        "failed_fields": pd.DataFrame(
            {
                name: np.array([failure[i] for failure in failures], dtype=object)
                for i, name in enumerate(("plate", "field", "reason"))
            }
        ),
    }
    if plan.class_names:
        about["class_names"] = np.array(plan.class_names, dtype=object)
    if len(plan.plates) == 1:  # one plate's own are told apart in full
        about |= {
            "plate": {
                "name": first.name,
                "path": first.path,
                "pixel_size_um": "unknown" if first.pixel_size_um is None else first.pixel_size_um,
                "wells": first.chosen_wells,
            },
            "cells": first.cells_name,
            "cell_notes": first.cell_notes,
            "channels": {
                "plate": first.channels,
                "model": [config.channel_names[i] for i in first.channel_ids],
                "model_ids": first.channel_ids,
                "nuclei": first.dna or "not used",
            },
            "preprocessing": {"intensity": _stored_scale(first.scale), "crop": _crop(plan, first)},
        }
        if first.illumination is not None:
            about["preprocessing"]["illumination"] = {
                "channel_names": list(first.illumination.channel_names),
                "coarse": first.illumination.coarse,
            }
    found: dict[str, Any] = {"cellvim": about}
    if spatialdata:
        regions = [name for plate in plan.plates for name in region_names(plate)]
        found["spatialdata_attrs"] = {
            "region": np.array(regions, dtype=object),
            "region_key": "region",
            "instance_key": "Metadata_ObjectNumber",
        }
    return found


def _stored_scale(scale: IntensityScale) -> dict[str, Any]:
    return scale.to_dict()


def _crop(plan: EmbeddingPlan, plate: PlatePlan) -> dict[str, Any]:
    cutting = plate.cutting
    if plate.crop_px is None:
        return {"size_px": "whole field", **({"um_per_px": cutting.um_per_px} if cutting.um_per_px else {})}
    crop: dict[str, Any] = {"size_px": plate.crop_px, "input_px": plan.input_px}
    pixel = cutting.um_per_px or plate.pixel_size_um
    if pixel is not None:
        crop["size_um"] = plate.crop_px * pixel
    if cutting.um_per_px:
        crop["um_per_px"] = cutting.um_per_px
    if cutting.overlap:
        crop["overlap"] = cutting.overlap
    if cutting.border != "pad":
        crop["border"] = cutting.border
    if cutting.mask_neighbours:
        crop["mask_neighbours"] = True
    return crop


def _plates_table(plan: EmbeddingPlan) -> pd.DataFrame:
    """One row a plate: what was done with each."""
    return pd.DataFrame(
        {
            "name": [p.name for p in plan.plates],
            "path": [p.path for p in plan.plates],
            "n_fields": [p.n_fields for p in plan.plates],
            "pixel_size_um": [np.nan if p.pixel_size_um is None else p.pixel_size_um for p in plan.plates],
            "channels": [json.dumps(dict(zip(p.channels, p.meanings, strict=True))) for p in plan.plates],
            "model_ids": [json.dumps(p.channel_ids) for p in plan.plates],
            "nuclei": [p.dna or "not used" for p in plan.plates],
            "cells": [p.cells_name for p in plan.plates],
            "crop": [json.dumps(_crop(plan, p)) for p in plan.plates],
            "intensity": [json.dumps(_stored_scale(p.scale)) for p in plan.plates],
        }
    )


def field_table(plan: PlatePlan, *, regions: bool = False) -> pd.DataFrame:
    """Return one row a field: plate, well, site and the plate map's columns; with ``regions`` also SpatialData's."""
    sites = [f.site for f in plan.fields]
    wells = [f.well for f in plan.fields]
    table = pd.DataFrame(
        {
            "Metadata_Plate": plan.name,
            "Metadata_Well": wells,
            "Metadata_Site": [int(s) for s in sites] if all(str(s).isdigit() for s in sites) else sites,
        }
    )
    plate_map = plan.plate.well_metadata.reindex(wells)
    for name in plate_map.columns:
        own = name in _OWN_COLUMNS or str(name).startswith(("mean_intensity_", "qc_"))
        column = f"Metadata_{name}" if own else str(name)
        if column not in table:
            table[column] = plate_map[name].to_numpy()
    if "pert_type" in table and "Metadata_pert_type" not in table:
        table["Metadata_pert_type"] = table["pert_type"]
    if regions:
        table["region"] = region_names(plan)
    return table


def region_names(plan: PlatePlan) -> list[str]:
    """Return what SpatialData calls each field's image: plate, well and site."""
    return [f"{plan.name}_{f.well}_{f.site}" for f in plan.fields]


_OWN_COLUMNS = {"Metadata_ObjectNumber", "area_px", "area_um2", "touches_border", "region"}
