"""The choice of the back end: the fastest available one, or the named one; never another one silently."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from cases import conv_pool_inputs, pooled_scan_inputs

from cellvim import ops
from cellvim.errors import BackendError
from cellvim.ops import dispatch, native, reference
from cellvim.ops.scan_plan import sequence_plan

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason())
CPU = torch.device("cpu")


@pytest.fixture
def no_library(monkeypatch):
    """An install without the compiled kernels."""
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_problem", "this installation has no libcellvim_cpu.so")
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_chosen", None)


@needs_native
def test_the_fastest_runs_unless_another_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    assert ops.selected_backend(CPU) == "native"
    with ops.use_backend("reference"):
        assert ops.selected_backend(CPU) == "reference"
        with ops.use_backend("native"):
            assert ops.selected_backend(CPU) == "native"
        assert ops.selected_backend(CPU) == "reference"
    assert ops.selected_backend(CPU) == "native"


def test_every_backend_is_described():
    rows = {row.name: row for row in ops.describe_backends()}
    assert set(rows) == set(dispatch.BACKENDS)
    assert sum(row.selected for row in rows.values()) == 1
    assert rows["reference"].available
    assert rows["native"].available == native.available()
    assert all(row.reason for row in rows.values())


@pytest.mark.parametrize("name", ["nativ", "mamba"])
def test_an_unknown_backend_is_an_error(name):
    with pytest.raises(BackendError, match=f"'{name}' is unknown.*native, reference"), ops.use_backend(name):
        pass


def test_an_absent_backend_is_an_error(no_library):
    with pytest.raises(BackendError, match="'native' is not available: this installation"), ops.use_backend("native"):
        pass


def test_without_the_library_the_plain_path_runs_and_says_so_once(no_library, caplog):
    inputs = pooled_scan_inputs(0, 1, 3, 8, 2)
    with caplog.at_level(logging.WARNING, "cellvim"):
        out = [ops.pooled_scan(**inputs) for _ in range(3)]
    assert torch.equal(out[0], reference.pooled_scan(**inputs))
    assert [r.getMessage() for r in caplog.records] == [
        "Plain PyTorch runs, which is several times slower: this installation has no libcellvim_cpu.so."
    ]
    row = next(row for row in ops.describe_backends() if row.name == "native")
    assert not row.available and "no libcellvim_cpu.so" in row.reason


@needs_native
def test_what_the_kernels_do_not_take_runs_in_pytorch_or_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    inputs = {k: v.double() for k, v in pooled_scan_inputs(0, 1, 3, 8, 2).items()}
    assert torch.equal(ops.pooled_scan(**inputs), reference.pooled_scan(**inputs))
    with ops.use_backend("native"), pytest.raises(BackendError, match=r"torch.float64 tensors, only float32"):
        ops.pooled_scan(**inputs)
    inputs = conv_pool_inputs(0, 1, 9, 8, 5)
    arguments = inputs["x"], inputs["weight"], inputs["bias"], sequence_plan(9)
    assert torch.equal(ops.conv_pool(*arguments), reference.conv_pool(*arguments))
    with ops.use_backend("native"), pytest.raises(BackendError, match="5 convolution taps"):
        ops.conv_pool(*arguments)


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_names_the_backend():
    code = "import torch; from cellvim import ops; print(ops.selected_backend(torch.device('cpu')))"
    assert in_new_process(code, CELLVIM_BACKEND="reference").stdout.strip() == "reference"
    failed = in_new_process(code, CELLVIM_BACKEND="cuda12")
    assert failed.returncode and "Back end 'cuda12' is unknown" in failed.stderr


def test_a_broken_library_is_absent_and_says_why():
    code = "from cellvim.ops import native; print(native.available(), native.reason())"
    found = in_new_process(code, CELLVIM_CPU_LIBRARY=__file__).stdout
    assert found.startswith("False libcellvim_cpu") and "cannot be loaded" in found
