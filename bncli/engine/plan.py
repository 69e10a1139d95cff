"""What a fit is asked to do (FitSpec), and how its work is cut into segments."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, overload

import numpy as np

from bncli.engine.options import FitOptions
from bncli.errors import BnWarning, UsageError, printable
from bncli.numerics.layout import Layout
from bncli.stats.conventions import DEFAULTS, PRESETS, Conventions, check_conventions
from bncli.stats.record import Stats, load
from bncli.stats.warnings import momentum_advice


class Progress(Protocol):
    """What is called as a run goes on."""

    def __call__(self, done: int, total: int | None, size: int, note: str = "", /, *, workers: int = 0) -> None:
        """Samples done, samples in all, bytes done, what else there is to say, and how many compute (0: not said)."""


@dataclass(frozen=True)
class FitSpec(FitOptions):
    """Options with nothing left open: `like` has been read, and the batch size is known.

    Attributes
    ----------
    batch_size : int
    reference : Stats or None
        The statistics of `like`.
    """

    batch_size: int = 256
    reference: Stats | None = field(default=None, repr=False)

    @classmethod
    def of(cls, options: FitOptions) -> FitSpec:
        """Read the statistics of `like`, and fill in what is open.

        Raises
        ------
        InputError
            When `like` is not a readable stats file.
        UsageError
            When the conventions have no meaning.
        """
        if isinstance(options, FitSpec):
            return options
        like = options.like
        reference = load(like) if isinstance(like, str) else like
        if reference:
            reference.check_whole(f"--like {printable(like)}" if isinstance(like, str) else "like")
        given = {f.name: getattr(options, f.name) for f in fields(FitOptions)}
        given["batch_size"] = options.batch_size or (reference and reference.batch_size) or cls.batch_size
        spec = cls(**given, reference=reference)
        momentum = spec.conventions().momentum if options.momentum is not None else None
        imported = reference.provenance.get("imported", {}) if reference else {}
        if advice := momentum_advice(momentum, options.preset or imported.get("format")):
            warnings.warn(advice, BnWarning, stacklevel=3)
        return spec

    def conventions(self) -> Conventions:
        """The arithmetic's parameters: what was asked for, else those of `like` or the preset, else the defaults."""
        given = self.reference or PRESETS.get(self.preset or "") or DEFAULTS
        momentum = self.momentum if self.momentum is not None else given.momentum
        init = "debias" if self.reference else given.init  # new statistics do not start where the others did
        found = Conventions(
            momentum=None if momentum in (None, "none") else float(momentum),
            eps=self.eps if self.eps is not None else given.eps,
            ddof=self.ddof if self.ddof is not None else given.ddof,
            init=self.init if self.init is not None else init,
            axis=self.axis if self.axis is not None else given.axis,
        )
        check_conventions(found.momentum, found.eps, found.ddof, found.init)
        if found.init != "like":
            return found
        if self.reference is None:
            raise UsageError("--init like goes on from the running statistics of --like; give --like STATS")
        if found.momentum is None:
            raise UsageError(
                "--init like needs a momentum: with --momentum none nothing is carried over; give --momentum M"
            )
        return replace(found, start=np.stack([self.reference.running_mean, self.reference.running_var]))

    def feature_axis(self, shape: tuple[int, ...]) -> int:
        """The feature axis for data of this shape.

        Raises
        ------
        UsageError
            When the data has more than two dimensions and no axis is given; the message shows what each would mean.
        MismatchError
            When the data does not have the rank (unless an axis is given) or the number of features of `like`.
        """
        if self.reference:
            self.reference.check_shape(shape, self.axis, "the data")
            return self.reference.axis if self.axis is None else self.axis
        if self.axis is not None:
            return self.axis
        if self.preset:
            return PRESETS[self.preset].axis
        if len(shape) <= 2:
            return -1
        raise UsageError(
            f"data of shape {shape} needs --axis, the axis of its features:\n" + "\n".join(axis_choices(shape))
        )


@dataclass(frozen=True)
class Segment:
    """A run of whole batches of one size: plain values, so that any worker can take it.

    Attributes
    ----------
    first : int
        Its first sample.
    batches, samples : int
        How many batches, and samples per batch.
    """

    first: int
    batches: int
    samples: int


@dataclass(frozen=True)
class Segments(Sequence[Segment]):
    """The segments of a data set, by number: of equal size, a shorter one, and one of a last, shorter batch.

    Attributes
    ----------
    samples : int
        In the data set.
    batch_size : int
    at_once : int
        Batches in a segment, at most.

    Examples
    --------
    >>> list(Segments(samples=25, batch_size=3, at_once=5))
    [Segment(first=0, batches=5, samples=3), Segment(first=15, batches=3, samples=3), Segment(first=24, batches=1, samples=1)]
    """

    samples: int
    batch_size: int
    at_once: int

    @classmethod
    def of(cls, layout: Layout, samples: int, batch_size: int) -> Segments:
        """Cut by batch size and sample shape alone."""
        return cls(samples, batch_size, layout.batches_at_once(batch_size))

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.batch_size)
        return -(-whole // self.at_once) + bool(rest)

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> list[Segment]: ...

    def __getitem__(self, index: int | slice) -> Segment | list[Segment]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        whole, rest = divmod(self.samples, self.batch_size)
        first = index * self.at_once
        if first >= whole:
            return Segment(whole * self.batch_size, 1, rest)
        return Segment(first * self.batch_size, min(self.at_once, whole - first), self.batch_size)

    def run(self, segments: range) -> range:
        """The samples of a run of segments."""
        stops = [self[i].first if i < len(self) else self.samples for i in (segments.start, segments.stop)]
        return range(*stops)


def axis_choices(shape: tuple[int, ...]) -> list[str]:
    """What each --axis would mean for data of this shape.

    >>> axis_choices((8, 3, 32, 32))[0]
    '  --axis 1: 3 features (NCHW)'
    """
    hints = {
        (4, 1): " (NCHW)",
        (4, 3): " (NHWC)",
        (3, 1): " (NCL)",
        (3, 2): " (NLC)",
        (5, 1): " (NCDHW)",
        (5, 4): " (NDHWC)",
    }
    rank = len(shape)
    names = ["-1" if axis == rank - 1 else str(axis) for axis in range(rank)]
    return [f"  --axis {names[a]}: {shape[a]} features{hints.get((rank, a), '')}" for a in range(1, rank)]


def check_batch(layout: Layout, batch_size: int, samples: int) -> None:
    """Raise UsageError when every batch would have one value per feature."""
    if batch_size * layout.values_per_sample == 1 and samples > 1:
        raise UsageError(
            f"--batch-size {batch_size} gives every batch one value per feature, whose variance says nothing; use 2 or more"
        )


def options_record(spec: FitSpec) -> dict[str, Any]:
    """The options that are stored in the stats file with the conventions."""
    kept: dict[str, Any] = {"nan": spec.nan}
    if spec.fill_value is not None:
        kept["fill_value"] = spec.fill_value
    if spec.rows != (None, None):
        kept["rows"] = list(spec.rows)
    if spec.shuffled:
        kept |= {"shuffle": True, "seed": int(spec.seed)}
    if spec.holdout:
        kept |= {"holdout": float(spec.holdout), "seed": int(spec.seed)}
    if spec.like is not None:
        kept["like"] = spec.like if isinstance(spec.like, str) else "statistics in memory"
    if spec.preset:
        kept["preset"] = spec.preset
    return kept
