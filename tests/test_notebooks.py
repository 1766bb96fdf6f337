"""The notebooks run from top to bottom (on fewer wells with CELLVIM_QUICK), and are short and complete."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SLOW = {"2_map_in_scanpy"}  # numba compiles UMAP, which takes longer than the rest together
LARGEST = 900_000  # bytes, pictures included


def _notebooks():
    for path in NOTEBOOKS:
        yield pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])


def test_there_are_six():
    assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize("path", _notebooks())
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLVIM_QUICK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_reader_sees_came_from_a_run(path):
    """Every cell was run once, in order, without errors or warnings, and no path of the author's machine is shown."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [(o.output_type, o.get("name")) for cell in code for o in cell.outputs]
    assert not [kind for kind in kinds if kind[0] == "error"]
    assert path.stat().st_size < LARGEST
    text = path.read_text(encoding="utf-8")
    assert "/tmp/" not in text and "/home/" not in text and "site-packages" not in text
