"""Turning what the user typed, FILE or FILE::/path/in/file, into a source."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from bncli.errors import InputError, printable
from bncli.formats.npy import NpySource, is_npy
from bncli.formats.source import RegularFile, Source

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


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key that puts part-2 before part-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text) if part]


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


def open_source(
    address: str,
    *,
    dataset: str | None = None,
    budget: int,
    share: int = 1,
    allow_unwritten: bool = False,
    allow_virtual: bool = False,
) -> Source:
    """Open what an address names.

    Parameters
    ----------
    address : str
        FILE or FILE::/path.
    dataset : str, optional
        The dataset where the address names none.
    budget : int
        Bytes of buffers that the reader may hold.
    share : int
        How many such budgets make up --max-memory, for messages.
    allow_unwritten : bool
        Read chunks that were never written as the fill value.
    allow_virtual : bool
        Read a virtual dataset from its sources.

    Raises
    ------
    InputError
        When the file or dataset is missing, unreadable or refused.
    UsageError
        When the file holds several datasets and none is named.
    """
    path, named = split(address)
    RegularFile(path).close()  # a folder, FIFO or missing file is refused before a library looks at it
    if kind_of(path) == "npy":
        if named is not None:
            raise InputError(
                f"{printable(path)}: a .npy file holds one array without a name; leave out {SEPARATOR}{printable(named)}"
            )
        return NpySource(path, budget=budget, share=share)
    from bncli.formats.hdf5 import source as hdf5

    chosen, passed_over = (named if named is not None else dataset), 0
    if not chosen:
        chosen, passed_over = hdf5.choose_dataset(path)
    source = hdf5.Hdf5Source(
        path, chosen, budget=budget, share=share, allow_unwritten=allow_unwritten, allow_virtual=allow_virtual
    )
    source.passed_over = passed_over
    return source


def kind_of(path: str) -> str:
    """ "npy" or "hdf5", by content.

    Raises
    ------
    InputError
        When the file is neither.
    """
    if is_npy(path) or path.endswith(".npy"):  # a broken .npy file is told in the words of its own reader
        return "npy"
    from bncli.formats.hdf5 import source as hdf5

    if hdf5.is_hdf5(path):
        return "hdf5"
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".h5", ".hdf5", ".hdf"):
        raise InputError(f"{printable(path)}: not an HDF5 file, or cut short: it has no HDF5 signature")
    raise InputError(f"{printable(path)}: neither a .npy nor an HDF5 file")
