"""Batch normalization of arrays: pure functions, float64 inside, rounded once at the end.

Ioffe & Szegedy (2015), arXiv 1502.03167, algorithm 1 (training mode) and 2 (test mode).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli import compiled
from bncli.arrays import to_array
from bncli.errors import InputError, MismatchError, UsageError
from bncli.kernels import Missing
from bncli.layout import Layout, Values, feature_axis
from bncli.moments import Moments

WIDE_ROW = 512  # values of one row that numpy takes well in one go
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Affine:
    """Test mode and its inverse with fixed statistics, for arrays that these broadcast against.

    Attributes
    ----------
    mean, sd, gamma, beta : broadcastable arrays
        sd is sqrt(var + eps), or 1 where that is 0.
    """

    mean: Floats
    sd: Floats
    gamma: Floats
    beta: Floats

    @classmethod
    def of(cls, mean: Floats, var: Floats, gamma: Floats, beta: Floats, eps: float) -> Affine:
        """Raise UsageError for a negative variance or eps."""
        if (var < 0).any() or eps < 0:
            raise UsageError("a variance and eps cannot be negative")
        return cls(mean, deviation(var, eps), gamma, beta)

    def __getitem__(self, index: Any) -> Affine:
        return Affine(self.mean[index], self.sd[index], self.gamma[index], self.beta[index])

    def normalize(self, x: npt.NDArray[Any]) -> Floats:
        """y = gamma · (x - mean) / sd + beta, in float64; the subtraction first, so that x = mean gives beta."""
        y = x.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            y -= self.mean
            y *= self.gamma / self.sd
            y += self.beta
        return y

    def normalize_to(self, x: npt.NDArray[Any], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], bool]:
        """`normalize` of x of shape (R, C, I) by statistics of shape (C, 1), rounded to `dtype`; and whether all is finite."""
        columns = self.mean[:, 0], (self.gamma / self.sd)[:, 0], self.beta[:, 0]
        found = compiled.normalize(x, *columns, dtype)
        if found is None:
            y = round_to(self.normalize(x), dtype)
            found = y, bool(np.isfinite(y).all())
        return found

    def denormalize(self, y: npt.NDArray[Any]) -> Floats:
        """x = (y - beta) / gamma · sd + mean, in float64. Raises MismatchError where gamma is 0."""
        if (self.gamma == 0).any():
            feature = int(np.flatnonzero(self.gamma == 0)[0])
            raise MismatchError(
                f"gamma is 0 for feature {feature}: every value became beta, nothing can be brought back"
            )
        x = y.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            x -= self.beta
            x /= self.gamma
            x *= self.sd
            x += self.mean
        return x


@dataclass(frozen=True, slots=True)
class Cache:
    """What `forward` computed on the way.

    Attributes
    ----------
    mean, var : shape (C,)
        Mean and variance (divided by n) of the batch.
    xhat : shape of x
        The normalised values, before gamma and beta.
    gamma : shape (C,)
    eps : float
    axis : int
        The feature axis, counted from the front.
    """

    mean: Floats
    var: Floats
    xhat: Floats
    gamma: Floats
    eps: float
    axis: int


def moments(x: npt.NDArray[Any], axis: int = -1) -> Moments:
    """Count, mean and m2 of each feature of one batch: Moments of shape (C,).

    Parameters
    ----------
    x : array of two or more dimensions, samples along axis 0
    axis : int
        The feature axis.
    """
    layout = Layout.of(x.shape, axis)
    values = np.ascontiguousarray(x).reshape(-1)
    return layout.moments(Values(lambda first, count: values[first : first + count]), 1, len(x), Missing())[0]


def forward(
    x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, eps: float = 1e-5, axis: int = -1
) -> tuple[npt.NDArray[Any], Cache]:
    """Training mode: normalise a batch with its own statistics.

    y = gamma · (x - mean) / sqrt(var + eps) + beta, with var divided by n.

    Parameters
    ----------
    x : array of two or more dimensions, samples along axis 0
    gamma, beta : a number or shape (C,)
    eps : float
        Added to the variance; 0 or more. With 0 a variance of 0 scales by 1.
    axis : int
        The feature axis.

    Returns
    -------
    y : array of the shape of x
        In x's type when that is a float type, else float32.
    cache : Cache
        The batch's `mean` and `var`, of shape (C,), and what a backward pass needs.

    Raises
    ------
    UsageError
        For a batch of one value per feature (its variance says nothing) or axis 0.
    InputError
        For values that are not finite.
    MismatchError
        For gamma or beta of another length than C.

    Examples
    --------
    >>> y, cache = forward([[1.0, 5.0], [3.0, 5.0]], gamma=1.0, beta=0.0, eps=0.0)
    >>> y.tolist(), cache.mean.tolist(), cache.var.tolist()
    ([[-1.0, 0.0], [1.0, 0.0]], [2.0, 5.0], [1.0, 0.0])
    """
    x = real_array(x)
    axis = feature_axis(x.ndim, axis)
    if x.size <= x.shape[axis]:
        raise UsageError("a batch of one value per feature cannot be normalised: its variance says nothing")
    batch = moments(x, axis)
    if not np.isfinite(batch.m2).all():
        feature = int(np.flatnonzero(~np.isfinite(batch.m2))[0])
        raise InputError(f"feature {feature} holds NaN or infinity, or values whose squares do not fit a float64")
    mean, var = batch.mean, batch.variance()
    xhat = normalize(np.asarray(x, np.float64), mean, var, 1.0, 0.0, eps, axis)
    gamma, beta = per_feature(gamma, x.shape[axis], "gamma"), per_feature(beta, x.shape[axis], "beta")
    shape = _shape(x.ndim, axis)
    y = round_to(gamma.reshape(shape) * xhat + beta.reshape(shape), output_type(x.dtype))
    return y, Cache(mean, var, xhat, gamma, eps, axis)


def backward(
    dy: npt.ArrayLike, cache: Cache
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The exact gradient of `forward`, through the batch's own mean and variance.

    With n values per feature and sums over a feature's values (Ioffe & Szegedy 2015, section 3, brought to one line):

        dbeta = sum(dy),  dgamma = sum(dy · xhat)
        dx    = gamma / sqrt(var + eps) · (dy - dbeta / n - xhat · dgamma / n)

    Where var and eps are both 0, `forward` scales by 1 and has no derivative; that 1 then counts as fixed, which leaves
    dx = gamma · (dy - dbeta / n).

    Parameters
    ----------
    dy : array of the shape of x
        Gradient of a loss with respect to `forward`'s y. Values that are not finite pass through.
    cache : Cache
        What `forward` returned beside y.

    Returns
    -------
    dx : array of the shape of x
        Computed in float64; in dy's type when that is a float type, else float32.
    dgamma, dbeta : float64, shape (C,)

    Raises
    ------
    MismatchError
        When dy has another shape than the batch.
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
        raise MismatchError(f"dy has shape {dy.shape}, the batch that went forward {cache.xhat.shape}")
    view, joined = _column_view(dy.shape, cache.axis)
    dx = np.array(dy, np.float64, order="C").reshape(view)
    xhat = np.ascontiguousarray(cache.xhat).reshape(view)
    axes = "rci"[: len(view)]
    n = dy.size // len(cache.gamma)

    def columns(values: Floats) -> Floats:
        return np.tile(values, joined).reshape(-1, *(1,) * (len(view) - 2))

    with np.errstate(over="ignore", invalid="ignore"):
        # einsum: neither BLAS nor an array of products in between
        dbeta = np.einsum(f"{axes}->c", dx).reshape(joined, -1).sum(axis=0)
        dgamma = np.einsum(f"{axes},{axes}->c", dx, xhat).reshape(joined, -1).sum(axis=0)
        dx -= columns(dbeta / n)
        dx -= xhat * columns(dgamma / n)
        dx *= columns(cache.gamma / deviation(cache.var, cache.eps))
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
) -> npt.NDArray[Any]:
    """Test mode: y = gamma · (x - mean) / sqrt(var + eps) + beta, the subtraction first.

    Parameters
    ----------
    x : array, features along `axis`
    mean, var, gamma, beta : a number or shape (C,)
    eps : float
        Added to the variance; with 0 a variance of 0 scales by 1.
    axis : int
    dtype : float type, optional
        Of the result; by default x's type when that is a float type, else float32.

    Returns
    -------
    array of the shape of x; NaN where x or the statistics are.

    Raises
    ------
    MismatchError
        When the statistics are of another length than the axis, or a value does not fit the result's type.

    Examples
    --------
    >>> normalize([[3.0], [5.0]], mean=3.0, var=4.0, gamma=10.0, beta=1.0, eps=0.0).tolist()
    [[1.0], [11.0]]
    """
    x = real_array(x)
    affine = _affine(x, mean, var, gamma, beta, eps, axis)
    return _checked(x, affine.normalize(x), dtype)


def denormalize(
    y: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike = 1.0,
    beta: npt.ArrayLike = 0.0,
    eps: float = 1e-5,
    axis: int = -1,
    dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """The inverse of `normalize`: x = (y - beta) / gamma · sqrt(var + eps) + mean.

    Parameters and result are those of `normalize`.

    Raises
    ------
    MismatchError
        As `normalize`; and where gamma is 0, since every value went to beta.

    Examples
    --------
    >>> denormalize([[1.0], [11.0]], mean=3.0, var=4.0, gamma=10.0, beta=1.0, eps=0.0).tolist()
    [[3.0], [5.0]]
    """
    y = real_array(y)
    affine = _affine(y, mean, var, gamma, beta, eps, axis)
    return _checked(y, affine.denormalize(y), dtype)


def output_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Type of the result when none is asked for: float types stay, others become float32."""
    return dtype.newbyteorder("=") if dtype.kind == "f" else np.dtype(np.float32)


def deviation(var: Floats, eps: float) -> Floats:
    """sqrt(var + eps), and 1 where that is 0."""
    sd = np.sqrt(var + eps)
    return np.where(sd == 0, 1.0, sd)


def round_to(values: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Round float64 values to `dtype`; what is too large becomes infinite, silently (see `overflowed`)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype, copy=False)


def overflowed(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Mark finite values whose result is infinite: they do not fit the result's type."""
    marked: npt.NDArray[np.bool_] = np.isinf(after) & np.isfinite(before)
    return marked


def per_feature(values: npt.ArrayLike, features: int, name: str) -> Floats:
    """A number or (C,) values as an array of shape (C,), finite or not; raises InputError for other than real numbers."""
    array = to_array(values, name)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} is of type {array.dtype}; give a number, or an array of real numbers")
    array = array.astype(np.float64, copy=False)
    if array.ndim and array.shape != (features,):
        raise MismatchError(
            f"{name} has shape {array.shape}; the data has {features} features, so it must be a number or ({features},)"
        )
    return np.broadcast_to(array, features)


def real_array(x: npt.ArrayLike) -> npt.NDArray[Any]:
    """x as an array of a type bn computes with (bool, integers, floats), of two or more dimensions."""
    array = to_array(x)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(
            f"values of type {array.dtype} cannot be normalised; use bool, integers or floats up to 64 bits"
        )
    if array.ndim < 2:
        raise UsageError(f"an array of shape {array.shape} has no feature axis; reshape it to (samples, features)")
    return array


def _column_view(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], int]:
    """Shape (R, C, I) of an array in C order, or (R, J·C) where I is 1; and J, the rows that were joined.

    numpy pays per run of columns, so few channels that lie next to each other are taken several rows at once.
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
    x: npt.NDArray[Any],
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike,
    beta: npt.ArrayLike,
    eps: float,
    axis: int,
) -> Affine:
    """The statistics, shaped to broadcast against x along its feature axis."""
    axis = feature_axis(x.ndim, axis)
    named = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    m, v, g, b = (per_feature(a, x.shape[axis], name).reshape(_shape(x.ndim, axis)) for name, a in named.items())
    return Affine.of(m, v, g, b, eps)


def _checked(x: npt.NDArray[Any], y: Floats, dtype: npt.DTypeLike | None) -> npt.NDArray[Any]:
    """Round the result, refusing values that do not fit its type."""
    target = np.dtype(dtype) if dtype is not None else output_type(x.dtype)
    result = round_to(y, target)
    if np.isinf(result).any():
        count = int(np.count_nonzero(overflowed(x, result)))
        if count:
            raise MismatchError(f"{count} values do not fit {target}; ask for a wider type (dtype)")
    return result
