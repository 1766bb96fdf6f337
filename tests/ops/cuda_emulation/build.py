"""Compiles csrc/cuda with the host's compiler against the emulation, and runs it through the same ctypes calls."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cellvim.ops.cuda import CudaLibrary, open_library

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
SOURCES = REPOSITORY / "csrc" / "cuda"
COMPILER = shutil.which("g++")
# No fused multiply-add that the kernels do not ask for; no checks of longjmp, by which the fibers take turns.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]


class EmulatedLibrary(CudaLibrary):
    """The CUDA library on the CPU: tensors on the CPU take the place of those on a GPU."""

    def _index(self, device: torch.device) -> int:
        return 0

    def _stream(self, device: torch.device) -> int:
        return 0


def open_emulation(*extra_flags: str) -> EmulatedLibrary:
    """Build the emulation unless its sources are as they were, and load it."""
    extra_flags += tuple(os.environ.get("CELLVIM_EMULATION_FLAGS", "").split())
    return EmulatedLibrary(open_library(build(*extra_flags)))


def build(*extra_flags: str) -> Path:
    """Return the path of the emulated library, compiled if need be."""
    sources = [*sorted(SOURCES.glob("*.cu")), HERE / "shared_memory.cpp"]
    headers = [*SOURCES.glob("*.*h"), *HERE.glob("*.h"), REPOSITORY / "csrc" / "cpu" / "cellvim_cpu.h"]
    text = b"".join(p.read_bytes() for p in sources + sorted(headers)) + " ".join([*FLAGS, *extra_flags]).encode()
    folder = REPOSITORY / "build" / "cuda-emulation" / hashlib.sha256(text).hexdigest()[:16]
    library = folder / "libcellvim_cuda.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{HERE}", f"-I{SOURCES}"]

    def compile_one(source: Path) -> str:
        out = str(folder / f"{source.name}.o")
        _run([COMPILER, "-x", "c++", *FLAGS, *extra_flags, *include, "-c", str(source), "-o", out])
        return out

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = folder / f"{os.getpid()}.partial"
    _run([COMPILER, "-shared", *extra_flags, *objects, "-o", str(unfinished)])
    unfinished.rename(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
