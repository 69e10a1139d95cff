"""Moments of blocks of values, against exact rational numbers."""

from __future__ import annotations

from fractions import Fraction

import helpers
import numpy as np
import numpy.typing as npt
import pytest
from helpers import Array, exact
from hypothesis import given
from hypothesis import strategies as st

from bncli.numerics import kernels
from bncli.numerics.kernels import Blocks, Missing, block_moments, present, two_sum

NONE = Missing()


def check_block(x: Array, missing: Missing = NONE, keep: Array | None = None) -> None:
    """Check the moments of one block of values of shape (r, C) against exact values."""
    found = block_moments(np.ascontiguousarray(x)[None], missing)
    for c in range(x.shape[1]):
        column = x[:, c] if keep is None else x[keep[:, c], c]
        truth = exact(column)
        assert found.number[0, c] == truth.count
        if not truth.count:
            assert found.m2[0, c] == 0
            continue
        mean = Fraction(float(found.mean[0, c])) + Fraction(float(found.mean_low[0, c]))
        scale = max(abs(truth.mean), helpers.root(truth.variance))
        assert abs(mean - truth.mean) <= Fraction(helpers.STATISTICS) * scale
        assert helpers.variance_error(found.m2[0, c], truth.variance * truth.count) <= helpers.STATISTICS


class TestTwoSum:
    @given(*(st.floats(-1e300, 1e300) for _ in range(2)))
    def test_sum_and_error_are_exact(self, a: float, b: float) -> None:
        s, error = two_sum(np.array(a), np.array(b))
        assert float(s) == a + b
        assert Fraction(float(s)) + Fraction(float(error)) == Fraction(a) + Fraction(b)


class TestBlockMoments:
    @given(helpers.tables(max_samples=kernels.BLOCK_ROWS), st.sampled_from(helpers.DTYPES))
    def test_any_block_of_any_type(self, table: Array, dtype: str) -> None:
        check_block(helpers.as_type(table, dtype))

    @pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 127, 128])
    @pytest.mark.parametrize("features", [1, 2, 5, 64, 65, 130])
    def test_every_shape(self, rows: int, features: int) -> None:
        rng = np.random.default_rng(rows)
        check_block(1e4 + rng.standard_normal((rows, features)))

    @pytest.mark.parametrize("kind", helpers.PATTERNS)
    @pytest.mark.parametrize("shift", [0.0, 1e4, 1e8])
    def test_patterns(self, kind: str, shift: float) -> None:
        x = helpers.pattern(kind, np.random.default_rng(7), 128, 60) + shift
        check_block(x)
        check_block(x[:120])

    @pytest.mark.parametrize("rows", [64, 65, 100, 120, 127, 128])
    @pytest.mark.parametrize("stride", [2, 4, 7, 8])
    def test_two_constants_whose_rounding_adds_up(self, rows: int, stride: int) -> None:
        """The pivot, computed from every 8th value, is sqrt(7) sd from the mean: an error of 1.4e-14 without recomputation."""
        rng = np.random.default_rng(stride)
        x = np.tile(rng.random(150) + 1, (rows, 1))
        x[::stride] = rng.random(150) * np.repeat([1, 1e3, 1e6], 50)
        check_block(x)

    def test_recomputation_of_one_column_and_of_many(self) -> None:
        rng = np.random.default_rng(3)
        x = np.tile(rng.random(40) + 1, (128, 1))
        x[::8] = rng.random(40)
        many = block_moments(x[None].repeat(3, axis=0), NONE)
        for c in range(1, 40):
            two = block_moments(np.ascontiguousarray(x[None, :, c - 1 : c + 1]), NONE)
            assert many.m2[0, c] == many.m2[2, c] == pytest.approx(two.m2[0, 1], rel=2e-15)
            assert many.mean[0, c] == pytest.approx(two.mean[0, 1], rel=2e-15)

    @pytest.mark.parametrize("where", [0, 5, 8, 127])
    def test_outlier_of_a_million_sd(self, where: int) -> None:
        x = np.random.default_rng(0).standard_normal((128, 20))
        x[where] = 1e6
        check_block(x)
        check_block(x + 1e8)

    @pytest.mark.parametrize("value", [0.1, -0.1, 1e140, 1e-140, 5e-324, 1.7e308, 0.0])
    @pytest.mark.parametrize("rows", [1, 2, 100, 128])
    def test_constant_block_is_exact(self, value: float, rows: int) -> None:
        found = block_moments(np.full((3, rows, 4), value), NONE)
        assert (found.mean == value).all()
        assert not found.mean_low.any()
        assert not found.m2.any()

    def test_blocks_are_independent(self) -> None:
        x = np.random.default_rng(0).standard_normal((5, 100, 3))
        together = block_moments(x, NONE)
        for g in range(5):
            alone = block_moments(x[g : g + 1], NONE)
            assert all(a[g].tobytes() == b[0].tobytes() for a, b in zip(together, alone, strict=True))

    def test_more_features_than_one_tile(self) -> None:
        features = kernels.FEATURES_AT_ONCE + 3
        x = np.random.default_rng(0).integers(-9, 9, (2, 20, features)).astype(np.float64)
        x[:, :, -1] = np.arange(20)
        found = block_moments(x, NONE)
        assert found.m2.shape == (2, features)
        check_block(x[1][:, -5:])
        # small integers: the two-pass formula of NumPy is accurate to a few ulps
        np.testing.assert_allclose(found.m2, x.var(axis=1) * 20, rtol=1e-14)
        np.testing.assert_allclose(found.mean, x.mean(axis=1), rtol=1e-14, atol=1e-14)

    def test_input_is_not_changed(self) -> None:
        x = np.random.default_rng(0).standard_normal((2, 128, 3))
        x[0, 3, 1] = np.nan
        before = x.copy()
        block_moments(x, Missing(omit=True, fill=before[0, 0, 0]))
        np.testing.assert_array_equal(x, before)


class TestMissing:
    @given(helpers.tables(max_samples=128), st.sampled_from(["f2", "f4", "f8"]), st.integers(0, 2**32 - 1))
    def test_omit_leaves_out_non_finite_values_per_feature(self, table: Array, dtype: str, seed: int) -> None:
        x = helpers.as_type(table, dtype)
        rng = np.random.default_rng(seed)
        gone = rng.random(x.shape) < rng.choice([0.05, 0.5, 0.95])
        x[gone] = rng.choice([np.nan, np.inf, -np.inf], int(gone.sum()))
        check_block(x, Missing(omit=True), keep=~gone)

    @given(helpers.tables(max_samples=128), st.sampled_from(helpers.DTYPES), st.integers(0, 399))
    def test_fill_value_is_left_out(self, table: Array, dtype: str, at: int) -> None:
        x = helpers.as_type(table, dtype)
        fill = x[at % len(x), 0].item()
        check_block(x, Missing(fill=fill), keep=x != fill)

    def test_nan_as_fill(self) -> None:
        x = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, 5.0]])
        check_block(x, Missing(fill=float("nan")), keep=~np.isnan(x))

    def test_fill_and_omit_together(self) -> None:
        x = np.array([[1.0], [np.inf], [-9.0], [4.0]])
        found = block_moments(x[None], Missing(omit=True, fill=-9.0))
        assert (found.number[0, 0], found.mean[0, 0], found.m2[0, 0]) == (2, 2.5, 4.5)

    def test_nothing_left(self) -> None:
        found = block_moments(np.full((1, 4, 1), np.nan), Missing(omit=True))
        assert [a[0, 0] for a in found] == [0, 0, 0, 0, np.inf, -np.inf]

    def test_present(self) -> None:
        x = np.array([1.0, np.nan, np.inf, -9.0])
        assert present(x, NONE).tolist() == [True, True, True, True]
        assert present(x, Missing(omit=True)).tolist() == [True, False, False, True]
        assert present(x, Missing(fill=-9.0)).tolist() == [True, True, True, False]
        assert present(x, Missing(fill=float("nan"))).tolist() == [True, False, True, True]


class TestNoResult:
    """Results that float64 cannot represent are NaN or infinite, never a wrong number."""

    @pytest.mark.parametrize(
        "column",
        [
            [1.0, np.nan],
            [1.0, np.inf],
            [np.inf, np.inf],
            [-np.inf, np.inf],
            [1e200, -1e200],
            [1.7e308, -1.7e308],
            [0.0, 1e-170],
            [1e-200, 2e-200],
            [0.0, 5e-324],
            [1.0] * 7 + [np.nan],
        ],
    )
    def test_m2_is_not_finite(self, column: list[float]) -> None:
        found = block_moments(np.array(column)[None, :, None], NONE)
        assert not np.isfinite(found.m2).any()

    def test_only_the_affected_feature(self) -> None:
        x: npt.NDArray[np.float64] = np.array([[1.0, np.nan, 0.0], [3.0, 1.0, 1e-180], [5.0, 1.0, 0.0]])
        found: Blocks = block_moments(x[None], NONE)
        assert np.isfinite(found.m2[0]).tolist() == [True, False, False]
        assert found.m2[0, 0] == 8

    def test_underflow_beside_missing_values(self) -> None:
        x = np.array([[np.nan], [1e-200], [1e-200], [2e-200]])
        assert not np.isfinite(block_moments(x[None], Missing(omit=True)).m2).any()
        constant = np.array([[np.nan], [1e-200], [1e-200]])
        found = block_moments(constant[None], Missing(omit=True))
        assert (found.mean[0, 0], found.m2[0, 0]) == (1e-200, 0)
