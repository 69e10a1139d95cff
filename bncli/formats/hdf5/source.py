"""HDF5 datasets: a reader that checks every stored byte count.

What may be read at all is decided in `vetting`, how it is read in `layouts`.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5i, h5s, h5t

from bncli.errors import InputError, printable
from bncli.formats.hdf5.chunks import ENTRY_BYTES, ChunkTable
from bncli.formats.hdf5.file import hdf5_errors, open_file
from bncli.formats.hdf5.fills import marks_of, scaling
from bncli.formats.hdf5.layouts import Chunked, Constant, Contiguous, Memory, Reader
from bncli.formats.hdf5.sparse import note as sparse_note
from bncli.formats.hdf5.vetting import (
    UNREADABLE,
    name_bytes,
    open_dataset,
    remembers_order,
    vet,
)
from bncli.formats.hdf5.virtual import Virtual, mappings
from bncli.formats.reading import ReadOptions
from bncli.formats.source import Source, check_bools, check_shape, memory_that_fits
from bncli.numerics.arrays import Array
from bncli.numerics.kernels import FileRange

NAME_ATTRIBUTES = ("feature_names", "columns")


class Hdf5Source(Source):
    """A dataset of an HDF5 file.

    Parameters
    ----------
    path, dataset : str
    options : ReadOptions
        Its memory holds decoded chunks. One chunk more, and what it is stored as, is held while it is decoded.

    Attributes
    ----------
    path, dataset : str
        The dataset's path begins with "/".
    file_shape : tuple of int
        As stored: a single axis stays single.
    chunks : tuple of int or None
    attributes : h5py.AttributeManager

    Raises
    ------
    InputError
        When there is no such dataset, or it is none that bn reads.
    UsageError
        When `dataset` is a group.
    """

    def __init__(
        self,
        path: str,
        dataset: str,
        options: ReadOptions,
    ) -> None:
        self.path, self.dataset = path, "/" + dataset.strip("/")
        self.array_name = self.dataset
        self.address = f"{path}::{self.dataset}"
        self._where = printable(self.address)
        with contextlib.ExitStack() as opened, hdf5_errors(self._where, UNREADABLE):
            file, self.checked = opened.enter_context(open_file(path))
            self._raw = self.checked.raw
            self._id = open_dataset(file, path, self.dataset)
            info, self._stored = vet(self._id, self.dataset, self._where, options.allow_virtual)
            self.file_shape, self.chunks = info.shape, info.chunks
            self.rows_together = info.chunks[0] if info.chunks else 1
            self.shape, self.dtype = check_shape(info.shape, self._where), self._stored.newbyteorder("=")
            self._options = options
            self._reader = self._make_reader()
            opened.callback(self._reader.close)
            self.files = [path, *self._reader.files]
            self.attributes = h5py.Dataset(self._id).attrs
            self.names, self.notes = self._find_names(), self._find_notes()
            self.marks = marks_of(self._id, self.dtype)
            self._opened = opened.pop_all()

    def read(self, first: int, out: Array) -> None:
        """Fill `out` with the values from position `first` on, in C order; see `Source.read`."""
        self._reader.read(first, out)
        check_bools(out, self.address)

    def stored(self, first: int) -> FileRange | None:
        """See `Source.stored`."""
        return self._reader.stored(first)

    def check_unchanged(self) -> None:
        """Raise InputError when the file is not what it was when it was opened; its size is part of that."""
        self._raw.check_unchanged()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with hdf5_errors(self._where, "cannot be closed"):
            self._opened.close()

    def is_dimension(self) -> bool:
        """Tell whether other datasets name this one as a dimension (netCDF's coordinate variables)."""
        return "REFERENCE_LIST" in self.attributes

    def maxshape(self) -> tuple[int | None, ...]:
        """Return how far each axis may grow; None is without end."""
        dims = self._id.get_space().get_simple_extent_dims(True)
        return tuple(None if n == h5s.UNLIMITED else n for n in dims)

    def dataset_id(self) -> h5d.DatasetID:
        """Return h5py's low-level dataset."""
        return self._id

    def in_order(self, layout: Any) -> bool:
        """Have a new dataset remember the order of its attributes as this one does; return whether the file remembers that of its members."""
        layout.set_attr_creation_order(self._id.get_create_plist().get_attr_creation_order())
        return remembers_order(h5g.open(self._id, b"/"))

    def recent(self) -> bool:
        """Tell whether the file is in the format of HDF5 1.8 or later, in which attributes may be larger than 64 KB."""
        return bool(h5i.get_file_id(self._id).get_create_plist().get_version()[0] >= 2)

    def _make_reader(self) -> Reader:
        layout = self._id.get_create_plist().get_layout()
        if layout == h5d.CHUNKED:
            return self._chunk_reader()
        if layout == h5d.VIRTUAL:
            return self._virtual_reader()
        if layout == h5d.COMPACT:
            values = np.empty(self.file_shape, self.dtype)
            self._id.read(h5s.ALL, h5s.ALL, values)
            return Memory(values.reshape(-1))
        space, expected = self._id.get_storage_size(), math.prod(self.file_shape) * self.dtype.itemsize
        # space, not get_offset: that one is not None, but wraps round, for unwritten data behind a user block
        if space == 0 and self._options.allow_unwritten:
            return Constant(self._fill())
        if space == 0:
            raise InputError(f"{self._where}: was never written; {self._unwritten_cure()}")
        offset = self._id.get_offset()
        if space != expected or offset is None or offset + expected > self._raw.size:
            raise InputError(
                f"{self._where}: {expected} bytes of data at byte {offset}, of which {space} are stored, do not fit "
                f"the file of {self._raw.size} bytes; it was cut short or is damaged"
            )
        return Contiguous(self._raw, offset, self._stored)

    def _chunk_reader(self) -> Chunked:
        assert self.chunks is not None
        size = math.prod(self.chunks) * self.dtype.itemsize
        if size > self._options.max_memory:
            raise InputError(
                f"{self._where}: one chunk of shape {self.chunks} takes {size} bytes, more than the {self._options.max_memory} that "
                f"a reader gets of --max-memory; give {memory_that_fits(size, self._options.share)} or rechunk the file"
            )
        table = ChunkTable(self._id, self.file_shape, self.chunks)
        if table.missing and not self._options.allow_unwritten:
            raise InputError(
                f"{self._where}: chunk at {table.start(table.first_missing())} was never written ({table.missing} of "
                f"{math.prod(table.grid)} are missing); {self._unwritten_cure()}"
            )
        # half is enough to keep a row of chunks where it fits, and decoding holds a chunk two more times
        row = math.prod(table.grid[1:]) * (size + ENTRY_BYTES)
        kept = self._options.max_memory // 2 if row <= self._options.max_memory // 2 else self._options.max_memory
        return Chunked(self._where, self._raw, self._id, table, self.file_shape, self._stored, self._fill(), kept)

    def _virtual_reader(self) -> Virtual:
        def open_source(path: str, dataset: str) -> Hdf5Source:
            return Hdf5Source(path, dataset, replace(self._options, allow_virtual=False))

        parts, fill = (
            mappings(self._id, self.path, self._where),
            self._fill() if self._options.allow_unwritten else None,
        )
        return Virtual(self._where, self.file_shape, self.dtype, parts, open_source, fill)

    def _unwritten_cure(self) -> str:
        return f"its writer may have died. --allow-unwritten reads the fill value {self._fill()} there"

    def _fill(self) -> Any:
        # to be asked for a damaged fill value crashes HDF5; to be asked whether there is one does not
        if self._id.get_create_plist().fill_value_defined() != h5d.FILL_VALUE_USER_DEFINED:
            return self.dtype.type(0)
        return np.asarray(h5py.Dataset(self._id).fillvalue).astype(self.dtype)[()]

    def _find_names(self) -> tuple[str, ...] | None:
        for name in NAME_ATTRIBUTES:
            if name in self.attributes:
                attribute = self.attributes.get_id(name)
                self.checked.check_attribute(attribute)
                values = self.attributes[name] if attribute.get_type().get_class() == h5t.STRING else None
                if isinstance(values, np.ndarray) and values.ndim == 1:
                    return tuple(_utf8(v) for v in values.tolist())
        return None

    def _find_notes(self) -> list[str]:
        found = " and ".join(scaling(self._id))
        scaled = [f"{printable(self.dataset)} has {found}: the statistics are of the stored values"] * bool(found)
        return scaled + sparse_note(self.dataset, h5py.Dataset(self._id).parent.id)


def _utf8(text: str | bytes) -> str:
    """Return a string from an attribute; bytes of another encoding are replaced, since they are no reason to refuse the data."""
    return (text if isinstance(text, bytes) else name_bytes(text)).decode("utf-8", "replace")
