"""What an HDF5 dataset declares not to be data, in the words of the netCDF conventions."""

from __future__ import annotations

import math

import numpy as np
from h5py import h5a, h5d, h5g, h5i, h5s

from bncli.formats.fills import Mark, Number
from bncli.formats.hdf5.types import type_of
from bncli.numerics.arrays import DType

MOST = 64  # values in an attribute that lists fill values
SCALING = ("scale_factor", "add_offset", "_Unsigned")  # the stored values are not the real ones
FILLS = ("_FillValue", "missing_value")
RANGE = ("valid_range", "valid_min", "valid_max")
OF_STORED = (*SCALING, *FILLS, *RANGE)  # attributes that do not hold for normalized values
NETCDF_FILE = ("_NCProperties", "_nc3_strict")
NETCDF_VARIABLE = ("DIMENSION_LIST", "REFERENCE_LIST", "_Netcdf4Dimid", "_Netcdf4Coordinates")
# NC_FILL_* of netCDF's netcdf.h; it has values for types of one byte too, all of whose values are common data
NETCDF_DEFAULTS: dict[str, Number] = {
    "i2": -32767,
    "u2": 65535,
    "i4": -2147483647,
    "u4": 4294967295,
    "i8": -9223372036854775806,
    "u8": 18446744073709551614,
    "f4": 9.9692099683868690e36,
    "f8": 9.9692099683868690e36,
}


def scaling(item: h5d.DatasetID) -> list[str]:
    """Return which attributes say that the stored values are not the real ones."""
    return [name for name in SCALING if h5a.exists(item, name.encode())]


def marks_of(item: h5d.DatasetID, dtype: DType) -> tuple[Mark, ...]:
    """Return what a dataset of this type declares not to be data: fill values, once each, and the valid range."""
    declared = [(name, value) for name in FILLS for value in _numbers(item, name)[0]]
    default = NETCDF_DEFAULTS.get(dtype.str[1:])
    if default is not None and not h5a.exists(item, b"_FillValue") and _is_netcdf(item):
        declared.append(("netCDF's default fill value", default))
    marks: dict[Number, Mark] = {}
    for name, value in declared:
        mark = Mark.of_fill(name, value, dtype)
        if mark is not None and mark.fill is not None:
            marks.setdefault(mark.fill, mark)
    return (*marks.values(), *_range(item, dtype))


def _range(item: h5d.DatasetID, dtype: DType) -> list[Mark]:
    """The valid range, where it is one of the stored values: they may be packed, or unsigned behind a signed type."""
    (both, kind), (low, kind_of_low), (high, kind_of_high) = (_numbers(item, name) for name in RANGE)
    kinds = {k for k in (kind, kind_of_low, kind_of_high) if k is not None}
    scaled = scaling(item)
    if "_Unsigned" in scaled or (scaled and kinds != {dtype}):
        return []
    if len(both) == 2:
        return [Mark("valid_range", f"{both[0]:g} to {both[1]:g}", low=both[0], high=both[1])]
    marks = [Mark("valid_min", f"{n:g} and above", low=n) for n in low[:1]]
    return marks + [Mark("valid_max", f"{n:g} and below", high=n) for n in high[:1]]


def _is_netcdf(item: h5d.DatasetID) -> bool:
    root = h5g.open(h5i.get_file_id(item), b"/")
    return any(h5a.exists(root, name.encode()) for name in NETCDF_FILE) or any(
        h5a.exists(item, name.encode()) for name in NETCDF_VARIABLE
    )


def _numbers(item: h5d.DatasetID, name: str) -> tuple[list[Number], DType | None]:
    """The numbers of an attribute and their type; none where it is missing, of another type, or long."""
    if not h5a.exists(item, name.encode()):
        return [], None
    attribute = h5a.open(item, name.encode())
    dtype, space = type_of(attribute.get_type())[0], attribute.get_space()
    if dtype is None or space.get_simple_extent_type() == h5s.NULL or math.prod(attribute.shape) > MOST:
        return [], None
    values = np.empty(attribute.shape, dtype.newbyteorder("="))
    attribute.read(values)
    return values.reshape(-1).tolist(), values.dtype
