"""The ledger: finished rows are kept whatever is interrupted, and folders of others are left alone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fake_plan import rows_of

from cellvim.embedding.ledger import (
    DamagedError,
    Failure,
    Ledger,
    Rows,
    Session,
    differences,
    ledger_storage,
    locked,
    open_ledger,
    read_log,
    read_run,
    read_sessions,
)
from cellvim.errors import OutputError

IDENTITY = {"weights": "12ab", "crop": {"size_px": 32}, "plates": {"00000": {"name": "p", "fields": {"count": 3}}}}


@pytest.fixture(params=["folder", "url"])
def output(request, tmp_path):
    """A path and a URL: fsspec's local file system represents an object store."""
    return tmp_path / "out.zarr" if request.param == "folder" else (tmp_path / "out.zarr").as_uri()


def test_rows_come_back_as_they_were(output):
    ledger = open_ledger(output, IDENTITY)
    for field in (2, 0):
        ledger.store((0, field), rows_of((0, field)))
    assert ledger.done([0, 1]) == {(0, 0): 1, (0, 2): 3}
    again = open_ledger(output, IDENTITY)  # as after kill -9
    rows, expected = again.load((0, 2), 3), rows_of((0, 2))
    np.testing.assert_array_equal(rows.embeddings, expected.embeddings)
    assert rows.objects.equals(expected.objects)
    np.testing.assert_array_equal(rows.spatial, expected.spatial)


def test_maps_and_channels_travel_too():
    rows = rows_of((0, 1))
    maps = np.random.default_rng(0).random((4, 2, 3, 5), np.float32)
    rows = Rows(rows.embeddings, rows.objects, rows.spatial, {"X_emb_DNA": rows.embeddings + 1}, maps)
    again = Rows.from_bytes(rows.to_bytes())
    np.testing.assert_array_equal(again.obsm["X_emb_DNA"], rows.embeddings + 1)
    np.testing.assert_array_equal(again.tokens, maps)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "zeros"])
def test_a_damaged_file_is_noticed(tmp_path, damage):
    ledger = open_ledger(tmp_path / "out.zarr", IDENTITY)
    ledger.store((0, 0), rows_of((0, 2)))
    [file] = (tmp_path / "out.zarr.partial").glob("fields-*/00000/*.rows")
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    if damage == "flipped":
        content[half] ^= 1
    file.write_bytes({"cut": content[:half], "empty": b"", "flipped": content, "zeros": bytes(len(content))}[damage])
    with pytest.raises(DamagedError):
        ledger.load((0, 0), 3)
    ledger.remove((0, 0), 3)
    assert ledger.done([0]) == {}


def test_failures_are_kept_and_cleared(output):
    ledger = open_ledger(output, IDENTITY)
    failure = Failure("p", "A01/1", "Ungültig: <b>…</b>", 2)
    ledger.add_failure((0, 1), failure)
    assert open_ledger(output, IDENTITY).failures() == {(0, 1): failure}
    ledger.clear_failures([(0, 1)])
    assert ledger.failures() == {}


def test_another_run_is_refused_and_the_differences_are_listed(output):
    open_ledger(output, IDENTITY).store((0, 0), rows_of((0, 0)))
    other = {**IDENTITY, "weights": "34cd", "crop": {"size_px": 48, "overlap": 0.5}}
    with pytest.raises(OutputError) as error:
        open_ledger(output, other)
    for text in ("weights was 12ab, is 34cd", "crop.size_px was 32, is 48", "crop.overlap was missing, is 0.5"):
        assert text in str(error.value)
    assert "--overwrite" in str(error.value) and "plates" not in str(error.value)
    assert open_ledger(output, other, overwrite=True).done([0]) == {}


def test_of_two_that_begin_at_once_one_decides(output, monkeypatch):
    """The second looks before the first has written, and finds out when it writes itself."""
    first, second = (Ledger(ledger_storage(output), IDENTITY) for _ in range(2))
    create = type(second.storage).create

    def first_begins(storage, name, content):
        monkeypatch.undo()
        first.begin(replaces=False, form={"format": "zarr"})
        return create(storage, name, content)

    monkeypatch.setattr(type(second.storage), "create", first_begins)
    with pytest.raises(OutputError, match="format was zarr, is h5ad"):
        second.begin(replaces=False, form={"format": "h5ad"})
    assert read_run(second.storage)["form"] == {"format": "zarr"}


def test_of_many_that_create_a_file_one_succeeds(output):
    from concurrent.futures import ThreadPoolExecutor

    storage = open_ledger(output, IDENTITY).storage
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: storage.create("first", str(i).encode() * 1000), range(8)))
    if storage.path is not None:  # fsspec's own file system cannot promise it
        assert sum(made) == 1
        assert storage.read("first") == str(made.index(True)).encode() * 1000


def test_equal_identities_do_not_differ():
    assert differences(json.loads(json.dumps(IDENTITY)), IDENTITY) == []
    assert differences({"a": [1, 2]}, {"a": (1, 2)}) == []


def test_folders_of_others_are_left_alone(tmp_path):
    theirs = tmp_path / "out.zarr.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not created by CellVim"):
            open_ledger(tmp_path / "out.zarr", IDENTITY, overwrite=overwrite)
    assert (theirs / "thesis.txt").read_text() == "years of work"


def test_a_ledger_that_was_half_begun_or_half_removed_is_still_ours(tmp_path):
    (tmp_path / "a.partial").mkdir()  # killed after the first step
    open_ledger(tmp_path / "a", IDENTITY)
    half = open_ledger(tmp_path / "b", IDENTITY)
    half.store((0, 0), rows_of((0, 0)))
    (tmp_path / "b.partial" / "run.json").unlink()  # killed while it was removed: the marker goes last
    open_ledger(tmp_path / "b", IDENTITY)
    open_ledger(tmp_path / "b", IDENTITY, overwrite=True)


def test_a_late_writer_does_not_bring_a_removed_ledger_back(tmp_path):
    ledger = open_ledger(tmp_path / "out.zarr", IDENTITY)
    ledger.storage.remove_all("cellvim-partial")
    with pytest.raises(OutputError):
        ledger.store((0, 0), rows_of((0, 0)))
    assert not (tmp_path / "out.zarr.partial").exists()


def test_a_late_writer_of_an_earlier_run_does_not_add_to_this_one(tmp_path):
    old = open_ledger(tmp_path / "out.zarr", IDENTITY)
    new = open_ledger(tmp_path / "out.zarr", {**IDENTITY, "weights": "other"}, overwrite=True)
    with suppress(OutputError):
        old.store((0, 0), rows_of((0, 0)))
    assert new.done([0]) == {}


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path / "out.zarr", IDENTITY)
    ledger.store((0, 0), rows_of((0, 0)))

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        ledger.store((0, 1), rows_of((0, 1)))
    monkeypatch.undo()
    assert ledger.done([0]) == {(0, 0): 1}
    assert [p.name for p in (tmp_path / "out.zarr.partial").rglob(".*")] == []


class TestSessions:
    @pytest.fixture
    def ledger(self, tmp_path):
        return open_ledger(tmp_path / "out.zarr", IDENTITY)

    def test_records_the_process_and_its_counts(self, ledger):
        session = Session(ledger, shard="1/2", about={"engine": "processes"})
        [found] = read_sessions(ledger.storage)
        assert found["alive"] and found["pid"] == os.getpid() and found["shard"] == "1/2"
        session.count(fields=3, rows=7)
        session.log("done", field="A01/0")
        session.close("finished")
        [found] = read_sessions(ledger.storage)
        assert not found["alive"] and (found["state"], found["fields"], found["rows"]) == ("finished", 3, 7)
        events = [json.loads(line)["event"] for line in read_log(ledger.storage)]
        assert events == ["start", "done", "end"]

    def test_two_of_the_same_are_refused_but_shards_are_not(self, ledger):
        first = Session(ledger, shard="1/2", about={})
        for shard in ("1/2", None):
            with pytest.raises(OutputError, match=f"process {os.getpid()}"):
                Session(ledger, shard=shard, about={})
        Session(ledger, shard="2/2", about={}).close("finished")
        first.close("finished")
        Session(ledger, shard=None, about={}).close("finished")

    def test_a_killed_session_does_not_block_others(self, ledger):
        code = (
            "import os, signal, sys\n"
            "from cellvim.embedding.ledger import Session, open_ledger\n"
            "import json\n"
            "ledger = open_ledger(sys.argv[1], json.loads(sys.argv[2]))\n"
            "session = Session(ledger, shard=None, about={})\n"
            "ledger.storage.create('lock', session.id.encode())\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        output = ledger.storage.name.removesuffix(".partial")
        subprocess.run([sys.executable, "-c", code, output, json.dumps(IDENTITY)], timeout=120)
        [found] = read_sessions(ledger.storage)
        assert found["state"] == "killed" and not found["alive"]
        session = Session(ledger, shard=None, about={})
        with locked(ledger.storage, session) as held:  # its lock is worth nothing
            assert held
        session.close("finished")

    def test_one_at_a_time(self, ledger):
        first = Session(ledger, shard="1/2", about={})
        second = Session(ledger, shard="2/2", about={})
        with locked(ledger.storage, first) as held:
            assert held
            with locked(ledger.storage, second) as too:
                assert not too
        with locked(ledger.storage, second) as held:
            assert held
        first.close("finished")
        second.close("finished")


def test_the_ledger_is_beside_its_output(tmp_path):
    assert ledger_storage(tmp_path / "out.zarr").path == tmp_path / "out.zarr.partial"
    assert ledger_storage("s3://bucket/out.zarr/").name == "s3://bucket/out.zarr.partial"
    assert ledger_storage("s3://bucket/out.zarr").path is None


def test_a_ledger_can_be_sent_to_another_process(output):
    import pickle

    ledger = open_ledger(output, IDENTITY)
    copy: Ledger = pickle.loads(pickle.dumps(ledger))
    copy.store((0, 1), rows_of((0, 1)))
    assert ledger.done([0]) == {(0, 1): 2}
