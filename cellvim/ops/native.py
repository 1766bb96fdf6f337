"""The ops on the CPU in C++ (csrc/cpu): a shared library with a plain C interface.

Importing this module never fails: without the library `available` is False and `reason` says why. The functions have
the signatures of `cellvim.ops.reference`; they take float32 and bfloat16 tokens, and compute in float32.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, Structure, byref, c_char_p
from pathlib import Path

import torch
from torch import Tensor

from cellvim.errors import BackendError
from cellvim.ops import kernels
from cellvim.ops.kernels import MAX_STATES, MAX_TAPS

DTYPES = (torch.float32, torch.bfloat16)
HOW_TO_GET = (
    "install a wheel of cellvim, or put a C++ compiler (GCC or clang) on the PATH and reinstall with `pip install "
    "--force-reinstall --no-deps cellvim`"
)

_ABI = 1
_LIBRARY = {"darwin": "libcellvim_cpu.dylib"}.get(sys.platform, "libcellvim_cpu.so")


def available() -> bool:
    """Whether the library is there and loads."""
    return _library is not None


def reason() -> str:
    """Say which instruction set runs, or why the library is absent."""
    return _reason


def refusal(*tokens: Tensor, taps: int = 1, states: int = 1) -> str | None:
    """Say why these inputs cannot run here; None when they can."""
    for t in tokens:
        if t.device.type != "cpu":
            return f"tensors on {t.device.type}; it runs on the CPU"
        if t.dtype not in DTYPES:
            return f"{t.dtype} tensors; it takes float32 and bfloat16"
    if not 1 <= taps <= MAX_TAPS:
        return f"{taps} convolution taps; it takes 1 to {MAX_TAPS}"
    if states > MAX_STATES:
        return f"{states} states; it takes up to {MAX_STATES}"
    return None


def keep_freed_memory() -> bool:
    """Let the C library keep freed arrays for the next ones, instead of giving their pages back; say whether it does.

    Token arrays of tens of megabytes come and go in every block; where each is fetched anew from the system, zeroing
    its pages costs more than the kernels that fill it. For whole programs (a command, a benchmark): it holds for the
    process. Only glibc knows how.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


# ---------------------------------------------------------------------------------------------------------------------
# The ops, as `cellvim.ops.reference` defines them.


def add_norm(hidden: Tensor, residual: Tensor | None, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """See `cellvim.ops.reference.add_norm`."""
    _require(hidden, *([] if residual is None else [residual]))
    return kernels.add_norm(hidden, residual, *args, **kwargs)


def conv_pool(x: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.conv_pool`."""
    _require(x, taps=weight.shape[-1])
    return kernels.conv_pool(x, weight, *args, **kwargs)


def pooled_scan(pooled: Tensor, delta: Tensor, delta_bias: Tensor, A: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.pooled_scan`."""
    _require(pooled, delta, states=A.shape[-1])
    return kernels.pooled_scan(pooled, delta, delta_bias, A, *args, **kwargs)


def expand_gate(x: Tensor, z: Tensor, y: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
    """See `cellvim.ops.reference.expand_gate`."""
    _require(x, z, y, taps=weight.shape[-1])
    return kernels.expand_gate(x, z, y, weight, *args, **kwargs)


def _require(*tokens: Tensor, taps: int = 1, states: int = 1) -> None:
    if _library is None:
        raise BackendError(f"The back-end 'native' is not available: {_reason}.")
    if why := refusal(*tokens, taps=taps, states=states):
        raise BackendError(f"The back-end 'native' was given {why}. Choose 'reference' for these.")


# ---------------------------------------------------------------------------------------------------------------------
# Loading.


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and why."""
    path = _find()
    if path is None:
        return None, f"this install has no compiled kernels ({_LIBRARY}); {HOW_TO_GET}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{_LIBRARY} does not load ({error}); {HOW_TO_GET}"
    library.cellvim_cpu_isa.restype = c_char_p
    if (found := library.cellvim_cpu_abi()) != _ABI:
        return None, f"{_LIBRARY} is of another version (interface {found}, expected {_ABI}); {HOW_TO_GET}"
    for name, struct in kernels.STRUCTS.items():
        for function in (f"cellvim_cpu_{name}", f"cellvim_cpu_{name}_backward"):
            getattr(library, function).argtypes = [POINTER(struct)]
    return library, f"C++ kernels, {library.cellvim_cpu_isa().decode()}: float32 and bfloat16 on the CPU"


def _find() -> Path | None:
    """The library beside this module, where an editable install put it, or where CELLVIM_CPU_LIBRARY says."""
    if override := os.environ.get("CELLVIM_CPU_LIBRARY"):
        return Path(override)
    folders = [Path(__file__).parent, *map(Path, sys.modules[__package__].__path__)]
    folders += [Path(entry) / "cellvim" / "ops" for entry in sys.path if entry.endswith("-packages")]
    return next((folder / _LIBRARY for folder in folders if (folder / _LIBRARY).is_file()), None)


class _CpuLibrary(kernels.Library):
    mixes_in_place = True

    def run(self, op: str, arguments: Structure, device: torch.device) -> int:
        return getattr(_library, f"cellvim_cpu_{op}")(byref(arguments))


_library, _reason = _load()
kernels.LIBRARIES["cpu"] = _CpuLibrary()
