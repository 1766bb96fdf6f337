"""Parsing of training configurations with LightningCLI, and parser errors as one-line messages."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from cellvim.errors import CellvimError, InputError, suggestion
from cellvim.train.augment import Augmentation
from cellvim.train.batches import TrainingData
from cellvim.train.callbacks import Checkpoints, LearningCurves
from cellvim.train.module import TrainingModule
from cellvim.train.optimization import Optimization
from cellvim.train.recipes import SHORT_OPTIONS


class TrainingCLI(LightningCLI):
    """Read a configuration and instantiate its trainer, model and data; runs nothing."""

    def __init__(self, options: list[str], output: Path) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        self.output = output
        super().__init__(
            TrainingModule,
            TrainingData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                "use_distributed_sampler": False,  # EpochBatches distributes the batches
                "default_root_dir": str(output),
                "log_every_n_steps": 10,
                "enable_model_summary": False,
                "deterministic": "warn",
            },
            parser_kwargs={"exit_on_error": False, "prog": "cellvim train"},
            args=options,
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Use one seed for the model and the data."""
        for target in ("model.init_args.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=_seed)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add loggers and checkpoints unless the configuration has its own, and the learning curves."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            tensorboard = TensorBoardLogger(self.output, name="logs/tensorboard")
            kwargs["logger"] = [CSVLogger(self.output, name="logs/csv"), tensorboard]
        callbacks = self._get(self.config_init, "trainer.callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        saves = self._get(self.config_init, "trainer.enable_checkpointing") in (None, True)
        if saves and not any(isinstance(callback, Checkpoints) for callback in callbacks):
            callbacks.append(Checkpoints(self.output))
        kwargs["callbacks"] = [*callbacks, LearningCurves(self.output)]
        return super().instantiate_trainer(**kwargs)


def _seed(value: Any) -> int:
    return int(value) if not isinstance(value, bool) and value is not None else 0


def parse_configuration(options: list[str], output: Path) -> TrainingCLI | None:
    """Instantiate the trainer, model and data of a configuration; None if the options only print something."""
    try:
        return TrainingCLI(options, output)
    except SystemExit as stop:  # --print_config, --help_all and --model.help
        if stop.code in (0, None):
            return None
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise explain_parser_error(error) from error
    except MisconfigurationException as error:
        raise InputError(in_one_line(error)) from error


def in_one_line(error: Exception | str) -> str:
    """Return a message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


_NOISE = re.compile(
    r"NoneType|^Problem with|^Parser key|^Does not validate|^Subtypes|^Errors:|^Given value|^Expected a (path|dot)"
)


def explain_parser_error(error: BaseException) -> CellvimError:
    """Return the parser's nested message as one line: the option, and the found and expected values."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CellvimError):
            return cause
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    option = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        close = suggestion(match[1], _known_options() - {match[1]})  # it may be an option of another class
        return InputError(
            f"{option or 'The configuration'} has no option '{match[1]}'.{close} `--print_config` prints all options."
        )
    if match := re.search(r"unrecognized arguments: (\S+)", text):
        given = match[1].partition("=")[0]
        close = suggestion(given, SHORT_OPTIONS)
        return InputError(f"There is no option '{given}'.{close} `cellvim train` prints its usage.")
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip(" -")]
    informative = [line for line in lines if not _NOISE.search(line)]
    given = next((line.partition(":")[2].strip() for line in reversed(lines) if line.startswith("Given value:")), "")
    reason = (informative or lines or [type(error).__name__])[-1]
    reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason).replace("typing.", "").rstrip(".")
    found = f"; found {given}" if given and "NestedArg" not in given and given not in reason.split() else ""
    return InputError(f"{'--' + option + ': ' if option else ''}{reason}{found}.")


def _known_options() -> set[str]:
    """Names of options of all trainings and data modules, for suggestions."""
    from cellvim.train import folders, joint, masked, plates, probe, supervised

    classes = (
        supervised.Supervised, masked.Masked, joint.Joint, probe.LinearProbe, folders.LabelledCrops, plates.PlateCrops,
        TrainingModule, Optimization, Augmentation,
    )  # fmt: skip
    return {name for cls in classes for name in inspect.signature(cls).parameters}
