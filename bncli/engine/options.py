"""The options of fit, apply and merge, each declared once; without NumPy, so that --help starts fast."""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bncli import choices
from bncli.choices import DEFAULT_MEMORY
from bncli.engine.declare import ADVANCED, INPUT, LEARNING, OUTPUT, RUNNING, STATISTICS, Declared, option
from bncli.engine.kinds import (
    CHOICE,
    FILL,
    FLAG,
    MOMENTUM,
    NUMBER,
    NUMBER_OR_PATH,
    PART,
    PATH,
    PATH_OR_DATA,
    ROWS,
    SIZE,
    TEXT,
    WHOLE,
    at_least,
    check_batch_size,
    check_like,
    check_on,
    check_part,
    named,
    no_file,
)
from bncli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bncli.stats.record import Stats

    Parameter = float | str | npt.NDArray[np.float64] | None


class Unset(enum.Enum):
    """The default of an option for which None is a value of its own."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return self.name


UNSET = Unset.UNSET
LEAST_MEMORY = 1 << 20


def _parameter(what: str, usual: str) -> Any:
    """The option for gamma or beta."""
    words = f"{what}: a number, an address of C values, or a stats file."
    return option(None, words, STATISTICS, NUMBER_OR_PATH, metavar="X", usual=usual, check=named)


@dataclass(frozen=True, eq=False, repr=False)
class Reading(Declared):
    """How inputs are read.

    Attributes
    ----------
    dataset : str, optional
        The dataset of inputs that name none.
    rows : (int or None, int or None)
        Python slice of the joined samples; also as text, "A:B".
    fill_value : number, optional
        Values equal to it, in the input's type, are missing.
    on : str, optional
        Who computes: "threads", "processes", "mpi", or "dask:ADDRESS" with the address or the file of a scheduler ("dask":
        that of the environment variable DASK_SCHEDULER_ADDRESS). Workers open the inputs by the addresses given.
    workers : int
        Threads or processes; 0 for all CPUs that the process may use.
    max_memory : int
        Bytes of buffers, of all workers together; also as text, "64M".
    allow_unwritten, allow_virtual : bool
        Read chunks that were never written as the fill value; read virtual datasets.
    """

    dataset: str | None = option(
        None, "Dataset in every input that names none.", INPUT, PATH, metavar="PATH", check=no_file, short="-d"
    )
    rows: tuple[int | None, int | None] = option(
        (None, None), "Only these samples: a Python slice of the joined inputs.", INPUT, ROWS, metavar="A:B"
    )
    fill_value: float | int | None = option(
        None, "Values equal to V, in the input's type, are missing.", INPUT, FILL, metavar="V"
    )
    on: str | None = option(
        None,
        "Who computes: threads, processes, dask:ADDRESS, mpi.",
        RUNNING,
        TEXT,
        metavar="ENGINE",
        usual="threads",
        check=check_on,
    )
    workers: int = option(
        0,
        "Number of threads or processes.",
        RUNNING,
        WHOLE,
        metavar="N",
        usual="all CPUs",
        check=at_least(0, "at least 1, or 0 for all CPUs"),
        short="-j",
    )
    max_memory: int = option(
        DEFAULT_MEMORY,
        "Maximum buffer memory, such as 64M or 1G.",
        RUNNING,
        SIZE,
        metavar="SIZE",
        usual="128M",
        check=at_least(LEAST_MEMORY, "at least 1M"),
    )
    allow_unwritten: bool = option(False, "Read HDF5 chunks that were never written as the fill value.", ADVANCED, FLAG)
    allow_virtual: bool = option(False, "Read virtual HDF5 datasets, from any file they name.", ADVANCED, FLAG)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rows", _row_range(self.rows))


@dataclass(frozen=True, eq=False, repr=False)
class FitOptions(Reading):
    """Options of a fit, named as on the command line. None means: from the preset or `like`, else bn's default.

    Making one reads no file; `FitSpec.of` reads `like` and fills in what is open.

    Attributes
    ----------
    momentum : float, "none" or None
        Weight of the old value when a batch is folded.
    like : str or Stats, optional
        Statistics, or their file, that give what is not given here of momentum, eps, ddof, axis, batch size, gamma and
        beta. Their running statistics are where the new ones start under init "like" alone.
    gamma, beta : number, str or array of shape (C,), optional
        A string is the address of an array, or a stats file. None means: of `like`, else 1 and 0.
    names : str or sequence of str, optional
        Address or file of feature names, or the names.
    shuffle : bool, optional
        Draw the samples in an order of `seed`; see `order.Order`. None: where gamma and beta are learned.
    seed : int
        0 to 2^64 - 1.
    target : str or array, optional
        What gamma and beta are learned from: an address, "::/path" in every input, or an array.
    lr : float, optional
        Learning rate, constant. None: the default's, which falls to 0.
    holdout : float, optional
        Fraction of the samples that are kept out of learning, 0 <= F < 1.
    part : (int, int), optional
        Which of how many nearly equal runs of segments are accumulated, counted from 1; also as text, "3/64".
    """

    nan: choices.Nan = option(
        "error", "Reject or skip NaN and infinity.", INPUT, CHOICE, choices=choices.NANS, usual="error"
    )
    names: str | Sequence[str] | None = option(
        None,
        "Feature names: a text file, one a line, or FILE.h5::/path.",
        INPUT,
        PATH_OR_DATA,
        metavar="ADDRESS|FILE",
        check=named,
    )
    shuffle: bool | None = option(None, "Draw the samples in a seeded order.", INPUT, FLAG, usual="only when learning")
    seed: int = option(
        0,
        "Random seed.",
        INPUT,
        WHOLE,
        metavar="S",
        usual="0",
        check=lambda seed: "" if 0 <= seed < 1 << 64 else "a whole number from 0 to 2^64 - 1",
    )
    momentum: float | str | None = option(
        None, "Weight of the OLD value, 0 <= M < 1.", STATISTICS, MOMENTUM, metavar="M|none", usual="0.9"
    )
    eps: float | None = option(
        None, "Added to the variance when applied.", STATISTICS, NUMBER, metavar="E", usual="1e-5"
    )
    batch_size: int | None = option(
        None, "Samples per batch.", STATISTICS, WHOLE, metavar="N", usual="256", check=check_batch_size
    )
    axis: int | None = option(
        None, "Axis of the features.", STATISTICS, WHOLE, metavar="K", usual="-1 for one and two dimensions"
    )
    init: choices.Init | None = option(
        None,
        "Initial running statistics; like: those of --like.",
        STATISTICS,
        CHOICE,
        choices=choices.INITS,
        usual="debias",
    )
    ddof: int | None = option(
        None,
        "1 folds the unbiased variance, as PyTorch does.",
        STATISTICS,
        WHOLE,
        metavar="0|1",
        usual="0",
        check=lambda ddof: "" if ddof in (0, 1) else "neither 0 nor 1",
    )
    preset: choices.PresetName | None = option(
        None,
        "Momentum, eps, ddof, init and axis of a framework; options given with it take precedence.",
        STATISTICS,
        CHOICE,
        choices=choices.PRESET_NAMES,
    )
    like: str | Stats | None = option(
        None,
        "Conventions, gamma and beta of another fit, with new statistics. For AdaBN or precise BN add --momentum none.",
        STATISTICS,
        PATH_OR_DATA,
        metavar="STATS",
        check=check_like,
    )
    gamma: Parameter = _parameter("Scale", usual="1")
    beta: Parameter = _parameter("Shift", usual="0")
    target: str | npt.NDArray[Any] | None = option(
        None,
        "Learn gamma and beta from this; ::/y is in every input.",
        LEARNING,
        PATH_OR_DATA,
        metavar="ADDRESS",
        check=no_file,
    )
    loss: choices.Loss | None = option(
        None, "What is minimized.", LEARNING, CHOICE, choices=choices.LOSSES, usual="by the target's type"
    )
    activation: choices.Activation | None = option(
        None, "Applied after gamma and beta.", LEARNING, CHOICE, choices=choices.ACTIVATIONS, usual="by the loss"
    )
    optimizer: choices.Optimizer | None = option(
        None, "How gamma and beta are updated.", LEARNING, CHOICE, choices=choices.OPTIMIZERS, usual="adam"
    )
    lr: float | None = option(
        None,
        "Constant learning rate.",
        LEARNING,
        NUMBER,
        metavar="R",
        usual="one that falls to 0",
        check=lambda lr: "" if math.isfinite(lr) and lr > 0 else "a learning rate is a finite number above 0",
    )
    epochs: int | None = option(
        None,
        "Passes over the data.",
        LEARNING,
        WHOLE,
        metavar="N",
        usual="1,000 steps or more",
        check=at_least(1, "at least 1"),
    )
    holdout: float | None = option(
        None,
        "Fraction of the samples kept out of learning.",
        LEARNING,
        NUMBER,
        metavar="F",
        usual="0",
        check=lambda held: "" if 0 <= held < 1 else "a fraction of the samples, 0 <= F < 1",
    )

    part: tuple[int, int] | None = option(
        None, "Only the I-th of N parts; bn merge joins them.", RUNNING, PART, metavar="I/N", check=check_part
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part is not None:
            object.__setattr__(self, "part", tuple(self.part))
        if self.names is not None and not isinstance(self.names, str):
            object.__setattr__(self, "names", _texts(self.names))

    @property
    def shuffled(self) -> bool:
        """Whether the samples are drawn in a seeded order: as asked, else where gamma and beta are learned."""
        return self.target is not None if self.shuffle is None else self.shuffle

    def check_together(self) -> None:
        """Raise UsageError where options exclude or need each other."""
        if self.like is not None and self.preset is not None:
            raise UsageError(
                "--preset and --like each set momentum, eps, ddof, init and axis; give one of them, and with it the options "
                "that are to differ"
            )
        for name in ("loss", "activation", "optimizer", "lr", "epochs", "holdout"):
            if getattr(self, name) is not None and self.target is None:
                raise UsageError(f"--{name} is for learning gamma and beta; give it together with --target")
        if self.target is not None and self.part is not None:
            raise UsageError(
                "--part together with --target: learning reads all samples, one after the other; leave out --part"
            )
        if self.target is not None and self.on not in (None, "threads"):
            raise UsageError(f"--on {self.on} together with --target: learning runs in one process; leave out --on")
        if self.target is not None and (self.nan == "omit" or self.fill_value is not None):
            given = "--nan omit" if self.nan == "omit" else "--fill-value"
            raise UsageError(
                f"{given} together with --target: learning needs every value; leave out samples that lack one"
            )


@dataclass(frozen=True, eq=False, repr=False)
class ApplySpec(Reading):
    """Options of `bn apply`, named as on the command line."""

    axis: int | None = option(None, "Axis of the features.", INPUT, WHOLE, metavar="K", usual="that of the fit")
    inverse: bool = option(False, "Undo normalization.", STATISTICS, FLAG)
    use: choices.Use = option("running", "Which statistics.", STATISTICS, CHOICE, choices=choices.USES, usual="running")
    dtype: choices.FloatType | None = option(
        None, "Type of the output.", OUTPUT, CHOICE, choices=choices.FLOAT_TYPES, usual="input's, else float32"
    )
    copy_others: bool = option(False, "Copy the HDF5 file's other datasets too.", OUTPUT, FLAG)
    force: bool = option(False, "Replace an output that exists.", OUTPUT, FLAG, short="-f")


@dataclass(frozen=True, eq=False, repr=False)
class MergeSpec(Declared):
    """Options of `bn merge`, named as on the command line; see `merge`."""

    population_only: bool = option(
        False,
        "Merge the population statistics alone and use them as the running statistics.",
        STATISTICS,
        FLAG,
    )
    gamma: Parameter = _parameter("Scale", usual="the files'")
    beta: Parameter = _parameter("Shift", usual="the files'")


def _row_range(rows: object) -> tuple[int | None, int | None]:
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
    """Feature names as strings, from any sequence."""
    try:
        if isinstance(names, (bytes, Mapping, Set)) or not hasattr(names, "__len__") or any(n is None for n in names):
            raise TypeError  # a set has no order, an iterator is used up
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    except (TypeError, UnicodeDecodeError):
        raise UsageError(f"names {names!r:.60} is neither an address nor a sequence of names") from None
