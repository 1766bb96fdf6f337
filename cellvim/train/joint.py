"""Joint training: the visible tokens predict both the class and the patches that were left out."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cellvim.errors import InputError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.models.mae import MaskedAutoencoder
from cellvim.train.augment import mix
from cellvim.train.data import DataDescription
from cellvim.train.supervised import Supervised


class Joint(Supervised):
    """Train a `MaskedAutoencoder` with a classification head, on both losses at once.

    Crops without a label take part in the masked loss alone, so labelled and unlabelled plates can be mixed.

    Parameters
    ----------
    supervised_weight, masked_weight
        Of the two losses.
    decoder_dim, decoder_depth, decoder_pool, mask_ratio, channel_mask_ratio, norm_pixels
        See `MaskedAutoencoder`.
    encoder, label_smoothing, class_weights, changes, optimization, augmentation, weights, gradient_checkpointing, seed
        As for `Supervised`.

    Notes
    -----
    Evaluated, and saved, as an `Encoder` that sees all tokens, with ``pool_scale = 1 - mask_ratio``.

    References
    ----------
    Pham et al., ChA-MAEViT (2025): joint training and channel masking for multi-channel images.
    """

    def __init__(
        self,
        encoder: str = "fastchannelmaskvim_small_patch16",
        *,
        supervised_weight: float = 1.0,
        masked_weight: float = 1.0,
        decoder_dim: int = 256,
        decoder_depth: int = 2,
        decoder_pool: str = "mean",
        mask_ratio: float = 0.5,
        channel_mask_ratio: float = 0.0,
        norm_pixels: bool = True,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(encoder, label_smoothing=label_smoothing, **options)
        for name, weight in (("supervised_weight", supervised_weight), ("masked_weight", masked_weight)):
            if not weight >= 0:
                raise InputError(f"{name} is {weight}; expected 0 or more.")
        if supervised_weight == masked_weight == 0:
            raise InputError("supervised_weight and masked_weight are both 0; there is nothing to learn.")
        self.supervised_weight, self.masked_weight = supervised_weight, masked_weight
        self.decoder = {
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_pool": decoder_pool,
            "mask_ratio": mask_ratio,
            "channel_mask_ratio": channel_mask_ratio,
            "norm_pixels": norm_pixels,
        }
        self._whole: list[Encoder] = []  # a list, so that it is no part of the module

    def config_of(self, description: DataDescription) -> EncoderConfig:
        """The base's, with what this training needs of the head."""
        config = super().config_of(description)
        return config if config.num_classes else config.replace(num_classes=1)  # before the data are known

    def make_model(self, config: EncoderConfig) -> nn.Module:
        """The model of this training."""
        return MaskedAutoencoder(config, supervised=True, **self.decoder)

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """The losses of a batch, see the base."""
        known = labels >= 0
        targets = F.one_hot(labels.clamp_min(0), len(self.description.class_names)).to(images.dtype)
        if bool(known.all()):
            images, targets = mix(images, targets, self.augmentation)
        output = self.model(images, channels=channels)
        supervised = output.logits.sum() * 0.0
        if bool(known.any()):
            supervised = F.cross_entropy(
                output.logits[known].float(),
                targets[known],
                weight=self.class_weight(),
                label_smoothing=self.label_smoothing,
            )
        total = self.supervised_weight * supervised + self.masked_weight * output.loss
        return {"loss": total, "masked_loss": output.loss, "supervised_loss": supervised}

    def finished_model(self) -> Encoder:
        """What is saved at the end: an `Encoder`."""
        return whole_image_encoder(self.model)

    def classify(self, images: Tensor, channels: Tensor) -> Tensor:
        """Logits of whole images."""
        if not self._whole:
            self._whole.append(whole_image_encoder(self.model).to(images.device).eval())
        return self._whole[0](images, channels=channels)

    def on_validation_epoch_start(self) -> None:
        """Evaluate the weights as they are now."""
        super().on_validation_epoch_start()
        self._whole.clear()


def whole_image_encoder(model: MaskedAutoencoder) -> Encoder:
    """Return an `Encoder` that reads whole images with the weights of a jointly trained model, head included.

    Its pools are scaled by 1 − mask ratio where masked training summed the visible tokens alone.
    """
    scale = 1.0 if model.config.masked_pool == "mean" else 1.0 - model.mask_ratio
    encoder = model.to_encoder(pool_scale=scale)
    if model.config.num_classes:
        encoder.head.load_state_dict(model.head.state_dict())
    return encoder.train(model.training)
