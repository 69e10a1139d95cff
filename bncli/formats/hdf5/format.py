"""HDF5 behind the contract of formats: netCDF-4, MATLAB v7.3, PyTables and .h5ad files are HDF5 too."""

from __future__ import annotations

import os
from typing import Any

import h5py
from h5py import h5d, h5g, h5t

from bncli.errors import InputError, UsageError, printable
from bncli.formats import Format, Listed, Output
from bncli.formats.address import SEPARATOR
from bncli.formats.hdf5.file import STRING_LIMIT, address_of, hdf5_errors, open_file
from bncli.formats.hdf5.layouts import check_strings
from bncli.formats.hdf5.sink import Hdf5Sink
from bncli.formats.hdf5.source import Hdf5Source
from bncli.formats.hdf5.vetting import (
    UNREADABLE,
    available_filters,
    choose_dataset,
    describe,
    filters_of,
    identity,
    is_hdf5,
    list_datasets,
    missing_filter,
    open_dataset,
    storage_problem,
    versions,
    walk,
)
from bncli.formats.reading import ReadOptions

UNNAMED = "/data"  # where an array without a name goes


class Hdf5Format(Format):
    """Datasets, each with a path."""

    name, suffixes, several, library = "HDF5", (".h5", ".hdf5", ".hdf"), True, "h5py"

    def knows(self, path: str) -> bool:
        """By the file's signature, also behind a user block."""
        return is_hdf5(path)

    def claims(self, path: str) -> bool:
        """Refuse a file that is named as HDF5 and is not."""
        if os.path.splitext(path)[1].lower() in self.suffixes:
            raise InputError(f"{printable(path)}: not an HDF5 file, or cut short: it has no HDF5 signature")
        return False

    def arrays(self, path: str) -> list[Listed]:
        """Every dataset that hard links lead to."""
        return [
            Listed(f"{path}{SEPARATOR}{d.path}", d.shape, d.dtype, d.chunks, d.compression, d.problem)
            for d in list_datasets(path)
        ]

    def open(self, path: str, array: str | None, options: ReadOptions) -> Hdf5Source:
        """Open a dataset; see `Format.open`."""
        chosen, passed_over = (array if array is not None else options.dataset), 0
        if not chosen:
            chosen, passed_over = choose_dataset(path)
        source = Hdf5Source(path, chosen, options)
        source.passed_over = passed_over
        return source

    def create(self, output: Output) -> Hdf5Sink:
        """Make a file with one dataset, like an HDF5 dataset where the input is one."""
        like = output.like if isinstance(output.like, Hdf5Source) else None
        return Hdf5Sink(
            output.path,
            output.like.array_name or UNNAMED,
            output.shape,
            output.dtype,
            like=like,
            budget=output.max_memory,
            workers=output.workers,
        )

    def others(self, path: str, array: str) -> list[str]:
        """Paths of the other datasets."""
        return other_datasets(path, array)

    def names(self, path: str, array: str) -> tuple[str, ...]:
        """Read a dataset of strings; see `read_strings`."""
        return read_strings(path, array)

    def address_of(self, array: Any) -> str | None:
        """The address of an open h5py dataset; see `file.address_of`."""
        if isinstance(array, h5py.Group):  # a File is one
            kind = type(array).__name__
            raise UsageError(f"cannot fit an h5py {kind}; give one of its datasets, such as file['x']")
        return address_of(array) if isinstance(array, h5py.Dataset) else None

    def versions(self) -> dict[str, str]:
        """Of h5py and HDF5."""
        return versions()

    def filters(self) -> dict[str, bool]:
        """Those that this HDF5 library can decode."""
        return available_filters()


def other_datasets(path: str, dataset: str) -> list[str]:
    """Return the paths of the datasets of a file other than this one."""
    with hdf5_errors(printable(path), UNREADABLE), open_file(path) as (file, _):
        main = identity(open_dataset(file, path, dataset))
        found = list(walk(h5g.open(file.id, b"/"), printable(path)))
        return [
            at
            for at, item, first in found
            if at == first and isinstance(item, h5d.DatasetID) and identity(item) != main
        ]


def read_strings(path: str, dataset: str) -> tuple[str, ...]:
    """Read a one-dimensional dataset of strings, of fixed or variable length, as UTF-8.

    Raises
    ------
    InputError
        When it is missing or something else.
    """
    where = f"{printable(path)}::{printable(dataset)}"
    with hdf5_errors(where, UNREADABLE), open_file(path) as (file, checked):
        item = open_dataset(file, path, dataset)
        info = describe(item, dataset, where)
        kind = item.get_type()
        if kind.get_class() != h5t.STRING or len(info.shape) != 1:
            raise InputError(f"{where}: holds {info.dtype} of shape {info.shape}; a list of strings is needed")
        if storage_problem(item) or (missing := missing_filter(filters_of(item))):
            raise InputError(f"{where}: {storage_problem(item) or missing}")
        size, stored = info.shape[0] * kind.get_size(), item.get_storage_size()
        # HDF5 would look for every string that the shape claims, which takes minutes where they are not there
        if size > STRING_LIMIT or (stored < size if info.chunks is None else bool(size) > bool(stored)):
            raise InputError(f"{where}: {info.shape[0]} strings are too many, or were never written")
        with hdf5_errors(where, "cannot be read as UTF-8 strings"):
            check_strings(item, checked, where, STRING_LIMIT)
            values = h5py.Dataset(item)[:]
            pad = " " if not kind.is_variable_str() and kind.get_strpad() == h5t.STR_SPACEPAD else ""
            return tuple(v.decode("utf-8").rstrip(pad) if pad else v.decode("utf-8") for v in values.tolist())
