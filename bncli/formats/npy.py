"""The .npy format: a bounded header reader of our own, plain pread, and a sequential writer.

Format: numpy.lib.format, versions 1.0 to 3.0. Never a memory map (a truncated file would be a SIGBUS) and never
a pickle.
"""

from __future__ import annotations

import ast
import contextlib
import io
import math
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from bncli.errors import InputError, UsageError, printable
from bncli.formats import Format, Listed, Output
from bncli.formats.reading import ReadOptions
from bncli.formats.source import ContiguousValues, RegularFile, Source, check_bools, check_shape, memory_that_fits
from bncli.numerics.arrays import Array, DType
from bncli.numerics.kernels import FileRange
from bncli.system import atomic, parsing

MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 64 << 10
_LENGTH_FORMAT = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}
_NARROW_FLOATS = {"V1": "float8", "V2": "bfloat16"}


class NpySource(Source):
    """A .npy file of any order and byte order.

    Parameters
    ----------
    path : str
    options : ReadOptions
        Its memory holds what turns Fortran order into C order.

    Raises
    ------
    InputError
        When the file is not a .npy file of real numbers, or does not hold what its header declares.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self.address = path
        self.notes, self.files = [], [path]
        self._file = RegularFile(path)
        try:
            start, stored, self.fortran, self.file_shape = _read_header(self._file)
            self.shape = check_shape(self.file_shape, printable(path))
            self._check_size(start, stored)
        except BaseException:
            self._file.close()
            raise
        self._values = ContiguousValues(self._file, start, stored)
        self.dtype = stored.newbyteorder("=")
        # an array with one axis longer than 1 is the same in memory in both orders
        self.fortran = self.fortran and sum(n > 1 for n in self.shape) > 1
        self._options = options
        if self.fortran:
            self.rows_together = self._band_rows()
        self._band: tuple[int, Array] = (0, np.empty(0, self.dtype))  # first sample, samples in C order

    def read(self, first: int, out: Array) -> None:
        """Fill `out` with the values from position `first` on, in C order; see `Source.read`."""
        if not self.fortran:
            self._values.read(first, out)
            check_bools(out, self.address)
            return
        done = 0
        while done < len(out):
            sample, offset = divmod(first + done, self.sample_size)
            start, band = self._band_of(sample)
            values = band.reshape(-1)[(sample - start) * self.sample_size + offset :][: len(out) - done]
            out[done : done + len(values)] = values
            done += len(values)

    def stored(self, first: int) -> FileRange | None:
        """See `Source.stored`."""
        return None if self.fortran else self._values.stored(first)

    def check_unchanged(self) -> None:
        """Raise InputError when the file is not what it was when it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _band_of(self, sample: int) -> tuple[int, Array]:
        """Samples around `sample`, read feature by feature from Fortran order; the last band is kept."""
        start, band = self._band
        if not start <= sample < start + len(band):
            sample_bytes = self.sample_size * self.dtype.itemsize
            count = self._band_rows()
            if not count:
                raise UsageError(
                    f"{printable(self.address)}: one sample in Fortran order takes {2 * sample_bytes} bytes to turn round; "
                    f"give {memory_that_fits(2 * sample_bytes, self._options.share)}"
                )
            start = sample // count * count
            count = min(count, self.shape[0] - start)
            columns = np.empty((self.sample_size, count), self.dtype)
            for i in range(self.sample_size):
                self._values.read(i * self.shape[0] + start, columns[i])
            check_bools(columns, self.address)
            band = np.ascontiguousarray(columns.reshape(*self.shape[:0:-1], count).T)
            self._band = start, band
        return start, band

    def _band_rows(self) -> int:
        """Samples that fit the budget twice: in the order of the file, and transposed."""
        return min(self.shape[0], self._options.max_memory // 2 // (self.sample_size * self.dtype.itemsize))

    def _check_size(self, start: int, stored: DType) -> None:
        """Compare what the header promises with the file's size, in Python's unbounded integers."""
        expected = start + math.prod(self.shape) * stored.itemsize
        where, found = printable(self.address), self._file.size
        if found < expected:
            raise InputError(
                f"{where}: cut short: shape {self.shape} of {stored} needs {expected} bytes, the file has {found}; "
                "write or copy it again"
            )
        if found > expected:
            raise InputError(
                f"{where}: {found - expected} bytes follow the data: shape {self.shape} of {stored} ends at byte "
                f"{expected}, the file at {found}; it is not one .npy array"
            )


def is_npy(path: str) -> bool:
    """Whether the file begins as a .npy file does."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _header_of(shape: tuple[int, ...], dtype: DType) -> bytes:
    header = io.BytesIO()
    declared = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, declared)
    return header.getvalue()


@dataclass(frozen=True)
class NpyPlace:
    """The values of a .npy file that has its header, for workers that write runs of them.

    Attributes
    ----------
    path : str
        Absolute.
    offset, itemsize : int
        Of the first value, and of each, in bytes.
    """

    path: str
    offset: int
    itemsize: int

    def write(self, runs: Iterable[tuple[int, Array]], *, sync: bool) -> None:
        """See `Place.write`. The file is opened each time: where many machines share it, closing hands the values on."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)  # it has to be there: its run may have ended
        try:
            for first, values in runs:
                rest, at = np.ascontiguousarray(values).view(np.uint8).data, self.offset + first * self.itemsize
                while len(rest):
                    done = os.pwrite(fd, rest, at)
                    rest, at = rest[done:], at + done
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)


class NpySink:
    """Writes a .npy file front to back, in C order. Its space is set aside first, where the file system can.

    Parameters
    ----------
    path : str
        An empty file to write to.
    shape, dtype
        Of the whole array.

    Raises
    ------
    OSError
        From every method but `abandon`: the disk is full, or failed.
    """

    def __init__(self, path: str, shape: tuple[int, ...], dtype: DType) -> None:
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by finish and abandon
        header = _header_of(shape, dtype)
        self._ahead = atomic.Ahead()
        try:
            atomic.reserve(self._file.fileno(), len(header) + math.prod(shape) * dtype.itemsize)
            self._write(header)
        except BaseException:
            self.abandon()
            raise

    def write(self, values: Array) -> None:
        """Append the next values, of shape (n,)."""
        self._write(np.ascontiguousarray(values).view(np.uint8).data)

    @property
    def dropped(self) -> list[str]:
        """Nothing: there is nothing but values."""
        return []

    def copy_others(self, source: Source) -> tuple[list[str], list[str]]:
        """Not possible: the file holds one array."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close the file, which is complete."""
        self._file.close()

    def abandon(self) -> None:
        """Close the file after a failure; nothing is raised."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        while len(rest):
            rest = rest[self._file.write(rest) :]
        self._ahead.grown(self._file.fileno(), self._file.tell())


def _read_header(file: RegularFile) -> tuple[int, DType, bool, tuple[int, ...]]:
    """Offset of the data, stored type, whether in Fortran order, and shape."""
    where = printable(file.path)
    prefix = _bytes_at(file, 0, 8)
    if not prefix.startswith(MAGIC) or len(prefix) < 8:
        what = "an empty file" if not prefix else "it does not begin with the .npy signature"
        raise InputError(f"{where}: not a .npy file: {what}")
    version = (prefix[6], prefix[7])
    if version not in _LENGTH_FORMAT:
        raise InputError(f"{where}: .npy version {version[0]}.{version[1]} is unknown; bn reads 1.0, 2.0 and 3.0")
    length_format = _LENGTH_FORMAT[version]
    start = 8 + struct.calcsize(length_format)
    packed = _bytes_at(file, 8, start - 8)
    length = struct.unpack(length_format, packed)[0] if len(packed) == start - 8 else 0
    if length > HEADER_LIMIT:
        raise InputError(
            f"{where}: its header claims {length} bytes; a .npy header of real numbers has less than {HEADER_LIMIT}"
        )
    text = _bytes_at(file, start, length)
    if not length or len(text) < length:
        raise InputError(f"{where}: cut in the header: {length} bytes expected, {len(text)} found")
    header = _parse(text, "utf-8" if version == (3, 0) else "latin-1", where)
    return start + length, _stored_type(header["descr"], where), header["fortran_order"], header["shape"]


def _bytes_at(file: RegularFile, offset: int, count: int) -> bytes:
    """Up to `count` bytes; fewer where the file ends before."""
    content = bytearray(max(0, min(count, file.size - offset)))
    file.pread_into(memoryview(content), offset)
    return bytes(content)


def _parse(text: bytes, encoding: str, where: str) -> dict[str, Any]:
    """The header's dictionary; its text is a literal, which is read, never run."""
    try:
        literal = text.decode(encoding).strip(" \t\r\n")
        if encoding == "latin-1":
            literal = re.sub(r"(\d)L(?=\s*[,)])", r"\1", literal)  # Python 2 wrote (569L, 30L)
        with parsing.LOCK:
            header = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(f"{where}: its header is damaged: {printable(text[:60].decode('latin-1'))!r}") from None
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise InputError(f"{where}: its header must hold descr, fortran_order and shape, and nothing else")
    shape = header["shape"]
    if not isinstance(header["fortran_order"], bool):
        raise InputError(f"{where}: fortran_order in its header is neither True nor False")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 64:
        raise InputError(
            f"{where}: the shape in its header is not a tuple of at most 64 sizes: {printable(shape)[:60]}"
        )
    return header


def _stored_type(descr: object, where: str) -> DType:
    """The type of the values, byte order included, when it is one bn computes with."""
    if isinstance(descr, str) and re.fullmatch(r"[<>=|]?([iu][1248]|f[248]|b1|\?)", descr):
        return np.dtype(descr)
    name = printable(descr)[:60]
    if isinstance(descr, str) and descr[1:] in _NARROW_FLOATS:
        name += f" (it looks like {_NARROW_FLOATS[descr[1:]]})"
    elif isinstance(descr, str) and descr[1:2] == "O":
        name += " (Python objects: a pickle, which bn never opens)"
    raise InputError(f"{where}: values of type {name} are refused; bn takes bool, integers and float16, 32 and 64")


class NpyFormat(Format):
    """One array without a name."""

    name, suffixes = ".npy", (".npy",)

    def knows(self, path: str) -> bool:
        """By the first bytes, or the suffix: what is wrong with a broken .npy file is for its own reader to say."""
        return path.endswith(".npy") or is_npy(path)

    def arrays(self, path: str) -> list[Listed]:
        """The one array."""
        with NpySource(path, ReadOptions()) as source:
            order = "Fortran order" if source.fortran else ""
            return [Listed(path, source.file_shape, source.dtype.name, None, order, "")]

    def open(self, path: str, array: str | None, options: ReadOptions) -> NpySource:
        """Open it; an array that is named in the address is refused."""
        if array is not None:
            raise InputError(
                f"{printable(path)}: a .npy file holds one array without a name; leave out ::{printable(array)}"
            )
        return NpySource(path, options)

    def create(self, output: Output) -> NpySink:
        """Make a file; of the input nothing but the values is kept."""
        return NpySink(output.path, output.shape, output.dtype)

    def place(self, output: Output) -> NpyPlace:
        """Values have places of their own."""
        header = _header_of(output.shape, output.dtype)
        return NpyPlace(os.path.abspath(output.path), len(header), output.dtype.itemsize)
