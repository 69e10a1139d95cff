"""Which types of HDF5 bn reads, and what people call the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from h5py import h5t

from bncli.formats.source import REAL_KINDS
from bncli.numerics.arrays import DType

COMPOUND = "compound"
# IEEE 754: size -> (sign, exponent's position and bits, mantissa's position and bits), exponent bias
_IEEE = {2: ((15, 10, 5, 0, 10), 15), 4: ((31, 23, 8, 0, 23), 127), 8: ((63, 52, 11, 0, 52), 1023)}
_CLASS_NAMES = {
    h5t.TIME: "time",
    h5t.STRING: "string",
    h5t.BITFIELD: "bit field",
    h5t.OPAQUE: "opaque",
    h5t.COMPOUND: COMPOUND,
    h5t.REFERENCE: "reference",
    h5t.ENUM: "enum",
    h5t.VLEN: "variable-length",
    h5t.ARRAY: "array type",
}


def type_of(kind: Any) -> tuple[DType | None, str]:
    """Return the type as stored (None unless bn reads it), and its name for people.

    Only what is laid out exactly as NumPy's own bool, integers and IEEE floats of 16, 32 or 64 bits counts: h5py would
    also read, say, a bfloat16 or a 24-bit integer, by converting it.
    """
    group, size = kind.get_class(), kind.get_size()
    if group == h5t.INTEGER:
        plain = size in (1, 2, 4, 8) and (kind.get_precision(), kind.get_offset()) == (8 * size, 0)
    elif group == h5t.FLOAT:
        plain = size in _IEEE and (kind.get_fields(), kind.get_ebias()) == _IEEE[size]
    elif group == h5t.ENUM:
        plain = _dtype(kind) == np.bool_
    else:
        return None, _odd_name(kind)
    if not plain or kind.dtype.kind not in REAL_KINDS:
        return None, _odd_name(kind)
    dtype = np.dtype(kind.dtype.str)  # without h5py's metadata
    return dtype, dtype.name if dtype.isnative else f"{'big' if dtype.str[0] == '>' else 'little'}-endian {dtype.name}"


def _dtype(kind: Any) -> DType | None:
    """Return the NumPy type that h5py reads a type as; None where there is none, as for HDF5's times and what holds them."""
    try:
        found: DType = kind.dtype
    except (TypeError, ValueError, NotImplementedError):
        return None
    return found


def _odd_name(kind: Any) -> str:
    group, bits = kind.get_class(), 8 * kind.get_size()
    if group == h5t.FLOAT:
        fields = kind.get_fields()
        return (
            "bfloat16"
            if bits == 16 and fields[2] == 8
            else f"float of {kind.get_precision()} bits, not IEEE 16, 32 or 64"
        )
    if group == h5t.INTEGER:
        return f"integer of {kind.get_precision()} bits in {bits}"
    if group == getattr(h5t, "COMPLEX", -2) or (group == h5t.COMPOUND and (_dtype(kind) or np.dtype("V1")).kind == "c"):
        return "complex"
    if group == h5t.VLEN:
        return "variable-length"
    return _CLASS_NAMES.get(group, f"HDF5 type class {group}")
