"""The types of arrays, and conversion to one of what a caller gives as an array."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError

Array = npt.NDArray[Any]  # of any type
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
DType = np.dtype[Any]

BFLOAT16 = ("bfloat16", "torch.bfloat16")  # as ml_dtypes (JAX) and PyTorch name it; NumPy has no such type


def to_array(values: Any, what: str = "the array") -> Array:
    """Values as a NumPy array, without a copy where possible.

    A PyTorch tensor is read whether or not it requires a gradient; bfloat16 becomes float32, which holds all its values.

    Parameters
    ----------
    values : array, nested lists of numbers, or anything that NumPy makes an array of
    what : str
        Their name in an error message.

    Raises
    ------
    InputError
        When NumPy cannot convert them, or they are a masked array, whose mask would be lost.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise InputError(
            "masked arrays are not supported; fill it with NaN (x.filled(np.nan)), and have fit skip those with nan='omit'"
        )
    try:
        for step in ("detach", "resolve_conj", "resolve_neg"):  # a tensor that is a view in another sign, say
            values = getattr(values, step)() if hasattr(values, step) else values
        if str(getattr(values, "dtype", "")) in BFLOAT16:
            values = values.float() if hasattr(values, "float") else values.astype(np.float32)
        return np.asarray(values)
    except MemoryError:
        raise
    except Exception as error:  # whatever the object's own __array__ raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{what}: a {type(values).__name__} cannot be converted to an array of numbers ({reason}); give a NumPy array, "
            "or rows of equal length"
        ) from None
