"""Crops of plates: field → crop → normalise as in `cellvim embed`, cut once and then read in any order."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.channels import canonical_name, match_channels
from cellvim.errors import InputError, MetadataError, listing, suggestion
from cellvim.train.data import CropGroup, DataDescription, TrainingData, class_names_of
from cellvim.train.splits import GROUPS, check_groups

if TYPE_CHECKING:
    import pandas as pd

    from cellvim.data.plate import Field, Plate

CELL_UM, CELL_PX, TILE_PX = 40.0, 64, 224  # as `cellvim embed` chooses for a model without training
MEMORY = 1 << 31  # bytes of crops held in memory; more of them lie on disk


@dataclass
class _PlateCrops:
    """Crops of one plate."""

    images: np.ndarray
    table: pd.DataFrame
    channels: tuple[str, ...]  # what the channels are called towards the model


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
        Where cells come from, see `cellvim.data.cell_sources.open_cells`.
    wells
        Wells to use; all by default.
    leave_out_wells
        Wells never to look at, for instance those that a finished model is judged on.
    cache
        Folder for crops that do not fit into 2 GB of memory; a temporary one by default.
    margin
        Pixels around each crop that random windows may use (``augmentation.pad_to``); 0 for none.
    batch_size, split, val, test, seed, workers
        As for `TrainingData`.

    Notes
    -----
    Every field is decoded once, and its crops are kept as float16 after scaling by the plate's own 0.1 and 99.9
    percentiles, which is what `cellvim embed` does to a plate.
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
            if self.split in GROUPS:  # told before anything is cut
                check_groups(pd.concat(wells, ignore_index=True), self.split, val=self.val, test=self.test, where=where)
        meanings = [self._channels_of(plate) for plate in plates]
        known = tuple(dict.fromkeys(m for pairs in meanings for _, m in pairs))
        size = self._size(plates)
        cut = [
            self._cut(plate, chosen, table, pairs, size, number)
            for number, (plate, chosen, table, pairs) in enumerate(zip(plates, fields, wells, meanings, strict=True))
        ]
        cut = [c for c in cut if len(c.images)]
        if not cut:
            raise InputError(
                f"No {self.unit} was found in {where}. Is the right channel named DNA, and are the images in focus? "
                "Try `cellvim info`, or --data.unit tile."
            )
        self.table = pd.concat([c.table for c in cut], ignore_index=True)
        self.groups = [CropGroup(c.images, tuple(known.index(m) for m in c.channels)) for c in cut]
        self.description = DataDescription(
            channel_names=known,
            class_names=names,
            crop_px=size,
            pixel_size_um=plates[0].pixel_size_um,
            unit=self.unit,
            intensity={"method": "percentile", "of": "each plate", "low_percentile": 0.1, "high_percentile": 99.9},
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
        number: int,
    ) -> _PlateCrops:
        import warnings

        import pandas as pd

        from cellvim.channels import find_dna_channel
        from cellvim.data.cell_sources import open_cells
        from cellvim.data.crops import CropSpec
        from cellvim.data.normalize import estimate_intensity_scale
        from cellvim.data.stream import stream_crops

        names = [name for name, _ in channels]
        if self.label is not None and not self.unlabelled:
            labelled = set(wells.index[wells["label"] != ""])
            fields = [f for f in fields if f.well in labelled]
        dna, source = None, None
        if self.unit == "cell":
            by_meaning = [name for name, meaning in channels if canonical_name(meaning) == "DNA"]
            where = Path(plate.path).name
            dna = by_meaning[0] if len(by_meaning) == 1 else plate.channel_names[
                find_dna_channel(plate.channel_names, where=where)
            ]  # fmt: skip
            source = open_cells(self.cells, plate, dna=dna)
        spec = CropSpec(self.unit, None if self.unit == "field" else size + 2 * self.margin)
        store = _CropStore(self._folder(), f"plate{number}")
        tables, failed = [], []
        extra = [dna] if dna is not None and dna not in names else []
        streamed = stream_crops(
            fields, names, spec, scale=estimate_intensity_scale(plate, names), cells=source, extra_channels=extra
        )
        for crops in streamed:
            if crops.failed is not None:
                failed.append(f"{crops.field.name} ({crops.failed})")
                continue
            store.append(crops.crops.numpy())
            tables.append(
                crops.table[["object_number", "y_px", "x_px"]].assign(
                    Metadata_Well=crops.field.well, Metadata_Site=str(crops.field.site)
                )
            )
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(fields)} fields of {plate.name} could not be read and are not trained on: "
                f"{listing(failed, 3)}.",
                stacklevel=2,
            )
        table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
        about = wells.drop(columns="Metadata_Well")
        table = table.join(about, on="Metadata_Well") if len(table) else table
        return _PlateCrops(store.array(), table, tuple(meaning for _, meaning in channels))

    def _folder(self) -> Path:
        if self.cache is not None:
            Path(self.cache).mkdir(parents=True, exist_ok=True)
            return Path(self.cache)
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="cellvim-crops-")
        return Path(self._temporary.name)


class _CropStore:
    """Crops as they come: in memory, and in a file once they are more than `MEMORY`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.float16"
        self.parts: list[np.ndarray] = []
        self.bytes, self.written = 0, 0
        self.shape: tuple[int, ...] = (0, 0, 0)
        self.file: Any = None

    def append(self, crops: np.ndarray) -> None:
        if not len(crops):
            return
        self.shape = crops.shape[1:]
        self.parts.append(crops.astype(np.float16))
        self.bytes += self.parts[-1].nbytes
        if self.bytes > MEMORY:
            self.file = self.file or self.path.open("wb")
            for part in self.parts:
                part.tofile(self.file)
                self.written += len(part)
            self.parts, self.bytes = [], MEMORY  # everything goes to the file from now on

    def array(self) -> np.ndarray:
        if self.file is None:
            return np.concatenate(self.parts) if self.parts else np.zeros((0, *self.shape), np.float16)
        self.file.close()
        return np.memmap(self.path, np.float16, mode="r", shape=(self.written, *self.shape))
