"""A scikit-learn StandardScaler from statistics, and statistics from one: in Python, without a file and without pickle."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from bncli.errors import BnWarning, MismatchError
from bncli.exchange.common import channels, package
from bncli.numerics.batchnorm import deviation
from bncli.numerics.moments import Moments
from bncli.stats.provenance import provenance
from bncli.stats.record import EPS_SHARE, Stats

if TYPE_CHECKING:
    from sklearn.preprocessing import StandardScaler

SAME = 1e-6  # scale_ and sqrt(var_) of a scaler that was stored in float32 differ by less


def write(stats: Stats) -> StandardScaler:
    """A fitted StandardScaler with the population statistics.

    `scaler.transform(x)` is `stats.normalize(x, use="population")` with an eps of 0: scikit-learn divides by sqrt(var),
    and by 1 where that is 0, so eps is not part of it (a warning counts the features where that shows). It works on (samples, C).

    Parameters
    ----------
    stats : Stats of C features
        With gamma 1 and beta 0, which a scaler does not have.

    Returns
    -------
    StandardScaler
        `mean_`, `var_`, `scale_` of shape (C,), `n_samples_seen_` (a number, or per feature where they differ), and
        `feature_names_in_` where there are names.

    Raises
    ------
    MismatchError
        For another gamma or beta, or without population statistics.
    UsageError
        When scikit-learn is missing.
    """
    for name, neutral in (("gamma", 1.0), ("beta", 0.0)):
        other = np.flatnonzero(getattr(stats, name) != neutral)
        if other.size:
            raise MismatchError(
                f"a StandardScaler has no {name}, and feature {other[0]} has {getattr(stats, name)[other[0]]:g}; merge or "
                f"fit with --{name} {neutral:g}"
            )
    mean, var = stats.statistics("population")
    if (stats.eps > EPS_SHARE * var[var > 0]).any():
        warnings.warn(
            f"a StandardScaler has no eps, and eps {stats.eps:g} is more than {EPS_SHARE:.0%} of a feature's variance: that "
            "feature comes out larger than bn gives it",
            BnWarning,
            stacklevel=2,
        )
    count = stats.population_count
    scaler: StandardScaler = package("sklearn.preprocessing", "sklearn").StandardScaler()
    scaler.mean_, scaler.var_, scaler.scale_ = mean.copy(), var.copy(), deviation(var, 0.0)
    scaler.n_samples_seen_ = count[0] if (count == count[0]).all() else count
    scaler.n_features_in_ = stats.num_features
    if stats.names is not None:
        scaler.feature_names_in_ = np.array(stats.names, object)
    return scaler


def read(scaler: StandardScaler) -> Stats:
    """Population statistics of a fitted StandardScaler; the running ones are the same (momentum None), and eps is 0.

    `stats.normalize(x)` is `scaler.transform(x)`. A feature that the scaler takes for constant, its variance being no
    more than rounding, has variance 0.

    Parameters
    ----------
    scaler : StandardScaler
        Fitted on (samples, C), with_mean and with_std.

    Raises
    ------
    MismatchError
        When it is not fitted, leaves out the mean or the deviation, was fitted with weights that are no counts, or was
        changed after fitting.
    """
    if not (getattr(scaler, "with_mean", False) and getattr(scaler, "with_std", False)):
        raise MismatchError(f"{type(scaler).__name__} does not subtract the mean and divide by the deviation")
    if not hasattr(scaler, "scale_"):
        raise MismatchError(f"{type(scaler).__name__} is not fitted; call its fit first")
    mean, var, scale = (np.asarray(getattr(scaler, name), np.float64) for name in ("mean_", "var_", "scale_"))
    count = np.broadcast_to(np.asarray(scaler.n_samples_seen_, np.float64), mean.shape).copy()
    if (count != np.floor(count)).any():
        raise MismatchError("the scaler was fitted with sample weights that are not counts; fit it without")
    var = np.where((scale == 1) & (deviation(var, 0.0) != 1), 0.0, var)  # scikit-learn's test for constant features
    if not np.allclose(scale, deviation(var, 0.0), rtol=SAME, atol=0, equal_nan=True):
        raise MismatchError("the scaler's scale_ is not the square root of its var_; fit it again")
    seen = count > 0
    zeros = np.zeros(len(mean))
    names = getattr(scaler, "feature_names_in_", None)
    if (bad := seen & ~(np.isfinite(mean) & np.isfinite(var) & (var >= 0))).any():
        raise MismatchError(
            f"mean_ or var_ is not finite, or negative, in {channels(bad, names)}; fit the scaler again"
        )
    return Stats(
        np.where(seen, mean, np.nan),
        np.where(seen, var, np.nan),
        np.ones(len(mean)),
        zeros,
        Moments.without_extremes(count, np.where(seen, mean, 0.0), zeros, np.where(seen, var * count, 0.0), zeros),
        momentum=None,
        eps=0.0,
        num_samples=int(count.max(initial=0)),
        sample_shape=mean.shape,
        names=None if names is None else tuple(map(str, names)),
        provenance=provenance([]),
    )
