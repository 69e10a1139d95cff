"""Training mode, test mode and its inverse on arrays, against the formulas in rational numbers."""

from __future__ import annotations

from fractions import Fraction

import helpers
import numpy as np
import pytest
from helpers import Array, exact_columns, root
from hypothesis import given
from hypothesis import strategies as st

from bncli.errors import InputError, MismatchError, UsageError
from bncli.numerics import batchnorm

ROUNDING = {"f2": 2**-10, "f4": 2**-23, "f8": 2**-51}  # two units in the last place of 1, in float64 four


def check_test_mode(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, y: Array) -> None:
    """Assert y = gamma · (x - mean) / sqrt(var + eps) + beta for (N, C) arrays, within the rounding of the terms to the type."""
    assert y.shape == x.shape
    for c in range(x.shape[1]):
        sd = root(Fraction(float(var[c])) + Fraction(eps)) or Fraction(1)
        for value, found in zip(x[:, c].tolist(), y[:, c].tolist(), strict=True):
            term = Fraction(float(gamma[c])) * (Fraction(value) - Fraction(float(mean[c]))) / sd
            truth = term + Fraction(float(beta[c]))
            limit = Fraction(ROUNDING[y.dtype.str[1:]]) * max(abs(term), abs(Fraction(float(beta[c]))), abs(truth))
            assert abs(Fraction(found) - truth) <= limit


class TestForward:
    @given(
        helpers.tables(max_samples=60),
        st.sampled_from(helpers.DTYPES),
        st.sampled_from([0.0, 1e-5, 1e-3]),
        st.integers(0, 99),
    )
    def test_any_table_of_any_type(self, table: Array, dtype: str, eps: float, seed: int) -> None:
        x = helpers.as_type(table, dtype)
        rng = np.random.default_rng(seed)
        gamma, beta = rng.uniform(-2, 2, x.shape[1]), rng.uniform(-2, 2, x.shape[1])
        y, cache = batchnorm.forward(x, gamma, beta, eps=eps)
        truth = exact_columns(x)
        helpers.check_moments(cache.mean, cache.var, truth)
        assert y.dtype == (x.dtype if x.dtype.kind == "f" else np.float32)
        check_test_mode(x, cache.mean, cache.var, gamma, beta, eps, y)

    @pytest.mark.parametrize("axis", [1, 2, 3, -1, -3])
    def test_images_on_any_axis(self, axis: int) -> None:
        x = np.random.default_rng(0).standard_normal((4, 3, 5, 6)) * 3 + 10
        c = x.shape[axis]
        gamma, beta = np.linspace(1, 2, c), np.linspace(-1, 1, c)
        y, cache = batchnorm.forward(x, gamma, beta, axis=axis)
        helpers.check_moments(cache.mean, cache.var, exact_columns(x, axis))
        flat_x, flat_y = (np.moveaxis(a, axis, -1).reshape(-1, c) for a in (x, y))
        check_test_mode(flat_x, cache.mean, cache.var, gamma, beta, 1e-5, flat_y)
        assert cache.axis == axis % 4
        assert cache.xhat.shape == x.shape
        np.testing.assert_allclose(np.moveaxis(cache.xhat, axis, -1) * gamma + beta, np.moveaxis(y, axis, -1), rtol=0)

    def test_constant_feature_gives_exactly_beta(self) -> None:
        x = np.full((7, 2), [0.1, 1e10])
        for eps in (0.0, 1e-5):
            y, cache = batchnorm.forward(x, 3.0, 0.7, eps=eps)
            assert (y == 0.7).all()
            assert cache.var.tolist() == [0, 0]
            assert cache.mean.tolist() == [0.1, 1e10]

    def test_layouts_in_memory_do_not_matter(self) -> None:
        x = np.random.default_rng(0).standard_normal((40, 3, 5))
        y, cache = batchnorm.forward(x, 1.0, 0.0, axis=1)
        for other in (np.asfortranarray(x), x.astype(">f8"), np.repeat(x, 2, axis=0)[::2]):
            y2, cache2 = batchnorm.forward(other, 1.0, 0.0, axis=1)
            assert y2.tobytes() == y.tobytes()
            assert cache2.mean.tobytes() == cache.mean.tobytes()
            assert y2.dtype.isnative

    def test_refusals(self) -> None:
        with pytest.raises(UsageError, match="one value per feature"):
            batchnorm.forward(np.ones((1, 3)), 1.0, 0.0)
        with pytest.raises(InputError, match="feature 1"):
            batchnorm.forward([[1.0, np.nan], [2.0, 1.0]], 1.0, 0.0)
        with pytest.raises(InputError, match="feature 0"):
            batchnorm.forward([[1e200], [-1e200]], 1.0, 0.0)
        with pytest.raises(MismatchError, match="gamma"):
            batchnorm.forward(np.eye(3), [1.0, 2.0], 0.0)
        with pytest.raises(UsageError, match="axis 0"):
            batchnorm.forward(np.eye(3), 1.0, 0.0, axis=0)
        with pytest.raises(InputError, match="complex"):
            batchnorm.forward(np.eye(3) * 1j, 1.0, 0.0)
        with pytest.raises(UsageError, match="no feature axis"):
            batchnorm.forward(np.ones(3), 1.0, 0.0)

    def test_one_image_is_a_batch(self) -> None:
        _, cache = batchnorm.forward(np.arange(8.0).reshape(1, 2, 4), 1.0, 0.0, axis=1)
        assert cache.mean.tolist() == [1.5, 5.5]
        assert cache.var.tolist() == [1.25, 1.25]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Array, int]:
    """A float64 batch of two to four dimensions with at least two values per feature, and its feature axis."""
    shape = draw(
        st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda inner: [draw(st.integers(2, 9)), *inner])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3) + rng.normal()
    axis = draw(st.integers(1, len(shape) - 1))
    if draw(st.booleans()):
        np.moveaxis(x, axis, 0)[0] = 0.125  # a constant feature; its mean is exact in any order
    return x, axis


def complex_forward(x: Array, gamma: Array, beta: Array, eps: float, axis: int) -> Array:
    """The formula of training mode, also for complex numbers."""
    others = tuple(i for i in range(x.ndim) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    mean = x.mean(axis=others, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=others, keepdims=True)
    return gamma.reshape(shape) * (x - mean) / np.sqrt(var + eps) + beta.reshape(shape)


def complex_step(dy: Array, x: Array, gamma: Array, beta: Array, eps: float, axis: int) -> list[Array]:
    """Gradients of sum(dy · y) with respect to x, gamma and beta: Im f(a + ih) / h, without cancellation (Squire & Trapp 1998)."""
    h = 1e-30
    arguments = [x, gamma, beta]
    found = [np.empty_like(a) for a in arguments]
    for which, argument in enumerate(arguments):
        for index in np.ndindex(argument.shape):
            stepped = [a.astype(complex) for a in arguments]
            stepped[which][index] += 1j * h
            found[which][index] = (dy * complex_forward(*stepped, eps, axis)).sum().imag / h
    return found


def check_gradient(
    found: tuple[Array, Array, Array], truth: list[Array], dy: Array, cache: batchnorm.Cache, limit: float
) -> None:
    """Check dx within `limit` of max|gamma · dy| / sqrt(var + eps) per feature, dgamma and dbeta within `limit` of their terms."""
    features = len(cache.gamma)
    dx, dx_truth, g, xhat = (
        np.moveaxis(a, cache.axis, 0).reshape(features, -1) for a in (found[0], truth[0], dy, cache.xhat)
    )
    scale = np.abs(cache.gamma) * np.abs(g).max(axis=1) / np.sqrt(cache.var + cache.eps)
    assert (np.abs(dx - dx_truth).max(axis=1) <= limit * scale).all()
    assert (np.abs(found[1] - truth[1]) <= limit * np.abs(g * xhat).sum(axis=1)).all()
    assert (np.abs(found[2] - truth[2]) <= limit * np.abs(g).sum(axis=1)).all()


class TestBackward:
    @given(batches(), st.sampled_from([1e-5, 1e-3, 1.0]), st.integers(0, 99))
    def test_complex_step(self, batch: tuple[Array, int], eps: float, seed: int) -> None:
        x, axis = batch
        rng = np.random.default_rng(seed)
        gamma, beta = rng.normal(size=(2, x.shape[axis]))
        y, cache = batchnorm.forward(x, gamma, beta, eps, axis)
        np.testing.assert_allclose(complex_forward(x, gamma, beta, eps, axis), y, rtol=1e-9, atol=1e-9)
        dy = rng.normal(size=x.shape)
        truth = complex_step(dy, x, gamma, beta, eps, axis)
        check_gradient(batchnorm.backward(dy, cache), truth, dy, cache, 1e-10)

    @given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 99))
    def test_central_differences_of_forward_itself(self, n: int, features: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        x, dy = rng.normal(size=(2, n, features))
        gamma, beta, eps, h = rng.normal(size=features), rng.normal(size=features), 0.5, 1e-4
        _, cache = batchnorm.forward(x, gamma, beta, eps)
        dx, _, _ = batchnorm.backward(dy, cache)
        difference = np.empty_like(x)
        for i in range(n):
            step = np.zeros((n, 1))
            step[i] = h  # features are independent, so all take the step together
            above, below = (batchnorm.forward(x + s * step, gamma, beta, eps)[0] for s in (1, -1))
            difference[i] = (dy * (above - below)).sum(axis=0) / (2 * h)
        # the error is h² / 6 times the third derivative, which is a few times dy / sd³: about 1e-8
        scale = np.abs(gamma) * np.abs(dy).max(axis=0) / np.sqrt(cache.var + eps)
        assert (np.abs(dx - difference) <= 1e-7 * scale).all()

    @given(batches(), st.sampled_from([1e-5, 1e-2]), st.integers(0, 99))
    def test_torch(self, batch: tuple[Array, int], eps: float, seed: int) -> None:
        torch = helpers.peer("torch")
        x, axis = batch
        rng = np.random.default_rng(seed)
        gamma, beta = rng.normal(size=(2, x.shape[axis]))
        dy = rng.normal(size=x.shape)
        _, cache = batchnorm.forward(x, gamma, beta, eps, axis)
        parameters = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
        y = torch.nn.functional.batch_norm(
            parameters[0].movedim(axis, 1), None, None, *parameters[1:], training=True, eps=eps
        ).movedim(1, axis)
        y.backward(torch.tensor(dy))
        check_gradient(batchnorm.backward(dy, cache), [p.grad.numpy() for p in parameters], dy, cache, 1e-10)

    def test_gradient_of_two_values_is_zero(self) -> None:
        """With eps 0 any two values become -1 and 1, so the gradient is exactly 0."""
        _, cache = batchnorm.forward([[1.0, 5.0], [3.0, -7.0]], [2.0, 3.0], 0.0, eps=0.0)
        dx, dgamma, dbeta = batchnorm.backward([[1.0, 2.0], [4.0, 7.0]], cache)
        assert dx.tolist() == [[0, 0], [0, 0]]
        assert dgamma.tolist() == [3, -5]
        assert dbeta.tolist() == [5, 9]

    def test_variance_and_eps_of_zero_scale_by_one(self) -> None:
        _, cache = batchnorm.forward(np.full((4, 1), 0.1), 2.0, 0.0, eps=0.0)
        dx, dgamma, dbeta = batchnorm.backward([[1.0], [0.0], [0.0], [3.0]], cache)
        assert dx.tolist() == [[0], [-2], [-2], [4]]
        assert (dgamma.tolist(), dbeta.tolist()) == ([0], [4])

    @pytest.mark.parametrize(
        ("dtype", "expected"), [("f2", "f2"), ("f4", "f4"), ("f8", "f8"), (">f4", "f4"), ("?", "f4"), ("i8", "f4")]
    )
    def test_computed_in_float64_and_rounded_once(self, dtype: str, expected: str) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(50, 4)).astype("f4")
        dy = (rng.normal(size=x.shape) * 3).astype(dtype)
        _, cache = batchnorm.forward(x, 1.5, 0.0)
        dx, dgamma, dbeta = batchnorm.backward(dy, cache)
        whole, _, _ = batchnorm.backward(dy.astype("f8"), cache)
        assert dx.dtype == np.dtype(expected)
        assert dgamma.dtype == dbeta.dtype == whole.dtype == np.float64
        np.testing.assert_array_equal(dx, whole.astype(expected))

    @pytest.mark.parametrize("shape", [(64, 3), (60, 7), (8, 3, 16), (6, 4, 2, 5)])
    def test_layouts_in_memory_do_not_matter(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        x, dy = rng.normal(size=(2, *shape))
        for axis in range(1, len(shape)):
            found = [
                batchnorm.backward(as_laid(dy), batchnorm.forward(as_laid(x), 1.0, 0.0, axis=axis)[1])
                for as_laid in (np.asarray, np.asfortranarray, lambda a: a.astype(">f8"))
            ]
            for other in found[1:]:
                assert [a.tobytes() for a in other] == [a.tobytes() for a in found[0]]
                assert other[0].dtype.isnative

    def test_values_that_are_not_finite_pass_through(self) -> None:
        _, cache = batchnorm.forward(np.eye(3), 1.0, 0.0)
        dx, dgamma, dbeta = batchnorm.backward([[np.inf, 1.0, 2.0], [0.0, 1e308, 0.0], [0.0, 1e308, np.nan]], cache)
        assert not np.isfinite(dx).any(axis=0).any()
        assert not np.isfinite(dbeta).any()
        assert np.isnan(dgamma[2])

    def test_inputs_are_not_changed(self) -> None:
        _, cache = batchnorm.forward(np.eye(3), 1.0, 0.0)
        dy, xhat = np.arange(9.0).reshape(3, 3), cache.xhat.copy()
        batchnorm.backward(dy, cache)
        assert dy.tolist() == np.arange(9.0).reshape(3, 3).tolist()
        assert cache.xhat.tolist() == xhat.tolist()

    def test_refusals(self) -> None:
        _, cache = batchnorm.forward(np.eye(3), 1.0, 0.0)
        with pytest.raises(MismatchError, match=r"\(2, 3\).*\(3, 3\)"):
            batchnorm.backward(np.ones((2, 3)), cache)
        with pytest.raises(MismatchError, match=r"\(3, 3, 1\)"):
            batchnorm.backward(np.ones((3, 3, 1)), cache)
        with pytest.raises(InputError, match="complex"):
            batchnorm.backward(np.eye(3) * 1j, cache)
        with pytest.raises(UsageError, match="no feature axis"):
            batchnorm.backward(np.ones(3), cache)


class TestNormalize:
    @given(helpers.tables(max_samples=40), st.sampled_from(helpers.DTYPES), st.sampled_from([0.0, 1e-5, 1e-3]))
    def test_formula(self, table: Array, dtype: str, eps: float) -> None:
        x = helpers.as_type(table, dtype)
        truth = exact_columns(x)
        mean = np.array([float(t.mean) for t in truth])
        var = np.array([float(t.variance) for t in truth])
        gamma, beta = np.linspace(-2, 3, x.shape[1]), np.linspace(0.5, 9, x.shape[1])
        y = batchnorm.normalize(x, mean, var, gamma, beta, eps, dtype="f8")
        check_test_mode(x, mean, var, gamma, beta, eps, y)

    @given(helpers.tables(max_samples=40), st.sampled_from([1e-5, 0.0]))
    def test_round_trip(self, x: Array, eps: float) -> None:
        truth = exact_columns(x)
        mean = np.array([float(t.mean) for t in truth])
        var = np.array([float(t.variance) for t in truth])
        gamma, beta = np.linspace(1, 3, x.shape[1]), np.linspace(-0.5, 0.5, x.shape[1])
        y = batchnorm.normalize(x, mean, var, gamma, beta, eps)
        back = batchnorm.denormalize(y, mean, var, gamma, beta, eps)
        # y represents (x - mean) / sd within an ulp of max(|y|, |beta|)
        scale = np.abs(mean) + np.abs(x) + np.sqrt(var + eps)
        assert (np.abs(back - x) <= 4 * 2**-52 * scale).all()

    @given(helpers.tables(max_samples=20), st.sampled_from([1e-5, 0.0]))
    def test_inverse_formula(self, y: Array, eps: float) -> None:
        y = y / np.where(np.abs(y).max(axis=0) > 0, np.abs(y).max(axis=0), 1)
        c = y.shape[1]
        mean, var = np.linspace(-5, 7, c), np.linspace(0, 4, c)
        gamma, beta = np.linspace(0.5, -3, c), np.linspace(2, 3, c)
        x = batchnorm.denormalize(y, mean, var, gamma, beta, eps)
        for i in range(c):
            sd = root(Fraction(float(var[i])) + Fraction(eps)) or Fraction(1)
            for value, found in zip(y[:, i].tolist(), x[:, i].tolist(), strict=True):
                term = (Fraction(value) - Fraction(float(beta[i]))) / Fraction(float(gamma[i])) * sd
                truth = term + Fraction(float(mean[i]))
                assert abs(Fraction(found) - truth) <= Fraction(2**-50) * max(abs(term), abs(Fraction(float(mean[i]))))

    def test_subtraction_comes_first(self) -> None:
        """scale · x + shift would cancel: mean 10^8, sd 1e-3."""
        x = np.array([[1e8], [1e8 + 2**-10]])
        y = batchnorm.normalize(x, 1e8, 2.0**-20, eps=0.0)
        assert y.tolist() == [[0.0], [1.0]]

    def test_variance_and_eps_of_zero_scale_by_one(self) -> None:
        assert batchnorm.normalize([[5.0], [7.5]], 5.0, 0.0, 2.0, 1.0, eps=0.0).tolist() == [[1.0], [6.0]]
        assert batchnorm.denormalize([[1.0], [6.0]], 5.0, 0.0, 2.0, 1.0, eps=0.0).tolist() == [[5.0], [7.5]]

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [("f2", "f2"), ("f4", "f4"), ("f8", "f8"), (">f4", "f4"), ("?", "f4"), ("u1", "f4"), ("i8", "f4")],
    )
    def test_type_of_the_result(self, dtype: str, expected: str) -> None:
        x = np.array([[0, 1]], dtype)
        assert batchnorm.normalize(x, 0.0, 1.0).dtype == np.dtype(expected)
        assert batchnorm.normalize(x, 0.0, 1.0, dtype="f8").dtype == np.float64

    def test_missing_values_pass_through_and_missing_statistics_give_nan(self) -> None:
        y = batchnorm.normalize([[np.nan, np.inf, 1.0]], [0.0, 0.0, np.nan], [1.0, 1.0, np.nan])
        np.testing.assert_array_equal(y, [[np.nan, batchnorm.normalize([[np.inf]], 0.0, 1.0)[0, 0], np.nan]])
        assert np.isinf(y[0, 1])

    def test_values_that_do_not_fit_the_type_are_counted_and_refused(self) -> None:
        x = np.array([[60_000.0], [60_001.0], [0.0]], "f4")
        with pytest.raises(MismatchError, match="2 values do not fit float16"):
            batchnorm.normalize(x, 0.0, 1e-2, dtype="f2")
        with pytest.raises(MismatchError, match="1 values do not fit float16"):
            batchnorm.denormalize(np.array([[30.0], [1.0]], "f2"), 0.0, 1e8)

    def test_refusals(self) -> None:
        with pytest.raises(MismatchError, match="gamma is 0 for feature 1"):
            batchnorm.denormalize(np.eye(2), 0.0, 1.0, [1.0, 0.0])
        with pytest.raises(MismatchError, match="mean"):
            batchnorm.normalize(np.eye(2), [0.0, 0.0, 0.0], 1.0)
        with pytest.raises(UsageError, match="negative"):
            batchnorm.normalize(np.eye(2), 0.0, -1.0)
        with pytest.raises(UsageError, match="negative"):
            batchnorm.normalize(np.eye(2), 0.0, 1.0, eps=-1e-5)
        with pytest.raises(UsageError, match="axis 0"):
            batchnorm.normalize(np.eye(2), 0.0, 1.0, axis=0)
