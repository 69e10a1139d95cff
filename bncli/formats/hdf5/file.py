"""Below the HDF5 reader: the one open file, locked as HDF5 locks it, and every byte of it that HDF5 asks for."""

from __future__ import annotations

import errno
import fcntl
import io
import math
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5i, h5t

from bncli.errors import BnError, InputError, UsageError, printable
from bncli.formats.source import RegularFile
from bncli.stats.container import HEAP, SIGNATURE, check_heap

OVERLAP = 7  # bytes of a heap's signature that may precede a read
HEAD = 9  # bytes of an attribute message before its name, at most
OPEN_TO_WRITE, OPEN_TO_SWMR = 1, 4  # flags of a superblock
MARKED = (
    "is open for writing by another process (SWMR, or not closed); run again when that has closed it. If it has died: "
    "h5clear -s"
)
MOST_CLAIMS = 1 << 12  # texts or lists in a value
SHARED_TYPE, SHARED_SPACE = 1, 2  # flags of an attribute message
STRUCTURES = 1 << 16  # most reads of structures to remember
STRING_LIMIT = 64 << 20  # bytes of strings, or of references to them


class CheckedFile(io.RawIOBase):
    """The file as HDF5 sees it: read-only, by pread, and no heap of texts (GCOL) over which HDF5 would loop forever.

    HDF5 asks for a heap only when a text of variable length is read, wherever that is; so each heap is checked when
    its signature passes by. Values do not pass by here: the readers take them from `raw` themselves, but for filters
    that only HDF5 knows.
    """

    def __init__(self, raw: RegularFile) -> None:
        super().__init__()
        self.raw, self._place = raw, 0
        self._structures: dict[int, int] = {}  # where HDF5 has read, and how many bytes
        self.failure: Exception | None = None

    def readinto(self, out: Any) -> int:
        """Fill `out` from the present position; the error is kept, since HDF5 only reports that there was one."""
        try:
            got = os.preadv(self.raw.fd, [out], self._place)
            before = min(OVERLAP, self._place)
            self._check(os.pread(self.raw.fd, before + OVERLAP, self._place - before), self._place - before)
            self._check(out, self._place)
        except (OSError, ValueError) as error:
            # another of its kind: the frames of this one hold what HDF5 calls back when it is unloaded, and Python is gone
            self.failure = type(error)(*error.args)
            raise
        if len(self._structures) < STRUCTURES:
            self._structures[self._place] = got
        self._place += got
        return got

    def check_attribute(self, attribute: h5a.AttrID) -> None:
        """Raise ValueError when texts of an attribute claim more than there can be, for which HDF5 would make room first.

        HDF5 has read the attribute's message when the attribute is open, but does not say where: every message of its
        name, shape and kind in what HDF5 has read is checked. Layout: HDF5 file format specification, IV.A.2.m (the
        attribute message) and VI.B (references into heaps).
        """
        kind, name = attribute.get_type(), bytes(attribute.name) + b"\0"
        address, word = h5i.get_file_id(attribute).get_create_plist().get_sizes()
        layout = Layout.of(kind, 8 + address)
        if not layout.claims:
            return
        for flags, coded, space, place in self._messages(name):
            if _may_be(flags, coded, kind, space, attribute.shape, word):
                values = os.pread(self.raw.fd, math.prod(attribute.shape) * layout.size, place)
                self.check_texts(values, layout)
                if (
                    element_bytes(kind) and not flags & SHARED_TYPE
                ):  # HDF5 mends the size of a reference, and converts so
                    unit = int.from_bytes(coded[12:16], "little")
                    self.check_texts(values, Layout(layout.size, ((0, unit),)))

    def _messages(self, name: bytes) -> Iterator[tuple[int, bytes, bytes, int]]:
        """Yield flags, type, dataspace and place of the values of what may be a message of an attribute of this name."""
        for start, count in self._structures.items():
            first = max(0, start - len(name) - HEAD)
            content = os.pread(self.raw.fd, count + len(name) + start - first, first)
            for match in re.finditer(re.escape(name), content):
                for head, versions in ((8, (1, 2)), (9, (3,))):
                    fields = content[max(0, match.start() - head) :][:8]
                    version, flags, *sizes = struct.unpack("<BBHHH", fields.ljust(8))
                    if version in versions and sizes[0] == len(name):
                        padded = 8 if version == 1 else 1
                        ends = [first + match.start()]
                        for size in sizes:
                            ends.append(ends[-1] + -(-size // padded) * padded)
                        coded, space = (os.pread(self.raw.fd, sizes[i], ends[i]) for i in (1, 2))
                        yield flags, coded, space, ends[3]

    def check_texts(self, content: bytes, layout: Layout) -> None:
        """Raise ValueError when the references into heaps in values, as stored, claim more bytes than the file can hold."""
        whole = np.frombuffer(content, np.uint8)[: len(content) // layout.size * layout.size].reshape(-1, layout.size)
        claimed = 0
        for place, unit in layout.claims:
            counts = np.ascontiguousarray(whole[:, place : place + 4]).view("<u4")
            claimed += unit * int(counts.sum(dtype=np.int64))
        if claimed > self.raw.size:
            raise ValueError(f"its texts claim {claimed} bytes")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position."""
        self._place = offset + (0, self._place, self.raw.size)[whence]
        return self._place

    def tell(self) -> int:
        """Return the position."""
        return self._place

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it has positions."""
        return True

    def _check(self, content: Any, start: int) -> None:
        """Check the heaps that begin in these bytes, whole, as they are in the file."""
        for match in HEAP.finditer(content):
            place = start + match.start()
            size = int.from_bytes(os.pread(self.raw.fd, 8, place + 8), "little")
            check_heap(os.pread(self.raw.fd, min(size, self.raw.size - place), place))


def _may_be(flags: int, coded: bytes, kind: h5t.TypeID, space: bytes, shape: tuple[int, ...], word: int) -> bool:
    """Tell whether type and dataspace of an attribute's message are of this class and shape.

    What is shared with other messages (according to its flags) is stored elsewhere, and is not compared. Layout: HDF5 file format
    specification, IV.A.2.b (dataspace, versions 1 and 2) and IV.A.2.d (datatype).
    """
    group = h5t.VLEN if element_bytes(kind) else kind.get_class()  # texts of variable length are stored as class 9
    if not flags & SHARED_TYPE and coded[:1] and coded[0] & 15 != group:
        return False
    if flags & SHARED_SPACE or len(space) < 4:
        return True
    head = 8 if space[0] == 1 else 4
    lengths = [space[head + word * i :][:word] for i in range(space[1])]
    return tuple(int.from_bytes(n, "little") for n in lengths) == shape


@dataclass(frozen=True)
class Layout:
    """How values of a type are stored, as far as needed to find their references to heaps.

    Attributes
    ----------
    size : int
        Bytes of a value.
    claims : tuple of (int, int)
        Where in a value the number of elements of a text or list stands (4 bytes), and the size of an element in memory.
    """

    size: int
    claims: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, kind: h5t.TypeID, width: int) -> Layout:
        """Return the layout of a type, of which a reference into a heap takes `width` bytes in the file."""
        unit, group = element_bytes(kind), kind.get_class()
        if unit:
            return cls(width, ((0, unit),))
        if group == h5t.ARRAY:
            inner, count = cls.of(kind.get_super(), width), math.prod(kind.get_array_dims())
            if len(inner.claims) * count > MOST_CLAIMS:
                raise ValueError(f"a value of it holds {count} texts or lists")
            at = range(count if inner.claims else 0)
            return cls(count * inner.size, tuple((i * inner.size + p, u) for i in at for p, u in inner.claims))
        claims: list[tuple[int, int]] = []
        longer = 0  # in the file than in memory, so far
        for i in range(kind.get_nmembers() if group == h5t.COMPOUND else 0):
            member, start = kind.get_member_type(i), kind.get_member_offset(i) + longer
            inner = cls.of(member, width)
            claims += [(start + p, u) for p, u in inner.claims]
            longer += inner.size - member.get_size()
        return cls(kind.get_size() + longer, tuple(claims))


def element_bytes(kind: h5t.TypeID) -> int:
    """Return the size of an element of a type of variable length, one byte of a text; 0 for other types."""
    variable = kind.get_class() == h5t.VLEN or (kind.get_class() == h5t.STRING and kind.is_variable_str())
    return int(kind.get_super().get_size()) if variable else 0


def check_variable(kind: h5t.TypeID) -> None:
    """Raise ValueError where a type of variable length, at any depth, is neither a sequence nor a text.

    HDF5 takes such a type, and copies its values through a null pointer. Layout: HDF5 file format specification, IV.A.2.d (the datatype message, class 9), behind two bytes of `H5Tencode`.
    """
    group = kind.get_class()
    variable = group == h5t.VLEN or (group == h5t.STRING and kind.is_variable_str())
    if variable and kind.encode()[3] & 15 > 1:
        raise ValueError("its type of variable length is neither a sequence nor a text")
    if group == h5t.COMPOUND:
        for i in range(kind.get_nmembers()):
            check_variable(kind.get_member_type(i))
    elif group in (h5t.VLEN, h5t.ARRAY):
        check_variable(kind.get_super())


@contextmanager
def open_file(path: str) -> Iterator[tuple[h5py.File, CheckedFile]]:
    """Open an HDF5 file for reading, locked against writers and without HDF5's chunk cache.

    Raises
    ------
    InputError
        When it is missing, not HDF5, cut short, or open for writing elsewhere.
    """
    raw = RegularFile(path)
    try:
        _lock(raw)
        _check_unmarked(raw)
        checked = CheckedFile(raw)
        try:
            file, failed = h5py.File(checked, "r", rdcc_nbytes=0), ""
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            failed = _unopened(path, checked.failure or error)
        if failed:  # raised here, without what h5py raised and its frames; see `CheckedFile.readinto`
            raise InputError(failed)
        with file:
            yield file, checked
    finally:
        raw.close()


def address_of(dataset: Any) -> str:
    """FILE::/path of an open h5py dataset, once it is certain that FILE is the file that the dataset belongs to.

    Raises
    ------
    UsageError
        When the dataset is closed, has no name, or is in memory.
    InputError
        When its file's name leads elsewhere now: the working directory changed, or the file was replaced.
    """
    if not dataset:
        raise UsageError("the h5py dataset is closed; fit it while its file is open, or give its address")
    file = dataset.file
    if file.driver != "sec2" or dataset.name is None or file.get(dataset.name) != dataset:
        kind = "is not reached by a name" if file.driver == "sec2" else f"is read by the driver {file.driver!r}"
        raise UsageError(f"the h5py dataset {kind}, not from a file that bn can open; give its values: dataset[...]")
    try:
        same = os.path.samestat(os.fstat(file.id.get_vfd_handle()), os.stat(file.filename))
    except OSError:
        same = False
    if not same:
        raise InputError(
            f"{printable(file.filename)}: is not the file that the h5py dataset was opened from; the working directory "
            "changed, or the file was replaced. Open it by its full path, or give its address"
        )
    return f"{file.filename}::{dataset.name}"


def _lock(raw: RegularFile) -> None:
    """Take the lock that HDF5 itself takes; it goes when the file is closed."""
    if os.environ.get("HDF5_USE_FILE_LOCKING", "").upper() in ("FALSE", "0"):
        return
    try:
        fcntl.flock(raw.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{printable(raw.path)}: is open for writing elsewhere; run again when its writer has closed it"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):  # those have no locks, and HDF5 passes over it too
            raise InputError(
                f"{printable(raw.path)}: cannot be locked against writers ({error.strerror}); "
                "where nobody writes to it, set HDF5_USE_FILE_LOCKING=FALSE"
            ) from None


def _check_unmarked(raw: RegularFile) -> None:
    """Raise InputError where a file is marked as being written.

    A writer that lets others read meanwhile (SWMR) holds no lock, and most of what it writes is not in the file yet.
    Layout: HDF5 file format specification, II.A (the superblock, version 3), behind a user block of 512 bytes or twice
    that, and so on.
    """
    start = 0
    while start < raw.size:
        head = os.pread(raw.fd, 12, start)
        if head.startswith(SIGNATURE):
            if len(head) == 12 and head[8] == 3 and head[11] & (OPEN_TO_WRITE | OPEN_TO_SWMR):
                raise InputError(f"{printable(raw.path)}: {MARKED} {printable(raw.path)}")
            return
        start = 2 * start or 512


def _unopened(path: str, error: Exception) -> str:
    """Say why a file could not be opened."""
    shown, why = printable(path), reason(error)
    if "signature not found" in why:
        return f"{shown}: not an HDF5 file (its signature is missing)"
    if "already open for" in why:
        return f"{shown}: {MARKED} {shown}"
    cut = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", why)
    if cut:
        return f"{shown}: is cut short: {cut[1]} bytes of {cut[2]}; copy or write it again"
    return f"{shown}: cannot be opened as HDF5 ({why}); it is damaged or the disk failed to read it"


@contextmanager
def hdf5_errors(where: str, what: str) -> Iterator[None]:
    """Turn every exception of h5py inside into an InputError: '<where>: <what> (<HDF5's reason>)'."""
    try:
        yield
    except BnError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{where}: {what} ({reason(error)})") from error


def reason(error: Exception) -> str:
    """Return the cause in an h5py error: the innermost part of HDF5's message, or the system's own words."""
    text = " ".join(str(error.args[-1] if error.args else error).split())
    number = re.search(r"errno = ([1-9]\d*)", text)
    if number:
        return os.strerror(int(number[1]))
    inner = re.search(r"\((.*)\)$", text)
    return printable(inner[1] if inner else text)
