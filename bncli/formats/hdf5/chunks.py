"""The chunks of an HDF5 dataset as bytes: where they are stored, and how to decode them.

HDF5 itself fills up a chunk that inflates short with whatever was in memory, and holds one lock for the whole process
while it inflates. So the common filters are undone here, with every length checked. (The HDF5 file format
specification, version 3.0, section IV.A.2.l, names the filters; their layout is that of H5Zshuffle.c and H5checksum.c.)
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bncli.numerics import compiled
from bncli.numerics.arrays import Array, Bytes

# two to four times as fast as zlib, where it is installed; the format is the same
libdeflate: Any = importlib.import_module("deflate") if importlib.util.find_spec("deflate") else None

DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000
PIECE = 1 << 20  # bytes inflated at a time
ENTRY_BYTES = 512  # what keeping a decoded chunk costs beside its values
Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it starts, and its extent
Slices = tuple[slice, ...]
Cut = tuple[int, slice, slice]  # of one axis: a chunk's place, the part inside it, the part of the range


class Filter(NamedTuple):
    """One step of a dataset's filter pipeline."""

    code: int
    flags: int
    values: tuple[int, ...]
    name: str


class Decoder:
    """Undoes gzip, lzf, shuffle and fletcher32 of one chunk.

    Parameters
    ----------
    filters : list of Filter
        In the order in which they were applied on writing.
    chunk_bytes : int
        What every chunk decodes to.
    """

    def __init__(self, filters: list[Filter], chunk_bytes: int) -> None:
        self.filters = filters
        self.chunk_bytes = chunk_bytes

    @staticmethod
    def knows(filters: list[Filter]) -> bool:
        """Tell whether all of these filters can be undone here."""
        codes = [f.code for f in filters]
        known = len(set(codes)) == len(codes) and {*codes} <= {DEFLATE, SHUFFLE, FLETCHER32, LZF}
        return known and not {DEFLATE, LZF} <= {*codes}  # nobody knows what the outer one of two inflates to

    def stored_limit(self) -> int:
        """Return the most bytes that an honest writer stores for one chunk (deflate adds less than 1 in 1000)."""
        return self.chunk_bytes + self.chunk_bytes // 64 + 4096

    def decode(self, stored: Bytes, mask: int, out: Bytes | None = None) -> Bytes:
        """Return the bytes of a chunk; bit i of `mask` says that filter i was left out for it.

        They may be put into `out`, which is returned then, or elsewhere.

        Raises
        ------
        ValueError
            When the stored bytes are damaged or of the wrong length.
        """
        data = stored
        for position in reversed(range(len(self.filters))):
            if not mask >> position & 1:
                data = self._undo(position, data, mask, None if position else out)
        if data.size != self.chunk_bytes:
            raise ValueError(f"holds {data.size} bytes instead of {self.chunk_bytes}")
        return data

    def _undo(self, position: int, data: Bytes, mask: int, out: Bytes | None) -> Bytes:
        code, _, values, _ = self.filters[position]
        if code == SHUFFLE:
            return unshuffle(data, values[0] if values else 1, out)
        if code == FLETCHER32:
            return _verified(data)
        summed = [f.code == FLETCHER32 and not mask >> i & 1 for i, f in enumerate(self.filters[:position])]
        size = self.chunk_bytes + 4 * sum(summed)
        return unlzf(data, size) if code == LZF else _inflate(data, size)


def encodes(filters: list[Filter]) -> bool:
    """Tell whether `encode` can apply all of these filters."""
    return Decoder.knows(filters) and all(f.code != LZF for f in filters)


def encode(filters: list[Filter], data: Bytes) -> bytes:
    """Return the bytes that a chunk is stored as: the filters, all of which it knows, in their order."""
    for f in filters:
        if f.code == SHUFFLE:
            data = shuffle(data, f.values[0])
        elif f.code == DEFLATE:
            data = np.frombuffer(_deflated(data, f.values[0]), np.uint8)
        else:
            checksum = np.frombuffer(fletcher32(data).to_bytes(4, "little"), np.uint8)
            data = np.concatenate([data, checksum])
    return data.tobytes()


def _deflated(data: Bytes, level: int) -> bytes:
    if libdeflate and level:
        return bytes(libdeflate.zlib_compress(data, level))
    return zlib.compress(data.data, level)


def shuffle(data: Bytes, size: int) -> Bytes:
    """Store all first bytes of the elements, then all second bytes and so on; the inverse of `unshuffle`.

    >>> shuffle(np.array([1, 2, 3, 4, 9], np.uint8), 2)
    array([1, 3, 2, 4, 9], dtype=uint8)
    """
    count = data.size // size if size > 1 else 0
    if count < 2:
        return data
    elements = data[: count * size]
    stored = compiled.shuffle(elements, size, undo=False)
    if stored is None:
        stored = np.empty_like(elements)
        for k in range(size):
            stored[k * count : (k + 1) * count] = elements.reshape(count, size)[:, k]
    return np.concatenate([stored, data[count * size :]]) if data.size % size else stored


def _inflate(data: Bytes, size: int) -> Bytes:
    if libdeflate:
        with contextlib.suppress(libdeflate.DeflateError):  # zlib says what is wrong
            found = np.frombuffer(libdeflate.zlib_decompress(data, size), np.uint8)
            if found.size == size:
                return found
    stream, plain, done = zlib.decompressobj(), np.empty(size + 1, np.uint8), 0
    try:
        for part in _inflated(stream, data):
            plain[done : done + len(part)] = np.frombuffer(part, np.uint8)[: size + 1 - done]
            done += len(part)
            if done > size:
                raise ValueError(f"inflates to more than its {size} bytes")
    except zlib.error as error:
        raise ValueError(f"its gzip data is damaged ({error})") from None
    if not stream.eof or done < size:
        raise ValueError(f"inflates to only {done} of {size} bytes")
    return plain[:size]


def _inflated(stream: Any, data: Bytes) -> Iterator[bytes]:
    """Yield what data inflates to, a piece at a time: in one go zlib holds all of it twice, and more of a bomb."""
    for start in range(0, data.size, PIECE):
        rest, part = data[start : start + PIECE].tobytes(), b""
        while not stream.eof and (rest or len(part) == PIECE):
            part = stream.decompress(rest, PIECE)
            yield part
            rest = stream.unconsumed_tail


def unlzf(data: Bytes, size: int) -> Bytes:
    """Undo LZF, as h5py's filter stores it (format of liblzf); ValueError unless it gives just `size` bytes."""
    plain = compiled.unlzf(data, size) if compiled.AVAILABLE else _unlzf(data, size)
    if plain.size < size:
        raise ValueError(f"inflates to only {plain.size} of {size} bytes")
    return plain


def _unlzf(data: Bytes, room: int) -> Bytes:
    stored, plain, place = data.tobytes(), bytearray(), 0
    try:
        while place < len(stored):
            code, place = stored[place], place + 1
            if code < 32:  # a run of bytes as they are
                run, place = stored[place : place + code + 1], place + code + 1
            else:
                count = code >> 5
                if count == 7:
                    count, place = count + stored[place], place + 1
                back, place = ((code & 31) << 8 | stored[place]) + 1, place + 1
                start, count = len(plain) - back, count + 2
                run = (bytes(plain[start : start + count]) * count)[:count] if start >= 0 else b""
            if not run or place > len(stored):
                raise IndexError
            plain += run
            if len(plain) > room:
                raise ValueError(f"inflates to more than its {room} bytes")
    except IndexError:
        raise ValueError("its lzf data is damaged") from None
    return np.frombuffer(plain, np.uint8)


def unshuffle(data: Bytes, size: int, out: Bytes | None = None) -> Bytes:
    """Put the bytes of each element together again: stored are all first bytes, then all second bytes and so on.

    Where `out` has room for just these, they may be put there.

    >>> unshuffle(np.array([1, 3, 2, 4, 9], np.uint8), 2)
    array([1, 2, 3, 4, 9], dtype=uint8)
    """
    count = data.size // size if size > 1 else 0
    if count < 2:
        return data
    elements = compiled.shuffle(
        data[: count * size], size, undo=True, out=out if out is not None and out.size == count * size else None
    )
    if elements is None:
        elements = np.empty(count * size, np.uint8)
        for k in range(size):  # a column at a time is six times as fast as the transpose in one go
            elements.reshape(count, size)[:, k] = data[k * count : (k + 1) * count]
    rest = data[count * size :]  # what fills no element is stored as it is
    return np.concatenate([elements, rest]) if rest.size else elements


def _verified(data: Bytes) -> Bytes:
    if data.size < 4:
        raise ValueError("is too short for its checksum")
    plain, tail = data[:-4], data[-4:]
    stored, expected = int.from_bytes(tail.tobytes(), "little"), fletcher32(plain)
    # HDF5 up to 1.6.2 stored the bytes of each half swapped; HDF5 still accepts that, and so does this
    swapped = int.from_bytes(tail[[1, 0, 3, 2]].tobytes(), "little")
    if expected not in (stored, swapped):
        raise ValueError("is damaged: its fletcher32 checksum does not match")
    return plain


_WEIGHTS = np.arange(1 << 16, 0, -1, dtype=np.uint32)


def fletcher32(data: Bytes) -> int:
    """Return HDF5's Fletcher checksum: two sums modulo 65535 over big-endian 16-bit words.

    >>> hex(fletcher32(np.frombuffer(b"abcde", np.uint8)))
    '0x4ff029c7'
    """
    words = data[: data.size // 2 * 2].view(np.dtype("<u2"))
    low = high = 0
    for start in range(0, words.size, _WEIGHTS.size):
        block = words[start : start + _WEIGHTS.size].astype(np.uint32)
        high += block.size * low
        low += int(block.sum(dtype=np.uint64))
        block *= _WEIGHTS[-block.size :]  # at most 65535 * 65536: fits
        high += int(block.sum(dtype=np.uint64))
    if data.size % 2:  # the last byte is the first of a word whose second is 0
        low += int(data[-1])
        high += low
    # Read as little-endian, each word is its big-endian value times 256 (modulo 65535), and so are the sums
    return _folded(high * 256) << 16 | _folded(low * 256)


def _folded(total: int) -> int:
    """Return the total modulo 65535, which HDF5 writes as 65535 rather than 0 unless all was 0."""
    return (total - 1) % 65535 + 1 if total else 0


class ChunkTable:
    """Where each chunk of a dataset is stored: one pass over HDF5's own index, kept in a few arrays.

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

    def __init__(self, dataset_id: Any, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
        self.chunks = chunks
        self.grid = tuple(-(-n // c) for n, c in zip(shape, chunks, strict=True))
        positions, stored = array("q"), array("q")

        def note(info: Any) -> None:
            positions.extend(info.chunk_offset)
            stored.extend((-1 if info.byte_offset is None else info.byte_offset, info.size, info.filter_mask))

        dataset_id.chunk_iter(note)
        numbers = self._numbers(np.asarray(positions, np.int64).reshape(-1, len(chunks)))
        order = np.argsort(numbers, kind="stable")
        self._numbers_stored: npt.NDArray[np.int64] = numbers[order]
        self.offset, self.size, self.mask = (np.asarray(stored, np.int64).reshape(-1, 3)[order]).T.copy()
        if (np.diff(self._numbers_stored) == 0).any():
            raise ValueError("two chunks are stored for the same place")
        self.missing = math.prod(self.grid) - numbers.size

    def _numbers(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if math.prod(self.grid) > np.iinfo(np.int64).max:
            raise ValueError("it claims more chunks than a file can hold")
        places = positions // self.chunks
        if (places * self.chunks != positions).any() or (places < 0).any() or (places >= self.grid).any():
            raise ValueError("a chunk is stored for a place outside the dataset")
        numbers = np.zeros(len(positions), np.int64)
        for axis, count in enumerate(self.grid):
            numbers = numbers * count + places[:, axis]
        return numbers

    def find(self, number: int) -> int:
        """Return the index of a chunk in `offset`, `size` and `mask`, or -1 when it was never written."""
        if not self.missing:
            return number
        index = int(np.searchsorted(self._numbers_stored, number))
        return index if index < len(self.size) and self._numbers_stored[index] == number else -1

    def number(self, index: int) -> int:
        """Return the number of the chunk at an index of `offset`, `size` and `mask`."""
        return int(self._numbers_stored[index])

    def first_missing(self) -> int:
        """Return the number of the first chunk that was never written."""
        gaps = np.flatnonzero(self._numbers_stored != np.arange(len(self.size)))
        return int(gaps[0]) if gaps.size else len(self.size)

    def start(self, number: int) -> tuple[int, ...]:
        """Return the position of the chunk's first value."""
        places = []
        for count, length in zip(reversed(self.grid), reversed(self.chunks), strict=True):
            number, place = divmod(number, count)
            places.append(place * length)
        return tuple(reversed(places))


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

    A chunk of which everything was taken at once is let go. When there is no room, chunks that the read under way
    does not need make room, the least recently used first; when there are none, a chunk is used and let go. So reading
    on in order loads each chunk once where a row of chunks fits the budget; where it does not, as many as fit stay.

    Parameters
    ----------
    table : ChunkTable
    shape : tuple of int
        Of the dataset.
    load : callable
        Gives the values of the chunk of that number, at least as far as they lie inside the dataset. May put them into the
        array that it is given beside it, if any, of a whole chunk.
    load_part : callable or None
        Fills an array with the values of a chunk from a flat position in it on; for chunks that need no decoding.
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
            # the first axis, which may meet very many chunks, is not turned into a list
            for head in _cuts(start[0], extent[0], self._table.chunks[0]):
                spare = self._done_with(first + done + head[2].start * row_size, stop)
                for number, inside, place in self._overlaps(head, axes):
                    self._copy(number, inside, target[place], spare)
            done += count

    def _overlaps(self, head: Cut, axes: list[list[Cut]]) -> Iterator[tuple[int, Slices, Slices]]:
        """Yield each chunk that a box meets: its number, the part of it, and where in the box that belongs."""
        weights = self._weights
        for rest in product(*axes):
            places, insides, targets = zip(head, *rest, strict=True)
            yield sum(map(mul, places, weights)), insides, targets

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
            if target.size < self._full and target.size < math.prod(self._extent(number)):  # else all of it was taken
                self._keep(number, values, spare)
        target[...] = values[inside]

    def _extent(self, number: int) -> tuple[int, ...]:
        """Return how far a chunk reaches inside the dataset."""
        start = self._table.start(number)
        return tuple(min(c, n - s) for s, c, n in zip(start, self._table.chunks, self._shape, strict=True))

    def _is_run(self, inside: Slices) -> bool:
        """Tell whether a part of a chunk is one run of its bytes: whole but for the first axis."""
        return all(s.stop - s.start == n for s, n in zip(inside[1:], self._table.chunks[1:], strict=True))

    def _keep(self, number: int, values: Array, spare: Iterator[int]) -> None:
        cost = values.nbytes + ENTRY_BYTES
        if self._kept or cost - ENTRY_BYTES > self._room:  # alone, a chunk of just the budget is kept
            while cost > self._room and (other := next(spare, None)) is not None:
                self._room += self._kept.pop(other).nbytes + ENTRY_BYTES
            if cost > self._room and self._kept:
                return
        self._kept[number] = values
        self._room -= cost

    def _done_with(self, position: int, stop: int) -> Iterator[int]:
        """Yield kept chunks without any value from `position` to before `stop`, the least recently used first."""
        for number in list(self._kept):
            start = self._table.start(number)
            last = [s + n - 1 for s, n in zip(start, self._extent(number), strict=True)]
            if _flat(last, self._shape) < position or _flat(start, self._shape) >= stop:
                yield number


def _cuts(start: int, count: int, length: int) -> Iterator[Cut]:
    """Cut a range of one axis at multiples of `length`."""
    for place in range(start // length, (start + count - 1) // length + 1):
        low, high = max(start, place * length), min(start + count, (place + 1) * length)
        yield place, slice(low - place * length, high - place * length), slice(low - start, high - start)


def _flat(position: Iterable[int], shape: tuple[int, ...]) -> int:
    flat = 0
    for index, length in zip(position, shape, strict=True):
        flat = flat * length + index
    return flat
