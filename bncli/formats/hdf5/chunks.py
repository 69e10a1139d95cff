"""The chunks of an HDF5 dataset: where each is stored, and reading values from them by flat position."""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from operator import mul
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bncli.numerics.arrays import Array

if TYPE_CHECKING:
    from h5py import h5d

ENTRY_BYTES = 512  # memory that a kept chunk takes besides its values
Box = tuple[tuple[int, ...], tuple[int, ...]]  # start and extent
Slices = tuple[slice, ...]
Cut = tuple[int, slice, slice]  # along one axis: index of a chunk, the part of the chunk, the part of the range


class ChunkTable:
    """Where each chunk of a dataset is stored: one pass over the chunk index of the file, kept in a few arrays.

    HDF5 itself walks the index, which has one of six forms (file format specification 3.0): a version 1 B-tree
    (III.A.1), a single chunk, none (implicit), a fixed array, an extensible array or a version 2 B-tree (VII.A to VII.E).
    In each, an entry gives the offset of a chunk in the dataset, its address and size in the file and its filter mask.
    Chunks are numbered in C order of their position in the grid.

    Parameters
    ----------
    dataset_id : h5py.h5d.DatasetID
    shape, chunks : tuple of int

    Raises
    ------
    ValueError
        When the index contradicts the dataset's shape.
    """

    def __init__(self, dataset_id: h5d.DatasetID, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
        self.chunks = chunks
        self.grid = tuple(-(-n // c) for n, c in zip(shape, chunks, strict=True))
        positions, stored = array("q"), array("q")

        def note(info: h5d.StoreInfo) -> None:
            positions.extend(info.chunk_offset)
            stored.extend((-1 if info.byte_offset is None else info.byte_offset, info.size, info.filter_mask))

        dataset_id.chunk_iter(note)
        numbers = self._numbers(np.asarray(positions, np.int64).reshape(-1, len(chunks)))
        order = np.argsort(numbers, kind="stable")
        self._numbers_stored: npt.NDArray[np.int64] = numbers[order]
        self.offset, self.size, self.mask = (np.asarray(stored, np.int64).reshape(-1, 3)[order]).T.copy()
        if (np.diff(self._numbers_stored) == 0).any():
            raise ValueError("two chunks are stored for the same position")
        self.missing = math.prod(self.grid) - numbers.size

    def _numbers(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the chunks at these offsets, of shape (n, axes); ValueError unless each is in the grid."""
        if math.prod(self.grid) > np.iinfo(np.int64).max:
            raise ValueError("it claims more chunks than a file can hold")
        cells = positions // self.chunks
        if (cells * self.chunks != positions).any() or (cells < 0).any() or (cells >= self.grid).any():
            raise ValueError("a chunk is stored for a position outside the dataset")
        numbers = np.zeros(len(positions), np.int64)
        for axis, count in enumerate(self.grid):
            numbers = numbers * count + cells[:, axis]
        return numbers

    def find(self, number: int) -> int:
        """The index of a chunk in `offset`, `size` and `mask`, or -1 if it was never written."""
        if not self.missing:
            return number
        index = int(np.searchsorted(self._numbers_stored, number))
        return index if index < len(self.size) and self._numbers_stored[index] == number else -1

    def number(self, index: int) -> int:
        """The number of the chunk at an index of `offset`, `size` and `mask`."""
        return int(self._numbers_stored[index])

    def first_missing(self) -> int:
        """The number of the first chunk that was never written."""
        gaps = np.flatnonzero(self._numbers_stored != np.arange(len(self.size)))
        return int(gaps[0]) if gaps.size else len(self.size)

    def start(self, number: int) -> tuple[int, ...]:
        """The position of the chunk's first value in the dataset."""
        position = []
        for count, length in zip(reversed(self.grid), reversed(self.chunks), strict=True):
            number, cell = divmod(number, count)
            position.append(cell * length)
        return tuple(reversed(position))


def boxes(shape: tuple[int, ...], first: int, count: int) -> Iterator[Box]:
    """Cut `count` values from flat position `first` on into boxes, in order, each contiguous in C order.

    >>> list(boxes((4, 3), 2, 8))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if len(shape) == 1:
        if count:
            yield (first,), (count,)
        return
    inner = math.prod(shape[1:])
    while count:
        row, within = divmod(first, inner)
        whole = 0 if within else count // inner
        if whole:
            yield (row, *(0,) * (len(shape) - 1)), (whole, *shape[1:])
            taken = whole * inner
        else:
            taken = min(count, inner - within)
            for start, extent in boxes(shape[1:], within, taken):
                yield (row, *start), (1, *extent)
        first, count = first + taken, count - taken


class ChunkCache:
    """Values gathered from chunks, which are loaded when needed and kept while the budget allows.

    A chunk that is read whole at once is not kept. If there is no room for another, chunks that the current read does not
    need are dropped, the least recently used first; if there are none, the new chunk is not kept. So sequential reading
    loads each chunk once if a row of chunks fits the budget; if not, as many as fit are kept.

    Parameters
    ----------
    table : ChunkTable
    shape : tuple of int
        Of the dataset.
    load : callable
        (number, out) -> values of this chunk, at least those inside the dataset. May write them to `out`, which has room
        for a whole chunk, if it is not None.
    load_part : callable or None
        (number, first, out): fills `out` with the values of a chunk from a flat position on; for chunks without filters.
    budget : int
        Bytes to keep.
    """

    def __init__(
        self,
        table: ChunkTable,
        shape: tuple[int, ...],
        load: Callable[[int, Array | None], Array],
        load_part: Callable[[int, int, Array], None] | None,
        budget: int,
    ) -> None:
        self._table, self._shape, self._load, self._load_part = table, shape, load, load_part
        self._room = budget
        self._full = math.prod(table.chunks)
        self._weights = [math.prod(table.grid[axis + 1 :]) for axis in range(len(shape))]
        self._kept: OrderedDict[int, Array] = OrderedDict()

    def read(self, first: int, out: Array) -> None:
        """Fill `out` (1-D) with the values from flat position `first` on."""
        row_size, stop, done = math.prod(self._shape[1:]), first + out.size, 0
        for start, extent in boxes(self._shape, first, out.size):
            count = math.prod(extent)
            target = out[done : done + count].reshape(extent)
            axes = [list(_cuts(*axis)) for axis in zip(start[1:], extent[1:], self._table.chunks[1:], strict=True)]
            # not a list for the first axis, along which there may be very many chunks
            for head in _cuts(start[0], extent[0], self._table.chunks[0]):
                spare = self._unneeded(first + done + head[2].start * row_size, stop)
                for number, inside, part in self._overlaps(head, axes):
                    self._copy(number, inside, target[part], spare)
            done += count

    def _overlaps(self, head: Cut, axes: list[list[Cut]]) -> Iterator[tuple[int, Slices, Slices]]:
        """Yield each chunk that overlaps a box: its number, the part of the chunk, and the part of the box."""
        weights = self._weights
        for rest in product(*axes):
            cells, insides, targets = zip(head, *rest, strict=True)
            yield sum(map(mul, cells, weights)), insides, targets

    def _copy(self, number: int, inside: Slices, target: Array, spare: Iterator[int]) -> None:
        values = self._kept.get(number)
        if values is not None:
            self._kept.move_to_end(number)
        elif self._load_part and target.flags.c_contiguous and self._is_run(inside):
            self._load_part(number, inside[0].start * (self._full // self._table.chunks[0]), target.reshape(-1))
            return
        else:
            whole = target.size == self._full and target.flags.c_contiguous
            values = self._load(number, target if whole else None)
            if values is target:
                return
            if target.size < self._full and target.size < math.prod(self._extent(number)):  # else it was read whole
                self._keep(number, values, spare)
        target[...] = values[inside]

    def _extent(self, number: int) -> tuple[int, ...]:
        """The shape of the part of a chunk inside the dataset."""
        start = self._table.start(number)
        return tuple(min(c, n - s) for s, c, n in zip(start, self._table.chunks, self._shape, strict=True))

    def _is_run(self, inside: Slices) -> bool:
        """Whether a part of a chunk is one run of its bytes: complete along every axis but the first."""
        return all(s.stop - s.start == n for s, n in zip(inside[1:], self._table.chunks[1:], strict=True))

    def _keep(self, number: int, values: Array, spare: Iterator[int]) -> None:
        cost = values.nbytes + ENTRY_BYTES
        if self._kept or cost - ENTRY_BYTES > self._room:  # a single chunk of exactly the budget is kept
            while cost > self._room and (other := next(spare, None)) is not None:
                self._room += self._kept.pop(other).nbytes + ENTRY_BYTES
            if cost > self._room and self._kept:
                return
        self._kept[number] = values
        self._room -= cost

    def _unneeded(self, position: int, stop: int) -> Iterator[int]:
        """Yield kept chunks without a value in positions `position` to `stop`, the least recently used first."""
        for number in list(self._kept):
            start = self._table.start(number)
            last = [s + n - 1 for s, n in zip(start, self._extent(number), strict=True)]
            if _flat(last, self._shape) < position or _flat(start, self._shape) >= stop:
                yield number


def _cuts(start: int, count: int, length: int) -> Iterator[Cut]:
    """Cut a range of one axis at multiples of `length`."""
    for cell in range(start // length, (start + count - 1) // length + 1):
        low, high = max(start, cell * length), min(start + count, (cell + 1) * length)
        yield cell, slice(low - cell * length, high - cell * length), slice(low - start, high - start)


def _flat(position: Iterable[int], shape: tuple[int, ...]) -> int:
    flat = 0
    for index, length in zip(position, shape, strict=True):
        flat = flat * length + index
    return flat
