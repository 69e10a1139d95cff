"""An array in memory, read as a file would be."""

from __future__ import annotations

from typing import Any

import numpy as np

from bncli.errors import InputError
from bncli.formats.source import REAL_KINDS, Source, check_shape
from bncli.numerics.arrays import Array, to_array


class ArraySource(Source):
    """A NumPy array (or what becomes one) as a source; it is not copied unless it has to be turned into C order.

    Raises
    ------
    InputError
        For an array of another type than bool, integers or floats up to 64 bits, or without samples or features.
    """

    def __init__(self, values: Any) -> None:
        array = to_array(values)
        self.address = "array"
        self.notes = []
        if array.dtype.kind not in REAL_KINDS or array.dtype.itemsize > 8:
            raise InputError(
                f"an array of type {array.dtype} is refused; bn takes bool, integers and float16, 32 and 64"
            )
        self.shape, self.file_shape = check_shape(array.shape, "array"), array.shape
        self.dtype = array.dtype.newbyteorder("=")
        self.array = array
        self._flat = np.ascontiguousarray(array).reshape(-1)

    def read(self, first: int, out: Array) -> None:
        """Fill `out` with the values from position `first` on; see `Source.read`."""
        out[...] = self._flat[first : first + len(out)]
