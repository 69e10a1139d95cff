"""The compiled kernel (`_blocks.c`, `_normalizing.c`, `_learning.c`), when it was built: the same arithmetic in one pass instead of many.

It is a plain shared library without Python in it, called through ctypes, which lets go of the interpreter's lock.
`BN_KERNEL=numpy` in the environment does without it, `BN_KERNEL=c` insists on it.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import UsageError, printable

READ_BYTES = 256 << 10  # read and summed at a time; stays in the second cache
CHOICES = ("c", "numpy")  # for BN_KERNEL
TOGETHER = 8  # samples, as in `_learning.c`

Floats = npt.NDArray[np.float64]


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and why it is not there or what it is; raises UsageError when BN_KERNEL asks for what there is not."""
    asked = os.environ.get("BN_KERNEL", "")
    if asked not in ("", *CHOICES):
        raise UsageError(
            f"BN_KERNEL={printable(asked)} is not one of {', '.join(CHOICES)}; unset it for the best there is"
        )
    if asked == "numpy":
        return None, "BN_KERNEL=numpy asks for it"
    library, note = _library_of(os.path.dirname(os.path.abspath(__file__)))
    if asked and library is None:
        raise UsageError(f"BN_KERNEL={asked}: {note}")
    return library, note


def _library_of(package: str) -> tuple[ctypes.CDLL | None, str]:
    """The library in this folder and no other: Python's own search may find that of another bncli."""
    built = [p for suffix in EXTENSION_SUFFIXES if os.path.exists(p := os.path.join(package, f"_blocks{suffix}"))]
    folder = os.path.dirname(os.path.dirname(package))
    if not built and os.path.exists(os.path.join(folder, "setup.py")):  # a checkout, perhaps beside an installation
        return None, (
            f"the compiled kernel was not built in this folder, {printable(folder)}: run 'pip install -e .' there, or an "
            "installed bn from elsewhere"
        )
    if not built:
        return None, "the compiled kernel was not built: there was no C compiler when bncli was installed"
    try:
        return ctypes.CDLL(built[0]), "compiled"
    except OSError:
        return None, "the compiled kernel was built for another machine; install bncli again"


_library, NOTE = _load()
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


def read_runs(fd: int, offset: int, dtype: np.dtype[Any], shape: tuple[int, int, int, int]) -> list[Floats] | None:
    """Moments of runs of blocks, of shape (runs, blocks, r, C), that lie in a file from byte `offset` on.

    Five arrays of shape (runs, C), as `reduce_moments` gives; None when the values cannot be read or summed so.
    """
    runs, blocks, rows, features = shape
    block_bytes = rows * features * dtype.itemsize
    at_once = min(max(1, READ_BYTES // block_bytes), runs * blocks)
    buffer = np.empty(at_once * block_bytes, np.uint8)
    scratch = np.empty(15 * max(at_once, blocks) * features)
    out = [np.empty((runs, features)) for _ in range(5)]
    code = ctypes.c_int(ord(dtype.kind) << 8 | dtype.itemsize)
    place = (ctypes.c_int(fd), ctypes.c_int64(offset))
    if _call("bn_read_runs", *place, code, buffer, scratch, at_once, dtype.itemsize, *shape, *out):
        return None
    return out


def reduce_moments(arrays: list[Floats], runs: int) -> list[Floats]:
    """Moments.reduce_runs: five arrays of shape (runs · B, C) become five of shape (runs, C)."""
    given = [np.ascontiguousarray(a) for a in arrays]
    features = given[0].shape[1]
    rows = len(given[0]) // runs
    out = [np.empty((runs * -(-rows // 2), features)) for _ in given]
    _call("bn_reduce_moments", runs, rows, features, *given, *out)
    return [a[:runs] for a in out]


def running(count: Floats, mean: Floats, m2: Floats, ddof: int, momentum_log: float | None) -> list[Floats]:
    """Running.of_batches, of arrays of shape (B, C): k of shape (1, C), and a, a_low and first of shape (2, C)."""
    batches, features = count.shape
    k, *statistics = np.empty((batches, features)), *(np.empty((batches, 2, features)) for _ in range(3))
    log_m = math.nan if momentum_log is None else momentum_log
    given = [np.ascontiguousarray(v) for v in (count, mean, m2)]
    _call("bn_running", batches, features, ctypes.c_double(ddof), ctypes.c_double(log_m), *given, k, *statistics)
    return [k[:1].copy(), *(s[0].copy() for s in statistics)]


def shuffle(
    data: npt.NDArray[np.uint8], size: int, *, undo: bool, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8] | None:
    """HDF5's shuffle of the whole elements of `size` bytes in `data`, or its inverse; None where it is not compiled.

    It goes into `out`, a contiguous array of as many bytes, where one is given.
    """
    if not AVAILABLE or sys.byteorder != "little":
        return None
    data = np.ascontiguousarray(data)
    out = np.empty_like(data) if out is None else out
    failed = _call("bn_shuffle", ctypes.c_int(size), ctypes.c_int(undo), data.size // size, data, out)
    return None if failed else out


def unlzf(data: npt.NDArray[np.uint8], room: int) -> npt.NDArray[np.uint8]:
    """Undo LZF into at most `room` bytes.

    Raises
    ------
    ValueError
        When the data is damaged, or gives more.
    """
    out = np.empty(room, np.uint8)
    given = _call("bn_unlzf", data, data.size, out, room)
    if not 0 <= given <= room:
        raise ValueError("its lzf data is damaged" if given < 0 else f"inflates to more than its {room} bytes")
    return out[:given]


def normalize(
    x: npt.NDArray[Any], mean: Floats, scale: Floats, beta: Floats, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], bool] | None:
    """(x - mean) * scale + beta, computed in float64 and rounded to `dtype`, and whether all of it is finite.

    x has the shape (R, C, I), the others (C,). None where it is not compiled for these types.
    """
    if not (AVAILABLE and dtype in (np.float32, np.float64)):
        return None
    x, y = np.ascontiguousarray(x, x.dtype.newbyteorder("=")), np.empty(x.shape, dtype)
    codes = ctypes.c_int(ord(x.dtype.kind) << 8 | x.dtype.itemsize), ctypes.c_int(dtype.itemsize)
    found = _call("bn_normalize", *codes, *x.shape, x, *map(np.ascontiguousarray, (mean, scale, beta)), y)
    return None if found == 2 else (y, not found)


def judge(
    problem: tuple[int, int, int, int, int, int],
    batch: int,
    x: npt.NDArray[Any],
    statistics: tuple[Floats, Floats],
    values: Floats,
    target: npt.NDArray[Any],
    gradient: Floats,
    at_once: int,
) -> tuple[float, int]:
    """Judge samples of a batch, see `affine.judge`: adds to the gradient; returns the sum of the losses and the hits.

    Parameters
    ----------
    problem : (activation, loss, rows, features, positions, outputs)
        The first two by their places in `affine`, the shape of a sample, and the head's outputs.
    batch : int
        Samples of the whole batch.
    x : float32 or float64
    statistics : (mean, 1 / sqrt(var + eps)), each of shape (C,)
    at_once : int
        Samples that may be held at a time.
    """
    activation, loss_kind, rows, features, positions, outputs = problem
    together, columns = TOGETHER if at_once >= TOGETHER else 1, features * positions
    room = max(together * (2 * features + outputs) + columns, rows * columns)
    scratch = np.empty(6 * columns + 2 * together * rows * columns + room)
    given = (x, *statistics, values, target.astype(np.int64 if loss_kind else np.float64, copy=False))
    loss, correct = np.empty(1), np.empty(1, np.int64)
    codes = map(ctypes.c_int, (activation, loss_kind, x.dtype == np.float32))
    numbers = (together, len(x), rows, features, positions, outputs, ctypes.c_double(batch))
    _call("bn_judge", *codes, *numbers, *map(np.ascontiguousarray, given), scratch, gradient, loss, correct)
    return float(loss[0]), int(correct[0])


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
    function = getattr(_library, name)
    function.restype = ctypes.c_ssize_t if name == "bn_unlzf" else ctypes.c_int
    result: int = function(*passed)
    return result
