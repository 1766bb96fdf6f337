"""`cellvim train`: run a training, evaluate and export the model, and write the files of the run."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import combinations
from math import comb
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from cellvim.errors import InputError, Interrupted, ModelError, OutputError, TrainingError
from cellvim.files import atomic_path, check_folder_writable, write_atomic
from cellvim.models.checkpoints import save_checkpoint
from cellvim.models.encoder import Encoder
from cellvim.train.augment import middle_window
from cellvim.train.callbacks import LearningCurves
from cellvim.train.configuration import TrainingCLI, in_one_line, parse_configuration
from cellvim.train.recipes import parse_command_line
from cellvim.train.resuming import check_same_training, checkpoint_path, settings_of, stopped_by_ctrl_c, weights_path
from cellvim.train.supervised import classification_scores, confusion_matrix

_HIDDEN_WARNINGS = (  # of Lightning, about which the user of a recipe can do nothing
    ".*does not have many workers.*", ".*GPU available but not used.*", ".*log_every_n_steps.*",
    ".*Checkpoint directory .* exists.*", ".*Experiment logs directory.*", ".*LeafSpec.*",
    ".*Detected KeyboardInterrupt.*", ".*is not supported for the given.*", ".*overrides the configure_model.*",
    ".*Consider setting.*", ".*args parameter is intended.*", ".*recommended to use .*sync_dist=True.*",
    ".*across ranks is zero.*", ".*callbacks used to create the checkpoint.*", ".*The dirpath has changed.*",
    ".*deprecated.*", ".*unable to find .*lazy.*",
)  # fmt: skip


def train(arguments: Sequence[str]) -> Path | None:
    """Run a training as described by the command line.

    Parameters
    ----------
    arguments
        Arguments after ``cellvim train``.

    Returns
    -------
    Path of the exported model; None if only a configuration was printed, and in all processes but the first.

    Raises
    ------
    CellvimError
        An argument is not valid, or the loss is not finite.
    """
    command = parse_command_line(arguments)
    output, resume = command.output, checkpoint_path(command.resume, command.output)
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        for message in _HIDDEN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        cli = parse_configuration(command.options, output)
        if cli is None:
            return None
        if 0 in (cli.trainer.max_epochs, cli.trainer.max_steps):
            raise InputError("The training has no steps; give --epochs 1 or more.")
        if cli.model.weights is not None:
            weights_path(cli.model.weights)  # raises before any data are read
        if resume is None and (output / "checkpoints" / "last.ckpt").exists():
            raise OutputError(
                f"{output} already contains a training. Resume it (--resume), or choose another folder with --output."
            )
        check_folder_writable(output)
        cli.datamodule.run_folder = output
        cli.datamodule.setup()  # raises for invalid labels and splits before anything is written
        if _is_first_process():
            print(cli.datamodule.summary(), file=sys.stderr, flush=True)
        config = cli.parser.dump(cli.config, skip_none=False)
        cli.model.settings = settings_of(yaml.safe_load(config), cli.datamodule, cli.trainer.world_size)
        if resume is not None:
            check_same_training(resume, cli.model.settings)
        try:
            return _run(cli, output, resume, config, command.name)
        except SystemExit as stop:  # raised by Lightning for an interrupted training
            if not _is_first_process():
                return None
            checkpoint = output / "checkpoints" / "last.ckpt"
            if not checkpoint.is_file():
                raise Interrupted(f"Interrupted before a checkpoint was written to {output}.") from stop
            command_line = f"cellvim train --resume --output {quote(str(output))}"
            raise Interrupted(f"Interrupted; {checkpoint} is kept. Resume with: {command_line}") from stop
        except MisconfigurationException as error:
            raise InputError(in_one_line(error)) from error
        except OSError as error:
            raise OutputError(
                f"{error.filename or output} cannot be written: {error.strerror or error}. Finished files are kept in "
                f"{output}."
            ) from error


def _run(cli: TrainingCLI, output: Path, resume: str | None, config: str, name: str) -> Path | None:
    """Fit, evaluate and export the model; None in all processes but the first."""
    if _is_first_process():
        output.mkdir(parents=True, exist_ok=True)
        if resume is None:
            write_atomic(output / "config.yaml", config)
    started = time.perf_counter()
    try:
        with stopped_by_ctrl_c(cli.model):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
    except TrainingError:
        if _is_first_process():
            raise
        return None  # the first process prints it
    except RuntimeError as error:
        raise _explained(error) from error
    metrics = _evaluate(cli, output)
    if not _is_first_process():
        return None
    path = export_model(cli.model, cli.datamodule, output / "model.safetensors", metrics=metrics, recipe=name)
    write_atomic(output / "config.yaml", config)
    metrics["seconds"] = time.perf_counter() - started
    write_atomic(output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    cli.datamodule.clear()
    return path


def _is_first_process() -> bool:
    """Return whether this process prints and writes; known before the processes are connected."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _print_warning(message: Any, *_: Any, **__: Any) -> None:
    if _is_first_process():
        print(f"Warning: {in_one_line(message)}", file=sys.stderr)


def _explained(error: RuntimeError) -> Exception:
    text = str(error)
    if "closed by peer" in text or "Connection reset" in text or "NCCL" in text:
        return TrainingError("Another process of this training has ended; see its output for the reason.")
    if "out of memory" in text.lower():
        return TrainingError(
            "The device ran out of memory. Reduce --data.batch_size, and increase --trainer.accumulate_grad_batches by "
            "the same factor."
        )
    return error


def _evaluate(cli: TrainingCLI, output: Path) -> dict[str, Any]:
    """Return the metrics of the trained model on validation and test, and by the number of channels."""
    trainer, data = cli.trainer, cli.datamodule
    curves = next(c for c in trainer.callbacks if isinstance(c, LearningCurves)).epochs
    metrics: dict[str, Any] = {k: v for k, v in (curves[-1] if curves else {}).items() if k not in ("epoch", "lr")}
    metrics["epochs"] = trainer.current_epoch
    if len(data.rows["test"]):
        found = trainer.test(cli.model, datamodule=data, verbose=False)
        metrics |= {k: float(v) for k, v in found[0].items()}
    metrics = {k: round(v, 6) for k, v in metrics.items()}
    model = cli.model.finished_model()
    config = model.config
    is_classifier = type(model) is Encoder and config.num_classes > 0
    if not (_is_first_process() and is_classifier and config.tokens == "per_channel" and config.in_channels > 1):
        return metrics
    part = "test" if len(data.rows["test"]) else "val"
    if len(data.groups) > 1 or not len(data.rows[part]):
        return metrics
    batches = []
    for batch in data.whole_loader(part):
        images, labels, channels = cli.model.prepare(batch)
        known = labels >= 0
        if bool(known.any()):
            batches.append((middle_window(images, config.image_size)[known], labels[known], channels.tolist()))
    if batches:
        table = evaluate_channel_subsets(model, batches)
        with atomic_path(output / "channels.csv") as partial:
            table.to_csv(partial, index=False)
        means = table.groupby("n_channels")["accuracy"].mean()
        metrics["accuracy_by_channels"] = {str(n): round(float(mean), 4) for n, mean in means.items()}
    return metrics


@torch.inference_mode()
def evaluate_channel_subsets(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor, Sequence[int]]],
    *,
    max_subsets: int = 256,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the classification scores of an `Encoder` with per-channel tokens for every subset of the channels.

    ``batches`` are (images (B, C, H, W), labels (B,), channel ids (C,)), all with the same channels. Of each size, at
    most ``max_subsets`` subsets are evaluated, drawn with ``seed``. Raises `ModelError` for a model with joint tokens.

    References
    ----------
    Bao et al., Channel Vision Transformers (2024), Table 2.
    """
    if model.config.tokens != "per_channel":
        raise ModelError(
            "The model has joint tokens and requires all of its channels; subsets need per-channel tokens."
        )
    model.eval()
    generator = np.random.default_rng(seed)
    ids = list(batches[0][2])
    names = model.config.channel_names or tuple(map(str, range(model.config.in_channels)))
    rows = []
    for size in range(1, len(ids) + 1):
        subsets: Iterable[tuple[int, ...]] = combinations(range(len(ids)), size)
        if comb(len(ids), size) > max_subsets:
            drawn: dict[tuple[int, ...], None] = {}  # ordered
            while len(drawn) < max_subsets:
                drawn[tuple(sorted(generator.choice(len(ids), size, replace=False).tolist()))] = None
            subsets = drawn
        for chosen in subsets:
            confusion = sum(
                confusion_matrix(model(images[:, list(chosen)], channels=[ids[i] for i in chosen]), labels)
                for images, labels, _ in batches
            )
            channels = ",".join(names[ids[i]] for i in chosen)
            rows.append({"n_channels": size, "channels": channels} | classification_scores(confusion))
    return pd.DataFrame(rows)


def export_model(module: Any, data: Any, path: str | Path, *, metrics: dict[str, Any], recipe: str) -> Path:
    """Save the trained model for `cellvim embed --model`, with the description of its data and training as its card."""
    model = module.finished_model()
    model.is_trained = True
    card = {
        **asdict(data.description),
        "recipe": recipe,
        "encoder": module.encoder_name,
        "split": data.split,
        "metrics": metrics,
        "seed": module.seed,
        "versions": {"cellvim": version("cellvim"), "torch": str(torch.__version__), "python": sys.version.split()[0]},
    }
    return save_checkpoint(model, path, card=card)
