"""Training batches: read in shuffled order, with their statistics folded run by run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bncli.engine.accumulate import segment_moments
from bncli.engine.executors import in_threads
from bncli.engine.learning.setup import Setup
from bncli.engine.parts import Batches
from bncli.engine.plan import Segment
from bncli.engine.tree import Fold, Node, Tree
from bncli.errors import InputError, printable
from bncli.formats.dataset import Joined
from bncli.formats.fills import Tally
from bncli.formats.permuted import Permuted
from bncli.numerics.arrays import Array, Floats
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Values
from bncli.numerics.moments import Moments
from bncli.stats.conventions import Conventions

AHEAD_BYTES = 16 << 20  # maximum size of the batches read ahead


class Batch(NamedTuple):
    """A batch of samples with its targets and statistics.

    Attributes
    ----------
    x : array of shape (N, ...)
    targets : array of shape (N, ...)
        As `Setup.encode` returns them.
    mean, var : arrays of shape (C,)
    tree : Tree or None
        Of all batches so far; only with the last batch of a run.
    """

    x: Array
    targets: Array
    mean: Floats
    var: Floats
    tree: Tree | None


class BatchReader:
    """Reads the batches of one epoch, or those of the held-out samples.

    Parameters
    ----------
    setup : Setup
    data, targets : Joined
    conventions : Conventions
    budget : int
        Buffer memory in bytes.
    threads : int
        With more than one, batches are read ahead in a separate thread.
    epoch : int or None
        None reads the held-out samples.
    tree : Tree
        Of all batches before these; a run is a segment, counted through all epochs.
    """

    def __init__(
        self,
        setup: Setup,
        data: Joined,
        targets: Joined,
        conventions: Conventions,
        budget: int,
        threads: int,
        epoch: int | None,
        tree: Tree,
    ) -> None:
        order, plan = setup.plan.order, setup.plan
        self._setup, self._layout = setup, setup.model.layout

        @lru_cache(1)  # data and targets are read with the same indices
        def indices(first: int, count: int) -> npt.NDArray[np.int64]:
            return order.held_out(first, count) if epoch is None else order.indices(first, count, epoch)

        self._count = order.held if epoch is None else order.count
        self._x, self._targets = (
            Permuted(source, indices, self._count, order.window, budget // 2) for source in (data, targets)
        )
        self._conventions, self._epoch, self._tree = conventions, epoch, tree
        self._budget, self._threads = budget, threads
        # the first epoch includes a last batch too small to train on: the population counts it
        self._stop = plan.batches if epoch else -(-self._count // plan.batch_size)
        self._pending: list[Moments] = []  # moments of the batches in the current, incomplete run
        self._tally = Tally(self._x)  # counts of that run
        self._samples = plan.batch_size
        self._batch_bytes = sum(self._samples * d.sample_size * d.dtype.itemsize for d in (data, targets))

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yield the batches in order, starting at batch `first`, which begins a run. Reads ahead in a separate thread.

        Raises
        ------
        InputError
            When a value is not finite; the message names the sample.
        """
        room = max(1, min(AHEAD_BYTES, self._budget // 8) // self._batch_bytes)
        run = self._setup.plan.run
        at_once = max(1, min(run, room // 2))
        parts = [
            range(begin, min(begin + at_once, start + run, self._stop))
            for start in range(first, self._stop, run)
            for begin in range(start, min(start + run, self._stop), at_once)
        ]
        most = max(1, room // at_once) if self._threads > 1 else 0
        return chain.from_iterable(in_threads(self._part, parts, min(most, 1), most + 1))

    def _part(self, numbers: range) -> list[Batch]:
        """Read some batches of one run. Must be called in order."""
        first = numbers.start * self._samples
        count = min(len(numbers) * self._samples, self._count - first)
        x, targets = (
            d.read(first * d.sample_size, count * d.sample_size).reshape(count, *d.shape[1:]).copy()
            for d in (self._x, self._targets)
        )
        moments = self._moments(x, first)
        if self._epoch == 0:
            self._tally.add(x.reshape(-1), first * self._x.sample_size)
        _check_finite(self._targets, targets, first)
        targets, mean, var = self._setup.encode(targets), moments.mean, moments.variance()
        tree = self._folded(numbers, moments) if self._epoch is not None else None
        cuts = range(0, count, self._samples)
        return [
            Batch(
                x[at:][: self._samples],
                targets[at:][: self._samples],
                mean[i],
                var[i],
                tree if i + 1 == len(cuts) else None,
            )
            for i, at in enumerate(cuts)
        ]

    def _moments(self, x: Array, first: int) -> Moments:
        """Moments of shape (batches, C) of the samples x, which start at position `first`."""
        flat, size = x.reshape(-1), self._layout.sample_size
        whole, rest = divmod(len(x), self._samples)
        parts = []
        for start, batches, samples in ((0, whole, self._samples), (whole * self._samples, 1, rest)):
            if batches and samples:
                values = Values(lambda at, count: flat[at : at + count], start=start * size)
                parts.append(self._layout.moments(values, batches, samples, Missing()))
                if not np.isfinite(parts[-1].m2).all():  # raises InputError with the location of the value
                    segment = Segment(first + start, batches, samples)
                    segment_moments(self._x, self._layout, segment, Missing(), hint="leave such samples out")
                    raise InputError("the input changed while it was read: values that were not finite are now finite")
        return Moments.concatenate(parts)

    def _folded(self, numbers: range, moments: Moments) -> Tree | None:
        """The tree of all batches so far if the run is complete, else None. Only the first epoch counts for the population."""
        self._pending.append(moments)
        run = self._setup.plan.run
        if numbers.stop % run and numbers.stop != self._stop:
            return None
        batches, self._pending = Moments.concatenate(self._pending), []
        start = (numbers.stop - 1) // run * run * self._samples
        samples = min(numbers.stop * self._samples, self._count) - start
        segment, marked = Segment(start, 1, samples), tuple(self._tally.counts)
        found = Batches(self._x, self._layout, segment, Missing(), self._conventions, batches, marked)
        node = Node(0, self._tree.stop, Fold.of(found, again=bool(self._epoch)))
        self._tree = self._tree.add([node], self._conventions.momentum)
        self._tally = Tally(self._x)
        return self._tree


def _check_finite(targets: Permuted, values: Array, first: int) -> None:
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    place = int(np.flatnonzero(~np.isfinite(values.reshape(-1)))[0])
    address, sample = targets.locate(first * targets.sample_size + place)
    raise InputError(
        f"{printable(address)}: sample {sample} is {values.reshape(-1)[place]}; targets must be finite; leave such samples out"
    )
