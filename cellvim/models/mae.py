"""MaskedAutoencoder: pre-training by predicting masked patches with the same encoder (FastMaskVim)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import cellvim.ops as ops
from cellvim.errors import InputError, ModelError
from cellvim.models.blocks import Block, Norm
from cellvim.models.checkpoints import load_strictly
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder, resize_positions
from cellvim.models.grid import TokenGrid, kept_ids
from cellvim.models.patch_embed import Channels


@dataclass
class MaskedOutput:
    """Output of a `MaskedAutoencoder`.

    Parameters
    ----------
    loss
        Mean squared error over the masked patches, a scalar.
    prediction
        (B, L, p·p·C) for joint tokens, (B, L, p·p) for per-channel tokens, in the model's scan order.
    mask
        (B, L) float: 1 for masked patches.
    latent
        (B, K, D), the visible tokens after the encoder's final norm; K includes a class token.
    logits
        (B, num_classes) for a supervised model, otherwise None.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor
    latent: Tensor
    logits: Tensor | None = None


class MaskedAutoencoder(Encoder):
    """An `Encoder` of the visible tokens, and a decoder of plain Vim blocks that predicts the masked ones.

    Parameters
    ----------
    config
        Configuration of the encoder. With ``tokens="per_channel"`` the model is FastChannelMaskVim.
    decoder_dim, decoder_depth
        Width and number of the decoder's blocks.
    decoder_pool
        Pooling in the decoder's scan: "none" as published, or "mean", which is faster for long sequences.
    mask_ratio
        Fraction of tokens to mask.
    channel_mask_ratio
        Average fraction of channels to mask entirely, for per-channel tokens: with 2 channels, 0.25 masks one in every
        other batch. At least one channel remains visible.
    norm_pixels
        Normalise each target patch to mean 0 and (unbiased) variance 1.
    supervised
        Keep the classification head of ``config`` and also return logits of the visible tokens, for joint training.

    Notes
    -----
    The position tables are fixed sines and cosines. No gradient is computed with respect to the target.

    References
    ----------
    Kapse et al., Fast Vision Mamba (2025), §3.3 (FastMaskVim); He et al., Masked Autoencoders (2022); Pham et al.,
    ChA-MAEViT (2025) for joint training and channel masking.
    """

    def __init__(
        self,
        config: EncoderConfig,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        mask_ratio: float = 0.75,
        norm_pixels: bool = True,
        *,
        channel_mask_ratio: float = 0.0,
        decoder_pool: str = "none",
        supervised: bool = False,
    ) -> None:
        if not isinstance(config, EncoderConfig):
            raise ModelError(f"MaskedAutoencoder got a {type(config).__name__}; expected an EncoderConfig.")
        for name, ratio in (("mask_ratio", mask_ratio), ("channel_mask_ratio", channel_mask_ratio)):
            if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
                raise ModelError(f"{name} is {ratio!r}; expected at least 0 and below 1.")
        for name, number in (("decoder_dim", decoder_dim), ("decoder_depth", decoder_depth)):
            if not isinstance(number, int) or number < 1:
                raise ModelError(f"{name} is {number!r}; expected an integer of at least 1.")
        if norm_pixels and config.patch_size == 1 and (config.tokens == "per_channel" or config.in_channels == 1):
            raise ModelError("norm_pixels=True needs patches of more than one value; those of this model have one.")
        if channel_mask_ratio and config.tokens == "joint":
            raise ModelError("channel_mask_ratio needs tokens='per_channel'; a joint token contains all channels.")
        if config.out_indices:
            raise ModelError("A masked autoencoder does not support out_indices.")
        if not config.position_embedding:
            raise ModelError("A masked autoencoder needs position_embedding=True to predict patches by position.")
        if supervised and not config.num_classes:
            raise ModelError("supervised=True needs num_classes of at least 1.")
        super().__init__(config if supervised else config.replace(num_classes=0))
        config = self.config
        self.mask_ratio, self.channel_mask_ratio, self.norm_pixels = mask_ratio, channel_mask_ratio, norm_pixels

        self.decoder_config = config.replace(
            embed_dim=decoder_dim, pool=decoder_pool, alternate=decoder_pool != "none", drop_path_rate=0.0,
            dt_rank=None, layer_scale=None, mixer="mamba", num_classes=0, pool_scale=1.0, pool_axes=1,
        )  # fmt: skip
        self.decoder_embed = nn.Linear(config.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        if config.tokens == "per_channel":
            self.decoder_channel_embed = nn.Embedding(config.in_channels, decoder_dim)
        self.decoder_blocks = nn.ModuleList(Block(self.decoder_config) for _ in range(decoder_depth))
        self.decoder_norm = Norm(decoder_dim, config.input_norm)
        pixels = config.patch_size**2 * (config.in_channels if config.tokens == "joint" else 1)
        self.decoder_pred = nn.Linear(decoder_dim, pixels)

        rows, columns = self.built_grid
        has_class = config.class_token != "none"
        self.pos_embed = _fixed(config.embed_dim, rows, columns, self._class_has_position)
        self.decoder_pos_embed = _fixed(decoder_dim, rows, columns, has_class and self._class_has_position)
        self._reset_masked_parameters()

    def forward(
        self, images: Tensor, noise: Tensor | None = None, channels: Channels = None, keep: Tensor | None = None
    ) -> MaskedOutput:
        """Mask tokens, encode the others, and return the prediction of the masked patches and its loss.

        Parameters
        ----------
        images
            (B, C, H, W), normalised per channel.
        noise
            (B, L), one finite number per token in scan order: tokens with the lowest remain visible. None to draw it
            at random; only then are channels sampled in training (``config.channel_sampling``).
        channels
            Ids or names of the images' channels, the same number for every sample.
        keep
            (B, L) bool: tokens that exist, for irregular grids. The others are neither encoded nor predicted.

        Raises
        ------
        InputError
            ``noise`` or ``keep`` does not match the tokens.
        """
        images, channels = self._choose_channels(images, channels, draw=noise is None and keep is None)
        if channels is not None and channels.ndim == 2 and bool((channels < 0).any()):
            raise InputError("A masked autoencoder needs the same number of channels in every sample.")
        if images.shape[0] == 0:
            raise InputError("The batch is empty; expected at least one image.")
        grid = self._grid(images, channels, keep)
        if grid.is_ragged and self.config.class_token != "none":
            raise InputError("Samples with different numbers of tokens need a model with class_token='none'.")
        visible, hidden_mask = self._mask(noise, images, grid)

        tokens, visible_grid = self._embed_chosen(images, channels, visible)
        latent = self.run_blocks(tokens, visible_grid)  # (B, K, D)
        prediction = self._decode(latent, visible_grid, grid, channels)  # (B, L, pixels)
        logits = self.forward_head(latent, visible_grid) if self.config.num_classes else None
        error = (prediction - self.targets(images, grid.mask)).square().mean(-1)  # (B, L)
        mask = hidden_mask.to(error.dtype)
        loss = (error * mask).sum() / mask.sum().clamp_min(1)
        return MaskedOutput(loss, prediction, mask, latent, logits)

    def _mask(self, noise: Tensor | None, images: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """Return the ids (B, K) of the visible tokens, padded with −1, and a mask (B, L) bool of the masked ones."""
        shape = (images.shape[0], grid.count)
        gone = torch.zeros(shape, dtype=torch.bool, device=images.device)  # of masked channels
        most = grid.count
        if noise is None:
            noise = torch.rand(shape, device=images.device)
            masked_channels = self._count_masked_channels(grid.channels)
            if masked_channels:
                rank = torch.rand(len(gone), grid.channels, device=grid.device).argsort(dim=1).argsort(dim=1)  # (B, C)
                gone = self._tokens_of_channels(rank < masked_channels, grid.rows * grid.columns)
                most -= masked_channels * grid.rows * grid.columns
        elif not isinstance(noise, Tensor) or noise.shape != shape:
            found = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise InputError(f"noise is {found}; expected a tensor of shape {shape}.")
        elif not torch.compiler.is_compiling() and not bool(noise.isfinite().all()):
            raise InputError("noise contains NaN or infinite values; expected one finite number per token.")
        exist = grid.mask
        if exist is None:
            count = min(max(1, int(grid.count * (1 - self.mask_ratio))), most)
            order = noise.masked_fill(gone, torch.inf).argsort(dim=1, stable=True)
            visible = order[:, :count].sort(dim=1).values
            return visible, torch.ones_like(gone).scatter(1, visible, False)
        rank = noise.masked_fill(gone | ~exist, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        counts = (exist.sum(1, keepdim=True) * (1 - self.mask_ratio)).long().clamp_min(1)  # (B, 1)
        seen = (rank < counts) & exist & ~gone
        seen |= ~seen.any(1, keepdim=True) & (rank == 0)  # at least one token of each sample
        return kept_ids(seen, *shape), exist & ~seen

    def _count_masked_channels(self, channels: int) -> int:
        """Return the number of channels to mask in this batch; a fraction of a channel is rounded at random."""
        share = round(self.channel_mask_ratio * channels, 6)
        count = int(share)
        if share > count:
            count += int(torch.rand(()) < share - count)
        return min(count, channels - 1)

    @torch.no_grad()
    def targets(self, images: Tensor, exist: Tensor | None = None) -> Tensor:
        """Return the targets, (B, L, p·p·C) or (B, L, p·p), in scan order; zero for tokens that do not exist."""
        patches = self.patch_embed.patches(images)  # (B, C, rows, columns, p, p)
        if self.config.tokens == "joint":
            patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3)
        elif self.config.scan_order == "channel_first":
            patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(4)
        else:
            patches = patches.flatten(4)
        patches = patches.flatten(1, -2)
        if exist is not None:
            patches = patches.masked_fill(~exist[..., None], 0.0)
        if not self.norm_pixels:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def to_encoder(self, **changes: Any) -> Encoder:
        """Return an `Encoder` with these weights and a trainable position embedding, for fine-tuning or embedding.

        Parameters
        ----------
        **changes
            Values of `EncoderConfig`, such as ``num_classes`` and ``pool_scale=1 - mask_ratio`` (paper §3.3). The
            position table is resized if ``image_size`` changes.

        Raises
        ------
        ModelError
            A change needs weights that this model does not have.
        """
        encoder = Encoder(self.config.replace(**changes))
        own = encoder.state_dict()
        weights = {k: v for k, v in self.state_dict().items() if k in own and not k.startswith("head.")}
        if encoder.config.class_token != self.config.class_token:
            raise ModelError("to_encoder cannot change class_token, for which this model has no weights.")
        if "pos_embed" in weights:
            weights["pos_embed"] = self._position_table_for(encoder)
        weights |= {k: v for k, v in own.items() if k.startswith("head.") or k not in self.state_dict()}
        load_strictly(encoder, weights)
        encoder.is_trained = self.is_trained
        return encoder

    def checkpoint_options(self) -> dict[str, Any]:
        """Return the arguments that a checkpoint stores beside the configuration."""
        return {
            "decoder_dim": self.decoder_config.embed_dim,
            "decoder_depth": len(self.decoder_blocks),
            "mask_ratio": self.mask_ratio,
            "norm_pixels": self.norm_pixels,
            "channel_mask_ratio": self.channel_mask_ratio,
            "decoder_pool": self.decoder_config.pool,
            "supervised": self.config.num_classes > 0,
        }

    def _position_table_for(self, encoder: Encoder) -> Tensor:
        """Return the position table (1, ·, D) resized to the encoder's grid, with the class token in its row."""
        has_class = int(self._class_has_position)
        patches = self.pos_embed[:, has_class:].unflatten(1, self.built_grid)
        table = resize_positions(patches, *encoder.built_grid).flatten(1, 2)
        index = encoder._class_index(table.shape[1])
        return torch.cat([table[:, :index], self.pos_embed[:, :has_class], table[:, index:]], dim=1)

    def _class_index(self, length: int) -> int:
        return 0  # as published, whatever the position of the class token in the sequence

    def _decode(self, latent: Tensor, visible: TokenGrid, grid: TokenGrid, channels: Tensor | None) -> Tensor:
        """Insert mask tokens for the missing patches and predict every patch, (B, K, D) -> (B, L, pixels)."""
        tokens = ops.linear(latent, self.decoder_embed.weight, self.decoder_embed.bias)
        class_token = None
        if self.config.class_token != "none":
            place = 0 if self.config.class_token == "first" else visible.kept.shape[1] // 2
            class_token = tokens[:, place : place + 1]
            tokens = torch.cat([tokens[:, :place], tokens[:, place + 1 :]], dim=1)
        full = visible.scatter(tokens, self.mask_token) + self._decoder_positions(grid, channels)
        if class_token is not None:  # at the end, as published
            if self._class_has_position:
                class_token = class_token + self.decoder_pos_embed[:, :1]
            full = torch.cat([full, class_token], dim=1)
        decoder_grid = TokenGrid(
            self.decoder_config, grid.rows, grid.columns, grid.channels, kept=grid.kept,
            class_position=None if class_token is None else grid.count, device=latent.device, dtype=grid.dtype,
        )  # fmt: skip
        hidden, residual = grid.gather(full), None
        for i, block in enumerate(self.decoder_blocks):
            hidden, residual = block(hidden, residual, decoder_grid.plan(i))
        hidden, _ = self.decoder_norm(hidden, residual)
        hidden = grid.scatter(hidden[:, : grid.count if grid.kept is None else grid.kept.shape[1]])
        return ops.linear(hidden, self.decoder_pred.weight, self.decoder_pred.bias)

    def _decoder_positions(self, grid: TokenGrid, channels: Tensor | None) -> Tensor:
        """Return the position and channel embedding of every patch, (1 or B, L, decoder_dim)."""
        positions = self.decoder_pos_embed[:, int(self._class_has_position) :].unflatten(1, self.built_grid)
        positions = resize_positions(positions, grid.rows, grid.columns)  # (1, rows, columns, D)
        if self.config.tokens == "joint":
            return positions.flatten(1, 2)
        if channels is None:
            channels = torch.arange(grid.channels, device=positions.device)
        embedding = self.decoder_channel_embed(channels if channels.ndim == 2 else channels[None])  # (·, C, D)
        if self.config.scan_order == "channel_first":
            return (positions[:, :, :, None] + embedding[:, None, None]).flatten(1, 3)
        return (positions[:, None] + embedding[:, :, None, None]).flatten(1, 3)

    @torch.no_grad()
    def _reset_masked_parameters(self) -> None:
        """Initialise as in the published MAE."""
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        bound = weight[0].numel() ** -0.5
        nn.init.uniform_(self.patch_embed.proj.bias, -bound, bound)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.config.tokens == "per_channel":
            nn.init.trunc_normal_(self.decoder_channel_embed.weight, std=0.02)


def _fixed(width: int, rows: int, columns: int, has_class: bool) -> nn.Parameter:
    """Return a fixed position table (1, rows·columns, width), preceded by a row of zeros for a class token."""
    table = sincos_positions(width, rows, columns)
    if has_class:
        table = torch.cat([torch.zeros(1, width), table])
    return nn.Parameter(table[None], requires_grad=False)


def sincos_positions(width: int, rows: int, columns: int) -> Tensor:
    """Return the sines and cosines of the column, then the row, of each patch, (rows · columns, width).

    References
    ----------
    He et al., Masked Autoencoders (2022), appendix A; Vaswani et al. (2017), §3.5.
    """
    if width % 4:
        raise ModelError(f"A fixed position embedding needs a width that is a multiple of 4, not {width}.")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    parts = [f(axis.reshape(-1, 1) * frequency) for axis in (column, row) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()
