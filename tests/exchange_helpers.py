"""Statistics to exchange, what counts as agreement with a framework, and files that must be refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import ANY_ADVICE, advised, peer

import bncli
from bncli import exchange
from bncli.errors import UsageError
from bncli.stats.record import Stats

Array = npt.NDArray[Any]
SHAPES = ((200, 7), (60, 5, 9), (37, 3, 8, 6), (20, 2, 3, 4, 5))
FEATURES = (1, 3, 10_000)
TOLERANCE = {"f4": 1e-6, "f8": 1e-12}
NUMBERS = ("running_mean", "running_var", "gamma", "beta")


def data(shape: tuple[int, ...], dtype: str = "f8", axis: int = 1, seed: int = 5) -> Array:
    """Random values whose features differ in mean and spread."""
    by_feature = [1] * len(shape)
    by_feature[axis] = shape[axis]
    scale = np.geomspace(0.1, 40, shape[axis]).reshape(by_feature)
    shift = np.linspace(-3, 3, shape[axis]).reshape(by_feature)
    return ((np.random.default_rng(seed).standard_normal(shape) + shift) * scale).astype(dtype)


def fitted(x: Array, axis: int = 1, **options: Any) -> Stats:
    """Statistics with a gamma and beta that are not 1 and 0."""
    gamma, beta = np.linspace(0.5, 2, x.shape[axis]), np.linspace(-1, 1, x.shape[axis])
    with advised(*ANY_ADVICE):
        return bncli.fit(x, batch_size=16, axis=axis, **{"gamma": gamma, "beta": beta} | options)


def features(count: int) -> Stats:
    return fitted(data((40, count)), momentum=0.97, eps=1e-3)


def check_agrees(found: Any, stats: Stats, x: Array, axis: int | None = None, use: str = "running") -> None:
    """Assert that a framework's inference gives what apply gives, both on the values of x.

    Within TOLERANCE · (1 + |mean|/sd) of max(1, |y|), of the type that the framework computes in.
    """
    expected = stats.normalize(x.astype(np.float64), use, axis)
    found = np.asarray(found)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    mean, var = stats.statistics(use)
    by_feature = [1] * x.ndim
    by_feature[stats.axis if axis is None else axis] = -1
    allowed = TOLERANCE[x.dtype.str[1:]] * (1 + np.abs(mean) / np.sqrt(var)).reshape(by_feature)
    assert (np.abs(found - expected) <= allowed * np.maximum(1, np.abs(expected))).all()


def check_same_numbers(one: Stats, other: Stats, dtype: str = "f8") -> None:
    """Assert that what inference uses is the same, rounded to the format's type."""
    for name in NUMBERS:
        np.testing.assert_array_equal(
            getattr(one, name).astype(dtype), getattr(other, name).astype(dtype), err_msg=name
        )


def check_round_trip(tmp_path: Path, count: int, suffix: str, dtype: str = "f8", **options: Any) -> Stats:
    """Export statistics of `count` features and import them again, as files; returns what came back."""
    stats = features(count)
    path = str(tmp_path / f"x{suffix}")
    exchange.write(stats, path)
    back = exchange.read_to_file(path, str(tmp_path / "back.bn.h5"), **options)
    check_same_numbers(stats, back, dtype)
    check_same_numbers(back, bncli.load(str(tmp_path / "back.bn.h5")))
    assert back.running is None
    assert back.sample_shape == ()
    return back


def check_no_population(stats: Stats) -> None:
    assert stats.population_count.tolist() == [0] * stats.num_features
    assert np.isnan(stats.population_mean).all()
    assert all("no-population" in flags for flags in stats.flags())


def check_package_missing(monkeypatch: pytest.MonkeyPatch, name: str, suffix: str) -> None:
    """Assert that both verbs name the line that installs a missing package."""
    monkeypatch.setitem(__import__("sys").modules, name, None)
    for call in (lambda: exchange.write(features(3), f"x{suffix}"), lambda: exchange.read(f"x{suffix}")):
        with pytest.raises(UsageError, match=rf"pip install 'bncli\[{name}\]'"):
            call()


def keras_with_torch() -> ModuleType:
    """Keras on its torch backend."""
    os.environ["KERAS_BACKEND"] = "torch"
    peer("torch")
    return peer("keras")
