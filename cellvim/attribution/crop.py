"""One crop of a plate, cut and scaled as `cellvim.embed` does, and what drove its embedding: `cellvim attribute`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import FieldReadError, InputError, listing, suggestion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    from cellvim.data.crops import resize_on_device, stream_crops
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
        [cut] = stream_crops(
            [field],
            plate.channels,
            plate.cutting,
            scale=plate.scale,
            cells=plate.cells,
            workers=1,
            extra_channels=plate.extra_channels,
            illumination=plate.illumination,
        )
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
    crop = crop if plan.input_px is None else resize_on_device(crop, plan.input_px)
    pixel = plate.cutting.um_per_px or field.pixel_size_um
    if pixel is not None and plate.crop_px is not None:
        pixel *= plate.crop_px / plan.input_px
    return Crop(crop[0].numpy(), list(plate.channels), f"{plate.name}__{well}__{field.site}__{numbers[place]}", pixel)


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
    images, channel_ids, remarks = crop.image[None], plan.plates[0].channel_ids, []
    if not plan.trained:
        remarks.append(
            f"{plan.model_name} has UNTRAINED weights (random, seed {plan.seed}): what drives its embedding is chance."
        )
    if method == "attention":
        found = attention_scores(plan.model, images, channels=channel_ids)
        summary = f"{crop.name}: largest share of attention {found.patches[0].max():.2f} times an even one"
        if not found.compares_channels:
            remarks.append("This model pools within each channel, so its scores do not compare channels.")
    else:
        found = attribute(
            plan.model, images, channels=plan.plates[0].channel_ids, target=target, method=method, steps=steps
        )
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
