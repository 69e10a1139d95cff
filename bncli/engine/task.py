"""A fit before its first value is read: what follows from the options and from the shape of the data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bncli.engine.accumulate import finish
from bncli.engine.learning.setup import open_target
from bncli.engine.options import FitOptions
from bncli.engine.parameters import affine_and_names
from bncli.engine.plan import FitSpec, Segments, check_batch, options_record
from bncli.engine.tree import Fold
from bncli.errors import printable
from bncli.formats.address import split
from bncli.formats.dataset import DataSet, Input, Joined
from bncli.numerics import compiled
from bncli.numerics.arrays import Floats
from bncli.numerics.layout import Layout
from bncli.stats.conventions import Conventions
from bncli.stats.learned import Learned
from bncli.stats.portion import Portion
from bncli.stats.provenance import provenance
from bncli.stats.record import Stats
from bncli.version import __version__

# options that do not change the result of the whole, or are in an input's record
FREE = ("workers", "max_memory", "dataset", "part", "on")


@dataclass(frozen=True)
class Setting:
    """What follows from the options and from the shape of the data, before a value is read.

    Attributes
    ----------
    spec : FitSpec
    batch_size : int
        Samples in a batch, from the options or from the first batch of an iterable.
    sample_shape : tuple of int
    axis : int
    layout : Layout
    conventions : Conventions
    gamma, beta : shape (C,)
    names : tuple of str or None
    """

    spec: FitSpec
    batch_size: int
    sample_shape: tuple[int, ...]
    axis: int
    layout: Layout
    conventions: Conventions
    gamma: Floats
    beta: Floats
    names: tuple[str, ...] | None

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], names: tuple[str, ...] | None, spec: FitSpec, batch_size: int) -> Setting:
        """Check data and options together.

        Raises
        ------
        UsageError, MismatchError, InputError
            When they do not fit, or gamma, beta or names cannot be read.
        """
        axis = spec.feature_axis(shape)
        layout = Layout.of(shape, axis)
        check_batch(layout, batch_size, shape[0])
        gamma, beta, names = affine_and_names(spec, layout.features, names)
        return Setting(spec, batch_size, shape[1:], axis, layout, spec.conventions(), gamma, beta, names)

    def record(
        self,
        fold: Fold,
        sources: list[dict[str, Any]],
        learned: Learned | None = None,
        part: Portion | None = None,
    ) -> Stats:
        """Make the Stats of what was folded; warns and raises as `finish`."""
        return finish(
            fold,
            self.conventions,
            names=self.names,
            axis=self.axis,
            batch_size=self.batch_size,
            sample_shape=self.sample_shape,
            gamma=self.gamma,
            beta=self.beta,
            learned=learned,
            part=part,
            options=options_record(self.spec),
            kernel=compiled.NAME,
            provenance=provenance(sources),
        )


@dataclass(frozen=True)
class Task(Setting):
    """A fit of a data set, before the first value is read."""

    data: DataSet

    @classmethod
    def of(cls, data: DataSet, spec: FitSpec) -> Task:
        """Check data and options together; raises as `Setting.of_shape`."""
        return cls(**vars(Setting.of_shape(data.shape, data.names, spec, spec.batch_size)), data=data)

    def segments(self) -> Segments:
        """The work."""
        return Segments.of(self.layout, self.data.shape[0], self.batch_size)

    def run(self) -> range:
        """The segments to accumulate: all, or those of the part that was asked for."""
        total, (number, of) = len(self.segments()), self.spec.part or (1, 1)
        return range(total * (number - 1) // of, total * number // of)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that affects the result, as plain values; checkpoints and parts are compared by it."""
        options = {f.name: getattr(self.spec, f.name) for f in fields(FitOptions) if f.name not in FREE}
        inputs = [source_record(i) | {"times_ns": i.times_ns} for i in self.data.inputs]
        return {
            "bn version": __version__,
            "numpy version": np.__version__,
            "kernel": compiled.NAME,
            "inputs": inputs,
            **options,
            "like": _content(self.spec.reference.to_bytes()) if self.spec.reference else None,
            "target": self._targets(),
            **{name: value for name, value in vars(self.conventions).items() if name != "start"},  # of `like`
            "axis": self.axis,
            "samples per segment": self.layout.batches_at_once(self.spec.batch_size) * self.spec.batch_size,
            "gamma": _content(self.gamma.tobytes()),
            "beta": _content(self.beta.tobytes()),
            "names": _content(repr(self.names).encode()),
        }

    def state_of(self) -> dict[str, Any]:
        """`fingerprint`, and which part; a checkpoint is compared by it."""
        return self.fingerprint() | {"part": "{}/{}".format(*self.spec.part) if self.spec.part else None}

    def _targets(self) -> str | None:
        """Addresses of the target's inputs, each with a hash of its shape, type, size and times; None without a target."""
        if self.spec.target is None or not isinstance(self.data, Joined):
            return None
        with open_target(self.spec, self.data) as targets:
            records = [source_record(i) | {"times_ns": i.times_ns} for i in targets.inputs]
        return ", ".join(f"{printable(r['name'])} ({_content(repr(r).encode())})" for r in records)


def _content(values: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(values).hexdigest()[:12]}…"


def source_record(entry: Input) -> dict[str, Any]:
    """What is kept of an input in the provenance."""
    path, dataset = split(entry.address)
    shape, dtype = list(entry.shape), entry.dtype.name
    return {"name": path, "dataset": dataset, "shape": shape, "dtype": dtype, "size": entry.size}
