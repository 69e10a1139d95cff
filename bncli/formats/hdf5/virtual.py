"""Virtual datasets, for those who mean it: read here from their sources, each vetted as a dataset of its own.

HDF5 itself fills what it cannot find with the fill value, and crashes over a virtual dataset that refers to itself; so
it is only asked for the mappings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from h5py import h5d, h5s

from bncli.errors import BnError, InputError, printable
from bncli.formats.hdf5.chunks import boxes
from bncli.formats.hdf5.layouts import Reader
from bncli.formats.source import Source
from bncli.numerics.arrays import Array, Bools, DType

Open = Callable[[str, str], Source]


@dataclass(frozen=True)
class Picked:
    """The indices of one axis that a mapping takes: `count` blocks of `block`, each `stride` after the last.

    >>> Picked(1, 4, 2, 3).at(0, 6).tolist()
    [1, 2, 3, 5, 6, 7]
    """

    start: int
    stride: int
    count: int
    block: int

    @property
    def size(self) -> int:
        """How many there are."""
        return self.count * self.block

    def before(self, index: int) -> int:
        """Return how many of them precede an index."""
        blocks, rest = divmod(max(0, index - self.start), max(self.stride, self.block))
        return min(self.size, blocks * self.block + min(rest, self.block))

    def at(self, first: int, stop: int) -> npt.NDArray[np.intp]:
        """Return the indices from the one numbered `first` on."""
        number = np.arange(first, stop)
        return self.start + number // self.block * self.stride + number % self.block


@dataclass(frozen=True)
class Mapping:
    """A part of a virtual dataset, and the part of a source that it stands for, value by value in C order."""

    path: str
    dataset: str
    target: tuple[Picked, ...]
    origin: tuple[Picked, ...] | None  # None: all of the source, whose shape the virtual dataset does not know
    shape: tuple[int, ...] = ()  # of the source


def mappings(item: h5d.DatasetID, path: str, where: str) -> list[Mapping]:
    """Return the mappings of a virtual dataset; the files of its sources are relative to its own.

    Raises
    ------
    InputError
        For a mapping that grows with its source, or that is not one box, or regular blocks, onto the like.
    """
    plist = item.get_create_plist()
    found = []
    for i in range(plist.get_virtual_count()):
        file, dataset = plist.get_virtual_filename(i), plist.get_virtual_dsetname(i)
        origin, target = plist.get_virtual_srcspace(i), plist.get_virtual_vspace(i)
        place = path if file == "." else os.path.join(os.path.dirname(path), file)
        whole, picked = origin.get_select_type() == h5s.SEL_ALL, _picked(target)
        if "%" in file + dataset or picked is None or not (whole or _picked(origin)):  # % stands for a number
            raise InputError(
                f"{where}: its mapping onto {printable(file)}::{printable(dataset)} is of a kind that bn does not read; "
                "copy the values into one dataset"
            )
        found.append(Mapping(place, dataset, picked, None if whole else _picked(origin)))
    return found


def _picked(space: Any) -> tuple[Picked, ...] | None:
    """Return what a selection takes of each axis; None for one of another kind."""
    if space.get_select_type() == h5s.SEL_ALL:
        return _all(tuple(space.get_simple_extent_dims()))
    if space.get_select_type() != h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return None
    parts = [Picked(*part) for part in zip(*space.get_regular_hyperslab(), strict=True)]
    ends = [p.start + (p.count - 1) * p.stride + p.block for p in parts]
    within = all(end <= n for end, n in zip(ends, space.get_simple_extent_dims(), strict=True))  # else without end
    return tuple(parts) if within and all(p.block <= p.stride or p.count == 1 for p in parts) else None


def _all(shape: tuple[int, ...]) -> tuple[Picked, ...]:
    return tuple(Picked(0, 1, 1, n) for n in shape)


def _wide(parts: tuple[Picked, ...]) -> list[int]:
    return [p.size for p in parts if p.size != 1]


class Virtual(Reader):
    """The values of a virtual dataset.

    Parameters
    ----------
    where : str
        The address, for messages.
    shape, dtype
        Of the virtual dataset.
    parts : list of Mapping
    open_source : callable
        Opens and vets a source, by path and dataset.
    fill : scalar or None
        What is read where nothing is mapped; None: that is refused.

    Attributes
    ----------
    files : list of str
        The files of the sources.
    """

    def __init__(
        self,
        where: str,
        shape: tuple[int, ...],
        dtype: DType,
        parts: list[Mapping],
        open_source: Open,
        fill: Any,
    ) -> None:
        self._where, self._shape, self._dtype, self._open = where, shape, dtype, open_source
        self._fill = fill
        self._source: tuple[tuple[str, str], Source] | None = None
        if fill is None and sum(math.prod(p.size for p in part.target) for part in parts) < math.prod(shape):
            raise self._unmapped()
        self._parts = [self._checked(part) for part in parts]
        self.files = list(dict.fromkeys(part.path for part in parts))
        rows = [part.target[0] for part in parts]
        self._first, self._stop = np.array([(p.start, p.at(p.size - 1, p.size)[0] + 1) for p in rows]).reshape(-1, 2).T

    def read(self, first: int, out: Array) -> None:
        """Fill `out` from the sources."""
        if self._fill is not None:
            out[...] = self._fill
        mapped, done = np.zeros(out.size, bool), 0
        for start, extent in boxes(self._shape, first, out.size):
            box = slice(done, done + math.prod(extent))
            for i in np.flatnonzero((self._first < start[0] + extent[0]) & (self._stop > start[0])).tolist():
                self._copy(self._parts[i], start, out[box].reshape(extent), mapped[box].reshape(extent))
            done = box.stop
        if self._fill is None and not mapped.all():
            raise self._unmapped()

    def close(self) -> None:
        """Close the source that is open."""
        if self._source:
            self._source[1].close()
            self._source = None

    def _unmapped(self) -> InputError:
        return InputError(
            f"{self._where}: is virtual, and not all of it is mapped to a source; --allow-unwritten reads the fill value there"
        )

    def _checked(self, part: Mapping) -> Mapping:
        """Open the source of a mapping, compare, and return the mapping with what was not known before."""
        source = self._opened(part)
        shape: tuple[int, ...] = getattr(source, "file_shape", source.shape)
        origin = part.origin or _all(shape)
        inside = len(origin) == len(shape) and all(p.before(n) == p.size for p, n in zip(origin, shape, strict=True))
        if not inside or source.dtype != self._dtype or _wide(origin) != _wide(part.target):
            raise InputError(
                f"{self._where}: its source {printable(source.address)}, {source.dtype.name} of shape {shape}, does not "
                f"fit the {self._dtype.name} of shape {tuple(p.size for p in part.target)} that is mapped onto it"
            )
        return replace(part, origin=origin, shape=shape)

    def _opened(self, part: Mapping) -> Source:
        key = (part.path, part.dataset)
        if self._source is None or self._source[0] != key:
            self.close()
            try:
                self._source = key, self._open(*key)
            except BnError as error:
                raise InputError(f"{self._where}: of its sources, {error}") from None
        return self._source[1]

    def _copy(self, part: Mapping, start: tuple[int, ...], target: Any, mapped: Bools) -> None:
        """Copy what a mapping has of a box that begins at `start`."""
        axes = list(zip(part.target, start, target.shape, strict=True))
        ranges = [(p.before(s), p.before(s + n)) for p, s, n in axes]
        if any(low >= high for low, high in ranges):
            return
        wide = iter([r for p, r in zip(part.target, ranges, strict=True) if p.size != 1])
        origin = [p.at(*((0, 1) if p.size == 1 else next(wide))) for p in part.origin or ()]
        values = _gathered(self._opened(part), part.shape, origin, self._dtype)
        place = np.ix_(*(p.at(*r) - s for (p, s, _), r in zip(axes, ranges, strict=True)))
        target[place] = values.reshape([high - low for low, high in ranges])
        mapped[place] = True


def _gathered(source: Source, shape: tuple[int, ...], indices: list[npt.NDArray[np.intp]], dtype: DType) -> Array:
    """Return the values at all combinations of indices, in C order, read in contiguous runs."""
    axis = len(shape)
    while axis and indices[axis - 1].size == shape[axis - 1]:
        axis -= 1
    weights = [math.prod(shape[k + 1 :]) for k in range(axis)]
    heads, run = indices[:axis], math.prod(shape[axis:])
    if axis and heads[-1][-1] - heads[-1][0] + 1 == heads[-1].size:  # of the last axis of these, one run
        run *= heads[-1].size
        heads = [*heads[:-1], heads[-1][:1]]
    values = np.empty(math.prod(i.size for i in indices), dtype)
    for number, place in enumerate(product(*(head.tolist() for head in heads))):
        source.read(sum(map(int.__mul__, place, weights)), values[number * run : (number + 1) * run])
    return values
