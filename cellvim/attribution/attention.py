"""Weights of attention pooling: the share of each token among the tokens pooled together, for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cellvim.attribution.tokens import check_inputs, in_evaluation
from cellvim.errors import ModelError

if TYPE_CHECKING:
    from cellvim.models.encoder import Encoder
    from cellvim.models.grid import TokenGrid
    from cellvim.models.patch_embed import Channels

_IMAGE_AXES = ("channel", "row", "column")


@dataclass(frozen=True, eq=False)
class AttentionScores:
    """The weights of attention pooling.

    Attributes
    ----------
    shares
        (depth, 2, B, C, rows, columns) float32, for each block and direction (forward, backward). They sum to 1 over
        the pooled axes of the block. C is 1 for joint tokens, which represent all channels.
    pooled
        For each block, the axes pooled together, of "channel", "row" and "column".
    patch_px
        Distance between patches in pixels of the input.
    """

    shares: np.ndarray
    pooled: tuple[tuple[str, ...], ...]
    patch_px: int

    @property
    def patches(self) -> np.ndarray:
        """(B, C, rows, columns): share relative to an equal share, averaged over blocks and directions."""
        sizes = dict(zip(_IMAGE_AXES, self.shares.shape[3:], strict=True))
        group = np.array([np.prod([sizes[axis] for axis in axes]) for axes in self.pooled])
        return (self.shares.mean(1) * group[:, None, None, None, None]).mean(0)

    @property
    def compares_channels(self) -> bool:
        """Whether any block compares channels (``pool_axes=2``)."""
        return any("channel" in axes for axes in self.pooled)


def attention_scores(model: Encoder, images: Tensor | np.ndarray, *, channels: Channels = None) -> AttentionScores:
    """Return the pooling weights of the tokens of a model with ``pool="attention"``.

    Parameters
    ----------
    model
        An `Encoder` with ``pool="attention"``.
    images
        (B, C, H, W), normalised as for the model.
    channels
        Ids or names of the channels, as for `Encoder.forward`.

    Raises
    ------
    ModelError
        The model has another kind of pooling.
    InputError, ChannelError
        The images or channels do not fit the model.

    References
    ----------
    Kapse et al., Fast Vision Mamba (2025), Table 20 (attention pooling).
    """
    inputs = check_inputs(model, images, channels, None)
    if model.config.pool != "attention":
        raise ModelError(
            f"The model pools by '{model.config.pool}', which has no scores; expected pool='attention'. Gradients and "
            "occlusion apply to any model."
        )
    with in_evaluation(model), torch.no_grad():
        hidden, grid = model.embed(inputs.images, channels=channels)
        residual, shares = None, []
        for i, block in enumerate(model.layers):
            plan = grid.plan(i)
            normed, _ = block.norm(hidden, residual)
            shares.append(_as_image(block.mixer.pooling_shares(normed, plan), grid, model.config.scan_path))
            hidden, residual = block(hidden, residual, plan)
    names = {"row": "column", "column": "row"} if model.config.scan_path == "colwise" else {}
    pooled_axes = [{names.get(axis, axis) for axis in grid.pooled_axes(i)} for i in range(len(shares))]
    pooled = tuple(tuple(axis for axis in _IMAGE_AXES if axis in axes) for axes in pooled_axes)
    return AttentionScores(torch.stack(shares).float().cpu().numpy(), pooled, model.config.stride)


def _as_image(shares: Tensor, grid: TokenGrid, scan_path: str) -> Tensor:
    """(2, B, L) in stored order -> (2, B, C, rows, columns)."""
    if grid.class_position is not None:  # a group of its own, with a share of 1
        place = grid.class_position
        shares = torch.cat([shares[..., :place], shares[..., place + 1 :]], dim=-1)
    maps = shares.unflatten(2, [grid.sizes[axis] for axis in grid.axes])
    maps = maps.permute(0, 1, *(2 + grid.axes.index(axis) for axis in _IMAGE_AXES))
    return maps.transpose(3, 4) if scan_path == "colwise" else maps
