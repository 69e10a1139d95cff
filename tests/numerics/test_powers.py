"""Powers of the momentum against exact rationals, and against decimal logarithms where those are too long."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bncli.numerics import compiled, powers
from bncli.numerics.moments import Moments, Running

DOUBLE_DOUBLE = Fraction(1, 2**95)

momenta = st.one_of(
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 12).map(lambda digits: 1 - 10**-digits),
    st.sampled_from([0.0, 5e-324, 0.5, 0.9, 0.99, 0.999, 1 - 1e-12, float(np.nextafter(1, 0))]),
)


def total(pair: powers.Pair) -> Fraction:
    return Fraction(float(pair[0][0])) + Fraction(float(pair[1][0]))


def check(found: Fraction, truth: Fraction) -> None:
    """Equal to double-double precision, or to the last bit of what float64 can hold near its smallest numbers."""
    assert abs(found - truth) <= max(DOUBLE_DOUBLE * truth, Fraction(1, 2**1000))


@given(momenta, st.integers(0, 700))
@example(0.0, 0)
@example(0.0, 1)
@example(float(np.nextafter(1, 0)), 700)
def test_small_powers_against_rationals(momentum: float, k: int) -> None:
    power, rest = powers.powers(np.array([float(k)]), momentum)
    truth = Fraction(momentum) ** k
    check(total(power), truth)
    check(total(rest), 1 - truth)


@given(momenta.filter(lambda m: m > 1e-3), st.integers(1, 2**53))
@example(1 - 1e-12, 2**53)
@example(float(np.nextafter(1, 0)), 2**53)
@example(0.999, 2**53 - 1)
def test_large_powers_against_logarithms(momentum: float, k: int) -> None:
    with localcontext() as context:
        context.prec, context.Emin = 120, -(10**17)
        power = (Decimal(momentum).ln() * k).exp()
        truth, complement = (Fraction(v) if v > Decimal("1e-400") else Fraction(0) for v in (power, 1 - power))
    found, rest = powers.powers(np.array([float(k)]), momentum)
    check(total(found), truth)
    check(total(rest), complement)


@given(momenta, st.integers(0, 2**53), st.integers(0, 2**53))
def test_shares_of_runs_add_up(momentum: float, k1: int, k2: int) -> None:
    earlier, later = powers.shares(np.array([float(k1)]), np.array([float(k2)]), momentum)
    if not k1 + k2:
        assert earlier[0] == later[0] == 0
        return
    assert abs(Fraction(float(earlier[0])) + Fraction(float(later[0])) - 1) <= Fraction(1, 2**52)
    assert (earlier[0] == 0) == (k1 == 0) or momentum < 1e-3 or k2 > 100  # else the older run has no weight left


def test_shares_without_momentum_are_counts() -> None:
    earlier, later = powers.shares(np.array([3.0, 0.0]), np.array([1.0, 0.0]), None)
    assert (earlier.tolist(), later.tolist()) == ([0.75, 0.0], [0.25, 0.0])


def test_runs_of_equal_length_and_single_features_agree() -> None:
    """The kept pair of numbers is what each feature would get by itself."""
    one = powers.shares(np.full((1, 4), 37.0), np.full((1, 4), 5.0), 0.97)
    each = powers.shares(np.array([[37.0, 37.0, 37.0, 1.0]]), np.array([[5.0, 5.0, 5.0, 2.0]]), 0.97)
    for alike, separate in zip(one, each, strict=True):
        assert alike.tolist() == [[separate[0, 0]]]


@pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernel is not built")
@given(momenta, st.integers(1, 40), st.integers(0, 10**6))
def test_kernels_give_the_same_bits(momentum: float, batches: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    moments = Moments.empty((batches, 3))
    moments.count[...] = rng.integers(0, 5, (batches, 3)) if seed % 2 else 7
    moments.mean[...], moments.m2[...] = rng.normal(size=(batches, 3)), rng.uniform(size=(batches, 3))
    fast = Running.of_batches(moments, 0, momentum)
    plain = Running.of(moments, 0).reduce(momentum)
    for one, other in zip(fast.arrays(), plain.arrays(), strict=True):
        assert one.tobytes() == np.broadcast_to(other, one.shape).tobytes()
