"""EncoderConfig: the options that distinguish the models of the family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, inf, isfinite
from typing import Any

from cellvim.errors import ModelError, suggestion


def _integer(value: Any, low: int, high: float = inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _tuple_of(kind: type, value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: v in choices), f"one of {', '.join(map(repr, choices))}"


def _alike(names: str, test: Callable[[Any], bool], expected: str) -> dict[str, tuple[Callable[[Any], bool], str]]:
    return dict.fromkeys(names.split(), (test, expected))


_CHECKS = {  # name -> (test, expected values)
    "tokens": _one_of("joint", "per_channel"),
    "mixer": _one_of("mamba", "attention"),
    "scan_order": _one_of("channel_first", "spatial_first"),
    "scan_path": _one_of("rowwise", "colwise"),
    "pool": _one_of("none", "mean", "max", "attention"),
    "pool_axes": _one_of(1, 2),
    "masked_pool": _one_of("sum", "mean"),
    "skip": _one_of("unpooled", "pooled"),
    "input_norm": _one_of("rms", "layer"),
    "ssm_norm": _one_of("layer", "rms", "none"),
    "class_token": _one_of("none", "first", "middle"),
    "readout": _one_of("mean", "max", "last", "tokens"),
    "channel_sampling": _one_of("sorted", "unsorted", "none"),
    "mask_reverse": _one_of("mirrored", "reference"),
    "initialization": _one_of("cellvim", "reference"),
    "image_size": (
        lambda v: _integer(v, 1) or (_tuple_of(int, v) and len(v) == 2 and min(v) >= 1),
        "a side in pixels, at least 1, or (height, width)",
    ),
    **_alike(
        "patch_size in_channels embed_dim depth d_state expand", lambda v: _integer(v, 1), "an integer of at least 1"
    ),
    **_alike(
        "patch_stride dt_rank num_heads", lambda v: v is None or _integer(v, 1), "None or an integer of at least 1"
    ),
    "num_classes": (lambda v: _integer(v, 0), "0 (no head) or more"),
    "channel_names": (lambda v: v is None or _tuple_of(str, v), "None or a tuple of names"),
    **_alike(
        "alternate position_embedding sample_channels_per_image projection_bias",
        lambda v: isinstance(v, bool),
        "True or False",
    ),
    **_alike("pool_scale mlp_ratio", lambda v: _number(v) and v > 0, "a number greater than 0"),
    "d_conv": (lambda v: _integer(v, 0, 4), "0 (no convolution) to 4 taps"),
    "layer_scale": (lambda v: v is None or _number(v), "None or a number"),
    "drop_path_rate": (lambda v: _number(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "out_indices": (
        lambda v: _tuple_of(int, v) and all(i >= 0 for i in v) and len(set(v)) == len(v),
        "a tuple of distinct block indices",
    ),
}


@dataclass(frozen=True)
class EncoderConfig:
    """Configuration of an `Encoder`; the defaults are those of FastChannelVim-S/16 trained on JUMP-CP.

    Parameters
    ----------
    image_size
        Height and width in pixels for which the position embedding is built; one number for a square.
    patch_size
        Side of a patch in pixels.
    patch_stride
        Distance between patches in pixels; None for ``patch_size`` (no overlap).
    in_channels
        Number of channels C of the model (rows of the channel embedding, or input channels of joint tokens).
    embed_dim, depth
        Token width D and number of blocks.
    num_classes
        Number of classes of the head; 0 for a model without a head, which returns features.
    channel_names
        Names of the C channels, by which callers can select them.
    tokens
        "per_channel": one token per patch and channel (FastChannelVim). "joint": one token per patch (FastVim).
    mixer
        "mamba": the bidirectional pooled state-space mixer; "attention": the ViT / ChannelViT baselines.
    scan_order
        Order of per-channel tokens: "channel_first" (H, W, C), channel fastest, or "spatial_first" (C, H, W).
    scan_path
        "rowwise", or "colwise" to transpose the patch grid and the position embedding.
    pool, pool_axes
        Pooling along the pooled axes before the scan (paper Table 20), and the number of pooled axes. 1: columns, and
        rows in every other block. 2: columns and channels, rows and channels, rows and columns in turn.
        With ``mixer="attention"``, ``pool="mean"`` applies attention to pooled tokens (paper Table 7).
    alternate
        Swap rows and columns in every other block.
    pool_scale
        Factor on mean pools: 1 − mask ratio when a masked pre-training is fine-tuned on complete images.
    masked_pool
        Pooling with missing tokens: "sum" of the kept tokens divided by the number of all, or their "mean" (paper
        Table 12).
    skip
        "unpooled": add D·u of every token after expanding. "pooled": add D·pool(u) before (paper Table 18).
    input_norm, ssm_norm
        Norm before the mixer, and after the scan.
    class_token
        Position of the class token in the sequence, whose output is then the feature: "none", "first" or "middle".
    position_embedding
        Whether to add a learned position embedding to the patches.
    readout
        Reduction of the tokens to one feature without a class token: "mean"; "max": apply the head to every token and
        take the largest logit; "last"; "tokens": no reduction.
    channel_sampling
        Hierarchical channel sampling in training: order of the drawn channels, or "none".
    sample_channels_per_image
        Draw different channels for every image of a batch. Their number is the same for the batch.
    d_state, d_conv, expand, dt_rank
        Number of states N; convolution taps W (0: no convolution, paper Table 7); E / D; rank of Δ, None for
        ceil(D / 16).
    projection_bias
        Whether the mixer's input and output projections have a bias.
    layer_scale
        Initial value of a learned factor on each mixer's output; None for no factor.
    drop_path_rate
        Drop-path rate of the last block, increasing linearly from 0.
    num_heads, mlp_ratio
        Number of heads and relative width of the MLP for ``mixer="attention"``; ``num_heads`` None for D / 64.
    mask_reverse
        Row labels of the backward direction with missing tokens: "mirrored", or "reference" (not mirrored) for the
        published MAE weights.
    initialization
        "cellvim", or "reference" for that of the published code, in which the bias of the backward Δ is 0.
    out_indices
        Blocks whose outputs are read by a dense-prediction head. Each has a LayerNorm, and there is no final norm.

    References
    ----------
    Kapse et al., Fast Vision Mamba (2025), §3, Tables 7, 12, 18, 20, 25.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    patch_stride: int | None = None
    in_channels: int = 8
    embed_dim: int = 384
    depth: int = 24
    num_classes: int = 161
    channel_names: tuple[str, ...] | None = None
    tokens: str = "per_channel"
    mixer: str = "mamba"
    scan_order: str = "channel_first"
    scan_path: str = "rowwise"
    pool: str = "mean"
    pool_axes: int = 1
    alternate: bool = True
    pool_scale: float = 1.0
    masked_pool: str = "sum"
    skip: str = "unpooled"
    input_norm: str = "rms"
    ssm_norm: str = "layer"
    class_token: str = "none"
    position_embedding: bool = True
    readout: str = "mean"
    channel_sampling: str = "sorted"
    sample_channels_per_image: bool = False
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    projection_bias: bool = False
    layer_scale: float | None = None
    drop_path_rate: float = 0.05
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    mask_reverse: str = "mirrored"
    initialization: str = "cellvim"
    out_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("image_size", "channel_names", "out_indices"):
            if isinstance(getattr(self, name), list):  # from JSON or YAML
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, (fits, expected) in _CHECKS.items():
            if not fits(getattr(self, name)):
                raise ModelError(f"{name} is {getattr(self, name)!r}; expected {expected}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.patch_stride is not None and self.patch_stride > self.patch_size:
            raise ModelError(f"patch_stride is {self.patch_stride}; expected at most the patch size {self.patch_size}.")
        if self.channel_names is not None and len(self.channel_names) != self.in_channels:
            raise ModelError(f"channel_names has {len(self.channel_names)} names; in_channels is {self.in_channels}.")
        if self.channel_names is not None and len(set(self.channel_names)) != len(self.channel_names):
            raise ModelError(f"channel_names repeats a name: {', '.join(self.channel_names)}.")
        if self.pool_axes == 2 and self.tokens == "joint":
            raise ModelError("pool_axes=2 needs tokens='per_channel'; the grid of joint tokens has only two axes.")
        if any(not 0 <= i < self.depth for i in self.out_indices):
            raise ModelError(f"out_indices is {self.out_indices}; expected blocks from 0 to {self.depth - 1}.")
        if self.mixer == "attention":
            if self.layer_scale is not None:
                raise ModelError("layer_scale needs mixer='mamba'; the attention block does not support it.")
            if self.embed_dim % self.heads:
                raise ModelError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.heads}.")
            if self.pool not in ("none", "mean"):
                raise ModelError(f"pool={self.pool!r} needs mixer='mamba'; attention pools with 'mean' or 'none'.")

    @property
    def image_height(self) -> int:
        """Height in pixels."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def image_width(self) -> int:
        """Width in pixels."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def stride(self) -> int:
        """Step between patches in pixels."""
        return self.patch_stride or self.patch_size

    @property
    def inner_dim(self) -> int:
        """E, the width inside the mixer."""
        return self.expand * self.embed_dim

    @property
    def delta_rank(self) -> int:
        """r, the rank of Δ's projection."""
        return self.dt_rank or ceil(self.embed_dim / 16)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.num_heads or max(1, self.embed_dim // 64)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image, which is padded to a multiple of the patch size."""
        rows, columns = (max(0, ceil((n - self.patch_size) / self.stride)) + 1 for n in (height, width))
        return rows, columns

    def replace(self, **changes: Any) -> EncoderConfig:
        """Return a copy with some values changed.

        Raises
        ------
        ModelError
            A name is unknown or a value is invalid.
        """
        self.check_names(changes)
        return replace(self, **changes)

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raise a `ModelError` if one of the names is not a value of the configuration."""
        known = [f.name for f in fields(cls)]
        for name in names:
            if name not in known:
                raise ModelError(f"EncoderConfig has no value {name!r}.{suggestion(name, known)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the values as types that JSON supports."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderConfig:
        """Return the configuration with these values; the inverse of `to_dict`."""
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ModelError(
                f"The configuration has unknown values {', '.join(unknown)}. It may need a newer version of CellVim."
            )
        return cls(**values)
