"""What a framework's file exchanges with the driver: `encode(stats, options) -> Encoded`, `decode(content) -> Layers`.

A framework is one module with one or both of these verbs. It works on bytes and values: the driver in
`bncli.exchange` checks paths, chooses the layer and the statistics, makes a Stats, and writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from bncli.errors import InputError, printable, reason_of
from bncli.system import atomic

Momentum = float | Literal["none"] | None  # as an option: None is not given


@dataclass(frozen=True)
class Content:
    """A file that is read: whole, or by a library that opens a path.

    Attributes
    ----------
    name : str
        As it was given.
    limit : int
        Maximum size in bytes where it is read whole.
    """

    name: str
    limit: int

    @cached_property
    def data(self) -> bytes:
        """Its bytes. Raises InputError when it is missing, unreadable or larger than the limit."""
        return atomic.read_bytes(self.name, self.limit)

    @property
    def path(self) -> str:
        """Its path. Raises InputError when it is missing, not a regular file, or cannot be opened."""
        if not os.path.isfile(self.name):
            what = "is not a regular file" if os.path.exists(self.name) else "no such file"
            raise InputError(f"{self}: {what}")
        if not os.access(self.name, os.R_OK):
            raise InputError(f"{self}: cannot be read: no permission")
        return self.name

    @contextlib.contextmanager
    def reading(self, kind: str, *errors: type[Exception]) -> Iterator[None]:
        """Turn the errors that damaged or hostile bytes cause into an InputError: not a readable `kind`."""
        try:
            yield
        except errors as error:
            raise self.unreadable(kind, error) from None

    def unreadable(self, kind: str, error: object) -> InputError:
        """The error for a file that its own library does not read; the library's words are cut to one sentence."""
        reason = printable(" ".join(reason_of(error).split()).split(". ")[0])[:200]
        return InputError(f"{self}: not a readable {kind}: {reason or type(error).__name__}; write or copy it again")

    def __str__(self) -> str:
        return printable(self.name)


@dataclass(frozen=True)
class Layer:
    """The numbers of one layer, as the file holds them.

    Attributes
    ----------
    columns : name -> array of shape (C,)
        running_mean and running_var; gamma, beta, count, population_mean and population_var where the file has them.
    held : name -> value
        Conventions that the file holds: momentum, eps, ddof, init, axis, and counts of samples and batches.
    names : feature names, or None
    sources : provenance that the file carries
    checksum : str or None
        The checksum that the file bears, of columns, conventions and names.
    tracked : int or None
        Number of batches that the layer counted.
    """

    columns: Mapping[str, Any]
    held: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[Any] | None = None
    sources: Sequence[dict[str, Any]] = ()
    checksum: str | None = None
    tracked: int | None = None


def _any(_: str | None) -> None:
    """Accept whatever layer is asked for."""


@dataclass(frozen=True)
class Layers:
    """The batch-normalization layers of a file, to list and to read one by one.

    Attributes
    ----------
    sizes : name -> number of features
    read : function
        Reads the layer of a name.
    also : name -> other names
        By which a layer can be asked for too.
    what : str
        What makes a layer, for the message when there is none.
    likely : str or None
        The layer used when none is named; None: the only one.
    check : function
        Raises an error for a layer that was asked for (None: none was) and cannot be read.
    keeps_asked : bool
        Whether the name that was asked for is recorded instead of the layer's own.
    """

    sizes: Mapping[str, int]
    read: Callable[[str], Layer]
    also: Mapping[str, Collection[str]] = field(default_factory=dict)
    what: str = ""
    likely: str | None = None
    check: Callable[[str | None], None] = _any
    keeps_asked: bool = False

    @classmethod
    def single(cls, layer: Layer) -> Layers:
        """Of a format whose files hold one layer, without a name."""
        return cls({"": len(layer.columns["running_mean"])}, lambda _: layer)

    def recorded(self, name: str, asked: str | None) -> str | None:
        """The name under which a layer is recorded; None where it has none."""
        by = self.also.get(name, ())
        if self.keeps_asked and asked and any(n == asked or n.endswith(f"/{asked}") for n in by):
            return asked
        return name or None


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked for; a format declares which of these it takes besides `use`.

    Attributes
    ----------
    output : str
        The path that is written, for formats whose suffix selects the container.
    use : "running" or "population"
    rank : int or None
        Dimensions of a model's input.
    into : Content or None
        A file that the statistics are put into.
    layer : str or None
        A layer of `into`.
    transposed : bool or None
        Whether that layer is a transposed convolution.
    """

    output: str
    use: str = "running"
    rank: int | None = None
    into: Content | None = None
    layer: str | None = None
    transposed: bool | None = None


@dataclass(frozen=True)
class Encoded:
    """A file's bytes, the settings in the framework's own words, and notes on what the file cannot hold."""

    content: bytes
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Exported:
    """What was written, and what a person has to know on the other side.

    Attributes
    ----------
    format, output, use : str
    num_features : int
    settings : dict
        eps, momentum and the like, in the framework's own words and on its own side.
    notes : list of str
        Sentences: what to set, what the file does not hold, how values were rounded.
    """

    format: str
    output: str
    use: str
    num_features: int
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
