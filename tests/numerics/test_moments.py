"""Population and running statistics: merging in any order and grouping, against exact rational numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import helpers
import numpy as np
import pytest
from helpers import Array, exact, exact_columns
from hypothesis import given
from hypothesis import strategies as st

from bncli.numerics.kernels import Missing, block_moments
from bncli.numerics.moments import Moments, Running

INITS = ("debias", "zeros", "unit", "first")
MOMENTA = [0.0, 1e-30, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.999999, 1 - 1e-9]


def of(x: Array) -> Moments:
    """Moments of shape (C,) of one block of shape (r, C), which may be empty."""
    if not len(x):
        return Moments.empty(x.shape[1])
    return Moments.of(block_moments(np.ascontiguousarray(x)[None], Missing()))[0]


def blocks_of(x: Array, cuts: Sequence[int]) -> list[Moments]:
    """Moments between consecutive cut points, each of 128 rows or fewer."""
    parts = []
    for start, stop in itertools.pairwise(cuts):
        whole = Moments.empty(x.shape[1])
        for i in range(start, stop, 128):
            whole = whole.merge(of(x[i : min(i + 128, stop)]))
        parts.append(whole)
    return parts


def merge_as(parts: list[Moments], rng: np.random.Generator) -> Moments:
    """Merge in a random order and grouping."""
    parts = list(parts)
    while len(parts) > 1:
        i, j = sorted(rng.choice(len(parts), 2, replace=False).tolist(), reverse=True)
        one, other = parts.pop(i), parts.pop(j)
        parts.append(one.merge(other) if rng.random() < 0.5 else other.merge(one))
    return parts[0]


def check_mean_and_low(found: Moments, truth: list[helpers.Exact], tolerance: float) -> None:
    """Check mean and m2, each as the sum of high and low words."""
    for c, t in enumerate(truth):
        mean = Fraction(float(found.mean[c])) + Fraction(float(found.mean_low[c]))
        m2 = Fraction(float(found.m2[c])) + Fraction(float(found.m2_low[c]))
        assert found.count[c] == t.count
        assert abs(mean - t.mean) <= Fraction(tolerance) * max(abs(t.mean), helpers.root(t.variance))
        assert abs(m2 - t.variance * t.count) <= Fraction(tolerance) * t.variance * t.count


class TestMoments:
    @given(helpers.tables(), st.data())
    def test_any_cut_order_and_grouping(self, x: Array, data: st.DataObject) -> None:
        cuts = data.draw(helpers.splits(len(x)))
        parts = blocks_of(x, cuts)
        truth = exact_columns(x)
        found = merge_as(parts, np.random.default_rng(data.draw(st.integers(0, 99))))
        helpers.check_moments(found.mean, found.variance(), truth)
        stacked = Moments(*(np.stack(a) for a in zip(*(p.arrays() for p in parts), strict=True)))
        helpers.check_moments(stacked.reduce().mean, stacked.reduce().variance(), truth)
        for merged in (found, stacked.reduce()):
            assert merged.minimum.tolist() == [min(column) for column in x.T.tolist()]
            assert merged.maximum.tolist() == [max(column) for column in x.T.tolist()]

    @given(helpers.tables(max_samples=60), st.integers(0, 99))
    def test_one_value_at_a_time(self, x: Array, seed: int) -> None:
        found = merge_as(blocks_of(x, range(len(x) + 1)), np.random.default_rng(seed))
        helpers.check_moments(found.mean, found.variance(), exact_columns(x))

    def test_merging_does_not_accumulate_rounding_errors(self) -> None:
        """After 20,000 merges of exact parts the error is a few ulps of the largest term."""
        values = np.random.default_rng(5).standard_normal(20_001) + 1e4
        total = Moments.empty(1)
        for v in values:
            total = total.merge(Moments(*(np.array([float(t)]) for t in (1, v, 0, 0, 0, v, v))))
        check_mean_and_low(total, [exact(values)], 1e-15)

    @given(helpers.tables())
    def test_empty_is_the_identity(self, x: Array) -> None:
        part, nothing = blocks_of(x, [0, len(x)])[0], Moments.empty(x.shape[1])
        for merged in (part.merge(nothing), nothing.merge(part)):
            for a, b in zip(merged.arrays(), part.arrays(), strict=True):
                assert a.tobytes() == b.tobytes()

    def test_empty_with_empty(self) -> None:
        merged = Moments.empty(3).merge(Moments.empty(3))
        assert [a.tolist() for a in merged.arrays()] == [[0.0] * 3] * 5 + [[np.inf] * 3, [-np.inf] * 3]
        assert np.isnan(merged.variance()).all()

    def test_unknown_extremes_stay_unknown(self) -> None:
        """So do those of merged parts; but a part without values takes nothing away."""
        count = np.array([2.0, 0.0])
        old = Moments.without_extremes(count, *(np.zeros(2) for _ in range(4)))
        merged = old.merge(of(np.array([[1.0, 5.0], [3.0, 7.0]])))
        np.testing.assert_array_equal(merged.minimum, [np.nan, 5.0])
        np.testing.assert_array_equal(merged.maximum, [np.nan, 7.0])

    @pytest.mark.parametrize("value", [0.1, -1 / 3, 1e140, 1e-140, 1e-300, 1.7e308])
    def test_constant_stays_exactly_constant(self, value: float) -> None:
        x = np.full((1000, 1), value)
        found = merge_as(blocks_of(x, [0, 1, 3, 7, 200, 201, 201, 777, 1000]), np.random.default_rng(1))
        assert (found.mean[0], found.m2[0], found.mean_low[0], found.m2_low[0]) == (value, 0, 0, 0)

    def test_variance_divides_by_n_minus_ddof(self) -> None:
        m = Moments.without_extremes(
            *(np.array(a, float) for a in ([0, 1, 2, 5], [0, 3, 3, 3], [0] * 4, [0, 0, 8, 20], [0] * 4))
        )
        np.testing.assert_array_equal(m.variance(), [np.nan, 0, 4, 4])
        np.testing.assert_array_equal(m.variance(ddof=1), [np.nan, np.nan, 8, 5])

    @pytest.mark.parametrize(("a", "b"), [(0.0, 1e-170), (1e200, -1e200), (1e-200, 2e-200)])
    def test_means_too_close_or_too_far_to_square_are_not_finite(self, a: float, b: float) -> None:
        assert not np.isfinite(of(np.array([[a], [a]])).merge(of(np.array([[b], [b]]))).m2).any()

    def test_not_finite_stays(self) -> None:
        bad = of(np.array([[np.nan], [1.0]]))
        good = of(np.array([[2.0], [1.0]]))
        assert not np.isfinite(bad.merge(good).m2).any()
        assert not np.isfinite(good.merge(bad).m2).any()

    def test_parts_are_indexed_and_joined(self) -> None:
        x = np.arange(12.0).reshape(4, 3)
        m = of(x)
        assert m[1:].mean.tolist() == [5.5, 6.5]
        joined = Moments.concatenate([m[:1], m[1:]])
        assert joined.m2.tolist() == m.m2.tolist() == [45.0] * 3
        m[0:1] = of(x[:, 2:])
        assert m.mean.tolist() == [6.5, 5.5, 6.5]


# Running


def statistics(x: Array, k: Array) -> list[Moments]:
    """Batches with the (mean, m2) in x of shape (B, 2, C): two values where k is true, else one value."""
    return [
        Moments.without_extremes(
            np.where(has, 2.0, 1.0), s[0], np.zeros(len(has)), np.where(has, s[1], 0.0), np.zeros(len(has))
        )
        for s, has in zip(x, k, strict=True)
    ]


def runs(batches: list[Moments], cuts: Sequence[int], ddof: int, momentum: float | None) -> list[Running]:
    """One Running for each run of consecutive batches; empty runs are the identity."""
    parts = []
    for start, stop in itertools.pairwise(cuts):
        if start == stop:
            parts.append(Running.empty(len(batches[0].count)))
            continue
        stacked = Moments(*(np.stack(a) for a in zip(*(b.arrays() for b in batches[start:stop]), strict=True)))
        parts.append(Running.of_batches(stacked, ddof, momentum))
    return parts


def merge_neighbors(parts: list[Running], momentum: float | None, rng: np.random.Generator) -> Running:
    """Merge in order, in a random grouping."""
    parts = list(parts)
    while len(parts) > 1:
        i = int(rng.integers(len(parts) - 1))
        parts[i : i + 2] = [parts[i].merge(parts[i + 1], momentum)]
    return parts[0]


@st.composite
def folds(draw: st.DrawFn) -> tuple[Array, Array]:
    """Statistics of shape (B, 2, C), and a mask of shape (B, C): which features have two values in which batch."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, c = draw(st.integers(1, 40)), 4
    x = rng.standard_normal((b, 2, c)) + draw(st.sampled_from([0.0, 10.0, 1e8]))
    if draw(st.booleans()):
        x = np.sort(x, axis=0)
    x[:, 1] = np.abs(x[:, 1])
    x *= 10.0 ** draw(st.sampled_from([0, -100, 100]))
    k = rng.random((b, c)) < draw(st.sampled_from([1.0, 0.7, 0.2]))
    k[rng.integers(b)] = [True, True, True, draw(st.booleans())]  # the last feature may have none
    return x, k


class TestRunning:
    @given(folds(), st.sampled_from(MOMENTA) | st.floats(0, 1 - 1e-9), st.sampled_from(INITS), st.data())
    def test_plain_recurrence_however_cut(
        self, fold: tuple[Array, Array], momentum: float, init: str, data: st.DataObject
    ) -> None:
        x, k = fold
        ddof = data.draw(st.sampled_from([0, 1]))
        parts = runs(statistics(x, k), data.draw(helpers.splits(len(x))), ddof, momentum)
        found = merge_neighbors(parts, momentum, np.random.default_rng(data.draw(st.integers(0, 99))))
        read = found.read(init, momentum)
        for feature in range(x.shape[2]):
            assert np.broadcast_to(found.k, (1, x.shape[2]))[0, feature] == k[:, feature].sum()
            for which in (0, 1):
                folded = [Fraction(float(s)) for s in x[k[:, feature], which, feature]]
                if which:
                    folded = [s / (2 - ddof) for s in folded]
                if not folded:
                    assert np.isnan(read[which][feature])
                    continue
                truth = helpers.recurrence(folded, momentum, init, start=which)
                assert helpers.off(read[which][feature], truth.value, truth.scale) <= helpers.RECURRENCE

    @pytest.mark.parametrize("momentum", [0.5, 0.9, 0.999999, 1 - 1e-9])
    @pytest.mark.parametrize("init", INITS)
    def test_many_batches(self, momentum: float, init: str) -> None:
        x = np.random.default_rng(2).random((300, 2, 1)) + 5
        k = np.ones((300, 1), bool)
        found = merge_neighbors(
            runs(statistics(x, k), [0, 1, 120, 121, 300], 0, momentum), momentum, np.random.default_rng(0)
        )
        for which, value in enumerate(found.read(init, momentum)):
            folded = [Fraction(float(s)) / (2 if which else 1) for s in x[:, which, 0]]
            truth = helpers.recurrence(folded, momentum, init, start=which)
            assert helpers.off(value[0], truth.value, truth.scale) <= helpers.RECURRENCE

    @pytest.mark.parametrize("momentum", [0.5, 0.99, 0.99999, 1 - 1e-9])
    def test_a_long_chain_of_batches(self, momentum: float) -> None:
        """5,000 consecutive batches, against the recurrence in 400-bit fixed point, whose error is 2^-380."""
        x = np.random.default_rng(4).random((5000, 2, 1)) + 1e4
        total = Running.empty(1)
        for part in runs(statistics(x, np.ones((5000, 1), bool)), range(5001), 0, momentum):
            total = total.merge(part, momentum)
        m, r = Fraction(momentum), 0
        for s in x[:, 0, 0]:
            s = Fraction(float(s)) * 2**400
            r = int(m * r + (1 - m) * s)
        learned = Fraction(-math.expm1(5000 * math.log1p(-float(1 - m))))  # 1 - m^k within an ulp
        debiased = Fraction(r, 2**400) / learned
        assert helpers.off(total.a[0, 0], debiased, abs(debiased)) <= 1e-15

    @pytest.mark.parametrize("value", [0.1, 1 / 3, 1e140, 1e-140, 0.0])
    @pytest.mark.parametrize("momentum", [*MOMENTA, None])
    def test_constant_stays_exactly_constant(self, value: float, momentum: float | None) -> None:
        x = np.full((50, 2, 1), value)
        found = merge_neighbors(
            runs(statistics(x, np.ones((50, 1), bool)), [0, 3, 4, 4, 30, 50], 0, momentum),
            momentum,
            np.random.default_rng(0),
        )
        assert found.a[:, 0].tolist() == [value, value / 2]
        assert not found.a_low.any()
        for init in ("debias", "first") if momentum is not None else ():
            mean, var = found.read(init, momentum)
            assert (mean[0], var[0]) == (value, value / 2)

    @given(folds(), st.integers(0, 99), st.data())
    def test_momentum_none_weighs_all_batches_alike(
        self, fold: tuple[Array, Array], seed: int, data: st.DataObject
    ) -> None:
        x, k = fold
        parts = runs(statistics(x, k), data.draw(helpers.splits(len(x))), 0, None)
        found = merge_neighbors(parts, None, np.random.default_rng(seed))
        for feature in range(x.shape[2]):
            folded = [Fraction(float(s)) for s in x[k[:, feature], 0, feature]]
            if folded:
                average = sum(folded) / len(folded)
                scale = max(abs(average), max(folded) - min(folded))
                assert helpers.off(found.a[0, feature], average, scale) <= helpers.RECURRENCE

    @given(folds(), st.sampled_from(MOMENTA))
    def test_empty_is_the_identity(self, fold: tuple[Array, Array], momentum: float) -> None:
        x, k = fold
        part, nothing = runs(statistics(x, k), [0, len(x)], 0, momentum)[0], Running.empty(x.shape[2])
        for merged in (part.merge(nothing, momentum), nothing.merge(part, momentum)):
            for a, b in zip(merged.arrays(), part.arrays(), strict=True):
                assert (a == b).all()  # k may be one number for all features

    def test_first_is_the_first_batch_with_two_values(self) -> None:
        x = np.arange(12.0).reshape(3, 2, 2)
        k = np.array([[True, False], [True, True], [False, True]])
        found = runs(statistics(x, k), [0, 3], 0, 0.5)[0]
        assert found.first.tolist() == [[0.0, 5.0], [1.0, 3.5]]
        assert np.broadcast_to(found.k, (1, 2)).tolist() == [[2.0, 2.0]]

    def test_order_matters(self) -> None:
        x = np.array([1.0, 2.0]).reshape(2, 1, 1).repeat(2, axis=1)
        one, two = runs(statistics(x, np.ones((2, 1), bool)), [0, 1, 2], 0, 0.5)
        assert one.merge(two, 0.5).a[0, 0] == pytest.approx(5 / 3, rel=1e-15)
        assert two.merge(one, 0.5).a[0, 0] == pytest.approx(4 / 3, rel=1e-15)

    def test_nothing_folded_is_nan_for_every_init(self) -> None:
        for init in INITS:
            for momentum in MOMENTA:
                assert np.isnan(Running.empty(2).read(init, momentum)).all()

    def test_ddof_and_batches_of_one(self) -> None:
        batches = Moments.without_extremes(
            *(np.array(a, float)[:, None] for a in ([1, 2, 4], [9, 3, 5], [0] * 3, [0, 8, 12], [0] * 3))
        )
        biased, unbiased = Running.of(batches, 0), Running.of(batches, 1)
        assert biased.k[:, 0, 0].tolist() == [0, 1, 1]
        assert biased.a[1:, 1, 0].tolist() == [4, 3]
        assert unbiased.a[1:, 1, 0].tolist() == [8, 4]
