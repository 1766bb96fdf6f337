"""`cellvim train`: a recipe, a configuration file or a plate, and what a run leaves in its folder."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from cellvim.errors import CellvimError, InputError, OutputError, TrainingError
from cellvim.train.usage import PLATE_RECIPE, recipe_path


def expand_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Turn the short forms of the command line into options of the configuration.

    Returns
    -------
    arguments, run
        What the configuration's parser reads; and ``name``, ``output`` and ``resume`` of the run.

    Raises
    ------
    InputError
        A recipe or file does not exist, or an option lacks its value.
    """
    rest, expanded, name = list(arguments), [], None
    run: dict[str, Any] = {"resume": None, "output": None}
    if rest and not rest[0].startswith("-"):
        first = rest.pop(0)
        if first.endswith((".yaml", ".yml")):
            if not Path(first).is_file():
                raise InputError(f"There is no configuration {first}.")
            expanded += ["--config", first]
            name = Path(first).stem
        elif first.rstrip("/").endswith((".zarr", ".zarr.zip", ".ozx")) or Path(first).is_dir():
            expanded += ["--config", str(recipe_path(PLATE_RECIPE)), "--data.plates", json.dumps([first])]
            name = Path(first.rstrip("/")).name.split(".")[0]
        else:
            expanded += ["--config", str(recipe_path(first))]
            name = first
    short = {"--label": "--data.label", "--epochs": "--trainer.max_epochs"}
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option == "--resume":
            given = equals or (rest and not rest[0].startswith("-"))
            run["resume"] = (value if equals else rest.pop(0)) if given else ""
        elif option in ("--output", "-o") or option in short:
            if not equals and (not rest or rest[0].startswith("-")):
                raise InputError(f"{option} needs a value.")
            value = value if equals else rest.pop(0)
            if option in short:
                expanded += [short[option], value]
            else:
                run["output"] = value
        else:
            expanded.append(option + equals + value)
            if option == "--config" and name is None:
                name = Path(value or (rest[0] if rest else "")).stem
    run["name"] = name or "training"
    run["output"] = run["output"] or f"runs/{run['name']}"
    if not any(a.split("=")[0] in ("--config", "-c") for a in expanded):
        raise InputError(
            "Nothing to train was given: name a recipe, a configuration or a plate. `cellvim train --list`."
        )
    return expanded, run


def train(arguments: Sequence[str]) -> Path | None:
    """Run a training as the command line describes it.

    Parameters
    ----------
    arguments
        As after ``cellvim train``.

    Returns
    -------
    The exported model, or None when only a configuration was printed.

    Raises
    ------
    CellvimError
        Something given cannot be used, or the loss is no number; the message says what, and what to do.
    """
    expanded, run = expand_arguments(arguments)
    output = Path(run["output"])
    resume = _checkpoint(run["resume"], output)
    cli = _parse(expanded, output)
    if cli is None:
        return None
    check_folder(output, resume)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Consider setting.*")
        cli.datamodule.setup()  # before anything is written: labels and splits are where a first try goes wrong
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(cli.parser.dump(cli.config, skip_none=False))
    started = time.perf_counter()
    with warnings.catch_warnings():
        _quiet(warnings)
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=False)
        except (CellvimError, KeyboardInterrupt):
            raise
        except RuntimeError as error:
            raise _explained(error) from error
        if cli.trainer.interrupted:
            raise KeyboardInterrupt
        metrics = _evaluate(cli, output)
    path = output / "model.safetensors"
    if cli.trainer.is_global_zero:
        export_model(cli.model, cli.datamodule, path, metrics=metrics, recipe=run["name"], config=cli)
        metrics["seconds"] = time.perf_counter() - started
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return path


def _parse(arguments: list[str], output: Path):
    """Build trainer, model and data of a command line; None when it only asked to print something."""
    from jsonargparse import ArgumentError

    from cellvim.train.cli import TrainingCLI, explain_parser_error

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*args parameter is intended.*")
            return TrainingCLI(arguments, output)
    except SystemExit as stop:  # --print_config, --help_all and --model.help print and leave
        if stop.code in (0, None):
            return None
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise explain_parser_error(error) from error


def _checkpoint(resume: str | None, output: Path) -> str | None:
    if resume is None:
        return None
    path = Path(resume) if resume else output / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path} to resume from.")
    return str(path)


def check_folder(output: Path, resume: str | None) -> None:
    """Refuse a folder that holds another training, or cannot be made.

    Raises
    ------
    OutputError
        As said.
    """
    if resume is None and (output / "checkpoints" / "last.ckpt").exists():
        raise OutputError(
            f"{output} holds a training already. Go on with it (--resume), or choose another folder with --output."
        )
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"The folder {output} cannot be made: {parent} is not writable. Choose another --output.")


def _quiet(warnings: Any) -> None:
    """Hide remarks of Lightning that a user of a recipe can do nothing about."""
    for message in (
        ".*does not have many workers.*", ".*GPU available but not used.*", ".*log_every_n_steps.*",
        ".*Checkpoint directory .* exists.*", ".*Experiment logs directory.*", ".*LeafSpec.*",
        ".*Detected KeyboardInterrupt.*", ".*is not supported for the given.*", ".*overrides the configure_model.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)


def _explained(error: RuntimeError) -> Exception:
    if "out of memory" in str(error).lower():
        return TrainingError(
            "The device ran out of memory. Take fewer crops at once with --data.batch_size, and as many more with "
            "--trainer.accumulate_grad_batches."
        )
    return error


def _evaluate(cli: Any, output: Path) -> dict[str, Any]:
    """Figures of the finished model: validation, test, and by the number of channels."""
    trainer, data = cli.trainer, cli.datamodule
    metrics: dict[str, Any] = {
        k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("train_", "val_"))
    }
    metrics["epochs"] = trainer.current_epoch
    if len(data.rows["test"]):
        found = trainer.test(cli.model, datamodule=data, verbose=False)
        metrics |= {k: float(v) for k, v in found[0].items()}
    table = _channel_table(cli)
    if table is not None:
        table.to_csv(output / "channels.csv", index=False)
        from cellvim.train.channels_table import summarize_channel_subsets

        means = summarize_channel_subsets(table, "accuracy")
        metrics["accuracy_by_channels"] = {str(n): round(float(row["mean"]), 4) for n, row in means.iterrows()}
    return metrics


def _channel_table(cli: Any) -> Any:
    """Accuracy on every subset of the channels, for a classifier with per-channel tokens and more than one channel."""
    from cellvim.models.encoder import Encoder
    from cellvim.train.channels_table import evaluate_channel_subsets

    data, model = cli.datamodule, cli.model.finished_model()
    part = "test" if len(data.rows["test"]) else "val"
    config = model.config
    if type(model) is not Encoder or not config.num_classes or config.tokens != "per_channel":
        return None
    if not len(data.rows[part]) or config.in_channels < 2 or len(data.groups) != 1:
        return None
    return evaluate_channel_subsets(model, evaluation_batches(cli.model, data, part))


def evaluation_batches(module: Any, data: Any, part: str) -> list[tuple[Any, Any, list[int]]]:
    """Return the scaled, labelled middle crops of a part of the split as (images, labels, channel ids)."""
    from cellvim.train.augment import middle_window

    batches = []
    for batch in data._loader(part):
        images, labels, channels = module.prepare(batch)
        known = labels >= 0
        if bool(known.any()):
            size = module.model.config.image_size
            batches.append((middle_window(images, size)[known], labels[known], channels.tolist()))
    return batches


def export_model(
    module: Any, data: Any, path: str | Path, *, metrics: dict[str, Any], recipe: str, config: Any = None
) -> Path:
    """Write what `cellvim embed --model` reads, with all that must travel with the weights in its card."""
    import torch

    from cellvim.models.weights import save_checkpoint

    model = module.finished_model()
    model.is_trained = True
    card = {
        **data.description.to_dict(),
        "recipe": recipe,
        "encoder": module.encoder_name,
        "split": data.split,
        "metrics": metrics,
        "seed": module.seed,
        "versions": {"cellvim": _version("cellvim"), "torch": str(torch.__version__), "python": sys.version.split()[0]},
    }
    return save_checkpoint(model, path, card=card)


def _version(name: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "not installed"
