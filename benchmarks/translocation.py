"""Accuracy on the translocation plate, wells held out: joint training, its ablation, and simpler methods.

Every trained model has the same processor time on one core. Settings were chosen on validation wells of the training
part (``tune``). Only ``run`` evaluates the test wells, once per seed, after the last step.

    python -m benchmarks.translocation calibrate PLATE  # milliseconds per crop in training
    python -m benchmarks.translocation tune PLATE       # on validation wells
    python -m benchmarks.translocation run PLATE        # every method and seed; resumes
    python -m benchmarks.translocation table            # the tables of benchmarks/results/translocation.json

PLATE is the folder ``tests/core/data/ExampleSBSImages`` of github.com/CellProfiler/CellProfiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import translocation_cells as cells_of

RESULTS = Path(__file__).parent / "results" / "translocation.json"
SEEDS = (0, 1, 2)
WIDTH, PATCH, BATCH = 96, 8, 32
BUDGET_S = {"dose": 45, "controls": 12}  # of one core per training, including masked pre-training
SHOTS = (1, 2, None)  # labelled wells per control; None for all training wells
CROP_MS = {  # milliseconds per crop of a training step, measured by ``calibrate`` on the machine of the results
    "fastchannelvim": 5.1, "joint": 5.2, "masked": 4.7, "channelvim": 11.4, "channelvit": 4.3,
}  # fmt: skip
# Chosen by ``tune`` for the Spearman correlation of cells; not tuned for masked pre-training and ChannelVim.
LR = {"fastchannelvim": 2e-3, "joint": 2e-3, "masked": 1e-3, "channelvim": 2e-3, "channelvit": 1e-3}
MASK = {"mask_ratio": 0.5, "decoder_dim": 64, "decoder_depth": 1, "decoder_pool": "mean"}
MASKED_POOL = "mean"  # or "sum"; chosen by ``tune``, as the weight of the masked loss
MASKED_WEIGHT = 1.0
CHANNEL_MASK = 0.25

# name -> kind of training, and its differences from the usual options
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "FastChannelVim": ("fastchannelvim", {}),
    "FastChannelVim, channels sampled": ("fastchannelvim", {"channel_sampling": "sorted"}),
    "masked pre-training, then FastChannelVim": ("fastchannelvim", {"pretrained": True}),
    "joint: masked loss and channel masking": ("joint", {}),
    "joint without channel masking": ("joint", {"channel_mask_ratio": 0.0}),
    "joint without masked loss": ("joint", {"masked_weight": 0.0}),
    "joint without either": ("joint", {"masked_weight": 0.0, "channel_mask_ratio": 0.0}),
    "ChannelViT": ("channelvit", {}),
    "ChannelVim": ("channelvim", {}),
}
SIMPLE = (
    "cell count",
    "mean intensities + logistic regression",
    "GFP of nucleus and ring + logistic regression",
    "HOG + ExtraTrees",
    "FastChannelVim, random weights + logistic regression",
)
JOINT = "joint: masked loss and channel masking"
CONTROL_METHODS = (*SIMPLE[1:], "FastChannelVim", "masked pre-training, then FastChannelVim", JOINT)
ENCODERS = {
    "fastchannelvim": ("fastchannelvim_tiny_patch8", {"depth": 6}),
    "joint": ("fastchannelmaskvim_tiny_patch8", {"depth": 6}),
    "masked": ("fastchannelmaskvim_tiny_patch8", {"depth": 6}),
    "channelvim": ("channelvim_tiny_patch8", {"depth": 6}),
    "channelvit": ("channelvit_tiny_patch8", {"depth": 4, "num_heads": 3}),
}

# ---- training --------------------------------------------------------------------------------------------------------


def steps_of(kind: str, seconds: float) -> int:
    """Return the number of training steps that take this processor time in seconds."""
    return max(1, round(seconds * 1000 / (CROP_MS[kind] * BATCH)))


def module(kind: str, seed: int, steps: int, steps_of_epoch: int, *, weights: str | None = None, **choices: Any):
    """Return the supervised, masked or joint training."""
    from cellvim.train.augment import Augmentation
    from cellvim.train.joint import Joint
    from cellvim.train.masked import Masked
    from cellvim.train.optimization import Optimization
    from cellvim.train.supervised import Supervised

    encoder, changes = ENCODERS[kind]
    changes = {"embed_dim": WIDTH, "drop_path_rate": 0.05, "channel_sampling": "none"} | changes
    if "channel_sampling" in choices:
        changes["channel_sampling"] = choices.pop("channel_sampling")
    masked_pool = choices.pop("masked_pool", MASKED_POOL)
    if kind in ("joint", "masked"):
        changes["masked_pool"] = masked_pool
    if weights is not None and masked_pool == "sum":
        changes["pool_scale"] = 1 - MASK["mask_ratio"]
    options = {
        "changes": changes,
        "seed": seed,
        "optimization": Optimization(
            lr=choices.pop("lr", LR[kind]), lr_batch=BATCH, warmup_epochs=0.1 * steps / steps_of_epoch,
            weight_decay=0.05, betas=(0.9, 0.95) if kind == "masked" else (0.9, 0.999),
        ),
        "augmentation": Augmentation(pad_to=cells_of.CROP + 2 * cells_of.MARGIN, intensity=0.2),
    }  # fmt: skip
    if kind == "masked":
        return Masked(encoder, **MASK, **options)
    options |= {"label_smoothing": 0.1, "class_weights": "balanced"}
    if kind == "joint":
        usual = MASK | {"masked_weight": MASKED_WEIGHT, "channel_mask_ratio": CHANNEL_MASK}
        return Joint(encoder, **options, **usual | choices)
    return Supervised(encoder, weights=weights, **options)


def fit(kind: str, data, steps: int, seed: int, **choices: Any):
    """Train for a number of steps and return the training module."""
    from lightning.pytorch import Trainer

    data.setup()
    model = module(kind, seed, steps, max(1, len(data.rows["train"]) // BATCH), **choices)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return model


def train(method: str, cells, task: str, seed: int, keep: Path, *, part: str = "test", shots=None, **choices: Any):
    """Train one method and return the module, its data and the number of crops of its steps."""
    kind, changes = TRAINED[method]
    choices = changes | choices
    pretrained = choices.pop("pretrained", False)
    seconds = BUDGET_S[task] / (2 if pretrained else 1)
    weights, steps = None, steps_of(kind, seconds)
    if pretrained:
        weights, before = pretrain(cells, task, seed, seconds, keep, part)
    mixing = "none" if kind != "joint" or task == "dose" else "half"
    data = cells_of.WellCells(
        cells, task, part=part, shots=shots, unlabelled=mixing, seed=seed, batch_size=BATCH
    )  # fmt: skip
    model = fit(kind, data, steps, seed, weights=weights, **choices)
    return model, data, BATCH * (steps + (before if pretrained else 0))


def pretrain(cells, task: str, seed: int, seconds: float, keep: Path, part: str) -> tuple[str, int]:
    """Pre-train on all cells of the training wells by masking; return the checkpoint and the number of steps."""
    from cellvim.models.checkpoints import save_checkpoint

    steps = steps_of("masked", seconds)
    path = keep / f"masked_{task}_{part}_{steps}_{seed}.safetensors"
    if not path.exists():
        data = cells_of.WellCells(cells, "dose", part=part, unlabelled="all", seed=seed, batch_size=BATCH)
        save_checkpoint(fit("masked", data, steps, seed).model, path)
    return str(path), steps


# ---- prediction ------------------------------------------------------------------------------------------------------


def predict(encoder, images: np.ndarray, *, features: bool = False) -> np.ndarray:
    """Return the class probabilities, or features, of scaled crops."""
    import torch

    encoder.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), 256):
            batch = torch.from_numpy(cells_of.middle(images[start : start + 256]))
            found.append(encoder.forward_features(batch) if features else encoder(batch).softmax(1))
    return torch.cat(found).numpy()


def classify_simply(method: str, data, seed: int) -> np.ndarray:
    """Return the class probabilities of the evaluated cells by a method that trains no network."""
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = data.labelled_rows, data.rows["test"]
    images = data.groups[0].images
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced"))
    if method == "cell count":
        counts = data.table["cells_of_well"].to_numpy(float)[:, None]
        known, wanted = counts[train], counts[test]
    else:
        known, wanted = (describe(method, images[rows], seed) for rows in (train, test))
    if method == "HOG + ExtraTrees":
        classifier = ExtraTreesClassifier(500, random_state=seed, class_weight="balanced", n_jobs=1)
    classifier.fit(known, data.labels[train])
    return classifier.predict_proba(wanted)


def describe(method: str, images: np.ndarray, seed: int) -> np.ndarray:
    """Return features of crops, (n, F)."""
    if method.startswith("mean intensities"):
        return cells_of.mean_intensities(cells_of.middle(images))
    if method.startswith("GFP of nucleus"):
        return cells_of.nucleus_and_ring(cells_of.middle(images))
    if method.startswith("HOG"):
        return hog_features(cells_of.middle(images))
    import torch

    from cellvim.models.registry import create_model

    name, changes = ENCODERS["fastchannelvim"]
    torch.manual_seed(seed)
    changes = changes | {"embed_dim": WIDTH, "image_size": cells_of.CROP, "num_classes": 0}
    return predict(create_model(name, channel_names=cells_of.CHANNELS, **changes), images, features=True)


def hog_features(images: np.ndarray) -> np.ndarray:
    """Return histograms of gradients in cells of 8 pixels and percentiles per channel, (n, C, H, W) -> (n, F)."""
    from skimage.feature import hog

    found = []
    for channel in range(images.shape[1]):
        chosen = images[:, channel]
        flat = chosen.reshape(len(chosen), -1)
        found.append([hog(i, orientations=8, pixels_per_cell=(8, 8), cells_per_block=(2, 2)) for i in chosen])
        found += [np.percentile(flat, (1, 5, 25, 50, 75, 95, 99), axis=1).T, np.stack([flat.mean(1), flat.std(1)], 1)]
    return np.hstack(found)


def channel_subsets(encoder, data) -> dict[str, dict[str, float]]:
    """Return the scores of each subset of the channels."""
    import torch

    from cellvim.train.training import evaluate_channel_subsets

    rows = data.rows["test"]
    images = torch.from_numpy(cells_of.middle(data.groups[0].images[rows]))
    table = evaluate_channel_subsets(encoder, [(images, torch.from_numpy(data.labels[rows]), (0, 1))])
    return {
        row["channels"]: {k: round(float(row[k]), 4) for k in ("accuracy", "balanced_accuracy", "weighted_f1")}
        for row in table.to_dict("records")
    }


# ---- the runs --------------------------------------------------------------------------------------------------------


def measure(method: str, cells, task: str, seed: int, keep: Path, *, part="test", shots=None, **choices: Any) -> dict:
    """Run one method with one seed and return its scores."""
    start = time.process_time()
    found: dict[str, Any] = {"method": method, "task": task, "seed": seed, "shots": shots, "parameters": 0}
    if method in SIMPLE:
        data = cells_of.WellCells(cells, task, part=part, shots=shots, seed=seed)
        data.setup()
        probability = classify_simply(method, data, seed)
    else:
        model, data, crops = train(method, cells, task, seed, keep, part=part, shots=shots, **choices)
        encoder = model.finished_model().eval()
        found |= {"parameters": sum(p.numel() for p in encoder.parameters()), "crops_seen": crops}
        probability = predict(encoder, data.groups[0].images[data.rows["test"]])
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    rows = data.rows["test"]
    score = cells_of.dose_scores if task == "dose" else cells_of.control_scores
    found |= score(probability, data.labels[rows], data.table["well"].to_numpy()[rows], data.description.class_names)
    if method in TRAINED and part == "test" and shots is None:
        found["channels"] = channel_subsets(encoder, data)
    return found


def plan() -> list[tuple[str, str, int | None]]:
    """Return the task, method and shots of each run of a seed."""
    runs: list[tuple[str, str, int | None]] = [("dose", m, None) for m in (*SIMPLE, *TRAINED)]
    return runs + [("controls", m, shots) for shots in SHOTS for m in CONTROL_METHODS]


def path_of(keep: Path, task: str, method: str, shots: int | None, seed: int) -> Path:
    """Return the file of a run's scores."""
    name = "".join(c if c.isalnum() else "_" for c in method)
    return keep / f"{task}_{name}_{shots or 'all'}_{seed}.json"


def run(cells, keep: Path, tasks: list[str], methods: list[str], seeds: list[int]) -> None:
    """Run the methods that have no result yet, and collect all results."""
    for wanted in tasks:
        for seed, (task, method, shots) in product(seeds, plan()):
            path = path_of(keep, task, method, shots, seed)
            if task == wanted and method in methods and not path.exists():
                result = measure(method, cells, task, seed, keep, shots=shots)
                path.write_text(json.dumps(result) + "\n")
                print({k: v for k, v in result.items() if k != "wells"}, flush=True)
    paths = [path_of(keep, task, method, shots, seed) for task, method, shots in plan() for seed in SEEDS]
    runs = [json.loads(p.read_text()) for p in paths if p.exists()]
    tuned = keep / "tune.json"
    choice = {"budget_cpu_seconds": TUNE_S, "runs": json.loads(tuned.read_text()) if tuned.exists() else []}
    RESULTS.write_text(json.dumps(about(cells) | {"tuned": choice, "runs": runs}, indent=1) + "\n")


def about(cells) -> dict[str, Any]:
    """Return the data, settings, machine and versions of the results."""
    from cellvim.embedding.output import processor_name

    wells = cells_of.split_wells(cells[1])
    names = ("cellvim", "torch", "lightning", "scikit-learn", "scikit-image", "numpy")
    return {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.translocation run PLATE",
        "cells": len(cells[1]), "cells_per_well": cells_of.CELLS_PER_WELL,
        "wells": {part: sorted(names) for part, names in wells.items()},
        "budget_cpu_seconds": BUDGET_S, "crop_ms": CROP_MS, "learning_rates": LR, "mask": MASK,
        "masked_pool": MASKED_POOL, "masked_weight": MASKED_WEIGHT, "channel_mask_ratio": CHANNEL_MASK,
        "encoders": ENCODERS, "width": WIDTH, "patch": PATCH, "crop": cells_of.CROP, "batch": BATCH,
        "machine": {
            "processor": processor_name(), "cores_used": 1, "cores": os.cpu_count(), "system": platform.system(),
        },
        "versions": {name: metadata.version(name) for name in names} | {"python": sys.version.split()[0]},
    }  # fmt: skip


def calibrate(cells, keep: Path, steps: int = 40) -> None:
    """Print the processor time per crop of each kind of training: the difference of a long and a short training."""
    for kind in CROP_MS:
        data = cells_of.WellCells(cells, "dose", unlabelled="all" if kind == "masked" else "none", batch_size=BATCH)
        spent = []
        for count in (5, 5 + steps):
            start = time.process_time()
            fit(kind, data, count, 0)
            spent.append(time.process_time() - start)
        print(f"{kind:<16} {(spent[1] - spent[0]) / steps / BATCH * 1000:.2f} ms per crop", flush=True)


TUNE_S = 60
CANDIDATES: list[tuple[str, dict[str, Any]]] = [
    (JOINT, {"masked_pool": "sum", "masked_weight": 1.0, "lr": 1e-3}),
    (JOINT, {"masked_pool": "mean", "masked_weight": 1.0, "lr": 1e-3}),
    (JOINT, {"masked_pool": "mean", "masked_weight": 0.3, "lr": 1e-3}),
    (JOINT, {"masked_pool": "mean", "masked_weight": 1.0, "lr": 2e-3}),
    ("FastChannelVim", {"lr": 1e-3}),
    ("FastChannelVim", {"lr": 2e-3}),
    ("ChannelViT", {"lr": 5e-4}),
    ("ChannelViT", {"lr": 1e-3}),
    (
        JOINT,
        {"mask_ratio": 0.0, "masked_weight": 0.0, "channel_mask_ratio": 0.0, "lr": 2e-3},
    ),  # no hidden tokens
]


def tune(cells, keep: Path) -> None:
    """Print the scores of each choice on validation wells; the test wells are not used."""
    BUDGET_S["dose"] = TUNE_S
    path = keep / "tune.json"
    found = json.loads(path.read_text()) if path.exists() else []
    for method, choices in CANDIDATES[len(found) :]:
        result = measure(method, cells, "dose", 0, keep, part="val", **choices)
        kept = ("cell_weighted_f1", "cell_spearman", "well_spearman", "cpu_seconds")
        found.append({"method": method, "choices": choices} | {k: round(result[k], 3) for k in kept})
        path.write_text(json.dumps(found) + "\n")
        print(found[-1], flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("calibrate", "tune", "run", "table"))
    parser.add_argument("folder", nargs="?")
    methods = [*SIMPLE, *TRAINED]
    parser.add_argument("--tasks", nargs="+", default=list(cells_of.TASKS), choices=cells_of.TASKS)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--keep", type=Path, default=Path("runs/translocation"), help="folder of weights and scores")
    options = parser.parse_args()
    if options.what == "table":
        from benchmarks.translocation_tables import tables

        print(tables(json.loads(RESULTS.read_text())))
        return
    if options.folder is None:
        parser.error("the folder of the plate is missing")
    import logging

    import torch

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    cells = cells_of.read_cells(cells_of.cut_cells(options.folder, options.keep))
    if options.what == "run":
        run(cells, options.keep, options.tasks, options.methods, options.seeds)
    else:
        {"calibrate": calibrate, "tune": tune}[options.what](cells, options.keep)


if __name__ == "__main__":
    main()
