"""Powers of the momentum, m^k and 1 - m^k, from operations that IEEE 754 fixes.

`exp`, `expm1`, `log` and `pow` of a library give other bits on another processor (NumPy has versions of its own for
AVX2 and AVX-512). Here m^(2^j) and 1 - m^(2^j) come from decimal arithmetic, which rounds alike everywhere, once for each
momentum. A power is the product of those whose bit is set in k, in double-double; `_moments.c` multiplies in the same
order, so that both kernels give the same bits.
"""

from __future__ import annotations

import functools
from decimal import Decimal, localcontext

import numpy as np

from bncli.numerics.arrays import Floats
from bncli.numerics.kernels import quick_two_sum, two_sum

BITS = 54  # k up to 2^53 and a little, which float64 counts exactly
DIGITS = 60  # 2^53 squarings' errors leave 44 of them; double-double has 32
SPLITTER = 134217729.0  # 2^27 + 1 (Dekker 1971)

Pair = tuple[Floats, Floats]  # an unevaluated sum high + low


@functools.lru_cache(maxsize=8)
def table(momentum: float) -> Floats:
    """m^(2^j) and 1 - m^(2^j), each as high and low: shape (BITS, 4), a row for each bit j of k.

    >>> table(0.5)[:3].tolist()
    [[0.5, 0.0, 0.5, 0.0], [0.25, 0.0, 0.75, 0.0], [0.0625, 0.0, 0.9375, 0.0]]
    """
    rows = np.empty((BITS, 4))
    with localcontext() as context:
        context.prec, context.Emin = DIGITS, -(10**17)  # m^(2^53) of a small m has so many digits before its first
        power, rest = Decimal(momentum), 1 - Decimal(momentum)
        for row in rows:
            for at, value in ((0, power), (2, rest)):
                row[at] = float(value)
                row[at + 1] = float(value - Decimal(row[at]))
            power, rest = power * power, rest * (2 - rest)  # 1 - p^2 = (1 - p)(1 + p): nothing cancels
    rows.setflags(write=False)
    return rows


def powers(k: Floats, momentum: float) -> tuple[Pair, Pair]:
    """m^k and 1 - m^k for whole k from 0 to 2^53, of any shape, as double-double with relative errors below 2^-95.

    (1 - m^(k1 + k2)) = (1 - m^k1) + m^k1 (1 - m^k2), whose terms are all positive, keeps every digit for m close to 1.
    """
    whole = k.astype(np.int64)
    power, rest = (np.ones_like(k), np.zeros_like(k)), (np.zeros_like(k), np.zeros_like(k))
    for j, (p, p_low, r, r_low) in enumerate(table(momentum)[: int(whole.max(initial=0)).bit_length()]):
        bit = (whole >> j & 1).astype(bool)
        if not bit.any():
            continue
        grown = _add(rest, multiply(power, (r, r_low)))
        less = multiply(power, (p, p_low))
        power = np.where(bit, less[0], power[0]), np.where(bit, less[1], power[1])
        rest = np.where(bit, grown[0], rest[0]), np.where(bit, grown[1], rest[1])
    return power, rest


def shares(k1: Floats, k2: Floats, momentum: float | None) -> tuple[Floats, Floats]:
    """Weights of two consecutive runs of k1 and k2 batches in their mean; 0 and 0 where both are empty.

    m^k2 (1 - m^k1) and 1 - m^k2, over their sum 1 - m^(k1 + k2). Momentum None weighs all batches alike. Any shapes that
    broadcast; where each run has the same k in all features, the result has shape (1,) in all axes.
    """
    if k1.size and k2.size and (k1 == k1.flat[0]).all() and (k2 == k2.flat[0]).all():
        ones = (1,) * max(k1.ndim, k2.ndim)
        first, second = _shares_of_all(float(k1.flat[0]), float(k2.flat[0]), momentum)
        return np.full(ones, first), np.full(ones, second)
    return _shares(k1, k2, momentum)


@functools.lru_cache(maxsize=256)
def _shares_of_all(k1: float, k2: float, momentum: float | None) -> tuple[float, float]:
    """`shares` of two numbers; kept, since runs of equal length are joined again and again."""
    first, second = _shares(np.array([k1]), np.array([k2]), momentum)
    return float(first[0]), float(second[0])


def _shares(k1: Floats, k2: Floats, momentum: float | None) -> tuple[Floats, Floats]:
    if momentum is None:
        first, second, whole = k1, k2, k1 + k2
    else:
        power, (second, low) = powers(k2, momentum)
        earlier = multiply(power, powers(k1, momentum)[1])
        first, whole = earlier[0], _add(earlier, (second, low))[0]
    whole = np.where(whole > 0, whole, 1)
    return first / whole, second / whole


def multiply(a: Pair, b: Pair | tuple[float, float]) -> Pair:
    """The product of two double-doubles (Dekker 1971, without a fused multiply-add, which not every machine has)."""
    product = a[0] * b[0]
    ah, bh = _high(a[0]), _high(b[0])
    al, bl = a[0] - ah, b[0] - bh
    error = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    return quick_two_sum(product, error + (a[0] * b[1] + a[1] * b[0]))


def _add(a: Pair, b: Pair) -> Pair:
    """The sum of two double-doubles that are not negative."""
    total, error = two_sum(a[0], b[0])
    return quick_two_sum(total, error + (a[1] + b[1]))


def _high(a: Floats | float) -> Floats:
    """The upper 26 bits (Veltkamp's splitting, in Dekker 1971)."""
    scaled = SPLITTER * a
    return np.asarray(scaled - (scaled - a))
