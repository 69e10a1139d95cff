"""Several inputs as one data set: joined along axis 0, less what --rows leaves out."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from bncli.errors import ChangedError, InputError, MismatchError, UsageError, printable
from bncli.formats import Format, format_of
from bncli.formats.address import absolute, open_source, split
from bncli.formats.fills import Mark, fill_in
from bncli.formats.memory import ArraySource
from bncli.formats.reading import ReadOptions
from bncli.formats.source import Identity, Source
from bncli.numerics.arrays import Array, DType
from bncli.numerics.kernels import FileRange

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Input:
    """One input as it was when the run began.

    Attributes
    ----------
    address : str
    start, stop : int
        Its samples that belong to the data set, counted in the input.
    shape, dtype
        Of the whole input.
    size : int or None
        Of its file, in bytes; None for an array in memory.
    times_ns : tuple of (int, int)
        When its files (a virtual dataset has several) were last written to.
    marks : tuple of Mark
        Which values it declares not to be data.
    passed_over : int
        Other arrays of its file, where it was taken unasked.
    """

    address: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: DType
    size: int | None = None
    times_ns: tuple[tuple[int, int], ...] = ()
    marks: tuple[Mark, ...] = ()
    passed_over: int = 0


class DataSet(Protocol):
    """What is fitted: the samples of `Joined`, or those that are drawn from it."""

    names: tuple[str, ...] | None
    notes: list[str]
    marks: tuple[Mark, ...]
    shape: tuple[int, ...]
    dtype: DType
    sample_size: int

    @property
    def inputs(self) -> list[Input]:
        """The inputs as they were when the run began."""

    @property
    def files(self) -> list[str]:
        """Every file that is read."""

    @property
    def fill(self) -> float | int | None:
        """The fill value in the type of what `read` returns."""

    @property
    def rows_together(self) -> int:
        """Samples that are decoded or gathered together."""

    def read(self, first: int, count: int) -> Array:
        """Values at positions first to first + count in C order; overwritten by the next read."""

    def stored(self, first: int, count: int) -> FileRange | None:
        """The range of one file that holds these values just as `read` gives them; else None."""

    def locate(self, position: int) -> tuple[str, int]:
        """Address and sample (counted in that input) of a value."""

    def inputs_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which of `inputs` hold these samples, given in ascending order."""

    @property
    def most_readers(self) -> int:
        """How many readers can share the buffers; at least 1."""

    def reader(self, share: int) -> DataSet:
        """The same data set for one of `share` workers."""

    def absolute(self) -> DataSet:
        """The same data set by absolute paths, for workers in another working folder."""

    def check_unchanged(self) -> None:
        """Raise InputError when an input is not what it was when the run began."""

    def close(self) -> None:
        """Let go of the open input."""

    def __enter__(self) -> Self:
        """Close it at the end."""

    def __exit__(self, *exc: object) -> None: ...


class Joined:
    """The data set, read by position in C order. Opens one input at a time.

    Attributes
    ----------
    addresses, lengths : list of str, list of int
        Of all inputs, those among them that `rows` leaves out.
    marks : tuple of Mark
        Which values some of the inputs declare not to be data, fill values first.

    Parameters
    ----------
    addresses : sequence of str, or one array
    options : ReadOptions
        Where inputs differ in type they are read as float64, and values equal to the fill value in their own type become
        float64(fill value).

    Raises
    ------
    MismatchError
        When the inputs differ in another axis than 0, or in their feature names.
    InputError, UsageError
        See `address.open_source`.
    """

    def __init__(self, addresses: Sequence[str] | Array, options: ReadOptions) -> None:
        self._options = options
        self._open: tuple[int, Source] | None = None
        self._array = ArraySource(addresses) if isinstance(addresses, np.ndarray) else None
        self._addresses = ["array"] if isinstance(addresses, np.ndarray) else list(addresses)
        self._identities: dict[str, tuple[Format, Identity]] = {}
        self.names: tuple[str, ...] | None = None
        self.notes: list[str] = []
        self.rows_together = 1
        whole = self._open_all()
        self.addresses, self.lengths = [i.address for i in whole], [i.stop for i in whole]
        self.inputs = self._select(whole, options.rows)
        self.shape = (sum(i.stop - i.start for i in self.inputs), *self.inputs[0].shape[1:])
        types = {i.dtype for i in self.inputs}
        self.dtype = types.pop() if len(types) == 1 else np.dtype(np.float64)
        self._offsets = np.cumsum([0] + [i.stop - i.start for i in self.inputs]).tolist()
        self._scratch = np.empty(0, self.dtype)
        self.sample_size = int(np.prod(self.shape[1:], dtype=object))
        marks = dict.fromkeys(mark for i in self.inputs for mark in i.marks)
        self.marks = tuple(sorted(marks, key=lambda mark: mark.fill is None))

    @property
    def fill(self) -> float | int | None:
        """The fill value in the type of what `read` returns; None where no value can equal it."""
        fill = self._options.fill_value
        return None if fill is None else fill_in(self.dtype, fill)

    def read(self, first: int, count: int) -> Array:
        """Values at positions first to first + count of the joined samples in C order.

        Returns
        -------
        array of shape (count,) and of `dtype`; it is overwritten by the next read.
        """
        if len(self._scratch) < count:
            self._scratch = np.empty(count, self.dtype)
        out, done = self._scratch[:count], 0
        while done < count:
            sample, offset = divmod(first + done, self.sample_size)
            index = bisect.bisect_right(self._offsets, sample) - 1
            piece = self.inputs[index]
            length = min(count - done, (self._offsets[index + 1] - sample) * self.sample_size - offset)
            position = (piece.start + sample - self._offsets[index]) * self.sample_size + offset
            self._read_input(index, position, out[done : done + length])
            done += length
        return out

    def stored(self, first: int, count: int) -> FileRange | None:
        """The range of one file that holds these values in the type of `dtype`, just as `read` gives them; else None."""
        sample = first // self.sample_size
        index = bisect.bisect_right(self._offsets, sample) - 1
        source = self._source(index)
        if first + count > self._offsets[index + 1] * self.sample_size or source.dtype != self.dtype:
            return None
        return source.stored(first + (self.inputs[index].start - self._offsets[index]) * self.sample_size)

    def locate(self, position: int) -> tuple[str, int]:
        """Address and sample (counted in that input) of a value of the joined data set."""
        sample = position // self.sample_size
        index = bisect.bisect_right(self._offsets, sample) - 1
        return self.inputs[index].address, self.inputs[index].start + sample - self._offsets[index]

    def inputs_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which of `inputs` hold these samples."""
        return np.searchsorted(self._offsets, samples, side="right") - 1

    @property
    def most_readers(self) -> int:
        """How many readers can share the buffers: each needs room for the samples that are decoded together."""
        together = self.rows_together * self.sample_size * self.dtype.itemsize if self.rows_together > 1 else 1
        return max(1, self._options.max_memory // together)

    def reader(self, share: int) -> Joined:
        """The same data set for one of `share` workers, with that share of the buffers and files of its own."""
        other = copy.copy(self)  # without open files: see `__getstate__`
        other._options = self._options.shared(share)
        return other

    def absolute(self) -> Joined:
        """The same data set by absolute paths; URLs and arrays in memory stay as they are."""
        other = copy.copy(self)
        if self._array is None:
            other.inputs = [replace(i, address=absolute(i.address)) for i in self.inputs]
            other._identities = {absolute(path): known for path, known in self._identities.items()}
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Plain values: a copy, in this process or another, opens the files itself and has buffers of its own."""
        return vars(self) | {"_open": None, "_scratch": np.empty(0, self.dtype)}

    def check_unchanged(self) -> None:
        """Raise InputError when an input was replaced, cut or written to since the run began."""
        for path in self._identities:
            self._check_identity(path)
        if self._open:
            self._open[1].check_unchanged()

    @property
    def files(self) -> list[str]:
        """Every file that is read."""
        return list(self._identities)

    def close(self) -> None:
        """Let go of the open input."""
        if self._open:
            self._open[1].close()
            self._open = None

    def __enter__(self) -> Joined:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_input(self, index: int, position: int, out: Array) -> None:
        source = self._source(index)
        values = out if source.dtype == self.dtype else np.empty(len(out), source.dtype)
        try:
            source.read(position, values)
        except OSError as error:  # of another package's reader: nothing is wrong with the output
            raise InputError(f"{printable(source.address)}: cannot be read: {error.strerror or error}") from None
        if values is out:
            return
        out[...] = values
        given = self._options.fill_value
        fill = None if given is None else fill_in(source.dtype, given)
        if fill is not None and fill == fill:
            out[values == fill] = given

    def _source(self, index: int) -> Source:
        if self._array is not None:
            return self._array
        if self._open is None or self._open[0] != index:
            self.close()
            address = self.inputs[index].address
            self._check_identity(split(address)[0])
            self._open = index, self._opened(address)
        return self._open[1]

    def _opened(self, address: str) -> Source:
        return open_source(address, self._options)

    def _check_identity(self, path: str) -> None:
        format, before = self._identities[path]
        try:
            now = format.identity(path)
        except OSError as error:
            raise ChangedError(f"{printable(path)}: cannot be read any more: {error.strerror}") from None
        before.check(now, path)

    def _open_all(self) -> list[Input]:
        inputs: list[Input] = []
        for address in self._addresses:
            with self._array or self._opened(address) as source:
                states = [self._identify(path, address) for path in source.files]
                size, times = states[0].size if states else None, tuple(state.times_ns for state in states)
                shape, rest = source.shape, (source.marks, source.passed_over)
                inputs.append(Input(source.address, 0, shape[0], shape, source.dtype, size, times, *rest))
                self._check_agreement(inputs[0], inputs[-1], source.names)
                self.names = self.names or source.names
                self.notes += source.notes
                self.rows_together = max(self.rows_together, source.rows_together)
        return inputs

    def _identify(self, path: str, address: str) -> Identity:
        """In what state a file is the first time that it is looked at."""
        if path not in self._identities:
            format = format_of(split(address)[0])
            self._identities[path] = format, format.identity(path)
        return self._identities[path][1]

    def _check_agreement(self, first: Input, other: Input, names: tuple[str, ...] | None) -> None:
        if first.shape[1:] != other.shape[1:]:
            raise MismatchError(
                f"the inputs differ in shape: {printable(first.address)} has samples of shape {first.shape[1:]}, "
                f"{printable(other.address)} of {other.shape[1:]}; they must agree in every axis but the first"
            )
        if self.names and names and self.names != names:
            raise MismatchError(
                f"the inputs differ in their feature names: {printable(first.address)}, {printable(other.address)}"
            )

    def _select(self, inputs: list[Input], rows: tuple[int | None, int | None]) -> list[Input]:
        total = sum(i.stop for i in inputs)
        start, stop, _ = slice(*rows).indices(total)
        if start >= stop:
            raise UsageError(f"--rows selects none of the {total} samples")
        selected, offset = [], 0
        for i in inputs:
            low, high = max(start - offset, 0), min(stop - offset, i.stop)
            if low < high:
                selected.append(replace(i, start=low, stop=high))
            offset += i.stop
        return selected
