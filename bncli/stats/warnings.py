"""What a person should know about a fit: warnings that matter, each with what to do."""

from __future__ import annotations

import numpy as np

from bncli.errors import printable
from bncli.numerics.arrays import Bools, Floats
from bncli.stats.conventions import complement
from bncli.stats.record import DRIFT_MEAN, DRIFT_VARIANCE, EPS_SHARE, Stats

NAMED = 3  # worst features named in a warning


def advice(stats: Stats) -> list[str]:
    """Warnings about a fit, most important first; an empty list when all is well."""
    return [text for text in (_drift(stats), _constant(stats), _eps(stats), _missing(stats), _left_out(stats)) if text]


def momentum_advice(momentum: float | None, origin: str | None) -> str:
    """The warning for a momentum given with a preset or format of PyTorch's that may be PyTorch's own; else ""."""
    if origin not in ("torch", "safetensors") or momentum is None or not 0 < momentum < 0.5:
        return ""
    share = complement(momentum)
    return (
        f"momentum {momentum:g} is the weight of the OLD value here, so that each batch replaces {share:.0%} of the running "
        f"statistics; if PyTorch's momentum={momentum:g} is meant, type --momentum {share:g}"
    )


def _drift(stats: Stats) -> str:
    drifted = stats.drifted
    if not drifted.any():
        return ""
    var = np.where(stats.population_var > 0, stats.population_var, 1)
    mean_off = np.abs(stats.running_mean - stats.population_mean) / np.sqrt(var)
    var_off = np.abs(stats.running_var - stats.population.variance(stats.ddof)) / var
    distance = np.where(drifted, np.maximum(mean_off / DRIFT_MEAN, var_off / DRIFT_VARIANCE), 0)
    return (
        f"the running statistics of {_count(drifted)} differ from the population's (by more than {DRIFT_MEAN:g} sd in the "
        f"mean or {DRIFT_VARIANCE:.0%} in the variance): {_worst(stats, distance)}. Apply with --use population, or fit with "
        f"more batches or a larger momentum{'' if 'shuffle' in stats.options else '; for sorted data give --shuffle'}"
    )


def _constant(stats: Stats) -> str:
    constant = stats.constant
    if not constant.any():
        return ""
    verb = "is" if constant.sum() == 1 else "are"
    return f"{_count(constant)} {verb} constant: {_worst(stats, constant.astype(np.float64))}; any other value in new data will be scaled by 1/sqrt(eps), or by 1 where eps is 0"


def _eps(stats: Stats) -> str:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(stats.running_var > 0, stats.eps / stats.running_var, 0)
    large = share > EPS_SHARE
    if not large.any():
        return ""
    verb, it = ("has", "it") if large.sum() == 1 else ("have", "they")
    return (
        f"{_count(large)} {verb} a variance so small that eps {stats.eps:g} is more than {EPS_SHARE:.0%} of it: "
        f"{_worst(stats, np.where(large, share, 0))}; {it} will have an sd below 1 after apply. Fit with a smaller --eps"
    )


def _missing(stats: Stats) -> str:
    empty = np.isnan(stats.running_mean)
    texts = []
    if empty.any():
        verb = "has" if empty.sum() == 1 else "have"
        texts.append(
            f"{_count(empty)} {verb} no batch with two values: {_worst(stats, empty.astype(np.float64))}; "
            "the running statistics are NaN, and so is what apply gives"
        )
    positions = stats.positions
    expected = stats.population_count.max(initial=0) if positions is None else positions
    absent = int((expected - stats.population_count).sum())
    if absent:
        least = "at least " if positions is None else ""
        total = "" if positions is None else f" (of {positions * stats.num_features:,})"
        texts.append(
            f"{least}{'1 value was' if absent == 1 else f'{absent:,} values were'} missing or left out{total}, most in "
            f"{_worst(stats, expected - stats.population.count)}"
        )
    return "; ".join(texts)


def _left_out(stats: Stats) -> str:
    if not stats.num_left_out:
        return ""
    batches = "a batch" if stats.num_left_out == 1 else f"{stats.num_left_out:,} batches"
    return f"{batches} with fewer than two values per feature left out of the running statistics (kept in the population's)"


def _count(where: Bools) -> str:
    count = int(where.sum())
    return "1 feature" if count == 1 else f"{count:,} features"


def _worst(stats: Stats, by: Floats) -> str:
    """The features with the largest values of `by`, and how many more there are."""
    order = np.argsort(-by, kind="stable")[:NAMED]
    named = [f"{i} ({printable(stats.names[i])})" if stats.names else str(i) for i in order.tolist() if by[i] > 0]
    more = int((by > 0).sum()) - len(named)
    return ", ".join(named) + (f" and {more:,} more" if more > 0 else "")
