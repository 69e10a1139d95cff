"""Turning what the user typed, FILE or FILE::/path/in/file, into a source."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from bncli.errors import InputError, printable
from bncli.formats import faults_named, format_of, formats
from bncli.formats.reading import ReadOptions
from bncli.formats.source import REAL_KINDS, Source, check_shape

SEPARATOR = "::"


def split(address: str) -> tuple[str, str | None]:
    """File and dataset path of an address; None where it names no dataset.

    >>> split("train.h5::/x"), split("train.npy")
    (('train.h5', '/x'), ('train.npy', None))
    """
    if SEPARATOR not in address or os.path.exists(address):
        return address, None
    ends = [match.start() for match in re.finditer(SEPARATOR, address)]
    end = next((end for end in ends if os.path.exists(address[:end])), ends[0])  # a file's name may hold "::"
    return address[:end], address[end + len(SEPARATOR) :]


def absolute(address: str) -> str:
    """The address from any working folder; a URL stays as it is.

    >>> absolute("s3://data/x.zarr"), absolute("/data/x.h5::/x")
    ('s3://data/x.zarr', '/data/x.h5::/x')
    """
    return address if "://" in address else os.path.join(os.getcwd(), address)


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts part-2 before part-10, and digits before letters."""
    return [(0, int(t), "") if t.isdecimal() else (1, 0, t) for t in re.split(r"(\d+)", text) if t]


def expand(addresses: Sequence[str]) -> list[str]:
    """Expand the globs that the shell left alone, in natural order; other addresses stay as they are.

    Raises
    ------
    InputError
        When a pattern matches no file.
    """
    expanded: list[str] = []
    for address in addresses:
        path, dataset = split(address)
        if not glob.has_magic(path) or os.path.exists(path):
            expanded.append(address)
            continue
        found = sorted(glob.glob(path), key=natural_key)
        if not found:
            raise InputError(f"{printable(path)}: no file matches this pattern")
        expanded += [file if dataset is None else file + SEPARATOR + dataset for file in found]
    return expanded


def open_source(address: str, options: ReadOptions) -> Source:
    """Open what an address names.

    Parameters
    ----------
    address : str
        FILE or FILE::/path.
    options : ReadOptions
        `dataset` is the array where the address names none.

    Raises
    ------
    InputError
        When the file or dataset is missing, unreadable or refused.
    UsageError
        When the file holds several datasets and none is named.
    """
    path, array = split(address)
    known = format_of(path)
    with faults_named(known, path):
        source = known.open(path, array, options)
        try:
            _check(source)
        except BaseException:
            source.close()
            raise
    return source


def _check(source: Source) -> None:
    """Refuse what a reader should not have opened, before a value is read."""
    where = printable(source.address)
    if source.dtype.kind not in REAL_KINDS or source.dtype.itemsize > 8 or not source.dtype.isnative:
        raise InputError(
            f"{where}: values of type {source.dtype} are refused; bn takes bool, integers and floats to 64 bits"
        )
    if len(source.shape) < 2:
        raise InputError(f"{where}: its reader gives the shape {source.shape}; one dimension is read as (N, 1)")
    check_shape(source.shape, where)


def address_of(array: object) -> str | None:
    """The address of an open array of a format's own library (an h5py dataset); None for every other object.

    Raises
    ------
    UsageError, InputError
        Where it is one, and its file cannot be opened by name.
    """
    library = type(array).__module__.partition(".")[0]
    if library in ("builtins", "numpy"):  # by far the most; no format is loaded for them
        return None
    return next((known.address_of(array) for known in formats() if known.library == library), None)
