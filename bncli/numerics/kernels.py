"""Count, mean and sum of squared deviations of blocks of values: the innermost arithmetic.

A block is r values of each of C features. Its deviations are taken from a pivot near its mean, so nothing
cancels; sums run in a fixed order without BLAS, whose bits change with threads and processor.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bncli.numerics import compiled
from bncli.numerics.arrays import Array, Bools, DType, Floats

BLOCK_ROWS = 128  # rounding grows with the length of a sum; short blocks keep it near one ulp
LANES = 4  # partial sums that run side by side: fewer, longer vector operations and shorter sums
WIDE_ENOUGH = 512  # values that numpy adds in one go; fewer, and four times the lanes pay
PIVOT_SHARE = 8  # the pivot is found from at least an 8th of a block
SUBTRACT_AT_ONCE = 128  # values of a row repeated to this length, which numpy subtracts in one go
TILE_BYTES = 1 << 20  # of deviations computed at a time, which stay in cache
FEATURES_AT_ONCE = TILE_BYTES // BLOCK_ROWS // 8
TINY = 1e-300  # a sum of squares below this has lost digits to underflow

_buffers = threading.local()


class Blocks(NamedTuple):
    """Moments of G blocks; each array of shape (G, C)."""

    number: Floats
    mean: Floats
    mean_low: Floats  # the part of the mean that does not fit a float64
    m2: Floats  # not finite where the values are not, or are too large or too close together to square


class Place(NamedTuple):
    """Where values lie in a file in C order and native byte order: its descriptor, the first byte, their type."""

    fd: int
    offset: int
    dtype: DType


class Missing(NamedTuple):
    """Which values do not count: non-finite ones under `omit`, and those equal to `fill`."""

    omit: bool = False
    fill: float | int | None = None


def two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The rounded sum and its exact error (Knuth, TAOCP 2, 4.2.2)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def quick_two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """As `two_sum`, for |a| >= |b| (Dekker 1971)."""
    s = a + b
    return s, b - (s - a)


def block_moments(x: Array, missing: Missing) -> Blocks:
    """Count, mean and sum of squared deviations per block and feature.

    Parameters
    ----------
    x : array of shape (G, r, C)
        G blocks of r values of C features, of any real type.
    missing : Missing
        Values to leave out, per feature.

    Returns
    -------
    Blocks
        Where a result does not exist (non-finite input, squares that overflow or underflow) m2 is not finite.
    """
    groups, rows, features = x.shape
    if compiled.AVAILABLE and missing.fill is None:
        mean, mean_low, m2 = compiled.blocks(x)
        if not missing.omit or np.isfinite(m2).all():
            return Blocks(np.full(mean.shape, float(rows)), mean, mean_low, m2)
    if features <= FEATURES_AT_ONCE:
        return _tile_moments(x, missing)
    out = Blocks(*(np.empty((groups, features)) for _ in Blocks._fields))
    for start in range(0, features, FEATURES_AT_ONCE):
        tile = slice(start, start + FEATURES_AT_ONCE)
        for whole, part in zip(out, _tile_moments(x[:, :, tile], missing), strict=True):
            whole[:, tile] = part
    return out


def stored_runs(place: Place, shape: tuple[int, int, int, int], missing: Missing) -> list[Floats] | None:
    """Count, mean and m2 (the latter two as high and low) of runs of blocks, of shape (runs, blocks, r, C), in a file.

    Read, summed and merged in one compiled call: five arrays of shape (runs, C). None where that cannot be done: then
    the values have to be read, and `block_moments` tells what is wrong with them.
    """
    if not compiled.AVAILABLE or missing.fill is not None:
        return None
    found = compiled.read_runs(place.fd, place.offset, place.dtype, shape)
    return None if found is None or (missing.omit and not np.isfinite(found[3]).all()) else found


def present(x: Array, missing: Missing) -> Bools:
    """Mark the values that count (True), of the shape of x."""
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
    """Shift by a pivot near the block's mean, then sum deviations and their squares.

    The pivot is the first value plus the mean offset of every 8th value from it. A constant block thus has
    deviations of exactly 0. With s the standard deviation of the block, the pivot lies within sqrt(8) s of the mean
    whatever the values are (Cauchy-Schwarz over the 8th part), so that `squares - sums * offset` keeps its digits.
    """
    groups, rows, features = x.shape
    step = min(PIVOT_SHARE, max(1, rows // PIVOT_SHARE))
    some = x[:, ::step]
    if keep is None:
        count = np.full((groups, features), float(rows))
        first = x[:, :1].astype(np.float64)
        offsets = np.subtract(some, first, dtype=np.float64)
        offset = np.add.reduce(offsets, axis=1, keepdims=True) / offsets.shape[1]
    else:
        count = keep.sum(axis=1, dtype=np.float64)
        first = np.take_along_axis(x, keep.argmax(axis=1)[:, None], axis=1).astype(np.float64)
        first[count[:, None] == 0] = 0
        counted = keep[:, ::step]
        offsets = np.where(counted, some - first, 0.0)
        offset = np.add.reduce(offsets, axis=1, keepdims=True) / np.maximum(counted.sum(axis=1, keepdims=True), 1)
    pivot = first + offset  # (G, 1, C)
    sums, squares = _sums(x, np.float64, pivot, keep)
    n = np.maximum(count, 1)
    offset = sums / n
    m2 = np.maximum(squares - sums * offset, 0)  # NaN stays NaN
    mean, mean_low = two_sum(pivot[:, 0], offset)
    far = np.nonzero(2 * sums * offset > squares)
    blocks = Blocks(count, mean, mean_low, m2)
    if far[0].size:
        _about_mean(x, keep, blocks, *far)
    _mark_underflow(x, keep, first, m2)
    return blocks


def _whole_moments(x: Array) -> Blocks:
    """Moments of 8- and 16-bit integers: the sums of a block, and of the squares, are exact without a pivot.

    128 squares of 8 bits stay below 2^24, which float32 counts up to; 128 of 16 bits are far below 2^53.
    """
    found = _sums(x, np.float32 if x.dtype.itemsize == 1 else np.float64)
    sums, squares = (v.astype(np.float64) for v in found)
    n = float(x.shape[1])
    mean = sums / n
    high = mean.astype(np.float32).astype(np.float64)  # in two parts, whose products with n are exact
    mean_low = ((sums - high * n) - (mean - high) * n) / n  # the division's remainder
    return Blocks(np.full(mean.shape, n), mean, mean_low, (n * squares - sums * sums) / n)


def _about_mean(
    x: Array,
    keep: Bools | None,
    blocks: Blocks,
    group: npt.NDArray[np.intp],
    feature: npt.NDArray[np.intp],
) -> None:
    """Compute some columns again about their mean: those whose pivot lay farther than s from it.

    Rare (every 8th value has to be unlike the others), and worth a second look: at sqrt(8) s the difference in m2
    is 8 times smaller than its terms.
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
    """Sums of x - pivot, and of its squares, over the rows: (G, r, C) becomes two arrays of shape (G, C) of this type.

    As many blocks at a time as stay in cache. Partial sums run side by side, in a fixed order; what is left after the
    last whole row of them comes by itself.
    """
    groups, rows, features = x.shape
    lanes = 1 if features == 1 else LANES if features * LANES >= WIDE_ENOUGH else 8 * LANES
    lanes = lanes if lanes <= rows else 1
    whole = rows // lanes * lanes
    sums, squares = (np.empty((groups, lanes * features), dtype) for _ in range(2))
    at_once = max(1, TILE_BYTES // (rows * features * np.dtype(dtype).itemsize))
    deviations = _scratch((min(at_once, groups), rows, features), dtype)
    for start in range(0, groups, at_once):
        tile = slice(start, start + at_once)
        d = deviations[: min(at_once, groups - start)]
        np.copyto(d, x[tile], casting="unsafe")
        if pivot is not None:
            _subtract(d, pivot[tile])
        if keep is not None:
            d[~keep[tile]] = 0
        side_by_side = d[:, :whole].reshape(len(d), -1, lanes * features)
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
    """A buffer of this thread, to be overwritten: fresh memory for every block would cost more than the sums."""
    size = math.prod(shape)
    buffer: Array | None = getattr(_buffers, "deviations", None)
    if buffer is None or buffer.size < size or buffer.dtype != dtype:
        buffer = _buffers.deviations = np.empty(size, dtype)
    return buffer[:size].reshape(shape)


def _subtract(d: Floats, pivot: Floats) -> None:
    """d -= pivot, with narrow rows taken several at once: numpy pays per run of C values."""
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
    """Fill `sums` and `squares`, of shape (G, W), with those of d, of shape (G, r, W); einsum squares and adds in one pass."""
    line = d[:, :, 0]
    if d.shape[2] == 1 and exact:  # whole numbers, whose order does not matter
        np.einsum("gr->g", line, out=sums[:, 0])
        np.einsum("gr,gr->g", line, line, out=squares[:, 0])
    elif d.shape[2] == 1:  # pairwise: einsum would add one long line
        np.add.reduce(line, axis=1, out=sums[:, 0])
        np.square(line, out=line)
        np.add.reduce(line, axis=1, out=squares[:, 0])
    else:
        np.add.reduce(d, axis=1, out=sums)
        np.einsum("grc,grc->gc", d, d, out=squares)


def _mark_underflow(x: Array, keep: Bools | None, first: Floats, m2: Floats) -> None:
    """Set m2 to NaN where the squares vanished although the values vary."""
    tiny = m2 < TINY
    if x.dtype.kind != "f" or not tiny.any():
        return
    some = tiny.any(axis=0)
    features = slice(None) if some.all() else np.flatnonzero(some)  # a view where it can be one
    varies = x[:, :, features] != first[:, :, features].astype(x.dtype)
    if keep is not None:
        varies &= keep[:, :, features]
    lost = varies.any(axis=1) & tiny[:, features]
    m2[:, features] = np.where(lost, np.nan, m2[:, features])
