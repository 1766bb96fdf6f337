"""Which model embeds, where, and whether it goes with the plates: channels, classes, pixels and units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellvim.channels import match_channels
from cellvim.errors import InputError, ModelError, listing

if TYPE_CHECKING:
    from cellvim.embedding.plan import PlatePlan
    from cellvim.models.encoder import Encoder


def choose_encoder(
    model: str | Path | Encoder, channels: list[str], *, image_size: int | tuple[int, int], seed: int
) -> tuple[Encoder, str]:
    """Return the encoder and what to call it: given, loaded from a file, or made by name with random weights."""
    if not isinstance(model, str | Path):
        return model, "the given model"
    path = Path(model)
    if path.exists() or path.suffix in (".safetensors", ".pth", ".ckpt"):
        from cellvim.models.registry import load_checkpoint

        return load_checkpoint(path), path.name
    import torch

    from cellvim.models.checkpoints import shipped_models

    if str(model) in shipped_models():
        from cellvim.models.registry import load_checkpoint

        return load_checkpoint(shipped_models()[str(model)]), str(model)

    from cellvim.models.registry import create_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changes = {"in_channels": len(channels), "channel_names": tuple(channels), "image_size": image_size}
        return create_model(str(model), **changes, num_classes=0), str(model)


def square_input(encoder: Encoder, model_name: str, unit: str) -> int:
    """Return the side of what the model is built for.

    Raises
    ------
    ModelError
        It is not square.
    """
    height, width = encoder.config.image_height, encoder.config.image_width
    if height != width:
        raise ModelError(
            f"{model_name} is built for {height} x {width} pixels, but a {unit} is square. "
            "Use --unit field or another model."
        )
    return height


def channel_ids(encoder: Encoder, meanings: list[str], model_name: str) -> list[int]:
    """Return the model's numbers for the channels, matched by name."""
    config = encoder.config
    if config.readout == "tokens":
        raise ModelError(f"{model_name} gives every token (readout='tokens'); an embedding needs one row a unit.")
    if config.channel_names is None:
        raise ModelError(
            f"{model_name} does not say what its {config.in_channels} channels are, so they cannot be matched by name. "
            "Save it with channel_names in its configuration."
        )
    ids = match_channels(meanings, list(config.channel_names), where=model_name)
    if config.tokens == "joint" and sorted(ids) != list(range(config.in_channels)):
        raise ModelError(
            f"{model_name} needs all of its channels ({listing(config.channel_names)}); the plate gives "
            f"{listing(meanings)}. A model with per-channel tokens takes any of them."
        )
    return ids


def class_names_of(encoder: Encoder, model_name: str) -> tuple[str, ...]:
    """Return the names of the classes that the model learned."""
    count = encoder.config.num_classes
    if not count or not encoder.is_trained:
        raise ModelError(f"{model_name} learned no classes, so --probabilities has none. Train one: `cellvim train`.")
    names = tuple(map(str, getattr(encoder, "card", {}).get("class_names", ())))
    return names if len(names) == count else tuple(f"class {i}" for i in range(count))


def unlike_training(
    encoder: Encoder, model_name: str, plans: Sequence[PlatePlan], unit: str, input_px: int | None
) -> Iterator[str]:
    """Yield what is otherwise than in the model's training and changes what it sees, a sentence each."""
    card = getattr(encoder, "card", {})
    if card.get("unit", unit) != unit:
        yield f"{model_name} learned from crops of the unit {card['unit']}; this embeds by {unit}."
    learned = card.get("pixel_size_um")
    for plan in plans:
        pixel = plan.cutting.um_per_px or plan.pixel_size_um
        if not learned or pixel is None:
            continue
        seen = pixel if plan.crop_px is None else pixel * plan.crop_px / input_px
        if not 0.8 < seen / learned < 1.25:
            yield (
                f"{model_name} learned from pixels of {learned:.3g} µm and sees pixels of {seen:.3g} µm of "
                f"{plan.name}. --um-per-px {learned:.3g} makes them alike."
            )


def usable_device(device: str) -> str:
    """Return the device that is meant.

    Raises
    ------
    InputError
        It is not known, or not there.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise InputError(f"The device '{device}' is not known; expected auto, cpu, cuda, cuda:1, mps or xpu.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        reason = reason if len(reason) < 160 else f"this PyTorch does not run on {kind} here"
        raise InputError(f"The device '{device}' cannot be used ({reason}). Leave --device out, or use cpu.") from error
    return device


def usable_precision(precision: str, device: str) -> str:
    """Return the precision that is meant: float32 or bfloat16."""
    if precision != "auto":
        return precision
    import torch

    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
