"""StandardScaler both ways: its transform is normalize with an eps of 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import ANY_ADVICE, Array, advised, check_moments, exact_columns, peer

import bncli
from bncli import Stats
from bncli.errors import BnWarning, MismatchError
from bncli.exchange import sklearn

pytestmark = pytest.mark.peer


def data(n: int = 300, c: int = 4) -> Array:
    rng = np.random.default_rng(c)
    return rng.normal(rng.normal(0, 9, c), 10.0 ** rng.uniform(-1, 3, c), (n, c))


def fit(x: Array, **options: Any) -> Stats:
    with advised(*ANY_ADVICE):
        return bncli.fit(x, **options)


def fitted(x: Array, **options: Any) -> Any:
    with np.errstate(invalid="ignore"):  # a feature without values
        return peer("sklearn.preprocessing").StandardScaler(**options).fit(x)


@pytest.mark.parametrize("features", [1, 3, 1000])
def test_a_written_scaler_transforms_as_normalize_does(features: int) -> None:
    x = data(c=features)
    scaler = write(fit(x, eps=0.0))
    new = data(50, features) + 1
    np.testing.assert_allclose(
        scaler.transform(new), fit(x, eps=0.0).normalize(new, "population"), rtol=1e-13, atol=1e-13
    )
    np.testing.assert_allclose(scaler.inverse_transform(scaler.transform(new)), new, rtol=1e-12)
    assert scaler.n_samples_seen_ == 300
    assert scaler.n_features_in_ == features


def write(stats: Stats) -> Any:
    peer("sklearn")
    return sklearn.write(stats)


def test_a_written_scaler_is_what_scikit_learn_fits() -> None:
    x = data()
    x[:, 1] = 0.5
    own, theirs = write(fit(x, eps=0.0)), fitted(x)
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_allclose(getattr(own, name), getattr(theirs, name), rtol=1e-12)
    assert own.get_params() == theirs.get_params()
    assert own.n_samples_seen_ == theirs.n_samples_seen_


def test_a_written_scaler_goes_on_learning() -> None:
    x = data(400)
    scaler = write(fit(x[:250], eps=0.0)).partial_fit(x[250:])
    np.testing.assert_allclose(scaler.var_, x.var(axis=0), rtol=1e-12)
    assert scaler.n_samples_seen_ == 400


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9])
def test_a_read_scaler_normalizes_as_it_transforms(constant: float) -> None:
    x = data()
    x[:, 2] = constant
    scaler = fitted(x)
    stats = sklearn.read(scaler)
    np.testing.assert_allclose(stats.normalize(x + 1), scaler.transform(x + 1), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(stats.normalize(x), stats.normalize(x, "population"))
    assert (stats.momentum, stats.eps, stats.num_samples, stats.sample_shape) == (None, 0.0, 300, (4,))
    assert stats.population_count.tolist() == [300] * 4


def test_there_and_back_keeps_the_numbers() -> None:
    x = data()
    stats = fit(x, eps=0.0, momentum="none")
    back = sklearn.read(write(stats))
    np.testing.assert_array_equal(back.population_mean, stats.population_mean)
    np.testing.assert_allclose(back.population_var, stats.population_var, rtol=3e-16)
    scaler = write(back)
    np.testing.assert_array_equal(scaler.mean_, stats.population_mean)


def test_missing_values_are_counted_per_feature() -> None:
    x = data()
    x[5:105, 3] = np.nan
    x[:, 0] = np.nan
    scaler = write(fit(x, eps=0.0, nan="omit"))
    assert scaler.n_samples_seen_.tolist() == [0, 300, 300, 200]
    theirs = fitted(x)
    stats = sklearn.read(theirs)
    assert stats.population_count.tolist() == [0, 300, 300, 200]
    np.testing.assert_allclose(stats.normalize(x), theirs.transform(x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scaler.transform(x), theirs.transform(x), rtol=1e-12, atol=1e-12)


def test_names_go_both_ways() -> None:
    scaler = write(replace(fit(data(), eps=0.0), names=("a", "b", "c", "d")))
    assert scaler.get_feature_names_out().tolist() == ["a", "b", "c", "d"]
    assert sklearn.read(scaler).names == ("a", "b", "c", "d")
    assert sklearn.read(fitted(data())).names is None


def test_read_scalers_merge_and_are_stored(tmp_path: Any) -> None:
    x = data(400)
    parts = [sklearn.read(fitted(piece)) for piece in (x[:100], x[100:])]
    parts[0].save(str(tmp_path / "a.bn.h5"))
    with advised(*ANY_ADVICE):
        merged = bncli.merge([bncli.load(str(tmp_path / "a.bn.h5")), parts[1]])
    check_moments(merged.population_mean, merged.population_var, exact_columns(x), 1e-13)
    assert merged.num_samples == 400


def test_gamma_and_beta_are_refused() -> None:
    with pytest.raises(MismatchError, match="no gamma, and feature 2 has 3"):
        write(fit(data(), gamma=[1.0, 1.0, 3.0, 1.0]))
    with pytest.raises(MismatchError, match="no beta, and feature 0 has -1"):
        write(fit(data(), beta=-1.0))


def test_an_eps_that_shows_is_told() -> None:
    with pytest.warns(BnWarning, match="no eps"):
        write(fit(data(), eps=1.0))
    write(fit(data(), eps=1e-9))


def test_no_population_is_refused() -> None:
    empty = replace(fit(data()), population=bncli.numerics.moments.Moments.empty(4))
    with pytest.raises(MismatchError, match="no population"):
        write(empty)


def test_other_scalers_are_refused() -> None:
    x = data()
    preprocessing = peer("sklearn.preprocessing")
    for scaler in (fitted(x, with_mean=False), fitted(x, with_std=False), preprocessing.MinMaxScaler().fit(x)):
        with pytest.raises(MismatchError, match="does not subtract"):
            sklearn.read(scaler)
    with pytest.raises(MismatchError, match="not fitted"):
        sklearn.read(preprocessing.StandardScaler())
    with pytest.raises(MismatchError, match="sample weights"):
        sklearn.read(preprocessing.StandardScaler().fit(x, sample_weight=np.full(300, 0.7003)))
    changed = fitted(x)
    changed.scale_ = changed.scale_ * 2
    with pytest.raises(MismatchError, match="scale_ is not"):
        sklearn.read(changed)


@pytest.mark.parametrize(("mean", "var"), [(np.nan, 1.0), (np.inf, 1.0), (0.0, np.nan), (0.0, np.inf)])
def test_numbers_that_no_scaler_has(mean: float, var: float) -> None:
    scaler = fitted(data())
    scaler.mean_[1], scaler.var_[1], scaler.scale_[1] = mean, var, np.sqrt(var)
    with pytest.raises(MismatchError, match=r"not finite, or negative, in 1 of 4 channels: 1; fit the scaler"):
        sklearn.read(scaler)
