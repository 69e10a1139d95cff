"""Array types, and conversion of array-likes to NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError

Array = npt.NDArray[Any]  # any type
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
DType = np.dtype[Any]

BFLOAT16 = ("bfloat16", "torch.bfloat16")  # its name in ml_dtypes (JAX) and in PyTorch; NumPy has no such type


def to_array(values: Any, what: str = "the array") -> Array:
    """Convert values to a NumPy array, without a copy if possible.

    PyTorch tensors may require a gradient. bfloat16 becomes float32, which represents all its values.

    Parameters
    ----------
    values : array_like
    what : str
        Name of the values in error messages.

    Raises
    ------
    InputError
        When NumPy cannot convert the values, or they are a masked array, since its mask would be lost.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise InputError(
            "masked arrays are not supported; fill it with NaN (x.filled(np.nan)) and skip NaN in fit with nan='omit'"
        )
    try:
        for step in ("detach", "resolve_conj", "resolve_neg"):  # such as a tensor that is a negated or conjugated view
            values = getattr(values, step)() if hasattr(values, step) else values
        if str(getattr(values, "dtype", "")) in BFLOAT16:
            values = values.float() if hasattr(values, "float") else values.astype(np.float32)
        return np.asarray(values)
    except MemoryError:
        raise
    except Exception as error:  # the __array__ method of an object may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{what}: a {type(values).__name__} cannot be converted to an array of numbers ({reason}); give a NumPy array, "
            "or rows of equal length"
        ) from None
