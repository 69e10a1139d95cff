"""What every reader offers: the values of one array of a file, by position, in C order."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bncli.errors import ChangedError, InputError, printable
from bncli.formats.fills import Mark
from bncli.numerics.arrays import Array, DType
from bncli.numerics.kernels import FileRange

if TYPE_CHECKING:
    from typing_extensions import Self

REAL_KINDS = "biuf"  # bool, signed, unsigned, float


class Source:
    """One array on disk or in memory, read by flat position.

    Attributes
    ----------
    address : str
        What a person types to name this array; used in messages.
    shape : tuple of int
        At least two axes; axis 0 counts samples. (One dimension is read as (N, 1).)
    file_shape : tuple of int
        As stored: a single axis stays single.
    array_name : str or None
        Its name in the file; None where the file holds one array without a name.
    dtype : numpy.dtype
        Native byte order: what `read` delivers, and what a fill value is compared in.
    names : tuple of str or None
        Feature names stored with the data.
    notes : list of str
        Things a person should know about the stored values (a scale factor, say).
    files : list of str
        Every file that is read; none for an array.
    marks : tuple of Mark
        Which of the stored values it declares not to be data.
    passed_over : int
        Other arrays of the file, where this one was taken unasked.
    rows_together : int
        Samples that are decoded together; reading fewer at a time means decoding them again or keeping them.
    """

    address: str
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    array_name: str | None = None
    dtype: DType
    names: tuple[str, ...] | None = None
    notes: list[str]
    files: Sequence[str] = ()
    marks: tuple[Mark, ...] = ()
    passed_over: int = 0
    rows_together: int = 1

    @property
    def sample_size(self) -> int:
        """Values per sample."""
        return math.prod(self.shape[1:])

    def read(self, first: int, out: Array) -> None:
        """Fill `out` (1-D, of `dtype`) with the values at positions first, first + 1, … of the array in C order.

        Raises
        ------
        InputError
            When the file holds less than it promised.
        """
        raise NotImplementedError

    def stored(self, first: int) -> FileRange | None:
        """The range of the file that starts with the value at position `first`, if the file holds values just as `read` gives them."""
        return None

    def is_dimension(self) -> bool:
        """Whether other arrays of the file name this one as a dimension, whose length is theirs."""
        return False

    def check_unchanged(self) -> None:
        """Raise InputError when the file is not the one that was opened."""

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ContiguousValues:
    """Values stored one after the other in a file, without a filter: a .npy file, a contiguous HDF5 dataset.

    Parameters
    ----------
    file : RegularFile
    offset : int
        Of the first value, in bytes.
    dtype : numpy.dtype
        As stored, in either byte order.
    """

    def __init__(self, file: RegularFile, offset: int, dtype: DType) -> None:
        self._file, self._offset, self._dtype = file, offset, dtype

    def read(self, first: int, out: Array) -> None:
        """Fill `out` (1-D, native byte order) with the values from index `first` on; raises InputError."""
        self._file.pread_into(out.view(np.uint8).data, self._offset + first * out.itemsize)
        if not self._dtype.isnative:
            out.byteswap(inplace=True)

    def stored(self, first: int) -> FileRange | None:
        """See `Source.stored`. Bools are read first, so that `check_bools` sees them."""
        if not self._dtype.isnative or self._dtype.kind == "b":
            return None
        return FileRange(self._file.fd, self._offset + first * self._dtype.itemsize, self._dtype)


def check_bools(values: Array, address: str) -> None:
    """Raise InputError for bools stored as other bytes than 0 and 1, with which NumPy computes in undefined ways."""
    if values.dtype.kind == "b" and values.view(np.uint8).max(initial=0) > 1:
        raise InputError(f"{printable(address)}: holds bytes other than 0 and 1 in an array of bool")


def check_shape(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Return the shape with at least two axes, or refuse an array without samples or features.

    >>> check_shape((5,), "x.npy")
    (5, 1)
    """
    if not shape:
        raise InputError(f"{where}: a single number without axes; bn needs samples along axis 0")
    if 0 in shape:
        missing = "no samples" if shape[0] == 0 else "no features"
        raise InputError(f"{where}: {missing} (shape {shape}); nothing can be computed from it")
    return shape if len(shape) > 1 else (shape[0], 1)


def memory_that_fits(size: int, share: int) -> str:
    """The --max-memory that gives each of `share` readers `size` bytes.

    >>> memory_that_fits(670_384, 2)
    '--max-memory 2M'
    """
    return f"--max-memory {-(-size * share // (1 << 20))}M"


@dataclass(frozen=True)
class Identity:
    """In what state a file is: (size, mtime and ctime in ns).

    A writer can put the time of modification back; the time of change (ctime) is the system's own, and a file that is
    renamed over another has a new one. Neither device nor inode belongs to it: another machine has other ones for the
    same file.
    """

    state: tuple[int, int, int]

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        """Take the identity from what `os.stat` or `os.fstat` gave."""
        return cls((found.st_size, found.st_mtime_ns, found.st_ctime_ns))

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.state[0]

    @property
    def times_ns(self) -> tuple[int, int]:
        """When the file was last written to, and last changed."""
        return self.state[1], self.state[2]

    def check(self, now: Identity | None, path: str) -> None:
        """Raise ChangedError when the file of this path is another one now, or none."""
        if now != self:
            raise ChangedError(
                f"{printable(path)}: changed while it was being read; run again when nobody writes to it"
            )


class RegularFile:
    """An open regular file, read with pread only, that knows whether it was changed since.

    Raises
    ------
    InputError
        When the path is missing, unreadable, or not a regular file (a folder, FIFO or device).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise InputError(f"{printable(path)}: no such file{_near(path)}") from None
        except OSError as error:
            raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from None
        except ValueError:  # a NUL character
            raise InputError(f"{printable(path)}: this cannot be the name of a file") from None
        mode = os.fstat(self.fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(self.fd)
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(f"{printable(path)}: is {kind}; give a file with an array")
        self.identity = Identity.of(os.fstat(self.fd))

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self.identity.size

    def pread_into(self, out: memoryview, offset: int) -> None:
        """Fill the byte buffer from `offset`, or raise InputError when the file ends or fails before."""
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self.fd, [out[done:]], offset + done)
            except OSError as error:
                raise InputError(
                    f"{printable(self.path)}: reading failed at byte {offset + done}: {error.strerror}"
                ) from None
            if got == 0:
                raise InputError(
                    f"{printable(self.path)}: ends at byte {offset + done}, "
                    f"{len(out) - done} bytes before the data does; it was cut after it was opened"
                )
            done += got

    def check_unchanged(self) -> None:
        """Raise InputError when the file was replaced, cut or written to since it was opened."""
        try:
            named = Identity.of(os.stat(self.path))
        except OSError:
            named = None
        self.identity.check(Identity.of(os.fstat(self.fd)), self.path)
        self.identity.check(named, self.path)

    def close(self) -> None:
        """Close the file; a second call does nothing, and what was read is not worse for an error now."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _near(path: str) -> str:
    """', did you mean …?' when the folder holds a file of a similar name, else ''."""
    import difflib

    folder, name = os.path.split(path)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
    except OSError:
        return ""
    return f"; did you mean {printable(os.path.join(folder, close[0]))}?" if close else ""
