"""The kernels' tests once more on the narrower instruction sets, which this machine would not choose (slow)."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from cellvim.ops import native

NAMES = ("test_native.py", "test_native_invariance.py", "test_windows.py")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86-64 has several")
@pytest.mark.skipif(not native.available(), reason=native.reason())
@pytest.mark.parametrize("isa", ["AVX2", "SSE2"])
def test_kernels_on_narrower_vectors(isa):
    environment = os.environ | {"CELLVIM_CPU_ISA": isa}
    code = "from cellvim.ops import native; print(native.reason())"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert isa in said.stdout
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [str(Path(__file__).with_name(name)) for name in NAMES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
