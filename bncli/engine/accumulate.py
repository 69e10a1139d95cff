"""Folding: workers accumulate segments into nodes of the tree, of which one record is made."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bncli.engine.executors import DEFAULT, available, is_here, mapped
from bncli.engine.executors.worker import check_wanted
from bncli.engine.parts import Batches, Population, Recurrence
from bncli.engine.plan import FitSpec, Segment, Segments
from bncli.engine.tree import Fold, Node, Tree
from bncli.errors import BnWarning, InputError, printable
from bncli.formats.dataset import DataSet
from bncli.formats.fills import Tally
from bncli.numerics import compiled
from bncli.numerics.arrays import Floats
from bncli.numerics.kernels import Missing, present
from bncli.numerics.layout import Layout, Values
from bncli.numerics.moments import Moments
from bncli.stats.conventions import Conventions
from bncli.stats.record import Stats
from bncli.stats.warnings import advice

KEPT_BYTES = 24 << 20  # of freed memory, for the next segment
TASKS_EACH = 4  # at least, where there are enough segments: so that workers end at about the same time
LEAST_SEGMENTS, MOST_SEGMENTS = 16, 1024  # of a task of a worker elsewhere: half a second, half a minute
MOST_TASKS = 4096  # from where on tasks have more segments
TOO_LARGE = 1e150  # about where squares, and their sums, stop fitting a float64


def segment_moments(
    data: DataSet,
    layout: Layout,
    segment: Segment,
    missing: Missing,
    tally: Tally | None = None,
    hint: str = "leave such values out with --nan omit",
) -> Moments:
    """Compute the moments of each batch of a segment, of shape (B, C).

    Parameters
    ----------
    tally : Tally, optional
        Reads the values and counts those that the data set marks as missing.
    hint : str
        What the error about a value that is not finite suggests.

    Raises
    ------
    InputError
        Naming file, sample and feature, when a value is not finite or squares overflow or underflow float64.
    """
    start = segment.first * layout.sample_size
    source = Values(tally.read, start=start) if tally else Values(data.read, data.stored, start)
    batches = layout.moments(source, segment.batches, segment.samples, missing)
    bad = ~np.isfinite(batches.m2)
    if bad.any():
        values = segment.batches * segment.samples * layout.sample_size
        raise _explain(data, layout, start, values, missing, int(np.flatnonzero(bad.any(axis=0))[0]), hint)
    return batches


def _explain(
    data: DataSet, layout: Layout, start: int, count: int, missing: Missing, feature: int, hint: str
) -> InputError:
    """Explain why a feature's variance is not finite, in a second pass over its segment.

    The first non-finite value of any feature is named; else the feature's largest value, if its square overflows; else
    its values are too close together.
    """
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
                f"{printable(address)}: sample {sample}, {_feature(data.names, feature)} is {value}; {hint}"
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
            f"{printable(address)}: sample {sample}, {_feature(data.names, feature)} has magnitude {largest:g}; its square "
            f"does not fit a float64; rescale the values, or leave out that sample{_declared(data, where)}"
        )
    return InputError(
        f"{printable(address)}: {_feature(data.names, feature)}: its values near sample {sample} are too close together: the "
        "squares of their differences do not fit a float64 (spread below 1e-150); rescale them"
    )


def _declared(data: DataSet, position: int) -> str:
    """Suggest --fill-value where the input declares the value at a position as its fill value; else ""."""
    value = data.read(position, 1)[0]
    texts = [f", or give --fill-value {m.text}, which is its {m.name}" for m in data.marks if m.fill == value]
    return texts[0] if texts else ""


def _feature(names: tuple[str, ...] | None, index: int) -> str:
    named = f" ({printable(names[index])})" if names and index < len(names) else ""
    return f"feature {index}{named}"


@dataclass
class Crew:
    """How many work at a fit now, for progress."""

    workers: int = 0

    def count(self, workers: int) -> None:
        """Note it."""
        self.workers = workers


def nodes(
    data: DataSet,
    layout: Layout,
    spec: FitSpec,
    conventions: Conventions,
    cut: Segments,
    run: range,
    crew: Crew | None = None,
) -> Iterator[tuple[Node, ...]]:
    """Yield the nodes of a run of segments, in order, a few at a time; the workers compute them.

    Parameters
    ----------
    cut : Segments
        Of the whole data set.
    run : range
        Which of them to accumulate.
    crew : Crew, optional
        Told how many workers there are.
    """
    if not run:
        return
    missing, here = Missing(spec.nan == "omit", data.fill), is_here(spec.on or DEFAULT)
    workers = min(spec.workers or available(), data.most_readers, len(run)) if here else 0
    context = FoldContext(data, workers or 1, layout, missing, conventions, cut)
    # segments of one chunk go to one worker, which then decodes it once
    chunk = -(-2 * data.rows_together // (cut.at_once * cut.batch_size))

    def tasks(workers: int) -> Iterator[range]:
        return aligned(run, fair(len(run), chunk, workers) if here else together(len(run), workers, chunk))

    yield from mapped(context, tasks, workers, spec.on or DEFAULT, (crew or Crew()).count)


def together(segments: int, workers: int, least: int = 1) -> int:
    """How many segments a task of a worker elsewhere has, a power of two: it costs milliseconds, and all results meet in one place."""
    wanted = max(least, min(MOST_SEGMENTS, max(LEAST_SEGMENTS, segments // MOST_TASKS)))
    return fair(segments, wanted, workers)


def fair(segments: int, wanted: int, workers: int) -> int:
    """The largest power of two, at most what is wanted, that leaves TASKS_EACH tasks to every worker: tasks are nodes of the tree."""
    most = min(wanted, -(-segments // (TASKS_EACH * workers)))
    return 1 << max(0, most.bit_length() - 1)


def aligned(run: range, length: int) -> Iterator[range]:
    """Cut a run at the multiples of a length.

    >>> list(aligned(range(3, 9), 4))
    [range(3, 4), range(4, 8), range(8, 9)]
    """
    first = run.start
    while first < run.stop:
        stop = min((first // length + 1) * length, run.stop)
        yield range(first, stop)
        first = stop


@dataclass(frozen=True)
class FoldContext:
    """What a worker needs to fold segments: plain values that can be pickled.

    Attributes
    ----------
    data : DataSet
        Read by address; it is pickled without its open files.
    readers : int
        How many workers share the buffers.
    layout, missing, conventions
        See `fold_segment`.
    cut : Segments
        Of the whole data set.
    """

    data: DataSet
    readers: int
    layout: Layout
    missing: Missing
    conventions: Conventions
    cut: Segments

    def absolute(self) -> FoldContext:
        """The same by absolute paths."""
        return replace(self, data=self.data.absolute())

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[range], tuple[Node, ...]]]:
        """Give one worker the function that folds a task, a run of segments, and joins what belongs together."""
        compiled.keep_freed(KEPT_BYTES)
        with self.data.reader(self.readers) as data:

            def run(task: range) -> tuple[Node, ...]:
                tree = Tree(self.layout.features)
                for number in task:
                    check_wanted()
                    fold = fold_segment(data, self.layout, self.cut[number], self.missing, self.conventions)
                    tree = tree.add([Node(0, number, fold)], self.conventions.momentum)
                return tree.nodes

            yield run


def fold_segment(data: DataSet, layout: Layout, segment: Segment, missing: Missing, conventions: Conventions) -> Fold:
    """Accumulate one segment; raises as `segment_moments`."""
    tally = Tally(data) if data.marks else None
    moments = segment_moments(data, layout, segment, missing, tally)
    marked = tuple(tally.counts) if tally else ()
    return Fold.of(Batches(data, layout, segment, missing, conventions, moments, marked))


def statistics(fold: Fold, conventions: Conventions) -> tuple[Floats, Floats]:
    """Return running mean and variance as they are stored, each of shape (C,); NaN where no batch was folded."""
    running, population = fold[Recurrence].running, fold[Population].moments
    if conventions.momentum is not None:
        return running.read(conventions.init, conventions.momentum, conventions.start)
    folded = np.broadcast_to(running.k[0], population.count.shape) > 0
    return np.where(folded, population.mean, np.nan), np.where(folded, population.variance(conventions.ddof), np.nan)


def finish(fold: Fold, conventions: Conventions, *, names: tuple[str, ...] | None, **rest: Any) -> Stats:
    """Make the Stats of what was folded; `rest` are fields of Stats. Warns as `stats.warnings.advice` does, but of a part.

    Raises
    ------
    InputError
        When no feature has a variance, or a variance does not fit a float64.
    """
    population, recurrence = fold[Population].moments, fold[Recurrence]
    part = rest.get("part")
    if not part and not (recurrence.running.k > 0).any():
        raise InputError(
            f"no feature has two values in a batch; a variance needs at least two ({fold.samples} samples read)"
        )
    if not np.isfinite(population.m2).all():
        feature = int(np.flatnonzero(~np.isfinite(population.m2))[0])
        raise InputError(
            f"{_feature(names, feature)}: its values are too large or too close together for their squares to fit a float64; rescale them"
        )
    mean, var = statistics(fold, conventions)
    if (
        not part
        and conventions.start is not None
        and (unknown := np.isnan(conventions.start).any(axis=0) & ~np.isnan(mean)).any()
    ):
        first = _feature(names, int(np.flatnonzero(unknown)[0]))
        warnings.warn(
            f"--like has no running statistics of {int(unknown.sum())} of {len(mean)} features ({first} is the first); those "
            "start afresh, as with --init debias",
            BnWarning,
            stacklevel=5,
        )
    stats = Stats(
        mean,
        var,
        population=population,
        running=recurrence.running,
        num_samples=fold.samples,
        num_batches=recurrence.batches,
        num_left_out=recurrence.left_out,
        names=names,
        **vars(conventions) | rest,
    )
    for text in advice(stats) if not part else ():
        warnings.warn(text, BnWarning, stacklevel=5)
    return stats
