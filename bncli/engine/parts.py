"""What a pass over the data accumulates: parts, each computed from the batches of a segment and merged in order.

To add a part, write a class and add a line to PARTS: workers then compute it, and it is merged and saved in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from bncli.engine.plan import Segment
from bncli.formats.dataset import DataSet
from bncli.numerics.arrays import Array
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Layout
from bncli.numerics.moments import Moments, Running
from bncli.numerics.moments import Parts as Record
from bncli.stats.container import Value
from bncli.stats.conventions import Conventions

if TYPE_CHECKING:
    from typing_extensions import Self

EXACT_INTEGERS = 2**53  # float64 holds every integer up to here
AT_ONCE = 1 << 20  # values per read
ROUNDED = "integers beyond 2^53 were rounded to float64"


@dataclass(frozen=True)
class Batches:
    """The consecutive batches of a segment, as a worker read them: every part is computed from them.

    Attributes
    ----------
    data : DataSet
    layout : Layout
    segment : Segment
    missing : Missing
    conventions : Conventions
    moments : Moments of shape (B, C)
    marked : tuple of int
        Number of values that each mark of the data set declares missing (a fill value, or outside a valid range).
    """

    data: DataSet
    layout: Layout
    segment: Segment
    missing: Missing
    conventions: Conventions
    moments: Moments
    marked: tuple[int, ...] = ()

    @cached_property
    def population(self) -> Moments:
        """Moments of shape (C,) of all batches together."""
        return self.moments.reduce()

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return self.segment.batches * self.segment.samples

    def values(self) -> Iterator[tuple[int, Array]]:
        """Read the stored values again, in pieces: (position of the first, values of shape (n,)).

        Missing values are included. The next piece overwrites the last.
        """
        size = self.layout.sample_size
        start, stop = self.segment.first * size, (self.segment.first + self.samples) * size
        for first in range(start, stop, AT_ONCE):
            yield first, self.data.read(first, min(AT_ONCE, stop - first))

    def features(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the features of the values at these positions."""
        found: npt.NDArray[np.int64] = positions % self.layout.row_size // self.layout.positions
        return found


class Part:
    """Base class of parts. A part is a frozen dataclass of arrays, records of arrays, and plain numbers.

    Subclasses define `empty`, `of` and `merge`; how a part is stored follows from its fields.

    Attributes
    ----------
    EACH_EPOCH : bool
        Whether learning continues the part in every epoch, although each draws the same samples again. Parts that
        describe the values are accumulated in the first epoch only.
    """

    EACH_EPOCH: ClassVar[bool] = False

    @classmethod
    def empty(cls, features: int) -> Self:
        """Return the identity of `merge` for C features; by default, the part with the defaults of its fields."""
        return cls()

    @classmethod
    def of(cls, batches: Batches) -> Self:
        """Compute the part of consecutive batches."""
        raise NotImplementedError

    def merge(self, later: Self, momentum: float | None) -> Self:
        """Combine with the part of the batches that follow."""
        raise NotImplementedError

    def arrays(self) -> dict[str, Array]:
        """Return all arrays by name, including those inside records."""
        found: dict[str, Array] = {}
        for name, value in vars(self).items():
            if isinstance(value, Record):
                found |= {f.name: getattr(value, f.name) for f in fields(value)}  # type: ignore[arg-type]
            elif isinstance(value, np.ndarray):
                found[name] = value
        return found

    def attributes(self) -> dict[str, Value]:
        """Return plain numbers by name."""
        return {name: int(value) for name, value in vars(self).items() if isinstance(value, int)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array], attributes: Mapping[str, Any], features: int) -> Self:
        """Restore what `arrays` and `attributes` returned, for C features.

        Raises
        ------
        LookupError, TypeError, ValueError
            When something is missing, or of another shape or type.
        """
        empty = cls.empty(features)
        for name, array in empty.arrays().items():
            if (arrays[name].shape, arrays[name].dtype) != (array.shape, array.dtype):
                raise ValueError(name)
        values: dict[str, Any] = {}
        for name, value in vars(empty).items():
            if isinstance(value, Record):
                values[name] = type(value)(**{f.name: arrays[f.name] for f in fields(value)})  # type: ignore[arg-type]
            else:
                values[name] = arrays[name] if isinstance(value, np.ndarray) else type(value)(attributes[name])
        return cls(**values)


@dataclass(frozen=True)
class Population(Part):
    """Count, mean and m2 of every value.

    Attributes
    ----------
    moments : Moments of shape (C,)
    """

    moments: Moments

    @classmethod
    def empty(cls, features: int) -> Population:
        """No values yet."""
        return cls(Moments.empty(features))

    @classmethod
    def of(cls, batches: Batches) -> Population:
        """See `Part.of`."""
        return cls(batches.population)

    def merge(self, later: Population, momentum: float | None) -> Population:
        """See `Part.merge`."""
        return Population(self.moments.merge(later.moments))


@dataclass(frozen=True)
class Recurrence(Part):
    """The running statistics, and how many batches were folded.

    Attributes
    ----------
    running : Running
    batches : int
        Batches folded: those in which some feature has two values.
    left_out : int
        The other batches.
    """

    EACH_EPOCH = True
    running: Running
    batches: int = 0
    left_out: int = 0

    @classmethod
    def empty(cls, features: int) -> Recurrence:
        """No values yet."""
        return cls(Running.empty(features))

    @classmethod
    def of(cls, batches: Batches) -> Recurrence:
        """See `Part.of`."""
        moments, conventions = batches.moments, batches.conventions
        folded = int((moments.count >= 2).any(axis=1).sum())
        running = Running.of_batches(moments, conventions.ddof, conventions.momentum)
        return cls(running, folded, len(moments.count) - folded)

    def merge(self, later: Recurrence, momentum: float | None) -> Recurrence:
        """See `Part.merge`."""
        running = self.running.merge(later.running, momentum)
        return Recurrence(running, self.batches + later.batches, self.left_out + later.left_out)


@dataclass(frozen=True)
class Samples(Part):
    """Number of samples read."""

    samples: int = 0

    @classmethod
    def of(cls, batches: Batches) -> Samples:
        """See `Part.of`."""
        return cls(batches.samples)

    def merge(self, later: Samples, momentum: float | None) -> Samples:
        """See `Part.merge`."""
        return Samples(self.samples + later.samples)


@dataclass(frozen=True)
class Rounded(Part):
    """Whether the data holds integers beyond 2^53, which float64 rounds."""

    rounded: bool = False

    @classmethod
    def of(cls, batches: Batches) -> Rounded:
        """See `Part.of`."""
        if not any(i.dtype.kind in "iu" and i.dtype.itemsize == 8 for i in batches.data.inputs):
            return cls()
        with np.errstate(invalid="ignore"):
            reach = np.abs(batches.population.mean) + np.sqrt(batches.population.m2)  # no value is farther from 0
        if not (reach >= EXACT_INTEGERS).any():  # so the values need not be read again
            return cls()
        found = (
            max(int(values.max()), -int(values.min())) for _, values in batches.values()
        )  # before they are rounded
        return cls(any(largest > EXACT_INTEGERS for largest in found))

    def merge(self, later: Rounded, momentum: float | None) -> Rounded:
        """See `Part.merge`."""
        return Rounded(self.rounded or later.rounded)


@dataclass(frozen=True)
class Marked(Part):
    """For each mark of the data set, the number of values that it declares missing but that were taken for data."""

    marked: tuple[int, ...] = ()

    @classmethod
    def of(cls, batches: Batches) -> Marked:
        """See `Part.of`."""
        return cls(batches.marked)

    def merge(self, later: Marked, momentum: float | None) -> Marked:
        """See `Part.merge`."""
        return Marked(tuple(map(sum, zip_longest(self.marked, later.marked, fillvalue=0))))

    def attributes(self) -> dict[str, Value]:
        """See `Part.attributes`."""
        return {"marked": self.marked} if self.marked else {}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array], attributes: Mapping[str, Any], features: int) -> Marked:
        """See `Part.of_arrays`."""
        return cls(tuple(map(int, attributes.get("marked", ()))))


PARTS: dict[str, type[Part]] = {
    "population": Population,
    "running": Recurrence,
    "samples": Samples,
    "rounded": Rounded,
    "marked": Marked,
}
