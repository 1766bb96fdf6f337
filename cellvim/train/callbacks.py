"""What a run writes down as it goes: checkpoints, and its learning curves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from cellvim.errors import OutputError
from cellvim.train.whole_files import written_whole


class Checkpoints(ModelCheckpoint):
    """Keep the last epoch's state in ``checkpoints/last.ckpt``, and never one whose weights are not finite.

    Parameters
    ----------
    folder
        Of the run.
    every_n_train_steps
        Save in the middle of epochs too; for epochs that take hours.
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
        partial = f"{filepath}.partial"  # a run that is killed here leaves the last checkpoint as it was
        try:
            super()._save_checkpoint(trainer, partial)
            if trainer.is_global_zero:
                os.replace(partial, filepath)
        except (OSError, RuntimeError) as error:  # torch raises the second when its writer fails
            Path(partial).unlink(missing_ok=True)
            before = f"The last one, {self.last_good}, is kept." if self.last_good else "No epoch was kept before."
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OutputError(f"The checkpoint {filepath} cannot be written: {reason}. {before}") from error
        self.last_good = filepath

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every so many steps, and when the training was asked to stop: then a step is whole."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch
        if pl_module.stops_now and whole:  # after the last batch of an epoch, in the next one
            self._save_checkpoint(trainer, str(Path(self.dirpath) / "last.ckpt"))
            raise KeyboardInterrupt


class LearningCurves(Callback):
    """Collect every epoch's figures, and draw them when training ends, however it ends.

    ``curves.json`` holds them as a list, one dictionary an epoch; ``curves.png`` shows them. They are part of
    checkpoints, so that a resumed run draws the whole curve.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.epochs: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}  # of the epoch's batches so far
        self._batches = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget epochs that a resumed run does again."""
        self.epochs = [e for e in self.epochs if e["epoch"] < trainer.current_epoch]
        self._sums, self._batches = {}, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the training losses, for their mean over the epoch."""
        self._batches += 1
        for name, value in pl_module.last_losses.items():
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value.clone()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch's figures."""
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        means = {
            f"train_{k}": float(trainer.strategy.reduce(v, reduce_op="mean")) / max(1, self._batches)
            for k, v in self._sums.items()
        }
        rate = max((g["lr"] for g in pl_module.optimizers().param_groups), default=0.0)
        self.epochs.append({"epoch": trainer.current_epoch, "lr": rate, **means, **figures})
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / "curves.json") as partial:
                partial.write_text(json.dumps(self.epochs, indent=1) + "\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        if trainer.is_global_zero and self.epochs:
            draw_curves(self.epochs, self.folder / "curves.png")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs so far, and what is known of the one that is under way (in the first process)."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        return {"epochs": self.epochs, "sums": sums, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.epochs, self._sums = list(state_dict["epochs"]), dict(state_dict.get("sums", {}))
        self._batches = state_dict.get("batches", 0)


def draw_curves(epochs: list[dict[str, float]], picture: str | Path) -> None:
    """Draw losses, scores and learning rate against the epoch, and save the picture."""
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
    with written_whole(picture) as partial:
        figure.savefig(partial, dpi=120)
