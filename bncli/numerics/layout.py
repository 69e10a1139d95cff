"""How the axes of an array map to features, and how batches are cut into blocks.

Every array is viewed as (R, C, I): R rows, C features and I positions, which are contiguous in memory. (N, C) data has
R = N and I = 1; images (N, C, H, W) with features on axis 1 have R = N and I = H·W; images (N, H, W, C) with features on
the last axis have R = N·H·W and I = 1. All sizes below depend only on the batch size and the sample shape, not on files,
chunks, memory or workers, so that results are reproducible byte for byte.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

from bncli.errors import UsageError
from bncli.numerics import compiled
from bncli.numerics.arrays import Array
from bncli.numerics.kernels import BLOCK_ROWS, FileRange, Missing, block_moments, stored_runs
from bncli.numerics.moments import Moments

PIECE_VALUES = 1 << 18 if compiled.AVAILABLE else 1 << 20  # values read at a time; NumPy has more overhead per call
WIDE_VALUES = 1 << 21  # maximum size of a block; blocks of wide rows have fewer rows
PENDING_VALUES = 1 << 16  # block results to collect before merging; merging many at once is cheap

Read = Callable[[int, int], Array]  # (first value, count) -> values, shape (count,)


@dataclass(frozen=True)
class Values:
    """Access to values by flat position, relative to `start`.

    Attributes
    ----------
    read : function (first, count) -> array of shape (count,)
    stored : function (first, count) -> FileRange or None
        The range of a file where these values are stored unencoded; None if they are not.
    start : int
    """

    read: Read
    stored: Callable[[int, int], FileRange | None] = lambda first, count: None
    start: int = 0

    def __call__(self, first: int, count: int) -> Array:
        """Read the values at positions first to first + count: an array of shape (count,)."""
        return self.read(self.start + first, count)

    def shifted(self, by: int) -> Values:
        """The same values, with positions relative to `start + by`."""
        return replace(self, start=self.start + by)


@dataclass(frozen=True)
class Layout:
    """The (R, C, I) view of samples.

    Attributes
    ----------
    rows_per_sample, features, positions : int
        The values of a sample have shape (rows_per_sample, features, positions) in C order.
    """

    rows_per_sample: int
    features: int
    positions: int

    @classmethod
    def of(cls, shape: tuple[int, ...], axis: int) -> Layout:
        """Layout of an array of this shape, with samples on axis 0 and features on `axis`.

        Raises
        ------
        UsageError
            For axis 0, or an axis that the array does not have.
        """
        axis = feature_axis(len(shape), axis)
        return cls(math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :]))

    @property
    def row_size(self) -> int:
        """Values per row."""
        return self.features * self.positions

    @property
    def sample_size(self) -> int:
        """Values per sample."""
        return self.rows_per_sample * self.row_size

    @property
    def values_per_sample(self) -> int:
        """Values per feature and sample."""
        return self.rows_per_sample * self.positions

    def batches_at_once(self, batch_size: int) -> int:
        """Batches per segment: as many as give at most PENDING_VALUES block results, but at least one."""
        rows = batch_size * self.rows_per_sample
        if self._by_position:
            results = rows * self.features * -(-self.positions // self._position_block)
        else:
            results = -(-rows // self._row_block(rows)) * self.row_size
        return max(1, PENDING_VALUES // results)

    def moments(self, values: Values, batches: int, samples: int, missing: Missing) -> Moments:
        """Moments of shape (batches, C) of consecutive batches of `samples` samples.

        Parameters
        ----------
        values : Values
            Relative to the start of the first batch. Read about PIECE_VALUES at a time.
        batches : int
            At most `batches_at_once`.
        """
        rows = samples * self.rows_per_sample
        if self._by_position:
            return self._moments_by_position(values, batches, rows, missing)
        if self.row_size > WIDE_VALUES:
            return self._moments_of_wide_rows(values, batches * rows, missing)
        block = self._row_block(rows)
        return self._join_positions(_run_moments(values, batches, rows, block, self.row_size, missing))

    @property
    def _by_position(self) -> bool:
        """Whether blocks are cut from the positions of one row and feature; else each position is a column of a block."""
        return self.positions >= BLOCK_ROWS

    @property
    def _position_block(self) -> int:
        return _even(self.positions, BLOCK_ROWS)

    def _row_block(self, rows: int) -> int:
        return _even(rows, min(BLOCK_ROWS, max(1, WIDE_VALUES // self.row_size)))

    def _moments_by_position(self, values: Values, batches: int, rows: int, missing: Missing) -> Moments:
        """Moments with blocks of positions, merged now and then to bound the number of pending results."""
        block = self._position_block
        at_once = max(1, PENDING_VALUES // (self.features * -(-self.positions // block)))
        if batches > 1:  # then all rows fit, see `batches_at_once`
            at_once = rows * batches
        total: Moments | None = None
        for row in range(0, rows * batches, at_once):
            count = min(at_once, rows * batches - row)
            start = row * self.row_size
            runs = _run_moments(values.shifted(start), count * self.features, self.positions, block, 1, missing)
            by_row = runs.map(lambda v: v.reshape(-1, self.features)).reduce_runs(batches)  # (batches, C)
            total = by_row if total is None else total.merge(by_row)
        assert total is not None
        return total

    def _moments_of_wide_rows(self, values: Values, rows: int, missing: Missing) -> Moments:
        """Moments of rows with more than WIDE_VALUES values: some features of one row at a time."""
        at_once = max(1, PIECE_VALUES // self.positions)
        total = Moments.empty((1, self.features))
        for row in range(rows):
            for feature in range(0, self.features, at_once):
                count = min(at_once, self.features - feature)
                x = values((row * self.features + feature) * self.positions, count * self.positions)
                part = Moments.of(block_moments(x.reshape(1, 1, -1), missing))  # (1, count · I)
                where = (slice(None), slice(feature, feature + count))
                total[where] = total[where].merge(self._join_positions(part))
        return total

    def _join_positions(self, columns: Moments) -> Moments:
        """Merge the columns of each feature: from shape (B, C·I) to (B, C)."""
        if self.positions == 1:
            return columns
        joined = columns.map(lambda v: v.reshape(-1, 1)).reduce_runs(columns.count.size // self.positions)  # (B·C, 1)
        return joined.map(lambda v: v.reshape(len(columns.count), -1))


def feature_axis(rank: int, axis: int) -> int:
    """The feature axis as a number from 1 to rank - 1; raise UsageError for axis 0 or one that does not exist.

    >>> feature_axis(4, -1)
    3
    """
    try:
        axis = operator.index(axis)
    except TypeError:
        raise UsageError(f"axis {axis!r} is not an integer; use 1, or -1 for the last axis") from None
    if axis == 0 or axis == -rank:
        raise UsageError("axis 0 counts the samples; features must be on another axis (1, or -1 for the last)")
    if not -rank < axis < rank:
        raise UsageError(
            f"axis {axis} does not exist in data of {rank} dimensions; use 1 to {rank - 1}, or -1 for the last"
        )
    return axis % rank


def _even(length: int, limit: int) -> int:
    """Part size that cuts `length` into the fewest parts of at most `limit`, of nearly equal size.

    >>> _even(300, 128), _even(7, 128)
    (100, 7)
    """
    return -(-length // -(-length // limit))


def _run_moments(values: Values, runs: int, rows: int, block: int, columns: int, missing: Missing) -> Moments:
    """Moments of shape (runs, columns) of values of shape (runs, rows, columns), in blocks of `block` rows."""
    if rows % block == 0:
        return _even_run_moments(values, runs, rows // block, block, columns, missing)
    # the last block of each run is shorter: one call for all whole blocks, another for all last ones
    whole = rows // block * block
    at_once = PIECE_VALUES // (rows * columns)
    if not at_once:
        return _long_run_moments(values, runs, rows, block, columns, missing)
    blocks, lasts = [], []
    for run in range(0, runs, at_once):
        count = min(at_once, runs - run)
        x = values(run * rows * columns, count * rows * columns).reshape(count, rows, columns)
        blocks.append(Moments.of(block_moments(x[:, :whole].reshape(-1, block, columns), missing)))
        lasts.append(Moments.of(block_moments(x[:, whole:], missing)))
    return Moments.concatenate(blocks).reduce_runs(runs).merge(Moments.concatenate(lasts))


def _long_run_moments(values: Values, runs: int, rows: int, block: int, columns: int, missing: Missing) -> Moments:
    """`_run_moments` for runs longer than PIECE_VALUES."""
    whole = rows // block * block
    parts = []
    for run in range(runs):
        start = run * rows * columns
        most = _even_run_moments(values.shifted(start), 1, whole // block, block, columns, missing)
        last = values(start + whole * columns, (rows - whole) * columns).reshape(1, -1, columns)
        parts.append(most.merge(Moments.of(block_moments(last, missing))))
    return Moments.concatenate(parts)


def _even_run_moments(values: Values, runs: int, blocks: int, block: int, columns: int, missing: Missing) -> Moments:
    """Moments of shape (runs, columns) of values of shape (runs, blocks, block, columns)."""
    if runs > 1:
        return _merged_blocks(values, runs, blocks, block, columns, missing)
    at_once = max(1, PENDING_VALUES // columns)
    total: Moments | None = None
    for first in range(0, blocks, at_once):  # one large batch: merge now and then
        part = values.shifted(first * block * columns)
        merged = _merged_blocks(part, 1, min(at_once, blocks - first), block, columns, missing)
        total = merged if total is None else total.merge(merged)
    assert total is not None
    return total


def _merged_blocks(values: Values, runs: int, blocks: int, block: int, columns: int, missing: Missing) -> Moments:
    """`_even_run_moments` with a single merge, directly from the file if possible."""
    size = block * columns
    stored = values.stored(values.start, runs * blocks * size)
    found = stored_runs(stored, (runs, blocks, block, columns), missing) if stored else None
    if found is not None:
        return Moments(*found)
    at_once = max(1, PIECE_VALUES // size)  # blocks per call of the kernel
    parts = []
    for first in range(0, runs * blocks, at_once):
        count = min(at_once, runs * blocks - first)
        x = values(first * size, count * size).reshape(count, block, columns)
        parts.append(Moments.of(block_moments(x, missing)))
    return Moments.concatenate(parts).reduce_runs(runs)
