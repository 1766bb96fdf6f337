"""What a training reads: crops in memory or on disk, their labels and split, and the batches of each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from cellvim.errors import InputError, MetadataError, listing, suggestion

if TYPE_CHECKING:
    import pandas as pd

    from cellvim.data.intensity import IntensityScale

UNLABELLED = -1


@dataclass
class DataDescription:
    """What a model must know of its data; it travels with the weights.

    Attributes
    ----------
    channel_names
        C names that the model's channels bear.
    class_names
        In the order of the labels; empty without labels.
    crop_px
        Side of a crop as the model sees it, in pixels.
    pixel_size_um
        Side of a pixel in µm, or None when unknown.
    unit
        cell, tile or field.
    intensity
        How intensities became values: ``IntensityScale.to_dict()``, or how a scale is estimated for each plate.
    source
        What the crops are of, in words.
    class_counts
        Training crops of each class.
    """

    channel_names: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    crop_px: int = 0
    pixel_size_um: float | None = None
    unit: str = "cell"
    intensity: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    class_counts: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what the checkpoint's card keeps."""
        return {
            "class_names": list(self.class_names),
            "channel_names": list(self.channel_names),
            "crop_px": self.crop_px,
            "pixel_size_um": self.pixel_size_um,
            "unit": self.unit,
            "intensity": self.intensity,
            "training_data": self.source,
            "class_counts": list(self.class_counts),
        }


@dataclass
class CropGroup:
    """Crops that have the same channels: ``images`` (n, C, S, S) of any type, and the model's numbers for C."""

    images: np.ndarray
    channel_ids: tuple[int, ...]
    scale: IntensityScale | None = None  # applied on the device; None: the images are scaled already

    def scaled(self, rows: np.ndarray) -> np.ndarray:
        """Return some of the crops as the model gets them, float32."""
        images = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        return (images.float() if self.scale is None else self.scale.apply_on_device(images)).numpy()


class CropSet(Dataset):
    """Rows of one part of the split, fetched a batch at a time."""

    def __init__(self, groups: Sequence[CropGroup], rows: np.ndarray, labels: np.ndarray) -> None:
        self.groups, self.rows, self.labels = list(groups), rows, labels
        sizes = [len(g.images) for g in self.groups]
        self.first = np.concatenate([[0], np.cumsum(sizes)])  # row number of each group's first crop
        self.group_of = np.searchsorted(self.first, rows, side="right") - 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: Sequence[int]) -> dict[str, Any]:
        rows = self.rows[np.asarray(items)]
        number = int(self.group_of[items[0]])
        group = self.groups[number]
        images = torch.from_numpy(np.ascontiguousarray(group.images[rows - self.first[number]]))
        return {
            "images": images,
            "labels": torch.from_numpy(self.labels[rows]),
            "rows": torch.from_numpy(rows),
            "group": number,
        }

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.__getitems__([item])


class EpochBatches(Sampler[list[int]]):
    """Batches of an epoch, each of crops with the same channels; another order every epoch, the same for a seed.

    Several processes share every batch: together they see what one process with a batch of all their sizes would see,
    in the same order, and no crop twice.

    Parameters
    ----------
    groups
        (n,) which crops can share a batch.
    batch_size
        Of one process.
    seed
        Of the order.
    shuffle
        False: in the order of the rows, for evaluation. Then a process may have fewer batches than another.
    drop_last
        Leave out a group's last batch when it is not full (training), unless it is the group's only one.
    rank, world
        This process and how many there are. In training all get equally many crops of a batch: of a group that has
        only one, not full batch, what is left over waits for another epoch, and fewer crops than processes repeat.
    """

    def __init__(
        self,
        groups: np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.groups, self.batch_size, self.seed = np.asarray(groups), batch_size, seed
        self.shuffle, self.drop_last, self.rank, self.world = shuffle, drop_last, rank, world
        self.epoch = 0
        self.skip = 0  # batches at the start of the next epoch that are left out

    @property
    def sampler(self) -> EpochBatches:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        sizes = np.bincount(self.groups) if len(self.groups) else np.zeros(0, int)
        whole = self.batch_size * self.world
        batches = [min(whole, int(n) - first) for n in sizes for first in range(0, self._count(int(n)) * whole, whole)]
        return sum(self._share(n) > 0 for n in batches)

    def _count(self, n: int) -> int:
        """How many batches a group of n crops makes."""
        full = n // (self.batch_size * self.world)
        return full if self.drop_last and full else -(-n // (self.batch_size * self.world))

    def _share(self, n: int) -> int:
        """How many of a batch's n crops are this process's."""
        return max(1, n // self.world) if self.shuffle else n // self.world + (self.rank < n % self.world)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        whole, batches = self.batch_size * self.world, []
        for group in np.unique(self.groups):
            members = np.flatnonzero(self.groups == group)
            members = generator.permutation(members) if self.shuffle else members
            batches += [members[i * whole : (i + 1) * whole] for i in range(self._count(len(members)))]
        if self.shuffle:
            batches = [batches[i] for i in generator.permutation(len(batches))]
        skip, self.skip = self.skip, 0
        for batch in batches[skip:]:
            if share := self._share(len(batch)):
                own = np.resize(batch, share * self.world) if self.shuffle else batch
                yield own[self.rank :: self.world].tolist()


class ResumableLoader(DataLoader):
    """A DataLoader that a resumed training goes on with in the middle of an epoch (Lightning's state protocol)."""

    batches_given = 0
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        # a generator: all this runs when the first batch is asked for, and by then the epoch is set
        order: EpochBatches = self.batch_sampler
        resumed, self._resumed = self._resumed, None
        if resumed is not None and resumed["epoch"] == order.epoch:
            order.skip = resumed["batches"]
        self.batches_given = order.skip
        for batch in super().__iter__():
            self.batches_given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return which epoch it is in and how many of its batches were given."""
        return {"epoch": self.batch_sampler.epoch, "batches": self.batches_given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave those batches out if the epoch goes on, rather than begins."""
        self._resumed = dict(state)


class TrainingData(LightningDataModule):
    """Base of the data modules: subclasses fill ``table``, ``groups`` and ``description`` in `read`.

    Parameters
    ----------
    batch_size
        Crops a step and process.
    split
        See `cellvim.train.splits.split_rows`.
    val, test
        Shares held out.
    seed
        Of the split and of the order of the crops.
    workers
        Processes that load; 0 when crops are in memory.
    """

    def __init__(self, *, batch_size: int, split: str, val: float, test: float, seed: int, workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1.")
        if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
            raise InputError(f"val is {val} and test {test}; expected shares of 0 to below 1, together below 1.")
        self.batch_size, self.split, self.val, self.test = batch_size, split, val, test
        self.seed, self.workers = seed, workers
        self.table: pd.DataFrame | None = None
        self.groups: list[CropGroup] = []
        self.labels = np.zeros(0, np.int64)
        self.rows: dict[str, np.ndarray] = {}
        self.description: DataDescription | None = None

    def read(self) -> None:
        """Fill ``table`` (with a column ``label``), ``groups`` and ``description``."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read, split and number the classes; once."""
        if self.description is not None:
            return
        self.read()
        self.rows = split_rows_of(self)
        self.labels = number_labels(self.table["label"].to_numpy(object), self.description.class_names)
        known = self.labels[self.rows["train"]]
        counts = np.bincount(known[known >= 0], minlength=len(self.description.class_names))
        self.description.class_counts = tuple(int(n) for n in counts)

    def summary(self) -> str:
        """Return what is learned from what, in a few lines: classes, channels, crops and what is held out."""
        found = self.description
        lines = [f"Channels: {', '.join(found.channel_names)}; crops of {found.crop_px} x {found.crop_px} pixels."]
        if found.class_names:
            label = getattr(self, "label", None) or "the label"
            counts = [f"{name} {n:,}" for name, n in zip(found.class_names[:12], found.class_counts, strict=False)]
            more = f" and {len(found.class_names) - 12:,} more" if len(found.class_names) > 12 else ""
            lines.append(f"Classes by {label}, with their training crops: {', '.join(counts)}{more}.")
        parts = []
        for part, what in (("train", "to train on"), ("val", "to validate"), ("test", "to test")):
            table = self.table.iloc[self.rows[part]]
            of = f" of {table['Metadata_Well'].nunique():,} wells" if "Metadata_Well" in table else ""
            parts.append(f"{len(table):,} crops{of} {what}")
        lines.append(f"Split by {self.split}: {', '.join(parts)}.")
        return "\n".join(lines)

    def train_dataloader(self) -> DataLoader:
        """Batches of training, shuffled anew every epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        """Batches of validation; none when nothing is held out."""
        return self._loader("val") if len(self.rows["val"]) else []

    def test_dataloader(self) -> DataLoader | list:
        """Batches of the test; none when nothing is held out."""
        return self._loader("test") if len(self.rows["test"]) else []

    def predict_dataloader(self) -> DataLoader:
        """All crops, in the order of ``table``."""
        return self._loader("all")

    def whole_loader(self, part: str) -> DataLoader:
        """Batches of a part of the split that are not shared with other processes."""
        return self._loader(part, shared=False)

    def _loader(self, part: str, *, shuffle: bool = False, shared: bool = True) -> DataLoader:
        rows = np.arange(len(self.table)) if part == "all" else self.rows[part]
        crops = CropSet(self.groups, rows, self.labels)
        trainer = self.trainer if shared else None
        batches = EpochBatches(
            crops.group_of,
            self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=shuffle,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
        return ResumableLoader(
            crops,
            batch_sampler=batches,
            collate_fn=_as_is,
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=bool(self.workers),
        )


def _as_is(batch: Any) -> Any:
    return batch


def split_rows_of(data: TrainingData) -> dict[str, np.ndarray]:
    """Split a data module's table as it was asked to."""
    from cellvim.train.splits import split_rows

    return split_rows(
        data.table, data.split, val=data.val, test=data.test, seed=data.seed, where=data.description.source
    )


def class_names_of(labels: np.ndarray, *, column: str, where: str) -> tuple[str, ...]:
    """Return the classes among labels, sorted; empty values are no class.

    Raises
    ------
    MetadataError
        There is none, or only one.
    """
    names = sorted({str(v) for v in labels if v is not None and v == v and str(v) != ""}, key=_natural)
    if len(names) < 2:
        found = f"is '{names[0]}' everywhere" if names else "is empty"
        raise MetadataError(f"Label '{column}' of {where} {found}; expected at least two classes to tell apart.")
    return tuple(names)


def number_labels(labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Return the class number of each label, −1 where it has none."""
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number.get(str(v), UNLABELLED) for v in labels], dtype=np.int64)


def label_column(table: pd.DataFrame, label: str, where: str) -> np.ndarray:
    """Return a table's column of labels.

    Raises
    ------
    MetadataError
        There is no such column.
    """
    if label not in table.columns:
        raise MetadataError(
            f"{where} has no column '{label}'; it has {listing(table.columns)}.{suggestion(label, table.columns)}"
        )
    return table[label].to_numpy(object)


def _natural(name: str) -> tuple:
    from cellvim.data.wells import natural_key

    return tuple(natural_key(name))
