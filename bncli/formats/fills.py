"""Values that a dataset declares not to be data: its fill values, and values outside its valid range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bncli.errors import printable
from bncli.numerics.arrays import Array, Bools, DType
from bncli.numerics.kernels import Missing, present

if TYPE_CHECKING:
    from bncli.formats.dataset import DataSet

Number = float | int
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Mark:
    """Values that a dataset declares not to be data.

    Attributes
    ----------
    name : str
        What declares them, in words: an attribute's name.
    text : str
        The fill value as it is typed, or the range.
    fill : number or None
        Values equal to it; it is a value of the dataset's type. None: values outside `low` to `high`.
    low, high : number or None
        None is without end.
    """

    name: str
    text: str
    fill: Number | None = None
    low: Number | None = None
    high: Number | None = None

    @classmethod
    def of_fill(cls, name: str, value: Number, dtype: DType) -> Mark | None:
        """Mark a fill value, declared in any type; None for NaN (`--nan` is for those), and where `dtype` cannot hold it."""
        fill = fill_in(dtype, value)
        if fill is None or not math.isfinite(fill):
            return None
        text = (
            str(int(fill)) if dtype.kind == "b" else str(dtype.type(fill)).removesuffix(".0")
        )  # as the option takes it
        return cls(name, text, fill)

    def hits(self, values: Array) -> Bools:
        """Tell which values these are; NaN and infinities are none of them."""
        if self.fill is not None:
            equal: Bools = np.equal(values, self.fill)
            return equal
        found: Bools = np.zeros(values.shape, bool)
        with np.errstate(over="ignore"):  # an end that the values' type cannot hold is infinite to them
            if self.low is not None:
                found |= values < self.low
            if self.high is not None:
                found |= values > self.high
        found &= np.isfinite(values)
        return found


class Tally:
    """Reads from a data set, and counts how many values are marked per input: each value once.

    Attributes
    ----------
    counts : list of int
        One for each of the data set's marks. What the option's fill value leaves out is not counted.
    """

    def __init__(self, data: DataSet) -> None:
        self._data, self.counts = data, [0] * len(data.marks)

    def read(self, first: int, count: int) -> Array:
        """Return what the data set's `read` does; its values are counted."""
        values = self._data.read(first, count)
        self.add(values, first)
        return values

    def add(self, values: Array, first: int) -> None:
        """Count among values, of shape (n,), that begin at position `first`."""
        data, seen = self._data, None
        for number, mark in enumerate(data.marks):
            found = mark.hits(values)
            if not found.any():  # nearly always, and then nothing else costs
                continue
            if seen is None:
                seen = ~present(values, Missing(False, data.fill))
            places = np.flatnonzero(found & ~seen)
            if places.size and not all(mark in i.marks for i in data.inputs):
                marked = np.array([mark in i.marks for i in data.inputs])
                places = places[marked[data.inputs_of((first + places) // data.sample_size)]]
            seen[places] = True
            self.counts[number] += places.size


def remarks(data: DataSet, counts: Sequence[int], *, fill: Number | None, verb: str = "fit") -> list[str]:
    """Warn of marked values that were taken for data, with what to do; nothing where there were none.

    Parameters
    ----------
    data : DataSet
    counts : sequence of int
        Of its marks; empty for none.
    fill : number or None
        The option's.
    verb : "fit", "learn" or "apply"
    """
    found = [(mark, count) for mark, count in zip(data.marks, counts, strict=False) if count]
    fills = sorted((pair for pair in found if pair[0].fill is not None), key=lambda pair: -pair[1])
    texts = []
    if fills:
        by_place: dict[str, list[str]] = {}
        for mark, count in fills:
            by_place.setdefault(_where(data, mark), []).append(f"{_values(count)} {mark.text} ({mark.name})")
        listed = ", ".join(f"{place}: {' and '.join(words)}" for place, words in by_place.items())
        texts.append(f"{listed} {_taken(fills)}; {_remedy(data, fills, fill, verb)}")
    copy = "" if data.dtype.kind == "f" else "in a copy of type float "
    how = {"fit": f"{copy}make them NaN and give --nan omit", "learn": "leave those samples out"}
    how["apply"] = f"{copy}make them NaN"
    for mark, count in found:
        if mark.fill is None:
            counted = f"{count:,} value{' is' if count == 1 else 's are'} outside {mark.text} ({mark.name})"
            texts.append(f"{_where(data, mark)}: {counted} {_taken([(mark, count)])}; where they are none, {how[verb]}")
    return texts


def _remedy(data: DataSet, fills: list[tuple[Mark, int]], fill: Number | None, verb: str) -> str:
    """What to do: the option takes one value, however many are declared."""
    if verb == "learn":
        return "learning needs every value: leave out samples that hold one"
    kept, option = fills[0][0].text, "--fill-value"
    if len(fills) == 1 and fill is None:
        return f"leave them out with {option} {kept}" if verb == "fit" else f"{option} {kept} makes them NaN"
    if fill is not None:
        kept = str(fill).removesuffix(".0")
    others = " and ".join(mark.text for mark, _ in fills if mark.text != kept)
    nan = f", or make them all NaN{' and give --nan omit' * (verb == 'fit')}" * (data.dtype.kind == "f")
    return f"{option} takes one value: in a copy of the data write {kept} for {others} and give {option} {kept}{nan}"


def _where(data: DataSet, mark: Mark) -> str:
    addresses = [i.address for i in data.inputs if mark in i.marks]
    more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
    return printable(addresses[0]) + more


def _values(count: int) -> str:
    return "1 value equals" if count == 1 else f"{count:,} values equal"


def _taken(found: list[tuple[Mark, int]]) -> str:
    return "and was taken for data" if sum(count for _, count in found) == 1 else "and were taken for data"


def fill_in(dtype: DType, fill: Number) -> Number | None:
    """The fill value as a value of `dtype`; None where the type cannot hold it.

    Floats take the nearest value (0.1 in a float32 array is float32(0.1)); integers only a whole number in range.
    """
    if isinstance(fill, float) and not math.isfinite(fill):
        return fill if dtype.kind == "f" else None
    if dtype.kind == "f":
        try:
            with np.errstate(over="ignore"):
                nearest = float(dtype.type(fill))
        except OverflowError:  # a whole number beyond float64
            return None
        return nearest if math.isfinite(nearest) else None
    if (dtype.kind == "b" and fill not in (0, 1)) or int(fill) != fill:
        return None
    whole = int(fill)
    if dtype.kind == "b":
        return whole
    limits = np.iinfo(dtype)
    return whole if limits.min <= whole <= limits.max else None
