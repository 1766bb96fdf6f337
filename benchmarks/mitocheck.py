"""Accuracy on MitoCheck's labelled nuclei, plates held out: FastVim, Vim and ViT of equal size and budget.

Every model has the same processor time on one core. Learning rates were chosen on plates of the training part
(``tune``: 5e-4, 1e-3 and 2e-3 for every model with the full budget, and 4e-3 where 2e-3 was best). Only ``run``
evaluates the test plates, once per seed, after the last epoch.

    python -m benchmarks.mitocheck calibrate CROPS  # seconds per epoch
    python -m benchmarks.mitocheck tune CROPS     # learning rates, on a validation part of the training plates
    python -m benchmarks.mitocheck run CROPS      # every method and seed; resumes
    python -m benchmarks.mitocheck table          # the table of benchmarks/results/mitocheck.json

CROPS is the folder ``mitocheck_single_cell_sample_images`` of github.com/WayScience/phenotypic_profiling.
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
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "mitocheck.json"
PATTERN = r"(?P<Metadata_Plate>PLLT\d+_\d+)"
SEEDS = (0, 1, 2)
FOLDED = "Folded"  # left out of the published results, which have 15 classes
WIDTH, PATCH, CROP, BATCH = 96, 8, 48, 32
# Epochs that take BUDGET_S of one core, from the seconds per epoch on an idle machine (EPOCH_S, measured by
# ``calibrate``); depth for about 0.5 M parameters.
BUDGET_S = 200
EPOCH_S = {"FastVim": 6.3, "Vim": 11.6, "ViT": 4.8, "masked": 6.3}
MODELS = {
    "FastVim": {"encoder": "fastvim_tiny_patch8", "depth": 6, "epochs": 32, "lr": 1e-3},
    "Vim": {"encoder": "vim_tiny_patch8", "depth": 6, "epochs": 17, "lr": 2e-3},
    "ViT": {"encoder": "vit_tiny_patch8", "depth": 4, "epochs": 42, "lr": 1e-3, "changes": {"num_heads": 3}},
}
MASKED = {"epochs": 32, "mask_ratio": 0.5, "decoder_dim": 64, "decoder_depth": 1, "lr": 1e-3}
KNOWN = [  # published results and their splits
    ("CellProfiler + DeepProfiler features, logistic regression", "15", "random by cell", "0.84 to 0.85"),
    ("CellProfiler features, logistic regression", "15", "random by cell", "0.76 to 0.81"),
    ("DeepProfiler (EfficientNet) features, logistic regression", "15", "random by cell", "0.71 to 0.76"),
    ("HOG + ExtraTrees, measured for this data set", "15", "random by cell", "0.726"),
    ("HOG + ExtraTrees, measured for this data set", "15", "by plate, 5 folds", "0.652"),
]


def crops(folder: str, *, part: str, seed: int):
    """Return the data: a quarter of the plates is the test part; for tuning, a fifth of the rest is validation."""
    from cellvim.train.folders import LabelledCrops

    data = LabelledCrops(
        folder, pattern=PATTERN, channels=["DNA"], crop_size=CROP, pixel_size_um=0.65, batch_size=BATCH, split="plate",
        val=0.2 if part == "tune" else 0.0, test=0.25, seed=0,
    )  # fmt: skip
    data.setup()
    data.seed = seed  # for the order; the split stays the same
    return data


def module(name: str, seed: int, *, lr: float | None = None, weights: str | None = None):
    """Return the supervised training of a method."""
    from cellvim.train.augment import Augmentation
    from cellvim.train.optimization import Optimization
    from cellvim.train.supervised import Supervised

    spec = MODELS[name]
    changes = {"embed_dim": WIDTH, "depth": spec["depth"], "drop_path_rate": 0.1, **spec.get("changes", {})}
    if weights is not None:
        changes["pool_scale"] = 1 - MASKED["mask_ratio"]
    return Supervised(
        spec["encoder"], changes=changes, label_smoothing=0.1, seed=seed, weights=weights,
        optimization=Optimization(lr=lr or spec["lr"], lr_batch=BATCH, warmup_epochs=2, weight_decay=0.05),
        augmentation=Augmentation(pad_to=56, intensity=0.2),
    )  # fmt: skip


def masked_module(seed: int):
    """Return the masked pre-training, which uses no labels."""
    from cellvim.train.augment import Augmentation
    from cellvim.train.masked import Masked
    from cellvim.train.optimization import Optimization

    options = {k: v for k, v in MASKED.items() if k not in ("epochs", "lr")}
    return Masked(
        "fastmaskvim_tiny_patch8", seed=seed, **options,
        changes={"embed_dim": WIDTH, "depth": MODELS["FastVim"]["depth"], "drop_path_rate": 0.0},
        optimization=Optimization(
            lr=MASKED["lr"], lr_batch=BATCH, warmup_epochs=2, weight_decay=0.05, betas=(0.9, 0.95)
        ),
        augmentation=Augmentation(pad_to=56, intensity=0.2),
    )  # fmt: skip


def fit(model, data, epochs: int) -> float:
    """Train and return the processor time in seconds."""
    from lightning.pytorch import Trainer

    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, check_val_every_n_epoch=epochs, use_distributed_sampler=False,
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(model, datamodule=data)
    return time.process_time() - start


def probabilities(model, data, part: str, *, features: bool = False) -> np.ndarray:
    """Return class probabilities (or features) of a part of the split, in the order of its rows."""
    import torch

    from cellvim.train.augment import middle_window

    model.model.eval()
    found = []
    with torch.inference_mode():
        for batch in data.whole_loader(part):
            images = middle_window(data.groups[0].scaled(batch["images"]), CROP)
            found.append(model.model.forward_features(images) if features else model.model(images).softmax(1))
    return torch.cat(found).numpy()


def scores(probability: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, float]:
    """Return weighted and macro F1 on 16 classes, and on 15: without the cells and the probability of Folded."""
    from sklearn.metrics import f1_score

    folded = classes.index(FOLDED)
    without = probability.copy()
    without[:, folded] = -1
    keep = labels != folded
    result = {}
    for n, truth, guess in ((16, labels, probability.argmax(1)), (15, labels[keep], without.argmax(1)[keep])):
        for average in ("weighted", "macro"):
            result[f"{average}_f1_{n}"] = float(
                f1_score(truth, guess, average=average, labels=np.unique(truth), zero_division=0)
            )
    return result


def hog_trees(data, seed: int) -> np.ndarray:
    """Return the probabilities of the published baseline: ExtraTrees on HOG and intensity statistics."""
    from sklearn.ensemble import ExtraTreesClassifier

    features = hog_features(data.groups[0].images[:, 0])
    trees = ExtraTreesClassifier(500, random_state=seed, class_weight="balanced", n_jobs=1)
    trees.fit(features[data.rows["train"]], data.labels[data.rows["train"]])
    return trees.predict_proba(features[data.rows["test"]])


def hog_features(images: np.ndarray) -> np.ndarray:
    """Return histograms of gradients in cells of 8 pixels and intensity statistics, (n, H, W) uint8 -> (n, F)."""
    from skimage.feature import hog

    shapes = [hog(i, orientations=8, pixels_per_cell=(8, 8), cells_per_block=(2, 2)) for i in images]
    flat = images.reshape(len(images), -1).astype(np.float32)
    levels = np.percentile(flat, (1, 5, 25, 50, 75, 95, 99), axis=1).T
    return np.hstack([shapes, levels, flat.mean(1, keepdims=True), flat.std(1, keepdims=True)])


def random_regression(data, seed: int) -> np.ndarray:
    """Return the probabilities of logistic regression on the features of an untrained FastVim."""
    from lightning.pytorch import Trainer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = module("FastVim", seed)
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.trainer.datamodule = data
    model.configure_model()
    train, test = (probabilities(model, data, part, features=True) for part in ("train", "test"))
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
    regression.fit(train, data.labels[data.rows["train"]])
    found = np.zeros((len(test), len(data.description.class_names)))
    found[:, regression.classes_] = regression.predict_proba(test)
    return found


def measure(method: str, folder: str, seed: int, keep: Path) -> dict:
    """Run one method with one seed and return its scores."""
    data = crops(folder, part="run", seed=seed)
    labels, classes = data.labels[data.rows["test"]], data.description.class_names
    start, parameters = time.process_time(), 0
    if method == "HOG + ExtraTrees":
        found = hog_trees(data, seed)
    elif method == "FastVim, random weights + logistic regression":
        found = random_regression(data, seed)
    else:
        name, _, masked = method.partition(" + ")
        share = 2 if masked == HALVED else 1
        model = module(name, seed)
        if masked:
            from cellvim.models.checkpoints import save_checkpoint

            before = masked_module(seed)
            fit(before, data, MASKED["epochs"] // share)
            path = save_checkpoint(before.model, keep / f"masked{seed}.safetensors")
            model = module(name, seed, weights=str(path))
        fit(model, data, MODELS[name]["epochs"] // share)
        parameters = sum(p.numel() for p in model.model.parameters())
        found = probabilities(model, data, "test")
        finish(model, data, keep / f"{slug(method)}_{seed}.safetensors")
    seconds = time.process_time() - start
    figures = scores(found, labels, classes)
    return {"method": method, "seed": seed, "cpu_seconds": round(seconds, 1), "parameters": parameters, **figures}


def finish(model, data, path: Path) -> None:
    """Save the weights with their card."""
    from cellvim.train.training import export_model

    export_model(model, data, path, metrics={}, recipe="benchmarks/mitocheck.py")


HALVED = "masked pre-training, half of the budget each"
METHODS = (
    "HOG + ExtraTrees",
    "FastVim, random weights + logistic regression",
    "FastVim",
    "ViT",
    "Vim",
    f"FastVim + {HALVED}",
    "FastVim + masked pre-training, a whole budget each",
)


def slug(method: str) -> str:
    """Return the name of a method for a file name."""
    return "".join(c if c.isalnum() else "_" for c in method)


def run(folder: str, keep: Path, methods: list[str], seeds: list[int]) -> None:
    """Run the methods that have no result yet, seed by seed, and collect all results."""
    keep.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for method in methods:
            path = keep / f"{slug(method)}_{seed}.json"
            if not path.exists():
                result = measure(method, folder, seed, keep)
                path.write_text(json.dumps(result) + "\n")
                print(result, flush=True)
    runs = [json.loads(p.read_text()) for m in METHODS for p in sorted(keep.glob(f"{slug(m)}_[0-9].json"))]
    RESULTS.write_text(json.dumps(about(folder) | {"runs": runs}, indent=1) + "\n")


def about(folder: str) -> dict:
    """Return the data, machine and versions of the results."""
    from cellvim.embedding.output import processor_name

    data = crops(folder, part="run", seed=0)
    plates = {part: sorted(set(data.table["Metadata_Plate"].iloc[rows])) for part, rows in data.rows.items()}
    names = ("cellvim", "torch", "lightning", "scikit-learn", "scikit-image", "numpy")
    return {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.mitocheck run CROPS",
        "cells": {part: len(rows) for part, rows in data.rows.items()},
        "plates": {part: len(names) for part, names in plates.items()},
        "test_plates": plates["test"],
        "models": MODELS, "masked": MASKED, "width": WIDTH, "patch": PATCH, "crop": CROP, "batch": BATCH,
        "budget_cpu_seconds": BUDGET_S, "epoch_seconds_on_a_quiet_machine": EPOCH_S,
        "machine": {
            "processor": processor_name(), "cores_used": 1, "cores": os.cpu_count(), "system": platform.system(),
        },
        "versions": {name: metadata.version(name) for name in names} | {"python": sys.version.split()[0]},
    }  # fmt: skip


def tune(folder: str, names: list[str], rates: list[float]) -> None:
    """Print the weighted F1 on validation plates by learning rate."""
    from sklearn.metrics import f1_score

    for name in names:
        for lr in rates:
            data = crops(folder, part="tune", seed=0)
            model = module(name, 0, lr=lr)
            seconds = fit(model, data, MODELS[name]["epochs"])
            labels, guess = data.labels[data.rows["val"]], probabilities(model, data, "val").argmax(1)
            weighted, macro = (f1_score(labels, guess, average=a) for a in ("weighted", "macro"))
            count = sum(p.numel() for p in model.model.parameters())
            print(
                f"{name:<8} lr {lr:g}: validation weighted F1 {weighted:.3f}, macro F1 {macro:.3f}, "
                f"{seconds:.0f} s, {count:,} parameters",
                flush=True,
            )


def calibrate(folder: str) -> None:
    """Print the seconds per epoch of each training on one core, for EPOCH_S."""
    for name in (*MODELS, "masked"):
        model = masked_module(0) if name == "masked" else module(name, 0)
        print(f"{name:<8} {fit(model, crops(folder, part='run', seed=0), 2) / 2:.1f} s per epoch", flush=True)


def table() -> str:
    """Return the table in Markdown, mean ± standard deviation over seeds."""
    results = json.loads(RESULTS.read_text())
    lines = ["| method | parameters | CPU s | weighted F1, 15 | macro F1, 15 | weighted F1, 16 | macro F1, 16 |"]
    lines.append("|---|---|---|---|---|---|---|")
    for method in METHODS:
        runs = [r for r in results["runs"] if r["method"] == method]
        if not runs:
            continue
        cells = []
        for key in ("weighted_f1_15", "macro_f1_15", "weighted_f1_16", "macro_f1_16"):
            values = [r[key] for r in runs]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}")
        seconds = np.mean([r["cpu_seconds"] for r in runs])
        size = f"{runs[0]['parameters'] / 1e6:.2f} M" if runs[0]["parameters"] else "–"
        name = method if len(runs) == len(SEEDS) else f"{method} ({len(runs)} seeds)"
        lines.append(f"| {name} | {size} | {seconds:.0f} | {' | '.join(cells)} |")
    lines += [
        "",
        "Published results with other splits (weighted F1):",
        "",
        "| method | classes | split | weighted F1 |",
    ]
    lines += ["|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in KNOWN)]
    return "\n".join(lines)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("calibrate", "tune", "run", "table"))
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--keep", type=Path, default=Path("runs/mitocheck"), help="folder for the trained weights")
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    if options.folder is None:
        parser.error("the folder of crops is missing")
    import logging

    import torch

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.what == "calibrate":
        calibrate(options.folder)
    elif options.what == "tune":
        tune(options.folder, options.models, options.rates)
    else:
        run(options.folder, options.keep, options.methods, options.seeds)


if __name__ == "__main__":
    main()
