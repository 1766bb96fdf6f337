"""Crops of plates, planned and cut as by `cellvim embed`, and stored in memory or in files."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import pandas as pd

from cellvim.channels import canonical_name, parse_channel_overrides
from cellvim.data.crops import stream_crops
from cellvim.data.intensity import RULES, cache_key
from cellvim.data.plate import open_plate
from cellvim.data.wells import canonical_well
from cellvim.embedding.options import PlateOptions, with_options
from cellvim.embedding.plan import PlatePlan, PlateSummary, default_input_size, inspect_plates, plan_plates
from cellvim.errors import CellvimWarning, InputError, MetadataError, OutputError, listing, suggestion
from cellvim.files import atomic_path
from cellvim.train.batches import CropGroup, DataDescription, TrainingData, class_names_of
from cellvim.train.splits import GROUPS, LEAKY, check_groups

if TYPE_CHECKING:
    from cellvim.data.plate import Plate

PERCENTILES = {"low_percentile": 0.1, "high_percentile": 99.9}  # the defaults of `estimate_intensity_scale`
MEMORY_BYTES = 1 << 31  # crops held in memory; larger sets are stored in files


class PlateCrops(TrainingData):
    """Crops of one or several OME-Zarr plates, with labels from their plate maps.

    Parameters
    ----------
    plates
        Paths. Plates may have different channels, and different names for them; they are matched by stain.
    label
        Column of the plate map; None to train without labels.
    classes
        Values of the label to train on. Other crops are unlabelled, or left out (``unlabelled=False``).
    unlabelled
        Keep crops without a label, for masked and joint training.
    leave_out_wells
        Wells to exclude, for instance those on which a trained model is evaluated.
    scale_by
        Reference for scaling intensities: "all" wells of a plate, or its negative "controls". Stored with the model, so
        that `cellvim embed` scales in the same way.
    cache
        Folder for crops that exceed 2 GB. Another training with the same crops reuses them. By default they are kept in
        the run's folder until the training ends.
    margin
        Pixels around each crop for random windows (``augmentation.pad_to``).
    unit, channels, wells, crop_size, crop_um, cells
        See `cellvim.embedding.options.PlateOptions`.
    batch_size, split, val, test, seed, workers
        See `TrainingData`.

    Notes
    -----
    Every field is decoded once. Its crops are kept in their stored type (crops of floating-point images are scaled
    first and kept as float16), and scaled on the device by percentiles of the plate. The model's input is the same as
    in `cellvim embed`.
    """

    @with_options(PlateOptions, only=("unit", "channels", "wells", "crop_size", "crop_um", "cells"))
    def __init__(
        self,
        plates: list[str],
        *,
        label: str | None = None,
        classes: list[str] | None = None,
        unlabelled: bool = False,
        leave_out_wells: list[str] | None = None,
        scale_by: Literal["all", "controls"] = "all",
        cache: str | None = None,
        margin: int = 0,
        batch_size: int = 256,
        split: str = "well",
        val: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        workers: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, split=split, val=val, test=test, seed=seed, workers=workers)
        if not plates:
            raise InputError("No plate was given; expected at least one path in --data.plates.")
        self.options = PlateOptions(scale_by=scale_by, **options)
        self.plates, self.label, self.classes = list(plates), label, classes
        self.unlabelled = unlabelled or label is None
        self.leave_out_wells, self.cache, self.margin = leave_out_wells, cache, margin
        self._keys: list[str] = []
        self._temporary: tempfile.TemporaryDirectory | None = None

    def read(self) -> None:
        """Plan the plates, check their labels, and cut their crops."""
        plates = [open_plate(path) for path in self.plates]
        where = listing((Path(plate.path).name for plate in plates), 3)
        wells = [self._labelled_wells(plate) for plate in plates]
        names: tuple[str, ...] = ()
        if self.label is not None:
            names = self._check_labels(wells, where)
        if not self.unlabelled:
            wells = [table[table["label"] != ""] for table in wells]
        summaries = [self._inspect(plate, table) for plate, table in zip(plates, wells, strict=True)]
        channel_names = tuple(dict.fromkeys(name for summary in summaries for name in self._model_channels(summary)))
        size, options = self._size(plates, summaries), self.options
        if options.unit != "field":
            options = replace(options, crop_size=size, crop_um=None)  # of the first plate, in pixels, for all plates
        plans = plan_plates(summaries, options, channel_names=channel_names)
        store = CropStore(self._folder(), sum(plan.n_fields for plan in plans))
        cut = [self._cut(plan, table, store) for plan, table in zip(plans, wells, strict=True)]
        cut = [(group, table) for group, table in cut if len(group.images)]
        if not cut:
            raise InputError(
                f"No {options.unit} was found in {where}. Check that the nuclear channel is named DNA and the images "
                "are in focus (`cellvim info`), or use --data.unit tile."
            )
        self.table = pd.concat([table for _, table in cut], ignore_index=True)
        self.groups = [group for group, _ in cut]
        self.description = DataDescription(
            channel_names=channel_names,
            class_names=names,
            crop_px=size,
            pixel_size_um=plates[0].pixel_size_um,
            unit=options.unit,
            intensity={"method": "percentile", "of": RULES[options.scale_by], **PERCENTILES},
            source=where,
        )

    def clear(self) -> None:
        """Remove the crops from the run's folder, unless they are in a cache."""
        if self.cache is None and self.run_folder is not None:
            folder = self._folder()
            for key in self._keys:
                for suffix in ("npy", "npz"):
                    (folder / f"{key}.{suffix}").unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _labelled_wells(self, plate: Plate) -> pd.DataFrame:
        """Return one row per selected well: the plate map, and ``label``, "" for unlabelled wells."""
        selected = set(plate.wells if self.options.wells is None else map(canonical_well, self.options.wells))
        left_out = set(map(canonical_well, self.leave_out_wells or ()))
        unknown = sorted((selected | left_out) - set(plate.wells)) if len(self.plates) == 1 else []
        if unknown:
            raise InputError(f"{Path(plate.path).name} has no well {listing(unknown)}; it has {listing(plate.wells)}.")
        wells = list(dict.fromkeys(field.well for field in plate.fields if field.well in selected - left_out))
        table = plate.well_metadata.reindex(wells)
        if "pert_type" in table and "Metadata_pert_type" not in table:
            table = table.assign(Metadata_pert_type=table["pert_type"])  # its name in `cellvim embed`
        label = ""
        if self.label is not None and self.label in table:
            label = table[self.label].astype("string").fillna("").to_numpy(object)
        table = table.assign(label=label, Metadata_Plate=plate.name, Metadata_Well=wells)
        if self.classes:
            table["label"] = [v if v in self.classes else "" for v in table["label"]]
        return table

    def _check_labels(self, wells: Sequence[pd.DataFrame], where: str) -> tuple[str, ...]:
        """Return the class names; raise if labels or split are not possible."""
        if not any(self.label in table for table in wells):
            columns = [c for c in dict.fromkeys(c for table in wells for c in table.columns) if c != "label"]
            raise MetadataError(
                f"The plate map of {where} has no column '{self.label}'; it has {listing(columns)}."
                f"{suggestion(str(self.label), columns)}"
            )
        joined = pd.concat(wells, ignore_index=True)
        missing = [name for name in self.classes or () if name not in set(joined["label"])]
        if missing:
            raise MetadataError(f"Label '{self.label}' of {where} has no value {listing(missing)}.")
        names = class_names_of(joined["label"].to_numpy(object), column=self.label, where=where)
        if self.split != LEAKY and (self.split in GROUPS or self.split not in joined):
            check_groups(joined, self.split, val=self.val, test=self.test, where=where)
        return names

    def _inspect(self, plate: Plate, wells: pd.DataFrame) -> PlateSummary:
        channels = self.options.channels
        if isinstance(channels, Mapping):  # of several plates, each has some of the channels
            channels = {name: c for name, c in channels.items() if c in plate.channel_names} or channels
        return inspect_plates(plate, replace(self.options, wells=list(wells.index), channels=channels))[0]

    def _model_channels(self, summary: PlateSummary) -> list[str]:
        """Return the model's names for the channels of a plate: those given, or their stains."""
        channels = self.options.channels
        if isinstance(channels, Mapping):
            return summary.meanings
        if channels is not None:
            pairs = parse_channel_overrides(channels if isinstance(channels, str) else ",".join(channels))
            return [meaning or name for meaning, name in pairs]
        names = [canonical_name(channel) or channel for channel in summary.channels]
        return [c if names.count(n) > 1 else n for c, n in zip(summary.channels, names, strict=True)]

    def _size(self, plates: Sequence[Plate], summaries: Sequence[PlateSummary]) -> int:
        """Return the side of the model's input in pixels."""
        if self.options.unit != "field":
            return default_input_size(summaries[0], self.options)
        sides = {side for plate in plates for f in plate.fields if f.is_readable for side in f.shape[1:]}
        if len(sides) != 1:
            raise InputError("Training on entire fields requires squares of one size; use --data.unit tile.")
        return sides.pop()

    def _cut(self, plan: PlatePlan, wells: pd.DataFrame, store: CropStore) -> tuple[CropGroup, pd.DataFrame]:
        """Return the crops of a plate, cut or from the cache, and one row per crop."""
        spec, source, fields = plan.cutting, plan.cells, plan.fields
        if spec.unit != "field":
            spec = replace(spec, size_px=spec.size_px + 2 * self.margin)
        stored = next((f.dtype.newbyteorder("=") for f in fields if f.is_readable), np.dtype(np.float16))
        is_integer = stored in (np.uint8, np.uint16)  # other crops are scaled when they are cut
        scale, dtype = (None, stored) if is_integer else (plan.scale, np.dtype(np.float16))
        key = cache_key(
            plan.plate,
            plan.channels,
            {
                "spec": repr(spec),
                "cells": source and source.name,
                "dna": plan.dna,
                "fields": [f.name for f in fields],
                "scale": None if scale is None else scale.to_dict(),
            },
        )[:16]
        self._keys.append(key)
        found = store.find(key, len(fields))
        if found is None:
            tables, failed = [], []
            streamed = stream_crops(
                fields, plan.channels, spec, scale=scale, cells=source, extra_channels=plan.extra_channels
            )
            with store.writing(key):
                for crops in streamed:
                    if crops.failed is not None:
                        failed.append(f"{crops.field.name} ({crops.failed})")
                        continue
                    if is_integer and not np.can_cast(crops.field.dtype, dtype):
                        raise InputError(
                            f"{crops.field.name} of {plan.plate.name} has pixels of type {crops.field.dtype}, others "
                            f"{dtype}; expected one type. Import the plate again."
                        )
                    store.append(crops.crops.numpy().astype(dtype))
                    tables.append(
                        crops.table[["object_number", "y_px", "x_px"]].assign(
                            Metadata_Well=crops.field.well, Metadata_Site=str(crops.field.site)
                        )
                    )
                columns = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
                found = store.finish(columns)
            if failed:
                warnings.warn(
                    f"{len(failed)} of {len(fields)} fields of {plan.plate.name} could not be read and are left out: "
                    f"{listing(failed, 3)}.",
                    CellvimWarning,
                    stacklevel=2,
                )
        images, table = found
        if len(table):
            table = table.join(wells.drop(columns="Metadata_Well"), on="Metadata_Well")
        return CropGroup(images, tuple(plan.channel_ids), plan.scale if is_integer else None), table

    def _folder(self) -> Path:
        """Return the folder for crops that do not fit in memory."""
        if self.cache is not None:
            return Path(self.cache)
        if self.run_folder is not None:
            return self.run_folder / "crops"
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="cellvim-crops-")
        return Path(self._temporary.name)


class CropFile:
    """Crops (n, C, S, S) in an ``.npy`` file, read when they are indexed. Pickled as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: np.memmap | None = None

    @property
    def mapped(self) -> np.memmap:
        """The memory-mapped file."""
        if self._mapped is None:
            self._mapped = np.lib.format.open_memmap(self.path, mode="r")
        return self._mapped

    def __len__(self) -> int:
        return len(self.mapped)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(self.mapped[rows])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_mapped": None}


class CropStore:
    """Collects the crops of one plate after another: in memory, or in files once they exceed `MEMORY_BYTES`.

    Parameters
    ----------
    folder
        Folder for the files; created when needed.
    n_fields
        Number of fields of all plates, to estimate the size of the files.
    """

    def __init__(self, folder: Path, n_fields: int) -> None:
        self.folder, self.n_fields = Path(folder), n_fields
        self.bytes = self.fields = 0  # cut so far
        self.uses_files = False
        self.key, self.rows = "", 0
        self.parts: list[np.ndarray] = []  # of the current plate, in memory
        self.file: BinaryIO | None = None
        self.dtype, self.shape = np.dtype(np.float16), (0, 0, 0)  # of the crops in the file

    def find(self, key: str, n_fields: int) -> tuple[CropFile, pd.DataFrame] | None:
        """Return the crops and the table of a plate from the cache; None if they are not there."""
        images = CropFile(self.folder / f"{key}.npy")
        try:
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as stored:
                table = pd.DataFrame({name: stored[name] for name in stored.files})
            if len(images) != len(table):
                return None
        except (OSError, ValueError, KeyError):
            return None  # missing or incomplete
        self.uses_files = True
        self.n_fields -= n_fields
        return images, table

    @contextmanager
    def writing(self, key: str) -> Iterator[None]:
        """Start a plate; an unfinished file is removed at the end.

        Raises
        ------
        OutputError
            The crops cannot be written.
        """
        self.key, self.rows, self.parts = key, 0, []
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"The crops cannot be written to {self.folder}: {error.strerror or error}. Choose a --data.cache on "
                "another disk."
            ) from error
        finally:
            if self.file is not None:
                self.file.close()
                Path(self.file.name).unlink(missing_ok=True)
                self.file = None

    def append(self, crops: np.ndarray) -> None:
        """Add the crops of a field."""
        self.fields += 1
        self.bytes += crops.nbytes
        self.rows += len(crops)
        self.uses_files |= self.bytes > MEMORY_BYTES
        if not self.uses_files:
            self.parts.append(crops)
        elif len(crops):
            if self.file is None:
                self._open_file(crops)
            crops.tofile(self.file)

    def finish(self, table: pd.DataFrame) -> tuple[np.ndarray | CropFile, pd.DataFrame]:
        """Return the crops of the plate and their table, which is stored with them."""
        if self.file is None:
            parts = [part for part in self.parts if len(part)] or self.parts[:1]
            return np.concatenate(parts) if parts else np.zeros((0, 0, 0, 0), np.float16), table
        self.file.seek(0)
        self._write_header(self.rows)
        self.file.close()
        os.replace(self.file.name, self.folder / f"{self.key}.npy")
        self.file = None
        with atomic_path(self.folder / f"{self.key}.npz") as partial:
            np.savez(partial, **{n: v.to_numpy(str if v.dtype == object else None) for n, v in table.items()})
        return CropFile(self.folder / f"{self.key}.npy"), table

    def _open_file(self, crops: np.ndarray) -> None:
        """Open a file with the crops in memory, if the disk has space for all that are to come."""
        needed = int(self.bytes / self.fields * self.n_fields)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"The crops need about {_gigabytes(needed)} of disk ({self.fields} of {self.n_fields} fields take "
                f"{_gigabytes(self.bytes)}), and {self.folder} has {_gigabytes(free)}. Choose a --data.cache on "
                "another disk, or fewer or smaller crops: --data.wells, --data.crop_size, --data.margin."
            )
        warnings.warn(
            f"The crops need about {_gigabytes(needed)}, more than the {_gigabytes(MEMORY_BYTES)} kept in memory; they "
            f"are stored in {self.folder}.",
            CellvimWarning,
            stacklevel=2,
        )
        self.file = (self.folder / f"{self.key}.{os.getpid()}.partial").open("wb")
        self.dtype, self.shape = crops.dtype, crops.shape[1:]
        self._write_header(0)
        for part in self.parts:
            part.tofile(self.file)
        self.parts = []

    def _write_header(self, rows: int) -> None:
        """Write the header of the .npy file; its length does not depend on the number of crops."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, *self.shape)}
        np.lib.format.write_array_header_2_0(self.file, header)


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB"
