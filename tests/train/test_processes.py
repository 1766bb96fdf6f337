"""Several processes train like one with their total batch size, and stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cellvim.models.registry import load_checkpoint
from cellvim.train.batches import EpochBatches

STILL = [  # only channels are drawn, identically in all processes
    "--model.changes", "{depth: 2, embed_dim: 16, drop_path_rate: 0.0, channel_sampling: sorted}",
    "--model.augmentation.flips", "false", "--model.augmentation.vertical_flips", "false",
    "--model.augmentation.quarter_turns", "false", "--model.augmentation.intensity", "0",
    "--model.optimization.warmup_epochs", "0", "--model.optimization.lr", "1e-2",
    "--data.crop_size", "16", "--data.margin", "0", "--data.val", "0.25", "--data.test", "0.25",
    "--label", "compound", "--epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]


def run(plate, output, *options, path=""):
    """Run `cellvim train`; Lightning starts the other processes with the same command line."""
    return subprocess.run(
        [sys.executable, "-m", "cellvim.cli", "train", str(plate), "--output", str(output), *STILL, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(labelled_plate, tmp_path):
    """Same crops per step, learning rate and channels: the same weights except for the order of sums."""
    one = run(labelled_plate, tmp_path / "one", "--data.batch_size", "10")
    two = run(labelled_plate, tmp_path / "two", "--data.batch_size", "5", *TWO)
    assert one.returncode == two.returncode == 0, two.stderr
    assert two.stdout.count("Next: cellvim embed") == 1  # only one process prints
    models = [load_checkpoint(tmp_path / name / "model.safetensors").state_dict() for name in ("one", "two")]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    del metrics[0]["seconds"], metrics[1]["seconds"]
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():  # every held-out crop is counted once
        assert metrics[1][name] == pytest.approx(value, rel=1e-4), name
    curves = [json.loads((tmp_path / name / "curves.json").read_text()) for name in ("one", "two")]
    assert [e["train_loss"] for e in curves[1]] == pytest.approx([e["train_loss"] for e in curves[0]], rel=1e-4)
    assert curves[0][0]["lr"] == curves[1][0]["lr"]
    tables = [(tmp_path / name / "channels.csv").read_text() for name in ("one", "two")]
    assert tables[0] == tables[1]
    assert not list((tmp_path / "two").rglob("*.partial"))


@pytest.mark.slow
def test_a_non_finite_loss_in_one_process_stops_all(labelled_plate, tmp_path):
    (tmp_path / "poison.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n\n"
        "class Poison(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n"
        "        if trainer.global_rank == 1 and trainer.current_epoch == 1 and batch_idx == 1:\n"
        "            pl_module.model.head.bias.data.fill_(float('nan'))\n"
    )
    ended = run(
        labelled_plate, tmp_path / "run", "--data.batch_size", "5", *TWO, "--trainer.callbacks", "poison.Poison",
        path=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 2
    [error] = [line for line in ended.stderr.splitlines() if "Error" in line]  # only one process prints
    assert "The loss is nan in epoch 1, batch 1, process 1 (crops row" in error
    assert "last.ckpt" in error
    assert "Traceback" not in ended.stderr
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()


GROUPS = np.repeat([0, 1, 2], [23, 10, 3])


def test_an_epoch_has_every_crop_once_in_its_own_order():
    one = EpochBatches(GROUPS, 4, seed=1)
    batches = list(one)
    assert sorted(i for b in batches for i in b) == list(range(36))
    assert all(len({GROUPS[i] for i in b}) == 1 for b in batches)
    assert len(one) == len(batches)
    one.set_epoch(1)
    assert list(one) != batches
    dropped = EpochBatches(GROUPS, 4, seed=1, drop_last=True)
    assert [len(b) for b in dropped].count(4) == 7  # the only batch of the third group is incomplete
    assert len(dropped) == 8


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_each_batch_without_duplicates(world):
    """Together they have the crops of each batch of one process with the total batch size."""
    single = list(EpochBatches(GROUPS, 2 * world, seed=1, drop_last=True))
    parts = [EpochBatches(GROUPS, 2, seed=1, drop_last=True, rank=r, world=world) for r in range(world)]
    shared = [list(p) for p in parts]
    assert {len(s) for s in shared} == {len(single)} == {len(p) for p in parts}
    for batch, *own in zip(single, *shared, strict=True):
        assert len({len(o) for o in own}) == 1  # the mean over processes is the mean over crops
        together = [i for o in own for i in o]
        if len(batch) >= world:
            assert len(set(together)) == len(together) == len(batch) - len(batch) % world
        assert set(together) <= set(batch)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_evaluate_every_crop_once(world):
    parts = [EpochBatches(GROUPS, 4, shuffle=False, rank=r, world=world) for r in range(world)]
    together = [i for p in parts for b in p for i in b]
    assert sorted(together) == list(range(36))
    assert [len(list(p)) for p in parts] == [len(p) for p in parts]
