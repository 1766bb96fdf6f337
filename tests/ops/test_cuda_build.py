"""The CUDA kernels compile, with registers and spills within budget; the library loads without a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cellvim.ops.kernels import load_library

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "csrc" / "cuda"
NVCC = shutil.which("nvcc")

# Registers a thread and bytes of spills that a kernel may take, by file. Of 65,536 registers, 96 a thread make room for
# 640 threads on a multiprocessor; kernels that need more have many independent operations a thread instead.
BUDGET = {
    "reduce.cu": {"": (32, 0)},
    "plan.cu": {"": (40, 0)},
    "add_norm.cu": {
        "backward_kernel<[^<>]*, 32>": (255, 11_000),  # rows of up to 4,096: wider than any named model
        "kernel<[^<>]*, 32>": (255, 0),
        "backward_kernel<[^<>]*, 10>": (255, 0),
        "backward_kernel": (168, 0),
        "": (72, 0),
    },
    "conv_pool.cu": {
        "adjoint_kernel": (255, 32),
        r"walk_kernel<[_a-z]*half.*Mode\)0, \w+, true>": (152, 0),
        r"walk_kernel<.*Mode\)0, \w+, true>|direct_kernel": (128, 4),  # mean: four blocks at a time
        "walk_kernel|score_kernel": (168, 0),
        "gather_kernel": (96, 8),
        "": (48, 0),
    },
    "pooled_scan.cu": {
        "scan_backward_kernel<[^<>]*, 16>": (255, 0),
        "scan_backward_kernel": (128, 0),
        "scan_kernel<[^<>]*, 16": (112, 0),
        "": (80, 0),
    },
    "expand_gate.cu": {
        r"1024, \w+>": (64, 2000),  # more than 2,560 channels: wider than any named model
        "adjoint_kernel": (255, 0),
        r"gate_(backward_)?kernel<[^<>]*, true, 256, \w+>": (188, 12),
        r"gate_backward_kernel<[^<>]*, true, 512, \w+>": (128, 480),
        r"gate_kernel<[^<>]*, true, 512, \w+>": (128, 192),
        r"gate_backward_kernel<[^<>]*, true, 640, \w+>": (96, 900),  # Huge alone
        r"gate_kernel<[^<>]*, true, 640, \w+>": (96, 900),
        "": (128, 0),
    },
}


def kernels_of(report: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of spilled stores by kernel, from the output of `nvcc -Xptxas -v`."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for .*?(\d+) bytes spill stores.*?Used (\d+) registers", report, re.DOTALL
    )
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for name, *_ in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {name: (int(registers), int(spills)) for name, (_, spills, registers) in zip(names, found, strict=True)}


def compile_for(architecture: str, source: str, folder: Path) -> dict[str, tuple[int, int]]:
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", f"-I{SOURCES}", "-cubin"]
    done = subprocess.run(
        [*command, str(SOURCES / source), "-o", str(folder / f"{source}.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr, done.stderr[-3000:]
    return kernels_of(done.stderr)


def check_budget(source: str, kernels: dict[str, tuple[int, int]]) -> None:
    assert kernels, f"{source} has no kernel"
    for name, (registers, spills) in kernels.items():
        allowed = next(limit for pattern, limit in BUDGET[source].items() if re.search(pattern, name))
        assert (registers, spills) <= allowed and spills <= allowed[1], f"{name}: {registers} registers, {spills} B"


def test_every_source_has_a_budget():
    assert set(BUDGET) | {"library.cu"} == {path.name for path in SOURCES.glob("*.cu")}


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", ["reduce.cu", "plan.cu"])
def test_small_kernels_compile_within_budget(source, tmp_path):
    check_budget(source, compile_for("sm_90", source, tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", ["add_norm.cu", "conv_pool.cu", "expand_gate.cu", "pooled_scan.cu"])
def test_kernels_compile_within_budget(source, tmp_path):
    check_budget(source, compile_for("sm_90", source, tmp_path))


def in_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_broken_library_is_absent_and_says_why():
    code = "from cellvim.ops import cuda; print(cuda.available(), cuda.reason())"
    said = in_new_process(code, CELLVIM_CUDA_LIBRARY=__file__)
    assert said.startswith("False libcellvim_cuda.so cannot be loaded")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU only")
def test_the_library_loads_and_says_what_is_missing_without_a_gpu(monkeypatch):
    """Built as `benchmarks.gpu_session` builds it on a bare GPU machine."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import cuda_library

    library = cuda_library.build("sm_90")
    code = """
import torch
torch.version.cuda = "13.0"  # ask the library, not PyTorch
from cellvim.ops import cuda
print(cuda._library is not None, cuda._library.cellvim_cuda_devices(), cuda.available(), cuda.reason())
"""
    said = in_new_process(code, CELLVIM_CUDA_LIBRARY=str(library))
    assert said.startswith("True -") and "False no usable NVIDIA driver or GPU (" in said


def test_an_absent_library_says_how_to_get_it():
    library, reason = load_library("libnone.so", "CELLVIM_NONE", ctypes.CDLL, "install a wheel")
    assert library is None and reason == "this installation has no libnone.so; install a wheel"


def test_the_backend_that_is_not_there_is_refused_by_name():
    code = """
import torch
from cellvim import ops
from cellvim.errors import BackendError
rows = {row.name: row for row in ops.describe_backends()}
for name in ("cuda", "mamba_ssm"):
    if rows[name].available:
        print("there")
        continue
    try:
        with ops.use_backend(name):
            pass
    except BackendError as error:
        assert rows[name].reason in str(error)
        print("refused")
"""
    assert set(in_new_process(code).split()) <= {"there", "refused"}
