"""Batch normalization of arrays: pure functions that compute in float64 and round once at the end.

Ioffe & Szegedy (2015), arXiv 1502.03167, algorithms 1 (training mode) and 2 (test mode). The split into forward and
backward passes that share a cache is that of Stanford's CS231n notes. Names imported "as" themselves are public here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError, MismatchError, UsageError
from bncli.numerics.affine import Affine as Affine
from bncli.numerics.affine import by_parts, normal_quotient
from bncli.numerics.affine import deviation as deviation
from bncli.numerics.affine import overflowed as overflowed
from bncli.numerics.affine import round_to as round_to
from bncli.numerics.arrays import Array, DType, Floats, to_array
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Layout, Values, feature_axis
from bncli.numerics.moments import Moments

WIDE_ROW = 512  # rows of at least this many values keep the overhead of NumPy low


@dataclass(frozen=True, slots=True)
class Cache:
    """Intermediate results of `forward` that `backward` needs.

    Attributes
    ----------
    mean, var : shape (C,)
        Mean and biased variance (divided by n) of the batch.
    xhat : shape of x
        The normalized values, before gamma and beta are applied.
    gamma : shape (C,)
    eps : float
    axis : int
        The feature axis, 1 or more.
    """

    mean: Floats
    var: Floats
    xhat: Floats
    gamma: Floats
    eps: float
    axis: int


def moments(x: Array, axis: int = -1) -> Moments:
    """Count, mean and m2 (sum of squared deviations) of each feature of a batch: Moments of shape (C,).

    Parameters
    ----------
    x : array of shape (N, ...)
        Samples along axis 0.
    axis : int
        The feature axis.
    """
    layout = Layout.of(x.shape, axis)
    values = np.ascontiguousarray(x).reshape(-1)
    return layout.moments(Values(lambda first, count: values[first : first + count]), 1, len(x), Missing())[0]


def forward(
    x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, eps: float = 1e-5, axis: int = -1
) -> tuple[Array, Cache]:
    """Training mode: normalize a batch with its own statistics.

    y = gamma · (x - mean) / sqrt(var + eps) + beta, with the biased variance (Ioffe & Szegedy 2015, algorithm 1).

    Parameters
    ----------
    x : array_like of shape (N, ...)
        Two or more dimensions, samples along axis 0.
    gamma, beta : float or array_like of shape (C,)
    eps : float
        Added to the variance; 0 or more. If var + eps is 0, the scale is 1.
    axis : int
        The feature axis.

    Returns
    -------
    y : array of the shape of x
        Has the type of x if that is a float type, else float32.
    cache : Cache
        `mean` and `var` of the batch, of shape (C,), and what `backward` needs.

    Raises
    ------
    UsageError
        For a batch with one value per feature, whose variance is undefined, or axis 0.
    InputError
        For values that are not finite or not real numbers.
    MismatchError
        When gamma or beta has a length other than C, or a value does not fit the type of the result.

    Examples
    --------
    >>> y, cache = forward([[1.0, 5.0], [3.0, 5.0]], gamma=1.0, beta=0.0, eps=0.0)
    >>> y.tolist(), cache.mean.tolist(), cache.var.tolist()
    ([[-1.0, 0.0], [1.0, 0.0]], [2.0, 5.0], [1.0, 0.0])
    """
    x = real_array(x)
    axis = feature_axis(x.ndim, axis)
    if x.size <= x.shape[axis]:
        raise UsageError("a batch with one value per feature cannot be normalized; give two or more values per feature")
    batch = moments(x, axis)
    if not np.isfinite(batch.m2).all():
        feature = int(np.flatnonzero(~np.isfinite(batch.m2))[0])
        raise InputError(f"feature {feature} holds NaN or infinity, or values whose squares do not fit a float64")
    mean, var = batch.mean, batch.variance()
    xhat = normalize(np.asarray(x, np.float64), mean, var, 1.0, 0.0, eps, axis)
    gamma, beta = per_feature(gamma, x.shape[axis], "gamma"), per_feature(beta, x.shape[axis], "beta")
    shape = _shape(x.ndim, axis)
    shift = Affine(np.zeros(1), gamma.reshape(shape), np.ones(1), beta.reshape(shape), gamma.reshape(shape))
    return _checked(x, xhat, shift, None), Cache(mean, var, xhat, gamma, eps, axis)


def backward(dy: npt.ArrayLike, cache: Cache) -> tuple[Array, Floats, Floats]:
    """The gradient of `forward`, including the dependence of mean and variance on the batch.

    With n values per feature and sums over the values of a feature (Ioffe & Szegedy 2015, section 3, simplified):

        dbeta = sum(dy),  dgamma = sum(dy · xhat)
        dx    = gamma / sqrt(var + eps) · (dy - dbeta / n - xhat · dgamma / n)

    Where var and eps are both 0, `forward` scales by 1 and is not differentiable; that scale is then treated as a
    constant, which leaves dx = gamma · (dy - dbeta / n).

    Parameters
    ----------
    dy : array_like of the shape of x
        Gradient of a loss with respect to the y of `forward`. Values that are not finite propagate.
    cache : Cache
        The second result of `forward`.

    Returns
    -------
    dx : array of the shape of x
        Computed in float64; has the type of dy if that is a float type, else float32.
    dgamma, dbeta : float64, shape (C,)

    Raises
    ------
    MismatchError
        When the shape of dy differs from that of the batch.
    InputError
        When dy does not hold real numbers.

    Examples
    --------
    >>> _, cache = forward([[-1.0], [1.0], [0.0], [0.0]], gamma=2.0, beta=0.0, eps=0.5)  # sd 1, so xhat is x
    >>> dx, dgamma, dbeta = backward([[4.0], [0.0], [0.0], [0.0]], cache)
    >>> dx.tolist(), dgamma.tolist(), dbeta.tolist()
    ([[4.0], [0.0], [-2.0], [-2.0]], [-4.0], [4.0])
    """
    dy = real_array(dy)
    if dy.shape != cache.xhat.shape:
        raise MismatchError(f"dy has shape {dy.shape}, but the batch has {cache.xhat.shape}")
    view, joined = _column_view(dy.shape, cache.axis)
    dx = np.array(dy, np.float64, order="C").reshape(view)  # (R, C, I) or (R / J, J·C)
    xhat = np.ascontiguousarray(cache.xhat).reshape(view)
    axes = "rci"[: len(view)]
    n = dy.size // len(cache.gamma)

    def columns(values: Floats) -> Floats:
        return np.tile(values, joined).reshape(-1, *(1,) * (len(view) - 2))

    scale = normal_quotient(cache.gamma, sd := deviation(cache.var, cache.eps))
    with np.errstate(over="ignore", invalid="ignore"):
        # einsum: no BLAS, whose rounding varies, and no temporary array of products
        dbeta = np.einsum(f"{axes}->c", dx).reshape(joined, -1).sum(axis=0)  # (C,)
        dgamma = np.einsum(f"{axes},{axes}->c", dx, xhat).reshape(joined, -1).sum(axis=0)  # (C,)
        dx -= columns(dbeta / n)
        dx -= xhat * columns(dgamma / n)
        if np.isfinite(scale).all():
            dx *= columns(scale)
        else:
            dx = by_parts(dx, 0.0, columns(cache.gamma), columns(sd), 0.0)
    return round_to(dx.reshape(dy.shape), output_type(dy.dtype)), dgamma, dbeta


def normalize(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike = 1.0,
    beta: npt.ArrayLike = 0.0,
    eps: float = 1e-5,
    axis: int = -1,
    dtype: npt.DTypeLike | None = None,
) -> Array:
    """Test mode: y = gamma · (x - mean) / sqrt(var + eps) + beta (Ioffe & Szegedy 2015, algorithm 2).

    The mean is subtracted first, so that x = mean gives exactly beta.

    Parameters
    ----------
    x : array_like
        Two or more dimensions, features along `axis`.
    mean, var, gamma, beta : float or array_like of shape (C,)
    eps : float
        Added to the variance. If var + eps is 0, the scale is 1.
    axis : int
        The feature axis.
    dtype : float type, optional
        Type of the result; by default that of x if it is a float type, else float32.

    Returns
    -------
    array of the shape of x
        NaN where x or the statistics are NaN.

    Raises
    ------
    UsageError
        For axis 0, an axis that x does not have, or a negative variance or eps.
    InputError
        When x or a statistic does not hold real numbers.
    MismatchError
        When a statistic has a length other than C, or a value does not fit the type of the result.

    Examples
    --------
    >>> normalize([[3.0], [5.0]], mean=3.0, var=4.0, gamma=10.0, beta=1.0, eps=0.0).tolist()
    [[1.0], [11.0]]
    """
    x = real_array(x)
    return _checked(x, x, _affine(x.shape, mean, var, gamma, beta, eps, axis), dtype)


def denormalize(
    y: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike = 1.0,
    beta: npt.ArrayLike = 0.0,
    eps: float = 1e-5,
    axis: int = -1,
    dtype: npt.DTypeLike | None = None,
) -> Array:
    """The inverse of `normalize`: x = (y - beta) / gamma · sqrt(var + eps) + mean.

    Parameters and result are those of `normalize`.

    Raises
    ------
    UsageError, InputError
        As `normalize`.
    MismatchError
        As `normalize`, and when a gamma is 0, since every value of that feature became beta.

    Examples
    --------
    >>> denormalize([[1.0], [11.0]], mean=3.0, var=4.0, gamma=10.0, beta=1.0, eps=0.0).tolist()
    [[3.0], [5.0]]
    """
    y = real_array(y)
    return _checked(y, y, _affine(y.shape, mean, var, gamma, beta, eps, axis, inverse=True), dtype)


def output_type(dtype: DType) -> DType:
    """Default type of the result: the native form of a float type, float32 for other types."""
    return dtype.newbyteorder("=") if dtype.kind == "f" else np.dtype(np.float32)


def per_feature(values: npt.ArrayLike, features: int, name: str) -> Floats:
    """Convert a number or C values, finite or not, to an array of shape (C,).

    Raises
    ------
    InputError
        When the values are not real numbers.
    MismatchError
        When their shape is neither () nor (C,).
    """
    array = to_array(values, name)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} is of type {array.dtype}; give a number, or an array of real numbers")
    array = array.astype(np.float64, copy=False)
    if array.ndim and array.shape != (features,):
        raise MismatchError(
            f"{name} has shape {array.shape}; the data has {features} features, so it must be a number or ({features},)"
        )
    return np.broadcast_to(array, features)


def real_array(x: npt.ArrayLike) -> Array:
    """Convert x to an array of bool, integers or floats with two or more dimensions; raise InputError or UsageError otherwise."""
    array = to_array(x)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(
            f"values of type {array.dtype} cannot be normalized; use bool, integers or floats up to 64 bits"
        )
    if array.ndim < 2:
        raise UsageError(f"an array of shape {array.shape} has no feature axis; reshape it to (samples, features)")
    return array


def _column_view(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], int]:
    """View shape (R, C, I) of an array in C order, or (R / J, J·C) if I is 1; and J, the number of rows joined into one.

    NumPy has an overhead per row, so rows of few features are joined.
    """
    layout = Layout.of(shape, axis)
    rows = shape[0] * layout.rows_per_sample
    if layout.positions > 1:
        return (rows, layout.features, layout.positions), 1
    at_most = max(1, WIDE_ROW // layout.features)
    joined = math.gcd(rows, 1 << at_most.bit_length() - 1)
    return (rows // joined, joined * layout.features), joined


def _shape(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(-1 if i == axis % rank else 1 for i in range(rank))


def _affine(
    shape: tuple[int, ...],
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike,
    beta: npt.ArrayLike,
    eps: float,
    axis: int,
    inverse: bool = False,
) -> Affine:
    """Test mode or its inverse for arrays of this shape, with statistics along the feature axis; raises as `normalize`."""
    axis = feature_axis(len(shape), axis)
    named = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    m, v, g, b = (
        per_feature(a, shape[axis], name).reshape(_shape(len(shape), axis)) for name, a in named.items()
    )  # (1, .., C, .., 1)
    return Affine.of(m, v, g, b, eps, inverse=inverse)


def _checked(given: Array, x: Array, affine: Affine, dtype: npt.DTypeLike | None) -> Array:
    """Apply `affine` to x, which was computed from `given`; raise MismatchError for values that do not fit the type."""
    result, finite = affine(x, target := output_type(given.dtype) if dtype is None else np.dtype(dtype))
    if not finite and (count := int(np.count_nonzero(overflowed(given, result)))):
        hint = "ask for a wider type (dtype)" if target.itemsize < 8 else "rescale them or gamma"
        raise MismatchError(f"{count} values do not fit {target}; {hint}")
    return result
