"""The back end "native": the ops on the CPU in C++ (csrc/cpu), a shared library with a plain C interface.

Importing this module never fails: without the library, `available` is False and `reason` explains why. Tokens are
float32 or bfloat16; the arithmetic is in float32.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, Structure, byref, c_char_p
from pathlib import Path

import torch
from torch import Tensor

from cellvim.ops import kernels
from cellvim.ops.kernels import add_norm, conv_pool, expand_gate, pooled_scan

__all__ = ["add_norm", "available", "conv_pool", "expand_gate", "name", "pooled_scan", "reason", "refusal"]

name = "native"
DTYPES = (torch.float32, torch.bfloat16)

_ABI = 1
_FILE = {"darwin": "libcellvim_cpu.dylib"}.get(sys.platform, "libcellvim_cpu.so")


def available() -> bool:
    """Whether the library was found and loaded."""
    return _library is not None


def reason() -> str:
    """Return the instruction set in use, or why the library is not available."""
    if _library is None:
        return _problem
    return f"C++ kernels, {_library.cellvim_cpu_isa().decode()}: float32 and bfloat16 on the CPU"


def refusal(*tokens: Tensor, taps: int = 1, states: int = 1) -> str | None:
    """Return why the inputs are not supported, None if they are."""
    return kernels.refusal("cpu", DTYPES, tokens, taps, states)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.cellvim_cpu_isa.restype = c_char_p
    if (found := library.cellvim_cpu_abi()) != _ABI:
        raise OSError(f"interface version {found}, expected {_ABI}")
    for op, struct in kernels.STRUCTS.items():
        for function in (f"cellvim_cpu_{op}", f"cellvim_cpu_{op}_backward"):
            getattr(library, function).argtypes = [POINTER(struct)]
    return library


class _CpuLibrary(kernels.Library):
    mixes_in_place = True

    def run(self, op: str, arguments: Structure, device: torch.device) -> int:
        return getattr(_library, f"cellvim_cpu_{op}")(byref(arguments))


_library, _problem = kernels.load_library(
    _FILE,
    "CELLVIM_CPU_LIBRARY",
    _open,
    "install a wheel of cellvim, or put a C++ compiler (GCC or clang) on the PATH and reinstall with `pip install "
    "--force-reinstall --no-deps cellvim`",
)
kernels.LIBRARIES["cpu"] = _CpuLibrary()
