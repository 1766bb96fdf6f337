"""Cells of the translocation plate for `benchmarks.translocation`: crops, split by well, features and scores."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cellvim.train.batches import CropGroup, DataDescription, TrainingData, class_names_of, number_labels
from cellvim.train.splits import split_rows

CHANNELS = ("GFP", "DNA")
CROP, MARGIN = 48, 4  # pixels; the margin is for random windows
CELLS_PER_WELL = 48
TEST, VAL = 3 / 8, 0.2  # fractions of the wells of each kind; validation wells are training wells
TASKS = ("dose", "controls")


def cut_cells(source: str | Path, keep: Path) -> Path:
    """Import the plate, cut its nuclei, and save the same `CELLS_PER_WELL` of each well in one file.

    Parameters
    ----------
    source
        Folder of the 192 TIFFs and ``1049_Metadata.csv``.
    keep
        Folder for ``cells.npz``; an existing file is kept.
    """
    path = keep / "cells.npz"
    if path.exists():
        return path
    from cellvim.data.importers import import_plate
    from cellvim.train.plates import PlateCrops

    source = Path(source)
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plate = Path(folder) / "plate.zarr"
        import_plate(
            source, plate, metadata=source / "1049_Metadata.csv", plate_name="FKHR",
            channel_names={"Channel1": "GFP", "Channel2": "DNA"}, pert_type="SBS_Controls:-1=negcon,0=trt,1=poscon",
        )  # fmt: skip
        data = PlateCrops(
            [str(plate)], label="SBS_Doses", channels=list(CHANNELS), crop_size=CROP, margin=MARGIN, val=0.0, test=0.0
        )
        data.read()
    table = data.table.assign(cells_of_well=data.table.groupby("Metadata_Well")["label"].transform("size"))
    rows = np.sort(np.concatenate([_draw(rows) for _, rows in table.groupby("Metadata_Well").indices.items()]))
    table = table.iloc[rows]
    columns = {
        "well": table["Metadata_Well"].to_numpy(str),
        "dose": table["SBS_Doses"].to_numpy(int),
        "kind": table["Metadata_pert_type"].to_numpy(str),
        "cells_of_well": table["cells_of_well"].to_numpy(int),
    }
    images = data.groups[0].scaled(torch.from_numpy(data.groups[0].images[rows]))
    np.savez(path, images=images.numpy().astype(np.float16), **columns)
    return path


def _draw(rows: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows)[:CELLS_PER_WELL]


def read_cells(path: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Return crops (n, 2, S, S) float16, scaled by the plate's percentiles, and a table with one row per crop."""
    with np.load(path) as stored:
        images = stored["images"]
        table = pd.DataFrame({name: stored[name] for name in stored.files if name != "images"})
    return images, table


def split_wells(table: pd.DataFrame) -> dict[str, set[str]]:
    """Split the wells, with the same fraction of each dose and control in each part.

    The split does not depend on method or seed. The training part includes the validation wells.
    """
    wells = table.drop_duplicates("well").sort_values("well", ignore_index=True)
    wells = pd.DataFrame({"Metadata_Plate": "FKHR", "Metadata_Well": wells["well"], "label": wells["dose"].astype(str)})
    test = split_rows(wells, "well", val=0.0, test=TEST, seed=0)["test"]
    rest = wells.drop(index=test).reset_index(drop=True)
    val = split_rows(rest, "well", val=0.0, test=VAL, seed=1)["test"]
    names = rest["Metadata_Well"]
    return {"train": set(names), "val": set(names.iloc[val]), "test": set(wells["Metadata_Well"].iloc[test])}


class WellCells(TrainingData):
    """Cells of one task.

    Parameters
    ----------
    cells
        Result of `read_cells`.
    task
        "dose": the 9 doses; "controls": positive and negative.
    part
        "test": train on all training wells and predict the test wells. "val": exclude validation wells from
        training and predict them; the test wells are not used.
    shots
        Number of labelled training wells per class, drawn with ``seed``; None for all.
    unlabelled
        "none"; "all": also train on the other cells of the training wells, without labels; "half": as "all", with the
        labelled cells repeated until they are half of an epoch.
    seed
        Random seed for the order and the shots; the split is always the same.
    """

    def __init__(
        self,
        cells: tuple[np.ndarray, pd.DataFrame],
        task: str,
        *,
        part: str = "test",
        shots: int | None = None,
        unlabelled: str = "none",
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size=batch_size, split="well", val=0.0, test=TEST, seed=seed)
        self.cells, self.task, self.part = cells, task, part
        self.shots, self.unlabelled = shots, unlabelled

    def setup(self, stage: str | None = None) -> None:
        """Select the rows and number the classes."""
        if self.description is not None:
            return
        images, table = self.cells
        wells = split_wells(table)
        training = wells["train"] - (wells["val"] if self.part == "val" else set())
        self.evaluated_wells = wells[self.part]
        mine = (table["kind"] == "trt").to_numpy()
        label = table["dose"].astype(str).to_numpy(object) if self.task == "dose" else table["kind"].to_numpy(object)
        mine = mine if self.task == "dose" else ~mine
        classes = class_names_of(label[mine], column="label", where="the plate")
        in_training = table["well"].isin(training).to_numpy()
        labelled = mine & in_training
        if self.shots is not None:
            labelled &= table["well"].isin(self._shots(table[labelled], label[labelled])).to_numpy()
        self.table = table.assign(label=np.where(labelled | (mine & ~in_training), label, ""))
        self.labels = number_labels(self.table["label"].to_numpy(object), classes)
        known, others = np.flatnonzero(labelled), np.flatnonzero(in_training & ~labelled)
        if self.unlabelled == "none":
            others = others[:0]
        elif self.unlabelled == "half" and len(known) < len(others):
            known = np.resize(known, len(others))
        evaluated = np.flatnonzero(mine & table["well"].isin(self.evaluated_wells).to_numpy())
        self.rows = {"train": np.concatenate([known, others]), "val": np.zeros(0, int), "test": evaluated}
        self.groups = [CropGroup(images, (0, 1))]
        counts = np.bincount(self.labels[np.flatnonzero(labelled)], minlength=len(classes))
        self.description = DataDescription(
            channel_names=CHANNELS,
            class_names=classes,
            crop_px=CROP,
            training_data="FKHR",
            class_counts=tuple(counts.tolist()),
        )

    def _shots(self, table: pd.DataFrame, label: np.ndarray) -> list[str]:
        generator = np.random.default_rng([self.seed, self.shots])
        wells = table["well"].groupby(label).unique()
        return [w for names in wells for w in generator.permutation(np.sort(names))[: self.shots]]

    @property
    def labelled_rows(self) -> np.ndarray:
        """Labelled training rows, without repetitions."""
        rows = np.unique(self.rows["train"])
        return rows[self.labels[rows] >= 0]


# ---- features and scores without a network ---------------------------------------------------------------------------


def middle(images: np.ndarray) -> np.ndarray:
    """Remove the margin, as for every evaluated cell."""
    return images[..., MARGIN:-MARGIN, MARGIN:-MARGIN].astype(np.float32)


def mean_intensities(images: np.ndarray) -> np.ndarray:
    """Return the mean of each channel, (n, 2, S, S) -> (n, 2)."""
    return images.mean((2, 3))


def nucleus_and_ring(images: np.ndarray) -> np.ndarray:
    """Return the logarithms of GFP in the nucleus, in a ring around it, and of their ratio, (n, 2, S, S) -> (n, 3).

    The usual readout of this assay. The nucleus is the object of the DNA channel (Otsu's threshold) nearest to the
    centre; the ring is 5 pixels wide and excludes other nuclei.
    """
    return np.stack([_nucleus_and_ring(gfp, dna) for gfp, dna in images])


def _nucleus_and_ring(gfp: np.ndarray, dna: np.ndarray) -> np.ndarray:
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    smooth = ndimage.gaussian_filter(dna, 1)
    labels, count = ndimage.label(smooth > threshold_otsu(smooth)) if smooth.std() > 0 else (np.ones(dna.shape, int), 1)
    centre = (np.array(dna.shape) - 1) / 2
    distance = np.linalg.norm(np.indices(dna.shape) - centre[:, None, None], axis=0)
    nearest = min(range(1, count + 1), key=lambda i: distance[labels == i].min())
    nucleus = labels == nearest
    ring = ndimage.binary_dilation(nucleus, iterations=6) & ~ndimage.binary_dilation(nucleus) & (labels == 0)
    inside, around = (float(np.log(gfp[m].mean().clip(0) + 0.01)) if m.any() else np.log(0.01) for m in (nucleus, ring))
    return np.array([inside, around, inside - around])


# ---- scores ----------------------------------------------------------------------------------------------------------


def mean_by(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups, sorted, and the mean of the rows of each."""
    names, number = np.unique(groups, return_inverse=True)
    total = np.zeros((len(names), *values.shape[1:]))
    np.add.at(total, number, values)
    return names, total / np.bincount(number).reshape(-1, *[1] * (values.ndim - 1))


def dose_scores(
    probability: np.ndarray, labels: np.ndarray, wells: np.ndarray, classes: Sequence[str]
) -> dict[str, float | dict]:
    """Return the scores of cells, and of wells by the mean of their cells' probabilities.

    The expected dose is the mean of the doses, weighted by their probabilities.
    """
    from scipy.stats import spearmanr
    from sklearn.metrics import accuracy_score, f1_score

    doses = np.array([float(c) for c in classes])
    names, by_well = mean_by(probability, wells)
    truth = mean_by(labels, wells)[1].round().astype(int)
    found = {}
    for level, p, y in (("cell", probability, labels), ("well", by_well, truth)):
        expected = p @ doses
        found |= {
            f"{level}_accuracy": float(accuracy_score(y, p.argmax(1))),
            f"{level}_weighted_f1": float(f1_score(y, p.argmax(1), average="weighted", zero_division=0)),
            f"{level}_macro_f1": float(f1_score(y, p.argmax(1), average="macro", zero_division=0)),
            f"{level}_spearman": float(spearmanr(expected, doses[y]).statistic) if np.ptp(expected) > 0 else 0.0,
            f"{level}_error": float(np.abs(expected - doses[y]).mean()),
        }
    hits = mean_by((probability.argmax(1) == labels).astype(float), wells)[1]
    expected = by_well @ doses
    found["wells"] = {
        str(n): [int(doses[y]), round(float(e), 3), round(float(h), 4)]
        for n, y, e, h in zip(names, truth, expected, hits, strict=True)
    }
    return found


def control_scores(
    probability: np.ndarray, labels: np.ndarray, wells: np.ndarray, classes: Sequence[str]
) -> dict[str, float]:
    """Return balanced accuracy and AUC of positive against negative controls, for cells and wells."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    positive = list(classes).index("poscon")
    _, by_well = mean_by(probability, wells)
    truth = mean_by(labels, wells)[1].round().astype(int)
    found = {}
    for level, p, y in (("cell", probability, labels), ("well", by_well, truth)):
        found[f"{level}_balanced_accuracy"] = float(balanced_accuracy_score(y, p.argmax(1)))
        found[f"{level}_auc"] = float(roc_auc_score(y == positive, p[:, positive]))
    return found
