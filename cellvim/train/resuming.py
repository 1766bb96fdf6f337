"""Going on with a training that was stopped: Ctrl-C leaves a checkpoint, and only the same training takes it up."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from cellvim.errors import CellvimWarning, InputError, ModelError, listing

_MAY_DIFFER = ("data.workers", "data.cache", "data.plates", "data.folder", "data.table", "data.batch_size")
_OF_THE_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches", "max_epochs", "max_steps")
_LENGTH = ("trainer.max_epochs", "trainer.max_steps")


def checkpoint_path(resume: str | None, output: Path) -> str | None:
    """Return the checkpoint to go on from: the one named, or that of the output folder for ""; None for None.

    Raises
    ------
    InputError
        There is none.
    """
    if resume is None:
        return None
    path = Path(resume) if resume else output / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path} to resume from.")
    return str(path)


def settings_of(config: dict[str, Any], data: Any, world_size: int) -> dict[str, Any]:
    """Return all that decides a training's weights, by its name on the command line.

    Parameters
    ----------
    config
        The configuration, as plain values.
    data
        The data module, set up.
    world_size
        Processes of the training.
    """
    found = {"seed_everything": config.get("seed_everything")}
    for part in ("model", "data"):
        found |= _flat(f"{part}.", config[part].get("init_args", {})) | {part: config[part].get("class_path")}
    found |= {f"trainer.{name}": config["trainer"].get(name) for name in _OF_THE_TRAINER}
    found = {name: value for name, value in found.items() if name not in _MAY_DIFFER}
    found["crops a step"] = data.batch_size * world_size
    digest = sha256(data.labels.tobytes())
    for part in ("train", "val", "test"):
        digest.update(data.rows[part].tobytes())
    found["crops"] = f"{len(data.labels)} ({digest.hexdigest()[:8]})"
    return found


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else {prefix + name: value}
    return flat


def check_same_training(path: str, settings: dict[str, Any]) -> None:
    """Refuse a checkpoint of a training that was asked for otherwise.

    Raises
    ------
    InputError
        It cannot be read, or what decides the weights differs; the message says what.
    """
    import torch

    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["cellvim"]
    except Exception as error:  # torch raises many kinds, by what is wrong with the file
        raise InputError(f"{path} is not a whole checkpoint of `cellvim train`; it cannot be resumed.") from error
    before = saved.get("settings") or {}
    differ = [name for name in settings if name in before and before[name] != settings[name]]
    if set(differ) & set(_LENGTH):
        warnings.warn(
            "The training is to be of another length than when it began: from here on, learning rate and weight decay "
            "follow the schedule of the new length.",
            CellvimWarning,
            stacklevel=2,
        )
    differ = [f"{n} is {before[n]!r} there and {settings[n]!r} here" for n in differ if n not in _LENGTH]
    if differ:
        raise InputError(
            f"{path} is of a training that was asked for otherwise: {listing(differ, 4)}. Give the options that it "
            "began with, or begin another one from its weights: --model.weights model.safetensors."
        )


def check_same_model(saved: dict[str, Any], model: Any) -> None:
    """Refuse a checkpoint of another architecture, naming what differs.

    Raises
    ------
    ModelError
        As said.
    """
    own = {"model": type(model).__name__, **model.config.to_dict()}
    other = {"model": saved["model"], **saved["config"]}
    differ = [f"{k} is {other.get(k)!r} there and {v!r} here" for k, v in own.items() if other.get(k) != v]
    if differ:
        raise ModelError(f"The checkpoint is of another model: {listing(differ, 6)}. Resume with its own recipe.")


@contextmanager
def stopped_by_ctrl_c(module: Any) -> Iterator[None]:
    """Within the block, the first Ctrl-C ends the training after the batch in hand, and the second one at once."""

    def stop(number: int, frame: Any) -> None:
        if module.stop_requested:
            raise KeyboardInterrupt
        module.stop_requested = True
        if module.global_rank == 0:
            print("Stopping after this batch; Ctrl-C again stops at once.", file=sys.stderr, flush=True)

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread, where signals do not come
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
