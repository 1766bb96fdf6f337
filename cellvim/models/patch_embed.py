"""Patch embedding (one token per patch, or per patch and channel), channel sampling, and checks of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cellvim.ops as ops
from cellvim.channels import match_channels
from cellvim.errors import ChannelError, InputError
from cellvim.models.config import EncoderConfig

Channels = Sequence[int | str] | Sequence[Sequence[int | str]] | Tensor | None


class PatchEmbed(nn.Module):
    """Project every patch to a token, and add the channel embedding to per-channel tokens.

    Per-channel tokens share one p×p projection (paper §3.4). The projection is a matrix product over unfolded patches,
    which yields the tokens in the model's order without another copy.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        p, stride = config.patch_size, config.stride
        if config.tokens == "per_channel":
            self.proj = nn.Conv3d(1, config.embed_dim, (1, p, p), (1, stride, stride))
            self.channel_embed = nn.Embedding(config.in_channels, config.embed_dim)
        else:
            self.proj = nn.Conv2d(config.in_channels, config.embed_dim, p, stride)

    def forward(self, images: Tensor, channels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the tokens as a grid.

        ``channels`` are ids (C,) or (B, C) for per-channel tokens, None for 0 … C − 1. Pixels of patches outside the
        ``mask`` (B, L) are ignored, even if NaN.

        Returns
        -------
        (B, rows, columns, D) for joint tokens, (B, rows, columns, C, D) channel-first, (B, C, rows, columns, D)
        spatial-first; rows and columns swapped for ``scan_path="colwise"``.
        """
        patches = self.patches(images)  # (B, C, rows, columns, p, p)
        if self.config.tokens == "joint":
            patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
        elif self.config.scan_order == "channel_first":
            patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(4)
        else:
            patches = patches.flatten(4)
        if mask is not None:
            patches = patches.masked_fill(~mask.view(patches.shape[:-1])[..., None], 0.0)
        tokens = ops.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return tokens if self.config.tokens == "joint" else tokens + self._channel_embedding(images, channels)

    def _channel_embedding(self, images: Tensor, channels: Tensor | None) -> Tensor:
        """Return the channel embeddings, broadcastable to the token grid."""
        if channels is None:
            channels = torch.arange(images.shape[1], device=images.device)
        if channels.ndim == 1:
            embedding = self.channel_embed(channels)[None, None, None]  # (1, 1, 1, C, D)
        else:
            embedding = self.channel_embed(channels.clamp_min(0))[:, None, None]  # (B, 1, 1, C, D)
        return embedding if self.config.scan_order == "channel_first" else embedding.permute(0, 3, 1, 2, 4)

    def patches(self, images: Tensor) -> Tensor:
        """Return the patches of images, (B, C, H, W) -> (B, C, rows, columns, p, p); a view without padding."""
        p, stride = self.config.patch_size, self.config.stride
        height, width = images.shape[-2:]
        rows, columns = self.config.grid_size(height, width)
        missing_rows = (rows - 1) * stride + p - height
        missing_columns = (columns - 1) * stride + p - width
        if missing_rows or missing_columns:
            images = F.pad(images, (0, missing_columns, 0, missing_rows))
        patches = images.unfold(2, p, stride).unfold(3, p, stride)
        return patches.transpose(2, 3) if self.config.scan_path == "colwise" else patches


class ChannelSampler:
    """Hierarchical channel sampling: draw the number of channels, then the channels, from a separate generator.

    The generator's state is stored in checkpoints, so that a resumed training draws the same channels as an
    uninterrupted one.

    References
    ----------
    Bao et al., Channel Vision Transformers (2024), §3.3; without rescaling, as in FastChannelVim, §3.4.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def seed(self, seed: int) -> None:
        """Reseed the generator."""
        self._generator.manual_seed(seed)

    def draw(self, count: int, *, ordered: bool, samples: int | None = None) -> Tensor:
        """Draw n uniformly from 1 … ``count``, then n of the ``count`` positions without replacement.

        Returns
        -------
        (n,) int64, or (samples, n) with the same n for all samples; ascending if ``ordered``.
        """
        n = int(torch.randint(1, count + 1, (), generator=self._generator))
        rows = [torch.randperm(count, generator=self._generator)[:n] for _ in range(samples or 1)]
        drawn = torch.stack(rows)
        if ordered:
            drawn = drawn.sort(dim=1).values
        return drawn if samples is not None else drawn[0]

    @property
    def state(self) -> Tensor:
        """The generator's state, uint8."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu().to(torch.uint8))

    def __getstate__(self) -> dict[str, Tensor]:
        return {"state": self.state}

    def __setstate__(self, values: dict[str, Tensor]) -> None:
        self._generator = torch.Generator()
        self.state = values["state"]


def resolve_channels(channels: Channels, images: Tensor, config: EncoderConfig) -> Tensor | None:
    """Convert the channels of images (B, C, H, W) to ids: None, (C,) int64, or (B, C) int64 with −1 for missing ones.

    ``channels`` is None if the images have the model's channels in its order; ids or names of the images' channels; or
    one such list per sample, which is shorter if the last channels of the sample's image are empty.

    Raises
    ------
    ChannelError
        A channel is unknown or repeated, or the number of channels does not match the images.
    """
    batch, count = images.shape[:2]
    if channels is None:
        if count != config.in_channels:
            names = f" ({', '.join(config.channel_names)})" if config.channel_names else ""
            raise ChannelError(
                f"The images have {count} channels, the model {config.in_channels}{names}. "
                "Select the model's channels with channels=[...]."
            )
        return None
    if isinstance(channels, (str, set, frozenset)) or not isinstance(channels, (Tensor, Iterable)):
        raise ChannelError(f"channels is {channels!r}; expected a list of ids or names, or one such list per sample.")
    channels = channels if isinstance(channels, Tensor) else list(channels)
    if isinstance(channels, Tensor):
        if channels.is_floating_point() or channels.dtype == torch.bool:
            raise ChannelError(f"channels is a {channels.dtype} tensor; expected integer ids.")
        ids = channels.to(torch.int64)
    elif len(channels) and all(isinstance(c, (list, tuple)) for c in channels):
        rows = [_ids(row, config) for row in channels]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
    else:
        ids = torch.tensor(_ids(channels, config), dtype=torch.int64)
    _check_ids(ids, batch, count, config)
    return ids.to(images.device)


def _ids(channels: Sequence[int | str], config: EncoderConfig) -> list[int]:
    if all(isinstance(c, str) for c in channels):
        if config.channel_names is None:
            raise ChannelError(
                f"Channels are given by name ({', '.join(channels)}), but the model has no channel names; give ids, "
                "or create the model with channel_names=(...)."
            )
        return match_channels(channels, config.channel_names, where="the model")
    try:
        if any(isinstance(c, bool) for c in channels):
            raise TypeError("a mask is not a list of ids")
        return [index(c) for c in channels]
    except TypeError:
        raise ChannelError(f"Channels are {list(channels)}; expected only names or only integers.") from None


def _check_ids(ids: Tensor, batch: int, count: int, config: EncoderConfig) -> None:
    if ids.ndim not in (1, 2) or ids.shape[-1] != count or (ids.ndim == 2 and ids.shape[0] != batch):
        raise ChannelError(
            f"channels has shape {tuple(ids.shape)} for images of {count} channels in a batch of {batch}; "
            f"expected ({count},) or ({batch}, {count})."
        )
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return  # reading the values would break a traced graph, or synchronise with the accelerator
    outside = ids[(ids >= config.in_channels) | (ids < (-1 if ids.ndim == 2 else 0))]
    if outside.numel():
        raise ChannelError(f"Channel {int(outside[0])} is not one of the model's 0 to {config.in_channels - 1}.")
    rows = ids if ids.ndim == 2 else ids[None]
    order = rows.sort(dim=1).values
    if bool(((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any()):
        raise ChannelError("A channel is repeated for one image.")
    if bool(((rows[:, 1:] >= 0) & (rows[:, :-1] < 0)).any()) or bool((rows[:, :1] < 0).any()):
        raise ChannelError("The missing channels (−1) of a sample must come last, after at least one existing channel.")


def check_images(images: Tensor, dtype: torch.dtype) -> None:
    """Raise an `InputError` unless ``images`` is a batch (B, C, H, W) of type ``dtype`` with at least one pixel."""
    if not isinstance(images, Tensor):
        raise InputError(
            f"Images are a {type(images).__name__}; expected a torch.Tensor (batch, channels, height, width)."
        )
    if images.ndim != 4:
        raise InputError(f"Images have shape {tuple(images.shape)}; expected (batch, channels, height, width).")
    if not images.is_floating_point():
        raise InputError(f"Images are {images.dtype}; expected floating point, normalised per channel.")
    if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
        raise InputError(f"Images are {images.dtype}, the model {dtype}; convert one with .to(...), or use autocast.")
    if 0 in images.shape[1:]:
        raise InputError(f"Images have shape {tuple(images.shape)}; expected at least one channel and one pixel.")
