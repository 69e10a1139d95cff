"""Folding: segments give partial results, the workers compute them, and they are joined in order into one record."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.engine.checkpoint import Arrays, Parts
from bncli.engine.executors import available, mapped
from bncli.engine.plan import FitSpec, Segment, segments
from bncli.errors import BnWarning, InputError, printable
from bncli.formats.dataset import DataSet
from bncli.formats.fills import Tally
from bncli.numerics.kernels import Missing, present
from bncli.numerics.layout import Layout, Values
from bncli.numerics.moments import Moments, Running
from bncli.stats.container import Value
from bncli.stats.conventions import Conventions
from bncli.stats.record import Stats
from bncli.stats.warnings import advice

COUNTS = ("samples", "batches", "left_out")  # of a Fold
TOO_LARGE = 1e150  # about where squares, and their sums, stop fitting a float64
EXACT_INTEGERS = 2**53  # float64 holds every integer up to here


@dataclass(frozen=True)
class Fold:
    """What has been accumulated so far: the population, the running statistics and the counts beside them.

    Frozen, so that a run that is interrupted at any moment still holds a whole one.
    """

    population: Moments
    running: Running
    samples: int = 0
    batches: int = 0
    left_out: int = 0
    rounded: bool = False  # holds integers that float64 rounds
    marked: tuple[int, ...] = ()  # values that the data set declares not to be data, for each of its marks

    @classmethod
    def empty(cls, features: int) -> Fold:
        """Nothing yet."""
        return cls(Moments.empty(features), Running.empty(features))

    @classmethod
    def of(cls, batches: Moments, samples: int, conventions: Conventions) -> Fold:
        """Consecutive batches, given as Moments of shape (B, C), of `samples` samples together."""
        folded = int((batches.count >= 2).any(axis=1).sum())
        running = Running.of_batches(batches, conventions.ddof, conventions.momentum)
        return cls(batches.reduce(), running, samples, folded, len(batches.count) - folded)

    @classmethod
    def of_parts(cls, arrays: Arrays, attributes: Mapping[str, Any], features: int) -> Fold:
        """What `parts` gave, of C features; raises LookupError, TypeError or ValueError when it is something else."""
        for name, empty in cls.empty(features).parts()[0].items():
            if (arrays[name].shape, arrays[name].dtype) != (empty.shape, empty.dtype):
                raise ValueError(name)
        population = Moments(*(arrays[f"population/{f.name}"] for f in fields(Moments)))
        running = Running(*(arrays[f"running/{f.name}"] for f in fields(Running)))
        counts: dict[str, Any] = {name: int(attributes[name]) for name in COUNTS}
        marked = tuple(map(int, attributes.get("marked", ())))
        return cls(population, running, rounded=bool(attributes["rounded"]), marked=marked, **counts)

    def parts(self) -> Parts:
        """Everything as named arrays and values, for a checkpoint."""
        arrays = {
            f"{name}/{f.name}": getattr(part, f.name)
            for name, part in (("population", self.population), ("running", self.running))
            for f in fields(part)
        }
        attributes: dict[str, Value] = {name: int(getattr(self, name)) for name in (*COUNTS, "rounded")}
        return arrays, attributes | ({"marked": self.marked} if self.marked else {})

    def join(self, later: Fold, momentum: float | None) -> Fold:
        """Both together; the batches of `later` follow these."""
        return Fold(
            self.population.merge(later.population),
            self.running.merge(later.running, momentum),
            self.samples + later.samples,
            self.batches + later.batches,
            self.left_out + later.left_out,
            self.rounded or later.rounded,
            tuple(map(sum, zip_longest(self.marked, later.marked, fillvalue=0))),
        )


def segment_moments(
    data: DataSet,
    layout: Layout,
    segment: Segment,
    missing: Missing,
    tally: Tally | None = None,
    way_out: str = "leave such values out with --nan omit",
) -> Moments:
    """Moments of shape (batches, C) of a segment's batches, whose values go through `tally` where there is one.

    `way_out` is the advice about values that are not finite.

    Raises
    ------
    InputError
        Naming file, sample and feature of a value that is not finite, or of values whose squares do not fit a float64.
    """
    start = segment.first * layout.sample_size
    source = Values(tally.read, start=start) if tally else Values(data.read, data.stored, start)
    batches = layout.moments(source, segment.batches, segment.samples, missing)
    bad = ~np.isfinite(batches.m2)
    if bad.any():
        values = segment.batches * segment.samples * layout.sample_size
        raise _explain(data, layout, start, values, missing, int(np.flatnonzero(bad.any(axis=0))[0]), way_out)
    return batches


def _explain(
    data: DataSet, layout: Layout, start: int, count: int, missing: Missing, feature: int, way_out: str
) -> InputError:
    """Find the value that has no variance: the first non-finite one, else the largest, else say that they are too close."""
    at_once, largest, where = 1 << 20, 0.0, start
    for first in range(start, start + count, at_once):
        values = data.read(first, min(at_once, start + count - first))
        bad = np.flatnonzero(present(values, missing) & ~np.isfinite(values))
        if bad.size:
            position = first + int(bad[0])
            address, sample = data.locate(position)
            feature = position % layout.row_size // layout.positions
            value = values[bad[0]]
            return InputError(
                f"{printable(address)}: sample {sample}, {_feature(data.names, feature)} is {value}; {way_out}"
            )
        positions = first + np.arange(len(values))
        sizes = np.where(
            positions % layout.row_size // layout.positions == feature, np.abs(values.astype(np.float64)), 0
        )
        sizes[~present(values, missing)] = 0
        if sizes.max() > largest:
            largest, where = float(sizes.max()), first + int(sizes.argmax())
    address, sample = data.locate(where if largest > TOO_LARGE else start)
    if largest > TOO_LARGE:
        return InputError(
            f"{printable(address)}: sample {sample}, {_feature(data.names, feature)} has the magnitude {largest:g}, whose square "
            f"does not fit a float64; rescale the values, or leave that sample out{_declared(data, where)}"
        )
    return InputError(
        f"{printable(address)}: {_feature(data.names, feature)}: its values about sample {sample} are too close together for the "
        "squares of their differences to fit a float64 (a spread below 1e-150); rescale them"
    )


def _declared(data: DataSet, position: int) -> str:
    value = data.read(position, 1)[0]
    texts = [f", or give --fill-value {m.text}, which is its {m.name}" for m in data.marks if m.fill == value]
    return texts[0] if texts else ""


def _feature(names: tuple[str, ...] | None, index: int) -> str:
    named = f" ({printable(names[index])})" if names and index < len(names) else ""
    return f"feature {index}{named}"


def folds(data: DataSet, layout: Layout, spec: FitSpec, conventions: Conventions, done: int = 0) -> Iterator[Fold]:
    """The folds of all segments after the first `done` samples, in order, computed by the workers.

    Raises
    ------
    InputError
        When these samples do not end on a segment boundary, so that some would be left out.
    """
    missing = Missing(spec.nan == "omit", data.fill)
    cut = [s for s in segments(layout, data.shape[0], spec.batch_size) if s.first >= done]
    if not cut:
        return
    if cut[0].first != done:
        raise InputError(
            f"the first {done} samples do not end on a segment boundary; remove the checkpoint and start again"
        )
    workers = min(spec.workers or available(), data.most_readers, len(cut))
    # segments of one chunk go to one worker, as long as there is enough for all
    together = min(-(-2 * data.rows_together // (cut[0].batches * cut[0].samples)), -(-len(cut) // (4 * workers)))
    tasks = [cut[i : i + together] for i in range(0, len(cut), together)]
    for found in mapped(FoldContext(data, workers, layout, missing, conventions), tasks, workers):
        yield from found


@dataclass(frozen=True)
class FoldContext:
    """What a worker needs to fold segments: plain values that pickle.

    Attributes
    ----------
    data : DataSet
        Read by address: it pickles without its open files.
    readers : int
        How many workers share its buffers.
    layout, missing, conventions
        See `fold_segment`.
    """

    data: DataSet
    readers: int
    layout: Layout
    missing: Missing
    conventions: Conventions

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Segment]], list[Fold]]]:
        """The function that folds consecutive segments, with files of its own."""
        with self.data.reader(self.readers) as data:
            yield lambda task: [fold_segment(data, self.layout, s, self.missing, self.conventions) for s in task]


def fold_segment(data: DataSet, layout: Layout, segment: Segment, missing: Missing, conventions: Conventions) -> Fold:
    """The Fold of one segment; raises as `segment_moments` does."""
    tally = Tally(data) if data.marks else None
    batches = segment_moments(data, layout, segment, missing, tally)
    fold = Fold.of(batches, segment.batches * segment.samples, conventions)
    rounded = holds_large_integers(data, segment, fold.population)
    return replace(fold, rounded=rounded, marked=tuple(tally.counts) if tally else ())


def holds_large_integers(data: DataSet, segment: Segment, population: Moments) -> bool:
    """Whether a segment holds integers beyond 2^53; its values are looked at only where the moments allow for some."""
    if not any(i.dtype.kind in "iu" and i.dtype.itemsize == 8 for i in data.inputs):
        return False
    with np.errstate(invalid="ignore"):
        reach = np.abs(population.mean) + np.sqrt(population.m2)  # no value lies farther from 0
    if not (reach >= EXACT_INTEGERS).any():
        return False
    start, count = segment.first * data.sample_size, segment.batches * segment.samples * data.sample_size
    for first in range(start, start + count, 1 << 20):
        values = data.read(first, min(1 << 20, start + count - first))
        if int(values.max()) > EXACT_INTEGERS or int(values.min()) < -EXACT_INTEGERS:  # before float64 rounds them
            return True
    return False


def statistics(fold: Fold, conventions: Conventions) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Running mean and variance as they are stored, each of shape (C,); NaN where no batch was folded."""
    if conventions.momentum is not None:
        return fold.running.read(conventions.init, conventions.momentum, conventions.start)
    folded = np.broadcast_to(fold.running.k[0], fold.population.count.shape) > 0
    return (
        np.where(folded, fold.population.mean, np.nan),
        np.where(folded, fold.population.variance(conventions.ddof), np.nan),
    )


def finish(fold: Fold, conventions: Conventions, *, names: tuple[str, ...] | None, **rest: Any) -> Stats:
    """The record of what was folded; `rest` are fields of Stats. Warns of what a person should know.

    Raises
    ------
    InputError
        When no feature has a variance, or one has a variance that does not fit a float64.
    """
    if not (fold.running.k > 0).any():
        raise InputError(
            f"no feature has two values in a batch; a variance needs two values per feature ({fold.samples} samples read)"
        )
    if not np.isfinite(fold.population.m2).all():
        feature = int(np.flatnonzero(~np.isfinite(fold.population.m2))[0])
        raise InputError(
            f"{_feature(names, feature)}: its values are too large or too close together for their squares to fit a float64; rescale them"
        )
    mean, var = statistics(fold, conventions)
    if conventions.start is not None and (unknown := np.isnan(conventions.start).any(axis=0) & ~np.isnan(mean)).any():
        first = _feature(names, int(np.flatnonzero(unknown)[0]))
        warnings.warn(
            f"--like has no running statistics of {int(unknown.sum())} of {len(mean)} features ({first} is the first); those "
            "start afresh",
            BnWarning,
            stacklevel=4,
        )
    stats = Stats(
        mean,
        var,
        population=fold.population,
        running=fold.running,
        num_samples=fold.samples,
        num_batches=fold.batches,
        num_left_out=fold.left_out,
        names=names,
        **vars(conventions) | rest,
    )
    for text in advice(stats):
        warnings.warn(text, BnWarning, stacklevel=4)
    return stats
