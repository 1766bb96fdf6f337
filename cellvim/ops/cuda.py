"""The ops on NVIDIA GPUs (csrc/cuda): a shared library with a plain C interface.

Importing this module never fails: without the library, a driver or a GPU `available` is False and `reason` says why.
The functions have the signatures of `cellvim.ops.reference`; they take float32, bfloat16 and float16 tokens, compute in
float32, and enqueue on torch's current stream without waiting, so that they can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cellvim.errors import BackendError
from cellvim.ops import kernels
from cellvim.ops.kernels import MAX_STATES, MAX_TAPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 4096  # channels of a token: a block holds all of them
LEAST_CAPABILITY = (8, 0)
HOW_TO_GET = (
    "install a wheel of cellvim that has them, or put the CUDA toolkit's nvcc (12 or later) on the PATH and reinstall "
    "with `pip install --force-reinstall --no-deps cellvim`"
)

_ABI = 1
_LIBRARY = "libcellvim_cuda.so"
_CUDA_ERROR = 1000


def available() -> bool:
    """Whether the library is there and loads, and there is a GPU that it was built for."""
    if _library is None:
        return False
    return torch.compiler.is_compiling() or _missing() is None  # while a graph is traced the tensors are there already


def reason() -> str:
    """Say which GPU runs, or what is missing: the library, a driver, a GPU of compute capability 8.0 or later."""
    if _library is None:
        return _reason
    return _missing() or f"CUDA kernels on {torch.cuda.get_device_name()}: float32, bfloat16 and float16"


def refusal(*tokens: Tensor, taps: int = 1, states: int = 1) -> str | None:
    """Say why these inputs cannot run here; None when they can."""
    for t in tokens:
        if t.device.type != "cuda":
            return f"tensors on {t.device.type}; it runs on CUDA GPUs"
        if t.dtype not in DTYPES:
            return f"{t.dtype} tensors; it takes float32, bfloat16 and float16"
        if t.shape[-1] > MAX_WIDTH:
            return f"{t.shape[-1]} channels; it takes up to {MAX_WIDTH}"
    if not 1 <= taps <= MAX_TAPS:
        return f"{taps} convolution taps; it takes 1 to {MAX_TAPS}"
    if states > MAX_STATES:
        return f"{states} states; it takes up to {MAX_STATES}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The ops, as `cellvim.ops.reference` defines them.


def add_norm(hidden: Tensor, residual: Tensor | None, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """See `cellvim.ops.reference.add_norm`."""
    _require(hidden)
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
    if not available():
        raise BackendError(f"The back-end 'cuda' is not available: {reason()}.")
    if why := refusal(*tokens, taps=taps, states=states):
        raise BackendError(f"The back-end 'cuda' was given {why}. Choose 'reference' for these.")


# ---------------------------------------------------------------------------------------------------------------------
# Loading and calling.


class _Call(Structure):
    """As in csrc/cuda/cellvim_cuda.h: what a call needs beside the op's own struct."""

    _fields_ = [("device", c_int32), ("stream", c_void_p), ("workspace", c_void_p)]


def open_library(path: Path) -> ctypes.CDLL:
    """Load a build of csrc/cuda and declare its functions.

    Raises
    ------
    OSError
        It does not load, or is of another version.
    """
    library = ctypes.CDLL(str(path))
    if (found := library.cellvim_cuda_abi()) != _ABI:
        raise OSError(f"interface {found}, expected {_ABI}")
    library.cellvim_cuda_error_name.restype = c_char_p
    for name, struct in kernels.STRUCTS.items():
        size = getattr(library, f"cellvim_cuda_{name}_workspace")
        size.argtypes, size.restype = [POINTER(struct), c_int, c_int], c_int64
        for function in (f"cellvim_cuda_{name}", f"cellvim_cuda_{name}_backward"):
            getattr(library, function).argtypes = [POINTER(struct), POINTER(_Call)]
    return library


class CudaLibrary(kernels.Library):
    """Calls the library on torch's current stream, with scratch memory from torch's allocator."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def run(self, op: str, arguments: Structure, device: torch.device) -> int:
        """See `kernels.Library.run`."""
        name = op.removesuffix("_backward")
        index = self._index(device)
        size = getattr(self._library, f"cellvim_cuda_{name}_workspace")(byref(arguments), name != op, index)
        if size < 0:
            return -size
        # Given back at once: torch hands it to later work on the same stream only, which runs after ours.
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        call = _Call(index, self._stream(device), None if workspace is None else workspace.data_ptr())
        return getattr(self._library, f"cellvim_cuda_{op}")(byref(arguments), byref(call))

    def describe(self, status: int) -> str:
        """See `kernels.Library.describe`."""
        if status < _CUDA_ERROR:
            return super().describe(status)
        return f"to a GPU that failed: {self._library.cellvim_cuda_error_name(status - _CUDA_ERROR).decode()}"

    def _index(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    def _stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and why."""
    path = _find()
    if path is None:
        return None, f"this install has no CUDA kernels ({_LIBRARY}); {HOW_TO_GET}"
    try:
        return open_library(path), ""
    except (OSError, AttributeError) as error:
        return None, f"{_LIBRARY} does not load ({error}); {HOW_TO_GET}"


def _find() -> Path | None:
    """The library beside this module, where an editable install put it, or where CELLVIM_CUDA_LIBRARY says."""
    if override := os.environ.get("CELLVIM_CUDA_LIBRARY"):
        return Path(override)
    folders = [Path(__file__).parent, *map(Path, sys.modules[__package__].__path__)]
    folders += [Path(entry) / "cellvim" / "ops" for entry in sys.path if entry.endswith("-packages")]
    return next((folder / _LIBRARY for folder in folders if (folder / _LIBRARY).is_file()), None)


@cache
def _missing() -> str | None:
    """What this machine lacks to run the library; None for nothing. Starts the driver, so it waits until asked."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    devices = _library.cellvim_cuda_devices()
    if devices < 0:
        return f"no usable NVIDIA driver or GPU ({_library.cellvim_cuda_error_name(-devices).decode()})"
    if devices == 0 or not torch.cuda.is_available():
        return "no GPU"
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}; {least} is needed"
    return None


_library, _reason = _load()
if _library is not None:
    kernels.LIBRARIES["cuda"] = CudaLibrary(_library)
