"""The compiled kernels, if they were built: the same arithmetic as in NumPy, in one pass instead of many.

`_blocks.c` sums blocks, `_extremes.c` compares, `_moments.c` merges, `_bytes.c` decodes HDF5 chunks, `_normalizing.c` applies statistics and
`_learning.c` computes losses and gradients. They form one shared library that does not use the Python C API and is called
through ctypes, which releases the global interpreter lock; SIGNATURES declares every function. The environment variable
`BN_KERNEL=numpy` selects NumPy instead, and `BN_KERNEL=c` makes a missing library an error.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import numpy as np

from bncli.errors import UsageError, printable
from bncli.numerics.arrays import Array, Bytes, DType, Floats

READ_BYTES = 256 << 10  # read and summed at a time; fits in the second-level cache
CHOICES = ("c", "numpy")  # values of BN_KERNEL
TOGETHER = 8  # samples computed side by side, as in `_learning.c`


class _Pointer(ctypes.c_void_p):
    """Parameter type that passes the data address of a contiguous NumPy array."""

    @classmethod
    def from_param(cls, array: Array) -> _Pointer:
        return cls(array.ctypes.data)


_INT, _INT64, _SIZE, _DOUBLE = ctypes.c_int, ctypes.c_int64, ctypes.c_ssize_t, ctypes.c_double
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {  # name -> result, parameters, as in the C files
    "bn_blocks": (_INT, [_INT, _Pointer, *[_SIZE] * 3, *[_Pointer] * 3]),
    "bn_extremes": (_INT, [_INT, _Pointer, *[_SIZE] * 3, *[_Pointer] * 2]),
    "bn_read_runs": (_INT, [_INT, _INT64, _INT, *[_Pointer] * 2, *[_SIZE] * 6, *[_Pointer] * 7]),
    "bn_reduce_moments": (None, [*[_SIZE] * 3, *[_Pointer] * 10]),
    "bn_running": (None, [*[_SIZE] * 2, _DOUBLE, _SIZE, *[_Pointer] * 8]),
    "bn_shuffle": (_INT, [_INT, _INT, _SIZE, *[_Pointer] * 2]),
    "bn_unlzf": (_SIZE, [_Pointer, _SIZE, _Pointer, _SIZE]),
    "bn_normalize": (_INT, [*[_INT] * 2, *[_SIZE] * 3, *[_Pointer] * 5]),
    "bn_keep_freed": (None, [_SIZE]),
    "bn_loss_and_gradient": (None, [*[_INT] * 3, *[_SIZE] * 6, _DOUBLE, *[_Pointer] * 9]),
}


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Load the library; return it, or None, with a note that says what is used and why.

    Raises
    ------
    UsageError
        When BN_KERNEL is neither empty nor one of CHOICES, or is c and the library is missing.
    """
    asked = os.environ.get("BN_KERNEL", "")
    if asked not in ("", *CHOICES):
        raise UsageError(
            f"BN_KERNEL={printable(asked)} is not one of {', '.join(CHOICES)}; unset it for the fastest available"
        )
    if asked == "numpy":
        return None, "BN_KERNEL=numpy asks for it"
    library, note = _library_of(os.path.dirname(os.path.abspath(__file__)))
    if asked and library is None:
        raise UsageError(f"BN_KERNEL={asked}: {note}")
    return library, note


def _library_of(package: str) -> tuple[ctypes.CDLL | None, str]:
    """Load the library from this folder only: a search along sys.path might find that of another bncli."""
    suffixes = sorted(EXTENSION_SUFFIXES, key=lambda suffix: ".abi3" not in suffix)  # prefer what setup.py builds
    built = [p for suffix in suffixes if os.path.exists(p := os.path.join(package, f"_blocks{suffix}"))]
    folder = os.path.dirname(os.path.dirname(package))
    if not built and os.path.exists(os.path.join(folder, "setup.py")):  # a checkout, perhaps next to an installation
        return None, (
            f"the compiled kernel was not built in this folder, {printable(folder)}: run 'pip install -e .' there, or run "
            "an installed bn from another folder"
        )
    if not built:
        return None, "the compiled kernel was not built: there was no C compiler when bncli was installed"
    try:
        library = ctypes.CDLL(built[0])
        for name, (result, parameters) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, parameters
    except OSError:
        return None, "the compiled kernel was built for another machine; install bncli again"
    except AttributeError:
        return None, "the compiled kernel was built from another version of bncli; install bncli again"
    return library, "compiled"


_library, NOTE = _load()
AVAILABLE = _library is not None
NAME = "c" if AVAILABLE else "numpy"


def blocks(x: Array) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Mean, its low part, m2, minimum and maximum of blocks x of shape (G, r, C): five arrays of shape (G, C)."""
    native = np.dtype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind == "f" else x.dtype.newbyteorder("=")
    x = np.ascontiguousarray(x, native)
    groups, rows, features = x.shape
    mean, low, m2 = (np.empty((groups, features)) for _ in range(3))
    if _call("bn_blocks", _code(x.dtype), x, groups, rows, features, mean, low, m2):
        raise TypeError(f"no compiled kernel for {x.dtype}")
    return mean, low, m2, *extremes(x)


def extremes(x: Array) -> tuple[Floats, Floats]:
    """Minimum and maximum of blocks x of shape (G, r, C), contiguous and in native byte order: arrays of shape (G, C)."""
    groups, rows, features = x.shape
    minimum, maximum = (np.full((groups, features), start) for start in (np.inf, -np.inf))
    _call("bn_extremes", _code(x.dtype), x, groups, rows, features, minimum, maximum)
    return minimum, maximum


def read_runs(fd: int, offset: int, dtype: DType, shape: tuple[int, int, int, int]) -> list[Floats] | None:
    """Moments of values of shape (runs, blocks, r, C), stored in a file from byte `offset` on.

    Returns seven arrays of shape (runs, C), the fields of Moments; None if the values cannot be read or their type has
    no kernel.
    """
    runs, blocks, rows, features = shape
    block_bytes = rows * features * dtype.itemsize
    at_once = min(max(1, READ_BYTES // block_bytes), runs * blocks)
    buffer = np.empty(at_once * block_bytes, np.uint8)
    scratch = np.empty(15 * max(at_once, blocks) * features)  # as `bn_read_runs` divides it
    out = [np.empty((runs, features)) for _ in range(7)]
    if _call("bn_read_runs", fd, offset, _code(dtype), buffer, scratch, at_once, dtype.itemsize, *shape, *out):
        return None
    return out


def reduce_moments(arrays: list[Floats], runs: int) -> list[Floats]:
    """`Moments.reduce_runs` of count, mean and m2: reduce five arrays of shape (runs · B, C) to five of shape (runs, C)."""
    given = [np.ascontiguousarray(a) for a in arrays]
    features = given[0].shape[1]
    rows = len(given[0]) // runs
    out = [np.empty((runs * -(-rows // 2), features)) for _ in given]
    _call("bn_reduce_moments", runs, rows, features, *given, *out)
    return [a[:runs] for a in out]


def running(count: Floats, mean: Floats, m2: Floats, ddof: int, table: Floats | None) -> list[Floats]:
    """`Running.of_batches` of arrays of shape (B, C): k of shape (1, C), and a, a_low and first of shape (2, C).

    `table` is `powers.table` of the momentum; None for momentum None.
    """
    batches, features = count.shape
    k, *statistics = np.empty((batches, features)), *(np.empty((batches, 2, features)) for _ in range(3))
    table = np.empty(0) if table is None else table
    given = [np.ascontiguousarray(v) for v in (count, mean, m2)]
    _call("bn_running", batches, features, ddof, len(table), table, *given, k, *statistics)
    return [k[:1].copy(), *(s[0].copy() for s in statistics)]


def shuffle(data: Bytes, size: int, *, undo: bool, out: Bytes | None = None) -> Bytes | None:
    """The shuffle filter of HDF5 on the whole elements of `size` bytes in `data`, or its inverse; None if not compiled.

    `out` is an optional contiguous array of as many bytes for the result.
    """
    if not AVAILABLE or sys.byteorder != "little":
        return None
    data = np.ascontiguousarray(data)
    out = np.empty_like(data) if out is None else out
    failed = _call("bn_shuffle", size, undo, data.size // size, data, out)
    return None if failed else out


def unlzf(data: Bytes, room: int) -> Bytes:
    """Decompress LZF data to at most `room` bytes.

    Raises
    ------
    ValueError
        When the data is damaged, or decompresses to more.
    """
    out = np.empty(room, np.uint8)
    given = _call("bn_unlzf", data, data.size, out, room)
    if not 0 <= given <= room:
        raise ValueError("its lzf data is damaged" if given < 0 else f"inflates to more than its {room} bytes")
    return out[:given]


def normalize(x: Array, mean: Floats, scale: Floats, beta: Floats, dtype: DType) -> tuple[Array, bool] | None:
    """(x - mean) * scale + beta, computed in float64 and rounded to `dtype`, and whether all of it is finite.

    x has shape (R, C, I), the statistics (C,). None if there is no kernel for these types.
    """
    if not (AVAILABLE and dtype in (np.float32, np.float64)):
        return None
    x, y = np.ascontiguousarray(x, x.dtype.newbyteorder("=")), np.empty(x.shape, dtype)
    statistics = map(np.ascontiguousarray, (mean, scale, beta))
    found = _call("bn_normalize", _code(x.dtype), dtype.itemsize, *x.shape, x, *statistics, y)
    return None if found == 2 else (y, not found)


def loss_and_gradient(
    problem: tuple[int, int, int, int, int, int],
    batch: int,
    x: Array,
    statistics: tuple[Floats, Floats],
    values: Floats,
    target: Array,
    gradient: Floats,
    at_once: int,
) -> tuple[float, int]:
    """Loss of some samples of a batch, as `learning.loss_and_gradient`; adds their gradient to `gradient`.

    Parameters
    ----------
    problem : (activation, loss, rows, features, positions, outputs)
        Indexes into `learning.ACTIVATIONS` and `LOSSES`, the shape of a sample, and the outputs of the head.
    batch : int
        Number of samples in the whole batch.
    x : float32 or float64, shape (N, ...)
    statistics : (mean, 1 / sqrt(var + eps)), each of shape (C,)
    values, gradient : shape (P,)
    target : shape (N,), (N, K) or that of x
    at_once : int
        Maximum number of samples to compute at a time.

    Returns
    -------
    loss : float
        The sum of the losses.
    correct : int
        Number of correctly classified samples.
    """
    activation, loss_kind, rows, features, positions, outputs = problem
    together, columns = TOGETHER if at_once >= TOGETHER else 1, features * positions
    room = max(together * (2 * features + outputs) + columns, rows * columns)
    scratch = np.empty(6 * columns + 2 * together * rows * columns + room)
    given = (x, *statistics, values, target.astype(np.int64 if loss_kind else np.float64, copy=False))
    loss, correct = np.empty(1), np.empty(1, np.int64)
    codes = activation, loss_kind, int(x.dtype == np.float32)
    sizes = together, len(x), rows, features, positions, outputs
    arrays = (*map(np.ascontiguousarray, given), scratch, gradient, loss, correct)
    _call("bn_loss_and_gradient", *codes, *sizes, batch, *arrays)
    return float(loss[0]), int(correct[0])


def keep_freed(size: int) -> None:
    """Let the C library keep so many bytes of freed memory, so that using them again costs no page faults."""
    if AVAILABLE:
        _call("bn_keep_freed", size)


def _code(dtype: DType) -> int:
    """The number of a type in the C files: NumPy kind and item size."""
    return ord(dtype.kind) << 8 | dtype.itemsize


def _call(name: str, *arguments: Array | float) -> int:
    """Call a function of the library; 0 if it returns nothing."""
    return getattr(_library, name)(*arguments) or 0
