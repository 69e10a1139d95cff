"""Samples of a data set in an order that is drawn: some of them left out, or shuffled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.formats.dataset import Input, Joined
from bncli.numerics.arrays import Array
from bncli.numerics.kernels import FileRange

SPAN_VALUES = 1 << 18  # read at a time
GAP_VALUES = 1 << 12  # reading so many that are not wanted costs less than another read

SCATTERED_BYTES = 256  # a sample of fewer does not get an entry of its own in a read
MOST_PLACES = 1024  # of one read (Linux's IOV_MAX)

Indices = Callable[[int, int], npt.NDArray[np.int64]]  # (first position, count) -> samples of the data set


class Permuted:
    """A data set read by drawn position: it has what `Joined` has, and reads from one.

    A window of positions is gathered at once, in the order of the file, so that neighbors are read together and every
    chunk is decoded once for it. Where a window does not fit half of the buffers, as much of it as fits is.

    Parameters
    ----------
    data : Joined
    indices : function (first, count) -> int64 array of shape (count,)
        The samples of `data` at drawn positions first to first + count.
    count : int
        How many positions there are.
    window : int
        Positions that are best gathered together.
    budget : int
        Bytes of buffers; those of `data` are not counted, it is asked for half as many when a worker reads.
    """

    def __init__(self, data: Joined, indices: Indices, count: int, window: int, budget: int) -> None:
        self._data, self._indices, self._budget, self._window = data, indices, budget, window
        self.shape = (count, *data.shape[1:])
        self.sample_size, self.dtype = data.sample_size, data.dtype
        self.names, self.notes, self.marks = data.names, data.notes, data.marks
        sample_bytes = self.sample_size * self.dtype.itemsize
        self._piece = min(window, budget // 2 // sample_bytes)  # positions gathered at once; 0: a sample does not fit
        self._buffer = np.empty((0, self.sample_size), self.dtype)
        self._rows: list[memoryview] = []  # of the buffer
        self._start = self._stop = 0  # of the positions in the buffer
        self._scratch = np.empty(0, self.dtype)

    @property
    def inputs(self) -> list[Input]:
        """The inputs as they were when the run began; see `Joined`."""
        return self._data.inputs

    @property
    def files(self) -> list[str]:
        """Every file that is read."""
        return self._data.files

    @property
    def fill(self) -> float | int | None:
        """The fill value in the type of what `read` returns; None where no value can equal it."""
        return self._data.fill

    @property
    def rows_together(self) -> int:
        """Positions that are gathered together; reading fewer at a time means gathering them again."""
        return max(1, self._piece)

    def read(self, first: int, count: int) -> Array:
        """Values of the drawn samples in C order, from position first on; see `Joined.read`."""
        values = self._values(first, count)
        if len(values) == count:
            return values
        if len(self._scratch) < count:
            self._scratch = np.empty(count, self.dtype)
        out, done = self._scratch[:count], 0
        while True:
            out[done : done + len(values)] = values
            done += len(values)
            if done == count:
                return out
            values = self._values(first + done, count - done)

    def stored(self, first: int, count: int) -> FileRange | None:
        """None: permuted samples are not contiguous in a file."""
        return None

    def locate(self, position: int) -> tuple[str, int]:
        """Address and sample (counted in that input) of a value; see `Joined.locate`."""
        return self._data.locate(self._position_in_data(position))

    def inputs_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which of `inputs` hold these samples, given in ascending order."""
        first, last = int(samples[0]), int(samples[-1])
        return self._data.inputs_of(self._indices(first, last + 1 - first)[samples - first])

    @property
    def most_readers(self) -> int:
        """How many readers can share the buffers: each needs a window, and what it takes to read one."""
        window_bytes = self._window * self.sample_size * self.dtype.itemsize
        return max(1, min(self._data.most_readers // 2, self._budget // (2 * window_bytes)))

    def reader(self, share: int) -> Permuted:
        """The same samples for one of `share` workers; see `Joined.reader`."""
        return Permuted(self._data.reader(2 * share), self._indices, self.shape[0], self._window, self._budget // share)

    def absolute(self) -> Permuted:
        """The same samples by absolute paths; see `Joined.absolute`."""
        return Permuted(self._data.absolute(), self._indices, self.shape[0], self._window, self._budget)

    def __getstate__(self) -> dict[str, Any]:
        """Plain values, without the buffers: a copy gathers its own windows."""
        buffer = np.empty((0, self.sample_size), self.dtype)
        dropped = {"_buffer": buffer, "_rows": [], "_start": 0, "_stop": 0, "_scratch": np.empty(0, self.dtype)}
        return vars(self) | dropped

    def check_unchanged(self) -> None:
        """Raise InputError when an input was replaced, cut or written to since the run began."""
        self._data.check_unchanged()

    def close(self) -> None:
        """Let go of the open input."""
        self._data.close()

    def __enter__(self) -> Permuted:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _values(self, first: int, count: int) -> Array:
        """Up to `count` values from position `first` on, as many as are contiguous."""
        sample, offset = divmod(first, self.sample_size)
        if not self._piece:
            return self._data.read(self._position_in_data(first), min(count, self.sample_size - offset))
        if not self._start <= sample < self._stop:
            self._gather(sample // self._piece * self._piece)
        there = self._buffer[sample - self._start : self._stop - self._start]
        return there.reshape(-1)[offset : offset + count]

    def _position_in_data(self, position: int) -> int:
        sample, offset = divmod(position, self.sample_size)
        return int(self._indices(sample, 1)[0]) * self.sample_size + offset

    def _gather(self, start: int) -> None:
        """Fill the buffer with the drawn samples from position `start` on, read in the order of the data set."""
        stop = min(start + self._piece, self.shape[0])
        if len(self._buffer) < stop - start:
            self._buffer, self._rows = np.empty((stop - start, self.sample_size), self.dtype), []
        self._start = self._stop = start  # nothing, should reading fail
        drawn = self._indices(start, stop - start)
        order = np.argsort(drawn)
        samples = drawn[order]
        at_once = max(1, SPAN_VALUES // self.sample_size)
        apart = np.diff(samples) > 1 + GAP_VALUES // self.sample_size
        cuts = np.flatnonzero(apart | (samples[1:] // at_once != samples[:-1] // at_once)) + 1
        places = self._places(order)
        for i, j in zip([0, *cuts.tolist()], [*cuts.tolist(), len(samples)], strict=True):
            if not (places and self._scatter(samples[i:j], places[i:j])):
                low, high = int(samples[i]), int(samples[j - 1]) + 1
                values = self._data.read(low * self.sample_size, (high - low) * self.sample_size)
                rows = values.reshape(high - low, self.sample_size)
                self._buffer[order[i:j]] = rows if len(rows) == j - i else rows[samples[i:j] - low]
        self._stop = stop

    def _places(self, order: npt.NDArray[np.intp]) -> list[memoryview]:
        """These rows of the buffer, to be read into one by one; none where they are too short for it to pay."""
        row_bytes = self.sample_size * self.dtype.itemsize
        if row_bytes < SCATTERED_BYTES:
            return []
        if not self._rows:
            flat = self._buffer.reshape(-1).data.cast("B")
            self._rows = [flat[at : at + row_bytes] for at in range(0, len(flat), row_bytes)]
        return [self._rows[row] for row in order.tolist()]

    def _scatter(self, samples: npt.NDArray[np.int64], places: list[memoryview]) -> bool:
        """Read ascending samples straight to their places, in few calls; False where that cannot be done."""
        low, high = int(samples[0]), int(samples[-1]) + 1
        place = self._data.stored(low * self.sample_size, (high - low) * self.sample_size)
        if place is None:
            return False
        if high - low > len(places):
            places = self._with_gaps(samples, places)
        offset = place.offset
        for i in range(0, len(places), MOST_PLACES):
            some = places[i : i + MOST_PLACES]
            size = sum(map(len, some))
            try:
                if os.preadv(place.fd, some, offset) != size:
                    return False  # the usual path reports what is wrong
            except OSError:
                return False  # so it does here
            offset += size
        return True

    def _with_gaps(self, samples: npt.NDArray[np.int64], places: list[memoryview]) -> list[memoryview]:
        """The places of ascending samples, and others for the samples between them, which are not wanted."""
        gap, found = memoryview(bytearray(GAP_VALUES * self.dtype.itemsize)), places[:1]
        for skipped, where in zip((np.diff(samples) - 1).tolist(), places[1:], strict=True):
            if skipped:
                found.append(gap[: skipped * len(where)])
            found.append(where)
        return found
