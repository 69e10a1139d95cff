"""What an HDF5 object carries over to its copy: attributes byte for byte, and references that point to the copies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from h5py import h5, h5a, h5d, h5ds, h5g, h5s, h5t

from bncli.formats.hdf5.chunks import boxes
from bncli.formats.hdf5.file import CheckedFile, check_variable
from bncli.formats.hdf5.vetting import text_of
from bncli.numerics.arrays import Array, Bools, Bytes

# netCDF-4's numbers of dimensions: true only with the dimension scales that carry the same numbers
NETCDF_DIMENSIONS = ("_Netcdf4Dimid", "_Netcdf4Coordinates")
SCALES_OF_AXES, AXES_OF_SCALE = "DIMENSION_LIST", "REFERENCE_LIST"  # of an array; of a scale
AT_ONCE = 1 << 16  # values to copy
NOWHERE = (0, 2**64 - 1)  # references to nothing
Moved = dict[int, int]  # address of an object in its file -> address of its copy in the output


def place_of(item: Any) -> int:
    """Return the address of an object in its file, which is what a reference to it holds."""
    low, high = h5g.get_objinfo(item).objno
    return int(low | high << 32)  # two numbers where HDF5's `unsigned long` has 32 bits; else the second is 0


def attributes_of(item: Any) -> Iterator[h5a.AttrID]:
    """Yield the attributes of an object, opened, in the order in which they were made where the object remembers it."""
    ordered = not isinstance(item, h5t.TypeID) and item.get_create_plist().get_attr_creation_order()
    index = h5.INDEX_CRT_ORDER if ordered else h5.INDEX_NAME
    for position in range(h5a.get_num_attrs(item)):
        yield h5a.open(item, index=position, index_type=index)


def dimensions_of(item: h5d.DatasetID) -> tuple[str, ...]:
    """Return the names of attributes that are wrong where the dimensions of a dataset are not those of its file.

    A scale of one axis is a dimension of its own; with more, netCDF looks for the dimensions of the others.
    """
    return (*NETCDF_DIMENSIONS, *(("CLASS", "NAME") if len(item.shape) > 1 and h5ds.is_scale(item) else ()))


def copy_attributes(
    source: Any, target: Any, checked: CheckedFile, skip: tuple[str, ...] = (), moved: Moved | None = None
) -> list[str]:
    """Copy attributes in their own types, byte for byte; return the names of those that are left out.

    Left out are references that cannot point to a copy, and with DIMENSION_LIST what netCDF-4 stores about the same
    dimensions. An attribute that the target has already stays as it is.
    """
    lost = []
    for attribute in attributes_of(source):
        name = bytes(attribute.name)
        if text_of(name) not in skip and not h5a.exists(target, name) and not _copy(attribute, target, checked, moved):
            lost.append(text_of(name))
    for number in NETCDF_DIMENSIONS if SCALES_OF_AXES in lost else ():
        if h5a.exists(target, number.encode()):
            h5a.delete(target, number.encode())
            lost.append(number)
    return lost


def _copy(attribute: h5a.AttrID, target: Any, checked: CheckedFile, moved: Moved | None) -> bool:
    """Copy one attribute; False when it holds references that cannot point to a copy."""
    name, kind, space = bytes(attribute.name), attribute.get_type(), attribute.get_space()
    if refers(kind) and (moved is None or not _plain_references(kind)):
        return False
    check_variable(kind)
    values = None
    if space.get_simple_extent_type() != h5s.NULL:
        checked.check_attribute(attribute)
        # in its own type, so that HDF5 converts nothing: NumPy's texts would lose the last letter of one that fills its
        # type. What is of variable length is a pointer here, and `write` frees what `read` allocated
        values = np.zeros(attribute.shape, f"V{kind.get_size()}")
        attribute.read(values, kind)
        found = translate(kind, values, moved or {})
        if text_of(name) == AXES_OF_SCALE and values.ndim == 1:  # an array that is not in the output has no axis there
            values = values[found]
            space = h5s.create_simple(values.shape)
            if not values.size:
                return True
        elif not found.all():
            return False
    copy = h5a.create(target, name, kind.copy(), space)
    if values is not None:
        copy.write(values, kind)
    return True


def refers(kind: h5t.TypeID) -> bool:
    """Tell whether values of a type are references, or hold some."""
    return any(True for _ in _references(kind))


def _plain_references(kind: h5t.TypeID) -> bool:
    """Tell whether all references in a type are to whole objects, as the place of its header: those of HDF5 before 1.12."""
    return all(reference.equal(h5t.STD_REF_OBJ) for reference in _references(kind))


def _references(kind: h5t.TypeID) -> Iterator[h5t.TypeID]:
    """The types of reference that a type is, or holds."""
    group = kind.get_class()
    if group in (h5t.VLEN, h5t.ARRAY):
        yield from _references(kind.get_super())
    elif group == h5t.COMPOUND:
        for i in range(kind.get_nmembers()):
            yield from _references(kind.get_member_type(i))
    elif group == h5t.REFERENCE:
        yield kind


def translate(kind: h5t.TypeID, values: Array, moved: Moved) -> Bools:
    """Let the references in values (as `read` leaves them in memory) point to the copies; return for each value whether all of them do.

    What has no copy becomes the null reference.
    """
    found = np.ones(values.size, np.bool_)
    if refers(kind):
        _translate(kind, values.reshape(-1, 1).view(np.uint8), moved, found)
    return found.reshape(values.shape)


def _translate(kind: h5t.TypeID, content: Bytes, moved: Moved, found: Bools) -> None:
    """Translate values of a type, a row of bytes each, in place; `found` of a value becomes False where it fails."""
    group = kind.get_class()
    if group == h5t.REFERENCE:
        old = np.ascontiguousarray(content).view(np.uint64).reshape(-1).tolist()
        found &= [place in moved or place in NOWHERE for place in old]
        content[...] = np.array([moved.get(place, 0) for place in old], np.uint64).view(np.uint8).reshape(-1, 8)
    elif group == h5t.VLEN:
        inner, size = kind.get_super(), kind.get_super().get_size()
        for i, (count, start) in enumerate(np.ascontiguousarray(content).view(np.uintp).tolist()):
            if count:
                rows = np.asarray(_Memory(start, (count, size)))
                inside = np.ones(count, np.bool_)
                _translate(inner, rows, moved, inside)
                found[i] &= inside.all()
    else:
        for member, at in _members(kind):
            if refers(member):
                _translate(member, content[:, at : at + member.get_size()], moved, found)


def _members(kind: h5t.TypeID) -> list[tuple[h5t.TypeID, int]]:
    """Return the parts of a compound or array type, and where each begins."""
    if kind.get_class() == h5t.COMPOUND:
        return [(kind.get_member_type(i), kind.get_member_offset(i)) for i in range(kind.get_nmembers())]
    inner = kind.get_super()
    return [(inner, i * inner.get_size()) for i in range(math.prod(kind.get_array_dims()))]


class _Memory:
    """Bytes that HDF5 allocated for values of variable length, for NumPy to look at."""

    def __init__(self, start: int, shape: tuple[int, int]) -> None:
        self.__array_interface__ = {"shape": shape, "typestr": "|u1", "data": (start, False), "version": 3}


def can_be_copied(item: h5d.DatasetID) -> bool:
    """Tell whether the values of a dataset mean the same in another file: none are references, or all to whole objects.

    Lists of references are not copied: HDF5 does not report what size an element claims, and makes room for it.
    """
    kind = item.get_type()
    return not refers(kind) or (_plain_references(kind) and not _lists_references(kind))


def _lists_references(kind: h5t.TypeID) -> bool:
    """Tell whether values of a type hold lists, of variable length, of references."""
    group = kind.get_class()
    if group == h5t.COMPOUND:
        return any(_lists_references(kind.get_member_type(i)) for i in range(kind.get_nmembers()))
    if group == h5t.ARRAY:
        return _lists_references(kind.get_super())
    return bool(group == h5t.VLEN and refers(kind))


def copied_by_value(item: h5d.DatasetID) -> bool:
    """Tell whether HDF5's own copy of a dataset would not be right.

    It makes null of every reference, and of the fill value of texts a pointer into the heaps of the other file, with
    which the copy cannot be read.
    """
    kind = item.get_type()
    filled = item.get_create_plist().fill_value_defined() == h5d.FILL_VALUE_USER_DEFINED
    return refers(kind) or (filled and _varies(kind))


def _varies(kind: h5t.TypeID) -> bool:
    """Tell whether values of a type are of variable length, or hold such."""
    group = kind.get_class()
    if group == h5t.COMPOUND:
        return any(_varies(kind.get_member_type(i)) for i in range(kind.get_nmembers()))
    if group == h5t.ARRAY:
        return _varies(kind.get_super())
    return bool(group == h5t.VLEN or (group == h5t.STRING and kind.is_variable_str()))


def copy_values(source: h5d.DatasetID, target: h5d.DatasetID, moved: Moved) -> int:
    """Copy the values of a dataset, a block or chunk at a time; return how many refer to what has no copy."""
    kind, lost = source.get_type(), 0
    for start, extent in _blocks(source):
        place = source.get_space()
        if extent:
            place.select_hyperslab(start, extent)
        within = h5s.create_simple(extent) if extent else place
        values = np.zeros(extent, f"V{kind.get_size()}")
        source.read(within, place, values, kind)
        lost += int(np.count_nonzero(~translate(kind, values, moved)))
        target.write(within, place, values, kind)
    return lost


def _blocks(item: h5d.DatasetID) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield start and extent of blocks that cover a dataset: its chunks, or what is not too much."""
    if item.get_space().get_simple_extent_type() == h5s.NULL:
        return
    shape = tuple(item.get_space().get_simple_extent_dims())
    if not shape:
        yield (), ()
    elif 0 not in shape and item.get_create_plist().get_layout() == h5d.CHUNKED:
        for slices in h5py.Dataset(item).iter_chunks():
            yield tuple(s.start for s in slices), tuple(s.stop - s.start for s in slices)
    else:
        total = math.prod(shape)
        for first in range(0, total, AT_ONCE):
            yield from boxes(shape, first, min(AT_ONCE, total - first))
