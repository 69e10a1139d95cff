"""Writing a dataset front to back, in whole chunks, so that HDF5 has no error of the disk to crash over."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
from h5py import h5d, h5g, h5p, h5s, h5t

from bncli.errors import BnError, printable
from bncli.formats.hdf5.attributes import copy_attributes, dimensions_of
from bncli.formats.hdf5.chunks import boxes
from bncli.formats.hdf5.file import hdf5_errors, open_file, reason
from bncli.formats.hdf5.fills import OF_STORED
from bncli.formats.hdf5.filters import encode, encodes
from bncli.formats.hdf5.source import Hdf5Source
from bncli.formats.hdf5.vetting import UNREADABLE, filters_of, name_bytes, open_dataset
from bncli.formats.hdf5.writing import Disk, copy_objects, fitting_chunks, keep_filters, new_file
from bncli.formats.source import Source
from bncli.numerics.arrays import Array, DType

WRITE_BYTES = 8 << 20


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
        dtype: DType,
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

    def write(self, values: Array) -> None:
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

    def copy_others(self, source: Source) -> tuple[list[str], list[str]]:
        """Copy every other dataset and group, and the attributes of root and groups. Call it before `finish`.

        Only hard links are followed.

        Returns
        -------
        left, dropped : list of str
            As `copy_objects`.
        """
        assert isinstance(source, Hdf5Source)
        unreadable = hdf5_errors(printable(source.path), UNREADABLE)
        with self.writing(), unreadable, open_file(source.path) as (file, checked):
            main = open_dataset(file, source.path, source.dataset)
            root, target = h5g.open(file.id, b"/"), h5g.open(self.file.id, b"/")
            return copy_objects(root, target, main, self.dataset, checked, OF_STORED)

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
        """Raise what went wrong on the disk, which was hidden from HDF5, and make OSError of what HDF5 raises."""
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
        lost = copy_attributes(item, self._id, like.checked, skip=(*OF_STORED, *dimensions_of(item)))
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

    def _store(self, values: Array) -> None:
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

    def _store_chunks(self, pool: ThreadPoolExecutor, start: tuple[int, ...], part: Array) -> None:
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
