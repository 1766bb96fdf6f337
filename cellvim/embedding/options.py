"""What can be asked of an embedding, and its defaults, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cellvim.errors import InputError, listing, suggestion

if TYPE_CHECKING:
    from cellvim.models.encoder import Encoder

Unit = Literal["cell", "tile", "field"]
Channels = str | Sequence[str] | Mapping[str, str] | None
Plates = "str | Path | Plate | Sequence[str | Path | Plate]"

UNITS = ("cell", "tile", "field")
PRECISIONS = ("auto", "float32", "bfloat16")
SCALE_BY = ("auto", "all", "controls", "model")
DEFAULT_MODEL = "fastchannelvim_tiny_patch16"


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """What decides the rows, but for the plates; what each is, `cellvim.embed` says, and:

    Attributes
    ----------
    tokens
        Also maps of tokens, for the unit "field".
    view
        Which plane, time point and resolution of plates that are given by path: arguments of `open_plate`.
    """

    model: str | Path | Encoder = DEFAULT_MODEL
    unit: Unit = "cell"
    channels: Channels = None
    wells: Sequence[str] | None = None
    crop_size: int | None = None
    crop_um: float | None = None
    um_per_px: float | None = None
    overlap: float = 0.0
    cells: str | Path = "nuclei"
    border: str = "pad"
    mask_neighbours: bool = False
    scale_by: Literal["auto", "all", "controls", "model"] = "auto"
    illumination: bool = False
    batch_size: int | None = None
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    per_channel: bool = False
    probabilities: bool = False
    tokens: bool = False
    seed: int = 0
    view: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Refuse what cannot be meant, whatever the plates and the model.

        Raises
        ------
        InputError
            A choice that there is not, or two that do not go together.
        """
        if self.unit not in UNITS:
            raise InputError(
                f"The unit '{self.unit}' is not known; expected {listing(UNITS)}.{suggestion(self.unit, UNITS)}"
            )
        check_size(self.unit, self.crop_size)
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"The batch size is {self.batch_size}; expected at least 1.")
        if self.scale_by not in SCALE_BY:
            raise InputError(f"Intensities can be scaled by {listing(SCALE_BY)}, not by '{self.scale_by}'.")
        if self.precision not in PRECISIONS:
            raise InputError(f"The precision '{self.precision}' is not known; expected {listing(PRECISIONS)}.")
        if self.tokens and self.unit != "field":
            raise InputError(f"Maps of tokens are of whole fields: --tokens needs --unit field, not {self.unit}.")


def check_size(unit: str, crop_size: int | None) -> None:
    """Refuse a crop size that the unit has not, or that is too small.

    Raises
    ------
    InputError
        It is so.
    """
    if unit == "field" and crop_size is not None:
        raise InputError("A crop size goes with the units cell and tile; a field is embedded whole.")
    if crop_size is not None and crop_size < 8:
        raise InputError(f"The crop size is {crop_size} pixels; expected at least 8.")
