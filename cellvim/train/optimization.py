"""Optimiser, parameter groups, and schedules of learning rate and weight decay."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from cellvim.errors import InputError

_POSITIONS = ("pos_embed", "cls_token")
_BLOCK = re.compile(r"^(?:.*\.)?layers\.(\d+)\.")


@dataclass
class Optimization:
    """Settings of the optimiser and its schedules.

    Parameters
    ----------
    optimizer
        "adamw" or "sgd".
    lr
        Learning rate for a step over ``lr_batch`` images; scaled linearly to the batch size.
    lr_batch
        Reference batch size of ``lr``.
    final_lr, warmup_lr
        Learning rates at the end of the cosine and at the start of the warm-up; not scaled.
    warmup_epochs
        Epochs of linear warm-up.
    weight_decay, final_weight_decay
        Weight decay at the start and the end of the training, with a cosine between; constant if the second is None.
        Not applied to biases and other one-dimensional parameters.
    decay_positions
        Whether weight decay applies to the position embedding and the class token.
    betas, momentum
        Coefficients of AdamW and of SGD.
    layer_decay
        Factor on the learning rate for every **two** blocks between a parameter and the head.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_batch: int = 256
    final_lr: float = 1e-6
    warmup_lr: float = 0.0
    warmup_epochs: float = 10
    weight_decay: float = 0.04
    final_weight_decay: float | None = None
    decay_positions: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "lr_batch"):
            if not getattr(self, name) > 0:
                raise InputError(f"optimization.{name} is {getattr(self, name)}; expected a number above 0.")
        for name in ("final_lr", "warmup_lr", "warmup_epochs", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optimization.{name} is {getattr(self, name)}; expected 0 or more.")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"optimization.layer_decay is {self.layer_decay}; expected above 0 and at most 1.")

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of the trainable parameters of ``model``."""
        groups = parameter_groups(model, self)
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas))

    def schedules(self, steps: int, steps_per_epoch: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the learning rate and the weight decay of each step, (steps,) float64 each."""
        rates = cosine_schedule(
            self.lr * batch_size / self.lr_batch,
            self.final_lr,
            steps,
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
            warmup_from=self.warmup_lr,
        )
        final = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        return rates, cosine_schedule(self.weight_decay, final, steps)


def parameter_groups(model: nn.Module, settings: Optimization) -> list[dict[str, Any]]:
    """Group the trainable parameters by ``lr_scale`` (from layer decay) and ``decayed`` (whether weight decay applies).

    References
    ----------
    Bao et al., BEiT (2022), appendix: layer-wise decay; here one layer is two blocks, rows and columns.
    """
    depth = 1 + max((int(m[1]) for name, _ in model.named_parameters() if (m := _BLOCK.match(name))), default=-1)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.rsplit(".", 1)[-1]
        decayed = parameter.ndim > 1 and own != "bias" and (settings.decay_positions or own not in _POSITIONS)
        if match := _BLOCK.match(name):
            layers = (depth - 1 - int(match[1])) // 2 + 1  # from here to the head, of two blocks each
        else:
            layers = depth // 2 + 1 if "patch_embed." in name or own in _POSITIONS else 0
        scale = settings.layer_decay**layers
        group = groups.setdefault((scale, decayed), {"params": [], "names": [], "lr_scale": scale, "decayed": decayed})
        group["params"].append(parameter)
        group["names"].append(name)
        group["weight_decay"] = settings.weight_decay if decayed else 0.0
    return list(groups.values())


def cosine_schedule(
    first: float, last: float, steps: int, *, warmup_steps: int = 0, warmup_from: float = 0.0
) -> np.ndarray:
    """Return one value per step, (steps,) float64: a linear warm-up to ``first``, then half a cosine to ``last``.

    ``steps`` includes the warm-up, which starts at ``warmup_from``; ``last`` is reached one step after the end.

    References
    ----------
    Loshchilov & Hutter, SGDR (2017), §3; Goyal et al., Accurate, Large Minibatch SGD (2017), §2.2.
    """
    warmup_steps = min(warmup_steps, steps)
    warmup = np.linspace(warmup_from, first, warmup_steps)
    progress = np.arange(steps - warmup_steps) / max(1, steps - warmup_steps)
    return np.concatenate([warmup, last + 0.5 * (first - last) * (1 + np.cos(np.pi * progress))])
