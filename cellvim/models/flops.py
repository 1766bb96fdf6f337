"""Size of a model: parameters, and operations of a forward pass as the paper counts them.

Operations: a multiply-add of a matrix product or convolution counts once, as in the ViT and Vim literature; the
selective scan counts 9 operations per step, inner dimension and state, as the Mamba literature does. Sums of those give
the paper's 1.17 / 4.43 / 17.23 G for FastVim T / S / B at 224², within 3 %.

References
----------
Kapse et al., Fast Vision Mamba (2025), Table 1 and Fig. 4.
"""

from __future__ import annotations

from cellvim.errors import InputError
from cellvim.models.config import EncoderConfig
from cellvim.models.grid import TokenGrid

_SCAN = 9  # exp, products and sums of one state in one step, as counted for Mamba


def count_parameters(config: EncoderConfig) -> int:
    """Count a model's parameters without making it: blocks are alike, so two small ones tell."""
    from torch import device

    from cellvim.models.encoder import Encoder

    with device("meta"):
        one, two = (
            sum(p.numel() for p in Encoder(config.replace(depth=depth, out_indices=())).parameters())
            for depth in (1, 2)
        )
    return one + (config.depth - 1) * (two - one)


def count_flops(
    config: EncoderConfig,
    height: int | None = None,
    width: int | None = None,
    channels: int | None = None,
) -> dict[str, float]:
    """Count the operations of one image's forward pass, by part.

    Parameters
    ----------
    config
        The model.
    height, width
        In pixels; None for the size the model is built for.
    channels
        How many channels the image has, for per-channel tokens; None for all.

    Returns
    -------
    dict
        Operations of ``patch_embed``, ``projections`` (in and out, or query to MLP), ``conv``, ``delta`` (Δ, B and C),
        ``scan`` or ``attention``, ``elementwise`` (norms, skip, gate, pooling), ``head``, and their ``total``.
    """
    height = config.image_height if height is None else height
    width = config.image_width if width is None else width
    if min(height, width) < 1 or not (channels is None or 1 <= channels <= config.in_channels):
        raise InputError(
            f"Cannot count for {height} x {width} pixels and {channels} channels; expected at least 1 pixel a side and "
            f"1 to {config.in_channels} channels."
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
