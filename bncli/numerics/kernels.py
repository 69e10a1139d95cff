"""Count, mean, sum of squared deviations, minimum and maximum of blocks of values: the innermost arithmetic.

A block is r values of each of C features. Deviations are taken from a pivot near the mean of the block (the shifted data
of Chan, Golub & LeVeque 1983, section 3), so that little cancels. Sums run in a fixed order and without BLAS, whose
rounding depends on threads and processor.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bncli.numerics import compiled
from bncli.numerics.arrays import Array, Bools, DType, Floats

BLOCK_ROWS = 128  # rounding errors grow with the length of a sum; short blocks keep them near one ulp
LANES = 4  # partial sums side by side: fewer, longer vector operations and shorter sums
WIDE_ENOUGH = 512  # values per row for which LANES are enough; narrower rows use eight times as many
PIVOT_SHARE = 8  # the pivot is computed from at least one in 8 values of a block
SUBTRACT_AT_ONCE = 128  # rows are joined to about this many values, to reduce the overhead of NumPy
TILE_BYTES = 1 << 20  # deviations computed at a time; fits in the cache
FEATURES_AT_ONCE = TILE_BYTES // BLOCK_ROWS // 8
TINY = 1e-300  # a sum of squares below this has lost digits to underflow

_buffers = threading.local()


class Blocks(NamedTuple):
    """Moments of G blocks. Every array has shape (G, C)."""

    number: Floats
    mean: Floats
    mean_low: Floats  # the low word: what float64 cannot hold of the mean
    m2: Floats  # not finite where values are not, or where squares overflow or underflow
    minimum: Floats  # infinity without values, and a maximum of -infinity; no sign of 0
    maximum: Floats


class FileRange(NamedTuple):
    """Location of values in C order and native byte order in a file: descriptor, byte offset and type."""

    fd: int
    offset: int
    dtype: DType


class Missing(NamedTuple):
    """Which values are missing: with `omit` those that are not finite, and those equal to `fill`."""

    omit: bool = False
    fill: float | int | None = None


def two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The rounded sum of a and b and its exact rounding error (Knuth, TAOCP vol. 2, section 4.2.2, theorem B)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def quick_two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """`two_sum` for |a| >= |b|, with fewer operations (Dekker 1971)."""
    s = a + b
    return s, b - (s - a)


def block_moments(x: Array, missing: Missing) -> Blocks:
    """Count, mean, sum of squared deviations, minimum and maximum per block and feature.

    Parameters
    ----------
    x : array of shape (G, r, C)
        G blocks of r values of C features, of a real type.
    missing : Missing
        Values to leave out, for each feature separately.

    Returns
    -------
    Blocks
        m2 is not finite where float64 has no result: values that are not finite, squares that overflow or underflow.
    """
    groups, rows, features = x.shape
    if compiled.AVAILABLE and missing.fill is None:
        found = compiled.blocks(x)
        if not missing.omit or np.isfinite(found[2]).all():
            return Blocks(np.full((groups, features), float(rows)), *found)
    if features <= FEATURES_AT_ONCE:
        return _tile_moments(x, missing)
    out = Blocks(*(np.empty((groups, features)) for _ in Blocks._fields))
    for start in range(0, features, FEATURES_AT_ONCE):
        tile = slice(start, start + FEATURES_AT_ONCE)
        for whole, part in zip(out, _tile_moments(x[:, :, tile], missing), strict=True):
            whole[:, tile] = part
    return out


def stored_runs(stored: FileRange, shape: tuple[int, int, int, int], missing: Missing) -> list[Floats] | None:
    """The fields of Moments of values of shape (runs, blocks, r, C) in a file.

    One compiled call reads, sums and merges them. Returns arrays of shape (runs, C), or None if that is not
    possible; the caller then reads the values and passes them to `block_moments`.
    """
    if not compiled.AVAILABLE or missing.fill is not None:
        return None
    found = compiled.read_runs(stored.fd, stored.offset, stored.dtype, shape)
    return None if found is None or (missing.omit and not np.isfinite(found[3]).all()) else found


def present(x: Array, missing: Missing) -> Bools:
    """True for values that are not missing; of the shape of x."""
    keep = np.isfinite(x) if missing.omit else np.ones(x.shape, bool)
    if missing.fill is not None:
        keep &= ~np.isnan(x) if missing.fill != missing.fill else x != missing.fill
    return keep


def _tile_moments(x: Array, missing: Missing) -> Blocks:
    if missing.fill is None and x.dtype.kind in "bui" and x.dtype.itemsize <= 2 and x.shape[1] <= BLOCK_ROWS:
        return _whole_moments(x)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if missing.fill is None:
            blocks = _about_pivot(x, None)
            if not missing.omit or np.isfinite(blocks.m2).all():
                return blocks
        return _about_pivot(x, present(x, missing))


def _about_pivot(x: Array, keep: Bools | None) -> Blocks:
    """Shift by a pivot near the mean of the block, then sum deviations and their squares.

    The pivot is the first value plus the mean offset of every 8th value from it, so the deviations of a constant block
    are exactly 0. With s the standard deviation of the block, the pivot is at most sqrt(8) s from the mean for any values
    (Cauchy-Schwarz over one in 8 values), so that `squares - sums * offset` keeps its digits.
    """
    groups, rows, features = x.shape
    step = min(PIVOT_SHARE, max(1, rows // PIVOT_SHARE))
    some = x[:, ::step]  # (G, r / step, C)
    if keep is None:
        count = np.full((groups, features), float(rows))
        first = x[:, :1].astype(np.float64)  # (G, 1, C)
        offsets = np.subtract(some, first, dtype=np.float64)  # (G, r / step, C)
        offset = np.add.reduce(offsets, axis=1, keepdims=True) / offsets.shape[1]
    else:
        count = keep.sum(axis=1, dtype=np.float64)  # (G, C)
        first = np.take_along_axis(x, keep.argmax(axis=1)[:, None], axis=1).astype(np.float64)
        first[count[:, None] == 0] = 0
        counted = keep[:, ::step]
        offsets = np.where(counted, some - first, 0.0)
        offset = np.add.reduce(offsets, axis=1, keepdims=True) / np.maximum(counted.sum(axis=1, keepdims=True), 1)
    pivot = first + offset  # (G, 1, C)
    sums, squares = _sums(x, np.float64, pivot, keep)  # both (G, C)
    n = np.maximum(count, 1)
    offset = sums / n
    m2 = np.maximum(squares - sums * offset, 0)  # keeps NaN
    mean, mean_low = two_sum(pivot[:, 0], offset)
    far = np.nonzero(2 * sums * offset > squares)
    blocks = Blocks(count, mean, mean_low, m2, *_extremes(x, keep))
    if far[0].size:
        _about_mean(x, keep, blocks, *far)
    _mark_underflow(x, keep, first, m2)
    return blocks


def _whole_moments(x: Array) -> Blocks:
    """Moments of 8- and 16-bit integers: the sums of a block and of its squares are exact without a pivot.

    The sum of 128 squares of 8 bits is below 2^24, the limit of exact integers in float32; that of 128 squares of 16 bits
    is far below 2^53, the limit in float64.
    """
    found = _sums(x, np.float32 if x.dtype.itemsize == 1 else np.float64)  # both (G, C)
    sums, squares = (v.astype(np.float64) for v in found)
    n = float(x.shape[1])
    mean = sums / n
    high = mean.astype(np.float32).astype(
        np.float64
    )  # the mean in two parts, whose products with n are exact (Dekker 1971)
    mean_low = ((sums - high * n) - (mean - high) * n) / n  # the remainder of the division
    return Blocks(np.full(mean.shape, n), mean, mean_low, (n * squares - sums * sums) / n, *_extremes(x, None))


def _extremes(x: Array, keep: Bools | None) -> tuple[Floats, Floats]:
    """Minimum and maximum of the values that count, both of shape (G, C)."""
    low, high = (x, x) if keep is None else (np.where(keep, x, np.inf), np.where(keep, x, -np.inf))
    return _reduced(np.minimum, low), _reduced(np.maximum, high)


def _reduced(pick: np.ufunc, x: Array) -> Floats:
    """The minimum or maximum of each block and feature: of x of shape (G, r, C), one of shape (G, C), without a sign of 0.

    Narrow rows are taken several at a time, as one wide row, whose halves are then compared.
    """
    groups, rows, features = x.shape
    lanes = 1
    while features > 1 and 2 * lanes * features <= WIDE_ENOUGH and 4 * lanes <= rows:
        lanes *= 2
    whole = rows // lanes * lanes
    found = pick.reduce(x[:, :whole].reshape(groups, -1, lanes * features), axis=1)
    while lanes > 1:
        lanes //= 2
        found = pick(found[:, : lanes * features], found[:, lanes * features :])
    if whole < rows:
        found = pick(found, pick.reduce(x[:, whole:], axis=1))
    result: Floats = found.astype(np.float64) + 0.0
    return result


def _about_mean(
    x: Array,
    keep: Bools | None,
    blocks: Blocks,
    group: npt.NDArray[np.intp],
    feature: npt.NDArray[np.intp],
) -> None:
    """Recompute the columns whose pivot is more than s from the mean, with the mean as pivot.

    Such columns are rare, since one in 8 values must differ from the others. At a distance of sqrt(8) s, m2 is a
    difference of terms 8 times as large, which costs three bits.
    """
    d = np.array(x[group, :, feature], np.float64, order="C")  # (k, r)
    pivot = blocks.mean[group, feature]
    d -= pivot[:, None]
    if keep is not None:
        d[~keep[group, :, feature]] = 0
    sums = np.add.reduce(d, axis=1)
    offset = sums / blocks.number[group, feature]
    np.square(d, out=d)
    m2 = np.maximum(np.add.reduce(d, axis=1) - sums * offset, 0)
    finite = np.isfinite(m2)
    group, feature = group[finite], feature[finite]
    blocks.m2[group, feature] = m2[finite]
    blocks.mean[group, feature], blocks.mean_low[group, feature] = two_sum(pivot[finite], offset[finite])


def _sums(
    x: Array,
    dtype: npt.DTypeLike,
    pivot: Floats | None = None,
    keep: Bools | None = None,
) -> tuple[Array, Array]:
    """Sums of x - pivot and of its squares over the rows: from shape (G, r, C) to two arrays of shape (G, C) of this type.

    Computes as many blocks at a time as fit in the cache. Each column has `lanes` partial sums side by side, in a fixed
    order; rows left over after a multiple of `lanes` are added at the end.
    """
    groups, rows, features = x.shape
    lanes = 1 if features == 1 else LANES if features * LANES >= WIDE_ENOUGH else 8 * LANES
    lanes = lanes if lanes <= rows else 1
    whole = rows // lanes * lanes
    sums, squares = (np.empty((groups, lanes * features), dtype) for _ in range(2))  # (G, lanes · C)
    at_once = max(1, TILE_BYTES // (rows * features * np.dtype(dtype).itemsize))
    deviations = _scratch((min(at_once, groups), rows, features), dtype)
    for start in range(0, groups, at_once):
        tile = slice(start, start + at_once)
        d = deviations[: min(at_once, groups - start)]  # (g, r, C)
        np.copyto(d, x[tile], casting="unsafe")
        if pivot is not None:
            _subtract(d, pivot[tile])
        if keep is not None:
            d[~keep[tile]] = 0
        side_by_side = d[:, :whole].reshape(len(d), -1, lanes * features)  # (g, r / lanes, lanes · C)
        _add_rows(side_by_side, sums[tile], squares[tile], exact=pivot is None)
        if whole < rows:
            rest = d[:, whole:].reshape(len(d), -1)
            sums[tile, : rest.shape[1]] += rest
            squares[tile, : rest.shape[1]] += np.square(rest)
    while lanes > 1:
        lanes //= 2
        sums, squares = (v[:, : lanes * features] + v[:, lanes * features :] for v in (sums, squares))
    return sums, squares


def _scratch(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """A reused buffer of the current thread: allocating memory for every block would cost more than the sums."""
    size = math.prod(shape)
    buffer: Array | None = getattr(_buffers, "deviations", None)
    if buffer is None or buffer.size < size or buffer.dtype != dtype:
        buffer = _buffers.deviations = np.empty(size, dtype)
    return buffer[:size].reshape(shape)


def _subtract(d: Floats, pivot: Floats) -> None:
    """d -= pivot, with several narrow rows at once: NumPy has an overhead per row."""
    groups, rows, features = d.shape
    at_once = min(rows, SUBTRACT_AT_ONCE // features) if features > 1 else 1
    if at_once < 2:
        np.subtract(d, pivot, out=d)
        return
    whole = rows // at_once * at_once
    wide = d[:, :whole].reshape(groups, whole // at_once, at_once * features)
    np.subtract(wide, np.tile(pivot, (1, 1, at_once)), out=wide)
    np.subtract(d[:, whole:], pivot, out=d[:, whole:])


def _add_rows(d: Array, sums: Array, squares: Array, *, exact: bool) -> None:
    """Store the sums of d (G, r, W) and of its squares in `sums` and `squares` (G, W). einsum squares and adds in one pass."""
    line = d[:, :, 0]
    if d.shape[2] == 1 and exact:  # sums of integers are exact in any order
        np.einsum("gr->g", line, out=sums[:, 0])
        np.einsum("gr,gr->g", line, line, out=squares[:, 0])
    elif d.shape[2] == 1:  # np.add.reduce sums pairwise; einsum would accumulate the error of a long sum
        np.add.reduce(line, axis=1, out=sums[:, 0])
        np.square(line, out=line)
        np.add.reduce(line, axis=1, out=squares[:, 0])
    else:
        np.add.reduce(d, axis=1, out=sums)
        np.einsum("grc,grc->gc", d, d, out=squares)


def _mark_underflow(x: Array, keep: Bools | None, first: Floats, m2: Floats) -> None:
    """Set m2 to NaN where the squares underflow although the values vary."""
    tiny = m2 < TINY
    if x.dtype.kind != "f" or not tiny.any():
        return
    some = tiny.any(axis=0)
    features = slice(None) if some.all() else np.flatnonzero(some)  # a slice gives a view, without a copy
    varies = x[:, :, features] != first[:, :, features].astype(x.dtype)
    if keep is not None:
        varies &= keep[:, :, features]
    lost = varies.any(axis=1) & tiny[:, features]
    m2[:, features] = np.where(lost, np.nan, m2[:, features])
