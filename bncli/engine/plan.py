"""What a fit is asked to do (FitSpec), and how its work is cut into segments."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from bncli.errors import BnWarning, UsageError
from bncli.formats.reading import DEFAULT_MEMORY
from bncli.numerics.layout import Layout
from bncli.numerics.learning import ACTIVATIONS, LOSSES, OPTIMIZERS
from bncli.stats.conventions import DEFAULTS, PRESETS, Conventions, check_conventions
from bncli.stats.record import Stats, load
from bncli.stats.warnings import momentum_advice

KINDS: dict[str, tuple[type, ...]] = {
    "momentum": (float, int, str),
    "eps": (float, int),
    "ddof": (int,),
    "init": (str,),
    "axis": (int,),
    "preset": (str,),
    "like": (str, Stats),
    "batch_size": (int,),
    "dataset": (str,),
    "nan": (str,),
    "fill_value": (float, int),
    "shuffle": (bool,),
    "seed": (int,),
    "loss": (str,),
    "activation": (str,),
    "optimizer": (str,),
    "lr": (float, int),
    "epochs": (int,),
    "holdout": (float, int),
    "workers": (int,),
    "max_memory": (int,),
    "allow_unwritten": (bool,),
    "allow_virtual": (bool,),
}


class Progress(Protocol):
    """What is called as a run goes on."""

    def __call__(self, done: int, total: int | None, size: int, note: str = "", /) -> None:
        """Samples done, samples in all, bytes done, and what else there is to say."""


@dataclass(frozen=True)
class FitSpec:
    """Options of a fit, named as on the command line. None means: from the preset, else bn's default.

    Attributes
    ----------
    momentum : float, "none" or None
        Weight of the old value when a batch is folded.
    like : str or Stats, optional
        Statistics, or their file, that give what is not given here of momentum, eps, ddof, axis, batch size, gamma and
        beta. Their running statistics are where the new ones start under init "like" alone.
    gamma, beta : float or str, optional
        A number, or the address of an array of shape (C,). None means: of `like`, else 1 and 0.
    names : str or sequence of str, optional
        Address or file of feature names, or the names.
    rows : (int or None, int or None)
        Python slice of the joined samples.
    shuffle : bool, optional
        Draw the samples in an order of `seed`; see `order.Order`. None: where gamma and beta are learned.
    seed : int
        0 to 2^64 - 1.
    target : str or array, optional
        What gamma and beta are learned from: an address, "::/path" in every input, or an array.
    loss, activation, optimizer : str, optional
        See `affine`.
    lr : float, optional
        Learning rate, constant. None: the default's, which falls to 0.
    epochs : int, optional
    holdout : float, optional
        Fraction of the samples that are kept out of learning, 0 <= F < 1.
    workers : int
        Threads; 0 for all CPUs that the process may use.
    max_memory : int
        Bytes of buffers, of all workers together.
    """

    momentum: float | str | None = None
    eps: float | None = None
    ddof: int | None = None
    init: str | None = None
    axis: int | None = None
    preset: str | None = None
    like: str | Stats | None = None
    batch_size: int = cast(int, None)  # None is only given: it becomes that of `like`, else 256
    dataset: str | None = None
    rows: tuple[int | None, int | None] = (None, None)
    gamma: float | str | None = None
    beta: float | str | None = None
    names: str | Sequence[str] | None = None
    nan: str = "error"
    fill_value: float | int | None = None
    shuffle: bool | None = None
    seed: int = 0
    target: str | npt.NDArray[Any] | None = None
    loss: str | None = None
    activation: str | None = None
    optimizer: str | None = None
    lr: float | None = None
    epochs: int | None = None
    holdout: float | None = None
    workers: int = 0
    max_memory: int = DEFAULT_MEMORY
    allow_unwritten: bool = False
    allow_virtual: bool = False

    def __post_init__(self) -> None:
        self._make_plain()
        for name, kinds in KINDS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                raise UsageError(f"{name} {value!r} is not {' or '.join(k.__name__ for k in kinds)}")
        if self.like is not None and self.preset is not None:
            raise UsageError(
                "--preset and --like each set momentum, eps, ddof, init and axis; give one of them, and beside it the options "
                "that are to differ"
            )
        if self.batch_size is None:
            # filled in here: everybody reads it, and nobody wants to ask where it came from
            object.__setattr__(self, "batch_size", (self.reference and self.reference.batch_size) or 256)
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: a batch needs at least one sample")
        if self.batch_size >= 1 << 62:
            raise UsageError(f"--batch-size {self.batch_size}: larger than any data")
        if self.nan not in ("error", "omit"):
            raise UsageError(f"nan {self.nan!r} is neither 'error' nor 'omit'")
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"preset {self.preset!r} is not one of {', '.join(PRESETS)}")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed {self.seed}: a whole number from 0 to 2^64 - 1")
        self._check_learning()
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers}: at least 1, or 0 for all CPUs")
        if self.max_memory < 1 << 20:
            raise UsageError("--max-memory must be at least 1M")
        found = self.conventions()
        like = self.reference.provenance.get("imported", {}) if self.reference else {}
        given = None if self.momentum is None else found.momentum
        if advice := momentum_advice(given, self.preset or like.get("format")):
            warnings.warn(advice, BnWarning, stacklevel=4)

    @cached_property
    def reference(self) -> Stats | None:
        """The statistics of `like`, read from their file when they are first asked for."""
        return load(self.like) if isinstance(self.like, str) else self.like

    @property
    def shuffled(self) -> bool:
        """Whether the samples are drawn in a seeded order: as asked, else where gamma and beta are learned."""
        return self.target is not None if self.shuffle is None else self.shuffle

    def _make_plain(self) -> None:
        """NumPy's numbers become Python's, a list of two rows a pair, and names texts; done once, for all readers."""
        plain = {name: getattr(self, name).item() for name in KINDS if isinstance(getattr(self, name), np.generic)}
        plain["rows"] = _row_range(self.rows)
        if self.names is not None and not isinstance(self.names, str):
            plain["names"] = _texts(self.names)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def _check_learning(self) -> None:
        if self.holdout is not None and not 0 <= self.holdout < 1:
            raise UsageError(f"--holdout {self.holdout}: a fraction of the samples, 0 <= F < 1")
        known = {"loss": LOSSES, "activation": ACTIVATIONS, "optimizer": OPTIMIZERS}
        for name in (*known, "lr", "epochs", "holdout"):
            value = getattr(self, name)
            if value is not None and self.target is None:
                raise UsageError(f"--{name} is for learning gamma and beta; give it together with --target")
            if value is not None and name in known and value not in known[name]:
                raise UsageError(f"--{name} {value!r} is not one of {', '.join(known[name])}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr {self.lr}: a learning rate is a finite number above 0")
        if self.epochs is not None and self.epochs < 1:
            raise UsageError(f"--epochs {self.epochs}: at least 1")
        if self.target is not None and (self.nan == "omit" or self.fill_value is not None):
            option = "--nan omit" if self.nan == "omit" else "--fill-value"
            raise UsageError(
                f"{option} together with --target: learning needs every value; leave out samples that lack one"
            )

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


def segments(layout: Layout, samples: int, batch_size: int) -> Iterator[Segment]:
    """Cut the data set: segments of equal size, a shorter one, and one of a last, shorter batch."""
    at_once = layout.batches_at_once(batch_size)
    whole, rest = divmod(samples, batch_size)
    for batch in range(0, whole, at_once):
        yield Segment(batch * batch_size, min(at_once, whole - batch), batch_size)
    if rest:
        yield Segment(whole * batch_size, 1, rest)


def _row_range(rows: Any) -> tuple[int | None, int | None]:
    """Start and stop of a range of samples."""
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        raise UsageError(
            f"rows {rows!r} is not a range of samples; give (start, stop), without a step: every sample between counts"
        )
    try:
        start, stop = (None if end is None else operator.index(end) for end in rows)
    except TypeError:
        raise UsageError(f"rows {rows!r}: start and stop are whole numbers or None") from None
    return start, stop


def _texts(names: Any) -> tuple[str, ...]:
    """Feature names as texts, whatever sequence they come in."""
    try:
        if isinstance(names, bytes) or any(name is None for name in names):
            raise TypeError
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    except (TypeError, UnicodeDecodeError):
        raise UsageError(f"names {names!r:.60} is neither an address nor a sequence of names") from None


def parse_rows(text: str) -> tuple[int | None, int | None]:
    """A Python slice A:B of samples.

    >>> parse_rows("100:"), parse_rows(":-10")
    ((100, None), (None, -10))
    """
    try:
        start, stop = (int(part) if part.strip() else None for part in text.split(":"))
    except ValueError:
        raise UsageError(f"--rows {text!r} is not a slice A:B of samples, such as 0:1000, 1000: or :-100") from None
    return start, stop


def parse_size(text: str) -> int:
    """A number of bytes with an optional unit K, M or G (of 1024).

    >>> parse_size("128M")
    134217728
    """
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    cleaned = text.strip().upper().removesuffix("B").removesuffix("I").strip()
    number, unit = (cleaned[:-1], cleaned[-1:]) if cleaned[-1:] in ("K", "M", "G") else (cleaned, "")
    try:
        size = float(number) * units[unit]
    except ValueError:
        size = math.nan
    if not size >= 0 or math.isinf(size):
        raise UsageError(f"{text!r} is not a size such as 128M or 1G")
    return int(size)


def number_or_address(text: str) -> float | str:
    """A number, else the address of an array."""
    try:
        return float(text)
    except ValueError:
        return text


def options_record(spec: FitSpec) -> dict[str, Any]:
    """The options that are kept in the stats file beside the conventions."""
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
