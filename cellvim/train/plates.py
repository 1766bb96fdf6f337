"""Crops of plates, planned and cut as by `cellvim embed`, and stored in memory or in files."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
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
        names = () if self.label is None else self._check_labels(wells, where)
        if not self.unlabelled:
            wells = [table[table["label"] != ""] for table in wells]
        summaries = []
        for plate, table in zip(plates, wells, strict=True):
            channels = self.options.channels
            if isinstance(channels, Mapping):  # of several plates, each has some of the channels
                channels = {name: c for name, c in channels.items() if c in plate.channel_names} or channels
            summaries += inspect_plates(plate, replace(self.options, wells=list(table.index), channels=channels))
        channel_names = tuple(dict.fromkeys(name for summary in summaries for name in self._model_channels(summary)))
        options = self.options
        if options.unit == "field":
            sides = {side for plate in plates for f in plate.fields if f.is_readable for side in f.shape[1:]}
            if len(sides) != 1:
                raise InputError("Training on entire fields requires squares of one size; use --data.unit tile.")
            size = sides.pop()
        else:
            size = default_input_size(summaries[0], options)
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
            training_data=where,
        )

    def clear(self) -> None:
        """Remove the crops from the run's folder, unless they are in a cache."""
        if self.cache is None and self.run_folder is not None:
            folder = self._folder()
            for key in self._keys:
                (folder / f"{key}.npy").unlink(missing_ok=True)
                (folder / f"{key}.npz").unlink(missing_ok=True)
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

    def _cut(self, plan: PlatePlan, wells: pd.DataFrame, store: CropStore) -> tuple[CropGroup, pd.DataFrame]:
        """Return the crops of a plate, cut or from the cache, and one row per crop."""
        spec, source, fields = plan.cutting, plan.cells, plan.fields
        if spec.unit != "field":
            spec = replace(spec, size_px=spec.size_px + 2 * self.margin)
        stored = next((f.dtype.newbyteorder("=") for f in fields if f.is_readable), np.dtype(np.float16))
        is_integer = stored in (np.uint8, np.uint16)  # other crops are scaled when they are cut
        scale, dtype = (None, stored) if is_integer else (plan.scale, np.dtype(np.float16))
        parameters = {
            "spec": repr(spec),
            "cells": source and source.name,
            "dna": plan.dna,
            "fields": [f.name for f in fields],
            "scale": None if scale is None else scale.to_dict(),
        }
        key = cache_key(plan.plate, plan.channels, parameters)[:16]
        self._keys.append(key)
        tables: list[pd.DataFrame] = []
        failed: list[str] = []

        def cut_fields() -> Iterator[np.ndarray]:
            for crops in stream_crops(
                fields, plan.channels, spec, scale=scale, cells=source, extra_channels=plan.extra_channels
            ):
                field = crops.field
                if crops.failed is not None:
                    failed.append(f"{field.name} ({crops.failed})")
                    continue
                if is_integer and not np.can_cast(field.dtype, dtype):
                    raise InputError(
                        f"{field.name} of {plan.plate.name} has pixels of type {field.dtype}, others {dtype}; expected "
                        "one type. Import the plate again."
                    )
                table = crops.table[["object_number", "y_px", "x_px"]]
                tables.append(table.assign(Metadata_Well=field.well, Metadata_Site=str(field.site)))
                yield crops.crops.numpy().astype(dtype)

        images, table = store.find(key, len(fields)) or store.add(key, cut_fields(), tables)
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(fields)} fields of {plan.plate.name} could not be read and are left out: "
                f"{listing(failed, 3)}.",
                CellvimWarning,
                stacklevel=2,
            )
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

    @cached_property
    def mapped(self) -> np.memmap:
        """The memory-mapped file."""
        return np.lib.format.open_memmap(self.path, mode="r")

    def __len__(self) -> int:
        return len(self.mapped)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(self.mapped[rows])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


class CropStore:
    """Stores the crops of one plate after another: in memory, or in files once they exceed `MEMORY_BYTES`.

    ``n_fields`` is the number of fields of all plates, to estimate the size of the files.
    """

    def __init__(self, folder: Path, n_fields: int) -> None:
        self.folder, self.n_fields = Path(folder), n_fields
        self.bytes = self.fields = 0  # cut so far
        self.uses_files = False

    def find(self, key: str, n_fields: int) -> tuple[CropFile, pd.DataFrame] | None:
        """Return the crops and the table of a plate from the cache; None if they are missing or incomplete."""
        images = CropFile(self.folder / f"{key}.npy")
        try:
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as stored:
                table = pd.DataFrame({name: stored[name] for name in stored.files})
            if len(images) != len(table):
                return None
        except (OSError, ValueError, KeyError):
            return None
        self.uses_files = True
        self.n_fields -= n_fields
        return images, table

    def add(
        self, key: str, crops: Iterator[np.ndarray], tables: list[pd.DataFrame]
    ) -> tuple[np.ndarray | CropFile, pd.DataFrame]:
        """Store the crops of a plate, and the tables that ``crops`` appends with each field; return both.

        Raises
        ------
        OutputError
            The crops cannot be written.
        """
        parts: list[np.ndarray] = []  # in memory
        rows, file, stored = 0, None, self.folder / f"{key}.npy"
        partial = self.folder / f"{key}.{os.getpid()}.partial"
        try:
            for part in crops:
                self.fields += 1
                self.bytes += part.nbytes
                self.uses_files |= self.bytes > MEMORY_BYTES
                rows += len(part)
                parts += [part] if len(part) or not parts else []
                if self.uses_files and rows:
                    if file is None:
                        self._check_space()
                        file, first = partial.open("wb"), parts[-1]
                        _write_header(file, first, 0)
                    for waiting in parts:
                        waiting.tofile(file)
                    parts = []
            table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
            if file is None:
                parts = [part for part in parts if len(part)] or parts
                return np.concatenate(parts) if parts else np.zeros((0, 0, 0, 0), np.float16), table
            file.seek(0)
            _write_header(file, first, rows)
            file.close()
            os.replace(partial, stored)
            with atomic_path(stored.with_suffix(".npz")) as target:
                np.savez(target, **{n: v.to_numpy(str if v.dtype == object else None) for n, v in table.items()})
            return CropFile(stored), table
        except OSError as error:
            raise OutputError(
                f"The crops cannot be written to {self.folder}: {error.strerror or error}. Choose a --data.cache on "
                "another disk."
            ) from error
        finally:
            if file is not None:
                file.close()
                partial.unlink(missing_ok=True)

    def _check_space(self) -> None:
        """Create the folder; raise if its disk has too little space for all crops."""
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


def _write_header(file: BinaryIO, crops: np.ndarray, rows: int) -> None:
    """Write the header of an .npy file of such crops; its length does not depend on the number of rows."""
    header = {"descr": crops.dtype.str, "fortran_order": False, "shape": (rows, *crops.shape[1:])}
    np.lib.format.write_array_header_2_0(file, header)


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB"
