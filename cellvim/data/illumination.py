"""Retrospective illumination correction: the light's shape, from the average of many fields, divided out.

This is CellProfiler's method (CorrectIlluminationCalculate over all images with a fitted polynomial, then Divide).
BaSiC does better on few images and needs a much larger library.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from cellvim.errors import FieldReadError, InputError, PlateError, listing

if TYPE_CHECKING:
    from cellvim.data.plate import Plate

COARSE_SIDE = 128  # px: light varies slowly, so that a coarse picture of it is enough
MEDIAN_SIDE = 7  # coarse px: takes out single cells and dust
DEGREE = 4  # of the polynomial: light falls off smoothly, and its edges must not be flattened as filters flatten them
MIN_FIELDS = 8  # cells still show in the average of fewer
FLOOR = 0.05  # of the brightest place: where there is less light, noise would be blown up


@dataclass(frozen=True, eq=False)
class Illumination:
    """The light's shape for each channel: relative, 1 on average.

    Attributes
    ----------
    channel_names
        C names.
    coarse
        (C, h, w) float32, above 0: a coarse picture of it, stretched over the field when it is applied.
    """

    channel_names: tuple[str, ...]
    coarse: np.ndarray

    def __post_init__(self) -> None:
        coarse = np.array(self.coarse, np.float32)
        if coarse.ndim != 3 or len(coarse) != len(self.channel_names) or not (np.isfinite(coarse) & (coarse > 0)).all():
            raise ValueError("the light's shape must be above 0 everywhere, one picture a channel")
        coarse.setflags(write=False)
        object.__setattr__(self, "channel_names", tuple(self.channel_names))
        object.__setattr__(self, "coarse", coarse)

    @property
    def digest(self) -> str:
        """Hash of names and values."""
        return sha256("\0".join(self.channel_names).encode() + self.coarse.tobytes()).hexdigest()

    def at(self, height: int, width: int) -> np.ndarray:
        """Return the light's shape at a field's size: (C, H, W) float32."""
        import torch

        stretched = torch.nn.functional.interpolate(
            torch.from_numpy(self.coarse.copy())[None], size=(height, width), mode="bilinear", align_corners=False
        )
        return stretched[0].numpy()

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the image (C, H, W) with the light divided out, float32."""
        if image.ndim != 3 or len(image) != len(self.channel_names):
            raise ValueError(f"the image has the shape {image.shape}; expected ({len(self.channel_names)}, H, W)")
        return image.astype(np.float32) / self.at(*image.shape[1:])

    def save(self, path: str | Path) -> None:
        """Write it as one .npz file."""
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, channel_names=np.array(self.channel_names), coarse=self.coarse)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Illumination:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            It cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(tuple(str(n) for n in stored["channel_names"]), stored["coarse"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise InputError(f"{path} cannot be read as an illumination correction: {error}.") from error


def estimate_illumination(
    plate: Plate, channels: Sequence[str], *, max_fields: int = 200, seed: int = 0
) -> Illumination:
    """Estimate the light's shape from the mean of many fields, to which a smooth surface is fitted.

    Memory holds one field and one coarse picture a channel, however many fields are read.

    Parameters
    ----------
    plate
        The plate; its fields must be of one size.
    channels
        Names on the plate.
    max_fields
        How many fields to read, spread over the plate.
    seed
        Of that choice.

    Raises
    ------
    PlateError
        Fewer than 8 fields can be read, or they differ in size.

    References
    ----------
    Singh, Bray, Jones & Carpenter, "Pipeline for illumination correction of images for high-throughput microscopy",
    J. Microscopy, 2014.
    """
    from scipy import ndimage as ndi
    from skimage.transform import downscale_local_mean

    from cellvim.data.intensity import _spread

    total: np.ndarray | None = None
    shape: tuple[int, int] | None = None
    used = 0
    for field in _spread(plate.fields, max_fields, seed):
        try:
            image = field.read(channels).astype(np.float32)
        except FieldReadError:
            continue
        if shape is not None and image.shape[1:] != shape:
            raise PlateError(
                f"{plate.path}: field {field.name} is {image.shape[1]} x {image.shape[2]} where others are {shape[0]} "
                f"x {shape[1]}; the light of a plate can be estimated from fields of one size only."
            )
        shape = image.shape[1:]
        factors = tuple(max(1, n // COARSE_SIDE) for n in shape)
        kept = tuple(slice(0, n - n % f) for n, f in zip(shape, factors, strict=True))
        coarse = downscale_local_mean(np.nan_to_num(image)[:, kept[0], kept[1]], (1, *factors))
        total = coarse if total is None else total + coarse
        used += 1
    if total is None or used < MIN_FIELDS:
        raise PlateError(
            f"{plate.path}: {used} fields can be read; at least {MIN_FIELDS} are needed to tell light from cells "
            f"({listing(channels)})."
        )
    functions = []
    for plane in total / used:
        smooth = _surface(ndi.median_filter(plane, MEDIAN_SIDE, mode="nearest"))
        smooth = np.maximum(smooth, FLOOR * smooth.max()) if smooth.max() > 0 else np.ones_like(smooth)
        functions.append(smooth / smooth.mean())
    return Illumination(tuple(channels), np.stack(functions).astype(np.float32))


def _surface(plane: np.ndarray) -> np.ndarray:
    """Fit a polynomial in y and x by least squares."""
    axes = [np.polynomial.legendre.legvander(np.linspace(-1, 1, n), DEGREE) for n in plane.shape]
    powers = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    terms = np.stack([np.outer(axes[0][:, i], axes[1][:, j]).ravel() for i, j in powers], axis=1)
    coefficients = np.linalg.lstsq(terms, plane.ravel().astype(np.float64), rcond=None)[0]
    return (terms @ coefficients).reshape(plane.shape)
