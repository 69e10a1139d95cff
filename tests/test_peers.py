"""bn beside the frameworks whose conventions it takes: torch, scikit-learn, ONNX; Keras, Flax and CS231n by their formulas.

A peer that is not installed is skipped, unless BN_REQUIRE_PEERS=1.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Array, advised, cut, peer, save_npy

import bncli
from bncli.engine.apply import ApplySpec, apply_files
from bncli.numerics import batchnorm

DRIFT = "running statistics of"  # few batches from a start of 0 and 1 do differ from the population
TOLERANCE = {"f4": 1e-6, "f8": 1e-12}


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Within `tolerance` of each value, or of the largest one where values cancel."""
    expected = np.asarray(expected, np.float64)
    assert np.asarray(found).shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def rounded_once(y: Array, expected: Array) -> None:
    """Torch rounds each step to its type, we once: a few units in the last place of the largest terms."""
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, rtol=0, atol=8 * np.finfo(expected.dtype).eps * np.abs(expected).max())


@pytest.mark.peer
class TestTorch:
    SHAPES = ((200, 7), (60, 5, 9), (37, 3, 8, 6), (20, 2, 3, 4, 5))

    def module(self, x: Array, momentum: float | None = 0.1, eps: float = 1e-5) -> Any:
        """nn.BatchNorm1d, 2d or 3d of x's rank and type, with a gamma and beta that are not 1 and 0."""
        torch = peer("torch")
        kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[
            x.ndim
        ]
        module = kind(
            x.shape[1], momentum=momentum, eps=eps, dtype=torch.float32 if x.dtype == np.float32 else torch.float64
        )
        with torch.no_grad():
            module.weight.copy_(torch.linspace(0.5, 2, x.shape[1]))
            module.bias.copy_(torch.linspace(-1, 1, x.shape[1]))
        return module

    def data(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Features of different means and spreads, on axis 1."""
        rng = np.random.default_rng(5)
        by_feature = (1, -1, *[1] * (len(shape) - 2))
        scale = np.linspace(0.5, 4, shape[1]).reshape(by_feature)
        return ((rng.standard_normal(shape) + np.linspace(-3, 3, shape[1]).reshape(by_feature)) * scale).astype(dtype)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", ["f4", "f8"])
    @pytest.mark.parametrize(("batch_size", "momentum", "eps"), [(16, 0.1, 1e-5), (7, 0.3, 1e-3), (1000, 0.01, 1e-5)])
    def test_one_training_pass_then_eval(
        self, tmp_path: Path, shape: tuple[int, ...], dtype: str, batch_size: int, momentum: float, eps: float
    ) -> None:
        torch = peer("torch")
        x = self.data(shape, dtype)
        module = self.module(x, momentum, eps)
        for batch in cut(x, batch_size):
            y = module(torch.from_numpy(batch.copy()))
            ours, cache = batchnorm.forward(
                batch, module.weight.detach().numpy(), module.bias.detach().numpy(), eps, axis=1
            )
            rounded_once(ours, y.detach().numpy())
            assert cache.mean.shape == (shape[1],)
        gamma = save_npy(tmp_path / "gamma.npy", module.weight.detach().numpy())
        beta = save_npy(tmp_path / "beta.npy", module.bias.detach().numpy())
        path = save_npy(tmp_path / "x.npy", x)
        with advised(DRIFT):
            stats = bncli.fit(
                path, preset="torch", batch_size=batch_size, momentum=1 - momentum, eps=eps, gamma=gamma, beta=beta
            )
        close(stats.running_mean, module.running_mean, TOLERANCE[dtype])
        close(stats.running_var, module.running_var, TOLERANCE[dtype])
        assert stats.num_batches == int(module.num_batches_tracked)

        module.eval()
        held_out = self.data(shape, dtype)[::-1].copy() * 1.5
        expected = module(torch.from_numpy(held_out)).detach().numpy()
        rounded_once(stats.normalize(held_out), expected)
        apply_files(stats, [save_npy(tmp_path / "h.npy", held_out)], str(tmp_path / "y.npy"), ApplySpec())
        rounded_once(np.load(tmp_path / "y.npy"), expected)

    def test_the_preset_alone(self) -> None:
        torch = peer("torch")
        x = self.data((128, 3, 4, 4), "f8")
        module = torch.nn.BatchNorm2d(3, dtype=torch.float64)
        for batch in cut(x, 32):
            module(torch.from_numpy(batch.copy()))
        with advised(DRIFT):
            stats = bncli.fit(x, preset="torch", batch_size=32)
        close(stats.running_mean, module.running_mean, 1e-12)
        close(stats.running_var, module.running_var, 1e-12)
        module.eval()
        close(stats.normalize(x), module(torch.from_numpy(x)).detach().numpy(), 1e-12)

    def test_momentum_none_is_another_thing_there(self) -> None:
        """torch averages the batches' statistics, bn's none takes the population's; the README says so."""
        torch = peer("torch")
        x = np.sort(self.data((64, 2), "f8"), axis=0)
        module = self.module(x, momentum=None)
        for batch in cut(x, 16):
            module(torch.from_numpy(batch.copy()))
        stats = bncli.fit(x, preset="torch", momentum="none", batch_size=16)
        close(stats.running_var, x.var(axis=0, ddof=1), 1e-12)
        close(module.running_var, np.mean([b.var(axis=0, ddof=1) for b in cut(x, 16)], axis=0), 1e-12)
        assert (stats.running_var > 2 * module.running_var.numpy()).all()


@pytest.mark.peer
class TestScikitLearn:
    @pytest.mark.parametrize(
        ("dtype", "missing"), [("i2", False), *((d, missing) for d in ("f2", "f4", "f8") for missing in (False, True))]
    )
    def test_standard_scaler_equals_the_population(self, dtype: str, missing: bool) -> None:
        preprocessing = peer("sklearn.preprocessing")
        rng = np.random.default_rng(0)
        x = (rng.standard_normal((500, 6)) * [1, 2, 30, 4, 50, 600] + [0, 5, 10, 20, 0, 50]).astype(dtype)
        if missing:
            x[rng.random(x.shape) < 0.2] = np.nan
        scaler = preprocessing.StandardScaler().fit(x.astype("f8"))  # it sums float16 and 32 in their own type
        with advised(DRIFT, "were missing"):
            stats = bncli.fit(x, nan="omit", eps=0.0)
        close(stats.population_mean, scaler.mean_, 1e-13)
        close(stats.population_var, scaler.var_, 1e-13)
        assert stats.population_count.tolist() == np.broadcast_to(scaler.n_samples_seen_, 6).tolist()
        y = stats.normalize(x, use="population", dtype="f8")
        np.testing.assert_allclose(y, scaler.transform(x.astype("f8")), rtol=1e-12, atol=1e-13)

    def test_the_sample_data(self) -> None:
        """The real table of sample_data: scales from 10^-3 to 10^3."""
        preprocessing, datasets = peer("sklearn.preprocessing"), peer("sklearn.datasets")
        x = datasets.load_breast_cancer().data
        with advised(DRIFT, "so small that eps"):
            stats = bncli.fit(x)
        scaler = preprocessing.StandardScaler().fit(x)
        close_each = {"rtol": 1e-12, "atol": 0.0}
        np.testing.assert_allclose(stats.population_mean, scaler.mean_, **close_each)
        np.testing.assert_allclose(stats.population_var, scaler.var_, **close_each)


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """The published cases of one operator, by name."""
    with ignoring_warnings():
        node = peer("onnx.backend.test.case.node")
        return {case.name: case for case in node.collect_testcases("BatchNormalization")}


@pytest.mark.peer
class TestOnnx:
    """The operator's published test cases, with inputs and expected outputs."""

    NAMES = (
        "test_batchnorm_epsilon",
        "test_batchnorm_epsilon_training_mode",
        "test_batchnorm_example",
        "test_batchnorm_example_training_mode",
    )

    def test_all_four_are_there(self, cases: dict[str, Any]) -> None:
        assert sorted(cases) == sorted(self.NAMES)

    @pytest.mark.parametrize("name", NAMES)
    def test_published_case(self, cases: dict[str, Any], name: str) -> None:
        case = cases[name]
        attributes = {a.name: a for a in case.model.graph.node[0].attribute}
        eps = attributes["epsilon"].f if "epsilon" in attributes else 1e-5
        momentum = attributes["momentum"].f if "momentum" in attributes else 0.9
        assert len(case.data_sets) >= 1
        for (x, gamma, beta, mean, var), outputs in case.data_sets:
            if "training_mode" not in attributes:
                (expected,) = outputs
                y = batchnorm.normalize(x, mean, var, gamma, beta, eps, axis=1)
                np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
                continue
            expected, new_mean, new_var = outputs
            y, cache = batchnorm.forward(x, gamma, beta, eps, axis=1)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
            # from a start of 0 the recurrence holds what one batch adds to m · (the old value)
            with advised(DRIFT, "so small that eps"):
                stats = bncli.fit(x, preset="onnx", momentum=momentum, init="zeros", eps=eps)
            old = np.float64(momentum)
            np.testing.assert_allclose(stats.running_mean + old * mean, new_mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(stats.running_var + old * var, new_var, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(cache.var * (1 - old) + old * var, new_var, rtol=1e-5, atol=1e-6)


class TestFormulas:
    """Presets against a plain loop over batches, written from each framework's own documentation."""

    @pytest.fixture
    def x(self) -> Array:
        return np.random.default_rng(0).standard_normal((500, 4)) * [1, 2, 3, 40] + [0, 1, 10, -100]

    def test_keras(self, x: Array) -> None:
        """keras.io, BatchNormalization: moving_var = moving_var * momentum + var(batch) * (1 - momentum)."""
        momentum, epsilon = 0.99, 0.001
        moving_mean, moving_var = np.zeros(4), np.ones(4)
        for batch in cut(x, 64):
            moving_mean = moving_mean * momentum + batch.mean(axis=0) * (1 - momentum)
            moving_var = moving_var * momentum + batch.var(axis=0) * (1 - momentum)
        self.check(x, "keras", moving_mean, moving_var, (x - moving_mean) / np.sqrt(moving_var + epsilon))

    def test_flax(self, x: Array) -> None:
        """flax.linen.BatchNorm: ra = momentum * ra + (1 - momentum) * batch, biased variance, epsilon 1e-5, from 0 and 1."""
        momentum, epsilon = 0.99, 1e-5
        ra_mean, ra_var = np.zeros(4), np.ones(4)
        for batch in cut(x, 64):
            ra_mean = momentum * ra_mean + (1 - momentum) * batch.mean(axis=0)
            ra_var = momentum * ra_var + (1 - momentum) * batch.var(axis=0)
        self.check(x, "flax", ra_mean, ra_var, (x - ra_mean) / np.sqrt(ra_var + epsilon))

    def test_onnx(self, x: Array) -> None:
        """BatchNormalization-15: running = input * momentum + current * (1 - momentum), ReduceVar the population variance."""
        momentum, epsilon = 0.9, 1e-5
        mean, var = np.zeros(4), np.ones(4)
        for batch in cut(x, 64):
            mean = mean * momentum + batch.mean(axis=0) * (1 - momentum)
            var = var * momentum + batch.var(axis=0) * (1 - momentum)
        self.check(x, "onnx", mean, var, (x - mean) / np.sqrt(var + epsilon))

    def test_torch(self, x: Array) -> None:
        """torch.nn.BatchNorm1d: new = (1 - momentum) * old + momentum * observed, the observed variance unbiased."""
        momentum, epsilon = 0.1, 1e-5
        mean, var = np.zeros(4), np.ones(4)
        for batch in cut(x, 64):
            mean = (1 - momentum) * mean + momentum * batch.mean(axis=0)
            var = (1 - momentum) * var + momentum * batch.var(axis=0, ddof=1)
        self.check(x, "torch", mean, var, (x - mean) / np.sqrt(var + epsilon))

    def test_cs231n(self, x: Array) -> None:
        """layers.py of assignment 2: running = momentum * running + (1 - momentum) * sample, both from zeros."""
        momentum, eps = 0.9, 1e-5
        running_mean, running_var = np.zeros(4), np.zeros(4)
        for batch in cut(x, 64):
            running_mean = momentum * running_mean + (1 - momentum) * batch.mean(axis=0)
            running_var = momentum * running_var + (1 - momentum) * batch.var(axis=0)
        self.check(x, "cs231n", running_mean, running_var, (x - running_mean) / np.sqrt(running_var + eps))

    def check(self, x: Array, preset: str, mean: Array, var: Array, y: Array) -> None:
        with advised(DRIFT):
            stats = bncli.fit(x, preset=preset, batch_size=64)
        close(stats.running_mean, mean, 1e-12)
        close(stats.running_var, var, 1e-12)
        close(stats.normalize(x), y, 1e-12)


@contextlib.contextmanager
def ignoring_warnings() -> Iterator[None]:
    """Collecting the cases runs code of onnx's that warns; that is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
