"""Encoder: patch embedding, blocks and read-out of every model of the family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cellvim import ops
from cellvim.errors import InputError, ModelError, listing
from cellvim.models.config import EncoderConfig
from cellvim.models.drop_path import drop_path
from cellvim.models.grid import TokenGrid
from cellvim.models.hub import HubModel
from cellvim.models.mixer import Mixer, Scale
from cellvim.models.patch_embed import Channels, ChannelSampler, PatchEmbed, check_images, resolve_channels
from cellvim.models.vit import EPS as VIT_EPS
from cellvim.models.vit import AttentionBlock
from cellvim.ops.scan_plan import ScanPlan

_TOKENS_AT_ONCE = 2048  # of an inference on the CPU


class Block(nn.Module):
    """Add the last mixer's output to the residual stream, normalise, mix (paper Fig. 2)."""

    def __init__(self, config: EncoderConfig, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.norm = Norm(config.embed_dim, config.input_norm)
        self.mixer = Mixer(config)
        self.drop_rate = drop_rate

    def forward(self, hidden: Tensor, residual: Tensor | None, plan: ScanPlan) -> tuple[Tensor, Tensor]:
        """Take the last block's output and the residual, both (B, L, D); return this block's."""
        normed, residual = self.norm(hidden, residual)
        return drop_path(self.mixer(normed, plan), self.drop_rate, self.training), residual


class Norm(Scale):
    """Residual addition and RMSNorm or LayerNorm in one op."""

    def __init__(self, width: int, kind: str, eps: float = 1e-5) -> None:
        super().__init__(width, bias=kind == "layer")
        self.kind, self.eps = kind, eps

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (normed sum, sum), each (B, L, D)."""
        return ops.add_norm(hidden, residual, self.weight, self.bias, self.eps, self.kind)


class Encoder(nn.Module, HubModel):
    """Turns images into features: FastVim, FastChannelVim, FastMaskVim, Vim, ChannelVim, ViT or ChannelViT.

    Which one is decided by the `EncoderConfig` alone; `cellvim.create_model` has the named ones.

    Examples
    --------
    >>> model = Encoder(EncoderConfig(image_size=64, in_channels=5, embed_dim=48, depth=2, num_classes=0)).eval()
    >>> model(torch.rand(2, 5, 64, 64)).shape
    torch.Size([2, 48])
    >>> model.forward_features(torch.rand(2, 3, 64, 64), channels=[0, 3, 4]).shape
    torch.Size([2, 48])

    References
    ----------
    Kapse et al., Fast Vision Mamba (2025), §3.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if not isinstance(config, EncoderConfig):
            raise ModelError(f"Encoder was given a {type(config).__name__}; expected an EncoderConfig.")
        self.config = config
        self.is_trained = False  # set by `load_checkpoint` and training; untrained weights are said to be so
        self.gradient_checkpointing = False  # in training keep only each block's input, and compute the rest twice
        D = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self._built_grid = self._patch_grid(config.image_height, config.image_width)
        if config.class_token != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        if config.position_embedding:
            rows, columns = self._built_grid
            self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns + self._class_has_position, D))
        block = AttentionBlock if config.mixer == "attention" else Block
        rates = [config.drop_path_rate * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.layers = nn.ModuleList(block(config, rate) for rate in rates)
        if config.out_indices:
            for i in range(len(config.out_indices)):
                setattr(self, f"outnorm_{i}", nn.LayerNorm(D))
        else:
            self.norm_f = Norm(D, "layer", VIT_EPS) if config.mixer == "attention" else Norm(D, config.input_norm)
        self.head = nn.Linear(D, config.num_classes) if config.num_classes else nn.Identity()
        self.channel_sampler = ChannelSampler()
        self.register_load_state_dict_post_hook(_without_channel_draws)
        self.reset_parameters()

    def forward(self, images: Tensor, channels: Channels = None, keep: Tensor | None = None) -> Tensor:
        """Classify images, or return their features if the model has no head.

        Parameters
        ----------
        images
            (B, C, H, W), normalised per channel. Any H and W: whole patches are made by zero-padding, and the position
            embedding is resized when the grid differs from the one that was built for.
        channels
            Ids or names of the images' channels, (C,), or one such list a sample; None for all of the model's.
        keep
            (B, L) bool over the tokens in the model's scan order: those that exist; or their ids, (B, K) int64 padded
            with −1; None for all. No channels are drawn in training when it is given.

        Returns
        -------
        (B, num_classes), or `forward_features` if ``num_classes`` is 0.

        Raises
        ------
        ChannelError
            A channel is unknown, or their number does not fit the images.
        """
        return self.forward_head(*self._tokens(images, channels, keep))

    def forward_features(self, images: Tensor, channels: Channels = None, keep: Tensor | None = None) -> Tensor:
        """Return the feature of each image, (B, D), or (B, L, D) for ``readout="tokens"``; parameters as `forward`."""
        return self._read(*self._tokens(images, channels, keep))

    def forward_tokens(self, images: Tensor, channels: Channels = None, keep: Tensor | None = None) -> Tensor:
        """Return all tokens after the final norm, (B, L, D), in the model's scan order.

        With a class token L counts it. With ``keep``, a sample's tokens stand first and the rest are zero.
        """
        return self._tokens(images, channels, keep)[0]

    def forward_token_maps(self, images: Tensor, channels: Channels = None) -> Tensor:
        """Return the tokens after the final norm as maps, (B, D, C, rows, columns), channels in the images' order.

        C is 1 with joint tokens; a class token is left out.
        """
        tokens, grid = self._tokens(images, channels, None)
        maps = self._map(tokens, -1, grid)
        return maps if self.config.tokens == "per_channel" else maps[:, :, None]

    def forward_head(self, tokens: Tensor, grid: TokenGrid) -> Tensor:
        """Read the tokens out and classify them, (B, L, D) -> (B, num_classes); the feature without a head."""
        if self.config.readout == "max" and self.config.num_classes and grid.class_position is None:
            return _max_over(self.classify(tokens), _present(grid))
        return self.classify(self._read(tokens, grid))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Sequence[int] | None = None,
        channels: Channels = None,
        residual: bool = True,
        keep: Tensor | None = None,
    ) -> list[Tensor]:
        """Return maps of chosen blocks, for segmentation and detection heads.

        Parameters
        ----------
        images, channels, keep
            As in `forward`; maps are zero where a sample has no token.
        indices
            Blocks, 0 … depth − 1; None for ``config.out_indices``, or all blocks without them.
        residual
            Include the residual stream in a block's map. The published detection code leaves it out, so that a map
            holds only what its block adds; ``False`` reproduces that.

        Returns
        -------
        list of (B, D, rows, columns), or (B, D, C, rows, columns) with per-channel tokens. With ``config.out_indices``
        each map is layer-normed by the ``outnorm`` of its index.

        References
        ----------
        Kapse et al., Fast Vision Mamba (2025), §4.3 (dense prediction).
        """
        if indices is None:
            indices = self.config.out_indices or range(self.config.depth)
        indices = list(indices) if isinstance(indices, Iterable) else indices
        if not isinstance(indices, list) or not all(isinstance(i, int) for i in indices):
            raise InputError(f"indices is {indices!r}; expected a list of block numbers.")
        unknown = [i for i in indices if not 0 <= i < self.config.depth]
        if unknown:
            raise InputError(f"Blocks {listing(unknown)} are not among 0 to {self.config.depth - 1}.")
        hidden, grid = self.embed(images, channels, keep)
        stream, maps = None, {}
        for i, block in enumerate(self.layers):
            hidden, stream = block(hidden, stream, grid.plan(i))
            if i in indices:
                maps[i] = self._map((hidden + stream).to(hidden.dtype) if residual else hidden, i, grid)
            if len(maps) == len(set(indices)):
                break
        return [maps[i] for i in indices]

    def embed(self, images: Tensor, channels: Channels = None, keep: Tensor | None = None) -> tuple[Tensor, TokenGrid]:
        """Make the tokens that the first block reads, and the grid that says where each lies.

        In training with ``config.channel_sampling``, channels are drawn here.

        Returns
        -------
        tokens, grid
            (B, L, D) and their `TokenGrid`.
        """
        return self._embed_chosen(*self._choose_channels(images, channels, draw=keep is None), keep)

    def _embed_chosen(self, images: Tensor, channels: Tensor | None, keep: Tensor | None) -> tuple[Tensor, TokenGrid]:
        grid = self._grid(images, channels, keep)
        tokens = self.patch_embed(images, channels, grid.exist)  # a grid, see PatchEmbed
        if self.config.position_embedding:
            tokens = tokens + self._position(grid.rows, grid.columns)
        tokens = tokens.flatten(1, -2)  # (B, L, D)
        if grid.kept is not None:
            tokens = tokens.gather(1, grid.kept.clamp_min(0)[..., None].expand(-1, -1, tokens.shape[-1]))
            if grid.is_ragged:
                tokens = tokens * (grid.kept >= 0)[..., None]
        if grid.class_position is not None:
            tokens = self._insert_class_token(tokens, grid.class_position)
        return tokens, grid

    def run_blocks(self, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """Pass embedded tokens through the blocks and the final norm, (B, L, D) -> (B, L, D)."""
        if hidden.device.type == "cpu" and grid.kept is None and _is_plain_inference(hidden):
            # A few images at once stay in the processor's cache and need little memory; rows are independent.
            parts = hidden.split(max(1, _TOKENS_AT_ONCE // hidden.shape[1]))
            if len(parts) > 1:
                return torch.cat([self._run_without_gradients(part, grid) for part in parts])
            del parts
            return self._run_without_gradients(hidden, grid)
        residual = None
        twice = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.layers):
            if twice:
                hidden, residual = checkpoint(block, hidden, residual, grid.plan(i), use_reentrant=False)
            else:
                hidden, residual = block(hidden, residual, grid.plan(i))
        tokens, _ = self.norm_f(hidden, residual)
        return tokens * _present(grid)[..., None] if grid.is_ragged else tokens

    def _run_without_gradients(self, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """The blocks one after the other, each array let go as soon as it has been read."""
        residual = None
        for i, block in enumerate(self.layers):
            if isinstance(block, Block):  # what Block.forward does, but that its caller holds no array meanwhile
                normed, residual = block.norm(hidden, residual)
                del hidden
                hidden = block.mixer(normed, grid.plan(i))
                del normed
            else:
                hidden, residual = block(hidden, residual, grid.plan(i))
        return self.norm_f(hidden, residual)[0]

    def _tokens(self, images: Tensor, channels: Channels, keep: Tensor | None) -> tuple[Tensor, TokenGrid]:
        if self.config.out_indices:
            raise ModelError("This model has out_indices and no final norm; call forward_intermediates.")
        embedded = list(self.embed(images, channels, keep))
        grid = embedded.pop()
        return self.run_blocks(embedded.pop(), grid), grid  # popped: the tokens are let go after the first block

    def _read(self, tokens: Tensor, grid: TokenGrid) -> Tensor:
        """(B, L, D) -> (B, D), or all tokens for ``readout="tokens"``."""
        if self.config.readout == "tokens":
            return tokens
        if grid.class_position is not None:
            return tokens[:, grid.class_position]
        if self.config.readout == "max":
            return _max_over(tokens, _present(grid))
        if not grid.is_ragged:
            return tokens.mean(1) if self.config.readout == "mean" else tokens[:, -1]
        count = _present(grid).sum(1)  # (B,)
        if self.config.readout == "mean":
            return tokens.sum(1) / count[:, None]  # absent tokens are zero
        return tokens[torch.arange(len(tokens), device=tokens.device), count - 1]

    def classify(self, features: Tensor) -> Tensor:
        """Return the head's logits of features (…, D); the features themselves without a head."""
        return ops.linear(features, self.head.weight, self.head.bias) if self.config.num_classes else features

    def _choose_channels(self, images: Tensor, channels: Channels, draw: bool) -> tuple[Tensor, Tensor | None]:
        """Check the images; put joint channels into the model's order; draw per-channel ones in training."""
        config = self.config
        check_images(images, self.patch_embed.proj.weight.dtype)
        channels = resolve_channels(channels, images, config)
        if config.tokens == "joint":
            if channels is not None:
                if channels.ndim != 1 or channels.shape[0] != config.in_channels:
                    raise ModelError("A model of joint tokens needs all its channels, the same for every sample.")
                images = images[:, channels.argsort()]
            return images, None
        if not draw or not self.training or config.channel_sampling == "none":
            return images, channels
        if channels is None:
            channels = torch.arange(images.shape[1], device=images.device)
        if channels.ndim == 2 and bool((channels < 0).any()):
            return images, channels  # samples that lack channels are sampled enough
        samples = len(images) if config.sample_channels_per_image else None
        drawn = self.channel_sampler.draw(
            images.shape[1], ordered=config.channel_sampling == "sorted", samples=samples
        ).to(images.device)
        if samples is None:
            return images[:, drawn], channels[..., drawn]
        rows = torch.arange(len(images), device=images.device)[:, None]
        return images[rows, drawn], channels.expand(len(images), -1).gather(1, drawn)

    def _grid(self, images: Tensor, channels: Tensor | None, keep: Tensor | None) -> TokenGrid:
        """The `TokenGrid` of these images: full, or of the tokens that exist."""
        rows, columns = self._patch_grid(*images.shape[-2:])
        count = images.shape[1] if self.config.tokens == "per_channel" else 1
        channel_count = None
        if channels is not None and channels.ndim == 2 and bool((channels < 0).any()):
            channel_count = (channels >= 0).sum(1)
            exist = (channels >= 0)[:, None, :].expand(-1, rows * columns, -1)  # (B, H·W, C)
            exist = exist if self.config.scan_order == "channel_first" else exist.transpose(1, 2)
            exist = exist.flatten(1)
            keep = exist if keep is None else _as_mask(keep, exist.shape) & exist
        if images.shape[0] == 0:
            keep = None  # no sample, no missing token
        kept = None if keep is None else kept_ids(keep, images.shape[0], rows * columns * count)
        length = rows * columns * count if kept is None else kept.shape[1]
        positions = {"none": None, "first": 0, "middle": length // 2}
        if kept is not None and bool((kept[:, -1:] < 0).any()):
            positions["middle"] = 0  # samples differ in where their middle is
        return TokenGrid(
            self.config,
            rows,
            columns,
            count,
            kept,
            channel_count,
            class_position=positions[self.config.class_token],
            device=images.device,
            dtype=torch.promote_types(images.dtype, torch.float32),
        )

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in the order of the scan path."""
        rows, columns = self.config.grid_size(height, width)
        return (columns, rows) if self.config.scan_path == "colwise" else (rows, columns)

    @property
    def _class_has_position(self) -> bool:
        """As published: Vim's class token has a position, ChannelVim's has none."""
        return self.config.class_token != "none" and self.config.tokens == "joint"

    def _class_index(self, length: int) -> int:
        """Row of the class token in the position table of ``length`` patches."""
        return 0 if self.config.class_token == "first" else length // 2

    def _position(self, rows: int, columns: int) -> Tensor:
        """The patches' position embedding as a grid, resized bicubically if it was built for another one."""
        position = self.pos_embed
        if self._class_has_position:
            index = self._class_index(position.shape[1] - 1)
            position = torch.cat([position[:, :index], position[:, index + 1 :]], dim=1)
        grid = self._resize_position(position.unflatten(1, self._built_grid), rows, columns)  # (1, rows, columns, D)
        if self.config.tokens == "joint":
            return grid
        return grid[:, :, :, None] if self.config.scan_order == "channel_first" else grid[:, None]

    @staticmethod
    def _resize_position(grid: Tensor, rows: int, columns: int) -> Tensor:
        """Resize a (1, rows, columns, D) table bicubically, unless it fits."""
        if grid.shape[1:3] == (rows, columns):
            return grid
        grid = F.interpolate(grid.permute(0, 3, 1, 2), (rows, columns), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1)

    def _insert_class_token(self, tokens: Tensor, place: int) -> Tensor:
        class_token = self.cls_token
        if self.config.position_embedding and self._class_has_position:
            index = self._class_index(self.pos_embed.shape[1] - 1)
            class_token = class_token + self.pos_embed[:, index : index + 1]
        class_token = class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        return torch.cat([tokens[:, :place], class_token, tokens[:, place:]], dim=1)

    def _map(self, tokens: Tensor, block: int, grid: TokenGrid) -> Tensor:
        """(B, L, D) of a block as maps, see `forward_intermediates`."""
        if grid.class_position is not None:
            place = grid.class_position
            tokens = torch.cat([tokens[:, :place], tokens[:, place + 1 :]], dim=1)
        if block in self.config.out_indices:
            tokens = getattr(self, f"outnorm_{self.config.out_indices.index(block)}")(tokens)
        if grid.kept is not None:
            ids = torch.where(grid.kept < 0, grid.count, grid.kept)[..., None].expand_as(tokens)
            full = tokens.new_zeros(tokens.shape[0], grid.count + 1, tokens.shape[2])  # a spare one for absent tokens
            tokens = full.scatter(1, ids, tokens)[:, : grid.count]
        shape = [grid.sizes[a] for a in grid.axes]
        tokens = tokens.unflatten(1, shape).permute(
            0, 4, *(1 + grid.axes.index(a) for a in ("channel", "row", "column"))
        )
        if self.config.scan_path == "colwise":
            tokens = tokens.transpose(3, 4)
        return tokens if self.config.tokens == "per_channel" else tokens[:, :, 0]

    def checkpoint_options(self) -> dict[str, Any]:
        """Return what `save_checkpoint` keeps beside the configuration; nothing for an encoder."""
        return {}

    def get_extra_state(self) -> Tensor:
        """The channel draws' generator, so that checkpoints resume them."""
        return self.channel_sampler.state

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        try:
            self.channel_sampler.state = state
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ModelError(f"_extra_state is no state of the channel draws ({error}).") from error

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise what is not a block's, as the published models (golden statistics)."""
        config = self.config
        if config.tokens == "joint":
            _lecun_normal(self.patch_embed.proj.weight)
            nn.init.zeros_(self.patch_embed.proj.bias)
        else:
            nn.init.trunc_normal_(self.patch_embed.channel_embed.weight, std=0.02)
        if config.class_token != "none":
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if config.position_embedding:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if config.num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


def kept_ids(keep: Tensor, batch: int, count: int) -> Tensor:
    """Turn a mask of kept tokens (B, L) bool, or ids (B, K) padded with −1, into ascending ids padded with −1.

    Raises
    ------
    InputError
        The mask does not fit the images, or leaves a sample without a token.
    """
    keep = _as_mask(keep, (batch, count))
    longest = int(keep.sum(1).max()) if batch else 0
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    ids = torch.where(keep.gather(1, order), order, -1)
    if batch and (ids.shape[1] == 0 or bool((ids[:, 0] < 0).any())):
        raise InputError("keep leaves a sample without any token; expected at least one.")
    return ids


def _as_mask(keep: Tensor, shape: tuple[int, int]) -> Tensor:
    """A mask (B, L) bool of kept tokens, given as such or as ids (B, K) padded with −1."""
    batch, count = shape
    if not isinstance(keep, Tensor):
        raise InputError(f"keep is a {type(keep).__name__}; expected a torch.Tensor of shape {tuple(shape)}.")
    if keep.ndim != 2 or keep.shape[0] != batch:
        raise InputError(f"keep has shape {tuple(keep.shape)}; expected a row for each of the {batch} samples.")
    if keep.dtype == torch.bool:
        if keep.shape[1] != count:
            raise InputError(f"keep has shape {tuple(keep.shape)}; expected ({batch}, {count}), one value a token.")
        return keep
    if keep.is_floating_point():
        raise InputError(f"keep is {keep.dtype}; expected bool, or ids as whole numbers.")
    ids = torch.where(keep < 0, count, keep).long()
    mask = torch.zeros(batch, count + 1, dtype=torch.int64, device=keep.device)
    if bool((keep >= count).any()) or bool((mask.scatter_add(1, ids, torch.ones_like(ids))[:, :count] > 1).any()):
        raise InputError(f"keep has ids beyond {count - 1}, or a token twice for one sample.")
    return mask.scatter(1, ids, 1)[:, :count].bool()


def _without_channel_draws(_, incompatible_keys) -> None:
    """A state dict of another code has no state of our channel draws, and needs none."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.endswith("_extra_state")]


def _is_plain_inference(x: Tensor) -> bool:
    """Whether nothing watches the computation: no gradients, no graph being made."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or x.requires_grad)


def _present(grid: TokenGrid) -> Tensor | None:
    """(B, L) bool of the stored tokens that exist, the class token included; None when all do."""
    if not grid.is_ragged:
        return None
    present = grid.kept >= 0
    if grid.class_position is None:
        return present
    return torch.cat([present.new_ones(len(present), 1), present], dim=1)  # ragged batches have it first


def _max_over(x: Tensor, present: Tensor | None) -> Tensor:
    """Maximum over the tokens that exist, (B, L, K) -> (B, K)."""
    return (x if present is None else x.masked_fill(~present[..., None], float("-inf"))).amax(1)


def _lecun_normal(weight: Tensor) -> None:
    """Truncated normal of variance 1 / fan-in, as timm initialises patch embeddings."""
    std = (1 / weight[0].numel()) ** 0.5 / 0.87962566103423978  # what truncation at ±2 σ takes away
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
