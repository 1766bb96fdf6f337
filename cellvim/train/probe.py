"""Linear probe: the encoder stays as it is, and only a linear classifier on its features learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cellvim.errors import InputError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
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
        """The encoder stays in evaluation mode: no drop path, all channels."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor, channels: Any = None) -> Tensor:
        with torch.no_grad():
            features = self.encoder.forward_features(images, channels=channels)
        return self.head(self.norm(features))

    @torch.no_grad()
    def to_encoder(self) -> Encoder:
        """Return the encoder with norm and classifier folded into its head."""
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
        As for `Supervised`; ``weights`` must be given.

    References
    ----------
    He et al., Masked Autoencoders (2022), appendix A.1.
    """

    def __init__(self, encoder: str = "fastvim_base_patch16", *, weights: str, **options: Any) -> None:
        super().__init__(encoder, weights=weights, **options)
        if self.class_of_model(encoder).readout != "mean":
            raise InputError("A linear probe needs readout='mean': one feature an image.")

    def class_of_model(self, encoder: str) -> EncoderConfig:
        """Return the named model's configuration with the changes asked for."""
        from cellvim.models.registry import model_config

        return model_config(encoder, **self.changes)

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """The model of this training."""
        return Probe(Encoder(config))

    def load_pretrained(self, path: str) -> None:
        """Start from the weights of a checkpoint."""
        from cellvim.train.finetune import start_from

        start_from(self.model.encoder, path)

    def trained_part(self) -> nn.Module:
        """Only the classifier learns."""
        return self.model.head

    def finished_model(self) -> Encoder:
        """What is saved at the end: an `Encoder`."""
        return self.model.to_encoder()
