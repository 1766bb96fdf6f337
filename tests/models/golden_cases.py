"""The published implementation's numbers (tests/golden), and our models with its weights.

It needs torch and numpy alone, so that ``python -m benchmarks.gpu_check`` runs on a bare GPU machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from cellvim.models.checkpoints import load_reference
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ENCODER_CASES = sorted(
    p.stem
    for p in GOLDEN.glob("[a-z]*.npz")
    if json.loads(p.with_suffix(".json").read_text())["cls"] == "VisionMamba" and "_hcs_" not in p.stem
)


def read_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    description = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        return description, {k: torch.from_numpy(file[k]) for k in file}


def prefixes(name: str) -> list[str]:
    """ "sub/" for the cases that also have a subset of the channels."""
    shapes = json.loads((GOLDEN / f"{name}.json").read_text())["input_shapes"]
    return [key.removesuffix("x") for key in shapes]


def config_of(description: dict) -> EncoderConfig:
    """The published constructor's arguments in our names."""
    kwargs, source = description["kwargs"], description["reference"]
    ssm = kwargs.get("ssm_cfg") or {}
    pooled = "fast" in source
    per_channel = "channel_wise" in source
    class_token = "none"
    if kwargs.get("if_cls_token"):
        class_token = "middle"
    return EncoderConfig(
        image_size=kwargs["img_size"],
        patch_size=kwargs["patch_size"],
        patch_stride=kwargs["stride"],
        in_channels=kwargs.get("channels", kwargs.get("in_chans")),
        embed_dim=kwargs["embed_dim"],
        depth=kwargs["depth"],
        num_classes=kwargs.get("num_classes", 0),
        tokens="per_channel" if per_channel else "joint",
        scan_order=kwargs.get("scan_order", "Channel-First").lower().replace("-", "_"),
        scan_path=kwargs.get("scanpath_type", "rowwise"),
        pool=kwargs.get("collapse_method", "mean") if pooled else "none",
        pool_axes=2 if "2dcompress" in source else 1,
        alternate=pooled and kwargs.get("rotate_every_block", True),
        pool_scale=kwargs.get("scaling_factor", 1.0),
        input_norm="rms" if kwargs.get("rms_norm", False) else "layer",
        ssm_norm="layer" if kwargs.get("use_norm_after_ssm", True) else "none",
        class_token=class_token,
        readout={"mean": "mean", "max": "max", "all": "tokens"}[kwargs.get("final_pool_type", "mean")],
        channel_sampling="sorted" if kwargs.get("sort_channels", True) else "unsorted",
        d_state=ssm.get("d_state", 16),
        d_conv=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        dt_rank=ssm.get("dt_rank"),
        projection_bias=ssm.get("bias", False),
        layer_scale=kwargs.get("init_layer_scale"),
        drop_path_rate=kwargs.get("drop_path_rate", 0.0),
        out_indices=tuple(kwargs.get("out_indices", ())),
        mask_reverse="reference",
    )


def weights_of(arrays: dict) -> dict[str, torch.Tensor]:
    return {k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")}


def load_model(description: dict, arrays: dict) -> Encoder:
    return load_reference(Encoder(config_of(description)).eval(), weights_of(arrays))


def subset(images: torch.Tensor, model: Encoder) -> list[int] | None:
    count = images.shape[1]
    return None if count == model.config.in_channels else list(range(count))
