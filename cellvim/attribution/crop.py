"""``cellvim attribute``: read one crop of a plate as `cellvim.embed` does, and explain its embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cellvim.attribution.attention import attention_scores
from cellvim.attribution.picture import draw_attribution
from cellvim.attribution.tokens import METHODS, attribute
from cellvim.errors import FieldReadError, InputError, listing, suggestion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cellvim.embedding import EmbeddingPlan


@dataclass(frozen=True, eq=False)
class Crop:
    """The input of the model for one cell, tile or field.

    Attributes
    ----------
    image
        (C, H, W) float32, normalised, with channels in the order of the model.
    channel_names
        Names of the channels on the plate.
    name
        ``plate__well__site__object``, the name of the row in the AnnData.
    um_per_px
        Pixel size of ``image`` in µm; None if unknown.
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
        Returned by `cellvim.embedding.plan_embedding`.
    well
        Name of the well, such as ``B03``.
    site
        Name of the site within the well; by default the first with a unit.
    number
        ``Metadata_ObjectNumber`` of the cell or tile; by default the unit nearest to the centre of the field.

    Raises
    ------
    InputError
        The well, site or number does not exist.
    FieldReadError
        The field's pixels cannot be read.
    """
    from cellvim.data.crops import resize_crops, stream_crops
    from cellvim.data.wells import canonical_well

    well = canonical_well(well)
    plate = plan.plates[0]
    fields = [field for field in plate.fields if field.well == well]
    if not fields:
        raise InputError(f"The plate has no well {well}; it has {listing(plate.plate.wells)}.")
    if site is not None:
        known = [field.site for field in fields]
        fields = [field for field in fields if field.site == str(site)]
        if not fields:
            raise InputError(f"Well {well} has no site '{site}'; it has {listing(known)}.")
    for field in fields:
        options = {"extra_channels": plate.extra_channels, "illumination": plate.illumination, "workers": 1}
        [cut] = stream_crops([field], plate.channels, plate.cutting, scale=plate.scale, cells=plate.cells, **options)
        if cut.failed is not None:
            raise FieldReadError(cut.failed)
        if len(cut.crops):
            break
    else:
        raise InputError(f"No {plan.unit} was found in {listing(f.name for f in fields)}. Choose another --well.")
    numbers = cut.table["object_number"].to_numpy()
    if number is None:
        middle = (np.array(field.shape[1:]) - 1) / 2
        place = int(np.square(cut.table[["y_px", "x_px"]].to_numpy() - middle).sum(1).argmin())
    elif number in numbers:
        place = int(np.flatnonzero(numbers == number)[0])
    else:
        raise InputError(
            f"Field {field.name} has no {plan.unit} number {number}; it has {numbers.min()} to {numbers.max()}."
        )
    crop = cut.crops[place : place + 1]
    crop = crop if plan.input_px is None else resize_crops(crop, plan.input_px)
    pixel = plate.cutting.um_per_px or field.pixel_size_um
    if pixel is not None and plate.crop_px is not None:
        pixel *= plate.crop_px / plan.input_px
    return Crop(crop[0].numpy(), list(plate.channels), f"{plate.name}__{well}__{field.site}__{numbers[place]}", pixel)


@dataclass(frozen=True, eq=False)
class Explained:
    """Result of `explain_crop`: the figure, a summary of one line, and remarks."""

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
    """Read a crop, attribute its embedding, and plot the attribution.

    Parameters
    ----------
    plan, well
        As in `read_crop`.
    site
        Name of the site within the well; by default the first with a unit.
    number
        Object number of the cell or tile; by default the one nearest to the centre of the field.
    method
        Method: integrated_gradients, occlusion or another of `METHODS`, or attention for the scores of attention
        pooling.
    target
        What is explained: the embedding, or the number or name of a class.
    steps
        Number of integration steps of integrated gradients.

    Raises
    ------
    CellvimError
        The crop does not exist, or the method or target is not valid for the model.
    """
    known = (*METHODS, "attention")
    if method not in known:
        raise InputError(f"The method '{method}' is not known; expected {listing(known)}.{suggestion(method, known)}")
    if isinstance(target, str) and target.lstrip("-").isdigit():
        target = int(target)
    crop = read_crop(plan, well, site, number)
    images, channel_ids, remarks = crop.image[None], plan.plates[0].channel_ids, []
    if not plan.trained:
        remarks.append(
            f"{plan.model_name} has UNTRAINED weights (random, seed {plan.seed}): the attribution is not meaningful."
        )
    if method == "attention":
        found = attention_scores(plan.model, images, channels=channel_ids)
        summary = f"{crop.name}: largest share of attention is {found.patches[0].max():.2f} times an equal share"
        if not found.compares_channels:
            remarks.append("This model pools within channels, so its scores do not compare channels.")
    else:
        found = attribute(plan.model, images, channels=channel_ids, target=target, method=method, steps=steps)
        shares = ", ".join(
            f"{name} {share:.0%}" for name, share in zip(crop.channel_names, found.channel_share[0], strict=True)
        )
        gained = found.output[0] - found.baseline_output[0]
        what = f"logit of {found.target} is {found.output[0]:.4g}, {gained:+.4g} relative to"
        if found.target == "embedding":
            what = f"distance {gained:.4g} from the embedding of"
        summary = f"{crop.name}: {what} a black crop; by channel {shares}"
        if method == "integrated_gradients" and abs(found.residual[0]) > 0.02 * abs(gained):
            remarks.append(
                f"The contributions differ from the total by {found.residual[0] / gained:+.1%}. Use more --steps "
                f"than {steps}."
            )
    title = f"{crop.name}\n{plan.model_name}" + ("" if plan.trained else ", UNTRAINED (random weights)")
    figure = draw_attribution(found, crop.image, crop.channel_names, title=title, um_per_px=crop.um_per_px)
    return Explained(figure, summary, remarks)
