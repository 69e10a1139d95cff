"""How an array's axes become features, and how batches are cut into blocks.

Every array is seen as (R, C, I): R rows, C features and I positions that lie next to each other in memory. For
(N, C) data that is R = N, I = 1; for images (N, C, H, W) on axis 1, R = N and I = H·W; for (N, H, W, C) on the last
axis, R = N·H·W and I = 1. All sizes below follow from the batch size and the sample's shape alone, never from files,
chunks, memory or workers: that is what makes the results the same bytes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

from bncli.errors import UsageError
from bncli.numerics import compiled
from bncli.numerics.arrays import Array
from bncli.numerics.kernels import BLOCK_ROWS, Missing, Place, block_moments, stored_runs
from bncli.numerics.moments import Moments

PIECE_VALUES = 1 << 18 if compiled.AVAILABLE else 1 << 20  # read and computed at a time; NumPy pays more for calls
WIDE_VALUES = 1 << 21  # blocks of wide rows have fewer rows, so that they hold no more than this
PENDING_VALUES = 1 << 16  # results of blocks that wait to be merged: merging many at once is what makes it cheap

Read = Callable[[int, int], Array]  # (first value, count) -> values, shape (count,)


@dataclass(frozen=True)
class Values:
    """Values by position, counted from `start`.

    Attributes
    ----------
    read : function (first, count) -> array of shape (count,)
    stored : function (first, count) -> Place or None
        Where these values lie in a file just as they are, when they do.
    start : int
    """

    read: Read
    stored: Callable[[int, int], Place | None] = lambda first, count: None
    start: int = 0

    def __call__(self, first: int, count: int) -> Array:
        """Read values at positions first to first + count."""
        return self.read(self.start + first, count)

    def shifted(self, by: int) -> Values:
        """The same values, counted from `by` further on."""
        return replace(self, start=self.start + by)


@dataclass(frozen=True)
class Layout:
    """The (R, C, I) view of samples.

    Attributes
    ----------
    rows_per_sample, features, positions : int
        A sample's values are (rows_per_sample, features, positions) in C order.
    """

    rows_per_sample: int
    features: int
    positions: int

    @classmethod
    def of(cls, shape: tuple[int, ...], axis: int) -> Layout:
        """Layout of an array of this shape (axis 0 counts samples) with the features on `axis`.

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
        """Values that each feature has in one sample."""
        return self.rows_per_sample * self.positions

    def batches_at_once(self, batch_size: int) -> int:
        """How many batches make a segment: as many as keep PENDING_VALUES results of blocks, at least one."""
        rows = batch_size * self.rows_per_sample
        if self._by_position:
            results = rows * self.features * -(-self.positions // self._position_block)
        else:
            results = -(-rows // self._row_block(rows)) * self.row_size
        return max(1, PENDING_VALUES // results)

    def moments(self, values: Values, batches: int, samples: int, missing: Missing) -> Moments:
        """Moments of shape (batches, C) of consecutive batches of `samples` samples each.

        Parameters
        ----------
        values : Values
            Counted from the start of the first batch. Read in runs of about PIECE_VALUES.
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
        """Whether the positions of one row and feature fill blocks of their own; else each position is a column."""
        return self.positions >= BLOCK_ROWS

    @property
    def _position_block(self) -> int:
        return _even(self.positions, BLOCK_ROWS)

    def _row_block(self, rows: int) -> int:
        return _even(rows, min(BLOCK_ROWS, max(1, WIDE_VALUES // self.row_size)))

    def _moments_by_position(self, values: Values, batches: int, rows: int, missing: Missing) -> Moments:
        """Blocks of positions; rows by the thousand, so that the results that wait stay few."""
        block = self._position_block
        at_once = max(1, PENDING_VALUES // (self.features * -(-self.positions // block)))
        if batches > 1:  # then all rows fit, see batches_at_once
            at_once = rows * batches
        total: Moments | None = None
        for row in range(0, rows * batches, at_once):
            count = min(at_once, rows * batches - row)
            start = row * self.row_size
            runs = _run_moments(values.shifted(start), count * self.features, self.positions, block, 1, missing)
            by_row = runs.map(lambda v: v.reshape(-1, self.features)).reduce_runs(batches)
            total = by_row if total is None else total.merge(by_row)
        assert total is not None
        return total

    def _moments_of_wide_rows(self, values: Values, rows: int, missing: Missing) -> Moments:
        """Rows of more than WIDE_VALUES: a part of the features of one row at a time."""
        at_once = max(1, PIECE_VALUES // self.positions)
        total = Moments.empty((1, self.features))
        for row in range(rows):
            for feature in range(0, self.features, at_once):
                count = min(at_once, self.features - feature)
                x = values((row * self.features + feature) * self.positions, count * self.positions)
                part = Moments.of(block_moments(x.reshape(1, 1, -1), missing))
                where = (slice(None), slice(feature, feature + count))
                total[where] = total[where].merge(self._join_positions(part))
        return total

    def _join_positions(self, columns: Moments) -> Moments:
        """Merge the columns of one feature: (B, C·I) becomes (B, C)."""
        if self.positions == 1:
            return columns
        joined = columns.map(lambda v: v.reshape(-1, 1)).reduce_runs(columns.count.size // self.positions)
        return joined.map(lambda v: v.reshape(len(columns.count), -1))


def feature_axis(rank: int, axis: int) -> int:
    """The axis counted from the front, 1 to rank - 1.

    >>> feature_axis(4, -1)
    3
    """
    try:
        axis = operator.index(axis)
    except TypeError:
        raise UsageError(f"axis {axis!r} is not a whole number") from None
    if axis == 0 or axis == -rank:
        raise UsageError("axis 0 counts the samples; features lie on another axis (1, or -1 for the last)")
    if not -rank < axis < rank:
        raise UsageError(
            f"axis {axis} does not exist in data of {rank} dimensions; use 1 to {rank - 1}, or -1 for the last"
        )
    return axis % rank


def _even(length: int, limit: int) -> int:
    """Size of the parts when `length` is cut into as few parts of at most `limit` as possible, nearly even.

    >>> _even(300, 128), _even(7, 128)
    (100, 7)
    """
    return -(-length // -(-length // limit))


def _run_moments(values: Values, runs: int, rows: int, block: int, columns: int, missing: Missing) -> Moments:
    """Moments of shape (runs, columns) of consecutive runs of (rows, columns) values, in blocks of `block` rows."""
    if rows % block == 0:
        return _even_run_moments(values, runs, rows // block, block, columns, missing)
    # the last block of each run is shorter: all whole blocks in one call, all last ones in another
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
    """As `_run_moments` where one run is more than is read at a time."""
    whole = rows // block * block
    parts = []
    for run in range(runs):
        start = run * rows * columns
        most = _even_run_moments(values.shifted(start), 1, whole // block, block, columns, missing)
        last = values(start + whole * columns, (rows - whole) * columns).reshape(1, -1, columns)
        parts.append(most.merge(Moments.of(block_moments(last, missing))))
    return Moments.concatenate(parts)


def _even_run_moments(values: Values, runs: int, blocks: int, block: int, columns: int, missing: Missing) -> Moments:
    """Moments of shape (runs, columns) of runs of `blocks` equal blocks."""
    if runs > 1:
        return _merged_blocks(values, runs, blocks, block, columns, missing)
    at_once = max(1, PENDING_VALUES // columns)
    total: Moments | None = None
    for first in range(0, blocks, at_once):  # one huge batch, merged now and then
        part = values.shifted(first * block * columns)
        merged = _merged_blocks(part, 1, min(at_once, blocks - first), block, columns, missing)
        total = merged if total is None else total.merge(merged)
    assert total is not None
    return total


def _merged_blocks(values: Values, runs: int, blocks: int, block: int, columns: int, missing: Missing) -> Moments:
    """As `_even_run_moments` of runs that are merged in one go: straight from the file where that can be, else read here."""
    size = block * columns
    place = values.stored(values.start, runs * blocks * size)
    found = stored_runs(place, (runs, blocks, block, columns), missing) if place else None
    if found is not None:
        return Moments(*found)
    at_once = max(1, PIECE_VALUES // size)  # blocks per call of the kernel
    parts = []
    for first in range(0, runs * blocks, at_once):
        count = min(at_once, runs * blocks - first)
        x = values(first * size, count * size).reshape(count, block, columns)
        parts.append(Moments.of(block_moments(x, missing)))
    return Moments.concatenate(parts).reduce_runs(runs)
