"""The configuration's parser (LightningCLI), and its errors in one line."""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from cellvim.errors import CellvimError, InputError, suggestion
from cellvim.train.augment import Augmentation
from cellvim.train.callbacks import Checkpoints, LearningCurves
from cellvim.train.data import TrainingData
from cellvim.train.module import TrainingModule
from cellvim.train.optimization import Optimization
from cellvim.train.usage import SHORT_OPTIONS


class TrainingCLI(LightningCLI):
    """Reads a configuration and makes trainer, model and data of it; runs nothing.

    Parameters
    ----------
    arguments
        Options, of which ``--config`` names the recipe.
    output
        Folder of the run.
    """

    def __init__(self, arguments: list[str], output: Path) -> None:
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
                "use_distributed_sampler": False,  # EpochBatches shares batches out itself
                "default_root_dir": str(output),
                "log_every_n_steps": 10,
                "enable_model_summary": False,
                "deterministic": "warn",
            },
            parser_kwargs={"exit_on_error": False, "prog": "cellvim train"},
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything."""
        for target in ("model.init_args.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=_as_seed)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add loggers, unless the configuration has its own, and what every run keeps."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            loggers = (CSVLogger(self.output, name="logs/csv"), TensorBoardLogger(self.output, name="logs/tensorboard"))
            kwargs["logger"] = list(loggers)
        own = self._get(self.config_init, "trainer.callbacks") or []
        own = own if isinstance(own, list) else [own]
        if not any(isinstance(c, Checkpoints) for c in own) and self._get(
            self.config_init, "trainer.enable_checkpointing"
        ) in (None, True):
            own = [*own, Checkpoints(self.output)]
        kwargs["callbacks"] = [*own, LearningCurves(self.output)]
        return super().instantiate_trainer(**kwargs)


def _as_seed(value: Any) -> int:
    return int(value) if not isinstance(value, bool) and value is not None else 0


_NOISE = re.compile(
    r"NoneType|^Problem with|^Parser key|^Does not validate|^Subtypes|^Errors:|^Given value|^Expected a (path|dot)"
)


def explain_parser_error(error: BaseException) -> CellvimError:
    """Return the parser's nested message as one line: where, what was found, what was expected."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, CellvimError):
            return link
        link = link.__cause__ or link.__context__
    text = str(error)
    where = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip(" -")]
    said = [line for line in lines if not _NOISE.search(line)]
    unknown = re.search(r"Option '([^']+)' is not accepted", text)
    if unknown:
        close = suggestion(unknown[1], _known_options() - {unknown[1]})  # it may be an option of another class
        where = where or "The configuration"
        return InputError(f"{where} has no option '{unknown[1]}'.{close} `--print_config` prints all there are.")
    if match := re.search(r"unrecognized arguments: (\S+)", text):
        given = match[1].partition("=")[0]
        close = suggestion(given, SHORT_OPTIONS)
        return InputError(f"There is no option '{given}'.{close} `cellvim train` prints how it is used.")
    given = next((line.partition(":")[2].strip() for line in reversed(lines) if line.startswith("Given value:")), "")
    reason = said[-1] if said else (lines[-1] if lines else type(error).__name__)
    reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason).replace("typing.", "").rstrip(".")
    found = f"; found {given}" if given and "NestedArg" not in given and given not in reason.split() else ""
    return InputError(f"{'--' + where + ': ' if where else ''}{reason}{found}.")


def _known_options() -> set[str]:
    """Names of options of all trainings and data modules, for suggestions."""
    from cellvim.train import folders, joint, masked, plates, probe, supervised

    known = {f.name for c in (Optimization, Augmentation) for f in fields(c)}
    for made in (
        supervised.Supervised, masked.Masked, joint.Joint, probe.LinearProbe, folders.LabelledCrops, plates.PlateCrops,
        TrainingModule,
    ):  # fmt: skip
        known |= set(inspect.signature(made).parameters)
    return known
