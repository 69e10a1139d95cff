"""The compiled kernel (`_blocks.c`), when it was built: the same arithmetic in one pass instead of many.

It is a plain shared library without Python in it, called through ctypes, which lets go of the interpreter's lock.
`BN_KERNEL=numpy` in the environment does without it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt

READ_BYTES = 256 << 10  # read and summed at a time; stays in the second cache

Floats = npt.NDArray[np.float64]


def _load() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("bncli._blocks")
    if os.environ.get("BN_KERNEL") == "numpy" or spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine
        return None


_library = _load()
AVAILABLE = _library is not None
NAME = "c" if AVAILABLE else "numpy"


def blocks(x: npt.NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """Mean, its low part and m2 of G blocks x of shape (G, r, C): three arrays of shape (G, C)."""
    native = np.dtype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind == "f" else x.dtype.newbyteorder("=")
    x = np.ascontiguousarray(x, native)
    groups, rows, features = x.shape
    out = tuple(np.empty((groups, features)) for _ in range(3))
    code = ord(x.dtype.kind) << 8 | x.dtype.itemsize
    if _call("bn_blocks", ctypes.c_int(code), x, groups, rows, features, *out):
        raise TypeError(f"no compiled kernel for {x.dtype}")
    return out[0], out[1], out[2]


def read_blocks(
    fd: int, offset: int, dtype: np.dtype[Any], shape: tuple[int, int, int]
) -> tuple[Floats, Floats, Floats] | None:
    """As `blocks`, of values that lie in a file from byte `offset` on; None when they cannot be read or summed so."""
    groups, rows, features = shape
    block_bytes = rows * features * dtype.itemsize
    at_once = max(1, READ_BYTES // block_bytes)
    buffer = np.empty(min(at_once, groups) * block_bytes, np.uint8)
    out = tuple(np.empty((groups, features)) for _ in range(3))
    code = ctypes.c_int(ord(dtype.kind) << 8 | dtype.itemsize)
    place = (ctypes.c_int(fd), ctypes.c_int64(offset))
    if _call("bn_read_blocks", *place, code, buffer, at_once, dtype.itemsize, groups, rows, features, *out):
        return None
    return out[0], out[1], out[2]


def reduce_moments(arrays: list[Floats]) -> list[Floats]:
    """Moments.reduce: five arrays of shape (B, ...) become five of shape (...)."""
    own = [np.array(a, order="C") for a in arrays]
    _call("bn_reduce_moments", len(own[0]), math.prod(own[0].shape[1:]), *own)
    return [a[0].copy() for a in own]


def reduce_running(k: Floats, statistics: list[Floats], momentum_log: float | None) -> list[Floats]:
    """Running.reduce: k of shape (B, 1, C or 1) and three arrays of shape (B, 2, C) lose their first axis."""
    own = [np.array(a, order="C") for a in (k, *statistics)]
    log_m = ctypes.c_double(math.nan if momentum_log is None else momentum_log)
    _call("bn_reduce_running", len(k), statistics[0].shape[2], k.shape[2], log_m, *own)
    return [a[0].copy() for a in own]


def _call(name: str, *arguments: Any) -> int:
    """Call a function of the library: arrays go as pointers, integers as sizes."""
    passed = [
        ctypes.c_void_p(a.ctypes.data)
        if isinstance(a, np.ndarray)
        else ctypes.c_ssize_t(a)
        if isinstance(a, int)
        else a
        for a in arguments
    ]
    result: int = getattr(_library, name)(*passed)
    return result
