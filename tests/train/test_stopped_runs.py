"""A run stopped by Ctrl-C or a full disk keeps its checkpoint, and resumes to the same weights."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from test_run import QUICK
from test_training import assert_same

from cellvim.cli import main
from cellvim.models.registry import load_checkpoint

RUN = [*QUICK, "--epochs", "2", "--data.batch_size", "8"]


def train(plate, output, *options) -> int:
    return main(["train", str(plate), "--label", "compound", "--output", str(output), *RUN, *options])


def learned(folder):
    return load_checkpoint(folder / "model.safetensors").state_dict()


@pytest.fixture
def ctrl_c(tmp_path, monkeypatch):
    """Options for a callback that sends Ctrl-C once, in the second epoch."""
    name = f"ctrl_c_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(
        "import os, signal\nfrom pathlib import Path\nfrom lightning.pytorch.callbacks import Callback\n\n"
        "class CtrlC(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n"
        f"        done = Path({str(tmp_path / 'pressed')!r})\n"
        "        if trainer.current_epoch == 1 and batch_idx == 1 and not done.exists():\n"
        "            done.touch()\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield ["--trainer.callbacks", f"{name}.CtrlC"]
    sys.modules.pop(name, None)


def test_ctrl_c_keeps_a_checkpoint_in_the_middle_of_an_epoch(labelled_plate, tmp_path, ctrl_c, capsys):
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    assert train(labelled_plate, uninterrupted) == 0
    capsys.readouterr()
    assert train(labelled_plate, run, *ctrl_c) == 130
    error = capsys.readouterr().err
    assert "Stopping after this batch" in error
    assert f"Resume with: cellvim train --resume --output {run}" in " ".join(error.split())
    assert not (run / "model.safetensors").exists() and not list(run.rglob("*.partial*"))
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["cellvim"]["loader"] == {"epoch": 1, "batches": 2}
    assert main(["train", "--resume", "--output", str(run)]) == 0
    assert_same(learned(run), learned(uninterrupted))
    curves = [json.loads((folder / "curves.json").read_text()) for folder in (run, uninterrupted)]
    assert len(curves[0]) == len(curves[1]) == 2
    assert curves[0] == curves[1]  # the mean over the epoch includes the batches before and after


def test_a_checkpoint_of_another_training_is_rejected(labelled_plate, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(labelled_plate, run) == 0
    before = (run / "config.yaml").read_text()
    capsys.readouterr()
    options = ["--resume", "--model.optimization.lr", "0.5", "--data.batch_size", "4", "--data.test", "0.3"]
    assert train(labelled_plate, run, *options) == 2
    error = " ".join(capsys.readouterr().err.split())
    for name in (
        "model.optimization.lr is 0.001 there and 0.5 here",
        "crops a step is 8 there and 4 here",
        "data.test",
    ):
        assert name in error
    assert (run / "config.yaml").read_text() == before
    assert train(labelled_plate, run, "--resume", "--epochs", "3") == 0  # a longer training is allowed, with a warning
    assert "length of the training has changed" in capsys.readouterr().err
    assert len(json.loads((run / "curves.json").read_text())) == 3
    (run / "checkpoints" / "last.ckpt").write_bytes(b"no checkpoint")
    assert train(labelled_plate, run, "--resume") == 2
    assert "is not a complete checkpoint" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_keeps_the_last_checkpoint_complete(labelled_plate, tmp_path, monkeypatch, capsys):
    from lightning.pytorch import Trainer

    save, saved = Trainer.save_checkpoint, []

    def fill(self, filepath, *args, **kwargs):
        if saved:
            with open(filepath, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(filepath)
        return save(self, filepath, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", fill)
    assert train(labelled_plate, tmp_path / "run") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "last.ckpt cannot be written: No space left on device. The last one" in error
    assert "Traceback" not in error
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_resuming_never_executes_code_from_a_checkpoint(labelled_plate, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"cellvim": {"settings": Payload()}}, run / "checkpoints" / "last.ckpt")
    assert train(labelled_plate, run, "--resume") == 2
    error = capsys.readouterr().err
    assert "last.ckpt" in error.strip().splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "executed").exists()
