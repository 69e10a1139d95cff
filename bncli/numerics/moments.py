"""What a pass over the data accumulates: Moments (population statistics) and Running (running statistics).

Both are mergeable. One value at a time, the merge of Moments is the update of Welford (1962); for parts of any size it is
that of Chan, Golub & LeVeque (1983).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bncli.numerics import compiled, powers
from bncli.numerics.arrays import Bools, Floats
from bncli.numerics.kernels import TINY, Blocks, quick_two_sum, two_sum

if TYPE_CHECKING:
    from typing_extensions import Self


def choose(where: Bools, yes: Floats, no: Floats) -> Floats:
    """np.where, without a copy when `where` is the same everywhere."""
    return yes if where.all() else np.where(where, yes, no) if where.any() else no


class Parts:
    """A record of arrays that are indexed, concatenated and merged together."""

    def arrays(self) -> list[Floats]:
        """The arrays, in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]  # every child is a dataclass

    def map(self, function: Callable[[Floats], Floats]) -> Self:
        """Apply a function, such as an index or a reshape, to every array."""
        return type(self)(*map(function, self.arrays()))

    def __getitem__(self, index: Any) -> Self:
        return self.map(lambda values: values[index])

    def __setitem__(self, index: Any, part: Self) -> None:
        for mine, other in zip(self.arrays(), part.arrays(), strict=True):
            mine[index] = other

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Concatenate along the first axis."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*(p.arrays() for p in parts), strict=True)))


P = TypeVar("P", bound=Parts)


def reduce_pairs(parts: P, merge: Callable[[P, P], P]) -> P:
    """Merge neighbors along the first axis, in order, until one part is left.

    A tree needs a few large array operations where a chain needs many small ones.
    """
    while (length := len(parts.arrays()[0])) > 1:
        merged = merge(parts[0 : length - 1 : 2], parts[1:length:2])
        parts = type(parts).concatenate([merged, parts[length - 1 :]]) if length % 2 else merged
    return parts[0]


@dataclass(slots=True)
class Moments(Parts):
    """Count, mean, sum of squared deviations (m2), minimum and maximum of each feature.

    mean and m2 are double-double numbers: unevaluated sums high + low (Dekker 1971). Every field has the same shape
    (..., C). An empty part has count, mean and m2 of 0, minimum inf and maximum -inf, and is the identity of `merge`. m2
    is not finite where float64 cannot represent the result (see `kernels.block_moments`). Minimum and maximum are NaN
    where they are not known.
    """

    count: Floats
    mean: Floats
    mean_low: Floats
    m2: Floats
    m2_low: Floats
    minimum: Floats
    maximum: Floats

    @classmethod
    def empty(cls, shape: int | tuple[int, ...]) -> Moments:
        """Moments of no values, of shape (..., C)."""
        starts = [0.0] * 5 + [np.inf, -np.inf]
        return cls(*(np.full(shape, start) for start in starts))

    @classmethod
    def of(cls, blocks: Blocks) -> Moments:
        """Moments of shape (G, C) from blocks."""
        number, mean, mean_low, m2, minimum, maximum = blocks
        return cls(number, mean, mean_low, m2, np.zeros_like(m2), minimum, maximum)

    @classmethod
    def without_extremes(cls, count: Floats, mean: Floats, mean_low: Floats, m2: Floats, m2_low: Floats) -> Moments:
        """Moments of values whose minimum and maximum nobody kept."""
        unknown = [np.where(count > 0, np.nan, none) for none in (np.inf, -np.inf)]
        return cls(count, mean, mean_low, m2, m2_low, *unknown)

    def merge(self, other: Moments) -> Moments:
        """Moments of both parts together (Chan, Golub & LeVeque 1983, eq. 2.1).

        With delta = mean2 - mean1 and n = n1 + n2:

            mean = mean1 + delta · n2 / n,  m2 = m2_1 + m2_2 + delta² · n1 · n2 / n

        The mean starts from that of the larger part. Sums are double-double, so that rounding errors do not accumulate
        over many merges.
        """
        count = self.count + other.count
        small = np.minimum(self.count, other.count) / np.maximum(count, 1)  # weight of the smaller part, at most 1/2
        delta = (other.mean - self.mean) + (other.mean_low - self.mean_low)
        swap = other.count > self.count
        base, base_low = choose(swap, other.mean, self.mean), choose(swap, other.mean_low, self.mean_low)
        mean, error = two_sum(base, choose(swap, -small, small) * delta)
        mean, mean_low = quick_two_sum(mean, base_low + error)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            between = delta * (delta * (small * np.maximum(self.count, other.count)))  # 0 if a part is empty
            m2, error1 = two_sum(self.m2, other.m2)
            m2, error2 = two_sum(m2, between)
            m2, m2_low = quick_two_sum(m2, (self.m2_low + other.m2_low) + (error1 + error2))
        vanishing = m2 < TINY
        if vanishing.any():  # the means differ, but the square of delta underflows
            m2[vanishing & (delta != 0) & (small > 0)] = np.nan
        minimum, maximum = np.minimum(self.minimum, other.minimum), np.maximum(self.maximum, other.maximum)
        return Moments(count, mean, mean_low, m2, m2_low, minimum, maximum)

    def reduce(self) -> Moments:
        """Merge along the first axis: from shape (B, C) to (C,)."""
        return self.reduce_runs(1)[0]

    def reduce_runs(self, runs: int) -> Moments:
        """Merge each of `runs` runs of equal length along the first axis: from shape (runs · B, C) to (runs, C)."""
        if compiled.AVAILABLE:
            *sums, minimum, maximum = self.arrays()
            lows, highs = (np.ascontiguousarray(v).reshape(runs, -1, v.shape[-1]) for v in (minimum, maximum))
            low, high = compiled.extremes(lows)[0], compiled.extremes(highs)[1]
            return Moments(*[*compiled.reduce_moments(sums, runs), low, high])
        by_position = self.map(lambda v: v.reshape(runs, -1, v.shape[-1]).swapaxes(0, 1))  # (B, runs, C)
        return reduce_pairs(by_position, Moments.merge)

    def variance(self, ddof: int = 0) -> Floats:
        """m2 / (count - ddof), of shape (..., C); NaN where count <= ddof."""
        divisor = self.count - ddof
        return np.where(divisor > 0, self.m2 / np.where(divisor > 0, divisor, 1), np.nan)


@dataclass(slots=True)
class Running(Parts):
    """Running statistics of consecutive batches: for each feature their number k and weighted mean a.

    The recurrence is r = m · r + (1 - m) · s for the statistics s of each batch (Ioffe & Szegedy 2015; the momentum
    convention of Keras and CS231n). So the weight of the j-th of k folded statistics is proportional to m^(k - j). The
    start value of the recurrence is not part of a and enters in `read`. Axis -2 of the statistics is (mean, variance).

    Attributes
    ----------
    k : shape (..., 1, C)
        Number of batches folded into each feature.
    a, a_low : shape (..., 2, C)
        Weighted mean of the folded statistics, as an unevaluated sum high + low.
    first : shape (..., 2, C)
        The statistics of the first folded batch; 0 where k is 0.
    """

    k: Floats
    a: Floats
    a_low: Floats
    first: Floats

    @classmethod
    def empty(cls, features: int) -> Running:
        """Running statistics of no batches."""
        return cls(np.zeros((1, features)), *(np.zeros((2, features)) for _ in range(3)))

    @classmethod
    def of(cls, batches: Moments, ddof: int) -> Running:
        """Running statistics of each of B batches by itself, from Moments of shape (B, C).

        A batch with fewer than two values of a feature is not folded for that feature: it has no usable variance.
        """
        folded = (batches.count >= 2)[:, None]  # (B, 1, C)
        if (batches.count == batches.count[:, :1]).all():
            folded = folded[..., :1]  # (B, 1, 1): all features have the same weights, computed once
        statistics = np.stack([batches.mean, batches.variance(ddof)], axis=1)  # (B, 2, C)
        first = np.where(folded, statistics, 0.0)
        return cls(folded.astype(np.float64), first, np.zeros_like(first), first)

    @classmethod
    def of_batches(cls, batches: Moments, ddof: int, momentum: float | None) -> Running:
        """Running statistics of B consecutive batches together, from Moments of shape (B, C)."""
        if compiled.AVAILABLE:
            table = None if momentum is None else powers.table(momentum)
            return cls(*compiled.running(batches.count, batches.mean, batches.m2, ddof, table))
        return cls.of(batches, ddof).reduce(momentum)

    def merge(self, later: Running, momentum: float | None) -> Running:
        """Merge with the batches that follow: a = a1 + (a2 - a1) (1 - m^k2) / (1 - m^(k1 + k2)).

        The sum starts from the side with the larger weight. With momentum None all batches have the same weight.
        """
        k = self.k + later.k
        earlier_weight, later_weight = powers.shares(self.k, later.k, momentum)
        delta = (later.a - self.a) + (later.a_low - self.a_low)
        from_later = later_weight > 0.5
        base, base_low = choose(from_later, later.a, self.a), choose(from_later, later.a_low, self.a_low)
        a, error = two_sum(base, delta * np.where(from_later, -earlier_weight, later_weight))
        a, a_low = quick_two_sum(a, base_low + error)
        return Running(k, a, a_low, choose(self.k > 0, self.first, later.first))

    def reduce(self, momentum: float | None) -> Running:
        """Merge B consecutive parts along the first axis."""
        return reduce_pairs(self, lambda earlier, later: earlier.merge(later, momentum))

    def read(self, init: str, momentum: float, start: Floats | None = None) -> tuple[Floats, Floats]:
        """Running mean and variance, each of shape (C,): r = a + m^k (r0 - a); NaN where k is 0.

        This is the recurrence started from r0, in closed form; `debias` leaves r0 out (r = a), which is the bias
        correction of Kingma & Ba (2015, section 3).

        Parameters
        ----------
        init : str
            Selects r0: `debias` (no start value), `zeros`, `unit` (mean 0, variance 1), `first` (the statistics of the
            first folded batch) or `like` (`start`; no start value where that is NaN).
        momentum : float
        start : shape (2, C), optional
        """
        starts: dict[str, Floats] = {
            "debias": self.a,
            "zeros": np.zeros((2, 1)),
            "unit": np.array([[0.0], [1.0]]),
            "first": self.first,
            "like": self.a if start is None else np.where(np.isnan(start), self.a, start),
        }
        r0 = starts[init]
        (decay, _), (learned, _) = powers.powers(self.k, momentum)  # m^k and 1 - m^k, the weights of r0 and a
        r = np.where(decay > 0.5, r0 + learned * (self.a - r0), self.a + decay * (r0 - self.a))
        mean, variance = np.where(self.k > 0, r, np.nan)
        return mean, variance
