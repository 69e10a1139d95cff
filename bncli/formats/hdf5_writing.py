"""Below the HDF5 writer: the file it writes to, and what a new dataset or file takes over from another."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z

from bncli import files
from bncli.errors import InputError, printable
from bncli.formats.hdf5_chunks import Filter
from bncli.formats.hdf5_file import STRING_LIMIT, Watched, check_variable, hdf5_errors
from bncli.formats.hdf5_layouts import check_strings
from bncli.formats.hdf5_vetting import (
    identity,
    missing_filter,
    name_bytes,
    storage_problem,
    text_of,
    walk,
)

# Filters that round values, to a tolerance chosen for the input: never applied to what bn computed
LOSSY = {h5z.FILTER_SCALEOFFSET, 32013, 32017, 32018, 32022, 32023, 32024, 32028}


class Disk(io.RawIOBase):
    """The file under a sink. HDF5 crashes when a write fails, so it is not told: the failure is kept for the sink."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed by close
        self._ahead = files.Ahead()
        self.failure: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or keep the failure; after one nothing is written."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.failure is None:
                rest = rest[self._file.write(rest) :]
            self._ahead.grown(self._file.fileno(), self._file.tell())
        except BaseException as error:  # also an interrupt: it must not unwind through HDF5
            self.failure = error.with_traceback(None)  # whose frames hold HDF5's objects
        return size

    def readinto(self, out: Any) -> int:
        """Read what there is, and zeros behind it; a failure is kept."""
        view = memoryview(out).cast("B")
        got = 0
        try:
            got = self._file.readinto(view) or 0
        except BaseException as error:
            self.failure = self.failure or error.with_traceback(None)
        view[got:] = bytes(len(view) - got)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the file's length, or keep the failure."""
        try:
            if self.failure is None:
                self._file.truncate(size)
        except BaseException as error:
            self.failure = error.with_traceback(None)  # whose frames hold HDF5's objects
        return size or 0

    def reserve(self, size: int) -> None:
        """Set space aside; HDF5 cuts the file to its length when it is closed."""
        files.reserve(self._file.fileno(), size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def writable(self) -> bool:
        """Tell that it can be written."""
        return True

    def seekable(self) -> bool:
        """Tell that it has positions."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def fitting_chunks(chunks: tuple[int, ...], shape: tuple[int, ...], room: int) -> tuple[tuple[int, ...], int, int]:
    """Return chunks of which a row fits `room` values, the values of such a row, and of the axis it advances along.

    >>> fitting_chunks((4, 100), (10, 100), 1000)
    ((4, 100), 400, 1000)
    >>> fitting_chunks((4, 10, 100), (10, 100, 100), 500)
    ((1, 5, 100), 500, 10000)
    """
    clipped = tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))
    axis = next(a for a in range(len(shape)) if math.prod(shape[a + 1 :]) <= room)
    inner = math.prod(shape[axis + 1 :])
    rows = min(clipped[axis], room // inner)
    if any(n > 1 for n in clipped[:axis]):
        rows = min(shape[axis], room // inner)  # shorter along the first axes, so longer along this one
    return (*(1,) * axis, rows, *clipped[axis + 1 :]), rows * inner, shape[axis] * inner


def keep_filters(layout: Any, filters: list[Filter], address: str) -> None:
    """Give a new dataset the filters of another, in their order, less those that do not fit what bn writes."""
    kept = [f for f in filters if f.code not in LOSSY and f.code != h5z.FILTER_NBIT]
    missing = missing_filter(kept, writing=True)
    if missing:
        raise InputError(f"{printable(address)}: to be written alike it {missing}")
    for f in kept:
        layout.set_filter(f.code, f.flags & h5z.FLAG_OPTIONAL, f.values)


def copy_objects(
    root: h5g.GroupID, target: h5g.GroupID, main: tuple[int, int], copied: str, watched: Watched
) -> tuple[list[str], list[str]]:
    """Copy all that hangs under `root` by hard links, and the attributes of groups; aliases stay aliases, soft links too.

    The object of identity `main` is not copied: `copied` is the path of what stands for it in the target.

    Returns
    -------
    left, dropped : list of str
        Datasets that were left out: their values lie in other files. And what refers to other files or objects: links,
        datasets of references, and attributes (/path@name).
    """
    left: list[str] = []
    where = printable(watched.raw.path)
    copy_attributes(root, target, watched)
    dropped = _copy_links(root, target, "/", where) + [f"/@{name}" for name in referring(root)]
    for path, item, first in walk(root, where):
        with hdf5_errors(where, f"{printable(path)} cannot be copied"):
            origin = copied if identity(item) == main else first
            if isinstance(item, h5d.DatasetID) and origin == path and _has_references(item.get_type()):
                dropped.append(path)
            elif not _copy_object(root, target, item, path, origin, watched):
                left.append(path)
            elif origin == path and identity(item) != main:  # whose own are told by the sink
                dropped += [f"{path}@{name}" for name in referring(item)]
                if isinstance(item, h5g.GroupID):
                    dropped += _copy_links(item, target, f"{path}/", where)
    return left, dropped


def _copy_links(group: h5g.GroupID, target: h5g.GroupID, prefix: str, where: str) -> list[str]:
    """Copy a group's soft links; return the paths of its links to other files."""
    dropped = []
    with hdf5_errors(where, "a link cannot be copied"):
        for name in map(bytes, group):
            kind, path = group.links.get_info(name).type, prefix + text_of(name)
            if kind == h5l.TYPE_SOFT:
                target.links.create_soft(name_bytes(path), group.links.get_val(name))
            elif kind != h5l.TYPE_HARD:
                dropped.append(path)
    return dropped


def referring(item: Any) -> list[str]:
    """Names of an object's attributes that hold references, which point into its own file."""
    attributes = [h5a.open(item, index=position) for position in range(h5a.get_num_attrs(item))]
    return [text_of(bytes(a.name)) for a in attributes if _has_references(a.get_type())]


def _copy_object(root: h5g.GroupID, target: h5g.GroupID, item: Any, path: str, origin: str, watched: Watched) -> bool:
    """Copy one object, or link it to its copy `origin`; False when it is left out."""
    name, there = name_bytes(path), target.links.exists  # `in` takes no names but in UTF-8
    if path != origin:
        if origin != "/" and not there(name_bytes(origin)):
            return False
        if not there(name):
            target.links.create_hard(name, target, name_bytes(origin))
    elif isinstance(item, h5g.GroupID):
        group = h5g.open(target, name) if there(name) else h5g.create(target, name)
        copy_attributes(item, group, watched)
    elif isinstance(item, h5d.DatasetID) and storage_problem(item):
        return False
    elif isinstance(item, h5t.TypeID) and not there(
        name
    ):  # not by `h5o.copy`, which crashes over one that has a layout
        check_variable(item)
        kind = item.copy()
        kind.commit(target, name)
        copy_attributes(item, kind, watched)
    elif not there(name):
        check_variable(item.get_type())
        if item.get_space().get_simple_extent_type() == h5s.SIMPLE:
            check_strings(item, watched, printable(path), STRING_LIMIT)
        h5o.copy(root, name, target, name)
    return True


def copy_attributes(source: Any, target: Any, watched: Watched, skip: tuple[str, ...] = ()) -> None:
    """Copy attributes with their types; references, which point into the source's file, are left out."""
    for position in range(h5a.get_num_attrs(source)):
        attribute = h5a.open(source, index=position)
        kind, space = attribute.get_type(), attribute.get_space()
        name = bytes(attribute.name)
        if text_of(name) in skip or h5a.exists(target, name) or _has_references(kind):
            continue
        check_variable(kind)
        values = None if space.get_simple_extent_type() == h5s.NULL else np.empty(attribute.shape, attribute.dtype)
        if values is not None:
            watched.check_attribute(attribute)
            attribute.read(values)
        copy = h5a.create(target, name, kind.copy(), space)
        if values is not None:
            copy.write(values)


def _has_references(kind: Any) -> bool:
    group = kind.get_class()
    if group in (h5t.VLEN, h5t.ARRAY):
        return _has_references(kind.get_super())
    if group == h5t.COMPOUND:
        return any(_has_references(kind.get_member_type(i)) for i in range(kind.get_nmembers()))
    return bool(group == h5t.REFERENCE)
