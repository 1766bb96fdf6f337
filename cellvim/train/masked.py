"""Masked pre-training: predict the patches that were left out. Needs no labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cellvim.models.config import EncoderConfig
from cellvim.models.mae import MaskedAutoencoder
from cellvim.train.module import TrainingModule


class Masked(TrainingModule):
    """Train a `MaskedAutoencoder`.

    Parameters
    ----------
    decoder_dim, decoder_depth, decoder_pool, mask_ratio, channel_mask_ratio, norm_pixels
        See `MaskedAutoencoder`.
    encoder, changes, optimization, augmentation, weights, gradient_checkpointing, seed
        As for `TrainingModule`.
    """

    n_classes_of_data = False

    def __init__(
        self,
        encoder: str = "fastmaskvim_base_patch16",
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        decoder_pool: str = "none",
        mask_ratio: float = 0.75,
        channel_mask_ratio: float = 0.0,
        norm_pixels: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(encoder, **options)
        self.decoder = {
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_pool": decoder_pool,
            "mask_ratio": mask_ratio,
            "channel_mask_ratio": channel_mask_ratio,
            "norm_pixels": norm_pixels,
        }

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """The model of this training."""
        return MaskedAutoencoder(config, **self.decoder)

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """The losses of a batch, see the base."""
        return {"loss": self.model(images, channels=channels).loss}

    def evaluate(self, images: Tensor, labels: Tensor, channels: Tensor) -> tuple[Tensor, int]:
        """Mean loss over a batch, see the base."""
        return self.model(images, channels=channels).loss, len(images)
