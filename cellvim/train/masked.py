"""Masked pre-training: the model predicts the patches that are hidden from it. Requires no labels."""

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
        See `TrainingModule`.
    """

    has_classes = False

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
        """Return the model to train."""
        return MaskedAutoencoder(config, supervised=self.has_classes, **self.decoder)

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """Return the reconstruction loss of a batch."""
        return {"loss": self.model(images, channels=channels).loss}

    def evaluate(self, images: Tensor, labels: Tensor, channels: Tensor) -> tuple[Tensor, int]:
        """Return the mean loss of a batch and the number of crops."""
        return self.model(images, channels=channels).loss, len(images)
