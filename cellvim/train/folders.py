"""Labelled crops in image files: one folder per class, or a table of files."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from cellvim.data.intensity import IntensityScale
from cellvim.errors import InputError, MetadataError, listing, suggestion
from cellvim.train.batches import CropGroup, DataDescription, TrainingData, class_names_of

_IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".npy")
_PATHS = ("path", "file", "filename", "image", "image_path", "crop")  # columns that name a crop's file


class LabelledCrops(TrainingData):
    """Crops of single cells, one image file each.

    Parameters
    ----------
    folder
        Folder with one folder per class or, with ``table``, with the images that it lists.
    table
        CSV with a column ``path`` (or ``file``, ``image``) relative to ``folder``, and a column of labels.
    label
        Column of the labels. Without a table, the name of the folder is the label.
    pattern
        Regular expression for file names whose named groups become columns, such as ``(?P<Metadata_Plate>P\\d+)``.
    channels
        Names of the images' channels.
    crop_size
        Side of the model's input in pixels; that of the images by default.
    pixel_size_um
        Side of a pixel in µm, if known.
    leave_out
        Classes to leave out.
    lazy
        Read images when they are needed (with ``workers``), for more images than fit in memory. Images may differ in
        size: the shorter side is resized to 8/7 of ``crop_size`` (256 for 224), and the central square is kept.
    batch_size, split, val, test, seed, workers
        See `TrainingData`.

    Notes
    -----
    Images of one size are kept in memory in their stored type. Intensities are scaled by the 0.1 and 99.9 percentiles
    of the training crops, per channel.
    """

    def __init__(
        self,
        folder: str,
        *,
        table: str | None = None,
        label: str = "label",
        pattern: str | None = None,
        channels: list[str] | None = None,
        crop_size: int | None = None,
        pixel_size_um: float | None = None,
        leave_out: list[str] | None = None,
        lazy: bool = False,
        split: str = "plate",
        **options: Any,
    ) -> None:
        super().__init__(split=split, **options)
        self.folder, self.table_path, self.label, self.pattern = folder, table, label, pattern
        self.channels, self.crop_size, self.pixel_size_um = channels, crop_size, pixel_size_um
        self.leave_out, self.lazy = tuple(leave_out or ()), lazy
        if not str(folder):
            raise InputError("No folder of crops was given; expected --data.folder.")
        if lazy and crop_size is None:
            raise InputError("lazy=True requires crop_size: images may differ in size.")

    def read(self) -> None:
        """Find and read the crops."""
        where = str(self.folder)
        if self.table_path is None:
            table = find_crops(self.folder, pattern=self.pattern)
        else:
            table = read_crop_table(self.table_path, self.folder, pattern=self.pattern)
            if self.label not in table:
                raise MetadataError(
                    f"{Path(self.table_path).name} has no column '{self.label}'; it has {listing(table.columns)}."
                    f"{suggestion(self.label, table.columns)}"
                )
            table["label"] = table[self.label].to_numpy(object)
        if self.leave_out:
            unknown = sorted(set(self.leave_out) - set(table["label"].astype(str)))
            if unknown:
                raise MetadataError(f"leave_out contains {listing(unknown)}, which is not a class of {where}.")
            table = table[~table["label"].astype(str).isin(self.leave_out)].reset_index(drop=True)
        classes = class_names_of(table["label"].to_numpy(object), column=self.label, where=where)
        if self.lazy:
            n_channels = len(self.channels) if self.channels else None
            images = LazyCrops(tuple(table["path"]), self.crop_size * 8 // 7, n_channels)
        else:
            images = read_crops(table["path"])
        channels = tuple(self.channels or (f"channel{i}" for i in range(images.shape[1])))
        if len(channels) != images.shape[1]:
            raise InputError(
                f"channels contains {len(channels)} names ({listing(channels)}), but the crops of {where} have "
                f"{images.shape[1]} channels."
            )
        self.table = table
        self.description = DataDescription(
            channel_names=channels,
            class_names=classes,
            crop_px=self.crop_size or images.shape[-1],
            pixel_size_um=self.pixel_size_um,
            training_data=where,
        )
        self.groups = [CropGroup(images, tuple(range(len(channels))))]

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data once, and estimate the intensity scale from the training crops."""
        if self.description is not None:
            return
        super().setup(stage)
        group = self.groups[0]
        train = self.rows["train"]
        if self.lazy:  # a sample suffices for percentiles
            train = np.random.default_rng(self.seed).permutation(train)[:512]
        group.scale = scale_of_crops(group.images[np.sort(train)], self.description.channel_names)
        self.description.intensity = group.scale.to_dict()


class LazyCrops:
    """Images on disk with the interface of an array (n, C, S, S): read, resized and cropped when indexed.

    C is ``n_channels``, or the number of channels of the first image. Grey images are repeated in all channels.
    """

    def __init__(self, paths: tuple[str, ...], size: int, n_channels: int | None = None) -> None:
        self.paths, self.size = paths, size
        found = read_crop(paths[0]).shape[0]
        self.shape = (len(paths), found if n_channels is None or found > 1 else n_channels, size, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self.read(self.paths[i]) for i in rows])

    def read(self, path: str) -> np.ndarray:
        """Read an image as (C, S, S) float32."""
        image = read_crop(path)
        if image.shape[0] != self.shape[1]:
            channels = self.shape[1]
            if image.shape[0] != 1:
                raise InputError(f"{path} has {image.shape[0]} channels; expected {channels}, as in the other crops.")
            image = image.repeat(channels, axis=0)
        height, width = image.shape[1:]
        factor = self.size / min(height, width)
        size = (max(self.size, round(height * factor)), max(self.size, round(width * factor)))
        resized = F.interpolate(torch.from_numpy(image.astype(np.float32))[None], size, mode="bilinear", antialias=True)
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        return resized[0, :, top : top + self.size, left : left + self.size].numpy()


def find_crops(folder: str | Path, *, pattern: str | None = None) -> pd.DataFrame:
    """Return one row per image of a folder with one folder per class: path, label, and the groups of ``pattern``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} of labelled crops; expected one folder per class.")
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    paths = [p for c in classes for p in sorted(c.rglob("*")) if p.suffix.lower() in _IMAGES]
    if not paths:
        raise InputError(
            f"{folder} has no images in folders named by their class; expected CLASS/crop.png, or give a table with "
            "--data.table."
        )
    labels = [p.relative_to(folder).parts[0] for p in paths]
    return _named(pd.DataFrame({"path": [str(p) for p in paths], "label": labels}), pattern)


def read_crop_table(table: str | Path, folder: str | Path, *, pattern: str | None = None) -> pd.DataFrame:
    """Read a table of crops; its column of file names becomes ``path``."""
    path = Path(table)
    if not path.is_file():
        raise InputError(f"There is no table {path} of crops.")
    try:
        rows = pd.read_csv(path, sep=None, engine="python")
    except (ValueError, OSError, csv.Error) as error:
        raise MetadataError(f"{path} cannot be read as a table ({str(error).splitlines()[0]}).") from error
    column = next((c for c in rows.columns if str(c).lower() in _PATHS), None)
    if column is None:
        raise MetadataError(
            f"{path} has no column of file names ({listing(_PATHS)}); it has {listing(rows.columns)}. Rename one "
            "of them to path."
        )
    rows["path"] = [str(Path(folder) / str(p)) for p in rows[column]]
    return _named(rows, pattern)


def _named(table: pd.DataFrame, pattern: str | None) -> pd.DataFrame:
    """Add the named groups of ``pattern`` in the file names as columns."""
    if pattern is None:
        return table
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"The pattern '{pattern}' is not a valid regular expression ({error}).") from error
    if not compiled.groupindex:
        raise InputError(f"The pattern '{pattern}' has no named group, as in (?P<Metadata_Plate>P[0-9]+).")
    found = {path: compiled.search(Path(path).name) for path in table["path"]}
    mismatched = [Path(path).name for path, match in found.items() if match is None]
    if mismatched:
        raise MetadataError(
            f"{len(mismatched)} of {len(found)} file names do not match '{pattern}', such as {mismatched[0]}."
        )
    return table.assign(**{g: [found[path][g] for path in table["path"]] for g in compiled.groupindex})


def read_crops(paths: Any) -> np.ndarray:
    """Read images of the same shape into an array (n, C, H, W) of their stored type."""
    images: np.ndarray | None = None
    for number, path in enumerate(paths):
        image = read_crop(path)
        if images is None:
            _check_memory(len(paths) * image.nbytes, len(paths))
            images = np.empty((len(paths), *image.shape), image.dtype)
        if image.shape != images.shape[1:] or image.dtype != images.dtype:
            raise InputError(
                f"{path} is {image.shape} {image.dtype}, but {paths[0]} is {images.shape[1:]} {images.dtype}; expected "
                "crops of the same size, channels and type."
            )
        images[number] = image
    return images


def _check_memory(needed: int, n_crops: int) -> None:
    """Raise if the crops exceed 80% of the machine's memory, where the system reports it."""
    try:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return
    if needed > 0.8 * available:
        raise InputError(
            f"The {n_crops:,} crops need {needed / 1e9:,.1f} GB of memory, and this machine has {available / 1e9:,.1f} "
            "GB. Read them when they are needed: --data.lazy true --data.workers 4, with a --data.crop_size."
        )


def read_crop(path: str | Path) -> np.ndarray:
    """Read one image as (C, H, W)."""
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            image = np.load(path, allow_pickle=False)
        elif path.suffix.lower() in (".tif", ".tiff"):
            import tifffile

            image = tifffile.imread(path)
        else:
            import imagecodecs

            image = imagecodecs.imread(str(path))
    except Exception as error:  # each library raises types of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"The crop {path} cannot be read ({reason}).") from error
    if image.ndim == 2:
        return image[None]
    if image.ndim == 3:
        # colour images have channels last, arrays and microscopy TIFFs first
        return np.moveaxis(image, -1, 0) if image.shape[-1] < image.shape[0] else image
    raise InputError(f"The crop {path} has the shape {image.shape}; expected (H, W), (H, W, C) or (C, H, W).")


def scale_of_crops(images: np.ndarray, channel_names: tuple[str, ...]) -> IntensityScale:
    """Return the 0.1 and 99.9 percentiles of crops (n, C, H, W), per channel."""
    step = max(1, images[:, 0].size // 20_000_000)
    low, high = np.percentile(
        images[::step].astype(np.float32).transpose(1, 0, 2, 3).reshape(images.shape[1], -1), (0.1, 99.9), axis=1
    )
    return IntensityScale(channel_names, low, high)
