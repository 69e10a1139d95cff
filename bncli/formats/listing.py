"""What a file holds, for `bn ls`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bncli.formats.address import SEPARATOR, kind_of, split
from bncli.formats.npy import NpySource
from bncli.formats.source import RegularFile


@dataclass(frozen=True)
class Listed:
    """One array: the address to type, what it is, and why it cannot be fitted ("" when it can)."""

    address: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...] | None
    compression: str
    problem: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what there is not, a problem too, is None."""
        return vars(self) | {"compression": self.compression or None, "problem": self.problem or None}


def listing(address: str) -> list[Listed]:
    """Every array of a .npy or HDF5 file.

    Raises
    ------
    InputError
        When the file is missing, unreadable, or of another kind.
    """
    path, _ = split(address)
    RegularFile(path).close()
    if kind_of(path) == "npy":
        with NpySource(path, budget=1 << 20) as source:
            order = "Fortran order" if source.fortran else ""
            return [Listed(path, source.file_shape, source.dtype.name, None, order, "")]
    from bncli.formats.hdf5.source import list_datasets

    return [
        Listed(f"{path}{SEPARATOR}{d.path}", d.shape, d.dtype, d.chunks, d.compression, d.problem)
        for d in list_datasets(path)
    ]
