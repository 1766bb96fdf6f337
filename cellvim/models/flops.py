"""Numbers of parameters, and of operations of a forward pass as counted in the paper.

A multiply-add of a matrix product or convolution counts as one operation, as in the ViT and Vim papers. The selective
scan counts 9 operations per step, inner dimension and state, as in the Mamba literature. This reproduces the paper's
1.17 / 4.43 / 17.23 G for FastVim T / S / B at 224² within 3 %.

References
----------
Kapse et al., Fast Vision Mamba (2025), Table 1 and Fig. 4.
"""

from __future__ import annotations

import torch

from cellvim.errors import InputError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.models.grid import TokenGrid

_SCAN = 9  # exponential, products and sums of one state in one step


def count_parameters(config: EncoderConfig) -> int:
    """Return the number of parameters of a model, from two shallow models without memory."""
    with torch.device("meta"):
        one, two = (
            sum(p.numel() for p in Encoder(config.replace(depth=depth, out_indices=())).parameters())
            for depth in (1, 2)
        )
    return one + (config.depth - 1) * (two - one)


def count_flops(
    config: EncoderConfig, height: int | None = None, width: int | None = None, channels: int | None = None
) -> dict[str, float]:
    """Return the number of operations of one image's forward pass, by part.

    Parameters
    ----------
    config
        Configuration of the model.
    height, width
        Image size in pixels; None for the model's.
    channels
        Number of channels of the image, for per-channel tokens; None for all.

    Returns
    -------
    dict
        Operations of ``patch_embed``, ``projections`` (in and out, or query to MLP), ``conv``, ``delta`` (Δ, B and C),
        ``scan`` or ``attention``, ``elementwise`` (norms, skip, gate, pooling), ``head``, and their ``total``.

    Raises
    ------
    InputError
        A size is smaller than 1 pixel, or the model does not have that many channels.
    """
    height = config.image_height if height is None else height
    width = config.image_width if width is None else width
    if min(height, width) < 1 or not (channels is None or 1 <= channels <= config.in_channels):
        raise InputError(
            f"Cannot count the operations of {height} x {width} pixels and {channels} channels; expected at least "
            f"1 x 1 pixel and 1 to {config.in_channels} channels."
        )
    rows, columns = config.grid_size(height, width)
    per_channel = config.tokens == "per_channel"
    count = (channels or config.in_channels) if per_channel else 1
    grid = TokenGrid(config, rows, columns, count)
    D, E = config.embed_dim, config.inner_dim
    length = grid.count + (config.class_token != "none")  # L
    steps = [grid.plan(i).slots + (config.class_token != "none") for i in range(config.depth)]  # P of each block

    parts = dict.fromkeys(("patch_embed", "projections", "conv", "delta", "scan", "attention", "elementwise"), 0.0)
    parts["patch_embed"] = grid.count * config.patch_size**2 * (1 if per_channel else config.in_channels) * D
    if config.mixer == "attention":
        parts["projections"] = sum(4 * D * D * P + 2 * length * D * int(config.mlp_ratio * D) for P in steps)
        parts["attention"] = sum(2 * P * P * D for P in steps)
    else:
        parts["projections"] = config.depth * length * (D * 2 * E + E * D)
        parts["conv"] = config.depth * 2 * length * E * config.d_conv
        parts["delta"] = sum(2 * P * E * (2 * config.delta_rank + 2 * config.d_state) for P in steps)
        parts["scan"] = sum(2 * P * E * config.d_state * _SCAN for P in steps)
        parts["elementwise"] = config.depth * length * E * 3  # the skip of two directions and the gate
    parts["head"] = D * config.num_classes * (length if config.readout == "max" else 1)
    return parts | {"total": sum(parts.values())}
