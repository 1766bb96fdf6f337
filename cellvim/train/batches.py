"""Training data: crops with labels and a split, and the batches of each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from cellvim.data.wells import natural_key
from cellvim.errors import InputError, MetadataError
from cellvim.train.splits import split_rows

if TYPE_CHECKING:
    import pandas as pd

    from cellvim.data.intensity import IntensityScale

UNLABELLED = -1


@dataclass(kw_only=True)
class DataDescription:
    """Description of training data that a model requires; stored in the card of its checkpoint."""

    class_names: tuple[str, ...] = ()  # in the order of the labels; empty without labels
    channel_names: tuple[str, ...]  # of the model, (C,)
    crop_px: int = 0  # side of the model's input
    pixel_size_um: float | None = None
    unit: str = "cell"  # or tile or field
    intensity: dict[str, Any] = field(default_factory=dict)  # IntensityScale.to_dict(), or a rule to estimate it
    training_data: str = ""  # name, for messages
    class_counts: tuple[int, ...] = ()  # training crops per class


@dataclass
class CropGroup:
    """Crops with the same channels: ``images`` (n, C, S, S) of any type, and the model's ids of the C channels."""

    images: np.ndarray
    channel_ids: tuple[int, ...]
    scale: IntensityScale | None = None  # applied on the device; None if the images are scaled already

    def scaled(self, images: Tensor) -> Tensor:
        """Return stored crops as the model's input, float32."""
        return images.float() if self.scale is None else self.scale.apply_on_device(images)


class CropSet(Dataset):
    """Crops of one part of the split, read one batch at a time."""

    def __init__(self, groups: Sequence[CropGroup], rows: np.ndarray, labels: np.ndarray) -> None:
        self.groups, self.rows, self.labels = list(groups), rows, labels
        self.first = np.cumsum([0, *(len(group.images) for group in groups)])  # row number of each group's first crop
        self.group_of = np.searchsorted(self.first, rows, side="right") - 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: Sequence[int]) -> dict[str, Any]:
        rows = self.rows[np.asarray(items)]
        number = int(self.group_of[items[0]])
        images = self.groups[number].images[rows - self.first[number]]
        return {"images": np.ascontiguousarray(images), "labels": self.labels[rows], "rows": rows, "group": number}


class EpochBatches(Sampler[list[int]]):
    """Batches of an epoch, each of crops with the same channels. The order depends on the seed and the epoch.

    Several processes share each batch: together they see the crops that one process with their total batch size would
    see, in the same order, and no crop twice.

    ``groups`` (n,) contains the number of each crop's group; ``batch_size`` counts crops per process. ``drop_last``
    leaves out a group's last batch if it is incomplete, unless it is the only one. If shuffled, as for training, all
    processes get equally many crops of a batch: of a group with a single, incomplete batch, the remainder waits for
    another epoch, and fewer crops than processes are repeated. Otherwise, a process may have fewer batches.
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
        self.skip = 0  # batches to skip at the start of the next epoch

    @property
    def sampler(self) -> EpochBatches:
        """The object on which Lightning calls `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        sizes = np.bincount(self.groups) if len(self.groups) else np.zeros(0, int)
        total = self.batch_size * self.world
        batches = [min(total, int(n) - first) for n in sizes for first in range(0, self._count(int(n)) * total, total)]
        return sum(self._share(n) > 0 for n in batches)

    def _count(self, n: int) -> int:
        """Return the number of batches of a group of n crops."""
        full = n // (self.batch_size * self.world)
        return full if self.drop_last and full else -(-n // (self.batch_size * self.world))

    def _share(self, n: int) -> int:
        """Return the number of crops of this process in a batch of n crops."""
        return max(1, n // self.world) if self.shuffle else n // self.world + (self.rank < n % self.world)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        total, batches = self.batch_size * self.world, []
        for group in np.unique(self.groups):
            members = np.flatnonzero(self.groups == group)
            members = generator.permutation(members) if self.shuffle else members
            batches += [members[i * total : (i + 1) * total] for i in range(self._count(len(members)))]
        if self.shuffle:
            batches = [batches[i] for i in generator.permutation(len(batches))]
        skip, self.skip = self.skip, 0
        for batch in batches[skip:]:
            if share := self._share(len(batch)):
                own = np.resize(batch, share * self.world) if self.shuffle else batch
                yield own[self.rank :: self.world].tolist()


class ResumableLoader(DataLoader):
    """A DataLoader that can resume in the middle of an epoch (Lightning's protocol for stateful loaders)."""

    batches_given = 0
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        # A generator: this runs when the first batch is requested, after Lightning has set the epoch.
        order: EpochBatches = self.batch_sampler
        resumed, self._resumed = self._resumed, None
        if resumed is not None and resumed["epoch"] == order.epoch:
            order.skip = resumed["batches"]
        self.batches_given = order.skip
        for batch in super().__iter__():
            self.batches_given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were given."""
        return {"epoch": self.batch_sampler.epoch, "batches": self.batches_given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip these batches when the same epoch is iterated next."""
        self._resumed = dict(state)


class TrainingData(LightningDataModule):
    """Base of the data modules. Subclasses fill ``table``, ``groups`` and ``description`` in `read`.

    Parameters
    ----------
    batch_size
        Crops per step and process.
    split
        See `cellvim.train.splits.split_rows`.
    val, test
        Fractions of the crops held out for validation and test.
    seed
        Random seed for the split and the order of the crops.
    workers
        Number of loading processes; 0 if the crops are in memory.
    """

    label: str | None = None  # column of the labels
    run_folder: Path | None = None  # folder of the run, for temporary files

    def __init__(
        self,
        *,
        batch_size: int = 256,
        split: str = "well",
        val: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1.")
        if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
            raise InputError(f"val is {val} and test {test}; expected fractions of 0 to below 1, together below 1.")
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

    def clear(self) -> None:
        """Remove temporary files."""

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data once."""
        if self.description is not None:
            return
        self.read()
        description = self.description
        self.rows = split_rows(
            self.table, self.split, val=self.val, test=self.test, seed=self.seed, where=description.training_data
        )
        self.labels = number_labels(self.table["label"].to_numpy(object), description.class_names)
        known = self.labels[self.rows["train"]]
        counts = np.bincount(known[known >= 0], minlength=len(description.class_names))
        description.class_counts = tuple(int(n) for n in counts)

    def summary(self) -> str:
        """Return a few lines of text: the classes, channels, crops and the split."""
        found = self.description
        lines = [f"Channels: {', '.join(found.channel_names)}; crops of {found.crop_px} x {found.crop_px} pixels."]
        if found.class_names:
            counts = [f"{name} {n:,}" for name, n in zip(found.class_names[:12], found.class_counts, strict=False)]
            more = f" and {len(found.class_names) - 12:,} more" if len(found.class_names) > 12 else ""
            lines.append(f"Classes ({self.label}), with their training crops: {', '.join(counts)}{more}.")
        parts = []
        for part, purpose in (("train", "training"), ("val", "validation"), ("test", "test")):
            table = self.table.iloc[self.rows[part]]
            wells = f" from {table['Metadata_Well'].nunique():,} wells" if "Metadata_Well" in table else ""
            parts.append(f"{len(table):,} crops{wells} for {purpose}")
        lines.append(f"Split by {self.split}: {', '.join(parts)}.")
        return "\n".join(lines)

    def train_dataloader(self) -> DataLoader:
        """Return the batches of training, in another order every epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        """Return the batches of validation; none if nothing is held out."""
        return self._loader("val") if len(self.rows["val"]) else []

    def test_dataloader(self) -> DataLoader | list:
        """Return the batches of the test; none if nothing is held out."""
        return self._loader("test") if len(self.rows["test"]) else []

    def whole_loader(self, part: str) -> DataLoader:
        """Return all batches of a part of the split, in every process."""
        return self._loader(part, shared=False)

    def _loader(self, part: str, *, shuffle: bool = False, shared: bool = True) -> DataLoader:
        crops = CropSet(self.groups, self.rows[part], self.labels)
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
            collate_fn=default_convert,  # crops are read as batches
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=bool(self.workers),
        )


def class_names_of(labels: np.ndarray, *, column: str, where: str) -> tuple[str, ...]:
    """Return the sorted class names among labels, at least two; empty values are not a class."""
    names = sorted({str(v) for v in labels if v is not None and v == v and str(v) != ""}, key=natural_key)
    if len(names) < 2:
        found = f"is '{names[0]}' everywhere" if names else "is empty"
        raise MetadataError(f"Label '{column}' of {where} {found}; expected at least two classes.")
    return tuple(names)


def number_labels(labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Return the class number of each label, −1 for unlabelled crops, (n,) int64."""
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number.get(str(v), UNLABELLED) for v in labels], dtype=np.int64)
