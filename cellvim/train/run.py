"""`cellvim train`: a recipe, a configuration file or a plate, and what a run leaves in its folder."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any

from cellvim.errors import InputError, Interrupted, OutputError, TrainingError
from cellvim.train.resuming import check_same_training, checkpoint_path, settings_of, stopped_by_ctrl_c
from cellvim.train.usage import PLATE_RECIPE, recipe_names, recipe_path
from cellvim.train.whole_files import written_whole


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
            _check_yaml(first)
            expanded += ["--config", first]
            name = Path(first).stem
        elif first in recipe_names():  # also where a folder bears that name, as one of crops may
            expanded += ["--config", str(recipe_path(first))]
            name = first
        elif first.rstrip("/").endswith((".zarr", ".zarr.zip", ".ozx")) or Path(first).is_dir():
            expanded += ["--config", str(recipe_path(PLATE_RECIPE)), "--data.plates", json.dumps([first])]
            name = Path(first.rstrip("/")).name.split(".")[0]
        else:
            recipe_path(first)  # raises: there is none
    short = {"--label": "--data.label", "--epochs": "--trainer.max_epochs"}
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option == "--resume":
            given = equals or (rest and not rest[0].startswith("-"))
            run["resume"] = (value if equals else rest.pop(0)) if given else ""
        elif option in ("--output", "-o") or option in short:
            if not equals and (not rest or re.match(r"-(?![0-9])", rest[0])):
                raise InputError(f"{option} needs a value.")
            value = value if equals else rest.pop(0)
            if option in short:
                expanded += [short[option], value]
            else:
                run["output"] = value
        else:
            expanded.append(option + equals + value)
            if option in ("--config", "-c"):
                file = value or (rest[0] if rest else "")
                _check_yaml(file)
                name = name or Path(file).stem
    run["name"] = name or "training"
    output_given = run["output"] is not None
    run["output"] = run["output"] or f"runs/{run['name']}"
    if run["resume"] is not None and not any(a.split("=")[0] in ("--config", "-c") for a in expanded):
        folder = Path(run["resume"]).parent.parent if run["resume"] and not output_given else Path(run["output"])
        if (folder / "config.yaml").is_file():  # what a run leaves is enough to go on with it
            expanded = ["--config", str(folder / "config.yaml"), *expanded]
            run["output"], run["name"] = str(folder), folder.name
    if not any(a.split("=")[0] in ("--config", "-c") for a in expanded):
        raise InputError(
            "Nothing to train was given: name a recipe, a configuration or a plate. `cellvim train --list`."
        )
    return expanded, run


def _check_yaml(path: str) -> None:
    """Raise where a file is no configuration; the parser's own words for that name neither file nor line."""
    import yaml

    if not Path(path).is_file():
        raise InputError(f"There is no configuration {path}.")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise InputError(f"{path} is no YAML{where}: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(found, dict):
        raise InputError(
            f"{path} holds no configuration; expected model, data and trainer. `--print_config` prints one."
        )


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
    import yaml
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from cellvim.train.finetune import weights_path
    from cellvim.train.plates import PlateCrops

    expanded, run = expand_arguments(arguments)
    output = Path(run["output"])
    resume = checkpoint_path(run["resume"], output)
    with warnings.catch_warnings():
        warnings.showwarning = _show_in_one_line
        _quiet(warnings)
        cli = _parse(expanded, output)
        if cli is None:
            return None
        if 0 in (cli.trainer.max_epochs, cli.trainer.max_steps):
            raise InputError("The training has no steps; give --epochs 1 or more.")
        if cli.model.weights is not None:
            weights_path(cli.model.weights)  # looked for before anything is read
        check_folder(output, resume)
        if isinstance(cli.datamodule, PlateCrops):
            cli.datamodule.run_folder = output
        cli.datamodule.setup()  # before anything is written: labels and splits are where a first try goes wrong
        if _is_first_process():
            print(cli.datamodule.summary(), file=sys.stderr, flush=True)
        config = cli.parser.dump(cli.config, skip_none=False)
        cli.model.settings = settings_of(yaml.safe_load(config), cli.datamodule, cli.trainer.world_size)
        if resume is not None:
            check_same_training(resume, cli.model.settings)
        try:
            return _run(cli, output, resume, config, run["name"])
        except SystemExit as stop:  # what Lightning makes of an interruption
            if _is_first_process():
                raise Interrupted(_how_to_go_on(output)) from stop
            return None
        except MisconfigurationException as error:
            raise InputError(_first_sentence(error)) from error
        except OSError as error:
            raise OutputError(
                f"{error.filename or output} cannot be written: {error.strerror or error}. What was finished before is "
                f"in {output}."
            ) from error


def _run(cli: Any, output: Path, resume: str | None, config: str, name: str) -> Path | None:
    """Fit, evaluate, and write what the run leaves; None in all processes but the first."""
    trainer, is_first = cli.trainer, _is_first_process()
    if is_first:
        output.mkdir(parents=True, exist_ok=True)
        if resume is None:
            _write(output / "config.yaml", config)
    started = time.perf_counter()
    try:
        with stopped_by_ctrl_c(cli.model):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=False)
    except TrainingError:
        if is_first:
            raise
        return None  # the first process says it
    except RuntimeError as error:
        raise _explained(error) from error
    metrics = _evaluate(cli, output)
    if not is_first:
        return None
    path = output / "model.safetensors"
    export_model(cli.model, cli.datamodule, path, metrics=metrics, recipe=name, config=cli)
    _write(output / "config.yaml", config)
    metrics["seconds"] = time.perf_counter() - started
    _write(output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    if hasattr(cli.datamodule, "clear"):
        cli.datamodule.clear()
    return path


def _is_first_process() -> bool:
    """Whether this is the process that writes and speaks; known before the processes know each other."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


def _how_to_go_on(output: Path) -> str:
    if not (output / "checkpoints" / "last.ckpt").is_file():
        return f"Interrupted before anything was kept in {output}."
    return (
        f"Interrupted; {output / 'checkpoints' / 'last.ckpt'} is kept. Go on with: cellvim train --resume "
        f"--output {quote(str(output))}"
    )


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _show_in_one_line(message: Any, category: type, *_: Any, **__: Any) -> None:
    if _is_first_process():
        print("Warning: " + " ".join(str(message).split()), file=sys.stderr)


def _parse(arguments: list[str], output: Path):
    """Build trainer, model and data of a command line; None when it only asked to print something."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from cellvim.train.cli import TrainingCLI, explain_parser_error

    try:
        return TrainingCLI(arguments, output)
    except SystemExit as stop:  # --print_config, --help_all and --model.help print and leave
        if stop.code in (0, None):
            return None
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise explain_parser_error(error) from error
    except MisconfigurationException as error:
        raise InputError(_first_sentence(error)) from error


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
    parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            return
    except OSError as error:
        raise OutputError(
            f"The folder {output} cannot be written: {parent}: {error.strerror or error}. Choose another --output."
        ) from error


def _quiet(warnings: Any) -> None:
    """Hide remarks of Lightning that a user of a recipe can do nothing about."""
    for message in (
        ".*does not have many workers.*", ".*GPU available but not used.*", ".*log_every_n_steps.*",
        ".*Checkpoint directory .* exists.*", ".*Experiment logs directory.*", ".*LeafSpec.*",
        ".*Detected KeyboardInterrupt.*", ".*is not supported for the given.*", ".*overrides the configure_model.*",
        ".*Consider setting.*", ".*args parameter is intended.*", ".*recommended to use .*sync_dist=True.*",
        ".*across ranks is zero.*", ".*callbacks used to create the checkpoint.*", ".*The dirpath has changed.*",
        ".*deprecated.*", ".*unable to find .*lazy.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)


def _explained(error: RuntimeError) -> Exception:
    text = str(error)
    if "closed by peer" in text or "Connection reset" in text or "NCCL" in text:
        return TrainingError("Another process of this training has ended; what it printed says why.")
    if "out of memory" in str(error).lower():
        return TrainingError(
            "The device ran out of memory. Take fewer crops at once with --data.batch_size, and as many more with "
            "--trainer.accumulate_grad_batches."
        )
    return error


def _evaluate(cli: Any, output: Path) -> dict[str, Any]:
    """Figures of the finished model: validation, test, and by the number of channels."""
    from cellvim.train.callbacks import LearningCurves

    trainer, data = cli.trainer, cli.datamodule
    curves = next(c for c in trainer.callbacks if isinstance(c, LearningCurves)).epochs
    metrics: dict[str, Any] = {k: v for k, v in (curves[-1] if curves else {}).items() if k not in ("epoch", "lr")}
    metrics["epochs"] = trainer.current_epoch
    if len(data.rows["test"]):
        found = trainer.test(cli.model, datamodule=data, verbose=False)
        metrics |= {k: float(v) for k, v in found[0].items()}
    metrics = {k: round(v, 6) for k, v in metrics.items()}
    table = _channel_table(cli)
    if table is not None:
        with written_whole(output / "channels.csv") as partial:
            table.to_csv(partial, index=False)
        from cellvim.train.channels_table import summarize_channel_subsets

        means = summarize_channel_subsets(table, "accuracy")
        metrics["accuracy_by_channels"] = {str(n): round(float(row["mean"]), 4) for n, row in means.iterrows()}
    return metrics


def _channel_table(cli: Any) -> Any:
    """Accuracy on every subset of the channels, for a classifier with per-channel tokens and more than one channel."""
    from cellvim.models.encoder import Encoder
    from cellvim.train.channels_table import evaluate_channel_subsets

    if not _is_first_process():
        return None
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
    for batch in data.whole_loader(part):
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

    from cellvim.models.checkpoints import save_checkpoint

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
