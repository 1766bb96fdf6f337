"""Callbacks that write checkpoints and learning curves during a training."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from cellvim.errors import OutputError
from cellvim.files import atomic_path, write_atomic


class Checkpoints(ModelCheckpoint):
    """Keep the state after the last epoch in ``checkpoints/last.ckpt``, unless its weights are not finite.

    Parameters
    ----------
    folder
        Folder of the run.
    every_n_train_steps
        Also save within epochs, for epochs that take hours.
    """

    def __init__(self, folder: str | Path, *, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=Path(folder) / "checkpoints",
            filename="last",
            save_top_k=1,
            monitor=None,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=None if every_n_train_steps else True,
            enable_version_counter=False,
        )
        self.last_good = ""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in trainer.lightning_module.parameters()):
            return
        # If the run is killed here, the last checkpoint stays complete. Only the first process of a training writes.
        writing = atomic_path(filepath) if trainer.is_global_zero else nullcontext(filepath)
        try:
            with writing as partial:
                super()._save_checkpoint(trainer, str(partial))
        except (OutputError, RuntimeError) as error:  # torch raises RuntimeError if its writer fails
            before = (
                f"The last one, {self.last_good}, is kept." if self.last_good else "There is no earlier checkpoint."
            )
            reason = str(error).splitlines()[0]
            failed = reason if isinstance(error, OutputError) else f"{filepath} cannot be written: {reason}."
            raise OutputError(f"{failed} {before}") from error
        self.last_good = filepath

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every ``every_n_train_steps`` steps, and after the current step if the training is to stop."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step_is_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch
        if pl_module.stops_now and step_is_complete:  # after the last batch of an epoch, in the next epoch
            self._save_checkpoint(trainer, str(Path(self.dirpath) / "last.ckpt"))
            raise KeyboardInterrupt


class LearningCurves(Callback):
    """Record losses, scores and learning rate of each epoch, and plot them when the training ends or fails.

    ``curves.json`` is a list with one dictionary per epoch, ``curves.png`` the plot. Checkpoints contain the epochs so
    far, so a resumed run plots all epochs.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.epochs: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}  # over the batches of the current epoch
        self._batches = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove epochs that a resumed run repeats."""
        self.epochs = [e for e in self.epochs if e["epoch"] < trainer.current_epoch]
        self._sums, self._batches = {}, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sum the training losses, for their mean over the epoch."""
        self._batches += 1
        for name, value in pl_module.last_losses.items():
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value.clone()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch, and update ``curves.json``."""
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        means = {
            f"train_{k}": float(trainer.strategy.reduce(v, reduce_op="mean")) / max(1, self._batches)
            for k, v in self._sums.items()
        }
        rate = max((g["lr"] for g in pl_module.optimizers().param_groups), default=0.0)
        self.epochs.append({"epoch": trainer.current_epoch, "lr": rate, **means, **figures})
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "curves.json", json.dumps(self.epochs, indent=1) + "\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot the curves."""
        if trainer.is_global_zero and self.epochs:
            draw_curves(self.epochs, self.folder / "curves.png")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Plot the epochs so far."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs so far, and the sums of the current one (in the first process)."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        return {"epochs": self.epochs, "sums": sums, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.epochs, self._sums = list(state_dict["epochs"]), dict(state_dict.get("sums", {}))
        self._batches = state_dict.get("batches", 0)


def draw_curves(epochs: list[dict[str, float]], picture: str | Path) -> None:
    """Plot losses, scores and learning rate against the epoch, and save the plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({k for e in epochs for k in e} - {"epoch", "lr"})
    losses = [n for n in names if n.endswith("loss")]
    scores = [n for n in names if not n.endswith("loss")]
    panels = [("loss", losses), *([("score", scores)] if scores else []), ("learning rate", ["lr"])]
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in shown:
            points = [(e["epoch"] + 1, e[name]) for e in epochs if name in e]
            label = name.replace("val_", "").replace("_", " ") if title == "score" else name.replace("_", " ")
            axes.plot(*zip(*points, strict=True), label=label, lw=1.5, marker="." if len(points) < 30 else None)
        axes.set(xlabel="epoch", title=f"validation {title}" if title == "score" else title)
        if title == "score":
            axes.set_ylim(0, 1)
        if len(shown) > 1:
            axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(picture) as partial:
        figure.savefig(partial, dpi=120)
