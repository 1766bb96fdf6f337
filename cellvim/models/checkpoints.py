"""Files of weights: CellVim's checkpoints, the trained models that come with the package, and published weights.

A checkpoint is a safetensors file whose header contains the model's class, configuration and card.
`cellvim.models.registry.load_checkpoint` builds the model from it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cellvim.errors import InputError, ModelError, listing, suggestion
from cellvim.files import atomic_path
from cellvim.models.config import EncoderConfig

try:
    from huggingface_hub import PyTorchModelHubMixin as _HubMixin
except ImportError:  # without the extra cellvim[hub]; local folders work nevertheless

    class _HubMixin:
        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **_):
            """Load a checkpoint from a local folder."""
            return cls._from_pretrained(model_id=str(pretrained_model_name_or_path))

        def save_pretrained(self, save_directory: str | Path, **_) -> None:
            """Write ``model.safetensors`` to a local folder."""
            self._save_pretrained(Path(save_directory))


Model = TypeVar("Model", bound=nn.Module)

_FILE = "model.safetensors"  # name within a folder or a hub repository
_FORMAT = "cellvim-encoder-1"
_SHIPPED = Path(__file__).parents[1] / "checkpoints"
_HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_MIXIN_OPTIONS = ("config", "proxies", "resume_download", "map_location", "strict")  # added by the hub's mixin; unused
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")  # keys that hold the weights, best first
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "network.")
_AVERAGE = re.compile(r"^(model_ema|ema_model|ema)\.(module\.)?")
_BESIDE_A_MODEL = re.compile(r"(criterion|loss|train_|val_|test_|metric|mixup|teacher)")


def shipped_models() -> dict[str, Path]:
    """Return the names and files of the trained models that come with CellVim."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.safetensors"))}


def model_card(name: str) -> str:
    """Return the card of a shipped model as Markdown: data, licence, results and limitations.

    Raises
    ------
    ModelError
        No shipped model has this name.
    """
    known = shipped_models()
    if name not in known:
        raise ModelError(
            f"No trained model {name!r} comes with CellVim; available: {listing(known)}.{suggestion(name, known)}"
        )
    return known[name].with_suffix(".md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint."""

    model: str  # name of the class, "Encoder" or "MaskedAutoencoder"
    config: EncoderConfig
    options: dict[str, Any]  # further arguments of the class
    is_trained: bool
    card: dict[str, Any]  # JSON-able metadata: data, licence, results, class names, preprocessing
    weights: dict[str, Tensor]

    def build(self, model_class: type[Model]) -> Model:
        """Return the model, with its weights and in evaluation mode."""
        model = model_class(self.config, **self.options)
        load_strictly(model, self.weights)
        model.is_trained, model.card = self.is_trained, self.card
        return model.eval()


class Pretrained(_HubMixin):
    """``from_pretrained`` and ``save_pretrained``: a checkpoint in a local folder or a Hugging Face repository."""

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(self, save_directory / _FILE, card=getattr(self, "card", None))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options):
        if unknown := sorted(set(options) - {*_HUB_OPTIONS, *_MIXIN_OPTIONS}):
            raise ModelError(
                f"from_pretrained does not accept {', '.join(unknown)}: the configuration is stored in the checkpoint."
            )
        file = Path(model_id) / _FILE
        if not file.is_file():
            file = _download(model_id, {k: v for k, v in options.items() if k in _HUB_OPTIONS})
        checkpoint = read_checkpoint(file)
        if checkpoint.model != cls.__name__:
            raise ModelError(
                f"{model_id} contains a {checkpoint.model}, not a {cls.__name__}. Load it with "
                f"{checkpoint.model}.from_pretrained or cellvim.load_checkpoint."
            )
        return checkpoint.build(cls)


def _download(model_id: str, options: dict[str, Any]) -> Path:
    """Download a checkpoint from the Hugging Face hub and return its path."""
    if Path(model_id).is_dir():
        raise ModelError(f"The folder {model_id} has no {_FILE}.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ModelError(
            f"{model_id} is not a local folder, and loading from the hub needs: pip install 'cellvim[hub]'."
        ) from error
    try:
        return Path(hf_hub_download(model_id, _FILE, **options))
    except Exception as error:  # many types: no network, no repository, no access
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{model_id} is not a local folder and cannot be loaded from the hub: {reason}") from error


def save_checkpoint(model: nn.Module, path: str | Path, *, card: Mapping[str, Any] | None = None) -> Path:
    """Write the model's weights and configuration to one safetensors file, atomically.

    Parameters
    ----------
    model
        An `Encoder` or `MaskedAutoencoder`.
    path
        Output file, ending in ``.safetensors``.
    card
        JSON-able metadata to store: data, licence, results, class names, preprocessing.

    Returns
    -------
    The path.

    Raises
    ------
    InputError
        The path does not end in ``.safetensors``.
    OutputError
        The file cannot be written.
    """
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
    with atomic_path(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors makes the file readable by the owner only
        save_file(tensors, partial, header)
        partial.chmod(mode)
    return path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file written by `save_checkpoint`, or ``model.safetensors`` in a folder.

    Raises
    ------
    ModelError
        The file does not exist, or is not a CellVim checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        path = path / _FILE
    if not path.is_file():
        raise ModelError(f"The checkpoint {path} does not exist; expected a CellVim .safetensors file.")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path} is not a CellVim checkpoint (.safetensors). Load published .ckpt and .pth weights with "
            "cellvim.load_reference(model, path)."
        )
    weights, header = _read_safetensors(path)
    if header.get("format") != _FORMAT:
        raise ModelError(
            f"{path} is not a CellVim checkpoint: its header contains no configuration. Load bare weights with "
            "cellvim.load_reference(model, path)."
        )
    config, options, is_trained, card = (json.loads(header[k]) for k in ("config", "options", "is_trained", "card"))
    return Checkpoint(header["model"], EncoderConfig.from_dict(config), options, is_trained, card, weights)


def load_reference(model: Model, source: Mapping[str, Any] | str | Path, *, use_ema: bool = True) -> Model:
    """Load published weights of FastVim, Vim, ChannelVim, FastChannelVim and MAE models, strictly.

    Parameters
    ----------
    model
        An `Encoder` or `MaskedAutoencoder` of the same architecture.
    source
        A state dict, or the path of a ``.ckpt``, ``.pth``, ``.pt`` or ``.safetensors`` file. Lightning and timm
        layouts are recognised: weights under ``state_dict`` or ``model``, exponential moving averages under
        ``model_ema`` or ``state_dict_ema``, prefixes such as ``model.`` and ``module.``.
    use_ema
        Whether to load the exponential moving average if the file contains one.

    Returns
    -------
    The model, with the weights loaded and marked as trained.

    Raises
    ------
    ModelError
        The file is not a checkpoint or would run code, or entries are unknown, missing or have another shape. The
        message names the entries, and nothing is loaded.
    """
    if not isinstance(source, (Mapping, str, Path)):
        raise ModelError(f"load_reference got a {type(source).__name__}; expected a state dict or a path.")
    if not isinstance(source, Mapping):
        source = _read_weights(Path(source))
    weights = _strip_prefixes(_unwrap(source, use_ema), set(model.state_dict()))
    load_strictly(model, weights)
    model.is_trained = True
    return model


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into the model.

    Raises
    ------
    ModelError
        Entries are unknown, missing or have another shape. The model is unchanged.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    weights = dict(weights)
    optional = {k for k in own if k.endswith("_extra_state")}
    misshapen = [
        f"{k} is {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in weights and k not in optional and weights[k].shape != own[k].shape
    ]
    problems = {
        "unknown": sorted(set(weights) - set(own)),
        "missing": sorted(set(own) - set(weights) - optional),
        "of another shape": misshapen,
    }
    if found := [f"{len(names)} {kind} ({listing(names, 6)})" for kind, names in problems.items() if names]:
        raise ModelError(f"The weights do not fit the model: {'; '.join(found)}. Check the configuration.")
    weights.update({k: own[k] for k in optional - set(weights)})
    model.load_state_dict(weights)


def _read_weights(path: Path) -> dict[str, Any]:
    """Read a weights file without running any code that it may contain."""
    if not path.is_file():
        raise ModelError(f"The weights file {path} does not exist; expected .ckpt, .pth, .pt or .safetensors.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    # Published checkpoints contain these types beside the weights; reading them runs no code.
    dtypes = [type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")]
    harmless = [argparse.Namespace, pathlib.PosixPath, np.dtype, np._core.multiarray.scalar, *dtypes]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many types, depending on the defect of the file
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it contains {named[1]} objects" if named else "it is damaged or not a checkpoint"
        raise ModelError(
            f"{path} cannot be read as plain weights: {reason}. CellVim never runs code from a weights file; save only "
            "the state dict and load that."
        ) from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} contains a {type(content).__name__}; expected a dictionary of weights.")
    return dict(content)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in list(file.keys())}, file.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"{path} is not a complete safetensors file ({error}); copy or download it again.") from error


def _unwrap(content: Mapping[str, Any], use_ema: bool) -> dict[str, Tensor]:
    """Return the tensors of a possibly nested checkpoint."""
    for _ in range(4):
        keys = [k for k in _WRAPPERS if isinstance(content.get(k), Mapping)]
        keys = [k for k in keys if use_ema or "ema" not in k] or keys
        if not keys:
            break
        content = content[keys[0]]
    weights = {k: torch.as_tensor(v) for k, v in content.items() if isinstance(v, (Tensor, np.ndarray))}
    if not weights:
        raise ModelError(f"The checkpoint contains no weights, only {listing(map(str, content))}.")
    # A Lightning state dict may contain both the model and its average (``model.…`` and ``model_ema.…``).
    average = {_AVERAGE.sub("", k): v for k, v in weights.items() if _AVERAGE.match(k)}
    return average if average and use_ema else {k: v for k, v in weights.items() if not _AVERAGE.match(k)}


def _strip_prefixes(weights: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Remove prefixes from the names of weights, and entries of losses and metrics that Lightning saves with them."""
    while not set(weights) & own:
        beside = {k for k in weights if _BESIDE_A_MODEL.match(k)}
        shared = next((p for p in _PREFIXES if all(k.startswith(p) for k in weights if k not in beside)), None)
        if shared is None or len(beside) == len(weights):
            # Not all names share a prefix; the others will be reported as unknown.
            shared = next((p for p in _PREFIXES if any(k.removeprefix(p) in own for k in weights)), None)
            return {k.removeprefix(shared): v for k, v in weights.items()} if shared else weights
        weights = {k.removeprefix(shared): v for k, v in weights.items() if k not in beside}
    return weights
