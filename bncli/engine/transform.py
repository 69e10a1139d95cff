"""What the workers of `apply` do: read a run of values, normalize it, round it, and count special values."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bncli.engine.executors.worker import check_wanted
from bncli.formats import Place
from bncli.formats.dataset import Joined
from bncli.formats.fills import Tally
from bncli.numerics.arrays import Array, DType, Floats
from bncli.numerics.batchnorm import Affine, overflowed
from bncli.numerics.kernels import Missing, present
from bncli.numerics.layout import Layout
from bncli.system import atomic

Run = tuple[int, int]  # first value, and how many
Counts = tuple[Counter[str], Counter[int]]  # as in `Applied`; of each mark
Transformed = tuple[Array, Counter[str], Counter[int]]  # values and `Counts`


class Transform:
    """Normalizes a run of values (or inverts that), rounds to the output's type, and counts special values.

    Parameters
    ----------
    affine : Affine of shape (C, 1)
    layout : Layout
    dtype : numpy.dtype
        Of the output.
    constant : int array
        Features that were constant in the fitted data, ascending.
    only : array of the shape of `constant`
        Their only values.
    missing : Missing
    """

    def __init__(
        self,
        affine: Affine,
        layout: Layout,
        dtype: DType,
        constant: npt.NDArray[np.intp],
        only: Floats,
        missing: Missing,
    ) -> None:
        self._affine, self._layout, self._dtype = affine, layout, dtype
        self._constant, self._only = constant, only[:, None]
        self._missing = missing

    def __call__(self, x: Array, first: int) -> tuple[Array, Counter[str]]:
        """Transform values x, of shape (n,), that begin at position `first`.

        Returns
        -------
        values of shape (n,), and counts named as in `Applied`
        """
        layout, affine, constant, only = self._layout, self._affine, self._constant, self._only
        if x.size % layout.row_size or first % layout.row_size:  # not whole rows: treat each value as a feature
            feature = np.arange(first, first + x.size) % layout.row_size // layout.positions
            affine, x = affine[feature], x.reshape(1, x.size, 1)
            place = np.searchsorted(self._constant, feature).clip(max=max(0, self._constant.size - 1))
            found = self._constant[place] == feature if self._constant.size else np.zeros(feature.size, bool)
            constant, only = np.flatnonzero(found), self._only[place[found]]
        else:
            x = x.reshape(-1, layout.features, layout.positions)
        counts: Counter[str] = Counter()
        result, finite = (affine.columns if affine is self._affine else affine)(x, self._dtype)
        if self._missing.fill is not None:
            missing = ~present(x, self._missing)
            result[missing] = np.nan
            counts["filled"] = int(np.count_nonzero(missing))
        if not finite:
            self._count_not_finite(x, result, affine, counts)
        if constant.size:
            differs = (x[:, constant] != only) & np.isfinite(x[:, constant])
            if self._missing.fill is not None:
                differs &= present(x[:, constant], self._missing)
            counts["varied_where_constant"] = int(np.count_nonzero(differs))
        return result.reshape(-1), counts

    def _count_not_finite(self, x: Array, result: Array, affine: Affine, counts: Counter[str]) -> None:
        counts["overflowed"] = int(np.count_nonzero(overflowed(x, result)))
        bad = ~np.isfinite(x)
        if self._missing.fill is not None:
            bad &= present(x, self._missing)
        counts["non_finite"] = int(np.count_nonzero(bad))
        counts["undefined"] = int(affine.unknown.sum()) * (x.size // x.shape[1])


@dataclass(frozen=True)
class ApplyContext:
    """What a worker needs to transform runs of values (first, count): plain values, as in `FoldContext`."""

    data: Joined
    readers: int
    transform: Transform

    def absolute(self) -> ApplyContext:
        """The same by absolute paths."""
        return replace(self, data=self.data.absolute())

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[Run], Transformed]]:
        """Give one worker the function that transforms a run."""
        with self.data.reader(self.readers) as data:

            def work(run: Run) -> Transformed:
                first, count = run
                tally = Tally(data)
                result, counts = self.transform(tally.read(first, count), first)
                return result, counts, Counter(dict(enumerate(tally.counts)))

            yield work


@dataclass(frozen=True)
class PlacedContext:
    """The same for workers that write the values themselves, some runs at a time: only the counts come back.

    Attributes
    ----------
    inner : ApplyContext
    place : Place
    output : str
        The name of the output, for messages.
    sync : bool
        Whether workers see to it that values are on disk: those of another machine, whose memory this one cannot flush.
    """

    inner: ApplyContext
    place: Place
    output: str
    sync: bool

    def absolute(self) -> PlacedContext:
        """The same by absolute paths."""
        return replace(self, inner=self.inner.absolute())

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Run]], Counts]]:
        """Give one worker the function that transforms and writes runs."""
        with self.inner.open() as transformed:

            def work(runs: Sequence[Run]) -> Counts:
                totals: Counts = Counter(), Counter()

                def values() -> Iterator[tuple[int, Array]]:
                    for run in runs:
                        check_wanted()
                        found, counts, marked = transformed(run)
                        totals[0].update(counts)
                        totals[1].update(marked)
                        yield run[0], found

                try:
                    self.place.write(values(), sync=self.sync)
                except OSError as error:
                    raise atomic.failed(self.output, error) from None
                return totals

            yield work
