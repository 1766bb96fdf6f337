"""`python -m benchmarks.gpu` without a GPU: every row runs, and no row that fails takes the others with it."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from benchmarks import gpu, gpu_models, gpu_report, gpu_timing
from cellvim.errors import BackendError
from cellvim.ops import cuda

CPU = gpu_timing.Bench(torch.device("cpu"), backend=None, is_dry=True)


@pytest.mark.skipif(cuda.available(), reason="the CUDA kernels run here")
def test_without_the_kernels_there_is_a_one_line_error(capsys, tmp_path):
    with pytest.raises(BackendError, match="needs the CUDA kernels"):
        gpu.run(True, tmp_path / "gpu.jsonl")
    assert gpu.main(["--quick", "-o", str(tmp_path / "gpu.jsonl")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_one_row_of_each_section_runs():
    bench = gpu.open_bench(quick=False, dry_run=True)
    in_order = sorted(gpu.jobs(quick=False), key=lambda job: job.section)
    first = [next(jobs) for _, jobs in groupby(in_order, key=lambda job: job.section)]
    first.sort(key=lambda job: job.section != "rates")
    rows = [{"group": job.section} | gpu.measure(job, bench) for job in first]
    assert not [row for row in rows if "note" in row]
    results = gpu.results_of([{"machine": {}, "quick": False, "dry run": True}, *rows])
    assert {row["section"] for row in results["rows"]} == {*gpu_report._SECTIONS, "breakdown"}
    text = gpu_report.report(results)
    assert all(row["what"] in text for row in results["rows"]) and "dry run" in text
    assert all(row["what"] in gpu_report.line(row) for row in results["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False])
def test_every_row_runs(quick, tmp_path):
    rows = gpu.run(quick, tmp_path / "gpu.jsonl", dry_run=True, say=lambda line: None)["rows"]
    assert len(rows) == len(gpu.jobs(quick)) and not [row for row in rows if "note" in row]


def test_rows_are_unique_and_the_parts_complement_each_other():
    for quick in (True, False):
        names = {part: [(job.section, job.what) for job in gpu.jobs(quick, part)] for part in gpu.PARTS}
        assert len(names["all"]) == len(set(names["all"]))
        assert names["headline"] + names["rest"][1:] == names["all"]
        assert len(names["headline"]) == 7  # rates, the model, its block and four ops


def test_rows_with_targets_exist():
    for quick in (True, False):
        rows = [{"section": job.section, "what": job.what} for job in gpu.jobs(quick)]
        for row in rows:
            row |= {"img/s": 1e6, "SSM part, ms": 0.1, "ratio": 4.0}
        found = gpu_report.targets(rows)
        assert len(found) == 7 and all(target["found"] is not None for target in found)


def test_a_target_of_a_smaller_batch_is_not_measured():
    row = {"section": "breakdown", "what": gpu_report._BLOCK, "SSM part, ms": 0.1, "asked for batch": 128}
    assert [t["met"] for t in gpu_report.targets([row])] == [None] * 7


@pytest.mark.slow
def test_a_run_in_child_processes_continues_where_it_stopped(tmp_path):
    output, lines = tmp_path / "gpu.jsonl", []
    gpu.run(True, output, part="headline", dry_run=True, say=lines.append)
    assert len(lines) == 7
    rows = gpu.run(True, output, part="headline", dry_run=True, say=lines.append)["rows"]
    assert len(lines) == 7 and len(rows) == 7  # nothing was measured again


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
