"""`python -m benchmarks.gpu` without a GPU: every row runs, and no row that fails takes the others with it."""

from __future__ import annotations

import json
from itertools import groupby

import pytest
import torch

from benchmarks import gpu, gpu_models, gpu_report, gpu_timing
from cellvim.errors import BackendError
from cellvim.ops import cuda

CPU = gpu_timing.Bench(torch.device("cpu"), backend=None, is_dry=True)


@pytest.mark.skipif(cuda.available(), reason="the CUDA kernels run here")
def test_without_the_kernels_it_says_why_in_one_line(capsys):
    with pytest.raises(BackendError, match="needs the CUDA kernels"):
        gpu.run(quick=True)
    assert gpu.main(["--quick"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_one_row_of_each_section_runs(monkeypatch, tmp_path):
    jobs = sorted(gpu.jobs(quick=False), key=lambda job: job.section)
    first = [next(jobs) for _, jobs in groupby(jobs, key=lambda job: job.section)]
    first.sort(key=lambda job: job.section != "rates")
    monkeypatch.setattr(gpu, "jobs", lambda quick: iter(first))
    results = gpu.run(dry_run=True, output=tmp_path / "gpu.json", say=lambda line: None)
    assert {row["section"] for row in results["rows"]} == {*gpu_report._SECTIONS, "breakdown"}
    assert not [row for row in results["rows"] if "note" in row]
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(results))
    text = gpu_report.report(results)
    assert all(row["what"] in text for row in results["rows"]) and "dry run" in text


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False])
def test_every_row_runs(quick):
    rows = gpu.run(quick, dry_run=True, seconds=1e6, say=lambda line: None)["rows"]
    assert not [row for row in rows if "note" in row]


def test_a_row_is_asked_for_once():
    for quick in (True, False):
        names = [(job.section, job.what) for job in gpu.jobs(quick)]
        assert len(names) == len(set(names))


def test_rows_that_targets_hang_on_exist_and_come_first():
    for quick in (True, False):
        rows = [{"section": job.section, "what": job.what} for job in gpu.jobs(quick)]
        for row in rows[:13]:
            row |= {"img/s": 1e6, "SSM part, ms": 0.1, "ratio": 4.0}
        found = gpu_report.targets(rows)
        assert len(found) == 7 and all(target["found"] is not None for target in found)


def test_a_target_of_a_smaller_batch_is_not_measured():
    row = {"section": "breakdown", "what": gpu_report._BLOCK, "SSM part, ms": 0.1, "asked for batch": 128}
    assert [t["met"] for t in gpu_report.targets([row])] == [None] * 7


def test_failing_and_late_rows_are_said_and_the_rest_goes_on(monkeypatch, tmp_path):
    output, written = tmp_path / "gpu.json", []

    def fails(bench):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    def works(bench):
        written.append(json.loads(output.read_text()))
        return {"img/s": 1.0}

    def waits(bench):
        now[0] += 100
        return {}

    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    functions = {"fails": fails, "works": works, "waits": waits, "late": works}
    monkeypatch.setattr(gpu, "jobs", lambda quick: (gpu.Job("inference", k, f) for k, f in functions.items()))
    rows = gpu.run(quick=True, output=output, dry_run=True, seconds=50, say=lambda line: None)["rows"]
    assert [row.get("note") for row in rows] == [
        "failed: RuntimeError: CUDA error: an illegal memory access",
        None,
        None,
        "left out: the time was up",
    ]
    assert [row["what"] for row in written[0]["rows"]] == ["fails"]  # before the next began
    assert gpu.main(["--dry-run", "-o", str(output)]) == 3


def test_a_batch_is_halved_until_it_fits_and_the_row_says_so():
    def measure(batch: int) -> dict:
        if batch > 16:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("capture was invalidated")  # what a graph makes of it
        return {"img/s": 1.0}

    bench = gpu_timing.Bench(torch.device("cpu"), backend=None)
    assert gpu_timing.fit_batch(bench, 64, measure) == {"batch": 16, "img/s": 1.0, "asked for batch": 64}

    def never(batch: int) -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert gpu_timing.fit_batch(bench, 4, never) == {"batch": 1, "note": "out of memory", "asked for batch": 4}


def test_a_transformer_runs_the_attention_that_the_row_names(monkeypatch):
    asked = []

    class Kernel:
        def __init__(self, kernel):
            asked.append(kernel)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    class Model:
        class config:
            mixer = "attention"

        def __call__(self, images):
            if asked[-1] is not gpu_models._ATTENTION["memory-efficient"]:
                raise RuntimeError("No available kernel.")

    monkeypatch.setattr(gpu_models, "sdpa_kernel", Kernel)
    with gpu_models.attention_of(CPU, Model(), torch.zeros(2, 1), "float32") as name:
        assert name == "memory-efficient"
