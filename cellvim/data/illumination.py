"""Retrospective illumination correction: the shape of the light, estimated from many fields, is divided out.

This is CellProfiler's method (CorrectIlluminationCalculate over all images with a fitted polynomial, then Divide).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch

from cellvim.data.plate import sample_fields
from cellvim.errors import FieldReadError, InputError, PlateError, listing
from cellvim.files import atomic_path

if TYPE_CHECKING:
    from cellvim.data.plate import Plate

COARSE_SIDE = 128  # px; the light varies slowly, so that a coarse image of it is sufficient
MEDIAN_SIDE = 7  # coarse px; removes single cells and dust
DEGREE = 4  # of the polynomial
MIN_FIELDS = 8  # the mean of fewer fields still shows cells
FLOOR = 0.05  # of the brightest place; bounds the amplification of noise


@dataclass(frozen=True, eq=False)
class Illumination:
    """Relative illumination per channel, 1 on average.

    Attributes
    ----------
    channel_names
        C names.
    coarse
        (C, h, w) float32, above 0, at low resolution; interpolated to the size of a field when it is applied.
    """

    channel_names: tuple[str, ...]
    coarse: np.ndarray

    def __post_init__(self) -> None:
        coarse = np.array(self.coarse, np.float32)
        if coarse.ndim != 3 or len(coarse) != len(self.channel_names) or not (np.isfinite(coarse) & (coarse > 0)).all():
            raise ValueError("the illumination must be one image per channel, above 0 everywhere")
        coarse.setflags(write=False)
        object.__setattr__(self, "channel_names", tuple(self.channel_names))
        object.__setattr__(self, "coarse", coarse)

    @property
    def digest(self) -> str:
        """Hash of names and values."""
        return sha256("\0".join(self.channel_names).encode() + self.coarse.tobytes()).hexdigest()

    def at(self, height: int, width: int) -> np.ndarray:
        """Return the illumination at a field's size: (C, H, W) float32."""
        full = torch.nn.functional.interpolate(
            torch.from_numpy(self.coarse.copy())[None], size=(height, width), mode="bilinear", align_corners=False
        )
        return full[0].numpy()

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the image (C, H, W) divided by the illumination, float32."""
        if image.ndim != 3 or len(image) != len(self.channel_names):
            raise ValueError(f"the image has the shape {image.shape}; expected ({len(self.channel_names)}, H, W)")
        return image.astype(np.float32) / self.at(*image.shape[1:])

    def save(self, path: str | Path) -> None:
        """Write the illumination to an .npz file."""
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.savez(file, channel_names=np.array(self.channel_names), coarse=self.coarse)

    @classmethod
    def load(cls, path: str | Path) -> Illumination:
        """Read a file written by `save`.

        Raises
        ------
        InputError
            The file cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(tuple(str(n) for n in stored["channel_names"]), stored["coarse"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise InputError(f"{path} cannot be read as an illumination correction: {error}.") from error


def estimate_illumination(
    plate: Plate, channels: Sequence[str], *, max_fields: int = 200, seed: int = 0
) -> Illumination:
    """Estimate the illumination by fitting a smooth surface to the mean of many fields.

    Only one field and one coarse image per channel are held in memory.

    Parameters
    ----------
    plate
        The plate, whose fields must have the same size.
    channels
        Channel names on the plate.
    max_fields
        Number of fields to read, see `sample_fields`.
    seed
        Random seed for the choice of fields.

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

    total: np.ndarray | None = None
    shape: tuple[int, int] | None = None
    n_read = 0
    for field in sample_fields(plate.fields, max_fields, seed):
        try:
            image = field.read(channels).astype(np.float32)
        except FieldReadError:
            continue
        if shape is not None and image.shape[1:] != shape:
            raise PlateError(
                f"{plate.path}: field {field.name} has {image.shape[1]} x {image.shape[2]} pixels, others {shape[0]} x "
                f"{shape[1]}; the illumination can only be estimated from fields of one size."
            )
        shape = image.shape[1:]
        factors = tuple(max(1, n // COARSE_SIDE) for n in shape)
        kept = tuple(slice(0, n - n % f) for n, f in zip(shape, factors, strict=True))
        coarse = downscale_local_mean(np.nan_to_num(image)[:, kept[0], kept[1]], (1, *factors))
        total = coarse if total is None else total + coarse
        n_read += 1
    if total is None or n_read < MIN_FIELDS:
        raise PlateError(
            f"{plate.path}: {n_read} fields can be read; at least {MIN_FIELDS} are needed to estimate the illumination "
            f"({listing(channels)})."
        )
    surfaces = []
    for plane in total / n_read:
        smooth = _fit_surface(ndi.median_filter(plane, MEDIAN_SIDE, mode="nearest"))
        smooth = np.maximum(smooth, FLOOR * smooth.max()) if smooth.max() > 0 else np.ones_like(smooth)
        surfaces.append(smooth / smooth.mean())
    return Illumination(tuple(channels), np.stack(surfaces).astype(np.float32))


def _fit_surface(plane: np.ndarray) -> np.ndarray:
    """Fit a polynomial in y and x by least squares; unlike a filter, it does not flatten the edges."""
    axes = [np.polynomial.legendre.legvander(np.linspace(-1, 1, n), DEGREE) for n in plane.shape]
    powers = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    terms = np.stack([np.outer(axes[0][:, i], axes[1][:, j]).ravel() for i, j in powers], axis=1)
    coefficients = np.linalg.lstsq(terms, plane.ravel().astype(np.float64), rcond=None)[0]
    return (terms @ coefficients).reshape(plane.shape)
