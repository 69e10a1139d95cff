"""Formats of data: what each can do, and the table of them.

A format is a class behind the contract `Format`, in a module (or folder) of its own, and a row of FORMATS. Other
packages add one under the entry point group `bncli.formats`:

    [project.entry-points."bncli.formats"]
    raster = "my_package:RasterFormat"
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bncli.errors import BnError, BnWarning, InputError, UsageError, printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bncli.formats.reading import ReadOptions
    from bncli.formats.source import Identity, Source

GROUP = "bncli.formats"


@dataclass(frozen=True)
class Listed:
    """One array of a file: the address to type, what it is, and why it cannot be fitted ("" when it can)."""

    address: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...] | None
    compression: str
    problem: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what does not apply, a problem too, is None."""
        return vars(self) | {"compression": self.compression or None, "problem": self.problem or None}


@dataclass(frozen=True)
class Output:
    """An array to write.

    Attributes
    ----------
    path : str
        An empty file to write to.
    shape, dtype
        Of the whole array.
    like : Source
        The input that it is made from, open: a format keeps what it can of it.
    max_memory : int
        Bytes of buffers.
    workers : int
        Threads that may compress.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    like: Source
    max_memory: int
    workers: int = 1


class Sink(Protocol):
    """Takes the values of one array front to back, in C order. Every method but `abandon` raises OSError when writing fails."""

    @property
    def dropped(self) -> list[str]:
        """What of `Output.like` refers to other objects of its file and was not kept: /path@attribute."""

    def write(self, values: npt.NDArray[Any]) -> None:
        """Append the next values, of shape (n,)."""

    def copy_others(self, source: Source) -> tuple[list[str], list[str]]:
        """Copy the other contents of the source's file; returns what was not copied and what was dropped, as paths."""

    def finish(self) -> None:
        """Close what is complete."""

    def abandon(self) -> None:
        """Let go after a failure; never raises."""


class Place(Protocol):
    """Takes runs of the values of one array in any order: plain values that can be pickled, for workers."""

    def write(self, runs: Iterable[tuple[int, npt.NDArray[Any]]], *, sync: bool) -> None:
        """Write values of shape (n,), each run from its position on; with `sync` to disk. Raises OSError."""


class Format:
    """What bn asks of a format. A child overrides what it can do; what is written here is what a simple format answers.

    Attributes
    ----------
    name : str
        In words, for messages: ".npy", "HDF5".
    suffixes : tuple of str
        In lower case, with the dot: which names of outputs ask for this format.
    several : bool
        Whether a file can hold several arrays, each with a name: FILE::name.
    stores : bool
        Whether an address can be a folder or a URL, rather than a regular file.
    library : str or None
        The package whose open arrays `address_of` takes.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    several = False
    stores = False
    library: str | None = None

    def knows(self, path: str) -> bool:
        """Whether this is a file of the format, by its content."""
        raise NotImplementedError

    def claims(self, path: str) -> bool:
        """Whether the format's own reader should say what is wrong with a file that no format knows."""
        return path.lower().endswith(self.suffixes) if self.suffixes else False

    def arrays(self, path: str) -> list[Listed]:
        """Every array of the file."""
        raise NotImplementedError

    def open(self, path: str, array: str | None, options: ReadOptions) -> Source:
        """Open the array of this name; None: the one of `options.dataset`, else the only one there is.

        Raises
        ------
        InputError
            When it is missing, unreadable or refused.
        UsageError
            When the file holds several and none is named.
        """
        raise NotImplementedError

    def create(self, output: Output) -> Sink:
        """Make a file of the format."""
        raise UsageError(
            f"{printable(output.path)}: bn does not write {self.name}; give an output that ends in {_suffixes()}"
        )

    def place(self, output: Output) -> Place | None:
        """Where workers write values of a file that `create` made; None: one process writes them, front to back."""
        return None

    def others(self, path: str, array: str) -> list[str]:
        """Names of the other arrays of a file."""
        return []

    def names(self, path: str, array: str) -> tuple[str, ...]:
        """Read a list of texts: feature names."""
        raise InputError(f"{printable(path)}: a {self.name} file holds no names; give a text file with one name a line")

    def address_of(self, array: Any) -> str | None:
        """The address of an open array of the format's own library; None for what is read like any other array."""
        return None

    def identity(self, path: str) -> Identity:
        """In what state a file is. What changes with every write to it."""
        from bncli.formats.source import Identity

        return Identity.of(os.stat(path))

    def versions(self) -> dict[str, str]:
        """The libraries behind the format, for `bn doctor`."""
        return {}

    def filters(self) -> dict[str, bool]:
        """Compressions, and whether each can be decoded here, for `bn doctor`."""
        return {}


def built_in() -> Iterator[Format]:
    """The formats of FORMATS, each loaded when it is asked."""
    for where in FORMATS.values():
        yield _loaded(where)


@functools.cache
def _loaded(where: str) -> Format:
    module, _, name = where.partition(":")
    return _instance(getattr(importlib.import_module(module), name))


def _instance(found: Format | type[Format]) -> Format:
    return found() if isinstance(found, type) else found


@functools.cache
def plugged_in() -> tuple[Format, ...]:
    """The formats of other packages; warns of those that cannot be loaded, naming their packages."""
    from importlib.metadata import entry_points

    found: list[Format] = []
    for entry in entry_points(group=GROUP):
        try:
            found.append(_instance(entry.load()))
        except Exception as error:  # another package's import may raise anything
            package = entry.dist.name if entry.dist else entry.value
            warnings.warn(
                f"the format {printable(entry.name)} of the package {printable(package)} cannot be loaded: "
                f"{printable(error) or type(error).__name__}; repair or uninstall {printable(package)}",
                BnWarning,
                stacklevel=2,
            )
    return tuple(found)


def formats() -> Iterator[Format]:
    """All formats; those of other packages, which take time to find, come last."""
    yield from built_in()
    yield from plugged_in()


def format_of(path: str) -> Format:
    """The format of a file, by its content.

    Raises
    ------
    InputError
        When the path is missing, not a regular file (or a store that a format reads), or of no known format.
    """
    from bncli.formats.source import RegularFile

    store = "://" in path or os.path.isdir(path)
    if not store:
        RegularFile(path).close()  # a FIFO or a missing file is refused before a library looks at it
    for known in formats():
        if not store or known.stores:
            with faults_named(known, path):
                if known.knows(path):
                    return known
    if store:
        RegularFile(path).close()  # which reports what it is instead of a file
    for known in formats():
        if known.claims(path):
            return known
    names = ", ".join(known.name for known in formats())
    raise InputError(f"{printable(path)}: of no format that bn reads ({names})")


@contextlib.contextmanager
def faults_named(known: Format, path: str) -> Iterator[None]:
    """Turn what another package raises, but for bn's own errors, into an InputError that names it and the file."""
    try:
        yield
    except BnError:
        raise
    except Exception as error:
        package = type(known).__module__.partition(".")[0]
        if package == __name__.partition(".")[0]:
            raise
        raise InputError(
            f"{printable(path)}: the format {known.name} of the package {package} failed: {type(error).__name__}: "
            f"{printable(error)}"
        ) from error


def _suffixes() -> str:
    """Suffixes of the formats of bn that can be written, in words."""
    written = [known.suffixes[0] for known in built_in() if type(known).create is not Format.create]
    return " or ".join(written)


def format_for(output: str) -> Format | None:
    """The format that an output's suffix asks for; None where it asks for none."""
    named = output.lower()
    return next((known for known in formats() if known.suffixes and named.endswith(known.suffixes)), None)


FORMATS = {"npy": "bncli.formats.npy:NpyFormat", "hdf5": "bncli.formats.hdf5.format:Hdf5Format"}
