"""Who works through the fields: every one is done once, whatever happens to workers."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from fake_plan import FakePlan, ends_at_once, rows_of

from cellvim.embedding.ledger import open_ledger
from cellvim.embedding.shards import parse_shard
from cellvim.embedding.workers import work, work_in_processes
from cellvim.errors import InputError, OutputError

IDENTITY = {"plates": {}}


@pytest.fixture
def ledger(tmp_path):
    return open_ledger(tmp_path / "out.zarr", IDENTITY)


def _all(plan, ledger, workers=1):
    keys = plan.all_keys()
    if workers > 1:
        return list(work_in_processes(plan, ledger, keys, workers=workers, devices=["cpu"]))
    return list(work(plan, ledger, keys))


def _check_rows(plan, ledger, without=()):
    done = ledger.done([0])
    assert sorted(key[1] for key in done) == [i for i in range(plan.n_fields) if i not in without]
    for key, n in done.items():
        np.testing.assert_array_equal(ledger.load(key, n).embeddings, rows_of(key).embeddings)


class TestHere:
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


class TestProcesses:
    def test_workers_that_are_killed_or_out_of_memory_cost_nothing(self, ledger, tmp_path):
        plan = FakePlan(deadly=(3,), hungry=(7,), once=tmp_path)
        results = _all(plan, ledger, workers=2)
        _check_rows(plan, ledger)
        assert ledger.failures() == {}
        assert any("SIGKILL" in d.reason for d in results if not d.final)

    def test_a_field_that_kills_twice_is_recorded_and_the_rest_goes_on(self, ledger):
        plan = FakePlan(deadly=(7,), unreadable=(4,))
        results = _all(plan, ledger, workers=2)
        _check_rows(plan, ledger, without=(4, 7))
        failures = {f.field: f.reason for f in ledger.failures().values()}
        assert sorted(failures) == ["A01/4", "A01/7"]
        assert "SIGKILL, as the system does when memory runs out" in failures["A01/7"]
        assert sorted(d.key[1] for d in results if d.final) == list(range(12))  # each once

    def test_a_full_disk_stops_the_run(self, ledger):
        """A folder in the place of a field's file: it cannot be written, whoever asks."""
        folder = ledger.storage.path / ledger._name((0, 6), 1)
        (folder / "full").mkdir(parents=True)
        with pytest.raises(OutputError, match="cannot be written"):
            _all(FakePlan(), ledger, workers=2)

    def test_workers_that_cannot_start_are_said(self, ledger, monkeypatch):
        from cellvim.embedding import workers

        monkeypatch.setattr(workers, "_worker_main", ends_at_once)
        with pytest.raises(InputError, match=r"before they have done anything.*exit code 3"):
            _all(FakePlan(), ledger, workers=2)

    def test_leaving_early_ends_the_workers(self, ledger):
        import multiprocessing

        results = work_in_processes(FakePlan(), ledger, FakePlan().all_keys(), workers=2, devices=["cpu"])
        next(results)
        results.close()
        assert multiprocessing.active_children() == []

    def test_nothing_to_do_starts_nobody(self, ledger):
        assert list(work_in_processes(FakePlan(), ledger, [], workers=2, devices=["cpu"])) == []


class TestShards:
    @pytest.mark.parametrize(("n", "count"), [(12, 3), (13, 4), (2, 5), (0, 2), (3456, 16)])
    def test_together_they_are_all_fields_once(self, n, count):
        stretches = [list(parse_shard(f"{i}/{count}").stretch(n)) for i in range(1, count + 1)]
        assert list(chain(*stretches)) == list(range(n))
        sizes = {len(s) for s in stretches}
        assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/3", ""])
    def test_what_is_none_is_said(self, text):
        with pytest.raises(InputError, match="--shard"):
            parse_shard(text)
        if text == "0/4":
            with pytest.raises(InputError, match="--array=1-4"):
                parse_shard(text)
