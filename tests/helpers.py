"""Exact truth in rational numbers, and data that is hard on floating point. Independent of bncli's arithmetic."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st

from bncli import Stats
from bncli.errors import BnWarning
from bncli.stats import container

Array = npt.NDArray[Any]

STATISTICS = 5e-15  # mean relative to max(|mean|, sd), variance relative to itself
RECURRENCE = 1e-14  # running statistics against the plain recurrence
PRESETS = {  # momentum (weight of the old value), eps, ddof, init, axis: the contract's, written independently of bncli
    "torch": (0.9, 1e-5, 1, "unit", 1),
    "keras": (0.99, 1e-3, 0, "unit", -1),
    "flax": (0.99, 1e-5, 0, "unit", -1),
    "onnx": (0.9, 1e-5, 0, "unit", 1),
    "cs231n": (0.9, 1e-5, 0, "zeros", -1),
}
DTYPES = ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")


class Exact(NamedTuple):
    """Count, mean and population variance of stored numbers, without any rounding."""

    count: int
    mean: Fraction
    variance: Fraction

    def folded(self, ddof: int) -> Fraction:
        """The variance that a batch folds: divided by n - ddof."""
        return self.variance * self.count / (self.count - ddof)


def exact(values: Iterable[Any]) -> Exact:
    """Exact moments of the numbers as they are stored (1-D). Scaled to integers first: much faster than Fractions."""
    ratios = [v.as_integer_ratio() for v in np.asarray(values).reshape(-1).tolist()]
    if not ratios:
        return Exact(0, Fraction(0), Fraction(0))
    scale = max(denominator for _, denominator in ratios)  # powers of two
    whole = [numerator * (scale // denominator) for numerator, denominator in ratios]
    n, total, squares = len(whole), sum(whole), sum(v * v for v in whole)
    return Exact(n, Fraction(total, n * scale), Fraction(n * squares - total * total, n * n * scale * scale))


def exact_columns(x: Array, axis: int = -1) -> list[Exact]:
    """Exact moments of each feature of an array."""
    return [exact(column) for column in np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)]


def root(value: Fraction) -> Fraction:
    """Square root to some 15 digits, also beyond the range of a float."""
    if value <= 0:
        return Fraction(0)
    shift = (value.numerator.bit_length() - value.denominator.bit_length()) // 2
    return Fraction(float(value / Fraction(4) ** shift) ** 0.5) * Fraction(2) ** shift


def off(found: float, truth: Fraction, scale: Fraction) -> float:
    """|found - truth| / scale; 0 when both are equal, infinity when found is not finite."""
    if not np.isfinite(found):
        return float("inf")
    difference = abs(Fraction(float(found)) - truth)
    if difference == 0:
        return 0.0
    return float(difference / scale) if scale else float("inf")


def mean_error(found: float, truth: Exact) -> float:
    """Error of a mean relative to max(|mean|, sd)."""
    return off(found, truth.mean, max(abs(truth.mean), root(truth.variance)))


def variance_error(found: float, truth: Fraction) -> float:
    """Relative error of a variance; a variance of 0 must be exactly 0."""
    return off(found, truth, truth)


def check_moments(mean: Array, variance: Array, truth: Sequence[Exact], tolerance: float = STATISTICS) -> None:
    """Assert means and variances, of shape (C,), against the truth of each feature."""
    assert len(mean) == len(variance) == len(truth)
    for feature, (m, v, t) in enumerate(zip(mean.tolist(), variance.tolist(), truth, strict=True)):
        if t.count == 0:
            assert np.isnan(m)
            assert np.isnan(v)
            continue
        assert mean_error(m, t) <= tolerance, (feature, m, float(t.mean))
        assert variance_error(v, t.variance) <= tolerance, (feature, v, float(t.variance))


class Recurrence(NamedTuple):
    """The plain recurrence over exact statistics: its end, and the scale its error is measured on."""

    value: Fraction
    scale: Fraction


def recurrence(statistics: Sequence[Fraction], momentum: float, init: str, start: int) -> Recurrence:
    """r <- m·r + (1 - m)·s over the folded statistics, in Fraction.

    `start` is r0 for init `unit` (0 for a mean, 1 for a variance). `debias` divides the recurrence from zero by
    1 - m^k (Adam's correction). The scale is max(|r|, w·spread), with spread the distance between the largest and the
    smallest statistic and w the weight that the statistics have in r (1 for debias, else 1 - m^k).
    """
    m = Fraction(momentum)
    r = {"debias": Fraction(0), "zeros": Fraction(0), "unit": Fraction(start), "first": statistics[0]}[init]
    for s in statistics:
        r = m * r + (1 - m) * s
    weight = 1 - m ** len(statistics)
    if init == "debias":
        r, weight = r / weight, Fraction(1)
    return Recurrence(r, max(abs(r), weight * (max(statistics) - min(statistics))))


def check_running(
    stats: Stats, batches: Sequence[Array], momentum: float, init: str, ddof: int = 0, tolerance: float = RECURRENCE
) -> None:
    """Assert the running statistics of (n, C) batches against the recurrence over exact batch statistics.

    NaN marks a value that does not count. A mean of a batch is exact to its max(|mean|, sd), so that is part of the scale.
    """
    for feature in range(stats.num_features):
        columns = [batch[:, feature] for batch in batches]
        truths = [exact(c[~np.isnan(c)] if c.dtype.kind == "f" else c) for c in columns]
        truths = [t for t in truths if t.count >= 2]
        if not truths:
            assert np.isnan(stats.running_mean[feature])
            assert np.isnan(stats.running_var[feature])
            continue
        mean = recurrence([t.mean for t in truths], momentum, init, 0)
        var = recurrence([t.folded(ddof) for t in truths], momentum, init, 1)
        weight = 1 if init in ("debias", "first") else 1 - Fraction(momentum) ** len(truths)  # of a batch's own error
        own = weight * max(max(abs(t.mean), root(t.variance)) for t in truths)
        assert off(stats.running_mean[feature], mean.value, max(mean.scale, own)) <= tolerance, feature
        assert off(stats.running_var[feature], var.value, var.scale) <= tolerance, feature


def cut(x: Array, batch_size: int) -> list[Array]:
    """Consecutive batches of `batch_size` samples; the last may be shorter."""
    return [x[i : i + batch_size] for i in range(0, len(x), batch_size)]


def bits(stats: Stats) -> dict[str, bytes]:
    """Every number of a stats file, as bytes."""
    assert stats.running is not None
    numbers: dict[str, Array] = {"running_mean": stats.running_mean, "running_var": stats.running_var}
    for name in ("count", "mean", "mean_low", "m2", "m2_low", "minimum", "maximum"):
        numbers["population/" + name] = getattr(stats.population, name)
    numbers["state/k"] = np.broadcast_to(stats.running.k[0], stats.running_mean.shape)
    for name in ("a", "a_low", "first"):
        numbers["state/" + name] = getattr(stats.running, name)
    return {name: np.ascontiguousarray(values, np.float64).tobytes() for name, values in numbers.items()}


def check_same_bytes(one: Stats, other: Stats) -> None:
    """Assert that every number of two fits is the same, bit for bit."""
    assert bits(one) == bits(other)
    assert (one.num_samples, one.num_batches, one.num_left_out) == (
        other.num_samples,
        other.num_batches,
        other.num_left_out,
    )


def check_same_files(one: Path, other: Path) -> None:
    """Assert that two stats files hold the same datasets and attributes, but for provenance and digest."""
    (arrays, attributes), (others, more) = (container.unpack(path.read_bytes(), str(path)) for path in (one, other))
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in others.items()
    }
    assert {n: repr(v) for n, v in attributes.items() if n != "provenance"} == {
        n: repr(v) for n, v in more.items() if n != "provenance"
    }


@contextlib.contextmanager
def advised(*words: str) -> Iterator[None]:
    """Allow the advice of a fit whose text holds one of `words`; other warnings stay errors.

    For tests of numbers whose data happens to drift or to be constant. What the advice says is tested elsewhere.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        text = str(warning.message)
        assert issubclass(warning.category, BnWarning), text
        assert any(word in text for word in words), text


ANY_ADVICE = (
    "running statistics of",
    "constant",
    "so small that eps",
    "no batch with two values",
    "were missing",
    "left out",
)


def save_h5(path: Path, values: Array, name: str = "x", **options: Any) -> str:
    """Write an HDF5 file with one dataset; returns its path."""
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=values, **options)
    return str(path)


def save_npy(path: Path, values: Array) -> str:
    """Write a .npy file; returns its path."""
    np.save(path, values)
    return str(path)


def peer(name: str) -> ModuleType:
    """Import a package to compare with; skip the test without it, or fail where BN_REQUIRE_PEERS=1."""
    if os.environ.get("BN_REQUIRE_PEERS") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)  # type: ignore[no-any-return]


# data that is hard on floating point

PATTERNS = (
    "normal",
    "sorted",
    "reversed",
    "period8",
    "alternating",
    "steps",
    "outlier",
    "two_values",
    "spikes",
    "drift",
)


def pattern(kind: str, rng: np.random.Generator, n: int, c: int) -> Array:
    """Deviations of sd about 1, of shape (n, c), in an order that is adversarial."""
    x = rng.standard_normal((n, c))
    rows = np.arange(n)[:, None]
    if kind == "sorted":
        return np.sort(x, axis=0)
    if kind == "reversed":
        return np.sort(x, axis=0)[::-1].copy()
    if kind == "period8":  # every 8th value unlike the others, which are all the same
        return np.where(rows % 8 == 0, rng.random(c) + 1, -rng.random(c))
    if kind == "alternating":
        return np.where(rows % 2 == 0, rng.random(c) + 0.5, -rng.random(c) - 0.5)
    if kind == "steps":  # constant in blocks
        return x[rows[:, 0] // 16 * 16 % n]
    if kind == "outlier":
        x[0] = 1e6
        return x
    if kind == "two_values":
        return np.where(rng.random((n, c)) < 0.07, rng.random(c), rng.random(c) + 1)
    if kind == "spikes":
        return x * 1e-3 + (rows % 8 == 0)
    if kind == "drift":
        return x * 1e-2 + rows / max(1, n)
    return x


@st.composite
def tables(draw: st.DrawFn, max_samples: int = 400, max_features: int = 5) -> Array:
    """float64 tables (N, C): 0 or magnitudes 1e-140 to 1e140, |mean| / sd up to 1e8, every pattern, -1 too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, c = draw(st.integers(2, max_samples)), draw(st.integers(1, max_features))
    kind = draw(st.sampled_from(PATTERNS))
    ratio = draw(st.sampled_from([0.0, 0.3, 1.0, 1e3, 1e8]))
    # no spread below 1e-140 and no value beyond 1e140, the outlier included
    scale = 10.0 ** rng.uniform(-130, 120, c) if draw(st.booleans()) else rng.uniform(0.1, 10, c)
    x = pattern(kind, rng, n, c)
    spread = x.std(axis=0)
    x = (x + draw(st.sampled_from([1, -1])) * ratio * np.where(spread > 0, spread, 1)) * scale
    if draw(st.booleans()):
        x[np.abs(x) < np.abs(x).max(axis=0) * 0.01] = 0
    assert (np.abs(x) < 1e140).all()
    x[np.abs(x) < 1e-140] = 0
    return x


def as_type(x: Array, dtype: str) -> Array:
    """Stored numbers of another type from a float64 table: columns brought into the type's range, then rounded."""
    kind = np.dtype(dtype)
    top = np.abs(x).max(axis=0)
    unit = x / np.where(top > 0, top, 1)  # -1 to 1
    if kind.kind == "b":
        return unit > 0.5
    if kind.kind in "iu":
        limit = float(min(np.iinfo(kind).max, 2**53))
        return np.rint((np.abs(unit) if kind.kind == "u" else unit) * limit).astype(kind)
    limits = {2: (1e-4, 6e4), 4: (1e-30, 1e30), 8: (1e-140, 1e140)}[kind.itemsize]
    return (unit * np.clip(top, *limits)).astype(kind)


def splits(total: int) -> st.SearchStrategy[list[int]]:
    """Cut points that divide `total` things into runs, empty ones among them."""
    return st.lists(st.integers(0, total), max_size=6).map(lambda points: [0, *sorted(points), total])
