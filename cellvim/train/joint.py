"""Joint training: the visible tokens predict both the class and the hidden patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cellvim.errors import InputError
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.models.mae import MaskedAutoencoder
from cellvim.train.augment import mix
from cellvim.train.batches import DataDescription
from cellvim.train.masked import Masked
from cellvim.train.supervised import Supervised


class Joint(Masked, Supervised):
    """Train a `MaskedAutoencoder` with a classification head on both losses at once.

    Crops without a label contribute to the masked loss only, so labelled and unlabelled plates can be combined.

    Parameters
    ----------
    supervised_weight, masked_weight
        Weights of the two losses.
    decoder_dim, decoder_depth, decoder_pool, mask_ratio, channel_mask_ratio, norm_pixels
        See `MaskedAutoencoder`.
    encoder, label_smoothing, class_weights, changes, optimization, augmentation, weights, gradient_checkpointing, seed
        See `Supervised`.

    Notes
    -----
    Evaluated and saved as an `Encoder` that sees all tokens, with ``pool_scale = 1 - mask_ratio``.

    References
    ----------
    Pham et al., ChA-MAEViT (2025): joint training and channel masking for multi-channel images.
    """

    has_classes = True

    def __init__(
        self,
        encoder: str = "fastchannelmaskvim_small_patch16",
        *,
        supervised_weight: float = 1.0,
        masked_weight: float = 1.0,
        decoder_dim: int = 256,
        decoder_pool: str = "mean",
        mask_ratio: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(encoder, decoder_dim=decoder_dim, decoder_pool=decoder_pool, mask_ratio=mask_ratio, **options)
        for name, weight in (("supervised_weight", supervised_weight), ("masked_weight", masked_weight)):
            if not weight >= 0:
                raise InputError(f"{name} is {weight}; expected 0 or more.")
        if supervised_weight == masked_weight == 0:
            raise InputError("supervised_weight and masked_weight are both 0; at least one must be positive.")
        self.supervised_weight, self.masked_weight = supervised_weight, masked_weight
        self._evaluated_encoder: list[Encoder] = []  # a list, so that it is not a submodule

    def config_of(self, description: DataDescription) -> EncoderConfig:
        """Return the model's configuration for these data."""
        config = super().config_of(description)
        return config if config.num_classes else config.replace(num_classes=1)  # before the data are known

    def loss(self, images: Tensor, labels: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """Return both losses of a batch and their weighted sum."""
        known = labels >= 0
        targets = self.one_hot(labels, images.dtype)
        if bool(known.all()):
            images, targets = mix(images, targets, self.augmentation)
        output = self.model(images, channels=channels)
        supervised = output.logits.sum() * 0.0
        if bool(known.any()):
            supervised = self.cross_entropy(output.logits[known], targets[known])
        total = self.supervised_weight * supervised + self.masked_weight * output.loss
        return {"loss": total, "masked_loss": output.loss, "supervised_loss": supervised}

    evaluate = Supervised.evaluate

    def finished_model(self) -> Encoder:
        """Return the encoder to save."""
        return encoder_of_joint(self.model)

    def classify(self, images: Tensor, channels: Tensor) -> Tensor:
        """Return the logits of images without masking."""
        if not self._evaluated_encoder:
            self._evaluated_encoder.append(encoder_of_joint(self.model).to(images.device).eval())
        return self._evaluated_encoder[0](images, channels=channels)

    def on_validation_epoch_start(self) -> None:
        """Reset the evaluation, which uses the current weights."""
        super().on_validation_epoch_start()
        self._evaluated_encoder.clear()


def encoder_of_joint(model: MaskedAutoencoder) -> Encoder:
    """Return an `Encoder` of unmasked images with the weights of a jointly trained model, including its head.

    Its pools are scaled by 1 − mask ratio if masked training summed the visible tokens only.
    """
    scale = 1.0 if model.config.masked_pool == "mean" else 1.0 - model.mask_ratio
    encoder = model.to_encoder(pool_scale=scale)
    if model.config.num_classes:
        encoder.head.load_state_dict(model.head.state_dict())
    return encoder.train(model.training)
