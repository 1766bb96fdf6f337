"""How weights are updated: optimiser, learning rates, weight decay, and which parameters share them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from cellvim.errors import InputError

_POSITIONS = ("pos_embed", "cls_token")
_BLOCK = re.compile(r"^(?:.*\.)?layers\.(\d+)\.")


@dataclass
class Optimization:
    """Choices of the optimiser and its schedules.

    Parameters
    ----------
    optimizer
        "adamw", or "sgd" (the linear probe's).
    lr
        Learning rate of a step over ``lr_batch`` images; scaled linearly to the batch that is used.
    lr_batch
        See ``lr``.
    final_lr, warmup_lr
        Where the cosine ends and the warm-up begins; not scaled.
    warmup_epochs
        Epochs of linear warm-up.
    weight_decay, final_weight_decay
        Cosine from one to the other over the whole training; constant when the second is None. Not applied to biases
        and other parameters of one dimension.
    decay_positions
        Apply it to position embedding and class token too.
    betas, momentum
        Of AdamW, of SGD.
    layer_decay
        Factor on the learning rate for every **two** blocks that lie between a parameter and the head.
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
        """Return the optimiser over the parameters of ``model`` that learn; schedules are set step by step."""
        groups = parameter_groups(model, self)
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas))


def parameter_groups(model: nn.Module, choices: Optimization) -> list[dict[str, Any]]:
    """Group the parameters that learn by what they share.

    Returns
    -------
    list of dict
        ``params``, ``names``, ``lr_scale`` (by layer decay), and ``decayed``: whether weight decay applies.

    References
    ----------
    Bao et al., BEiT (2022), appendix: layer-wise decay; here a step is two blocks, rows and columns.
    """
    depth = 1 + max((int(m[1]) for name, _ in model.named_parameters() if (m := _BLOCK.match(name))), default=-1)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.rsplit(".", 1)[-1]
        decayed = parameter.ndim > 1 and own != "bias" and (choices.decay_positions or own not in _POSITIONS)
        scale = choices.layer_decay ** _steps_below_head(name, depth)
        group = groups.setdefault((scale, decayed), {"params": [], "names": [], "lr_scale": scale, "decayed": decayed})
        group["params"].append(parameter)
        group["names"].append(name)
        group["weight_decay"] = choices.weight_decay if decayed else 0.0
    return list(groups.values())


def _steps_below_head(name: str, depth: int) -> int:
    """How many steps of two blocks lie between a parameter and the head; blocks are counted from the last one."""
    if match := _BLOCK.match(name):
        return (depth - 1 - int(match[1])) // 2 + 1
    is_input = "patch_embed." in name or name.rsplit(".", 1)[-1] in _POSITIONS
    return depth // 2 + 1 if is_input else 0
