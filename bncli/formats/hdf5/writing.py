"""Below the HDF5 writer: the file it writes to, and what a new dataset or file takes over from another."""

from __future__ import annotations

import io
import math
from typing import Any

import h5py
from h5py import h5a, h5d, h5f, h5fd, h5g, h5l, h5o, h5p, h5s, h5t, h5z

from bncli.errors import InputError, printable
from bncli.formats.hdf5.attributes import (
    AXES_OF_SCALE,
    SCALES_OF_AXES,
    Moved,
    can_be_copied,
    copied_by_value,
    copy_attributes,
    copy_values,
    dimensions_of,
    place_of,
)
from bncli.formats.hdf5.file import STRING_LIMIT, CheckedFile, check_variable, hdf5_errors
from bncli.formats.hdf5.filters import Filter
from bncli.formats.hdf5.layouts import check_strings
from bncli.formats.hdf5.vetting import (
    identity,
    missing_filter,
    name_bytes,
    remembers_order,
    storage_problem,
    text_of,
    walk,
)
from bncli.system import atomic

# Filters that round values, to a tolerance chosen for the input: never applied to what bn computed
LOSSY = {h5z.FILTER_SCALEOFFSET, 32013, 32017, 32018, 32022, 32023, 32024, 32028}


class Disk(io.RawIOBase):
    """The file under a sink. HDF5 crashes when a write fails, so the failure is hidden from it, and kept for the sink."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed by close
        self._ahead = atomic.Ahead()
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
        atomic.reserve(self._file.fileno(), size)

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


def new_file(disk: Disk, *, in_order: bool = False, recent: bool = False) -> h5py.File:
    """Create a file of which the same content gives the same bytes, and which h5py cannot make so: no times in it.

    Parameters
    ----------
    disk : Disk
    in_order : bool
        Have the root group remember the order of members and attributes.
    recent : bool
        In the format of HDF5 1.8 (2008) and later, without which no attribute is larger than 64 KB.
    """
    creation, access = h5p.create(h5p.FILE_CREATE), h5p.create(h5p.FILE_ACCESS)
    creation.set_obj_track_times(False)
    if in_order:
        creation.set_link_creation_order(h5p.CRT_ORDER_TRACKED | h5p.CRT_ORDER_INDEXED)
        creation.set_attr_creation_order(h5p.CRT_ORDER_TRACKED | h5p.CRT_ORDER_INDEXED)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    access.set_libver_bounds(h5f.LIBVER_V18 if recent else h5f.LIBVER_EARLIEST, h5f.LIBVER_LATEST)
    access.set_cache(0, 521, 0, 0.75)  # no cache of chunks: every chunk is written once
    access.set_fileobj_driver(h5fd.fileobj_driver, disk)
    return h5py.File(h5f.create(b"output", h5f.ACC_TRUNC, creation, access))


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
    root: h5g.GroupID,
    target: h5g.GroupID,
    main: h5d.DatasetID,
    copied: str,
    checked: CheckedFile,
    skip: tuple[str, ...],
) -> tuple[list[str], list[str]]:
    """Copy all that hangs under `root` by hard links, and every attribute; aliases stay aliases, soft links too.

    The dataset `main` is not copied: `copied` is the path of what stands for it in the target, which gets its attributes
    less those in `skip`. References, as those to dimension scales, come to point to the copies.

    Returns
    -------
    left, dropped : list of str
        Datasets that were left out: their values are in other files. And what refers to other files, or to what has no
        copy: links, datasets of references, and attributes (/path@name).
    """
    left: list[str] = []
    where = printable(checked.raw.path)
    moved = {place_of(root): place_of(target)}
    dropped = _copy_links(root, target, "/", where)
    new = h5o.open(target, name_bytes(copied))
    for path, item, first in walk(root, where, natural_order=False):
        with hdf5_errors(where, f"{printable(path)} cannot be copied"):
            origin = copied if identity(item) == identity(main) else first
            if path != origin:
                if not _link(target, path, origin):
                    (dropped if origin in dropped else left).append(path)
                continue
            if origin == copied:
                _put_in_order(root, target, new, copied)
            elif isinstance(item, h5d.DatasetID) and (why := storage_problem(item) or not can_be_copied(item)):
                (left if isinstance(why, str) else dropped).append(path)
                continue
            else:
                _copy_object(root, target, item, path, checked)
            moved[place_of(item)] = place_of(h5o.open(target, name_bytes(path)))
            if isinstance(item, h5g.GroupID):
                dropped += _copy_links(item, target, f"{path}/", where)
    if main.shape != new.shape:  # --rows: its axes are shorter than their scales, and it is no scale of other arrays
        moved.pop(place_of(main), None)
        gone = (SCALES_OF_AXES, AXES_OF_SCALE, *dimensions_of(main))
        dropped += [f"{copied}@{name}" for name in gone if h5a.exists(main, name.encode())]
        skip += gone
    dropped += [f"/@{name}" for name in copy_attributes(root, target, checked, moved=moved)]
    return left, dropped + _complete(root, target, main, copied, checked, skip, moved)


def _complete(
    root: h5g.GroupID,
    target: h5g.GroupID,
    main: h5d.DatasetID,
    copied: str,
    checked: CheckedFile,
    skip: tuple[str, ...],
    moved: Moved,
) -> list[str]:
    """Give every copy its attributes, and values that refer; return what refers to what has no copy."""
    dropped = []
    where = printable(checked.raw.path)
    for path, item, first in walk(root, where, natural_order=False):
        is_main = identity(item) == identity(main)
        if path != (copied if is_main else first) or not target.links.exists(name_bytes(path)):
            continue
        with hdf5_errors(where, f"{printable(path)} cannot be copied"):
            copy = h5o.open(target, name_bytes(path))
            lost = copy_attributes(item, copy, checked, skip if is_main else (), moved)
            dropped += [f"{path}@{name}" for name in lost]
            if not is_main and isinstance(item, h5d.DatasetID) and copied_by_value(item):
                count = copy_values(item, copy, moved)
                dropped += [f"{path} ({count} references)"] if count else []
    return dropped


def _link(target: h5g.GroupID, path: str, origin: str) -> bool:
    """Make an alias of a copy; False when there is no such copy."""
    there = target.links.exists  # `in` takes no names but in UTF-8
    if origin != "/" and not there(name_bytes(origin)):
        return False
    if not there(name_bytes(path)):
        target.links.create_hard(name_bytes(path), target, name_bytes(origin))
    return True


def _put_in_order(root: h5g.GroupID, target: h5g.GroupID, new: h5d.DatasetID, path: str) -> None:
    """Name the dataset that was made first anew where groups remember in which order their members were made, as in netCDF-4."""
    if remembers_order(root):
        target.unlink(name_bytes(path))
        h5o.link(new, target, name_bytes(path))


def _copy_links(group: h5g.GroupID, target: h5g.GroupID, prefix: str, where: str) -> list[str]:
    """Copy a group's soft links; return the paths of its links to other files."""
    dropped = []
    with hdf5_errors(where, "a link cannot be copied"):
        for name in map(bytes, group):
            kind, path = group.links.get_info(name).type, prefix + text_of(name)
            if kind == h5l.TYPE_SOFT:
                if not target.links.exists(name_bytes(path)):  # else it is the way that was typed to the dataset
                    target.links.create_soft(name_bytes(path), group.links.get_val(name))
            elif kind != h5l.TYPE_HARD:
                dropped.append(path)
    return dropped


def _copy_object(root: h5g.GroupID, target: h5g.GroupID, item: Any, path: str, checked: CheckedFile) -> None:
    """Copy one object without its attributes."""
    name = name_bytes(path)
    if target.links.exists(name):  # a group on the way to the dataset
        return
    if isinstance(item, h5g.GroupID):
        h5g.create(target, name, gcpl=item.get_create_plist())
        return
    check_variable(item if isinstance(item, h5t.TypeID) else item.get_type())
    if isinstance(item, h5t.TypeID):  # not by `h5o.copy`, which crashes over one that has a layout
        item.copy().commit(target, name)
        return
    if item.get_space().get_simple_extent_type() == h5s.SIMPLE:
        check_strings(item, checked, printable(path), STRING_LIMIT)
    if copied_by_value(item):
        h5d.create(target, name, item.get_type().copy(), item.get_space(), item.get_create_plist())
    else:
        how = h5p.create(h5p.OBJECT_COPY)
        how.set_copy_object(h5o.COPY_WITHOUT_ATTR_FLAG)
        h5o.copy(root, name, target, name, how)
