"""Workers: every field is embedded once, whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from fake_plan import FakePlan, rows_of

from cellvim.embedding.ledger import open_ledger
from cellvim.embedding.workers import RemainingFields, Shard, embed_here, embed_in_processes
from cellvim.errors import InputError, OutputError

IDENTITY = {"plates": {}}


@pytest.fixture
def ledger(tmp_path):
    return open_ledger(tmp_path / "out.zarr", IDENTITY)


def _all(plan, ledger, workers=1):
    keys = list(plan.all_keys())
    if workers > 1:
        return list(embed_in_processes(plan, ledger, keys, workers=workers, devices=["cpu"]))
    return list(embed_here(plan, ledger, keys))


def _check_rows(plan, ledger, without=()):
    done = ledger.done([0])
    assert sorted(key[1] for key in done) == [i for i in range(plan.n_fields) if i not in without]
    for key, n in done.items():
        np.testing.assert_array_equal(ledger.load(key, n).embeddings, rows_of(key).embeddings)


class TestThisProcess:
    def test_every_field_is_done_once(self, ledger):
        plan = FakePlan()
        results = _all(plan, ledger)
        assert [d.key[1] for d in results] == list(range(12)) and all(d.final for d in results)
        _check_rows(plan, ledger)

    def test_one_that_fails_is_tried_again_at_the_end(self, ledger, tmp_path):
        plan = FakePlan(unreadable=(2, 5), once=tmp_path)
        results = _all(plan, ledger)
        assert [key[1] for key in plan.seen] == [*range(12), 2, 5]
        assert [d.key[1] for d in results if not d.final] == [2, 5]
        _check_rows(plan, ledger)
        assert ledger.failures() == {}

    def test_one_that_fails_twice_is_recorded(self, ledger):
        plan = FakePlan(unreadable=(2,))
        _all(plan, ledger)
        _check_rows(plan, ledger, without=(2,))
        [failure] = ledger.failures().values()
        assert (failure.field, failure.reason, failure.tries) == ("A01/2", "Field 2 is broken.", 2)


class TestRemainingFields:
    def test_finished_fields_are_left_out_and_failures_are_cleared(self, ledger):
        plan = FakePlan(unreadable=(2,))
        list(embed_here(plan, ledger, [(0, i) for i in range(4)]))
        remaining = RemainingFields(plan, ledger, part=range(2, 6))
        assert list(remaining) == [(0, 2), (0, 4), (0, 5)] and len(remaining) == 3
        assert (remaining.n_fields, remaining.n_done, remaining.n_rows) == (4, 1, 1)
        assert ledger.failures() == {}

    def test_failures_of_other_shards_are_kept(self, ledger):
        plan = FakePlan(unreadable=(2,))
        list(embed_here(plan, ledger, [(0, 2)]))
        RemainingFields(plan, ledger, part=range(6, 12))
        assert set(ledger.failures()) == {(0, 2)}


class TestProcesses:
    def test_no_field_is_lost_when_workers_are_killed_or_out_of_memory(self, ledger, tmp_path):
        plan = FakePlan(deadly=(3,), hungry=(7,), once=tmp_path)
        results = _all(plan, ledger, workers=2)
        _check_rows(plan, ledger)
        assert ledger.failures() == {}
        assert any("SIGKILL" in d.reason for d in results if not d.final)

    def test_a_field_that_kills_twice_is_recorded_and_the_rest_is_embedded(self, ledger):
        plan = FakePlan(deadly=(7,), unreadable=(4,))
        results = _all(plan, ledger, workers=2)
        _check_rows(plan, ledger, without=(4, 7))
        failures = {f.field: f.reason for f in ledger.failures().values()}
        assert sorted(failures) == ["A01/4", "A01/7"]
        assert "SIGKILL, as the system does when memory runs out" in failures["A01/7"]
        assert sorted(d.key[1] for d in results if d.final) == list(range(12))  # each once

    def test_a_full_disk_stops_the_run(self, ledger):
        """A folder in the place of a field's file: it cannot be written, whoever asks."""
        ledger.store((0, 6), rows_of((0, 6)))
        [file] = ledger.storage.path.glob("fields-*/00000/000006-1.rows")
        file.unlink()
        (file / "full").mkdir(parents=True)
        with pytest.raises(OutputError, match="cannot be written"):
            _all(FakePlan(), ledger, workers=2)

    def test_workers_that_cannot_start_stop_the_run(self, ledger):
        with pytest.raises(InputError, match="exit code 3"):
            _all(FakePlan(starts=False), ledger, workers=2)
        assert ledger.failures() == {}

    def test_leaving_early_ends_the_workers(self, ledger):
        import multiprocessing

        results = embed_in_processes(FakePlan(), ledger, list(FakePlan().all_keys()), workers=2, devices=["cpu"])
        next(results)
        results.close()
        assert multiprocessing.active_children() == []

    def test_without_fields_no_worker_is_started(self, ledger):
        assert list(embed_in_processes(FakePlan(), ledger, [], workers=2, devices=["cpu"])) == []

    def test_workers_end_with_a_parent_that_is_killed_without_running_its_script_again(self, tmp_path):
        """The script has no ``if __name__ == "__main__"``."""
        script = tmp_path / "script.py"
        script.write_text(
            "import sys, pathlib\n"
            f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "from fake_plan import FakePlan\n"
            "from cellvim.embedding.ledger import open_ledger\n"
            "from cellvim.embedding.workers import embed_in_processes\n"
            "import multiprocessing, os, signal\n"
            "ledger = open_ledger(sys.argv[1], {'plates': {}})\n"
            "results = embed_in_processes(FakePlan(), ledger, [(0, i) for i in range(9)], workers=2, devices=['cpu'])\n"
            "next(results)\n"
            "print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        run = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "out")], capture_output=True, text=True, timeout=120
        )
        assert run.returncode == -signal.SIGKILL, run.stderr
        [line] = run.stdout.splitlines()
        pids = [int(pid) for pid in line.split()]
        deadline = time.monotonic() + 20
        while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert pids and not any(_is_alive(pid) for pid in pids)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] not in "ZX"


class TestShards:
    @pytest.mark.parametrize(("n", "count"), [(12, 3), (13, 4), (2, 5), (0, 2), (3456, 16)])
    def test_shards_cover_all_fields_once(self, n, count):
        parts = [list(Shard.parse(f"{i}/{count}").part(n)) for i in range(1, count + 1)]
        assert list(chain(*parts)) == list(range(n))
        sizes = {len(s) for s in parts}
        assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/3", ""])
    def test_invalid_shards_are_refused(self, text):
        with pytest.raises(InputError, match="--shard"):
            Shard.parse(text)
        if text == "0/4":
            with pytest.raises(InputError, match="--array=1-4"):
                Shard.parse(text)
