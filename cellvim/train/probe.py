"""Linear probe: a linear classifier on the features of a frozen encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cellvim.errors import InputError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.models.registry import model_config
from cellvim.train.resuming import start_from
from cellvim.train.supervised import Supervised


class Probe(nn.Module):
    """Features of a frozen encoder → batch norm without affine parameters → linear classifier."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.config = encoder.config
        self.norm = nn.BatchNorm1d(encoder.config.embed_dim, affine=False, eps=1e-6)
        self.head = nn.Linear(encoder.config.embed_dim, encoder.config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Probe:
        """Set the mode of norm and classifier; the encoder stays in evaluation mode (no drop path, all channels)."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor, channels: Any = None) -> Tensor:
        with torch.no_grad():
            features = self.encoder.forward_features(images, channels=channels)
        return self.head(self.norm(features))

    @torch.no_grad()
    def to_encoder(self) -> Encoder:
        """Return the encoder, with norm and classifier folded into its head."""
        inverse = (self.norm.running_var + self.norm.eps).rsqrt()
        weight = self.head.weight * inverse
        self.encoder.head.weight.copy_(weight)
        self.encoder.head.bias.copy_(self.head.bias - weight @ self.norm.running_mean)
        return self.encoder


class LinearProbe(Supervised):
    """Train a linear classifier on the features of given weights.

    Parameters
    ----------
    encoder, label_smoothing, class_weights, changes, optimization, augmentation, weights, gradient_checkpointing, seed
        See `Supervised`; ``weights`` is required.

    References
    ----------
    He et al., Masked Autoencoders (2022), appendix A.1.
    """

    def __init__(self, encoder: str = "fastvim_base_patch16", *, weights: str, **options: Any) -> None:
        super().__init__(encoder, weights=weights, **options)
        if model_config(encoder, **self.changes).readout != "mean":
            raise InputError("A linear probe requires readout='mean': one feature vector per image.")

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """Return the model to train."""
        return Probe(Encoder(config))

    def load_pretrained(self, path: str) -> None:
        """Load the weights of the encoder."""
        start_from(self.model.encoder, path)

    def trained_part(self) -> nn.Module:
        """Return the classifier, which is all that is trained."""
        return self.model.head

    def finished_model(self) -> Encoder:
        """Return the encoder to save."""
        return self.model.to_encoder()
