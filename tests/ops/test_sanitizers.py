"""Run the kernels' tests with the address and undefined-behaviour sanitizers (slow: rebuilds the library)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build" / "sanitize"  # kept: ninja rebuilds what has changed


def runtime(compiler: str, name: str) -> str:
    """Path of a sanitizer's run-time library, which must be loaded before Python's own allocations."""
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
def test_kernels_read_and_write_only_their_own_memory():
    configure = ["cmake", "-S", str(REPOSITORY), "-B", str(BUILD), "-DCELLVIM_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(BUILD), "--parallel", "2"], check=True, capture_output=True)
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('g++', 'libasan.so')} {runtime('g++', 'libubsan.so')}",
        # Python and torch keep memory for the life of the process; exec'ing children under ASan is not our subject.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "CELLVIM_CPU_LIBRARY": str(BUILD / "libcellvim_cpu.so"),
        "CELLVIM_BACKEND": "native",
    }
    tests = [
        str(Path(__file__).parent / name) for name in ("test_native.py", "test_native_invariance.py", "test_windows.py")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout, done.stdout[-500:]
