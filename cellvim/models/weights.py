"""Weights: our checkpoints (safetensors with the configuration inside) and the published ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellvim.errors import InputError, ModelError, listing
from cellvim.models.config import EncoderConfig

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")  # keys that hold the weights, best first
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "network.")
_BESIDE_A_MODEL = re.compile(r"(criterion|loss|train_|val_|test_|metric|mixup|teacher)")
_FORMAT = "cellvim-encoder-1"


def load_reference(model: nn.Module, source: Mapping[str, Any] | str | Path, *, use_ema: bool = True) -> nn.Module:
    """Load weights of the published FastVim, Vim, ChannelVim, FastChannelVim and MAE models, strictly.

    Parameters
    ----------
    model
        An `Encoder` or `MaskedAutoencoder` of the same architecture.
    source
        A state dict, or the path of a ``.ckpt``, ``.pth``, ``.pt`` or ``.safetensors`` file. Lightning and timm
        layouts are understood: weights under ``state_dict`` or ``model``, exponential averages under ``model_ema`` or
        ``state_dict_ema``, prefixes such as ``model.`` and ``module.``.
    use_ema
        Take the exponentially averaged weights where the file has both.

    Returns
    -------
    The model, with the weights loaded and marked as trained.

    Raises
    ------
    ModelError
        The file is no checkpoint, would run code, or entries are unknown, missing or of another shape; all are named
        and nothing is loaded.
    """
    if not isinstance(source, (Mapping, str, Path)):
        raise ModelError(f"load_reference was given a {type(source).__name__}; expected a state dict or a path.")
    if not isinstance(source, Mapping):
        source = read_weights(source)
    weights = _strip_prefixes(_unwrap(source, use_ema), set(model.state_dict()))
    load_strictly(model, weights)
    model.is_trained = True
    return model


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into the model, or raise a `ModelError` that names what does not fit and change nothing."""
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    weights = dict(weights)
    optional = {k for k in own if k.endswith("_extra_state")}
    problems = []
    if unknown := sorted(set(weights) - set(own)):
        problems.append(f"{len(unknown)} unknown ({listing(unknown, 6)})")
    if missing := sorted(set(own) - set(weights) - optional):
        problems.append(f"{len(missing)} missing ({listing(missing, 6)})")
    misshapen = [
        f"{k} is {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in weights and k not in optional and weights[k].shape != own[k].shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape ({listing(misshapen, 6)})")
    if problems:
        raise ModelError(f"The weights do not fit the model: {'; '.join(problems)}. Check the configuration.")
    weights.update({k: own[k] for k in optional - set(weights)})
    model.load_state_dict(weights)


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running any code that it may hold.

    Raises
    ------
    ModelError
        There is no such file, it is damaged, or it holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}; expected .ckpt, .pth, .pt or .safetensors.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    try:
        with torch.serialization.safe_globals(_inert_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, by what is wrong with the file
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {named[1]} objects" if named else "it is damaged or no checkpoint"
        raise ModelError(
            f"{path} cannot be read as plain weights: {reason}. CellVim never runs code from a weights file; save its "
            "state dict alone and load that."
        ) from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds a {type(content).__name__}; expected a dictionary of weights.")
    return dict(content)


def _inert_types() -> list:
    """Types that published checkpoints carry beside weights and that run nothing when they are read."""
    import argparse
    import pathlib

    import numpy as np

    dtypes = [type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")]
    return [argparse.Namespace, pathlib.PosixPath, np.dtype, np._core.multiarray.scalar, *dtypes]


def save_checkpoint(model: nn.Module, path: str | Path, *, card: Mapping[str, Any] | None = None) -> Path:
    """Write the model's weights and configuration to one safetensors file.

    Parameters
    ----------
    model
        An `Encoder` or `MaskedAutoencoder`.
    path
        The file, ending in ``.safetensors``.
    card
        What else travels with the weights: data, licence, figures, class names, preprocessing (JSON-able).

    Returns
    -------
    The path.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"The checkpoint {path} must end in .safetensors.")
    header = {
        "format": _FORMAT,
        "model": type(model).__name__,
        "config": json.dumps(model.config.to_dict()),
        "options": json.dumps(model.checkpoint_options()),
        "is_trained": json.dumps(bool(model.is_trained)),
        "card": json.dumps(dict(card or {})),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    readers = partial.stat().st_mode  # safetensors lets nobody else read what it writes
    save_file(tensors, partial, header)
    partial.chmod(readers)
    partial.replace(path)
    return path


def load_checkpoint(path: str | Path):
    """Load what `save_checkpoint` wrote, or a folder with ``model.safetensors``, in evaluation mode.

    Returns
    -------
    `Encoder` or `MaskedAutoencoder`, whichever was saved.

    Raises
    ------
    ModelError
        There is no such file, or it is not a CellVim checkpoint.
    """
    from cellvim.models.encoder import Encoder
    from cellvim.models.mae import MaskedAutoencoder

    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ModelError(f"There is no checkpoint {path}; expected a CellVim .safetensors file.")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path} is no CellVim checkpoint (.safetensors); published .ckpt and .pth weights are loaded with "
            "cellvim.load_reference(model, path)."
        )
    weights, header = _read_safetensors(path)
    if header.get("format") != _FORMAT:
        raise ModelError(
            f"{path} is no CellVim checkpoint: its header has no configuration. Load bare weights with "
            "cellvim.load_reference(model, path)."
        )
    config = EncoderConfig.from_dict(json.loads(header["config"]))
    if header["model"] == "MaskedAutoencoder":
        model = MaskedAutoencoder(config, **json.loads(header["options"]))
    else:
        model = Encoder(config)
    load_strictly(model, weights)
    model.is_trained = json.loads(header["is_trained"])
    model.card = json.loads(header["card"])
    return model.eval()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {k: file.get_tensor(k) for k in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); copy or download it again.") from error


def _unwrap(content: Mapping[str, Any], use_ema: bool) -> dict[str, Tensor]:
    """Find the tensors in a checkpoint's nesting."""
    for _ in range(4):
        keys = [k for k in _WRAPPERS if isinstance(content.get(k), Mapping)]
        keys = [k for k in keys if use_ema or "ema" not in k] or keys
        if not keys:
            break
        content = content[keys[0]]
    weights = {k: torch.as_tensor(v) for k, v in content.items() if isinstance(v, (Tensor, np.ndarray))}
    if not weights:
        raise ModelError(f"Found no weights in the checkpoint; it has {listing(map(str, content))}.")
    return _choose_ema(weights, use_ema)


def _choose_ema(weights: dict[str, Tensor], use_ema: bool) -> dict[str, Tensor]:
    """Split a Lightning state dict that holds a model and its average (``model.…`` beside ``model_ema.…``)."""
    pattern = re.compile(r"^(model_ema|ema_model|ema)\.(module\.)?")
    average = {pattern.sub("", k): v for k, v in weights.items() if pattern.match(k)}
    if not average:
        return weights
    return average if use_ema else {k: v for k, v in weights.items() if not pattern.match(k)}


def _strip_prefixes(weights: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Take off the prefixes of the model's names; losses and metrics that Lightning saves beside it are left out."""
    while not set(weights) & own:
        beside = {k for k in weights if _BESIDE_A_MODEL.match(k)}
        shared = next((p for p in _PREFIXES if all(k.startswith(p) for k in weights if k not in beside)), None)
        if shared is None or len(beside) == len(weights):
            # Not all names share a prefix: those that do not will be named as unknown.
            shared = next((p for p in _PREFIXES if any(k.removeprefix(p) in own for k in weights)), None)
            return {k.removeprefix(shared): v for k, v in weights.items()} if shared else weights
        weights = {k.removeprefix(shared): v for k, v in weights.items() if k not in beside}
    return weights
