"""HDF5 datasets: a reader that checks every stored byte count, and a sequential writer that HDF5 cannot crash in.

What may be read at all is decided in `vetting`, how it is read in `layouts`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d, h5g, h5i, h5p, h5s, h5t

from bncli.errors import BnError, InputError, printable
from bncli.formats.hdf5.attributes import copy_attributes, dimensions_of
from bncli.formats.hdf5.chunks import ENTRY_BYTES, ChunkTable, boxes, encode, encodes
from bncli.formats.hdf5.file import STRING_LIMIT, hdf5_errors, open_file, reason
from bncli.formats.hdf5.fills import OF_STORED, marks_of, scaling
from bncli.formats.hdf5.layouts import Chunked, Constant, Contiguous, Memory, Reader, check_strings
from bncli.formats.hdf5.sparse import note as sparse_note
from bncli.formats.hdf5.vetting import (
    UNREADABLE,
    DatasetInfo,
    available_filters,
    choose_dataset,
    describe,
    filters_of,
    identity,
    is_hdf5,
    list_datasets,
    missing_filter,
    name_bytes,
    open_dataset,
    remembers_order,
    storage_problem,
    versions,
    vet,
    walk,
)
from bncli.formats.hdf5.virtual import Virtual, mappings
from bncli.formats.hdf5.writing import Disk, copy_objects, fitting_chunks, keep_filters, new_file
from bncli.formats.source import Source, check_shape, memory_that_fits
from bncli.numerics.kernels import Place

__all__ = [
    "DatasetInfo",
    "Hdf5Sink",
    "Hdf5Source",
    "available_filters",
    "choose_dataset",
    "copy_others",
    "is_hdf5",
    "list_datasets",
    "other_datasets",
    "read_strings",
    "versions",
]

WRITE_BYTES = 8 << 20
NAME_ATTRIBUTES = ("feature_names", "columns")


class Hdf5Source(Source):
    """A dataset of an HDF5 file.

    Parameters
    ----------
    path, dataset : str
    budget : int
        Bytes of decoded chunks that may be kept. One chunk more, and what it is stored as, is held while it is decoded.
    share : int
        How many such budgets make up --max-memory, for messages.
    allow_unwritten : bool
        Read what was never written as the dataset's fill value, rather than refuse it.
    allow_virtual : bool
        Read a virtual dataset from its sources, rather than refuse it.

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
        *,
        budget: int,
        share: int = 1,
        allow_unwritten: bool = False,
        allow_virtual: bool = False,
    ) -> None:
        self.path, self.dataset = path, "/" + dataset.strip("/")
        self.address = f"{path}::{self.dataset}"
        self._where = printable(self.address)
        with contextlib.ExitStack() as opened, hdf5_errors(self._where, UNREADABLE):
            file, self.watched = opened.enter_context(open_file(path))
            self._raw = self.watched.raw
            self._id = open_dataset(file, path, self.dataset)
            info, self._stored = vet(self._id, self.dataset, self._where, allow_virtual)
            self.file_shape, self.chunks = info.shape, info.chunks
            self.rows_together = info.chunks[0] if info.chunks else 1
            self.shape, self.dtype = check_shape(info.shape, self._where), self._stored.newbyteorder("=")
            self._budget, self._share, self._allow_unwritten = budget, share, allow_unwritten
            self._reader = self._make_reader()
            opened.callback(self._reader.close)
            self.files = [path, *self._reader.files]
            self.attributes = h5py.Dataset(self._id).attrs
            self.names, self.notes = self._find_names(), self._find_notes()
            self.marks = marks_of(self._id, self.dtype)
            self._opened = opened.pop_all()

    def read(self, first: int, out: npt.NDArray[Any]) -> None:
        """Fill `out` with the values from position `first` on, in C order; see `Source.read`."""
        self._reader.read(first, out)
        if self.dtype.kind == "b" and out.view(np.uint8).max(initial=0) > 1:
            raise InputError(f"{self._where}: holds bytes other than 0 and 1 in an array of bool")

    def stored(self, first: int) -> Place | None:
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
        """Have a new dataset remember the order of its attributes as this one does; tell whether the file does of its members."""
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
        if space == 0 and self._allow_unwritten:
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
        if size > self._budget:
            raise InputError(
                f"{self._where}: one chunk of shape {self.chunks} takes {size} bytes, more than the {self._budget} that "
                f"a reader gets of --max-memory; give {memory_that_fits(size, self._share)} or rechunk the file"
            )
        table = ChunkTable(self._id, self.file_shape, self.chunks)
        if table.missing and not self._allow_unwritten:
            raise InputError(
                f"{self._where}: chunk at {table.start(table.first_missing())} was never written ({table.missing} of "
                f"{math.prod(table.grid)} are missing); {self._unwritten_cure()}"
            )
        # half is enough to keep a row of chunks where it fits, and decoding holds a chunk two more times
        row = math.prod(table.grid[1:]) * (size + ENTRY_BYTES)
        kept = self._budget // 2 if row <= self._budget // 2 else self._budget
        return Chunked(self._where, self._raw, self._id, table, self.file_shape, self._stored, self._fill(), kept)

    def _virtual_reader(self) -> Virtual:
        def open_source(path: str, dataset: str) -> Hdf5Source:
            return Hdf5Source(
                path, dataset, budget=self._budget, share=self._share, allow_unwritten=self._allow_unwritten
            )

        parts, fill = mappings(self._id, self.path, self._where), self._fill() if self._allow_unwritten else None
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
                self.watched.check_attribute(attribute)
                values = self.attributes[name] if attribute.get_type().get_class() == h5t.STRING else None
                if isinstance(values, np.ndarray) and values.ndim == 1:
                    return tuple(_utf8(v) for v in values.tolist())
        return None

    def _find_notes(self) -> list[str]:
        found = " and ".join(scaling(self._id))
        scaled = [f"{printable(self.dataset)} has {found}: the statistics are of the stored values"] * bool(found)
        return scaled + sparse_note(self.dataset, h5py.Dataset(self._id).parent.id)


class Hdf5Sink:
    """Writes one dataset of a new HDF5 file front to back, in C order.

    Every write covers whole chunks, so that none is compressed twice. Where not even one row of chunks fits the
    budget, the chunks are made shorter along the first axes.

    Parameters
    ----------
    temp, dataset : str
        The file to write to, and the dataset's path in it.
    shape, dtype
        Of the whole dataset.
    like : Hdf5Source or None
        Whose attributes, chunks, maxshape and filters to keep. Lossy filters and what describes only the stored
        numbers of the input (`fills.OF_STORED`) are left out. None: a contiguous dataset.
    budget : int
        Bytes to buffer at most.
    workers : int
        Threads that compress gzip, shuffle and fletcher32 chunks.

    Raises
    ------
    InputError
        When a filter of `like` is not available for writing.
    OSError
        From every method but `abandon`: the disk is full, or failed.
    """

    def __init__(
        self,
        temp: str,
        dataset: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        like: Hdf5Source | None,
        budget: int,
        workers: int = 1,
    ) -> None:
        self.dataset, self._shape, self._dtype = "/" + dataset.strip("/"), shape, np.dtype(dtype)
        layout = h5p.create(h5p.DATASET_CREATE)
        layout.set_obj_track_times(False)  # the same data gives the same bytes
        chunks = like.chunks if like and len(like.file_shape) == len(shape) else None
        self._segment = math.prod(shape)  # a write never crosses from one segment into the next
        step = band = 1
        if chunks and like:
            chunks, band, self._segment = fitting_chunks(chunks, shape, max(1, budget // self._dtype.itemsize))
            layout.set_chunk(chunks)
            keep_filters(layout, filters_of(like.dataset_id()), like.address)
        step = max(1, min(budget, WRITE_BYTES) // self._dtype.itemsize // band) * band
        self._step = min(step, self._segment)
        self._buffer = np.empty(self._step, self._dtype)
        self._held = self._written = 0
        self._pool: ThreadPoolExecutor | None = None
        self.dropped: list[str] = []
        self._disk = Disk(temp)
        try:
            with self.writing():
                self._ordered = like is not None and like.in_order(layout)
                self.file = new_file(self._disk, in_order=self._ordered, recent=like is not None and like.recent())
                limits = like.maxshape() if chunks and like else shape
                self._id = self._create(layout, limits)
                self._filters, self._chunks = filters_of(self._id), chunks
                if not self._filters:  # else nobody knows how much it will be
                    self._disk.reserve(math.prod(shape) * self._dtype.itemsize)
                if chunks and self._filters and encodes(self._filters):
                    self._pool = ThreadPoolExecutor(workers, thread_name_prefix="bn-write")
                if like:
                    with hdf5_errors(printable(like.address), "its attributes cannot be copied; the file is damaged"):
                        self.dropped = self._take_attributes(like)
        except BaseException:
            self.abandon()
            raise

    def write(self, values: npt.NDArray[Any]) -> None:
        """Append the next values, of shape (n,): any number of them."""
        values = np.ascontiguousarray(values, self._dtype).reshape(-1)
        while values.size:
            if self._held + self._written >= math.prod(self._shape):
                raise ValueError("more values than the dataset's shape has")
            wanted = self._step_size() - self._held
            part, values = values[:wanted], values[wanted:]
            if part.size == self._step_size():
                self._store(part)
                continue
            self._buffer[self._held : self._held + part.size] = part
            self._held += part.size
            if part.size == wanted:
                self._store(self._buffer[: self._held])

    def finish(self) -> None:
        """Close the file, which is complete."""
        if self._held or self._written != math.prod(self._shape):
            raise ValueError(
                f"only {self._written + self._held} values were written to a dataset of shape {self._shape}"
            )
        self._stop()
        with self.writing():
            self.file.close()
        self._disk.close()

    def abandon(self) -> None:
        """Let go of the file after a failure; nothing more is written, and nothing is raised."""
        self._stop()
        self._disk.failure = self._disk.failure or OSError("abandoned")
        with contextlib.suppress(Exception):
            self.file.close()
        with contextlib.suppress(OSError):
            self._disk.close()

    def _stop(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raise what went wrong on the disk, which HDF5 was not told of, and make OSError of what HDF5 raises."""
        try:
            yield
        except (BnError, OSError):
            if self._disk.failure is None:
                raise
        except (RuntimeError, LookupError, ValueError, TypeError) as error:
            raise self._disk.failure or OSError(errno.EIO, reason(error)) from error
        if self._disk.failure:
            raise self._disk.failure

    def _take_attributes(self, like: Hdf5Source) -> list[str]:
        """Copy what does not speak of other objects; return the names (/path@name) of what does."""
        item = like.dataset_id()
        lost = copy_attributes(item, self._id, like.watched, skip=(*OF_STORED, *dimensions_of(item)))
        lost += [name for name in dimensions_of(item) if name in like.attributes]
        return [f"{self.dataset}@{name}" for name in lost]

    def _create(self, layout: Any, limits: tuple[int | None, ...]) -> h5d.DatasetID:
        ends = tuple(h5s.UNLIMITED if m is None else max(m, n) for m, n in zip(limits, self._shape, strict=True))
        links = h5p.create(h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        links.set_char_encoding(h5t.CSET_UTF8)
        group = os.path.dirname(self.dataset)
        if self._ordered and group != "/":  # HDF5 would make groups on the way without
            self.file.create_group(name_bytes(group), track_order=True)
        space = h5s.create_simple(self._shape, ends)
        return h5d.create(
            self.file.id, name_bytes(self.dataset), h5t.py_create(self._dtype, logical=True), space, layout, lcpl=links
        )

    def _step_size(self) -> int:
        """Return how many values the write that begins at the present position takes."""
        within = self._written % self._segment
        return min(self._step - within % self._step, self._segment - within)

    def _store(self, values: npt.NDArray[Any]) -> None:
        done = 0
        for start, extent in boxes(self._shape, self._written, values.size):
            count = math.prod(extent)
            part = values[done : done + count].reshape(extent)
            with self.writing():
                if self._pool:
                    self._store_chunks(self._pool, start, part)
                else:
                    place = self._id.get_space()
                    place.select_hyperslab(start, extent)
                    self._id.write(h5s.create_simple(extent), place, part)
            done += count
        self._written += values.size
        self._held = 0

    def _store_chunks(self, pool: ThreadPoolExecutor, start: tuple[int, ...], part: npt.NDArray[Any]) -> None:
        """Compress whole chunks in the pool, each by itself, and write them as they are; HDF5 would do it one by one."""
        assert self._chunks is not None
        chunks = self._chunks
        places = list(product(*(range(0, n, c) for n, c in zip(part.shape, chunks, strict=True))))

        def encoded(place: tuple[int, ...]) -> bytes:
            inside = part[tuple(slice(p, p + c) for p, c in zip(place, chunks, strict=True))]
            whole = inside
            if inside.shape != chunks:  # an edge chunk is stored whole
                whole = np.zeros(chunks, part.dtype)
                whole[tuple(slice(0, n) for n in inside.shape)] = inside
            return encode(self._filters, np.ascontiguousarray(whole).reshape(-1).view(np.uint8))

        for place, data in zip(places, pool.map(encoded, places), strict=True):
            self._id.write_direct_chunk(tuple(s + p for s, p in zip(start, place, strict=True)), data)


def _utf8(text: str | bytes) -> str:
    """Return a string from an attribute; bytes of another encoding are replaced, not worth refusing the data for."""
    return (text if isinstance(text, bytes) else name_bytes(text)).decode("utf-8", "replace")


def copy_others(source_path: str, dataset: str, sink: Hdf5Sink) -> tuple[list[str], list[str]]:
    """Copy every other dataset and group, and the attributes of root and groups, into the file of an open sink.

    Only hard links are followed. Call it before `Hdf5Sink.finish`.

    Returns
    -------
    left, dropped : list of str
        As `copy_objects`.
    """
    with sink.writing(), hdf5_errors(printable(source_path), UNREADABLE), open_file(source_path) as (file, watched):
        main = open_dataset(file, source_path, dataset)
        root, target = h5g.open(file.id, b"/"), h5g.open(sink.file.id, b"/")
        return copy_objects(root, target, main, sink.dataset, watched, OF_STORED)


def other_datasets(path: str, dataset: str) -> list[str]:
    """Return the paths of the datasets of a file other than this one."""
    with hdf5_errors(printable(path), UNREADABLE), open_file(path) as (file, _):
        main = identity(open_dataset(file, path, dataset))
        found = list(walk(h5g.open(file.id, b"/"), printable(path)))
        return [
            at
            for at, item, first in found
            if at == first and isinstance(item, h5d.DatasetID) and identity(item) != main
        ]


def read_strings(path: str, dataset: str) -> tuple[str, ...]:
    """Read a one-dimensional dataset of strings, of fixed or variable length, as UTF-8.

    Raises
    ------
    InputError
        When it is missing or something else.
    """
    where = f"{printable(path)}::{printable(dataset)}"
    with hdf5_errors(where, UNREADABLE), open_file(path) as (file, watched):
        item = open_dataset(file, path, dataset)
        info = describe(item, dataset, where)
        kind = item.get_type()
        if kind.get_class() != h5t.STRING or len(info.shape) != 1:
            raise InputError(f"{where}: holds {info.dtype} of shape {info.shape}; a list of strings is needed")
        if storage_problem(item) or (missing := missing_filter(filters_of(item))):
            raise InputError(f"{where}: {storage_problem(item) or missing}")
        size, stored = info.shape[0] * kind.get_size(), item.get_storage_size()
        # HDF5 would look for every string that the shape claims, which takes minutes where they are not there
        if size > STRING_LIMIT or (stored < size if info.chunks is None else bool(size) > bool(stored)):
            raise InputError(f"{where}: {info.shape[0]} strings are too many, or were never written")
        with hdf5_errors(where, "cannot be read as UTF-8 strings"):
            check_strings(item, watched, where, STRING_LIMIT)
            values = h5py.Dataset(item)[:]
            pad = " " if not kind.is_variable_str() and kind.get_strpad() == h5t.STR_SPACEPAD else ""
            return tuple(v.decode("utf-8").rstrip(pad) if pad else v.decode("utf-8") for v in values.tolist())
