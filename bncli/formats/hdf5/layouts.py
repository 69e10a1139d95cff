"""How the values of each HDF5 layout are read: by flat position, every stored byte count checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from h5py import h5d, h5i, h5s, h5z

from bncli.errors import InputError
from bncli.formats.hdf5.chunks import ChunkCache, ChunkTable
from bncli.formats.hdf5.file import CheckedFile, Layout, hdf5_errors
from bncli.formats.hdf5.filters import Decoder
from bncli.formats.hdf5.vetting import filters_of
from bncli.formats.source import ContiguousValues, RegularFile
from bncli.numerics.arrays import Array, Bytes, DType
from bncli.numerics.kernels import FileRange

AT_ONCE = 1 << 16  # references to strings
SZIP, COUNTING = (
    h5z.FILTER_SZIP,
    (h5z.FILTER_NBIT, h5z.FILTER_SCALEOFFSET),
)  # the third parameter of those counts values


class Reader:
    """How the values of one layout are read; `files` are those besides the dataset's own."""

    files: Sequence[str] = ()

    def read(self, first: int, out: Array) -> None:
        """Fill `out` (1-D, native byte order) with the values from flat position `first` on."""
        raise NotImplementedError

    def stored(self, first: int) -> FileRange | None:
        """See `Source.stored`."""
        return None

    def close(self) -> None:
        """Let go of the files."""


class Constant(Reader):
    """A dataset that was never written, for those who mean it."""

    def __init__(self, fill: Any) -> None:
        self._fill = fill

    def read(self, first: int, out: Array) -> None:
        """Fill `out` with the fill value."""
        out[...] = self._fill


class Memory(Reader):
    """Compact layout: at most 64 KB, in the header."""

    def __init__(self, values: Array) -> None:
        self._values = values

    def read(self, first: int, out: Array) -> None:
        """Fill `out` from memory."""
        out[...] = self._values[first : first + out.size]


class Contiguous(ContiguousValues, Reader):
    """Contiguous layout: one run of bytes in the file."""


class Chunked(Reader):
    """Chunks, decoded here when only the common filters were used, else by h5py.

    Parameters
    ----------
    where : str
        The address, for messages.
    raw : RegularFile
    item : h5py.h5d.DatasetID
    table : ChunkTable
    shape, stored
        Of the dataset: its shape and its type as stored.
    fill : scalar
        What chunks that were never written hold.
    budget : int
        Bytes of decoded chunks to keep.
    """

    def __init__(
        self,
        where: str,
        raw: RegularFile,
        item: h5d.DatasetID,
        table: ChunkTable,
        shape: tuple[int, ...],
        stored: DType,
        fill: Any,
        budget: int,
    ) -> None:
        self._where, self._raw, self._id, self._table = where, raw, item, table
        self._shape, self._stored, self._fill = shape, stored, fill
        filters = filters_of(item)
        chunk_bytes = math.prod(table.chunks) * stored.itemsize
        self._decoder = Decoder(filters, chunk_bytes) if Decoder.knows(filters) else None
        # HDF5 versions differ in whether a chunk's offset counts the user block: there h5py fetches the bytes
        self._by_offset = h5i.get_file_id(item).get_create_plist().get_userblock() == 0
        self._filters = filters
        self._check_stored(len(filters), chunk_bytes)
        runs = not filters and not table.missing and self._by_offset
        self._cache = ChunkCache(table, shape, self._load, self._load_part if runs else None, budget)

    def read(self, first: int, out: Array) -> None:
        """Fill `out` from decoded chunks."""
        self._cache.read(first, out)

    def _check_stored(self, filters: int, chunk_bytes: int) -> None:
        """Compare every chunk's place and stored size with the file and with the size of a chunk."""
        table, all_skipped = self._table, (1 << filters) - 1
        plain = (table.mask & all_skipped) == all_skipped
        wrong = np.where(plain, table.size != chunk_bytes, table.size < 1)
        wrong |= table.size > (self._decoder.stored_limit() if self._decoder else 2 * chunk_bytes + (64 << 10))
        beyond = (table.offset < 0) | (table.offset > self._raw.size - table.size)
        for bad, words in ((wrong, f"stored for the {chunk_bytes} of a chunk"), (beyond, "past the end of the file")):
            if bad.any():
                index = int(np.argmax(bad))
                at = self._at(table.number(index))
                raise InputError(f"{at}: {table.size[index]} bytes {words}; the file is damaged or cut short")

    def _at(self, number: int) -> str:
        return f"{self._where}: chunk at {self._table.start(number)}"

    def _load(self, number: int, out: Array | None) -> Array:
        """Return the values of a chunk in native byte order, of shape `chunks` or less at the edge; `out` if they are there."""
        index = self._table.find(number)
        if index < 0:
            return np.full(self._table.chunks, self._fill)
        if self._decoder is None or self._may_be_unfiltered(number, index):
            return self._load_by_h5py(number)
        try:
            room = out.reshape(-1).view(np.uint8) if out is not None and self._stored.isnative else None
            data = self._decoder.decode(self._stored_bytes(number, index), int(self._table.mask[index]), room)
            if data is room and out is not None:
                return out
        except ValueError as error:
            raise InputError(f"{self._at(number)} {error}; write or copy the file again") from None
        values = data.view(self._stored).reshape(self._table.chunks)
        return values if self._stored.isnative else values.astype(self._stored.newbyteorder("="))

    def _may_be_unfiltered(self, number: int, index: int) -> bool:
        """Tell whether a chunk may be one at the edge that was stored as it is, which only HDF5 knows.

        A dataset can be made so (H5Pset_chunk_opts), and the chunk's filter mask does not say it.
        """
        assert self._decoder is not None
        if not self._decoder.filters or self._table.size[index] != self._decoder.chunk_bytes:
            return False
        ends = zip(self._table.start(number), self._table.chunks, self._shape, strict=True)
        return any(start + count > end for start, count, end in ends)

    def _load_by_h5py(self, number: int) -> Array:
        start = self._table.start(number)
        extent = tuple(min(c, n - s) for s, c, n in zip(start, self._table.chunks, self._shape, strict=True))
        values = np.empty(extent, self._stored.newbyteorder("="))
        self._check_claims(number)
        with hdf5_errors(self._at(number), "cannot be decoded"):
            place = self._id.get_space()
            place.select_hyperslab(start, extent)
            self._id.read(h5s.create_simple(extent), place, values)
        return values

    def _check_claims(self, number: int) -> None:
        """Compare what HDF5's filters will believe of a chunk's size, and allocate, with what it is."""
        last = self._filters[-1]
        values = math.prod(self._table.chunks)
        claims = [f.values[2] for f in self._filters if f.code in COUNTING and len(f.values) > 2]
        if last.code == SZIP and not self._table.mask[self._table.find(number)] >> len(self._filters) - 1 & 1:
            head = self._stored_bytes(number, self._table.find(number))[:4]
            claims.append(int.from_bytes(head.tobytes(), "little") // self._stored.itemsize)
        if any(claim != values for claim in claims):
            raise InputError(f"{self._at(number)} claims {max(claims)} values instead of {values}; the file is damaged")

    def _stored_bytes(self, number: int, index: int) -> Bytes:
        if self._by_offset:
            data = np.empty(int(self._table.size[index]), np.uint8)
            self._raw.pread_into(data.data, int(self._table.offset[index]))
            return data
        with hdf5_errors(self._at(number), "cannot be read"):
            return np.frombuffer(self._id.read_direct_chunk(self._table.start(number))[1], np.uint8)

    def _load_part(self, number: int, first: int, out: Array) -> None:
        offset = int(self._table.offset[self._table.find(number)]) + first * out.itemsize
        ContiguousValues(self._raw, offset, self._stored).read(0, out)


def check_strings(item: h5d.DatasetID, checked: CheckedFile, where: str, budget: int) -> None:
    """Raise ValueError when strings of variable length claim more than there can be: see `CheckedFile.check_texts`.

    The references are read as any values are, with the same checks; a compact dataset has them in its header, and few.
    """
    plist, width = item.get_create_plist(), 8 + h5i.get_file_id(item).get_create_plist().get_sizes()[0]
    layout = Layout.of(item.get_type(), width)
    if not layout.claims or plist.get_layout() == h5d.COMPACT:
        return
    shape = tuple(item.get_space().get_simple_extent_dims())
    stored = np.dtype(f"V{layout.size}")
    reader: Reader | None = None
    if plist.get_layout() == h5d.CHUNKED:
        table = ChunkTable(item, shape, tuple(plist.get_chunk()))
        reader = Chunked(where, checked.raw, item, table, shape, stored, np.zeros((), stored), budget)
    elif (offset := item.get_offset()) is not None:
        reader = Contiguous(checked.raw, offset, stored)
    if reader is not None:
        for first in range(0, math.prod(shape), AT_ONCE):
            references = np.empty(min(AT_ONCE, math.prod(shape) - first), stored)
            reader.read(first, references)
            checked.check_texts(references.tobytes(), layout)
