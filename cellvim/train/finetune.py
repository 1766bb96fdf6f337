"""Starting from weights: of the same model, or of a masked pre-training; channels are matched by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cellvim.channels import match_channels
from cellvim.errors import ChannelError, ModelError, listing
from cellvim.models.checkpoints import load_strictly
from cellvim.models.encoder import Encoder, resize_positions
from cellvim.models.mae import MaskedAutoencoder
from cellvim.models.registry import load_checkpoint


def start_from(model: Encoder, path: str | Path) -> None:
    """Load a checkpoint's weights into a model of the same architecture; a new head keeps its random weights.

    Parameters
    ----------
    model
        An `Encoder` or `MaskedAutoencoder`; unchanged when the weights do not fit.
    path
        A CellVim checkpoint, or the name of one that comes along: of an `Encoder`, whose head is taken over if the
        class names agree in number, or of a `MaskedAutoencoder`, whose decoder is left out for an `Encoder` and whose
        position table is resized.

    Raises
    ------
    ModelError
        There is no such checkpoint, or its architecture is another one; what differs is named.
    ChannelError
        The model has a channel that the checkpoint does not know.
    """
    path = weights_path(path)
    source = load_checkpoint(path)
    own = model.state_dict()
    differ = _differences(source, model)
    if differ:
        raise ModelError(f"{path} is of another architecture: {'; '.join(differ)}. Give the model those values.")
    if isinstance(source, MaskedAutoencoder) and not isinstance(model, MaskedAutoencoder):
        source = source.to_encoder(image_size=model.config.image_size, num_classes=0)
    weights = {k: v for k, v in source.state_dict().items() if not k.endswith("_extra_state")}
    weights = _same_channels(weights, source, model, str(path))
    if "pos_embed" in weights and weights["pos_embed"].shape != own["pos_embed"].shape:
        weights["pos_embed"] = _resized(weights["pos_embed"], source, model)
    head = {k: v for k, v in own.items() if k.startswith("head.")}
    if {k: v.shape for k, v in weights.items() if k.startswith("head.")} != {k: v.shape for k, v in head.items()}:
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")} | head
    load_strictly(model, weights)


def weights_path(weights: str | Path) -> Path:
    """Return the file of weights to start from: a path, or the name of a model that comes with CellVim.

    Raises
    ------
    ModelError
        There is none.
    """
    from cellvim.models.checkpoints import shipped_models

    if not str(weights):
        raise ModelError("This training begins with weights, and none were given: --model.weights model.safetensors.")
    path = shipped_models().get(str(weights), Path(weights))
    if not path.exists():
        raise ModelError(
            f"There are no weights {path}; expected a CellVim .safetensors file, or one of {listing(shipped_models())}."
        )
    return path


_MAY_DIFFER = {  # what does not change the shape or the meaning of the weights
    "image_size", "in_channels", "num_classes", "channel_names", "pool_scale", "drop_path_rate", "readout",
    "channel_sampling", "sample_channels_per_image", "initialization", "masked_pool",
}  # fmt: skip


def _differences(source: Encoder, model: Encoder) -> list[str]:
    there, here = source.config.to_dict(), model.config.to_dict()
    differ = [
        f"{name} is {there[name]!r} there and {value!r} here"
        for name, value in here.items()
        if name not in _MAY_DIFFER and there[name] != value
    ]
    if isinstance(model, MaskedAutoencoder) and not isinstance(source, MaskedAutoencoder):
        differ.append("it is an Encoder there and a MaskedAutoencoder here")
    return differ


def _same_channels(weights: dict[str, Tensor], source: Encoder, model: Encoder, where: str) -> dict[str, Tensor]:
    """Put the weights of channels into the model's order, by name."""
    there, here = source.config.channel_names, model.config.channel_names
    if there is None or here is None:
        return weights
    ids = match_channels(here, there, where=where)
    if source.config.tokens == "joint":
        if sorted(ids) != list(range(len(there))):
            raise ChannelError(f"{where} needs all of its channels {', '.join(there)}; here are {', '.join(here)}.")
        return weights | {"patch_embed.proj.weight": weights["patch_embed.proj.weight"][:, ids]}
    names = ("patch_embed.channel_embed.weight", "decoder_channel_embed.weight")
    return weights | {name: weights[name][ids] for name in names if name in weights}


@torch.no_grad()
def _resized(table: Tensor, source: Encoder, model: Encoder) -> Tensor:
    """The position table of a model built for another image size, class token kept."""
    if source.config.class_token != "none":
        raise ModelError(
            f"The position table is of {source.config.image_size} pixels, the model of {model.config.image_size}; with "
            "a class token it cannot be resized. Train at the same size."
        )
    grid = table.unflatten(1, source.built_grid)
    return resize_positions(grid, *model.built_grid).flatten(1, 2)
