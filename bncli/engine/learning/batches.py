"""Batches of learning: read in their drawn order, and their statistics folded run by run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bncli.engine.accumulate import Fold, segment_moments
from bncli.engine.executors import in_threads
from bncli.engine.learning.setup import Lesson
from bncli.engine.parts import Batches
from bncli.engine.plan import Segment
from bncli.errors import InputError, printable
from bncli.formats.dataset import Joined
from bncli.formats.fills import Tally
from bncli.formats.permuted import Drawn
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Values
from bncli.numerics.moments import Moments
from bncli.stats.conventions import Conventions

AHEAD_BYTES = 16 << 20  # of batches that are read ahead

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class Batch(NamedTuple):
    """A batch as it was read: its samples and their targets, mean and variance of its features.

    The last batch of a run also has the fold of all so far; the others have None.
    """

    x: Array
    goals: Array
    mean: Floats
    var: Floats
    fold: Fold | None


class Reader:
    """Reads batches of an epoch, or, without one, of the samples held out.

    Parameters
    ----------
    lesson : Lesson
    data, targets : Joined
    conventions : Conventions
    budget : int
        Bytes of buffers.
    threads : int
        With more than one, batches are read while others are learned from.
    epoch : int or None
    fold : Fold
        Of all batches before.
    """

    def __init__(
        self,
        lesson: Lesson,
        data: Joined,
        targets: Joined,
        conventions: Conventions,
        budget: int,
        threads: int,
        epoch: int | None,
        fold: Fold,
    ) -> None:
        order, plan = lesson.plan.order, lesson.plan
        self._lesson, self._layout = lesson, lesson.model.layout

        @lru_cache(1)  # the data's are the target's
        def indices(first: int, count: int) -> npt.NDArray[np.int64]:
            return order.held_out(first, count) if epoch is None else order.indices(first, count, epoch)

        self._count = order.held if epoch is None else order.count
        self._x, self._goals = (
            Drawn(source, indices, self._count, order.window, budget // 2) for source in (data, targets)
        )
        self._conventions, self._epoch, self._fold = conventions, epoch, fold
        self._budget, self._threads = budget, threads
        # in the first epoch also a last batch that is too small to train, for the population
        self._stop = plan.batches if epoch else -(-self._count // plan.batch_size)
        self._pending: list[Moments] = []  # of the batches of the run that is not complete
        self._tally = Tally(self._x)  # of that run
        self._samples = plan.batch_size
        self._batch_bytes = sum(self._samples * d.sample_size * d.dtype.itemsize for d in (data, targets))

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Batches in order, from the first batch of a run on; some of them are read ahead by a thread of its own.

        Raises
        ------
        InputError
            Naming the sample where a value is not finite.
        """
        room = max(1, min(AHEAD_BYTES, self._budget // 8) // self._batch_bytes)
        run = self._lesson.plan.run
        at_once = max(1, min(run, room // 2))
        parts = [
            range(begin, min(begin + at_once, start + run, self._stop))
            for start in range(first, self._stop, run)
            for begin in range(start, min(start + run, self._stop), at_once)
        ]
        most = max(1, room // at_once) if self._threads > 1 else 0
        return chain.from_iterable(in_threads(self._part, parts, min(most, 1), most + 1))

    def _part(self, numbers: range) -> list[Batch]:
        """Batches of one run; to be asked for in order."""
        first = numbers.start * self._samples
        count = min(len(numbers) * self._samples, self._count - first)
        x, goals = (
            d.read(first * d.sample_size, count * d.sample_size).reshape(count, *d.shape[1:]).copy()
            for d in (self._x, self._goals)
        )
        moments = self._moments(x, first)
        if self._epoch == 0:
            self._tally.add(x.reshape(-1), first * self._x.sample_size)
        _check_finite(self._goals, goals, first)
        goals, mean, var = self._lesson.goals(goals), moments.mean, moments.variance()
        fold = self._folded(numbers, moments) if self._epoch is not None else None
        cuts = range(0, count, self._samples)
        return [
            Batch(
                x[at:][: self._samples],
                goals[at:][: self._samples],
                mean[i],
                var[i],
                fold if i + 1 == len(cuts) else None,
            )
            for i, at in enumerate(cuts)
        ]

    def _moments(self, x: Array, first: int) -> Moments:
        """Moments of shape (batches, C) of samples whose first is at position `first`."""
        flat, size = x.reshape(-1), self._layout.sample_size
        whole, rest = divmod(len(x), self._samples)
        parts = []
        for start, batches, samples in ((0, whole, self._samples), (whole * self._samples, 1, rest)):
            if batches and samples:
                values = Values(lambda at, count: flat[at : at + count], start=start * size)
                parts.append(self._layout.moments(values, batches, samples, Missing()))
                if not np.isfinite(parts[-1].m2).all():  # this raises, and says where
                    segment = Segment(first + start, batches, samples)
                    segment_moments(self._x, self._layout, segment, Missing(), hint="leave such samples out")
                    raise InputError("values that were not finite are so no more; the data changed while it was read")
        return Moments.concatenate(parts)

    def _folded(self, numbers: range, moments: Moments) -> Fold | None:
        """The fold of all so far where the run is complete; the population is counted in the first epoch alone."""
        self._pending.append(moments)
        run = self._lesson.plan.run
        if numbers.stop % run and numbers.stop != self._stop:
            return None
        batches, self._pending = Moments.concatenate(self._pending), []
        start = (numbers.stop - 1) // run * run * self._samples
        samples = min(numbers.stop * self._samples, self._count) - start
        segment, marked = Segment(start, 1, samples), tuple(self._tally.counts)
        found = Batches(self._x, self._layout, segment, Missing(), self._conventions, batches, marked)
        self._fold = self._fold.join(Fold.of(found, again=bool(self._epoch)), self._conventions.momentum)
        self._tally = Tally(self._x)
        return self._fold


def _check_finite(targets: Drawn, values: Array, first: int) -> None:
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    place = int(np.flatnonzero(~np.isfinite(values.reshape(-1)))[0])
    address, sample = targets.locate(first * targets.sample_size + place)
    raise InputError(
        f"{printable(address)}: sample {sample} is {values.reshape(-1)[place]}; a target has to be finite: leave such samples out"
    )
