"""One crop of a plate, cut and scaled as `cellvim.embed` does, and what drove its embedding: `cellvim attribute`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import InputError, listing, suggestion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cellvim.data.plate import Field
    from cellvim.embedding import EmbeddingPlan


@dataclass(frozen=True, eq=False)
class Crop:
    """What the model sees of one cell, tile or field.

    Attributes
    ----------
    image
        (C, h, w) float32, normalised, channels in the model's order.
    channel_names
        The plate's names of the C channels.
    name
        ``plate__well__site__object``, as the row's name in the AnnData.
    um_per_px
        Side of a pixel of ``image`` in µm; None if the plate does not say.
    """

    image: np.ndarray
    channel_names: list[str]
    name: str
    um_per_px: float | None


def read_crop(plan: EmbeddingPlan, well: str, site: str | None = None, number: int | None = None) -> Crop:
    """Read one crop as an embedding run would.

    Parameters
    ----------
    plan
        From `cellvim.embedding.plan_embedding`: plate, model, channels, unit, crop size.
    well
        Such as ``B03``.
    site
        Name of the field within the well; the first one that can be read and holds a unit, if None.
    number
        ``Metadata_ObjectNumber`` of the cell or tile; if None, the unit nearest to the middle of the field.

    Raises
    ------
    InputError
        There is no such well, site or number.
    FieldReadError
        The field's pixels cannot be read.
    """
    from cellvim.data.wells import canonical_well

    well = canonical_well(well)
    fields = [field for field in plan.fields if field.well == well]
    if not fields:
        raise InputError(f"The plate has no well {well}; it has {listing(plan.plate.wells)}.")
    if site is not None:
        known = [field.site for field in fields]
        fields = [field for field in fields if field.site == str(site)]
        if not fields:
            raise InputError(f"Well {well} has no site '{site}'; it has {listing(known)}.")
    for field in fields:
        raw = field.read(plan.read_channels)
        numbers, centers, labels = _units(plan, field, raw)
        if len(numbers):
            break
    else:
        raise InputError(f"No {plan.unit} was found in {listing(f.name for f in fields)}. Choose another --well.")
    if number is None:
        middle = (np.array(raw.shape[1:]) - 1) / 2
        place = int(np.square(centers - middle).sum(1).argmin())
    elif number in numbers:
        place = int(np.flatnonzero(numbers == number)[0])
    else:
        raise InputError(
            f"Field {field.name} has no {plan.unit} number {number}; it has {numbers.min()} to {numbers.max()}."
        )
    image = plan.scale.apply(raw[: len(plan.channels)])
    image = _cut(plan, image, centers[place : place + 1], labels, numbers[place : place + 1])
    pixel = field.pixel_size_um
    if pixel is not None and plan.crop_px is not None:
        pixel *= plan.crop_px / plan.input_px
    return Crop(image, list(plan.channels), f"{plan.plate.name}__{well}__{field.site}__{numbers[place]}", pixel)


@dataclass(frozen=True, eq=False)
class Explained:
    """What `explain_crop` found: the picture, a line about it, and what the user must know."""

    figure: Figure
    summary: str
    remarks: list[str]


def explain_crop(
    plan: EmbeddingPlan,
    well: str,
    site: str | None = None,
    number: int | None = None,
    *,
    method: str = "integrated_gradients",
    target: str | int = "embedding",
    steps: int = 32,
) -> Explained:
    """Read a crop, attribute what the model makes of it, and draw it.

    Parameters
    ----------
    plan, well, site, number
        As in `read_crop`.
    method
        One of `cellvim.attribution.METHODS`, or "attention" for the scores of attention pooling.
    target, steps
        As in `cellvim.attribution.attribute`; a class may be given as text.

    Raises
    ------
    CellvimError
        The crop is not there, or the model cannot be asked this.
    """
    from cellvim.attribution.attention import attention_scores
    from cellvim.attribution.picture import draw_attribution
    from cellvim.attribution.tokens import METHODS, attribute

    if method not in (*METHODS, "attention"):
        known = (*METHODS, "attention")
        raise InputError(f"The method '{method}' is not known; expected {listing(known)}.{suggestion(method, known)}")
    if isinstance(target, str) and target.lstrip("-").isdigit():
        target = int(target)
    crop = read_crop(plan, well, site, number)
    images, remarks = crop.image[None], []
    if not plan.trained:
        remarks.append(
            f"{plan.model_name} has UNTRAINED weights (random, seed {plan.seed}): what drives its embedding is chance."
        )
    if method == "attention":
        found = attention_scores(plan.model, images, channels=plan.channel_ids)
        summary = f"{crop.name}: largest share of attention {found.patches[0].max():.2f} times an even one"
        if not found.compares_channels:
            remarks.append("This model pools within each channel, so its scores do not compare channels.")
    else:
        found = attribute(plan.model, images, channels=plan.channel_ids, target=target, method=method, steps=steps)
        shares = ", ".join(
            f"{name} {share:.0%}" for name, share in zip(crop.channel_names, found.channel_share[0], strict=True)
        )
        gained = found.output[0] - found.baseline_output[0]
        what = f"{found.target} logit {found.output[0]:.4g}, {gained:+.4g} against"
        if found.target == "embedding":
            what = f"the embedding lies {gained:.4g} from that of"
        summary = f"{crop.name}: {what} a black crop; by channel {shares}"
        if method == "integrated_gradients" and abs(found.residual[0]) > 0.02 * abs(gained):
            remarks.append(
                f"The contributions miss the total by {found.residual[0] / gained:+.1%}: the model bends on the "
                f"way from black. Take more --steps than {steps}."
            )
    title = f"{crop.name}\n{plan.model_name}" + ("" if plan.trained else ", UNTRAINED (random weights)")
    figure = draw_attribution(found, crop.image, crop.channel_names, title=title, um_per_px=crop.um_per_px)
    return Explained(figure, summary, remarks)


def _units(plan: EmbeddingPlan, field: Field, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the numbers (n,) and centres (n, 2) as (y, x) of a field's units, and labels to mask neighbours by."""
    from cellvim.data.crops import place_windows, tile_centers

    height, width = raw.shape[1:]
    if plan.cells is not None:
        found = plan.cells.find(field, raw, plan.read_channels)
        _, kept = place_windows(found.centers, plan.crop_px, (height, width), border=plan.cutting.border)
        numbers = found.table["object_number"].to_numpy()[kept]
        return numbers, found.centers[kept], found.labels if plan.cutting.mask_neighbours else None
    if plan.unit == "field":
        return np.array([1]), np.array([[(height - 1) / 2, (width - 1) / 2]]), None
    centers = tile_centers(height, width, plan.crop_px, max(1, round(plan.crop_px * plan.cutting.stride)))
    return np.arange(1, len(centers) + 1), centers, None


def _cut(plan: EmbeddingPlan, image: np.ndarray, center: np.ndarray, labels: np.ndarray | None, number: np.ndarray):
    from cellvim.data.crops import cut_crops, resize_crops

    if plan.crop_px is None:
        return image
    crop = cut_crops(image, center, plan.crop_px, border=plan.cutting.border, labels=labels, numbers=number)
    return resize_crops(crop, plan.input_px)[0]
