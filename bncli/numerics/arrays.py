"""What people hand over as an array, as a NumPy array or an error that says why not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError

BFLOAT16 = ("bfloat16", "torch.bfloat16")  # as ml_dtypes (JAX) and PyTorch name it; NumPy has no such type


def to_array(values: Any, what: str = "the array") -> npt.NDArray[Any]:
    """Values as a NumPy array, without a copy where there need be none.

    A PyTorch tensor is read whether or not it requires a gradient; bfloat16 becomes float32, which holds all its values.

    Parameters
    ----------
    values : array, nested lists of numbers, or anything that NumPy makes an array of
    what : str
        What the message calls them.

    Raises
    ------
    InputError
        When they do not make an array, or are a masked array, whose mask would be lost.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise InputError(
            "a masked array is refused; fill it with NaN (x.filled(np.nan)), and leave those out of a fit with nan='omit'"
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
            f"{what}: a {type(values).__name__} does not make an array of numbers ({reason}); give a NumPy array, or rows "
            "of equal length"
        ) from None
