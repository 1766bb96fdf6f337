"""Crops of plates: field → crop → normalise as in `cellvim embed`, cut once and then read in any order."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cellvim.channels import canonical_name, match_channels
from cellvim.data.crops import FieldCrops, stream_crops
from cellvim.data.intensity import RULES
from cellvim.errors import CellvimWarning, InputError, MetadataError, listing, suggestion
from cellvim.train.batches import CropGroup, DataDescription, TrainingData, class_names_of
from cellvim.train.crop_store import CropFile, CropStore, remove_files
from cellvim.train.splits import GROUPS, LEAKY, check_groups

if TYPE_CHECKING:
    import pandas as pd

    from cellvim.data.intensity import IntensityScale
    from cellvim.data.plate import Field, Plate

CELL_UM, CELL_PX, TILE_PX = 40.0, 64, 224  # as `cellvim embed` chooses for a model without training
PERCENTILES = {"low_percentile": 0.1, "high_percentile": 99.9}


@dataclass
class _PlateCrops:
    """Crops of one plate."""

    images: np.ndarray | CropFile
    table: pd.DataFrame
    channels: tuple[str, ...]  # what the channels are called towards the model
    scale: IntensityScale | None


class PlateCrops(TrainingData):
    """Crops of one or several OME-Zarr plates, with labels of their plate maps.

    Parameters
    ----------
    plates
        Paths. Plates may have different channels, and other names for them: they are matched by the stain they name.
    label
        Column of the plate map; None for training without labels.
    classes
        Values of the label to train on; the others' crops are unlabelled, or left out (``unlabelled=False``).
    unlabelled
        Keep crops without a label, for masked and joint training.
    channels
        Channels to train on, by name; all by default. ``{"DNA": "ch5"}`` says what a plate's channel shows.
    unit
        cell, tile or field.
    crop_size, crop_um
        Side of a crop in pixels or in µm; by default as `cellvim embed` would cut.
    cells
        Where cells come from, see `cellvim.data.cells.open_cells`.
    wells
        Wells to use; all by default.
    leave_out_wells
        Wells never to look at, for instance those that a finished model is judged on.
    scale_by
        Scale intensities by "all" wells of a plate, or by its negative "controls". `cellvim embed` will do the same.
    cache
        Folder for crops that are more than 2 GB. What lies there is found again by the next training that cuts the
        same. By default they lie in the run's folder until the training is done.
    margin
        Pixels around each crop that random windows may use (``augmentation.pad_to``); 0 for none.
    batch_size, split, val, test, seed, workers
        As for `TrainingData`.

    Notes
    -----
    Every field is decoded once. Its crops are kept as they are stored (float images as float16 after scaling), and
    scaled on the device by the plate's own 0.1 and 99.9 percentiles: the model gets the values that it gets in `cellvim
    embed`, in the same order of channels.
    """

    def __init__(
        self,
        plates: list[str],
        *,
        label: str | None = None,
        classes: list[str] | None = None,
        unlabelled: bool = False,
        channels: list[str] | dict[str, str] | None = None,
        unit: str = "cell",
        crop_size: int | None = None,
        crop_um: float | None = None,
        cells: str = "nuclei",
        wells: list[str] | None = None,
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
    ) -> None:
        super().__init__(batch_size=batch_size, split=split, val=val, test=test, seed=seed, workers=workers)
        if not plates:
            raise InputError("No plate was given; expected at least one path in --data.plates.")
        if label is None and not unlabelled:
            unlabelled = True
        self.plates, self.label, self.classes, self.unlabelled = list(plates), label, classes, unlabelled
        self.channels, self.unit, self.crop_size, self.crop_um, self.cells = channels, unit, crop_size, crop_um, cells
        self.wells, self.leave_out_wells, self.cache, self.margin = wells, leave_out_wells, cache, margin
        self.scale_by = scale_by
        self.run_folder: Path | None = None  # where crops may lie while the training runs
        self._keys: list[str] = []
        self._temporary: tempfile.TemporaryDirectory | None = None

    def read(self) -> None:
        """Open the plates, check their labels, and only then cut their crops."""
        import pandas as pd

        from cellvim.data.plate import open_plate

        plates = [open_plate(p) for p in self.plates]
        where = listing((Path(p.path).name for p in plates), 3)
        fields = [self._fields(plate) for plate in plates]
        wells = [self._labelled_wells(plate, chosen) for plate, chosen in zip(plates, fields, strict=True)]
        names: tuple[str, ...] = ()
        if self.label is not None:
            self._check_plates(wells, where)
            labels = np.concatenate([table["label"].to_numpy(object) for table in wells])
            names = class_names_of(labels, column=self.label, where=where)
            joined = pd.concat(wells, ignore_index=True)
            if self.split != LEAKY and (self.split in GROUPS or self.split not in joined):  # told before any is cut
                check_groups(joined, self.split, val=self.val, test=self.test, where=where)
        if self.label is not None and not self.unlabelled:
            fields = [
                [f for f in chosen if table["label"].get(f.well)] for chosen, table in zip(fields, wells, strict=True)
            ]
        meanings = [self._channels_of(plate) for plate in plates]
        known = tuple(dict.fromkeys(m for pairs in meanings for _, m in pairs))
        meanings = [sorted(pairs, key=lambda pair: known.index(pair[1])) for pairs in meanings]  # the model's order
        size = self._size(plates)
        _check_crop_fits(size, fields)
        store = CropStore(self._folder(), sum(map(len, fields)))
        cut = [
            self._cut(plate, chosen, table, pairs, size, store)
            for plate, chosen, table, pairs in zip(plates, fields, wells, meanings, strict=True)
        ]
        cut = [c for c in cut if len(c.images)]
        if not cut:
            raise InputError(
                f"No {self.unit} was found in {where}. Is the right channel named DNA, and are the images in focus? "
                "Try `cellvim info`, or --data.unit tile."
            )
        self.table = pd.concat([c.table for c in cut], ignore_index=True)
        self.groups = [CropGroup(c.images, tuple(known.index(m) for m in c.channels), c.scale) for c in cut]
        self.description = DataDescription(
            channel_names=known,
            class_names=names,
            crop_px=size,
            pixel_size_um=plates[0].pixel_size_um,
            unit=self.unit,
            intensity={"method": "percentile", "of": RULES[self.scale_by], **PERCENTILES},
            source=where,
        )

    def _fields(self, plate: Plate) -> list[Field]:
        from cellvim.data.wells import canonical_well

        chosen = set(plate.wells if self.wells is None else map(canonical_well, self.wells))
        left_out = set(map(canonical_well, self.leave_out_wells or ()))
        unknown = sorted((chosen | left_out) - set(plate.wells)) if len(self.plates) == 1 else []
        if unknown:
            raise InputError(f"{Path(plate.path).name} has no well {listing(unknown)}; it has {listing(plate.wells)}.")
        return [f for f in plate.fields if f.well in chosen - left_out]

    def _labelled_wells(self, plate: Plate, fields: Sequence[Field]) -> pd.DataFrame:
        """One row a well that is used: the plate map's columns and ``label``, "" where there is none."""
        wells = list(dict.fromkeys(f.well for f in fields))
        table = plate.well_metadata.reindex(wells)
        if "pert_type" in table and "Metadata_pert_type" not in table:
            table = table.assign(Metadata_pert_type=table["pert_type"])  # as `cellvim embed` names it
        label = ""
        if self.label is not None and self.label in table:
            label = table[self.label].astype("string").fillna("").to_numpy(object)
        table = table.assign(label=label, Metadata_Plate=plate.name, Metadata_Well=wells)
        if self.classes:
            table["label"] = [v if v in self.classes else "" for v in table["label"]]
        return table

    def _check_plates(self, wells: Sequence[pd.DataFrame], where: str) -> None:
        if not any(self.label in table for table in wells):
            columns = [c for c in dict.fromkeys(c for table in wells for c in table.columns) if c != "label"]
            raise MetadataError(
                f"The plate map of {where} has no column '{self.label}'; it has {listing(columns)}."
                f"{suggestion(str(self.label), columns)}"
            )
        found = {v for table in wells for v in table["label"]}
        missing = [c for c in self.classes or () if c not in found]
        if missing:
            raise MetadataError(f"Label '{self.label}' of {where} has no value {listing(missing)}.")

    def _channels_of(self, plate: Plate) -> list[tuple[str, str]]:
        """Pairs of the plate's channel and what it is called towards the model."""
        own, where = list(plate.channel_names), Path(plate.path).name
        if isinstance(self.channels, dict):
            wanted = {m: c for m, c in self.channels.items() if c in own} or self.channels
            ids = match_channels(list(wanted.values()), own, where=where)
            return [(own[i], meaning) for i, meaning in zip(ids, wanted, strict=True)]
        if self.channels is not None:
            ids = match_channels(self.channels, own, where=where)
            return [(own[i], name) for i, name in zip(ids, self.channels, strict=True)]
        meanings = [canonical_name(c) or c for c in own]
        twice = {m for m in meanings if meanings.count(m) > 1}
        return [(c, c if m in twice else m) for c, m in zip(own, meanings, strict=True)]

    def _size(self, plates: Sequence[Plate]) -> int:
        """Side of a crop in pixels as the model sees it."""
        if self.unit == "field":
            shapes = {f.shape[1:] for p in plates for f in p.fields if f.is_readable}
            if len({s for shape in shapes for s in shape}) != 1:
                raise InputError("Whole fields must be squares of one size to train on; use --data.unit tile.")
            return next(iter(shapes))[0]
        if self.crop_size is not None:
            return self.crop_size
        pixel = plates[0].pixel_size_um
        if self.crop_um is not None:
            from cellvim.data.crops import CropSpec

            return CropSpec(self.unit, None, size_um=self.crop_um).pixels(pixel)[1]
        if self.unit == "tile":
            return TILE_PX
        return CELL_PX if pixel is None else max(16, 16 * round(CELL_UM / pixel / 16))

    def _cut(
        self,
        plate: Plate,
        fields: Sequence[Field],
        wells: pd.DataFrame,
        channels: Sequence[tuple[str, str]],
        size: int,
        store: CropStore,
    ) -> _PlateCrops:
        import pandas as pd

        from cellvim.channels import find_dna_channel
        from cellvim.data.cells import open_cells
        from cellvim.data.crops import CropSpec
        from cellvim.data.intensity import cache_key, estimate_intensity_scale, reference_wells

        names = [name for name, _ in channels]
        dna, source = None, None
        if self.unit == "cell":
            by_meaning = [name for name, meaning in channels if canonical_name(meaning) == "DNA"]
            where = Path(plate.path).name
            dna = by_meaning[0] if len(by_meaning) == 1 else plate.channel_names[
                find_dna_channel(plate.channel_names, where=where)
            ]  # fmt: skip
            source = open_cells(self.cells, plate, dna=dna)
        spec = CropSpec(self.unit, None if self.unit == "field" else size + 2 * self.margin)
        among = {"wells": reference_wells(plate)} if self.scale_by == "controls" else {}
        scale = estimate_intensity_scale(plate, names, **PERCENTILES, **among)
        kind = next((f.dtype.newbyteorder("=") for f in fields if f.is_readable), np.dtype(np.float16))
        is_counted = kind in (np.uint8, np.uint16)  # other crops are scaled when they are cut
        cut = {"spec": repr(spec), "cells": source and source.name, "dna": dna, "fields": [f.name for f in fields]}
        key = cache_key(plate, names, cut | {"scale": None if is_counted else scale.to_dict()})[:16]
        self._keys.append(key)
        found = store.find(key, len(fields))
        if found is None:
            streamed = stream_crops(
                fields,
                names,
                spec,
                scale=None if is_counted else scale,
                cells=source,
                extra_channels=[dna] if dna is not None and dna not in names else [],
            )
            columns = self._collect(streamed, store, key, kind if is_counted else np.dtype(np.float16), plate, fields)
            found = store.finish(key, columns), columns
        images, columns = found
        table = pd.DataFrame(columns)
        table = table.join(wells.drop(columns="Metadata_Well"), on="Metadata_Well") if len(table) else table
        return _PlateCrops(images, table, tuple(m for _, m in channels), scale if is_counted else None)

    def _collect(
        self,
        streamed: Iterable[FieldCrops],
        store: CropStore,
        key: str,
        kind: np.dtype,
        plate: Plate,
        fields: Sequence[Field],
    ) -> dict[str, np.ndarray]:
        """Store all crops of a plate, and return what is known of each; fields that cannot be read are told."""
        import pandas as pd

        tables, failed = [], []
        try:
            for crops in streamed:
                if crops.failed is not None:
                    failed.append(f"{crops.field.name} ({crops.failed})")
                    continue
                if kind != np.float16 and not np.can_cast(crops.field.dtype, kind):
                    raise InputError(
                        f"{crops.field.name} of {plate.name} has pixels of {crops.field.dtype}, others of {kind}; "
                        "expected one type. Import the plate again."
                    )
                store.append(crops.crops.numpy().astype(kind), key)
                tables.append(
                    crops.table[["object_number", "y_px", "x_px"]].assign(
                        Metadata_Well=crops.field.well, Metadata_Site=str(crops.field.site)
                    )
                )
        except BaseException:
            store.discard()
            raise
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(fields)} fields of {plate.name} could not be read and are not trained on: "
                f"{listing(failed, 3)}.",
                CellvimWarning,
                stacklevel=2,
            )
        if not tables:
            return {}
        joined = pd.concat(tables, ignore_index=True)
        return {n: v.to_numpy(str if v.dtype == object else None) for n, v in joined.items()}

    def _folder(self) -> Path:
        """Where crops lie that are too many for memory."""
        if self.cache is not None:
            return Path(self.cache)
        if self.run_folder is not None:
            return self.run_folder / "crops"
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="cellvim-crops-")
        return Path(self._temporary.name)

    def clear(self) -> None:
        """Remove the crops from the run's folder; a cache that was named stays."""
        if self.cache is None and self.run_folder is not None:
            remove_files(self._folder(), self._keys)


def _check_crop_fits(size: int, fields: Sequence[Sequence[Field]]) -> None:
    for chosen in fields:
        shape = next((f.shape[1:] for f in chosen if f.is_readable), None)
        if shape is not None and size > max(shape):
            raise InputError(
                f"The crop is {size} pixels, but the fields are {shape[0]} x {shape[1]}; expected at most {max(shape)}."
                " Choose with --data.crop_size."
            )
