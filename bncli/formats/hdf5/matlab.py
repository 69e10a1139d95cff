"""What MATLAB and Octave mean by an attribute."""

from __future__ import annotations

import math

import numpy as np
from h5py import h5a, h5d, h5t


def mark_of_empty(item: h5d.DatasetID) -> str:
    """Return the attribute by which MATLAB or Octave marks a dataset that holds the shape of an empty array; "" without."""
    for name in (b"MATLAB_empty", b"OCTAVE_EMPTY_MATRIX"):
        if h5a.exists(item, name):
            attribute = h5a.open(item, name)
            kind = attribute.get_type()
            if kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.ENUM) and math.prod(attribute.shape) == 1:
                value = np.zeros(attribute.shape, f"V{kind.get_size()}")
                attribute.read(value, kind)  # in its own type: only 0 has no bits
                return name.decode() if any(value.tobytes()) else ""
    return ""
