"""Models by name or file: `create_model` and `load_checkpoint`, and the configurations of the named architectures.

References
----------
Sizes: Kapse et al., Fast Vision Mamba (2025), Table 25; ViT: Dosovitskiy et al. (2021), Table 1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cellvim.errors import ModelError, listing, suggestion
from cellvim.models.checkpoints import read_checkpoint, shipped_models
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder

_SIZES = {  # depth and D of Mamba models; depth, D and heads of transformers
    "tiny": {"mamba": (24, 192), "attention": (12, 192, 3)},
    "small": {"mamba": (24, 384), "attention": (12, 384, 6)},
    "base": {"mamba": (24, 768), "attention": (12, 768, 12)},
    "large": {"mamba": (48, 1024), "attention": (24, 1024, 16)},
    "huge": {"mamba": (64, 1280), "attention": (32, 1280, 16)},
}
_IMAGENET = {"tokens": "joint", "in_channels": 3, "num_classes": 1000}
_JUMP_CP = {"tokens": "per_channel", "in_channels": 8, "num_classes": 161}
_UNPOOLED = {"pool": "none", "alternate": False}

FAMILIES: dict[str, dict[str, Any]] = {
    "fastvim": _IMAGENET,
    "vim": _IMAGENET | _UNPOOLED | {"class_token": "middle"},
    "fastmaskvim": _IMAGENET | {"num_classes": 0},
    "vit": _IMAGENET | _UNPOOLED | {"mixer": "attention", "class_token": "first"},
    "fastchannelvim": _JUMP_CP,
    "channelvim": _JUMP_CP | _UNPOOLED | {"class_token": "middle"},
    "fastchannelmaskvim": _JUMP_CP,
    "channelvit": _JUMP_CP | _UNPOOLED | {"mixer": "attention", "class_token": "first"},
}
DESCRIPTIONS = {
    "fastvim": "pooled scan, one token per patch",
    "vim": "Vision Mamba, scans every token (baseline)",
    "fastmaskvim": "FastVim for missing tokens: masked pre-training, irregular grids",
    "vit": "vision transformer (baseline)",
    "fastchannelvim": "pooled scan, one token per patch and channel",
    "channelvim": "Vision Mamba per patch and channel (baseline)",
    "fastchannelmaskvim": "FastChannelVim for missing tokens and channels: joint supervised and masked training",
    "channelvit": "transformer per patch and channel (baseline)",
}
_NAME = re.compile(r"(?P<family>[a-z]+)_(?P<size>[a-z]+)_patch(?P<patch>\d+)")


def list_models() -> list[str]:
    """Return the names of the architectures that `create_model` makes; other patch sizes work as well."""
    return [f"{family}_{size}_patch{patch}" for family in FAMILIES for size in _SIZES for patch in (16, 8)]


def model_config(name: str, **changes: Any) -> EncoderConfig:
    """Return the configuration of a named architecture, with some values changed.

    Raises
    ------
    ModelError
        The name or a value is unknown.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if not match or match["family"] not in FAMILIES or match["size"] not in _SIZES:
        known = [*list_models(), *shipped_models()]
        raise ModelError(
            f"Model {name!r} is unknown. Names are FAMILY_SIZE_patchN, with the families {', '.join(FAMILIES)} and the "
            f"sizes {', '.join(_SIZES)}, or a trained model: {listing(shipped_models())}."
            f"{suggestion(str(name), known)} `cellvim models` lists them."
        )
    family = FAMILIES[match["family"]]
    size = zip(("depth", "embed_dim", "num_heads"), _SIZES[match["size"]][family.get("mixer", "mamba")], strict=False)
    if changes.get("channel_names") is not None:
        changes.setdefault("in_channels", len(changes["channel_names"]))
    return EncoderConfig(patch_size=int(match["patch"]), **family, **dict(size)).replace(**changes)


def create_model(name: str, **changes: Any) -> Encoder:
    """Create a model with random weights, or load a trained model that comes with CellVim.

    Parameters
    ----------
    name
        Architecture such as ``fastchannelvim_small_patch16`` (see `list_models`), or the name of a trained model
        (``cellvim models`` lists both).
    **changes
        Values of `EncoderConfig` that differ from those of the architecture. The values of a trained model are fixed.

    Returns
    -------
    Encoder
        With random weights and in training mode, as usual for PyTorch modules: call ``.eval()`` before embedding.
        A trained model has its weights and is in evaluation mode.

    Raises
    ------
    ModelError
        The name or a value is unknown, values contradict each other, or a value contradicts a trained model's.

    Examples
    --------
    >>> model = create_model("fastchannelvim_tiny_patch16", image_size=64, channel_names=("DNA", "GFP"), num_classes=0)
    >>> create_model("fastvim_mitocheck").is_trained
    True
    """
    trained = shipped_models().get(str(name))
    if trained is None:
        return Encoder(model_config(name, **changes))
    model = load_checkpoint(trained)
    model.config.check_names(changes)
    for change, value in changes.items():
        fixed = getattr(model.config, change)
        if (tuple(value) if isinstance(value, list) else value) != fixed:
            raise ModelError(
                f"{change}={value!r} contradicts the trained model {name!r}, which has {change}={fixed!r}. "
                f"Omit {change}, or choose an architecture with random weights."
            )
    return model


def load_checkpoint(path: str | Path) -> Encoder:
    """Load a model saved by `save_checkpoint`, or ``model.safetensors`` in a folder, in evaluation mode.

    Returns
    -------
    `Encoder` or `MaskedAutoencoder`, whichever was saved.

    Raises
    ------
    ModelError
        The file does not exist, or is not a CellVim checkpoint.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.model == "MaskedAutoencoder":
        from cellvim.models.mae import MaskedAutoencoder

        return checkpoint.build(MaskedAutoencoder)
    return checkpoint.build(Encoder)
