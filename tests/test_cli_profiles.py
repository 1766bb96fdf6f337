"""`cellvim profile` and `cellvim evaluate`: what they print and write, and one line where something is wrong."""

from __future__ import annotations

import json

import pytest
from profile_tables import make_cells, make_profiles

from cellvim.cli import main
from cellvim.profiles import read_profiles


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


def _error(result: tuple[int, str, str]) -> str:
    assert result[0] == 2, result
    lines = [line for line in result[2].splitlines() if line]
    assert len(lines) == 1, result[2]
    assert lines[0].startswith("Error: ")
    return lines[0]


def test_from_cells_to_figures(run, tmp_path):
    make_cells(wells=6, plates=3).write_h5ad("cells.h5ad")
    code, out, _ = run("profile", "cells.h5ad", "-o", "profiles.zarr", "--normalize", "robustmad,tvn")
    assert code == 0
    assert "18 profiles of 6 features, normalised: robustmad, X_tvn → profiles.zarr" in out
    assert read_profiles("profiles.zarr").uns["cellvim"]["profile"]["latest"] == "X_tvn"
    code, out, _ = run("evaluate", "profiles.zarr", "-o", "figures.json", "--null-size", 50, "--use", "robustmad,X_tvn")
    assert code == 0
    for word in ("retrieval", "robustmad", "X_tvn", "cell count", "random", "Not computed: mechanism:", "perturbation"):
        assert word in out, word
    assert json.loads((tmp_path / "figures.json").read_text())["settings"]["use"] == ["robustmad", "X_tvn"]
    assert "exists already" in _error(run("evaluate", "profiles.zarr", "-o", "figures.json"))
    assert "exists already" in _error(run("profile", "cells.h5ad", "-o", "profiles.zarr"))


def test_what_is_odd_is_a_line_each(run):
    adata = make_profiles()
    adata.X[:, 2] = 5
    adata.write_h5ad("p.h5ad")
    code, _, err = run("profile", "p.h5ad", "-o", "out.h5ad", "--aggregate", "none")
    assert code == 0
    assert err.splitlines() == [line for line in err.splitlines() if line.startswith("Warning: robustmad: 1 of 8")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile", "none.zarr", "-o", "x.h5ad"), "none.zarr does not exist"),
        (("profile", "p.h5ad", "-o", "x.xls"), "is not supported"),
        (("profile", "p.h5ad", "-o", "no/x.h5ad"), "does not exist"),
        (("profile", "p.h5ad", "-o", "x.h5ad", "--aggregate", "mode"), "mean, median, robust"),
        (("profile", "p.h5ad", "-o", "x.h5ad", "--normalize", "robust"), "Did you mean robustmad?"),
        (("profile", "p.h5ad", "-o", "x.h5ad", "--control", "dmso"), "--fit-on all"),
        (("profile", "p.h5ad", "-o", "x.h5ad", "--per", "week"), "--per"),
        (("evaluate", "none.h5ad"), "none.h5ad does not exist"),
        (("evaluate", "p.h5ad", "--use", "X_umap"), "no representation 'X_umap'"),
        (("evaluate", "p.h5ad", "--mechanism", "target"), "Name another with --mechanism"),
        (("evaluate", "p.h5ad", "--tasks", "umap"), "There is no task umap"),
    ],
)
def test_what_is_wrong_is_one_line(run, tmp_path, arguments, message):
    make_profiles().write_h5ad("p.h5ad")
    assert message in _error(run(*arguments))
    assert [p.name for p in tmp_path.iterdir()] == ["p.h5ad"]  # nothing half-written is left
