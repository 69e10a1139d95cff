"""Training gamma and beta by mini-batch gradient descent: pure functions on arrays and frozen records.

The network is minimal: batch normalization in training mode, an activation, global average pooling, a linear head and a
loss. Without a head (distillation), y itself is compared with a target of its shape. Gradients follow Ioffe & Szegedy
(2015), section 3, and the softmax and backpropagation notes of Stanford's CS231n.
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
CHUNK_VALUES = 1 << 16  # values (or outputs) of whole samples computed at a time: float64 arrays of 512 KB


class Parameters(NamedTuple):
    """Trainable parameters: gamma and beta of shape (C,), the weight (K, C) and bias (K,) of the head."""

    gamma: Floats
    beta: Floats
    weight: Floats
    bias: Floats


class LossGradient(NamedTuple):
    """The mean loss of a batch, its number of correctly classified samples, and the gradient of shape (P,)."""

    loss: float
    correct: int
    gradient: Floats


@dataclass(frozen=True)
class Model:
    """The network that is trained.

    Attributes
    ----------
    layout : Layout
        Layout of the samples, with C features.
    outputs : int
        K, the number of classes or of numbers to predict; 0 without a head.
    activation, loss : str
        One of ACTIVATIONS and one of LOSSES.
    eps : float
        Added to the variance.
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
        """Number of samples to compute at a time."""
        return max(1, CHUNK_VALUES // max(self.layout.sample_size, self.outputs))

    def split(self, values: Floats) -> Parameters:
        """Views of the parameters in their concatenation, a vector of shape (P,)."""
        c, k = self.layout.features, self.outputs
        head = 2 * c + k * c
        return Parameters(values[:c], values[c : 2 * c], values[2 * c : head].reshape(k, c), values[head:])

    def join(self, parameters: Parameters) -> Floats:
        """The inverse of `split`: a vector of shape (P,). The parameters are broadcast to their shapes."""
        values = np.empty(self.size)
        for part, given in zip(self.split(values), parameters, strict=True):
            part[...] = given
        return values


@dataclass(frozen=True, eq=False)
class ModelState:
    """The parameters, Adam's moments of their gradients, and the number of steps.

    Frozen, and replaced after each step, so that an interrupted run has a consistent one.

    Attributes
    ----------
    values, first, second : shape (P,)
        In the order of `Parameters`. The moments stay 0 with sgd.
    steps : int
    """

    values: Floats
    first: Floats
    second: Floats
    steps: int = 0

    @classmethod
    def begin(cls, values: Floats) -> ModelState:
        """The state before the first step."""
        return cls(values, np.zeros_like(values), np.zeros_like(values))

    def pack(self) -> tuple[dict[str, Array], dict[str, int]]:
        """The state as named arrays and attributes; the inverse of `unpack`."""
        return {"values": self.values, "first": self.first, "second": self.second}, {"steps": self.steps}

    @classmethod
    def unpack(cls, arrays: dict[str, Array], attributes: dict[str, Any]) -> ModelState:
        """The inverse of `pack`. Raises KeyError when a part is missing, ValueError when shapes differ."""
        values, first, second = (arrays[name] for name in ("values", "first", "second"))
        if not values.shape == first.shape == second.shape == (values.size,):
            raise ValueError("the parameters and the moments of the optimizer differ in shape")
        return cls(values, first, second, int(attributes["steps"]))


@dataclass(frozen=True, eq=False)
class Optimizer:
    """The update rule: Adam (Kingma & Ba 2015, algorithm 1) or plain stochastic gradient descent.

    Attributes
    ----------
    name : str
        One of OPTIMIZERS. `sgd` has no momentum.
    rate : float or shape (P,)
        The learning rate, for all parameters or for each.
    decay : int
        Steps in which the rate decays to 0 along half a cosine (as PyTorch's CosineAnnealingLR); 0 keeps it constant.
    """

    name: str
    rate: float | Floats
    decay: int = 0

    def step(self, state: ModelState, gradient: Floats, taken: int) -> ModelState:
        """The state after one step. `taken` is the number of steps before it in this run, for the decay.

        Adam, with gradient g and step t (all of shape (P,)):

            first = b1 first + (1 - b1) g,  second = b2 second + (1 - b2) g²
            values -= rate · first / (1 - b1^t) / (sqrt(second / (1 - b2^t)) + 1e-8)
        """
        rate = self.rate * (0.5 + 0.5 * math.cos(math.pi * taken / self.decay)) if self.decay else self.rate
        steps = state.steps + 1
        if self.name == "sgd":
            return replace(state, values=state.values - rate * gradient, steps=steps)
        first = BETA1 * state.first + (1 - BETA1) * gradient
        with np.errstate(over="ignore", invalid="ignore"):  # callers check whether the values are finite
            second = BETA2 * state.second + (1 - BETA2) * (gradient * gradient)
        moved = rate / (1 - BETA1**steps) * first / (np.sqrt(second) / np.sqrt(1 - BETA2**steps) + ADAM_EPS)
        return ModelState(state.values - moved, first, second, steps)


def loss_and_gradient(model: Model, values: Floats, x: Array, mean: Floats, var: Floats, target: Array) -> LossGradient:
    """Loss of a batch, normalized with the given statistics, and its gradient with respect to the parameters.

    Pass the statistics of the batch in training mode, the running statistics in test mode. They do not depend on the
    parameters, so the gradients of gamma and beta are those of `batchnorm.backward` in both modes.

    Parameters
    ----------
    values : shape (P,)
        The parameters.
    x : array of shape (N, ...)
        A batch of samples of a real type.
    mean, var : shape (C,)
    target : array
        Class indices of shape (N,) for cross-entropy; else numbers of shape (N, K), or of the shape of x without a head.

    Returns
    -------
    LossGradient
        The loss is a mean over samples (cross-entropy) or over all elements (mse), as in PyTorch by default.
    """
    statistics = mean, 1 / deviation(var, model.eps)  # both (C,)
    gradient, loss, correct = np.zeros(model.size), 0.0, 0  # (P,)
    add, at_once = (_add_compiled if compiled.AVAILABLE else _add), model.samples_at_once
    if compiled.AVAILABLE and x.dtype in (np.float32, np.float64):
        at_once = len(x)  # the kernel itself computes a few samples at a time
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
    """`_add` in C."""
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
    """Add the gradient of n samples x of a batch of N `samples`; return their share of the loss, and how many are correct.

    Shapes: R = n · rows per sample, W = C · I columns, K outputs.
    """
    layout, parameters, added = model.layout, model.split(values), model.split(gradient)
    columns = (*statistics, parameters.gamma, parameters.beta)
    mean, inverse, gamma, beta = (np.repeat(v, layout.positions) for v in columns)  # (W,)
    xhat = (x.reshape(-1, layout.row_size).astype(np.float64) - mean) * inverse  # (R, W)
    a = _activate(model.activation, gamma * xhat + beta)  # (R, W)
    if model.outputs:
        pooled = a
        if layout.values_per_sample > 1:
            pooled = a.reshape(len(target), -1, layout.features, layout.positions).mean(axis=(1, 3))  # (n, C)
        outputs = _product(pooled, np.ascontiguousarray(parameters.weight.T)) + parameters.bias  # (n, K)
        loss, correct, slopes = _compare(model.loss, outputs, target, samples)  # slopes (n, K)
        added.weight[...] += _product(slopes.T, pooled)  # (K, C)
        added.bias[...] += slopes.sum(axis=0)  # (K,)
        da = _product(slopes / layout.values_per_sample, parameters.weight)  # (n, C)
        da = np.repeat(np.repeat(da, layout.positions, axis=1), layout.rows_per_sample, axis=0)  # (R, W)
    else:
        loss, correct, da = _compare("mse", a, target.reshape(a.shape), samples * layout.rows_per_sample)
    dy = da * _slope(model.activation, a)  # (R, W)
    added.gamma[...] += np.einsum("rw,rw->w", dy, xhat).reshape(layout.features, -1).sum(axis=1)  # (C,)
    added.beta[...] += dy.sum(axis=0).reshape(layout.features, -1).sum(axis=1)  # (C,)
    return loss, correct


def _compare(loss: str, outputs: Floats, target: Array, rows: int) -> tuple[float, int, Floats]:
    """Share of the outputs (n, K) in the loss of a batch of `rows`, how many are correct, and the gradient (n, K)."""
    if loss == "cross-entropy":
        total, slopes = cross_entropy(outputs, target)
        return total / rows, int((outputs.argmax(axis=1) == target).sum()), slopes / rows
    difference = outputs - target
    elements = rows * outputs.shape[1]
    return float(np.square(difference).sum()) / elements, 0, difference * (2 / elements)


def cross_entropy(outputs: Floats, labels: npt.NDArray[np.intp]) -> tuple[float, Floats]:
    """Sum over samples of -log softmax(outputs)[label], and its gradient of shape (N, K), softmax - onehot(label).

    The largest output is subtracted first (as in the CS231n notes on softmax classifiers), so that no exponential
    overflows and the sum is at least 1.
    """
    shifted = outputs - outputs.max(axis=1, keepdims=True)  # (N, K)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)  # (N,)
    rows = np.arange(len(labels))
    slopes = weights / total[:, None]  # (N, K)
    slopes[rows, labels] -= 1
    return float((np.log(total) - shifted[rows, labels]).sum()), slopes


def _activate(activation: str, y: Floats) -> Floats:
    """The activation of y, computed in place."""
    if activation == "sigmoid":
        np.divide(1, 1 + np.exp(np.clip(-y, -600, 600)), out=y)
    elif activation == "tanh":
        np.tanh(y, out=y)
    elif activation == "relu":
        np.maximum(y, 0, out=y)
    return y


def _slope(activation: str, a: Floats) -> Floats | float:
    """Derivative of the activation, given its value a."""
    if activation == "sigmoid":
        return a * (1 - a)
    if activation == "tanh":
        return 1 - a * a
    return (a > 0).astype(np.float64) if activation == "relu" else 1.0


def _product(a: Floats, b: Floats) -> Floats:
    """Matrix product without BLAS, whose rounding depends on threads and processor."""
    product: Floats = np.einsum("ik,kj->ij", a, b)
    return product
