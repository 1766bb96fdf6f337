"""The back end "cuda": the ops on NVIDIA GPUs (csrc/cuda), a shared library with a plain C interface.

Importing this module never fails. Without the library, a driver or a GPU, `available` is False and `reason` explains
why. Tokens are float32, bfloat16 or float16; the arithmetic is in float32. Kernels are enqueued on the stream of torch
without synchronisation, so that they can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cellvim.ops import kernels
from cellvim.ops.kernels import add_norm, conv_pool, expand_gate, pooled_scan

__all__ = ["add_norm", "available", "conv_pool", "expand_gate", "name", "pooled_scan", "reason", "refusal"]

name = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 4096  # of a token, which one block of threads processes
LEAST_CAPABILITY = (8, 0)

_ABI = 1
_CUDA_ERROR = 1000


def available() -> bool:
    """Whether the library was found and loaded, and there is a GPU for it."""
    if _library is None:
        return False
    return torch.compiler.is_compiling() or _missing() is None  # a traced graph has tensors on the GPU already


def reason() -> str:
    """Return the GPU in use, or what is missing: the library, a driver, a GPU of compute capability 8.0 or later."""
    if _library is None:
        return _problem
    return _missing() or f"CUDA kernels on {torch.cuda.get_device_name()}: float32, bfloat16 and float16"


def refusal(*tokens: Tensor, taps: int = 1, states: int = 1) -> str | None:
    """Return why the inputs are not supported, None if they are."""
    for t in tokens:
        if t.shape[-1] > MAX_WIDTH:
            return f"{t.shape[-1]} channels, only up to {MAX_WIDTH}"
    return kernels.refusal("cuda", DTYPES, tokens, taps, states)


class _Call(Structure):
    """As in csrc/cuda/cellvim_cuda.h: the arguments of a call besides the struct of the op."""

    _fields_ = [("device", c_int32), ("stream", c_void_p), ("workspace", c_void_p)]


def open_library(path: Path) -> ctypes.CDLL:
    """Load a build of csrc/cuda and declare its functions.

    Raises
    ------
    OSError
        It cannot be loaded, or has another version.
    """
    library = ctypes.CDLL(str(path))
    if (found := library.cellvim_cuda_abi()) != _ABI:
        raise OSError(f"interface version {found}, expected {_ABI}")
    library.cellvim_cuda_error_name.restype = c_char_p
    for op, struct in kernels.STRUCTS.items():
        size = getattr(library, f"cellvim_cuda_{op}_workspace")
        size.argtypes, size.restype = [POINTER(struct), c_int, c_int], c_int64
        for function in (f"cellvim_cuda_{op}", f"cellvim_cuda_{op}_backward"):
            getattr(library, function).argtypes = [POINTER(struct), POINTER(_Call)]
    return library


class CudaLibrary(kernels.Library):
    """Calls the library on torch's current stream, with scratch memory from torch's allocator."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def run(self, op: str, arguments: Structure, device: torch.device) -> int:
        """See `kernels.Library.run`."""
        forward = op.removesuffix("_backward")
        index = self._index(device)
        size = getattr(self._library, f"cellvim_cuda_{forward}_workspace")(byref(arguments), forward != op, index)
        if size < 0:
            return -size
        # Freed at once: torch reuses it only for later work on the same stream, which runs after this.
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        call = _Call(index, self._stream(device), None if workspace is None else workspace.data_ptr())
        return getattr(self._library, f"cellvim_cuda_{op}")(byref(arguments), byref(call))

    def describe(self, status: int) -> str:
        """See `kernels.Library.describe`."""
        if status < _CUDA_ERROR:
            return super().describe(status)
        return f"the GPU reported {self._library.cellvim_cuda_error_name(status - _CUDA_ERROR).decode()}"

    def _index(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    def _stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream


@cache
def _missing() -> str | None:
    """Return what this machine lacks to run the library; None for nothing. Starts the driver, hence not at import."""
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
        return f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, but {least} is needed"
    return None


_library, _problem = kernels.load_library(
    "libcellvim_cuda.so",
    "CELLVIM_CUDA_LIBRARY",
    open_library,
    "install a wheel of cellvim with CUDA kernels, or put nvcc of the CUDA toolkit (12 or later) on the PATH and "
    "reinstall with `pip install --force-reinstall --no-deps cellvim`",
)
if _library is not None:
    kernels.LIBRARIES["cuda"] = CudaLibrary(_library)
