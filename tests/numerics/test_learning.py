"""The arithmetic of training: gradients against torch autograd and finite differences, optimizers against torch."""

from __future__ import annotations

import decimal
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import peer

from bncli.numerics import batchnorm, compiled, learning
from bncli.numerics.layout import Layout
from bncli.numerics.learning import Model, ModelState, Optimizer

Array = npt.NDArray[Any]
SHAPES = [((50, 6), -1), ((7, 3, 4, 5), 1), ((9, 4, 5, 3), -1), ((300, 200), -1), ((5, 4, 6), 1)]
CASES = [("cross-entropy", 1), ("cross-entropy", 3), ("mse", 1), ("mse", 4), ("mse", 0)]


def problem(shape: tuple[int, ...], axis: int, loss: str, outputs: int, activation: str) -> tuple[Model, Array, ...]:
    """A model, its parameters (random, none of them 0), a batch and a target."""
    rng = np.random.default_rng(outputs)
    model = Model(Layout.of(shape, axis), outputs, activation, loss, 1e-3)
    x = rng.standard_normal(shape) * 3 + 10
    if loss == "cross-entropy":
        target = rng.integers(outputs, size=shape[0])
    else:
        target = rng.standard_normal((shape[0], outputs) if outputs else shape)
    return model, rng.standard_normal(model.size) * 0.5 + 0.6, x, target


def loss_and_gradient(model: Model, values: Array, x: Array, target: Array, axis: int) -> learning.LossGradient:
    """Loss and gradient in training mode, with the statistics of the batch."""
    batch = batchnorm.moments(x, axis)
    return learning.loss_and_gradient(model, values, x, batch.mean, batch.variance(), target)


class TorchNet:
    """The same network in torch, in float64."""

    def __init__(self, model: Model, values: Array, rank: int, axis: int, momentum: float = 0.1) -> None:
        torch = self.torch = peer("torch")
        kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[rank]
        self.model, self.axis = model, axis
        self.norm = kind(model.layout.features, eps=model.eps, momentum=momentum, dtype=torch.float64)
        self.head = torch.nn.Linear(model.layout.features, max(1, model.outputs), dtype=torch.float64)
        gamma, beta, weight, bias = (torch.tensor(v) for v in model.split(values))
        with torch.no_grad():
            self.norm.weight.copy_(gamma)
            self.norm.bias.copy_(beta)
            if model.outputs:
                self.head.weight.copy_(weight)
                self.head.bias.copy_(bias)

    def parameters(self) -> list[Any]:
        return [*self.norm.parameters(), *(self.head.parameters() if self.model.outputs else [])]

    def loss(self, x: Array, target: Array) -> Any:
        torch = self.torch
        y = self.norm(torch.tensor(x).movedim(self.axis, 1))
        if not self.model.outputs:
            return torch.nn.functional.mse_loss(y, torch.tensor(target).movedim(self.axis, 1))
        activations = {"identity": lambda v: v, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
        a = activations[self.model.activation](y)
        out = self.head(a.flatten(2).mean(2) if a.ndim > 2 else a)
        name = {"mse": "mse_loss", "cross-entropy": "cross_entropy"}[self.model.loss]
        return getattr(torch.nn.functional, name)(out, torch.tensor(target))

    def values(self) -> Array:
        return np.concatenate([p.detach().numpy().reshape(-1) for p in self.parameters()])

    def gradient(self) -> Array:
        return np.concatenate([p.grad.numpy().reshape(-1) for p in self.parameters()])


def headed_problem(shape: tuple[int, ...], axis: int, loss: str, outputs: int, activation: str) -> Any:
    return problem(shape, axis, loss, outputs, activation if outputs else "identity")


@pytest.mark.parametrize("activation", learning.ACTIVATIONS)
@pytest.mark.parametrize(("loss", "outputs"), CASES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradient_equals_torch_autograd(
    shape: tuple[int, ...], axis: int, loss: str, outputs: int, activation: str
) -> None:
    model, values, x, target = headed_problem(shape, axis, loss, outputs, activation)
    net = TorchNet(model, values, len(shape), axis)
    expected = net.loss(x, target)
    expected.backward()
    found = loss_and_gradient(model, values, x, target, axis)
    assert found.loss == pytest.approx(expected.item(), rel=1e-12, abs=1e-15)
    gradient = net.gradient()
    np.testing.assert_allclose(found.gradient, gradient, rtol=0, atol=1e-12 * max(1e-3, np.abs(gradient).max()))


@pytest.mark.parametrize("activation", learning.ACTIVATIONS)
@pytest.mark.parametrize(("loss", "outputs"), CASES)
def test_gradient_is_the_central_difference(loss: str, outputs: int, activation: str) -> None:
    model, values, x, target = headed_problem((40, 5), -1, loss, outputs, activation)
    found, h = loss_and_gradient(model, values, x, target, -1), 1e-6
    for i in range(model.size):
        up, down = (
            loss_and_gradient(model, values + s * h * (np.arange(model.size) == i), x, target, -1) for s in (1, -1)
        )
        assert (up.loss - down.loss) / (2 * h) == pytest.approx(found.gradient[i], rel=1e-6, abs=2e-9)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradient_of_gamma_and_beta_is_that_of_backward(shape: tuple[int, ...], axis: int) -> None:
    model, values, x, target = headed_problem(shape, axis, "mse", 0, "identity")
    gamma, beta, _, _ = model.split(values)
    y, cache = batchnorm.forward(x, gamma, beta, eps=model.eps, axis=axis)
    _, dgamma, dbeta = batchnorm.backward(2 * (y - target) / y.size, cache)
    np.testing.assert_allclose(
        loss_and_gradient(model, values, x, target, axis).gradient, [*dgamma, *dbeta], rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize("activation", learning.ACTIVATIONS)
@pytest.mark.parametrize(("loss", "outputs"), CASES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES[:3])
def test_both_kernels_agree(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], axis: int, loss: str, outputs: int, activation: str
) -> None:
    model, values, x, target = headed_problem(shape, axis, loss, outputs, activation)
    one = loss_and_gradient(model, values, x, target, axis)
    monkeypatch.setattr(compiled, "AVAILABLE", False)
    other = loss_and_gradient(model, values, x, target, axis)
    assert one.loss == pytest.approx(other.loss, rel=1e-13)
    assert one.correct == other.correct
    np.testing.assert_allclose(one.gradient, other.gradient, rtol=1e-11, atol=1e-14)


def activations(activation: str, y: Array) -> Array:
    """The activations of y as `loss_and_gradient` computes them: the gradient of zero weights, with a target of -1/2."""
    model = Model(Layout(1, len(y), 1), 1, activation, "mse", 0.0)
    one, zero = np.ones(1), np.zeros(1)
    values = model.join(learning.Parameters(one, zero, zero[:, None], zero))
    found = learning.loss_and_gradient(model, values, y[None], np.zeros(len(y)), np.ones(len(y)), np.array([[-0.5]]))
    return model.split(found.gradient).weight[0]


@pytest.mark.parametrize("activation", learning.ACTIVATIONS)
@pytest.mark.parametrize("available", [True, False])
def test_activations_are_exact_to_a_few_ulp_anywhere(
    monkeypatch: pytest.MonkeyPatch, activation: str, available: bool
) -> None:
    if available and not compiled.AVAILABLE:
        pytest.skip("the compiled kernel was not built")
    monkeypatch.setattr(compiled, "AVAILABLE", available)
    y = np.concatenate([np.linspace(-40, 40, 4001), [-1e150, -600, 600, 1e150, 1e-9, 0.0]])
    with np.errstate(over="ignore"):
        exact = y.astype(np.longdouble)
        truth = {
            "identity": exact,
            "sigmoid": 1 / (1 + np.exp(-exact)),
            "tanh": np.tanh(exact),
            "relu": np.where(exact > 0, exact, 0),
        }[activation]
    rtol, atol = (0, 4e-16) if activation == "tanh" else (1e-15, 4e-16)
    np.testing.assert_allclose(activations(activation, y), truth.astype(np.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("activation", learning.ACTIVATIONS)
@pytest.mark.parametrize("outputs", [0, 1])
def test_activations_propagate_nan(activation: str, outputs: int) -> None:
    model = Model(Layout(1, 1, 1), outputs, activation, "mse", 0.0)
    x, one, zero = np.array([[np.nan], [1.0]]), np.ones(1), np.zeros(1)
    for rows, hidden in ((x, True), (x[1:], False)):
        assert (
            math.isnan(
                learning.loss_and_gradient(model, np.ones(model.size), rows, zero, one, np.zeros((len(rows), 1))).loss
            )
            == hidden
        )


def exact_loss(model: Model, values: Array, x: Array, labels: Array) -> float:
    """Cross-entropy of a head on x, without normalization and activation, in 64 digits."""
    with decimal.localcontext() as context:
        context.prec = 64
        _, _, weight, bias = (v.tolist() for v in model.split(values))
        total = decimal.Decimal(0)
        for row, label in zip(x.tolist(), labels.tolist(), strict=True):
            outputs = [
                sum((decimal.Decimal(w) * decimal.Decimal(v) for w, v in zip(ws, row, strict=True)), decimal.Decimal(b))
                for ws, b in zip(weight, bias, strict=True)
            ]
            total += sum(out.exp() for out in outputs).ln() - outputs[label]
        return float(total / len(x))


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(("samples", "features", "outputs"), [(1, 1, 2), (7, 3, 2), (8, 4, 5), (19, 7, 9)])
def test_cross_entropy_is_accurate_to_the_last_digits(
    monkeypatch: pytest.MonkeyPatch, available: bool, spread: float, samples: int, features: int, outputs: int
) -> None:
    if available and not compiled.AVAILABLE:
        pytest.skip("the compiled kernel was not built")
    monkeypatch.setattr(compiled, "AVAILABLE", available)
    rng = np.random.default_rng(samples)
    model = Model(Layout(1, features, 1), outputs, "identity", "cross-entropy", 0.0)
    values = model.join(model.split(rng.standard_normal(model.size))._replace(gamma=np.ones(1), beta=np.zeros(1)))
    x, labels = rng.standard_normal((samples, features)) * spread, rng.integers(outputs, size=samples)
    found = learning.loss_and_gradient(model, values, x, np.zeros(features), np.ones(features), labels).loss
    assert found == pytest.approx(exact_loss(model, values, x, labels), rel=1e-14, abs=3e-16 * spread)


def test_cross_entropy_of_outputs_that_exp_cannot_hold() -> None:
    outputs = np.array([[1e5, 0.0, -1e5], [1e5, 0.0, -1e5]])
    loss, slopes = learning.cross_entropy(outputs, np.array([0, 2]))
    assert loss == 2e5
    assert slopes.tolist() == [[0, 0, 0], [1, 0, -1]]


@pytest.mark.parametrize("name", learning.OPTIMIZERS)
@pytest.mark.parametrize("decay", [0, 50])
@pytest.mark.parametrize(
    ("loss", "outputs", "activation"),
    [("cross-entropy", 3, "sigmoid"), ("mse", 2, "identity"), ("mse", 0, "identity"), ("cross-entropy", 2, "relu")],
)
def test_fifty_steps_equal_those_of_torch(name: str, decay: int, loss: str, outputs: int, activation: str) -> None:
    model, values, _, _ = problem((32, 8), -1, loss, outputs, activation)
    rng = np.random.default_rng(3)
    net = TorchNet(model, values, 2, -1)
    torch = net.torch
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    theirs = kind(net.parameters(), lr=0.02)
    schedulers = torch.optim.lr_scheduler
    constant = schedulers.ConstantLR(theirs, factor=1)
    schedule = schedulers.CosineAnnealingLR(theirs, T_max=decay) if decay else constant
    ours, state = Optimizer(name, 0.02, decay), ModelState.begin(values)
    for taken in range(50):
        x = rng.standard_normal((32, 8)) * 5 - 2
        target = rng.integers(outputs, size=32) if loss == "cross-entropy" else rng.standard_normal((32, outputs or 8))
        state = ours.step(state, loss_and_gradient(model, state.values, x, target, -1).gradient, taken)
        theirs.zero_grad()
        net.loss(x, target).backward()
        theirs.step()
        schedule.step()
    assert np.abs(state.values - values).max() > 1e-3
    np.testing.assert_allclose(state.values, net.values(), rtol=0, atol=1e-10)


def test_model_state_packs_and_unpacks_exactly() -> None:
    rng = np.random.default_rng(0)
    state = ModelState(*rng.standard_normal((3, 7)), steps=12)
    again = ModelState.unpack(*state.pack())
    assert [v.tobytes() for v in again.pack()[0].values()] == [v.tobytes() for v in state.pack()[0].values()]
    assert again.steps == 12


def test_parameters_are_views_in_the_order_of_torch_modules() -> None:
    model = Model(Layout.of((9, 2), -1), 3, "sigmoid", "cross-entropy", 1e-5)
    parts = model.split(np.arange(float(model.size)))
    assert [p.tolist() for p in parts] == [[0, 1], [2, 3], [[4, 5], [6, 7], [8, 9]], [10, 11, 12]]
    assert model.join(parts).tolist() == list(range(model.size))
