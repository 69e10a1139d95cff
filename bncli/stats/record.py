"""Stats, the fitted record: what a pass over data leaves behind, to and from a file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import BnError, InputError, MismatchError, UsageError, printable, reason_of
from bncli.numerics import batchnorm
from bncli.numerics.arrays import Array, Bools, Floats, to_array
from bncli.numerics.layout import feature_axis
from bncli.numerics.moments import Moments, Running
from bncli.stats import columns, container, storage
from bncli.stats.conventions import check_conventions
from bncli.stats.learned import Learned
from bncli.stats.portion import Portion
from bncli.stats.provenance import written_by
from bncli.stats.storage import FORMAT, FORMAT_VERSION
from bncli.system import atomic

SIZE_LIMIT = 16 << 30  # of a stats file; 100 bytes and more per feature
DRIFT_MEAN = 0.1  # in standard deviations
DRIFT_VARIANCE = 0.25  # relative
EPS_SHARE = 0.01  # of the variance


@dataclass(frozen=True, eq=False)
class Stats:
    """Fitted normalization statistics of C features. Frozen; checked when it is made.

    Attributes
    ----------
    running_mean, running_var : shape (C,)
        Folded batch by batch with the momentum; NaN where no batch gave two values.
    gamma, beta : shape (C,)
        Scale and shift of the normalized values.
    population : Moments of shape (C,)
        Count, mean and m2 of every value seen.
    running : Running or None
        What merging and resuming need; None for imported statistics.
    start : shape (2, C) or None
        Mean and variance that the recurrence started from, under init `like`.
    momentum : float or None
        Weight of the old value when a batch is folded; None means that the running statistics are the population's, the
        variance with ddof.
    eps, ddof, init, axis, batch_size, sample_shape
        The conventions of the fit (see docs/numerics.md). `sample_shape` is () where it is not known.
    num_samples, num_batches, num_left_out : int
        Samples seen, batches folded, and batches too small to fold.
    names : tuple of str or None
        Feature names.
    options : dict
        Other options of the fit: nan, fill_value, rows.
    kernel : str
        Which kernel computed the blocks.
    provenance : dict
        Versions, command line, inputs and time of the fit.
    learned : Learned or None
        What a fit that learned gamma and beta stores in addition.
    part : Portion or None
        Which segments of a fit these statistics are of, where they are a part of one (`part`).

    Raises
    ------
    MismatchError
        When the arrays do not belong together, or a variance is negative.
    """

    running_mean: Floats
    running_var: Floats
    gamma: Floats
    beta: Floats
    population: Moments
    running: Running | None = None
    momentum: float | None = 0.9
    eps: float = 1e-5
    ddof: int = 0
    init: str = "debias"
    axis: int = -1
    batch_size: int = 0
    num_samples: int = 0
    num_batches: int = 0
    num_left_out: int = 0
    sample_shape: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    kernel: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    learned: Learned | None = None
    start: Floats | None = None
    part: Portion | None = None

    def __post_init__(self) -> None:
        shape = (len(self.running_mean),)
        arrays = {name: getattr(self, name) for name in ("running_mean", "running_var", "gamma", "beta")}
        arrays |= {
            f"population {n}": getattr(self.population, n) for n in ("count", "mean", "m2", "minimum", "maximum")
        }
        for name, array in arrays.items():
            if array.shape != shape:
                raise MismatchError(f"{name} has shape {array.shape}, the running mean {shape}")
        if self.names is not None and len(self.names) != shape[0]:
            raise MismatchError(f"{len(self.names)} feature names for {shape[0]} features")
        check_storable(self.names or ())
        if (self.running_var < 0).any() or (self.population.m2 < 0).any():
            raise MismatchError("a variance is negative")
        if (self.minimum > self.maximum).any():
            raise MismatchError("a minimum is larger than the maximum")
        check_conventions(self.momentum, self.eps, self.ddof, self.init)
        if self.running is not None and (self.start is None) == (self.init == "like"):
            raise MismatchError(
                f"init {self.init} {'without' if self.start is None else 'with'} statistics to start from"
            )
        if self.start is not None and self.start.shape != (2, *shape):
            raise MismatchError(f"the start has shape {self.start.shape}, not {(2, *shape)}")
        if self.learned is not None:
            self.learned.check(shape[0])
        for name in ("momentum", "eps"):  # they may have been given as whole numbers, or as -0.0
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value) + 0.0)

    @property
    def num_features(self) -> int:
        """C."""
        return len(self.running_mean)

    @property
    def num_parameters(self) -> int:
        """Learned parameters: a gamma and a beta per feature, 2·C."""
        return 2 * self.num_features

    @property
    def population_count(self) -> npt.NDArray[np.int64]:
        """Values seen per feature, shape (C,)."""
        return self.population.count.astype(np.int64)

    @property
    def positions(self) -> int | None:
        """Values per feature that the samples seen have room for; None where that is not known."""
        positions = self.num_samples * math.prod(self.sample_shape) // max(self.num_features, 1)
        return positions if self.sample_shape and positions >= self.population_count.max(initial=0) else None

    @cached_property
    def population_mean(self) -> Floats:
        """Mean of every value seen, shape (C,); NaN where there was none."""
        return np.where(self.population.count > 0, self.population.mean, np.nan)

    @cached_property
    def population_var(self) -> Floats:
        """Variance (ddof 0) of every value seen, shape (C,); NaN where there was none."""
        return self.population.variance()

    @property
    def minimum(self) -> Floats:
        """Least of every value seen, shape (C,); NaN where there was none, or it is not known."""
        return np.where(self.population.count > 0, self.population.minimum, np.nan)

    @property
    def maximum(self) -> Floats:
        """Largest of every value seen, shape (C,); NaN where there was none, or it is not known."""
        return np.where(self.population.count > 0, self.population.maximum, np.nan)

    @property
    def missing(self) -> npt.NDArray[np.int64] | None:
        """Values that were missing or left out, shape (C,); None where the number of positions is not known."""
        return None if self.positions is None else self.positions - self.population_count

    def check_whole(self, where: str = "these statistics") -> None:
        """Raise MismatchError when they are of a part of the data alone."""
        if self.part is not None:
            raise MismatchError(
                f"{where}: {self.part} of a fit; merge all parts into the statistics of the whole first: bn merge"
            )

    def statistics(self, use: str = "running") -> tuple[Floats, Floats]:
        """Mean and variance for test mode, each of shape (C,).

        Parameters
        ----------
        use : "running" or "population"

        Raises
        ------
        MismatchError
            When the population is asked of statistics that have none (imported ones).
        """
        if use == "running":
            return self.running_mean, self.running_var
        if use != "population":
            raise UsageError(f"use {use!r} is neither 'running' nor 'population'")
        if not self.population.count.any():
            raise MismatchError(
                "these statistics were imported and hold no population statistics; use the running ones"
            )
        return self.population_mean, self.population_var

    def scale_shift(self, use: str = "running") -> tuple[Floats, Floats]:
        """Test mode as one y = scale · x + shift: two arrays of shape (C,).

        Raises
        ------
        MismatchError
            Counting the features whose scale or shift does not fit a float64.
        """
        scale, shift = self.line(use)
        bad = np.flatnonzero(np.isinf(scale) | np.isinf(shift))
        if bad.size:
            raise MismatchError(
                f"the scale or shift of {bad.size:,} of {self.num_features:,} features (the first: {bad[0]}) does not fit a "
                "float64; rescale the data or gamma"
            )
        return scale, shift

    def line(self, use: str = "running") -> tuple[Floats, Floats]:
        """`scale_shift`, with infinity for what does not fit a float64."""
        affine = batchnorm.Affine.of(*self.statistics(use), self.gamma, self.beta, self.eps)
        with np.errstate(over="ignore"):
            return affine.times / affine.over, affine(np.zeros(self.num_features))[0]

    def normalize(
        self, x: npt.ArrayLike, use: str = "running", axis: int | None = None, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """Test mode: y = gamma · (x - mean) / sqrt(var + eps) + beta; see `batchnorm.normalize`."""
        self.check_whole()
        mean, var = self.statistics(use)
        array, axis = self._fitting(x, axis)
        y = batchnorm.normalize(array, mean, var, self.gamma, self.beta, self.eps, axis, dtype)
        return y.reshape(to_array(x).shape)

    def denormalize(
        self, y: npt.ArrayLike, use: str = "running", axis: int | None = None, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """The inverse of `normalize`; see `batchnorm.denormalize`."""
        self.check_whole()
        mean, var = self.statistics(use)
        array, axis = self._fitting(y, axis)
        x = batchnorm.denormalize(array, mean, var, self.gamma, self.beta, self.eps, axis, dtype)
        return x.reshape(to_array(y).shape)

    def _fitting(self, x: npt.ArrayLike, axis: int | None) -> tuple[Array, int]:
        """The array, checked to fit these statistics, and its feature axis; one dimension is read as (N, 1)."""
        array = to_array(x)
        array = array.reshape(-1, 1) if array.ndim == 1 else array
        return array, self.check_shape(array.shape, axis, "the array")

    def check_shape(self, shape: tuple[int, ...], axis: int | None, where: str) -> int:
        """Return the feature axis of data of this shape (samples first).

        Raises
        ------
        MismatchError
            When the data differs from the fitted data in rank (unless `axis` is given) or in its number of features.
        """
        rank = len(self.sample_shape) + 1
        if axis is None and self.sample_shape and len(shape) != rank:
            raise MismatchError(
                f"{where} has {len(shape)} dimensions {shape}, the fitted data had {rank}; if the features are on another "
                "axis now, say which with --axis"
            )
        axis = feature_axis(len(shape), self.axis if axis is None else axis)
        if shape[axis] != self.num_features:
            raise MismatchError(
                f"{where} has {shape[axis]} features on axis {axis} (shape {shape}), the stats have {self.num_features}"
            )
        return axis

    def check_names(self, names: tuple[str, ...] | None, where: str) -> None:
        """Raise MismatchError when data has other feature names than the fitted data, where both have some."""
        if not self.names or not names or self.names == names:
            return
        differing = [(a, b) for a, b in zip(self.names, names, strict=False) if a != b]
        example = (
            f" ({printable(differing[0][0])} in the stats, {printable(differing[0][1])} in the data)"
            if differing
            else ""
        )
        raise MismatchError(f"{where}: its feature names differ from those of the stats{example}")

    def flags(self) -> list[list[str]]:
        """Flags of each feature: constant, drifted, missing, eps, no-population."""
        conditions = {
            "constant": self.constant,
            "drifted": self.drifted,
            "missing": np.isnan(self.running_mean),
            "eps": (self.running_var > 0) & (self.eps > EPS_SHARE * self.running_var),
            "no-population": (self.population.count == 0) & ~np.isnan(self.running_mean),
        }
        flags: list[list[str]] = [[] for _ in range(self.num_features)]
        for name, where in conditions.items():
            for i in np.flatnonzero(where):
                flags[i].append(name)
        return flags

    @property
    def constant(self) -> Bools:
        """Features whose values were all the same, shape (C,)."""
        constant: Bools = (self.population.count > 0) & (self.population.m2 == 0)
        return constant

    @property
    def drifted(self) -> Bools:
        """Features whose running statistics are far from the population's, shape (C,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            var = self.population_var
            mean_off = np.abs(self.running_mean - self.population_mean) > DRIFT_MEAN * np.sqrt(var)
            var_off = np.abs(self.running_var - self._population_var_ddof) > DRIFT_VARIANCE * var
        drifted: Bools = mean_off | var_off
        return drifted

    @property
    def _population_var_ddof(self) -> Floats:
        return self.population.variance(self.ddof)

    def as_dict(self) -> dict[str, Any]:
        """The record as plain values, ready for JSON: NaN becomes None, and so does what a float64 cannot hold."""
        more = {"learning": self.learned.as_dict()} if self.learned else {}
        more |= {"part": self.part.as_dict()} if self.part else {}
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "momentum": self.momentum,
            "eps": self.eps,
            "ddof": self.ddof,
            "init": self.init,
            "axis": self.axis,
            "batch_size": self.batch_size,
            "num_samples": self.num_samples,
            "num_batches": self.num_batches,
            "num_features": self.num_features,
            "num_parameters": self.num_parameters,
            "sources": [{k: v for k, v in s.items() if k != "passed_over"} for s in self.provenance.get("sources", [])],
            "features": [columns.for_json(row) for row in columns.rows(self)],
            **more,
        }

    def to_bytes(self) -> bytes:
        """The stats file, as described in docs/stats-file.md."""
        return storage.packed(self)

    @classmethod
    def from_bytes(cls, image: bytes, where: str) -> Stats:
        """Read what `to_bytes` made. Raises InputError naming `where` when the content is not a stats file."""
        arrays, attributes = container.unpack(image, where)
        if attributes.get("format") != FORMAT:
            raise InputError(f"{printable(where)}: an HDF5 file, but not a stats file; make one with 'bn fit'")
        version = attributes.get("format_version")
        if version not in storage.READABLE:
            writer = written_by(attributes)
            raise InputError(
                f"{printable(where)}: stats format {version}{writer}; this bn reads formats up to {FORMAT_VERSION}: upgrade bn"
            )
        try:
            return cls(**storage.unpacked(arrays, attributes))
        except (LookupError, ValueError, TypeError, AttributeError, BnError) as error:
            raise InputError(
                f"{printable(where)}: not a stats file of this format: {printable(reason_of(error))}"
            ) from None

    def save(self, path: str | os.PathLike[str], force: bool = True) -> None:
        """Write the stats file: whole and on disk, or not at all.

        Raises
        ------
        UsageError
            When the path is neither text nor a path, or empty.
        OutputExistsError
            When the file exists and `force` is false.
        WriteError
            When it cannot be written.
        """
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise UsageError(f"{path!r} is not the path of a file")
        atomic.write_bytes(os.fspath(path), self.to_bytes(), force=force)


def load(path: str | os.PathLike[str]) -> Stats:
    """Read a stats file.

    Raises
    ------
    UsageError
        When the path is neither text nor a path, or empty.
    InputError
        When the file is missing, unreadable, damaged, of a newer format, or not a stats file.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise UsageError(f"{path!r} is not the path of a stats file")
    path = os.fspath(path)
    if os.path.isfile(path) and os.access(path, os.R_OK):  # for anything else, read_bytes reports what it is
        container.check_file(path)  # a data file given by mistake may be larger than memory
    return Stats.from_bytes(atomic.read_bytes(path, SIZE_LIMIT), path)


def check_storable(names: Sequence[str]) -> None:
    """Raise MismatchError for a name that no file could keep."""
    for i, name in enumerate(names):
        if name[-1:] == "\0":  # which fixed lengths are padded with
            raise MismatchError(f"the name of feature {i}, {printable(name)!r}, ends in a NUL character; take it out")
        if not name.isascii() and name.encode(errors="replace").decode() != name:
            raise MismatchError(f"the name of feature {i}, {printable(name)!r}, holds half a character")
