"""Learning gamma and beta by mini-batch gradient descent: pure functions on arrays, and frozen records of a training.

The network is the smallest that has a use for them: batch normalization in training mode, an activation, its mean over
space, a linear head, a loss. Without a head (distillation) y itself is compared with a target of its shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bncli.choices import ACTIVATIONS as ACTIVATIONS
from bncli.choices import LOSSES as LOSSES
from bncli.choices import OPTIMIZERS as OPTIMIZERS
from bncli.numerics import compiled
from bncli.numerics.arrays import Array, Floats
from bncli.numerics.batchnorm import deviation
from bncli.numerics.layout import Layout

BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8  # Kingma & Ba (2015), arXiv 1412.6980, algorithm 1
CHUNK_VALUES = 1 << 16  # values, or outputs, of whole samples that are computed at a time: float64 arrays of 512 KB


class Parameters(NamedTuple):
    """What is learned: gamma and beta of shape (C,), the head's weight of shape (K, C) and bias of shape (K,)."""

    gamma: Floats
    beta: Floats
    weight: Floats
    bias: Floats


class LossGradient(NamedTuple):
    """The loss of a batch (a mean), its samples whose class was right, and the loss's gradient, of shape (P,)."""

    loss: float
    correct: int
    gradient: Floats


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes
    ----------
    layout : Layout
        Of the samples, with C features.
    outputs : int
        K, the classes or the numbers to predict; 0 without a head.
    activation, loss : str
        Of ACTIVATIONS and LOSSES.
    eps : float
        Of the normalization.
    """

    layout: Layout
    outputs: int
    activation: str
    loss: str
    eps: float

    @property
    def size(self) -> int:
        """P, the number of parameters: 2·C + K·(C + 1)."""
        return 2 * self.layout.features + self.outputs * (self.layout.features + 1)

    @property
    def samples_at_once(self) -> int:
        """Samples that are computed at a time."""
        return max(1, CHUNK_VALUES // max(self.layout.sample_size, self.outputs))

    def split(self, values: Floats) -> Parameters:
        """Views of the parameters in a vector of shape (P,) that holds them one after the other."""
        c, k = self.layout.features, self.outputs
        head = 2 * c + k * c
        return Parameters(values[:c], values[c : 2 * c], values[2 * c : head].reshape(k, c), values[head:])

    def join(self, parameters: Parameters) -> Floats:
        """The vector that `split` takes apart; a number, or a row or column, stands for all that it broadcasts to."""
        values = np.empty(self.size)
        for part, given in zip(self.split(values), parameters, strict=True):
            part[...] = given
        return values


@dataclass(frozen=True, eq=False)
class Training:
    """The state of a training: the parameters, Adam's moments of their gradients, and the steps taken.

    Frozen, and replaced after each step, so that an interrupted run holds a whole one.

    Attributes
    ----------
    values, first, second : shape (P,)
        In the order of `Parameters`. The moments stay 0 under sgd.
    steps : int
    """

    values: Floats
    first: Floats
    second: Floats
    steps: int = 0

    @classmethod
    def begin(cls, values: Floats) -> Training:
        """No step taken yet."""
        return cls(values, np.zeros_like(values), np.zeros_like(values))

    def pack(self) -> tuple[dict[str, Array], dict[str, int]]:
        """Named arrays and attributes, from which `unpack` makes the same state."""
        return {"values": self.values, "first": self.first, "second": self.second}, {"steps": self.steps}

    @classmethod
    def unpack(cls, arrays: dict[str, Array], attributes: dict[str, Any]) -> Training:
        """The state that was packed. Raises KeyError where a part is missing, ValueError where they do not fit."""
        values, first, second = (arrays[name] for name in ("values", "first", "second"))
        if not values.shape == first.shape == second.shape == (values.size,):
            raise ValueError("the parameters and the optimiser's moments differ in shape")
        return cls(values, first, second, int(attributes["steps"]))


@dataclass(frozen=True, eq=False)
class Optimizer:
    """How a gradient moves the parameters.

    Attributes
    ----------
    name : str
        Of OPTIMIZERS. `sgd` is without momentum.
    rate : float or shape (P,)
        The learning rate, of all parameters or of each.
    decay : int
        Steps over which the rate falls to 0 as half a cosine, like PyTorch's CosineAnnealingLR; 0 leaves it constant.
    """

    name: str
    rate: float | Floats
    decay: int = 0

    def step(self, training: Training, gradient: Floats, taken: int) -> Training:
        """The state after one more step; `taken` counts those of this run, for the decay."""
        rate = self.rate * (0.5 + 0.5 * math.cos(math.pi * taken / self.decay)) if self.decay else self.rate
        steps = training.steps + 1
        if self.name == "sgd":
            return replace(training, values=training.values - rate * gradient, steps=steps)
        first = BETA1 * training.first + (1 - BETA1) * gradient
        with np.errstate(over="ignore", invalid="ignore"):  # what diverges is told by whoever looks at the values
            second = BETA2 * training.second + (1 - BETA2) * (gradient * gradient)
        moved = rate / (1 - BETA1**steps) * first / (np.sqrt(second) / np.sqrt(1 - BETA2**steps) + ADAM_EPS)
        return Training(training.values - moved, first, second, steps)


def loss_and_gradient(model: Model, values: Floats, x: Array, mean: Floats, var: Floats, target: Array) -> LossGradient:
    """Normalise with the given statistics and compare with the target.

    In training mode the statistics are the batch's own, in test mode the running ones. They depend on the data alone, so
    the gradient with respect to gamma and beta is that of `batchnorm.backward`.

    Parameters
    ----------
    values : shape (P,)
        The parameters.
    x : shape (N, ...)
        A batch of samples of any real type.
    mean, var : shape (C,)
    target : array
        Class indices of shape (N,) for cross-entropy; else numbers of shape (N, K), or of x's shape where there is no head.

    Returns
    -------
    LossGradient
        The mean of the loss over samples (cross-entropy) or over all elements (mse), as PyTorch's default.
    """
    statistics = mean, 1 / deviation(var, model.eps)
    gradient, loss, correct = np.zeros(model.size), 0.0, 0
    add, at_once = (_add_compiled if compiled.AVAILABLE else _add), model.samples_at_once
    if compiled.AVAILABLE and x.dtype in (np.float32, np.float64):
        at_once = len(x)  # it holds few samples at a time by itself
    for first in range(0, len(x), at_once):
        chunk = slice(first, first + at_once)
        part, right = add(model, values, statistics, x[chunk], target[chunk], len(x), gradient)
        loss, correct = loss + part, correct + right
    return LossGradient(loss, correct, gradient)


def _add_compiled(
    model: Model,
    values: Floats,
    statistics: tuple[Floats, Floats],
    x: Array,
    target: Array,
    samples: int,
    gradient: Floats,
) -> tuple[float, int]:
    """As `_add`, in C."""
    layout, codes = model.layout, (ACTIVATIONS.index(model.activation), LOSSES.index(model.loss))
    x = x if x.dtype == np.float32 else x.astype(np.float64, copy=False)
    sample = (layout.rows_per_sample, layout.features, layout.positions)
    problem = (*codes, *sample, model.outputs)
    total, correct = compiled.loss_and_gradient(
        problem, samples, x, statistics, values, target, gradient, model.samples_at_once
    )
    terms = samples if model.loss == "cross-entropy" else samples * (model.outputs or layout.sample_size)
    return total / terms, correct


def _add(
    model: Model,
    values: Floats,
    statistics: tuple[Floats, Floats],
    x: Array,
    target: Array,
    samples: int,
    gradient: Floats,
) -> tuple[float, int]:
    """Add the gradient of some of a batch's `samples`; returns their share of its loss, and how many were right."""
    layout, parameters, added = model.layout, model.split(values), model.split(gradient)
    columns = (*statistics, parameters.gamma, parameters.beta)
    mean, inverse, gamma, beta = (np.repeat(v, layout.positions) for v in columns)
    xhat = (x.reshape(-1, layout.row_size).astype(np.float64) - mean) * inverse  # (R, W)
    a = _activate(model.activation, gamma * xhat + beta)
    if model.outputs:
        pooled = a
        if layout.values_per_sample > 1:
            pooled = a.reshape(len(target), -1, layout.features, layout.positions).mean(axis=(1, 3))
        outputs = _product(pooled, np.ascontiguousarray(parameters.weight.T)) + parameters.bias
        loss, correct, slopes = _compare(model.loss, outputs, target, samples)
        added.weight[...] += _product(slopes.T, pooled)
        added.bias[...] += slopes.sum(axis=0)
        da = _product(slopes / layout.values_per_sample, parameters.weight)
        da = np.repeat(np.repeat(da, layout.positions, axis=1), layout.rows_per_sample, axis=0)
    else:
        loss, correct, da = _compare("mse", a, target.reshape(a.shape), samples * layout.rows_per_sample)
    dy = da * _slope(model.activation, a)
    added.gamma[...] += np.einsum("rw,rw->w", dy, xhat).reshape(layout.features, -1).sum(axis=1)
    added.beta[...] += dy.sum(axis=0).reshape(layout.features, -1).sum(axis=1)
    return loss, correct


def _compare(loss: str, outputs: Floats, target: Array, rows: int) -> tuple[float, int, Floats]:
    """The share of these outputs in the loss of a batch of `rows`, how many are right, and the gradient at the outputs."""
    if loss == "cross-entropy":
        total, slopes = cross_entropy(outputs, target)
        return total / rows, int((outputs.argmax(axis=1) == target).sum()), slopes / rows
    difference = outputs - target
    elements = rows * outputs.shape[1]
    return float(np.square(difference).sum()) / elements, 0, difference * (2 / elements)


def cross_entropy(outputs: Floats, labels: npt.NDArray[np.intp]) -> tuple[float, Floats]:
    """Sum over samples of -log softmax(outputs)[label], and its gradient, of the shape (N, K) of the outputs.

    The largest output is subtracted first, so that no exponential overflows and the sum is 1 or more.
    """
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    rows = np.arange(len(labels))
    slopes = weights / total[:, None]
    slopes[rows, labels] -= 1
    return float((np.log(total) - shifted[rows, labels]).sum()), slopes


def _activate(activation: str, y: Floats) -> Floats:
    """The activation of y, which is overwritten."""
    if activation == "sigmoid":
        np.divide(1, 1 + np.exp(np.clip(-y, -600, 600)), out=y)
    elif activation == "tanh":
        np.tanh(y, out=y)
    elif activation == "relu":
        np.maximum(y, 0, out=y)
    return y


def _slope(activation: str, a: Floats) -> Floats | float:
    """The activation's derivative where the activation is a."""
    if activation == "sigmoid":
        return a * (1 - a)
    if activation == "tanh":
        return 1 - a * a
    return (a > 0).astype(np.float64) if activation == "relu" else 1.0


def _product(a: Floats, b: Floats) -> Floats:
    """The matrix product without BLAS, whose bits change with threads and processor."""
    product: Floats = np.einsum("ik,kj->ij", a, b)
    return product
