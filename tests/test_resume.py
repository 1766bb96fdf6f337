"""Interrupted, parallel and sharded runs write the same bytes, and errors are reported."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from synthetic_plate import break_chunk, draw_field, write_plate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from kill_test import kill_often, tree_sha256

import cellvim
from cellvim.cli import main
from cellvim.embedding import plan_embedding, run_embedding
from cellvim.embedding import run as embedding
from cellvim.embedding.encode import FieldEmbedder
from cellvim.errors import InputError, Interrupted, OutputError

CHANNELS = ["GFP", "DNA"]
N_FIELDS = 6

pytestmark = pytest.mark.filterwarnings("ignore:.*UNTRAINED")


@pytest.fixture(scope="module")
def images():
    return {f"A0{w}": [draw_field(10 * w + s, 3 + s) for s in range(2)] for w in (1, 2, 3)}


@pytest.fixture(scope="module")
def plate(images, tmp_path_factory):
    return write_plate(tmp_path_factory.mktemp("plate") / "plate.zarr", images, CHANNELS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    torch.manual_seed(0)
    config = cellvim.EncoderConfig(
        image_size=32, patch_size=8, in_channels=2, channel_names=("DNA", "GFP"), embed_dim=16, depth=2, num_classes=0
    )
    cellvim.save_checkpoint(cellvim.Encoder(config), path)
    return path


@pytest.fixture(scope="module")
def plan(plate, weights):
    return plan_embedding(plate, model=weights)


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """The output of an uninterrupted run, which all others must equal."""
    output = tmp_path_factory.mktemp("whole") / "out.zarr"
    run_embedding(plan, output)
    return output


def _stop_after(n):
    def stop(done, total, rows):
        if done == n:
            raise KeyboardInterrupt

    return stop


def _only(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.name.endswith(".intensities")}


class TestResuming:
    @pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 4])
    def test_after_ctrl_c_to_the_same_bytes(self, plan, whole, tmp_path, n):
        with pytest.raises(Interrupted, match=f"{n} of 6 fields are done and kept in .*out.zarr.partial. The same"):
            run_embedding(plan, tmp_path / "out.zarr", progress=_stop_after(n))
        assert _only(tmp_path) == {"out.zarr.partial"}
        seen = []
        summary = run_embedding(plan, tmp_path / "out.zarr", progress=lambda *numbers: seen.append(numbers))
        assert seen[0][:2] == (n, 6) and len(seen) == 1 + 6 - n and summary.n_resumed == n
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)
        assert _only(tmp_path) == {"out.zarr", "out.zarr.manifest.json"}

    @pytest.mark.parametrize(
        "moment",
        [
            "output.write_records",
            pytest.param("output.write_embeddings", marks=pytest.mark.slow),
            pytest.param("ledger.Ledger.delete", marks=pytest.mark.slow),
        ],
    )
    def test_when_stopped_at_the_end(self, plan, whole, tmp_path, monkeypatch, moment):
        """While the output is written, before its manifest is written, and while the ledger is removed."""

        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(f"cellvim.embedding.{moment}", stop)
        with pytest.raises(KeyboardInterrupt):
            run_embedding(plan, tmp_path / "out.zarr")
        monkeypatch.undo()
        summary = run_embedding(plan, tmp_path / "out.zarr")
        assert summary.n_units == 21 and summary.n_resumed == N_FIELDS
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)
        assert _only(tmp_path) == {"out.zarr", "out.zarr.manifest.json"}
        with pytest.raises(OutputError, match="exists already"):
            run_embedding(plan, tmp_path / "out.zarr")

    @pytest.mark.parametrize("left", ["marker", "an empty folder"])
    def test_when_killed_while_it_clears_up(self, plate, weights, tmp_path, monkeypatch, left):
        """The ledger is removed after the manifest was written; the same command then only removes the rest."""
        from cellvim.embedding.ledger import RUN

        output, partial = tmp_path / "out.zarr", tmp_path / "out.zarr.partial"
        command = ["embed", str(plate), "-o", str(output), "--model", str(weights)]
        monkeypatch.setattr("cellvim.embedding.ledger.Ledger.delete", lambda self: None)
        assert main(command) == 0
        monkeypatch.undo()
        whole = tree_sha256(output)
        (partial / RUN).unlink()
        if left == "an empty folder":
            shutil.rmtree(partial)
            partial.mkdir()
        assert main(command) == 0
        assert tree_sha256(output) == whole
        assert _only(tmp_path) == {"out.zarr", "out.zarr.manifest.json"}
        assert main(command) == 2  # it exists already

    def test_torn_rows_are_embedded_again(self, plan, whole, tmp_path):
        with pytest.raises(Interrupted):
            run_embedding(plan, tmp_path / "out.zarr", progress=_stop_after(4))
        torn = sorted((tmp_path / "out.zarr.partial").glob("fields-*/00000/*.rows"))[1]
        torn.write_bytes(torn.read_bytes()[:-40])
        run_embedding(plan, tmp_path / "out.zarr")
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)

    def test_another_model_or_crop_is_refused(self, plan, plate, weights, tmp_path):
        with pytest.raises(Interrupted):
            run_embedding(plan, tmp_path / "out.zarr", progress=_stop_after(2))
        other = plan_embedding(plate, model=weights, crop_size=48, channels=["DNA"])
        with pytest.raises(OutputError, match="Differences") as error:
            run_embedding(other, tmp_path / "out.zarr")
        assert "plates.00000.crop_px was 32, is 48" in str(error.value) and "channels.GFP" in str(error.value)
        assert len(list((tmp_path / "out.zarr.partial").glob("fields-*/*/*.rows"))) == 2  # nothing is lost
        fewer = plan_embedding(plate, model=weights, wells=["A01"])
        with pytest.raises(OutputError, match="wells/fields of plate: 6 fields before, 2 now") as error:
            run_embedding(fewer, tmp_path / "out.zarr")
        assert "sha256" not in str(error.value)
        assert run_embedding(other, tmp_path / "out.zarr", overwrite=True).n_units == 21

    @pytest.mark.slow
    def test_an_interrupted_overwrite_resumes_without_the_option(self, plan, whole, plate, weights, tmp_path):
        run_embedding(plan_embedding(plate, model=weights, wells=["A01"]), tmp_path / "out.zarr")
        before = tree_sha256(tmp_path / "out.zarr")
        with pytest.raises(Interrupted, match="without --overwrite"):
            run_embedding(plan, tmp_path / "out.zarr", overwrite=True, progress=_stop_after(3))
        assert tree_sha256(tmp_path / "out.zarr") == before
        assert run_embedding(plan, tmp_path / "out.zarr").n_resumed == 3
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)

    @pytest.mark.slow
    def test_batch_size_and_device_may_change(self, plate, weights, whole, tmp_path):
        with pytest.raises(Interrupted):
            run_embedding(plan_embedding(plate, model=weights, batch_size=2), tmp_path / "o", progress=_stop_after(3))
        run_embedding(plan_embedding(plate, model=weights, batch_size=5), tmp_path / "o")
        assert tree_sha256(tmp_path / "o") == tree_sha256(whole)

    def test_a_full_disk_keeps_what_is_done(self, plan, whole, tmp_path, monkeypatch):
        from cellvim.files import LocalStorage

        write, n = LocalStorage.write, 0

        def full(self, name, content):
            nonlocal n
            n += name.endswith(".rows")
            if name.endswith(".rows") and n > 3:
                raise OutputError(f"{self.name} cannot be written: {os.strerror(errno.ENOSPC)}.")
            write(self, name, content)

        monkeypatch.setattr(LocalStorage, "write", full)
        with pytest.raises(OutputError, match="No space left"):
            run_embedding(plan, tmp_path / "out.zarr")
        monkeypatch.undo()
        assert run_embedding(plan, tmp_path / "out.zarr").n_resumed == 3
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)

    def test_too_little_space_for_an_h5ad_is_an_error_before_writing(self, plan, tmp_path, monkeypatch):
        """HDF5 ends the process when a disk is full; rows are kept, and the same command resumes the run."""
        from collections import namedtuple

        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2_000_000, 1_000_000, 1_000_000))
        with pytest.raises(OutputError, match=r"about \d+ MB are needed, and 1\.0 MB are free"):
            run_embedding(plan, tmp_path / "out.h5ad")
        assert not (tmp_path / "out.h5ad").exists()
        monkeypatch.undo()
        assert run_embedding(plan, tmp_path / "out.h5ad").n_resumed == N_FIELDS
        size = (tmp_path / "out.h5ad").stat().st_size
        from cellvim.embedding.output import Layout, hdf5_size

        rows = anndata.read_h5ad(tmp_path / "out.h5ad")
        layout = Layout({name: None for name in rows.obs}, {"spatial": (2, np.dtype(np.float64))}, rows.n_obs)
        assert 0.7 < hdf5_size(layout, rows.n_vars) / size < 2


def test_the_batch_size_of_an_interrupted_run_is_used_if_it_matters(plan):
    """On a GPU, where the free memory determines the batch size, and the batch size the last digits."""
    from dataclasses import replace

    assert plan.batch_size is None and plan.identity["batch_size"] == "any"
    automatic = embedding.with_batch_size_of(None, plan).batch_size
    assert 1 <= automatic <= 64
    assert embedding.with_batch_size_of({"identity": plan.identity}, plan).batch_size == automatic
    other = {"identity": {**plan.identity, "batch_size": 7}}
    assert embedding.with_batch_size_of(other, plan).batch_size == 7
    named = replace(plan, batch_size=3)
    assert embedding.with_batch_size_of(other, named).batch_size == 3


class TestParallel:
    def test_two_processes_to_the_same_bytes(self, plan, whole, tmp_path):
        run_embedding(plan, tmp_path / "out.zarr", workers=2)
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)
        [session] = json.loads((tmp_path / "out.zarr.manifest.json").read_text())["sessions"]
        assert (session["workers"], session["fields"], session["rows"]) == (2, 6, 21)

    def test_three_shards_in_any_order_to_the_same_bytes(self, plan, whole, tmp_path):
        for i in (3, 1):
            summary = run_embedding(plan, tmp_path / "out.zarr", shard=f"{i}/3")
            assert f"Shard {i}/3" in str(summary) and summary.n_waiting and summary.remarks()[1:] == []
            assert not (tmp_path / "out.zarr").exists()
        assert run_embedding(plan, tmp_path / "out.zarr", shard="2/3").n_units == 21
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)
        assert run_embedding(plan, tmp_path / "out.zarr", shard="2/3").n_units == 21  # requeued: nothing to do

    def test_through_a_url_to_the_same_bytes(self, plan, whole, tmp_path):
        """fsspec's local file system represents an object store."""
        output = (tmp_path / "out.zarr").as_uri()
        run_embedding(plan, output, shard="1/2")
        run_embedding(plan, output, shard="2/2")
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)
        assert _only(tmp_path) == {"out.zarr", "out.zarr.manifest.json"}

    def test_shards_that_name_another_format_are_refused(self, plan, tmp_path):
        run_embedding(plan, tmp_path / "out", shard="1/2", format="h5ad")
        with pytest.raises(OutputError, match=r"format was h5ad, is zarr.*--overwrite"):
            run_embedding(plan, tmp_path / "out", shard="2/2")
        with pytest.raises(OutputError, match="spatialdata was False, is True"):
            run_embedding(plan, tmp_path / "out", shard="2/2", format="h5ad", spatialdata=True)
        run_embedding(plan, tmp_path / "out", shard="2/2", format="h5ad")
        assert anndata.read_h5ad(tmp_path / "out").n_obs == 21
        with pytest.raises(OutputError, match="exists already"):
            run_embedding(plan, tmp_path / "out", shard="2/2")

    def test_status_shows_that_other_shards_are_left(self, plan, tmp_path, capsys):
        summary = run_embedding(plan, tmp_path / "out.zarr", shard="1/6")
        assert "5 fields of other shards are left" in str(summary)
        assert main(["status", str(tmp_path / "out.zarr")]) == 0
        out = capsys.readouterr().out
        assert "waiting for other shards, which have 5 fields left" in out and "was stopped" not in out
        assert "1 field in " in out
        with pytest.raises(Interrupted):
            run_embedding(plan, tmp_path / "out.zarr", shard="2/2", progress=_stop_after(1))
        assert main(["status", str(tmp_path / "out.zarr")]) == 0
        assert "was stopped" in capsys.readouterr().out

    def test_shards_do_not_overwrite_each_other(self, plan, tmp_path):
        with pytest.raises(InputError, match="discard the rows of the others"):
            run_embedding(plan, tmp_path / "out.zarr", shard="1/2", overwrite=True)

    def test_batches_across_fields_give_the_same_rows(self, plan, whole):
        """As on a GPU; here on a CPU under another name, whose kernels give the same rows."""
        from dataclasses import replace

        packed = replace(plan, device="cpu:0", batch_size=4)
        rows = np.concatenate([rows.embeddings for _, rows in FieldEmbedder(packed).embed(packed.all_keys())])
        np.testing.assert_array_equal(rows, anndata.read_zarr(whole).X)

    @pytest.mark.slow
    def test_ray_to_the_same_bytes(self, plan, whole, tmp_path):
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'cellvim[ray]'")
        run_embedding(plan, tmp_path / "out.zarr", engine="ray", workers=2)
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(whole)


class TestKilled:
    def _kill(self, plate, weights, tmp_path, kills, *options):
        command = ["embed", str(plate), "-o", str(tmp_path / "out.zarr"), "--model", str(weights), *options]
        return kill_often(command, tmp_path / "out.zarr", kills)

    def test_five_times_to_the_same_bytes(self, plate, weights, tmp_path):
        result = self._kill(plate, weights, tmp_path, 5)
        assert len(result["kills"]) == 5 and result["equal"], result

    @pytest.mark.slow
    def test_a_hundred_times_to_the_same_bytes(self, plate, weights, tmp_path):
        result = self._kill(plate, weights, tmp_path, 100)
        assert len(result["kills"]) == 100 and result["equal"], result

    @pytest.mark.slow
    def test_with_workers(self, plate, weights, tmp_path):
        result = self._kill(plate, weights, tmp_path, 10, "--workers", "2")
        assert len(result["kills"]) == 10 and result["equal"], result


class TestKillsItsProcess:
    """A field that takes more memory than there is, without --workers: the system kills the run each time."""

    @pytest.fixture
    def deadly(self, tmp_path, monkeypatch):
        """Every Python that starts from now on dies on field 0 of A02."""
        folder = tmp_path / "deadly"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            "import os, signal\n"
            "from cellvim.data.cells import NucleusSegmentation\n"
            "find = NucleusSegmentation.find\n"
            "def dies(self, field, image, names):\n"
            "    if field.name == 'A02/0':\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return find(self, field, image, names)\n"
            "NucleusSegmentation.find = dies\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(folder))

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
    def test_after_two_runs_without_progress_it_is_recorded_and_the_rest_is_embedded(
        self, plate, weights, tmp_path, deadly
    ):
        import signal
        import subprocess

        command = [sys.executable, "-m", "cellvim", "embed", str(plate), "-o", str(tmp_path / "out.zarr")]
        command += ["--model", str(weights), "--log"]
        codes, errors = [], ""
        while len(codes) < 6 and set(codes) <= {-signal.SIGKILL}:  # a run may do a field before it meets this one
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            codes.append(run.returncode)
            errors = run.stderr
        assert len(codes) >= 3 and codes[-1] == 3, (codes, errors)
        adata = anndata.read_zarr(tmp_path / "out.zarr")
        assert adata.uns["cellvim"]["failed_fields"]["field"].tolist() == ["A02/0"]
        assert "SIGKILL" in pd.read_csv(f"{tmp_path / 'out.zarr'}.failures.csv")["reason"][0]
        assert '"event": "isolated"' in Path(f"{tmp_path / 'out.zarr'}.log.jsonl").read_text()

    def test_runs_killed_without_progress_are_counted(self, plan, tmp_path):
        """Otherwise frequent kills from outside would not leave a run the time to start an isolated process."""
        from cellvim.embedding.ledger import Session, needs_isolation, open_ledger

        ledger = open_ledger(tmp_path / "out.zarr", plan.identity)
        story = [  # final state, finished fields, whether isolated; whether the next one must be isolated
            ("killed", 3, False, False),
            ("killed", 0, False, True),
            ("killed", 0, True, False),  # not caused by a field
            ("killed", 0, False, False),
            ("killed", 2, False, False),
            ("killed", 0, False, True),
            ("finished", 1, True, False),
            ("killed", 0, False, False),
        ]
        for state, fields, isolated, expected in story:
            session = Session(ledger, shard=None, about={"isolated": isolated})
            session.count(fields=fields)
            session.close(state)
            assert needs_isolation(ledger.storage, None) == expected
        assert not needs_isolation(ledger.storage, "1/2")

    def test_the_first_field_is_recorded_at_once(self, plan, tmp_path):
        from cellvim.embedding.ledger import Session, open_ledger, read_sessions

        ledger = open_ledger(tmp_path / "out.zarr", plan.identity)
        session = Session(ledger, shard=None, about={})
        session.count(fields=1, rows=5)
        assert read_sessions(ledger.storage)[0]["fields"] == 1
        session.close("finished")


class TestFaults:
    """A bad field never stops a plate: it is tried twice and recorded, and the exit code is 3."""

    def _check(self, output: Path, lost: list[str], reason: str) -> None:
        adata = anndata.read_zarr(output)
        assert adata.uns["cellvim"]["failed_fields"]["field"].tolist() == lost
        table = pd.read_csv(f"{output}.failures.csv")
        assert table["field"].tolist() == lost and (table["tries"] == 2).all()
        assert reason in table["reason"][0]
        named = adata.obs["Metadata_Well"].astype(str) + "/" + adata.obs["Metadata_Site"].astype(str)
        assert not set(named) & set(lost) and len(adata)

    @pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_an_unreadable_chunk_and_a_vanished_field(self, images, weights, tmp_path, workers, capsys):
        path = write_plate(tmp_path / "plate.zarr", images, CHANNELS)
        command = ["embed", path, "-o", tmp_path / "out.zarr", "--model", weights, "--workers", workers]
        assert main([str(c) for c in command[:-2]]) == 0
        shutil.rmtree(tmp_path / "out.zarr")
        break_chunk(path, "A02", 1)
        shutil.rmtree(path / "A" / "3" / "0")
        assert main([str(c) for c in command]) == 3
        assert "2 of 6 fields could not be read" in capsys.readouterr().err
        self._check(tmp_path / "out.zarr", ["A02/1", "A03/0"], "A02/1")

    @pytest.mark.slow
    def test_a_repaired_field_leaves_no_trace(self, images, plan, whole, weights, tmp_path):
        path = write_plate(tmp_path / "plate.zarr", images, CHANNELS)
        own = plan_embedding(path, model=weights)
        break_chunk(path, "A01", 0)
        with pytest.raises(Interrupted):
            run_embedding(own, tmp_path / "out.zarr", progress=_stop_after(6))  # when all are settled
        write_plate(tmp_path / "plate.zarr", images, CHANNELS)
        assert run_embedding(own, tmp_path / "out.zarr").failed == []
        np.testing.assert_array_equal(anndata.read_zarr(tmp_path / "out.zarr").X, anndata.read_zarr(whole).X)
        assert not (tmp_path / "out.zarr.failures.csv").exists()

    def test_errors_of_one_field_do_not_stop_the_others(self, plan, tmp_path, monkeypatch):
        """Errors other than of reading, and too little memory."""
        from cellvim.data.cells import NucleusSegmentation

        find = NucleusSegmentation.find

        def fails(self, field, image, names):
            if field.name == "A01/1":
                raise MemoryError("cannot allocate")
            if field.name == "A03/1":
                raise InputError("This field is odd.")
            return find(self, field, image, names)

        monkeypatch.setattr(NucleusSegmentation, "find", fails)
        summary = run_embedding(plan, tmp_path / "out.zarr")
        assert [name for name, _ in summary.failed] == ["A01/1", "A03/1"]
        self._check(tmp_path / "out.zarr", ["A01/1", "A03/1"], "cannot allocate")

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs a POSIX system")
    def test_permission_denied(self, images, weights):
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o777)
            path = write_plate(Path(folder) / "plate.zarr", images, CHANNELS)
            model = shutil.copy(weights, Path(folder) / "small.safetensors")
            plan = plan_embedding(path, model=model)
            if os.geteuid() == 0:  # all lazy imports, while root's own Python can still be read
                run_embedding(plan, Path(folder) / "first.zarr")
            chunk = path / "A" / "2" / "0" / "0" / "c" / "0" / "0" / "0"
            chunk.chmod(0)
            locked = Path(folder) / "locked"
            locked.mkdir(mode=0o555)
            root = os.geteuid() == 0
            os.seteuid(65534) if root else None  # root ignores permissions
            try:
                summary = run_embedding(plan, Path(folder) / "out.zarr")
                with pytest.raises(OutputError, match="Permission denied"):
                    run_embedding(plan, locked / "out.zarr")
            finally:
                os.seteuid(0) if root else None
            assert [name for name, _ in summary.failed] == ["A02/0"]
            self._check(Path(folder) / "out.zarr", ["A02/0"], "Permission")

    @pytest.mark.slow
    def test_a_small_disk(self, plate, weights, whole, tmp_path):
        """For real, on a small tmpfs; only root may mount one."""
        import subprocess

        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True)
        if mounted.returncode:
            pytest.skip("a small file system can be mounted by root only")
        try:
            command = ["embed", str(plate), "-o", str(disk / "out.zarr"), "--model", str(weights)]
            assert main(command) == 2
            assert not (disk / "out.zarr").exists()
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            assert main(command) == 0
            assert tree_sha256(disk / "out.zarr") == tree_sha256(whole)
        finally:
            subprocess.run(["umount", disk], check=True)


class TestRefusedAtOnce:
    """Before plates are opened: no file is left behind."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--shard", "3/2"], "--shard"),
            (["--shard", "1/2", "--overwrite"], "rows of the others"),
            (["--format", "h5ad"], "Omit --format"),
            (["--format", "csv", "--per-plate"], "'csv' is not known"),
            (["--engine", "spark"], "'spark' is not known"),
            (["--workers", "0"], "expected at least 1"),
            (["--address", "auto"], "requires --engine ray"),
        ],
    )
    def test_options_of_the_run(self, plate, weights, tmp_path, capsys, options, message):
        assert main(["embed", str(plate), "-o", str(tmp_path / "o.zarr"), "--model", str(weights), *options]) == 2
        assert message in capsys.readouterr().err and not list(tmp_path.iterdir())

    @pytest.mark.parametrize("options", [[], ["--per-plate"]])
    def test_an_output_in_a_file(self, plate, weights, tmp_path, capsys, options):
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "new" / "out.zarr"
        assert main(["embed", str(plate), "-o", str(output), "--model", str(weights), *options]) == 2
        err = capsys.readouterr().err
        assert "The folder" in err and "intensities" not in err and err.count("\n") == 1

    def test_an_output_in_a_folder_that_does_not_exist_yet_makes_it(self, plate, weights, tmp_path):
        assert main(["embed", str(plate), "-o", str(tmp_path / "new" / "out.zarr"), "--model", str(weights)]) == 0
        assert (tmp_path / "new" / "out.zarr").is_dir()


class TestSeveralPlates:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """Two plates: channels in another order under other names, another pixel size, another intensity."""
        folder = tmp_path_factory.mktemp("plates")
        fields = {"A01": [draw_field(1, 4)], "B02": [draw_field(2, 5)]}
        write_plate(folder / "p1.zarr", fields, ["GFP", "DNA"], plate_map={"A01": {"compound": "dmso"}})
        other = {well: [3 * image[::-1] for image in sites] for well, sites in fields.items()}
        write_plate(folder / "p2.zarr", other, ["Hoechst", "GFP"], plate_map={"A01": {"dose": 2.0}}, pixel_size_um=0.5)
        return folder

    def test_one_anndata_with_each_plates_own_channels_and_scale(self, folder, weights, tmp_path):
        paths = [folder / "p1.zarr", folder / "p2.zarr"]
        both = cellvim.embed(paths, tmp_path / "all.zarr", model=weights)
        assert both.obs["Metadata_Plate"].tolist() == ["p1"] * 9 + ["p2"] * 9
        assert both.obs_names.is_unique
        alone = [cellvim.embed(path, model=weights) for path in paths]
        np.testing.assert_array_equal(both.X, np.concatenate([a.X for a in alone]))
        np.testing.assert_allclose(both.X[:9], both.X[9:], atol=1e-5)  # the same cells, whatever the names and counts
        plates = both.uns["cellvim"]["plates"]
        assert plates["name"].tolist() == ["p1", "p2"]
        assert json.loads(plates["channels"].iloc[1]) == {"Hoechst": "Hoechst", "GFP": "GFP"}
        assert both.obs.loc[both.obs["Metadata_Plate"] == "p2", "compound"].isna().all()

    def test_one_output_per_plate_joined_lazily(self, folder, weights, tmp_path, capsys):
        from cellvim.anndata_io import open_embeddings

        command = ["embed", *map(str, sorted(folder.glob("*.zarr"))), "-o", str(tmp_path / "out"), "--per-plate"]
        command += ["--model", str(weights)]
        assert main(command) == 0
        assert {p.name for p in (tmp_path / "out").glob("*.zarr")} == {"p1.zarr", "p2.zarr"}
        before = tree_sha256(tmp_path / "out")
        assert main(command) == 0  # those that are there are left as they are
        assert tree_sha256(tmp_path / "out") == before
        capsys.readouterr()
        assert main(["status", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert "p1.zarr is done" in out and "p2.zarr is done" in out
        joined = open_embeddings(tmp_path / "out")
        assert joined.shape == (18, 16) and joined.obs["Metadata_Plate"].tolist() == ["p1"] * 9 + ["p2"] * 9

    def test_plates_of_one_name_are_refused_before_the_first_is_embedded(self, folder, weights, tmp_path, capsys):
        shutil.copytree(folder / "p1.zarr", tmp_path / "x" / "p1.zarr")
        command = ["embed", str(folder / "p1.zarr"), str(tmp_path / "x" / "p1.zarr"), "-o", str(tmp_path / "out")]
        assert main([*command, "--per-plate", "--model", str(weights)]) == 2
        assert "both called p1" in capsys.readouterr().err
        assert not list((tmp_path / "out").glob("*.zarr"))

    @pytest.mark.slow
    def test_plates_with_the_same_name_are_distinguished(self, folder, weights, tmp_path):
        for batch in ("x", "y"):
            shutil.copytree(folder / "p1.zarr", tmp_path / batch / "p1.zarr")
        both = cellvim.embed([tmp_path / "x" / "p1.zarr", tmp_path / "y" / "p1.zarr"], model=weights)
        assert both.obs["Metadata_Plate"].unique().tolist() == ["x_p1", "y_p1"]
        with pytest.raises(InputError, match="could not be told apart"):
            cellvim.embed([folder / "p1.zarr", folder / "p1.zarr"], model=weights)

    @pytest.mark.slow
    def test_stopped_between_plates(self, folder, weights, tmp_path):
        plan = plan_embedding([folder / "p1.zarr", folder / "p2.zarr"], model=weights)
        run_embedding(plan, tmp_path / "whole.zarr")
        with pytest.raises(Interrupted):
            run_embedding(plan, tmp_path / "out.zarr", progress=_stop_after(3))
        run_embedding(plan, tmp_path / "out.zarr")
        assert tree_sha256(tmp_path / "out.zarr") == tree_sha256(tmp_path / "whole.zarr")


class TestOptionalOutputs:
    def test_an_embedding_of_each_channel(self, plate, weights):
        """By hand: the mean of a channel's tokens."""
        adata = cellvim.embed(plate, model=weights, per_channel=True)
        assert set(adata.obsm) == {"spatial", "X_emb_DNA", "X_emb_GFP"}
        np.testing.assert_allclose((adata.obsm["X_emb_DNA"] + adata.obsm["X_emb_GFP"]) / 2, adata.X, atol=1e-6)
        plan = plan_embedding(plate, model=weights)
        from cellvim.data.crops import stream_crops

        one = plan.plates[0]
        [cut] = stream_crops(one.fields[:1], one.channels, one.cutting, scale=one.scale, cells=one.cells)
        with torch.inference_mode():
            tokens = plan.model.forward_tokens(cut.crops, channels=one.channel_ids)  # (n, H·W·C, D), channel fastest
        dna = tokens.unflatten(1, (16, 2))[:, :, 0].mean(1)
        np.testing.assert_allclose(adata.obsm["X_emb_DNA"][: len(dna)], dna, atol=1e-6)
        np.testing.assert_array_equal(adata.X, cellvim.embed(plate, model=weights).X)

    def test_maps_of_tokens(self, plate, weights, tmp_path):
        command = ["embed", plate, "-o", tmp_path / "out.zarr", "--model", weights, "--unit", "field", "--tokens"]
        assert main([str(c) for c in command]) == 0
        maps = cellvim.open_plate(tmp_path / "out.tokens.zarr")
        assert len(maps.fields) == N_FIELDS and maps.pixel_size_um == 0.5 * 8
        assert maps.channel_names[:2] == ["DNA emb_0000", "DNA emb_0001"] and len(maps.channel_names) == 32
        image = maps.fields[0].read()
        assert image.shape == (32, 16, 16) and image.dtype == np.float32
        adata = anndata.read_zarr(tmp_path / "out.zarr")
        mean = image.reshape(2, 16, -1).mean((0, 2))  # the readout is the mean over all tokens
        np.testing.assert_allclose(mean, adata.X[0], atol=1e-5)
        assert main([str(c) for c in [*command[:-2], "cell", "--tokens"]]) == 2

    @pytest.mark.parametrize("options", [(), ("--overwrite",)])
    def test_existing_token_maps_are_refused_before_any_work(self, plate, weights, tmp_path, capsys, options):
        """Only token maps are replaced, and only with --overwrite."""
        command = ["embed", plate, "-o", tmp_path / "out.zarr", "--model", weights, "--unit", "field", "--tokens"]
        command = [str(c) for c in (*command, *options)]
        anndata.AnnData(np.zeros((1, 1), np.float32)).write_zarr(tmp_path / "out.tokens.zarr")
        before = tree_sha256(tmp_path / "out.tokens.zarr")
        assert main(command) == 2
        assert "out.tokens.zarr exists" in capsys.readouterr().err
        assert {p.name for p in tmp_path.iterdir()} == {"out.tokens.zarr"}
        assert tree_sha256(tmp_path / "out.tokens.zarr") == before
        shutil.rmtree(tmp_path / "out.tokens.zarr")
        assert main(command) == 0
        shutil.rmtree(tmp_path / "out.zarr")
        assert main(command) == (0 if options else 2)

    def test_maps_of_tokens_beside_a_url_are_refused_before_any_work(self, plate, weights, tmp_path, capsys):
        output = (tmp_path / "out.zarr").as_uri()
        assert main(["embed", str(plate), "-o", output, "--model", str(weights), "--unit", "field", "--tokens"]) == 2
        assert "written to folders, not to a URL" in capsys.readouterr().err and not list(tmp_path.iterdir())

    def test_maps_of_several_plates_are_checked_before_fields(self, plate, weights, tmp_path):
        shutil.copytree(plate, tmp_path / "b.zarr")
        plan = plan_embedding([plate, tmp_path / "b.zarr"], model=weights, unit="field", tokens=True)
        taken = f"out.{plan.plates[1].name}.tokens.zarr"
        (tmp_path / taken).mkdir()
        with pytest.raises(OutputError, match=f"{taken} exists"):
            run_embedding(plan, tmp_path / "out.zarr", progress=lambda *_: pytest.fail("it began"))
        assert not (tmp_path / "out.zarr.partial").exists()

    def test_killed_after_the_token_maps_and_before_the_rows(self, plate, weights, tmp_path, monkeypatch):
        from cellvim.embedding import output

        plan = plan_embedding(plate, model=weights, unit="field", tokens=True)
        write = output.write_token_maps

        def killed(*arguments, **options):
            write(*arguments, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(output, "write_token_maps", killed)
        with pytest.raises(Interrupted):
            run_embedding(plan, tmp_path / "out.zarr")
        monkeypatch.undo()
        assert (tmp_path / "out.tokens.zarr").exists() and not (tmp_path / "out.zarr").exists()
        assert run_embedding(plan, tmp_path / "out.zarr").n_resumed == N_FIELDS
        assert anndata.read_zarr(tmp_path / "out.zarr").n_obs == N_FIELDS

    def test_rows_that_are_damaged_when_maps_are_written_are_embedded_again(
        self, plate, weights, tmp_path, monkeypatch
    ):
        from cellvim.embedding import output

        plan = plan_embedding(plate, model=weights, unit="field", tokens=True)
        write, torn = output.write_token_maps, []

        def tear(*arguments, **options):
            if not torn:
                torn.append(sorted((tmp_path / "out.zarr.partial").glob("fields-*/00000/*.rows"))[2])
                torn[0].write_bytes(torn[0].read_bytes()[:-40])
            write(*arguments, **options)

        monkeypatch.setattr(output, "write_token_maps", tear)
        run_embedding(plan, tmp_path / "out.zarr")
        assert torn and anndata.read_zarr(tmp_path / "out.zarr").n_obs == N_FIELDS
        assert len(cellvim.open_plate(tmp_path / "out.tokens.zarr").fields) == N_FIELDS

    def test_spatialdata_attributes(self, plan, tmp_path):
        run_embedding(plan, tmp_path / "out.zarr", spatialdata=True)
        adata = anndata.read_zarr(tmp_path / "out.zarr")
        attributes = adata.uns["spatialdata_attrs"]
        assert attributes["region_key"] == "region" and attributes["instance_key"] == "Metadata_ObjectNumber"
        assert set(adata.obs["region"]) <= set(attributes["region"])
        assert adata.obs["region"].iloc[0] == "plate_A01_0"
        assert not adata.obs.duplicated(["region", "Metadata_ObjectNumber"]).any()

    @pytest.mark.parametrize("name", ["out.h5ad", "out.parquet"])
    def test_other_formats_hold_the_same(self, plan, whole, tmp_path, name):
        run_embedding(plan, tmp_path / name)
        adata = anndata.read_zarr(whole)
        if name.endswith("h5ad"):
            np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / name, backed="r").X[:], adata.X)
        else:
            table = pd.read_parquet(tmp_path / name)
            np.testing.assert_array_equal(table[list(adata.var_names)].to_numpy(), adata.X)
            assert table["Metadata_Well"].tolist() == adata.obs["Metadata_Well"].tolist()

    def test_the_output_does_not_depend_on_who_made_it(self, whole):
        """No host, process, command, time or device: these are in the manifest."""
        import socket

        manifest = json.loads(Path(f"{whole}.manifest.json").read_text())
        [session] = manifest["sessions"]
        assert session["host"] == socket.gethostname() and session["versions"]["python"]
        text = b"".join(p.read_bytes() for p in whole.rglob("*") if p.is_file())
        for word in (session["started"], session["command"], session["id"]):
            assert word.encode() not in text
        assert manifest["rows"] == 21 and manifest["failed"] == []

    def test_illumination_is_corrected(self, weights, tmp_path):
        """By hand: the field by the light's shape, scaled, cut into four, through the model."""
        from cellvim.data.illumination import Illumination
        from cellvim.data.intensity import IntensityScale

        light = np.linspace(1.4, 0.6, 128)  # it falls off to the right
        images = {f"A{w:02d}": [(draw_field(w, 6) * light).astype(np.uint16)] for w in range(1, 10)}
        path = write_plate(tmp_path / "p.zarr", images, CHANNELS)
        output = tmp_path / "out.zarr"
        adata = cellvim.embed(path, output, model=weights, unit="tile", crop_size=64, illumination=True)
        [stored] = (tmp_path / "out.zarr.intensities").glob("*.illumination.npz")
        correction = Illumination.load(stored)
        across = correction.coarse.mean((0, 1))
        assert across[:20].mean() > 1.2 * across[-20:].mean()
        made_with = adata.uns["cellvim"]["preprocessing"]
        np.testing.assert_array_equal(made_with["illumination"]["coarse"], correction.coarse)
        scale = IntensityScale.from_dict(made_with["intensity"])
        field = cellvim.open_plate(path).fields[2]
        image = torch.from_numpy(scale.apply(correction.apply(field.read(["DNA", "GFP"]))))
        tiles = [image[:, y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)]
        np.testing.assert_allclose(adata.X[8:12], _by_hand(weights, tiles), atol=1e-5)
        again = cellvim.embed(path, model=weights, unit="tile", crop_size=64)
        assert np.abs(again.X - adata.X).mean() > 0.01  # without it they are others

    def test_a_common_pixel_size(self, weights, tmp_path):
        """By hand: scaled, resampled to half as many pixels, cut into tiles of 32."""
        from cellvim.data.intensity import IntensityScale

        write_plate(tmp_path / "fine.zarr", {"A01": [draw_field(1, 6, size=256)]}, CHANNELS, pixel_size_um=0.5)
        write_plate(tmp_path / "coarse.zarr", {"A01": [draw_field(1, 6)]}, CHANNELS, pixel_size_um=1.0)
        options = {"model": weights, "unit": "tile", "crop_um": 32, "um_per_px": 1.0}
        adata = cellvim.embed([tmp_path / "fine.zarr", tmp_path / "coarse.zarr"], **options)
        assert adata.n_obs == 2 * 16
        np.testing.assert_allclose(adata.obsm["spatial"][:16], adata.obsm["spatial"][16:], atol=0.5)
        scale = IntensityScale.from_dict(json.loads(adata.uns["cellvim"]["plates"]["intensity"].iloc[0]))
        image = scale.apply(cellvim.open_plate(tmp_path / "fine.zarr").fields[0].read(["DNA", "GFP"]))
        half = torch.nn.functional.interpolate(
            torch.from_numpy(image)[None], size=(128, 128), mode="bilinear", antialias=True
        )[0]
        tiles = [half[:, y : y + 32, x : x + 32] for y in range(0, 128, 32) for x in range(0, 128, 32)]
        np.testing.assert_allclose(adata.X[:16], _by_hand(weights, tiles), atol=1e-5)


def _by_hand(weights: Path, crops: list[torch.Tensor]) -> torch.Tensor:
    """Embeddings of (C, S, S) crops of DNA and GFP, resized to the input size of the model."""
    images = torch.nn.functional.interpolate(torch.stack(crops), size=(32, 32), mode="bilinear", antialias=True)
    with torch.inference_mode():
        return cellvim.load_checkpoint(weights).forward_features(images, channels=["DNA", "GFP"])


class TestStatus:
    def test_before_while_stopped_and_after(self, plan, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["status", "out.zarr"]) == 2
        assert "There is no run for out.zarr" in capsys.readouterr().err
        shown = []

        def look(done, total, rows):
            if done == 2:
                assert main(["status", "out.zarr", "--json"]) == 0
                shown.append(json.loads(capsys.readouterr().out))
                raise KeyboardInterrupt

        with pytest.raises(Interrupted):
            run_embedding(plan, "out.zarr", progress=look)
        assert shown[0]["state"] == "running" and (shown[0]["done"], shown[0]["fields"]) == (2, 6)
        assert main(["status", "out.zarr"]) == 0
        out = capsys.readouterr().out
        assert "was stopped" in out and "2 of 6 done (33.3 %)" in out and "interrupted" in out
        run_embedding(plan, "out.zarr", log=True)
        assert main(["status", "out.zarr"]) == 0
        out = capsys.readouterr().out
        assert "is done" in out and "6 of 6" in out and out.count("session") == 2
        events = [json.loads(line)["event"] for line in Path("out.zarr.log.jsonl").read_text().splitlines()]
        assert events.count("done") == 6 and events.count("start") == 2 and "assembled" in events

    def test_an_interrupted_command_explains_how_to_resume(self, plate, weights, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(embedding, "embed_here", interrupt)
        assert main(["embed", str(plate), "--model", str(weights)]) == 130
        err = capsys.readouterr().err
        assert "0 of 6 fields are done and kept in embeddings.zarr.partial. The same command resumes the run." in err
