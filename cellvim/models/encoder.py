"""Encoder: patch embedding, blocks and readout of every model of the family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cellvim.ops as ops
from cellvim.errors import InputError, ModelError, listing
from cellvim.models.blocks import ATTENTION_EPS, AttentionBlock, Block, Norm
from cellvim.models.checkpoints import Pretrained
from cellvim.models.config import EncoderConfig
from cellvim.models.grid import TokenGrid, kept_ids, kept_mask
from cellvim.models.patch_embed import Channels, ChannelSampler, PatchEmbed, check_images, resolve_channels

_CPU_TOKENS = 2048  # tokens per pass of an inference on the CPU


class Encoder(nn.Module, Pretrained):
    """Map images to features: FastVim, FastChannelVim, FastMaskVim, Vim, ChannelVim, ViT or ChannelViT.

    The architecture is determined by the `EncoderConfig`; `cellvim.create_model` makes the named ones.

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
            raise ModelError(f"Encoder got a {type(config).__name__}; expected an EncoderConfig.")
        self.config = config
        self.is_trained = False  # set by `load_checkpoint` and training
        self.gradient_checkpointing = False  # recompute each block in the backward pass to save memory
        D = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.built_grid = self._patch_grid(config.image_height, config.image_width)
        if config.class_token != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        if config.position_embedding:
            rows, columns = self.built_grid
            self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns + self._class_has_position, D))
        block = AttentionBlock if config.mixer == "attention" else Block
        rates = [config.drop_path_rate * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.layers = nn.ModuleList(block(config, rate) for rate in rates)
        if config.out_indices:
            for i in range(len(config.out_indices)):
                setattr(self, f"outnorm_{i}", nn.LayerNorm(D))
        else:
            self.norm_f = Norm(D, "layer", ATTENTION_EPS) if config.mixer == "attention" else Norm(D, config.input_norm)
        self.head = nn.Linear(D, config.num_classes) if config.num_classes else nn.Identity()
        self.channel_sampler = ChannelSampler()
        self.register_load_state_dict_post_hook(_ignore_missing_sampler_state)
        self.reset_parameters()

    def forward(self, images: Tensor, channels: Channels = None, keep: Tensor | None = None) -> Tensor:
        """Return the logits of images, or their features if the model has no head.

        Parameters
        ----------
        images
            (B, C, H, W), normalised per channel. H and W are arbitrary: images are zero-padded to a multiple of the
            patch size, and the position embedding is resized to the grid.
        channels
            Ids or names of the images' channels, (C,), or one such list per sample. None for all channels of the model.
        keep
            Tokens that exist, in the model's scan order: a mask (B, L) bool, or ids (B, K) int64 padded with −1. None
            for all. With ``keep``, channels are not sampled in training.

        Returns
        -------
        (B, num_classes), or `forward_features` if ``num_classes`` is 0.

        Raises
        ------
        ChannelError
            A channel is unknown, or the number of channels does not match the images.
        """
        return self.forward_head(*self._tokens(images, channels, keep))

    def forward_features(self, images: Tensor, channels: Channels = None, keep: Tensor | None = None) -> Tensor:
        """Return the feature of each image, (B, D), or (B, L, D) for ``readout="tokens"``; parameters as `forward`."""
        return self._read(*self._tokens(images, channels, keep))

    def forward_tokens(self, images: Tensor, channels: Channels = None, keep: Tensor | None = None) -> Tensor:
        """Return all tokens after the final norm, (B, L, D), in the model's scan order.

        L includes a class token. With ``keep``, a sample's tokens come first and the rest are zero.
        """
        return self._tokens(images, channels, keep)[0]

    def forward_token_maps(self, images: Tensor, channels: Channels = None) -> Tensor:
        """Return the tokens after the final norm as maps, (B, D, C, rows, columns), channels in the images' order.

        C is 1 with joint tokens. A class token is omitted.
        """
        tokens, grid = self._tokens(images, channels, None)
        maps = self._map(tokens, -1, grid)
        return maps if self.config.tokens == "per_channel" else maps[:, :, None]

    def forward_head(self, tokens: Tensor, grid: TokenGrid) -> Tensor:
        """Return the logits of tokens, (B, L, D) -> (B, num_classes), or their feature if the model has no head."""
        if self.config.readout == "max" and self.config.num_classes and grid.class_position is None:
            return _max_over(self.classify(tokens), grid.stored_mask)
        return self.classify(self._read(tokens, grid))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Sequence[int] | None = None,
        channels: Channels = None,
        residual: bool = True,
        keep: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the feature maps of selected blocks, for segmentation and detection heads.

        Parameters
        ----------
        images, channels, keep
            As in `forward`. Maps are zero where a sample has no token.
        indices
            Blocks, 0 … depth − 1. None for ``config.out_indices``, or for all blocks if that is empty.
        residual
            Include the residual stream in the maps. ``False`` reproduces the published detection code, whose maps
            contain only the output of the block.

        Returns
        -------
        list of (B, D, rows, columns), or of (B, D, C, rows, columns) with per-channel tokens. With
        ``config.out_indices`` each map is normalised by the ``outnorm`` of its index.

        References
        ----------
        Kapse et al., Fast Vision Mamba (2025), §4.3 (dense prediction).
        """
        if indices is None:
            indices = self.config.out_indices or range(self.config.depth)
        indices = list(indices) if isinstance(indices, Iterable) else indices
        if not isinstance(indices, list) or not all(isinstance(i, int) for i in indices):
            raise InputError(f"indices is {indices!r}; expected a list of block indices.")
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
        """Return the input tokens of the first block and their grid.

        In training, channels are sampled here if ``config.channel_sampling`` is not "none".

        Returns
        -------
        tokens, grid
            (B, L, D) and their `TokenGrid`.
        """
        return self._embed_chosen(*self._choose_channels(images, channels, draw=keep is None), keep)

    def _embed_chosen(self, images: Tensor, channels: Tensor | None, keep: Tensor | None) -> tuple[Tensor, TokenGrid]:
        grid = self._grid(images, channels, keep)
        tokens = self.patch_embed(images, channels, grid.mask)  # a grid, see PatchEmbed
        if self.config.position_embedding:
            tokens = tokens + self._position(grid.rows, grid.columns)
        tokens = grid.gather(tokens.flatten(1, -2))  # (B, L, D)
        if grid.is_ragged:
            tokens = tokens * (grid.kept >= 0)[..., None]
        if grid.class_position is not None:
            tokens = self._insert_class_token(tokens, grid.class_position)
        return tokens, grid

    def run_blocks(self, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """Pass embedded tokens through the blocks and the final norm, (B, L, D) -> (B, L, D)."""
        differentiated = torch.is_grad_enabled() or hidden.requires_grad
        if hidden.device.type == "cpu" and grid.kept is None and not (differentiated or torch.compiler.is_compiling()):
            # Small parts fit the processor's cache and need little memory; samples are independent.
            parts = hidden.split(max(1, _CPU_TOKENS // hidden.shape[1]))
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
        return tokens * grid.stored_mask[..., None] if grid.is_ragged else tokens

    def _run_without_gradients(self, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """Run the blocks and release each array as soon as it has been read."""
        residual = None
        for i, block in enumerate(self.layers):
            if isinstance(block, Block):  # as in Block.forward, whose caller would keep the arrays alive
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
        return self.run_blocks(embedded.pop(), grid), grid  # popped, so that the tokens are freed after the first block

    def _read(self, tokens: Tensor, grid: TokenGrid) -> Tensor:
        """(B, L, D) -> (B, D), or all tokens for ``readout="tokens"``."""
        if self.config.readout == "tokens":
            return tokens
        if grid.class_position is not None:
            return tokens[:, grid.class_position]
        if self.config.readout == "max":
            return _max_over(tokens, grid.stored_mask)
        if not grid.is_ragged:
            return tokens.mean(1) if self.config.readout == "mean" else tokens[:, -1]
        count = grid.stored_mask.sum(1)  # (B,)
        if self.config.readout == "mean":
            return tokens.sum(1) / count[:, None]  # absent tokens are zero
        return tokens[torch.arange(len(tokens), device=tokens.device), count - 1]

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits of features (…, D), or the features themselves if the model has no head."""
        return ops.linear(features, self.head.weight, self.head.bias) if self.config.num_classes else features

    def _choose_channels(self, images: Tensor, channels: Channels, draw: bool) -> tuple[Tensor, Tensor | None]:
        """Check images, reorder the channels of joint tokens, and in training sample those of per-channel tokens."""
        config = self.config
        check_images(images, self.patch_embed.proj.weight.dtype)
        channels = resolve_channels(channels, images, config)
        if config.tokens == "joint":
            if channels is not None:
                if channels.shape != (config.in_channels,):
                    raise ModelError("A model with joint tokens needs all its channels, the same for every sample.")
                images = images[:, channels.argsort()]
            return images, None
        if not draw or not self.training or config.channel_sampling == "none":
            return images, channels
        if channels is None:
            channels = torch.arange(images.shape[1], device=images.device)
        if channels.ndim == 2 and bool((channels < 0).any()):
            return images, channels  # batches with missing channels are not sampled further
        samples = len(images) if config.sample_channels_per_image else None
        ordered = config.channel_sampling == "sorted"
        drawn = self.channel_sampler.draw(images.shape[1], ordered=ordered, samples=samples).to(images.device)
        if samples is None:
            return images[:, drawn], channels[..., drawn]
        rows = torch.arange(len(images), device=images.device)[:, None]
        return images[rows, drawn], channels.expand(len(images), -1).gather(1, drawn)

    def _grid(self, images: Tensor, channels: Tensor | None, keep: Tensor | None) -> TokenGrid:
        """Return the `TokenGrid` of the images."""
        rows, columns = self._patch_grid(*images.shape[-2:])
        count = images.shape[1] if self.config.tokens == "per_channel" else 1
        channel_count = None
        if channels is not None and channels.ndim == 2 and bool((channels < 0).any()):
            channel_count = (channels >= 0).sum(1)
            exist = self._tokens_of_channels(channels >= 0, rows * columns)
            keep = exist if keep is None else kept_mask(keep, exist.shape) & exist
        if images.shape[0] == 0:
            keep = None  # an empty batch has no missing tokens
        kept = None if keep is None else kept_ids(keep, images.shape[0], rows * columns * count)
        length = rows * columns * count if kept is None else kept.shape[1]
        positions = {"none": None, "first": 0, "middle": length // 2}
        if kept is not None and bool((kept[:, -1:] < 0).any()):
            positions["middle"] = 0  # the middle differs between samples
        place, dtype = positions[self.config.class_token], torch.promote_types(images.dtype, torch.float32)
        return TokenGrid(self.config, rows, columns, count, kept, channel_count, place, images.device, dtype)

    def _tokens_of_channels(self, selected: Tensor, patches: int) -> Tensor:
        """Repeat values of channels for their tokens, (B, C) -> (B, L) in scan order."""
        selected = selected[:, None].expand(-1, patches, -1)  # (B, H·W, C)
        return (selected if self.config.scan_order == "channel_first" else selected.transpose(1, 2)).flatten(1)

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the numbers of rows and columns of patches, swapped for ``scan_path="colwise"``."""
        rows, columns = self.config.grid_size(height, width)
        return (columns, rows) if self.config.scan_path == "colwise" else (rows, columns)

    @property
    def _class_has_position(self) -> bool:
        """Whether the class token has a position embedding: in Vim it does, in ChannelVim it does not."""
        return self.config.class_token != "none" and self.config.tokens == "joint"

    def _class_index(self, length: int) -> int:
        """Return the row of the class token in the position table of ``length`` patches."""
        return 0 if self.config.class_token == "first" else length // 2

    def _position(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding of the patches as a grid, resized if the grid differs from the built one."""
        position = self.pos_embed
        if self._class_has_position:
            index = self._class_index(position.shape[1] - 1)
            position = torch.cat([position[:, :index], position[:, index + 1 :]], dim=1)
        grid = resize_positions(position.unflatten(1, self.built_grid), rows, columns)  # (1, rows, columns, D)
        if self.config.tokens == "joint":
            return grid
        return grid[:, :, :, None] if self.config.scan_order == "channel_first" else grid[:, None]

    def _insert_class_token(self, tokens: Tensor, place: int) -> Tensor:
        class_token = self.cls_token
        if self.config.position_embedding and self._class_has_position:
            index = self._class_index(self.pos_embed.shape[1] - 1)
            class_token = class_token + self.pos_embed[:, index : index + 1]
        class_token = class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        return torch.cat([tokens[:, :place], class_token, tokens[:, place:]], dim=1)

    def _map(self, tokens: Tensor, block: int, grid: TokenGrid) -> Tensor:
        """Return the tokens of a block as maps, see `forward_intermediates`."""
        if grid.class_position is not None:
            place = grid.class_position
            tokens = torch.cat([tokens[:, :place], tokens[:, place + 1 :]], dim=1)
        if block in self.config.out_indices:
            tokens = getattr(self, f"outnorm_{self.config.out_indices.index(block)}")(tokens)
        shape = [grid.sizes[a] for a in grid.axes]
        axes = (1 + grid.axes.index(a) for a in ("channel", "row", "column"))
        tokens = grid.scatter(tokens).unflatten(1, shape).permute(0, 4, *axes)
        if self.config.scan_path == "colwise":
            tokens = tokens.transpose(3, 4)
        return tokens if self.config.tokens == "per_channel" else tokens[:, :, 0]

    def checkpoint_options(self) -> dict[str, Any]:
        """Return the arguments that a checkpoint stores beside the configuration; none for an encoder."""
        return {}

    def get_extra_state(self) -> Tensor:
        """Return the state of the channel sampler, so that a resumed training continues its draws."""
        return self.channel_sampler.state

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state returned by `get_extra_state`."""
        try:
            self.channel_sampler.state = state
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ModelError(f"_extra_state is not a state of the channel sampler ({error}).") from error

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters outside the blocks as in the published models."""
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


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Resize a (1, rows, columns, D) table bicubically, unless it has that size."""
    if table.shape[1:3] == (rows, columns):
        return table
    table = F.interpolate(table.permute(0, 3, 1, 2), (rows, columns), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1)


def _ignore_missing_sampler_state(_, incompatible_keys) -> None:
    """Do not require the channel sampler's state, which state dicts of other code do not have."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.endswith("_extra_state")]


def _max_over(x: Tensor, present: Tensor | None) -> Tensor:
    """Return the maximum over the tokens that exist, (B, L, K) -> (B, K)."""
    return (x if present is None else x.masked_fill(~present[..., None], float("-inf"))).amax(1)


def _lecun_normal(weight: Tensor) -> None:
    """Fill with a truncated normal of variance 1 / fan-in, as timm does for patch embeddings."""
    std = (1 / weight[0].numel()) ** 0.5 / 0.87962566103423978  # standard deviation after truncation at ±2 σ
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
