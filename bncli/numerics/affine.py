"""The affine transform of batch normalization with fixed statistics: computed in float64 and rounded once at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import MismatchError, UsageError
from bncli.numerics import compiled
from bncli.numerics.arrays import Array, Bools, DType, Floats

PART_VALUES = 1 << 16  # values per step of the slow path, which bounds its memory
FLOAT64 = np.finfo(np.float64)


@dataclass(frozen=True, slots=True)
class Affine:
    """(x - minus) · times / over + plus: test mode or its inverse, with fixed statistics that broadcast against x.

    Attributes
    ----------
    minus, times, over, plus : broadcastable arrays
        mean, gamma, sd and beta in test mode; beta, sd, gamma and mean in the inverse. sd is sqrt(var + eps), or 1
        where that is 0.
    scale : broadcastable array
        gamma / sd in test mode. In the inverse, sd divided by the power of two that brings it into [1/2, 1).
    divisor : broadcastable array or None
        In the inverse, gamma divided by the same power of two. scale and divisor are NaN where the quotient is not a
        normal float64; `rounded` then computes the result in parts.
    """

    minus: Floats
    times: Floats
    over: Floats
    plus: Floats
    scale: Floats
    divisor: Floats | None = None

    @classmethod
    def of(cls, mean: Floats, var: Floats, gamma: Floats, beta: Floats, eps: float, *, inverse: bool = False) -> Affine:
        """Make the transform from statistics of shape (C,), or shaped to broadcast.

        Raises
        ------
        UsageError
            For a negative variance or eps.
        MismatchError
            For the inverse with a gamma of 0.
        """
        if (var < 0).any() or eps < 0:
            raise UsageError("a variance and eps cannot be negative")
        sd = deviation(var, eps)  # of the shape of var
        if not inverse:
            return cls(mean, gamma, sd, beta, normal_quotient(gamma, sd))
        if (zero := np.flatnonzero(gamma == 0)).size:
            raise MismatchError(
                f"gamma is 0 for feature {zero[0]}: every value became beta, so normalization cannot be undone"
            )
        scale, exponent = np.frexp(sd)
        with np.errstate(over="ignore"):
            return cls(beta, sd, gamma, mean, scale, _normal(np.ldexp(gamma, -exponent)))

    def __getitem__(self, index: Any) -> Affine:
        parts = (a[index] for a in (self.minus, self.times, self.over, self.plus, self.scale))
        return replace(Affine(*parts), divisor=None if self.divisor is None else self.divisor[index])

    @property
    def unknown(self) -> Bools:
        """True where a statistic is NaN."""
        return np.asarray(np.isnan(self.minus) | np.isnan(self.times) | np.isnan(self.over) | np.isnan(self.plus))

    def __call__(self, x: Array, dtype: npt.DTypeLike = np.float64) -> tuple[Array, bool]:
        """Apply to x in float64; return y in `dtype` and whether all of it is finite.

        The subtraction comes first, so that x = mean gives exactly beta.
        """
        y = x.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            y -= self.minus
            if self.divisor is not None:
                y /= self.divisor
            y *= self.scale
            y += self.plus
        return self.rounded(x, y, dtype)

    def columns(self, x: Array, dtype: DType) -> tuple[Array, bool]:
        """Apply to x of shape (R, C, I) with statistics of shape (C, 1), in the compiled kernel if possible."""
        minus, scale, plus = (a[:, 0] for a in (self.minus, self.scale, self.plus))
        found = compiled.normalize(x, minus, scale, plus, dtype) if self.divisor is None else None
        if found is None:
            return self(x, dtype)
        return found if found[1] else self.rounded(x, found[0], dtype)

    def rounded(self, x: Array, y: Array, dtype: npt.DTypeLike) -> tuple[Array, bool]:
        """Round y to `dtype`; return it and whether all of it is finite.

        Values are recomputed by `by_parts` where a step overflowed or scale is NaN.
        """
        y = round_to(y, np.dtype(dtype))
        if (fine := np.isfinite(y)).all():
            return y, True
        fine |= np.isnan(x)
        fine |= self.unknown
        if fine.all():  # only missing values or statistics are not finite
            return y, False
        given = [np.broadcast_to(a, y.shape) for a in (self.minus, self.times, self.over, self.plus)]
        step = max(1, PART_VALUES * len(y) // y.size)  # rows per step; bounds the memory of temporaries
        for part in (slice(first, first + step) for first in range(0, len(y), step)):
            bad = ~fine[part]
            found = by_parts(x[part][bad].astype(np.float64), *(a[part][bad] for a in given))
            y[part][bad] = round_to(found, y.dtype)
        return y, bool(np.isfinite(y).all())


def deviation(var: Floats, eps: float) -> Floats:
    """sqrt(var + eps), of the shape of var; 1 where that is 0."""
    with np.errstate(over="ignore"):
        sd = np.sqrt(var + eps)
    sd = np.where(np.isinf(sd), 2 * np.sqrt(var / 4 + eps / 4), sd)  # where the sum overflows but its root does not
    return np.where(sd == 0, 1.0, sd)


def round_to(values: Floats, dtype: DType) -> Array:
    """Round float64 values to `dtype`; too large values become infinite without a warning (see `overflowed`)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype, copy=False)


def _normal(values: Floats) -> Floats:
    """Replace infinities and subnormal values, which have lost digits to underflow, by NaN."""
    return np.where((np.abs(values) >= FLOAT64.tiny) & np.isfinite(values), values, np.nan)


def normal_quotient(gamma: Floats, sd: Floats) -> Floats:
    """gamma / sd, NaN where that is not a normal float64 although gamma is not 0."""
    with np.errstate(over="ignore"):
        return np.where(gamma == 0, gamma, _normal(gamma / sd))


def by_parts(x: Floats, minus: Floats | float, times: Floats, over: Floats, plus: Floats | float) -> Floats:
    """(x - minus) · times / over + plus without intermediate overflow or underflow.

    Mantissas and exponents (np.frexp) are computed separately, and the terms of a sum that overflows are halved.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        half = np.isinf(x - minus).astype(np.intc)
        (d, i), (t, j), (o, k) = np.frexp(np.ldexp(x, -half) - np.ldexp(minus, -half)), np.frexp(times), np.frexp(over)
        term, power = d * (t / o), half + i + j - k
        half = np.isinf(np.ldexp(term, power) + plus).astype(np.intc)
        return np.asarray(np.ldexp(np.ldexp(term, power - half) + np.ldexp(plus, -half), half))


def overflowed(before: Array, after: Array) -> Bools:
    """True for finite values whose result is infinite, since it does not fit the type of the result."""
    return np.asarray(np.isinf(after) & np.isfinite(before))
