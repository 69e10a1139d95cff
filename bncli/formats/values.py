"""Small arrays that belong to features: a gamma, a beta, names."""

from __future__ import annotations

import contextlib
import math

import numpy as np

from bncli.errors import InputError, MismatchError, UsageError, printable
from bncli.formats import format_of
from bncli.formats.address import SEPARATOR, open_source, split
from bncli.formats.reading import ReadOptions
from bncli.numerics.arrays import Floats
from bncli.system import atomic

NAMES_LIMIT = 256 << 20


def read_vector(address: str, features: int, name: str, budget: int) -> Floats:
    """One value per feature, of shape (C,), from FILE.npy or FILE.h5::/path.

    Raises
    ------
    MismatchError
        When the array does not hold `features` values. `name` is for the message.
    InputError, UsageError
        As `open_source`.
    """
    with open_source(address, ReadOptions(max_memory=budget)) as source:
        count = math.prod(source.shape)
        if count != features:
            raise MismatchError(
                f"--{name} {printable(address)}: holds {count} values, the data has {features} features"
            )
        values = np.empty(count, source.dtype)
        source.read(0, values)
        source.check_unchanged()
    return values.astype(np.float64)


def read_names(address: str) -> tuple[str, ...]:
    """Feature names: a text file with one name a line (UTF-8), or FILE.h5::/path of strings.

    Raises
    ------
    InputError
        When the file is missing, not text, or the dataset does not hold strings.
    UsageError
        For an HDF5 file without a path.
    """
    path, dataset = split(address)
    if dataset is not None:
        return format_of(path).names(path, dataset)
    content = atomic.read_bytes(path, NAMES_LIMIT)
    try:
        return _lines(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        pass
    with contextlib.suppress(InputError):
        if (known := format_of(path)).several:
            raise UsageError(
                f"--names {printable(path)}: an {known.name} file; say which dataset holds the names: "
                f"{printable(path)}{SEPARATOR}/names"
            )
    raise InputError(f"--names {printable(path)}: not a text file in UTF-8 with one name a line")


def _lines(text: str) -> tuple[str, ...]:
    """Lines as a text editor shows them; `splitlines` would also cut at characters that a name may hold."""
    return tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")) if text else ()
