"""Cutting windows out of a stored field in C++: read, scaled, masked and written as float32 in one pass.

Part of the CPU library that `cellvim.ops.native` loads. `cellvim.data.crops` uses it where `refusal` has nothing to
say, and does the same with NumPy where it has.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p

import numpy as np

from cellvim.ops import native

_PIXELS = {np.dtype(t): code for code, t in enumerate((np.uint8, np.uint16, np.int16, np.float32))}


class _CutCrops(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("channels", "height", "width", "crops", "size", "channel_stride", "row_stride")),
        *((name, c_int32) for name in ("dtype", "border")),
        *((name, c_void_p) for name in ("image", "first", "low", "factor")),
        *((name, c_float) for name in ("floor", "ceiling")),
        *((name, c_void_p) for name in ("labels", "numbers", "out")),
    ]


def refusal(image: np.ndarray) -> str | None:
    """Say why this field cannot be cut here; None when it can."""
    if not native.available():
        return native.reason()
    if _function() is None:
        return "the compiled library is older than this code: reinstall cellvim"
    if image.dtype not in _PIXELS:
        return f"{image.dtype} pixels; it takes {', '.join(map(str, _PIXELS))}"
    if image.size and image.strides[2] != image.itemsize:
        return "a row's pixels do not lie side by side"
    return None


def cut_windows(
    image: np.ndarray,
    first: np.ndarray,
    out: np.ndarray,
    *,
    low: np.ndarray | None = None,
    factor: np.ndarray | None = None,
    floor: float = 0.0,
    ceiling: float = 1.0,
    mirror: bool = False,
    labels: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
) -> np.ndarray:
    """Fill ``out`` with windows of a field, in the thread that calls; other threads run meanwhile.

    Parameters
    ----------
    image
        (C, H, W), see `refusal`.
    first
        (n, 2), the top left pixel of each window as (y, x).
    out
        (n, C, S, S) float32, contiguous.
    low, factor
        (C,): a pixel v becomes ``(v - low) * factor``, then at least ``floor`` and at most ``ceiling``; a NaN becomes
        ``floor``, or 0 where that is negative. None: as stored.
    mirror
        Mirror the field beyond its edge; otherwise there is 0.
    labels, numbers
        (H, W) and (n,): what belongs to another label than the window's own becomes 0.

    Returns
    -------
    np.ndarray
        ``out``.
    """
    if why := refusal(image):
        raise ValueError(f"cut_windows was given {why}")
    size = out.shape[-1]
    if out.shape != (len(first), len(image), size, size) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.shape} {out.dtype}; expected ({len(first)}, {len(image)}, S, S) float32")
    if not out.size:
        return out
    kept = {"first": np.ascontiguousarray(first, np.int64)}  # alive until the call is over
    if low is not None:
        kept |= {"low": np.ascontiguousarray(low, np.float32), "factor": np.ascontiguousarray(factor, np.float32)}
        if kept["low"].shape != (len(image),) or kept["factor"].shape != (len(image),):
            raise ValueError(f"expected one low and one factor for each of {len(image)} channels")
    if labels is not None:
        kept |= {"labels": np.ascontiguousarray(labels, np.int32), "numbers": np.ascontiguousarray(numbers, np.int32)}
        if kept["labels"].shape != image.shape[1:] or kept["numbers"].shape != (len(first),):
            raise ValueError("neighbours are masked by labels of the field's size and one number a window")
    arguments = _CutCrops(
        channels=len(image),
        height=image.shape[1],
        width=image.shape[2],
        crops=len(first),
        size=size,
        channel_stride=image.strides[0] // image.itemsize,
        row_stride=image.strides[1] // image.itemsize,
        dtype=_PIXELS[image.dtype],
        border=int(mirror),
        image=image.ctypes.data,
        floor=floor,
        ceiling=ceiling,
        out=out.ctypes.data,
        **{name: array.ctypes.data for name, array in kept.items()},
    )
    if status := _function()(byref(arguments)):
        raise ValueError(f"cut_windows was given sizes that do not fit each other (status {status})")
    return out


def _function():
    function = getattr(native.library(), "cellvim_cpu_cut_crops", None)
    if function is not None and function.argtypes is None:
        function.argtypes = [POINTER(_CutCrops)]
    return function
