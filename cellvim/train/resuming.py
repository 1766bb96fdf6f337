"""Starting a training from a checkpoint: resuming the same training, or initialising a model with trained weights."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellvim.channels import match_channels
from cellvim.errors import CellvimWarning, ChannelError, InputError, ModelError, listing
from cellvim.models.checkpoints import load_strictly, shipped_models
from cellvim.models.encoder import Encoder, resize_positions
from cellvim.models.mae import MaskedAutoencoder
from cellvim.models.registry import load_checkpoint

# Settings that a resumed training may change, because they do not affect the weights.
_MAY_DIFFER = ("data.workers", "data.cache", "data.plates", "data.folder", "data.table", "data.batch_size")
_OF_THE_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches", "max_epochs", "max_steps")
_LENGTH = ("trainer.max_epochs", "trainer.max_steps")
# Values of a model's configuration that affect neither the shape nor the meaning of its weights.
_NOT_OF_THE_WEIGHTS = {
    "image_size", "in_channels", "num_classes", "channel_names", "pool_scale", "drop_path_rate", "readout",
    "channel_sampling", "sample_channels_per_image", "initialization", "masked_pool",
}  # fmt: skip


def checkpoint_path(resume: str | None, output: Path) -> str | None:
    """Return the checkpoint to resume from: the given one, that of the output folder for "", or None for None."""
    if resume is None:
        return None
    path = Path(resume) if resume else output / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path} to resume from.")
    return str(path)


def settings_of(config: dict[str, Any], data: Any, world_size: int) -> dict[str, Any]:
    """Return the settings that determine the weights, by their names on the command line.

    ``config`` contains plain values, ``data`` is a `TrainingData` after its setup, ``world_size`` counts processes.
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
    """Raise `InputError` unless a checkpoint belongs to a training with the same settings; its length may differ."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["cellvim"]
    except Exception as error:  # torch raises many types
        raise InputError(f"{path} is not a complete checkpoint of `cellvim train`; it cannot be resumed.") from error
    before = saved.get("settings") or {}
    differ = [name for name in settings if name in before and before[name] != settings[name]]
    if set(differ) & set(_LENGTH):
        warnings.warn(
            "The length of the training has changed: from here on, learning rate and weight decay follow the schedule "
            "of the new length.",
            CellvimWarning,
            stacklevel=2,
        )
    changed = [f"{n} is {before[n]!r} there and {settings[n]!r} here" for n in differ if n not in _LENGTH]
    if changed:
        raise InputError(
            f"{path} belongs to a training with other settings: {listing(changed, 4)}. Resume with the settings of the "
            "checkpoint, or start a new training from its weights: --model.weights model.safetensors."
        )


def check_same_model(saved: dict[str, Any], model: Any) -> None:
    """Check that a checkpoint has the architecture of a model.

    Raises
    ------
    ModelError
        It does not; the message lists the differences.
    """
    own = {"model": type(model).__name__, **model.config.to_dict()}
    other = {"model": saved["model"], **saved["config"]}
    differ = [f"{k} is {other.get(k)!r} there and {v!r} here" for k, v in own.items() if other.get(k) != v]
    if differ:
        raise ModelError(
            f"The checkpoint belongs to another model: {listing(differ, 6)}. Resume with the recipe of the checkpoint."
        )


@contextmanager
def stopped_by_ctrl_c(module: Any) -> Iterator[None]:
    """Within the block, the first Ctrl-C stops the training after the current batch, the second one immediately."""

    def stop(*_: Any) -> None:
        if module.stop_requested:
            raise KeyboardInterrupt
        module.stop_requested = True
        if module.global_rank == 0:
            print("Stopping after this batch; Ctrl-C again stops immediately.", file=sys.stderr, flush=True)

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # only the main thread receives signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@torch.no_grad()
def start_from(model: Encoder, path: str | Path) -> None:
    """Load the weights of a checkpoint or a shipped model into a model of the same architecture.

    Channels are matched by name. The head is loaded if it has as many classes. Of a `MaskedAutoencoder`, an `Encoder`
    takes all but the decoder; its position table is resized. If the weights do not fit, the model is left unchanged
    and `ModelError` is raised, or `ChannelError` for a missing channel.
    """
    path = weights_path(path)
    source = load_checkpoint(path)
    own = model.state_dict()
    there, here = source.config.to_dict(), model.config.to_dict()
    differ = [
        f"{name} is {there[name]!r} there and {value!r} here"
        for name, value in here.items()
        if name not in _NOT_OF_THE_WEIGHTS and there[name] != value
    ]
    if isinstance(model, MaskedAutoencoder) and not isinstance(source, MaskedAutoencoder):
        differ.append("it is an Encoder there and a MaskedAutoencoder here")
    if differ:
        raise ModelError(f"{path} has another architecture: {'; '.join(differ)}. Set these values with model.changes.")
    if isinstance(source, MaskedAutoencoder) and not isinstance(model, MaskedAutoencoder):
        source = source.to_encoder(image_size=model.config.image_size, num_classes=0)
    weights = {k: v for k, v in source.state_dict().items() if not k.endswith("_extra_state")}
    weights = _match_channels(weights, source, model, str(path))
    if "pos_embed" in weights and weights["pos_embed"].shape != own["pos_embed"].shape:
        if source.config.class_token != "none":
            raise ModelError(
                f"The position table is for images of {source.config.image_size} pixels, the model for "
                f"{model.config.image_size}; it cannot be resized with a class token. Train at the same size."
            )
        table = weights["pos_embed"].unflatten(1, source.built_grid)
        weights["pos_embed"] = resize_positions(table, *model.built_grid).flatten(1, 2)
    head = {k: v for k, v in own.items() if k.startswith("head.")}
    if {k: v.shape for k, v in weights.items() if k.startswith("head.")} != {k: v.shape for k, v in head.items()}:
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")} | head
    load_strictly(model, weights)


def weights_path(weights: str | Path) -> Path:
    """Return the file of initial weights, given by its path or by the name of a shipped model."""
    if not str(weights):
        raise ModelError("This training requires initial weights: --model.weights model.safetensors.")
    path = shipped_models().get(str(weights), Path(weights))
    if not path.exists():
        raise ModelError(
            f"There are no weights {path}; expected a CellVim .safetensors file, or one of {listing(shipped_models())}."
        )
    return path


def _match_channels(weights: dict[str, Tensor], source: Encoder, model: Encoder, where: str) -> dict[str, Tensor]:
    """Select and order the weights of the channels as in the model, by name."""
    there, here = source.config.channel_names, model.config.channel_names
    if there is None or here is None:
        return weights
    ids = match_channels(here, there, where=where)
    if source.config.tokens == "joint":
        if sorted(ids) != list(range(len(there))):
            raise ChannelError(f"{where} requires all of its channels {', '.join(there)}; found {', '.join(here)}.")
        return weights | {"patch_embed.proj.weight": weights["patch_embed.proj.weight"][:, ids]}
    names = ("patch_embed.channel_embed.weight", "decoder_channel_embed.weight")
    return weights | {name: weights[name][ids] for name in names if name in weights}
