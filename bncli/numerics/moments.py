"""What a pass over the data accumulates: Moments (population) and Running (batch by batch). Both merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bncli.numerics import compiled
from bncli.numerics.arrays import Bools, Floats
from bncli.numerics.kernels import TINY, Blocks, quick_two_sum, two_sum

if TYPE_CHECKING:
    from typing_extensions import Self


def choose(where: Bools, yes: Floats, no: Floats) -> Floats:
    """np.where, without its copy when the answer is the same everywhere."""
    return yes if where.all() else np.where(where, yes, no) if where.any() else no


class Parts:
    """A record of arrays that are indexed, joined and merged together."""

    def arrays(self) -> list[Floats]:
        """The arrays in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]  # every child is a dataclass

    def map(self, function: Callable[[Floats], Floats]) -> Self:
        """Apply an array function (an index, a reshape) to every array."""
        return type(self)(*map(function, self.arrays()))

    def __getitem__(self, index: Any) -> Self:
        return self.map(lambda values: values[index])

    def __setitem__(self, index: Any, part: Self) -> None:
        for mine, other in zip(self.arrays(), part.arrays(), strict=True):
            mine[index] = other

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Join along the first axis."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*(p.arrays() for p in parts), strict=True)))


P = TypeVar("P", bound=Parts)


def reduce_pairs(parts: P, merge: Callable[[P, P], P]) -> P:
    """Merge along the first axis, neighbour with neighbour, keeping their order, until one is left.

    A tree instead of a chain: a few large array operations instead of many small ones.
    """
    while (length := len(parts.arrays()[0])) > 1:
        merged = merge(parts[0 : length - 1 : 2], parts[1:length:2])
        parts = type(parts).concatenate([merged, parts[length - 1 :]]) if length % 2 else merged
    return parts[0]


@dataclass(slots=True)
class Moments(Parts):
    """Count, mean and sum of squared deviations (m2) of each feature; mean and m2 as unevaluated sums high + low.

    Every field has the same shape (..., C). An empty part has count, mean and m2 of 0 and is the identity of `merge`.
    m2 is not finite where the result does not exist in float64 (see `kernels.block_moments`).
    """

    count: Floats
    mean: Floats
    mean_low: Floats
    m2: Floats
    m2_low: Floats

    @classmethod
    def empty(cls, shape: int | tuple[int, ...]) -> Moments:
        """No values yet, of shape (..., C)."""
        return cls(*(np.zeros(shape) for _ in range(5)))

    @classmethod
    def of(cls, blocks: Blocks) -> Moments:
        """Moments of shape (G, C) from the kernel's blocks."""
        return cls(*blocks, m2_low=np.zeros_like(blocks.m2))

    def merge(self, other: Moments) -> Moments:
        """Moments of both parts together.

        Chan, Golub & LeVeque (1983), eq. 2.1, moving the mean of the larger part; sums are carried in
        double-double, so that no number of merges adds an error worth naming.
        """
        count = self.count + other.count
        small = np.minimum(self.count, other.count) / np.maximum(count, 1)  # weight of the smaller part, <= 1/2
        delta = (other.mean - self.mean) + (other.mean_low - self.mean_low)
        swap = other.count > self.count
        base, base_low = choose(swap, other.mean, self.mean), choose(swap, other.mean_low, self.mean_low)
        mean, error = two_sum(base, choose(swap, -small, small) * delta)
        mean, mean_low = quick_two_sum(mean, base_low + error)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            between = delta * (delta * (small * np.maximum(self.count, other.count)))  # 0 beside an empty part
            m2, error1 = two_sum(self.m2, other.m2)
            m2, error2 = two_sum(m2, between)
            m2, m2_low = quick_two_sum(m2, (self.m2_low + other.m2_low) + (error1 + error2))
        vanishing = m2 < TINY
        if vanishing.any():  # the means differ, but by too little to square
            m2[vanishing & (delta != 0) & (small > 0)] = np.nan
        return Moments(count, mean, mean_low, m2, m2_low)

    def reduce(self) -> Moments:
        """Merge along the first axis: shape (B, C) becomes (C,)."""
        return self.reduce_runs(1)[0]

    def reduce_runs(self, runs: int) -> Moments:
        """Merge each of `runs` equal runs along the first axis: shape (runs · B, C) becomes (runs, C)."""
        if compiled.AVAILABLE:
            return Moments(*compiled.reduce_moments(self.arrays(), runs))
        by_place = self.map(lambda v: v.reshape(runs, -1, v.shape[-1]).swapaxes(0, 1))
        return reduce_pairs(by_place, Moments.merge)

    def variance(self, ddof: int = 0) -> Floats:
        """m2 / (count - ddof), NaN where count <= ddof."""
        divisor = self.count - ddof
        return np.where(divisor > 0, self.m2 / np.where(divisor > 0, divisor, 1), np.nan)


@dataclass(slots=True)
class Running(Parts):
    """Running statistics of consecutive batches, per feature: how many (k) and their weighted mean (a).

    With momentum m the weight of the j-th of k folded statistics is proportional to m^(k - j). Axis -2 of the
    statistics holds the mean, then the variance. What the recurrence starts from is only read off at the end (`read`).

    Attributes
    ----------
    k : shape (..., 1, C)
        Batches folded into each feature.
    a, a_low : shape (..., 2, C)
        Weighted mean of the folded statistics, as high + low.
    first : shape (..., 2, C)
        The first statistics folded; 0 where k is 0.
    """

    k: Floats
    a: Floats
    a_low: Floats
    first: Floats

    @classmethod
    def empty(cls, features: int) -> Running:
        """No batch folded yet."""
        return cls(np.zeros((1, features)), *(np.zeros((2, features)) for _ in range(3)))

    @classmethod
    def of(cls, batches: Moments, ddof: int) -> Running:
        """One folded statistic for each of B batches, from Moments of shape (B, C).

        A feature with fewer than two values in a batch is left out: its variance says nothing.
        """
        folded = (batches.count >= 2)[:, None]  # (B, 1, C)
        if (batches.count == batches.count[:, :1]).all():
            folded = folded[..., :1]  # (B, 1, 1): all features alike, so their weights are computed once
        statistics = np.stack([batches.mean, batches.variance(ddof)], axis=1)  # (B, 2, C)
        first = np.where(folded, statistics, 0.0)
        return cls(folded.astype(np.float64), first, np.zeros_like(first), first)

    @classmethod
    def of_batches(cls, batches: Moments, ddof: int, momentum: float | None) -> Running:
        """The statistics of B consecutive batches, from Moments of shape (B, C), folded into one."""
        if compiled.AVAILABLE:
            log_m = None if momentum is None else _log(momentum)
            return cls(*compiled.running(batches.count, batches.mean, batches.m2, ddof, log_m))
        return cls.of(batches, ddof).reduce(momentum)

    def merge(self, later: Running, momentum: float | None) -> Running:
        """Combine with the batches that follow: a = a1 + (a2 - a1) (1 - m^k2) / (1 - m^(k1 + k2)).

        Computed from the side of the larger weight. Momentum None weighs all batches alike.
        """
        k = self.k + later.k
        earlier_weight, later_weight = _weights(self.k, later.k, momentum)
        delta = (later.a - self.a) + (later.a_low - self.a_low)
        from_later = later_weight > 0.5
        base, base_low = choose(from_later, later.a, self.a), choose(from_later, later.a_low, self.a_low)
        a, error = two_sum(base, delta * np.where(from_later, -earlier_weight, later_weight))
        a, a_low = quick_two_sum(a, base_low + error)
        return Running(k, a, a_low, choose(self.k > 0, self.first, later.first))

    def reduce(self, momentum: float | None) -> Running:
        """Merge B consecutive parts along the first axis into one."""
        return reduce_pairs(self, lambda earlier, later: earlier.merge(later, momentum))

    def read(self, init: str, momentum: float, start: Floats | None = None) -> tuple[Floats, Floats]:
        """Running mean and variance, each of shape (C,): r = a + m^k (r0 - a); NaN where k is 0.

        `init` names r0: `debias` (none: r = a), `zeros`, `unit` (0 and 1), `first` (the first statistics folded), `like`
        (`start`, of shape (2, C); where that is NaN there is none).
        """
        starts: dict[str, Floats] = {
            "debias": self.a,
            "zeros": np.zeros((2, 1)),
            "unit": np.array([[0.0], [1.0]]),
            "first": self.first,
            "like": self.a if start is None else np.where(np.isnan(start), self.a, start),
        }
        r0 = starts[init]
        decay = np.power(momentum, self.k)  # the weight of r0; exp(k log m) is off by k log m units in its last place
        learned = -np.expm1(self.k * _log(momentum))  # 1 - m^k, the weight of a
        r = np.where(decay > 0.5, r0 + learned * (self.a - r0), self.a + decay * (r0 - self.a))
        mean, variance = np.where(self.k > 0, r, np.nan)
        return mean, variance


def _log(momentum: float) -> float:
    """log m; for m = 0 a number so low that m^k is 0 for every k >= 1, and k = 0 still gives m^0 = 1."""
    return math.log(momentum) if momentum > 0 else -1e6


def _weights(k1: Floats, k2: Floats, momentum: float | None) -> tuple[Floats, Floats]:
    """Shares of two consecutive runs in their weighted mean: m^k2 (1 - m^k1) and 1 - m^k2 over 1 - m^(k1 + k2)."""
    if momentum is None:
        share1, share2 = k1, k2
    else:
        log_m = _log(momentum)
        share1, share2 = -np.expm1(k1 * log_m) * np.exp(k2 * log_m), -np.expm1(k2 * log_m)
    whole = k1 + k2 if momentum is None else -np.expm1((k1 + k2) * log_m)
    whole = np.where(whole > 0, whole, 1)
    return share1 / whole, share2 / whole
