"""The filters of HDF5 chunks: gzip, LZF, shuffle and Fletcher32, undone and applied on bytes.

If a chunk inflates to less than its size, HDF5 leaves whatever was in memory in the rest, and it holds one lock for the
whole process while it inflates. So the common filters are undone here, and every length is checked. The filter pipeline
message (HDF5 file format specification 3.0, IV.A.2.l) names the filters; the layout of their bytes is defined by HDF5's
H5Zdeflate.c, H5Zshuffle.c, H5Zfletcher32.c and H5checksum.c, and by h5py's lzf_filter.c.
"""

from __future__ import annotations

import contextlib
import importlib.util
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np

from bncli.numerics import compiled
from bncli.numerics.arrays import Bytes

# inflates two to four times as fast as zlib, where it is installed, and accepts the same data
libdeflate: ModuleType | None = importlib.import_module("deflate") if importlib.util.find_spec("deflate") else None

DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000  # identifiers in the filter pipeline message
PIECE = 1 << 20  # bytes inflated at a time


class Filter(NamedTuple):
    """One filter of a dataset's filter pipeline message: identifier, flags, client data values and name."""

    code: int
    flags: int
    values: tuple[int, ...]
    name: str


class Decoder:
    """Undoes the filters of one chunk.

    Parameters
    ----------
    filters : list of Filter
        In the order in which they were applied on writing, which is that of the filter pipeline message.
    chunk_bytes : int
        Size of every decoded chunk.
    """

    def __init__(self, filters: list[Filter], chunk_bytes: int) -> None:
        self.filters = filters
        self.chunk_bytes = chunk_bytes

    @staticmethod
    def knows(filters: list[Filter]) -> bool:
        """Whether all of these filters can be undone here."""
        codes = [f.code for f in filters]
        known = len(set(codes)) == len(codes) and {*codes} <= {DEFLATE, SHUFFLE, FLETCHER32, LZF}
        # of two compressors, the size after only the outer one is undone is stored nowhere
        return known and not {DEFLATE, LZF} <= {*codes}

    def stored_limit(self) -> int:
        """Upper limit of the stored size of one chunk; deflate adds less than 0.1 % to incompressible data."""
        return self.chunk_bytes + self.chunk_bytes // 64 + 4096

    def decode(self, stored: Bytes, mask: int, out: Bytes | None = None) -> Bytes:
        """Return the bytes of a chunk. Bit i of `mask`, the filter mask in the chunk index, is set if filter i was skipped.

        The bytes may be written to `out`, which is then returned, or to a new array.

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
        if code == SHUFFLE:  # its first client data value is the size of an element
            return unshuffle(data, values[0] if values else 1, out)
        if code == FLETCHER32:
            return _verified(data)
        # a compressor gives back the chunk, and 4 bytes more for a checksum that was added before it
        summed = [f.code == FLETCHER32 and not mask >> i & 1 for i, f in enumerate(self.filters[:position])]
        size = self.chunk_bytes + 4 * sum(summed)
        return unlzf(data, size) if code == LZF else _inflate(data, size)


def encodes(filters: list[Filter]) -> bool:
    """Whether `encode` can apply all of these filters."""
    return Decoder.knows(filters) and all(f.code != LZF for f in filters)


def encode(filters: list[Filter], data: Bytes) -> bytes:
    """The stored bytes of a chunk: the filters, which `encodes` accepts, applied in order."""
    for f in filters:
        if f.code == SHUFFLE:
            data = shuffle(data, f.values[0])
        elif f.code == DEFLATE:  # its client data value is the level
            data = np.frombuffer(_deflated(data, f.values[0]), np.uint8)
        else:  # Fletcher32 appends its checksum, little-endian
            checksum = np.frombuffer(fletcher32(data).to_bytes(4, "little"), np.uint8)
            data = np.concatenate([data, checksum])
    return data.tobytes()


def _deflated(data: Bytes, level: int) -> bytes:
    if libdeflate and level:
        return bytes(libdeflate.zlib_compress(data, level))
    return zlib.compress(data.data, level)


def shuffle(data: Bytes, size: int) -> Bytes:
    """The shuffle filter: the first bytes of all elements, then all second bytes, and so on. Undone by `unshuffle`.

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
        for k in range(size):  # byte k of every element
            stored[k * count : (k + 1) * count] = elements.reshape(count, size)[:, k]
    return np.concatenate([stored, data[count * size :]]) if data.size % size else stored


def _inflate(data: Bytes, size: int) -> Bytes:
    """Undo gzip, which in HDF5 is one zlib stream (RFC 1950); ValueError unless it inflates to exactly `size` bytes."""
    if libdeflate:
        with contextlib.suppress(libdeflate.DeflateError):  # zlib has the better messages
            found = np.frombuffer(libdeflate.zlib_decompress(data, size), np.uint8)
            if found.size == size:
                return found
    plain, done, complete = np.empty(size + 1, np.uint8), 0, False
    try:
        for part, complete in _inflated(data):  # noqa: B007
            plain[done : done + len(part)] = np.frombuffer(part, np.uint8)[: size + 1 - done]
            done += len(part)
            if done > size:
                raise ValueError(f"inflates to more than its {size} bytes")
    except zlib.error as error:
        raise ValueError(f"its gzip data is damaged ({error})") from None
    if not complete or done < size:
        raise ValueError(f"inflates to only {done} of {size} bytes")
    return plain[:size]


def _inflated(data: Bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield inflated data a piece at a time, each with whether the end of the stream was reached.

    In a single call zlib would hold all of it twice, and would inflate any amount.
    """
    stream = zlib.decompressobj()
    for start in range(0, data.size, PIECE):
        rest, part = data[start : start + PIECE].tobytes(), b""
        while not stream.eof and (rest or len(part) == PIECE):
            part = stream.decompress(rest, PIECE)
            yield part, stream.eof
            rest = stream.unconsumed_tail


def unlzf(data: Bytes, size: int) -> Bytes:
    """Undo LZF as stored by h5py's filter (the stream of liblzf); ValueError unless it gives exactly `size` bytes."""
    plain = compiled.unlzf(data, size) if compiled.AVAILABLE else _unlzf(data, size)
    if plain.size < size:
        raise ValueError(f"inflates to only {plain.size} of {size} bytes")
    return plain


def _unlzf(data: Bytes, room: int) -> Bytes:
    """`unlzf` where the C library is missing.

    An LZF stream is a sequence of literal runs and back references:

    - 000LLLLL, then L + 1 bytes: a literal run of these bytes
    - LLLOOOOO OOOOOOOO (L < 7): L + 2 bytes, from O + 1 bytes back in the output
    - 111OOOOO LLLLLLLL OOOOOOOO: L + 9 bytes, from O + 1 bytes back in the output
    """
    stored, plain, place = data.tobytes(), bytearray(), 0
    try:
        while place < len(stored):
            code, place = stored[place], place + 1
            if code < 32:  # a literal run
                run, place = stored[place : place + code + 1], place + code + 1
            else:
                count = code >> 5
                if count == 7:
                    count, place = count + stored[place], place + 1
                back, place = ((code & 31) << 8 | stored[place]) + 1, place + 1
                start, count = len(plain) - back, count + 2
                # the run may reach into the bytes that it produces itself, which repeats them
                run = (bytes(plain[start : start + count]) * count)[:count] if start >= 0 else b""
            if not run or place > len(stored):  # a reference before the start, or a run cut short
                raise IndexError
            plain += run
            if len(plain) > room:
                raise ValueError(f"inflates to more than its {room} bytes")
    except IndexError:
        raise ValueError("its lzf data is damaged") from None
    return np.frombuffer(plain, np.uint8)


def unshuffle(data: Bytes, size: int, out: Bytes | None = None) -> Bytes:
    """Undo the shuffle filter: put the bytes of each element together again. Undoes `shuffle`.

    If `out` is exactly large enough, the bytes may be written to it.

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
        for k in range(size):  # six times as fast as a single transpose
            elements.reshape(count, size)[:, k] = data[k * count : (k + 1) * count]
    rest = data[count * size :]  # bytes after the last whole element are stored unshuffled
    return np.concatenate([elements, rest]) if rest.size else elements


def _verified(data: Bytes) -> Bytes:
    """Undo Fletcher32: check the 4 bytes at the end, a little-endian checksum, and drop them."""
    if data.size < 4:
        raise ValueError("is too short for its checksum")
    plain, tail = data[:-4], data[-4:]
    stored, expected = int.from_bytes(tail.tobytes(), "little"), fletcher32(plain)
    # HDF5 up to 1.6.2 stored the bytes of each half swapped; HDF5 still accepts that, and so does bn
    swapped = int.from_bytes(tail[[1, 0, 3, 2]].tobytes(), "little")
    if expected not in (stored, swapped):
        raise ValueError("is damaged: its fletcher32 checksum does not match")
    return plain


_WEIGHTS = np.arange(1 << 16, 0, -1, dtype=np.uint32)


def fletcher32(data: Bytes) -> int:
    """HDF5's Fletcher checksum: two sums modulo 65535 over big-endian 16-bit words (H5_checksum_fletcher32).

    >>> hex(fletcher32(np.frombuffer(b"abcde", np.uint8)))
    '0x4ff029c7'
    """
    words = data[: data.size // 2 * 2].view(np.dtype("<u2"))
    low = high = 0
    for start in range(0, words.size, _WEIGHTS.size):
        block = words[start : start + _WEIGHTS.size].astype(np.uint32)
        high += block.size * low  # the second sum adds the first after every word
        low += int(block.sum(dtype=np.uint64))
        block *= _WEIGHTS[-block.size :]  # at most 65535 * 65536: fits
        high += int(block.sum(dtype=np.uint64))
    if data.size % 2:  # the last byte is the first of a word whose second is 0
        low += int(data[-1])
        high += low
    # words were read as little-endian, which gives 256 times their big-endian values modulo 65535, so swap back
    return _folded(high * 256) << 16 | _folded(low * 256)


def _folded(total: int) -> int:
    """The total modulo 65535, where HDF5 writes 65535 in place of 0 unless all words are 0."""
    return (total - 1) % 65535 + 1 if total else 0
