"""Folding: workers accumulate segments, and the results are joined in order into one record."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from bncli.engine.checkpoint import Arrays, Packed
from bncli.engine.executors import available, mapped
from bncli.engine.parts import PARTS, Batches, Part, Population, Recurrence, Samples
from bncli.engine.plan import FitSpec, Segment, segments
from bncli.errors import BnWarning, InputError, printable
from bncli.formats.dataset import DataSet
from bncli.formats.fills import Tally
from bncli.numerics.arrays import Floats
from bncli.numerics.kernels import Missing, present
from bncli.numerics.layout import Layout, Values
from bncli.numerics.moments import Moments
from bncli.stats.container import Value
from bncli.stats.conventions import Conventions
from bncli.stats.record import Stats
from bncli.stats.warnings import advice

TOO_LARGE = 1e150  # about where squares, and their sums, stop fitting a float64

P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Fold:
    """What has been accumulated so far: a part for each name in PARTS.

    Frozen and replaced as a whole, so an interrupted run always holds a complete one.

    Attributes
    ----------
    parts : dict of str to Part
        ``fold[Population]`` is the part of that class.

    Examples
    --------
    >>> Fold.empty(3)[Population].moments.count.tolist()
    [0.0, 0.0, 0.0]
    """

    parts: Mapping[str, Part]

    @classmethod
    def empty(cls, features: int) -> Fold:
        """Nothing accumulated yet, for C features."""
        return cls({name: kind.empty(features) for name, kind in PARTS.items()})

    @classmethod
    def of(cls, batches: Batches, *, again: bool = False) -> Fold:
        """Accumulate consecutive batches.

        With `again` their samples were accumulated in an earlier epoch, so only the parts that continue through all
        epochs are made (see `Part.EACH_EPOCH`).
        """
        return cls({name: kind.of(batches) for name, kind in PARTS.items() if kind.EACH_EPOCH or not again})

    @classmethod
    def unpack(cls, arrays: Arrays, attributes: Mapping[str, Any], features: int) -> Fold:
        """Restore what `pack` returned, for C features.

        Raises
        ------
        LookupError, TypeError, ValueError
            When the arrays or attributes are not those of a Fold of C features.
        """

        def part(name: str, kind: type[Part]) -> Part:
            own = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
            return kind.of_arrays(own, attributes, features)

        return cls({name: part(name, kind) for name, kind in PARTS.items()})

    def pack(self) -> Packed:
        """Return everything as named arrays and plain values, for a checkpoint.

        Raises
        ------
        TypeError
            When two parts have a plain number of the same name, of which a checkpoint would hold one.
        """
        arrays = {f"{name}/{key}": array for name, part in self.parts.items() for key, array in part.arrays().items()}
        attributes: dict[str, Value] = {}
        for name, part in self.parts.items():
            own = part.attributes()
            if both := own.keys() & attributes.keys():
                raise TypeError(f"the part {name} has {min(both)!r}, which another part has too; rename it")
            attributes |= own
        return arrays, attributes

    def join(self, later: Fold, momentum: float | None) -> Fold:
        """Combine with the batches that follow. Parts that `later` does not have (see `of`) stay unchanged."""
        merged = {name: self.parts[name].merge(part, momentum) for name, part in later.parts.items()}
        return Fold({**self.parts, **merged})

    def replace(self, *parts: Part) -> Fold:
        """Return a copy in which these parts replace those of the same class."""
        return Fold(
            {name: next((p for p in parts if isinstance(p, PARTS[name])), old) for name, old in self.parts.items()}
        )

    def __getitem__(self, kind: type[P]) -> P:
        return next(part for part in self.parts.values() if isinstance(part, kind))

    @property
    def samples(self) -> int:
        """Number of samples accumulated."""
        return self[Samples].samples


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


def folds(data: DataSet, layout: Layout, spec: FitSpec, conventions: Conventions, done: int = 0) -> Iterator[Fold]:
    """Yield the folds of all segments after the first `done` samples, in order; the workers compute them.

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
    # segments of one chunk go to one worker, which then decodes it once, as long as every worker gets four tasks
    together = min(-(-2 * data.rows_together // (cut[0].batches * cut[0].samples)), -(-len(cut) // (4 * workers)))
    tasks = [cut[i : i + together] for i in range(0, len(cut), together)]
    for found in mapped(FoldContext(data, workers, layout, missing, conventions), tasks, workers):
        yield from found


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
    """

    data: DataSet
    readers: int
    layout: Layout
    missing: Missing
    conventions: Conventions

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Segment]], list[Fold]]]:
        """Give one worker the function that folds a task of consecutive segments."""
        with self.data.reader(self.readers) as data:
            yield lambda task: [fold_segment(data, self.layout, s, self.missing, self.conventions) for s in task]


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
    """Make the Stats of what was folded; `rest` are fields of Stats. Warns as `stats.warnings.advice` does.

    Raises
    ------
    InputError
        When no feature has a variance, or a variance does not fit a float64.
    """
    population, recurrence = fold[Population].moments, fold[Recurrence]
    if not (recurrence.running.k > 0).any():
        raise InputError(
            f"no feature has two values in a batch; a variance needs at least two ({fold.samples} samples read)"
        )
    if not np.isfinite(population.m2).all():
        feature = int(np.flatnonzero(~np.isfinite(population.m2))[0])
        raise InputError(
            f"{_feature(names, feature)}: its values are too large or too close together for their squares to fit a float64; rescale them"
        )
    mean, var = statistics(fold, conventions)
    if conventions.start is not None and (unknown := np.isnan(conventions.start).any(axis=0) & ~np.isnan(mean)).any():
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
    for text in advice(stats):
        warnings.warn(text, BnWarning, stacklevel=5)
    return stats
