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

from bncli import compiled
from bncli.batchnorm import deviation
from bncli.layout import Layout

ACTIVATIONS = ("identity", "sigmoid", "tanh", "relu")  # in the order of `_blocks.c`
LOSSES = ("mse", "cross-entropy")
OPTIMIZERS = ("adam", "sgd")
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8  # Kingma & Ba (2015), arXiv 1412.6980, algorithm 1
CHUNK_VALUES = 1 << 16  # values, or outputs, of whole samples that are computed at a time: float64 arrays of 512 KB

Floats = npt.NDArray[np.float64]


class Parameters(NamedTuple):
    """What is learned: gamma and beta of shape (C,), the head's weight of shape (K, C) and bias of shape (K,)."""

    gamma: Floats
    beta: Floats
    weight: Floats
    bias: Floats


class Judged(NamedTuple):
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

    def pack(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, int]]:
        """Named arrays and attributes, from which `unpack` makes the same state."""
        return {"values": self.values, "first": self.first, "second": self.second}, {"steps": self.steps}

    @classmethod
    def unpack(cls, arrays: dict[str, npt.NDArray[Any]], attributes: dict[str, Any]) -> Training:
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


def judge(
    model: Model, values: Floats, x: npt.NDArray[Any], mean: Floats, var: Floats, target: npt.NDArray[Any]
) -> Judged:
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
    Judged
        The mean of the loss over samples (cross-entropy) or over all elements (mse), as PyTorch's default.
    """
    layout, gradient = model.layout, np.zeros(model.size)
    network = _Network.of(model, model.split(values), mean, var)
    at_once = max(1, CHUNK_VALUES // max(layout.sample_size, model.outputs))
    loss, correct = 0.0, 0
    for first in range(0, len(x), at_once):
        rows = x[first : first + at_once].reshape(-1, layout.row_size).astype(np.float64)
        part, right = network.add(rows, target[first : first + at_once], len(x), model.split(gradient))
        loss, correct = loss + part, correct + right
    return Judged(loss, correct, gradient)


class _Network(NamedTuple):
    """A model with its parameters and statistics, those of a feature repeated for each of its positions: shape (W,)."""

    model: Model
    kind: int
    mean: Floats
    inverse: Floats
    gamma: Floats
    beta: Floats
    weight: Floats
    bias: Floats

    @classmethod
    def of(cls, model: Model, parameters: Parameters, mean: Floats, var: Floats) -> _Network:
        columns = (mean, 1 / deviation(var, model.eps), parameters.gamma, parameters.beta)
        mean, inverse, gamma, beta = (np.repeat(v, model.layout.positions) for v in columns)
        kind = ACTIVATIONS.index(model.activation)
        return cls(model, kind, mean, inverse, gamma, beta, parameters.weight, parameters.bias)

    def add(self, rows: Floats, target: npt.NDArray[Any], samples: int, gradient: Parameters) -> tuple[float, int]:
        """Add the gradient of a chunk of a batch of `samples`; returns the chunk's share of the loss and its hits."""
        layout = self.model.layout
        xhat, a = _activate(self.kind, rows, self.mean, self.inverse, self.gamma, self.beta)
        if self.model.outputs:
            pooled = a
            if layout.values_per_sample > 1:
                pooled = a.reshape(len(target), -1, layout.features, layout.positions).mean(axis=(1, 3))
            outputs = _product(pooled, np.ascontiguousarray(self.weight.T)) + self.bias
            loss, correct, slopes = _compare(self.model.loss, outputs, target, samples)
            gradient.weight[...] += _product(slopes.T, pooled)
            gradient.bias[...] += slopes.sum(axis=0)
            da = _product(slopes / layout.values_per_sample, self.weight)
            da = da if layout.positions == 1 else np.repeat(da, layout.positions, axis=1)
        else:
            loss, correct, da = _compare("mse", a, target.reshape(a.shape), samples * layout.rows_per_sample)
        dgamma, dbeta = _gradients(self.kind, da, xhat, a)
        gradient.gamma[...] += dgamma.reshape(layout.features, -1).sum(axis=1)
        gradient.beta[...] += dbeta.reshape(layout.features, -1).sum(axis=1)
        return loss, correct


def _compare(loss: str, outputs: Floats, target: npt.NDArray[Any], rows: int) -> tuple[float, int, Floats]:
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


def _activate(
    kind: int, x: Floats, mean: Floats, inverse: Floats, gamma: Floats, beta: Floats
) -> tuple[Floats, Floats]:
    """The normalised values and the activations of rows of shape (R, W)."""
    xhat, a = np.empty_like(x), np.empty_like(x)
    if compiled.AVAILABLE:
        compiled.activate(kind, x, mean, inverse, gamma, beta, xhat, a)
        return xhat, a
    np.multiply(x - mean, inverse, out=xhat)
    np.add(gamma * xhat, beta, out=a)
    if ACTIVATIONS[kind] == "sigmoid":
        np.divide(1, 1 + np.exp(np.clip(-a, -600, 600)), out=a)
    elif ACTIVATIONS[kind] == "tanh":
        np.tanh(a, out=a)
    elif ACTIVATIONS[kind] == "relu":
        np.maximum(a, 0, out=a)
    return xhat, a


def _gradients(kind: int, da: Floats, xhat: Floats, a: Floats) -> tuple[Floats, Floats]:
    """Gradients of gamma and beta for each column, of shape (W,); a row of da, of shape (S, W), serves R / S rows of a."""
    if compiled.AVAILABLE:
        dgamma, dbeta = np.zeros(a.shape[1]), np.zeros(a.shape[1])
        compiled.gradients(kind, len(a) // len(da), da, xhat, a, dgamma, dbeta)
        return dgamma, dbeta
    dy = np.repeat(da, len(a) // len(da), axis=0)
    if ACTIVATIONS[kind] == "sigmoid":
        dy *= a * (1 - a)
    elif ACTIVATIONS[kind] == "tanh":
        dy *= 1 - a * a
    elif ACTIVATIONS[kind] == "relu":
        dy *= a > 0
    return np.einsum("rw,rw->w", dy, xhat), dy.sum(axis=0)


def _product(a: Floats, b: Floats) -> Floats:
    """The matrix product without BLAS, whose bits change with threads and processor."""
    if compiled.AVAILABLE:
        return compiled.product(a, b)
    product: Floats = np.einsum("ik,kj->ij", a, b)
    return product
