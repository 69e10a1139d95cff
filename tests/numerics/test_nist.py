"""NIST Statistical Reference Datasets, univariate summary statistics: NumAcc1 to NumAcc4.

https://www.itl.nist.gov/div898/strd/univ/homepage.html. The data is generated as described there, with the
certified values from the same pages.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import helpers
import numpy as np
import pytest
from helpers import exact

import bncli

NIST = 2e-15


class Certified(NamedTuple):
    """Published by NIST: the data as decimals, the mean and the sample standard deviation (n - 1)."""

    data: list[str]
    mean: str
    sd: float
    stored_as_typed: float  # maximum relative change of the sd by rounding the decimals to doubles


def numacc(c: int) -> list[str]:
    """c.2, then 500 times c.1 and c.3."""
    return [f"{c}.2"] + [f"{c}.1", f"{c}.3"] * 500


CERTIFIED = {
    "NumAcc1": Certified(["10000001", "10000003", "10000002"], "10000002", 1.0, 0.0),
    "NumAcc2": Certified(numacc(1), "1.2", 0.1, 1e-15),
    "NumAcc3": Certified(numacc(1_000_000), "1000000.2", 0.1, 2e-9),
    "NumAcc4": Certified(numacc(10_000_000), "10000000.2", 0.1, 2e-8),
}


@pytest.fixture(params=sorted(CERTIFIED))
def certified(request: pytest.FixtureRequest) -> Certified:
    return CERTIFIED[request.param]


@pytest.mark.parametrize("batch_size", [2, 3, 100, 256, 1001])
@pytest.mark.parametrize("order", ["as printed", "reversed", "sorted"])
def test_within_2e_15_of_the_stored_doubles(certified: Certified, batch_size: int, order: str) -> None:
    x = np.array([float(text) for text in certified.data])
    x = {"as printed": x, "reversed": x[::-1], "sorted": np.sort(x)}[order]
    with helpers.advised("running statistics of", "left out", "constant"):
        stats = bncli.fit(x, batch_size=batch_size, momentum="none", ddof=1)
    truth = exact(x)
    assert helpers.mean_error(stats.population_mean[0], truth) <= NIST
    assert helpers.variance_error(stats.population_var[0], truth.variance) <= NIST
    assert helpers.variance_error(stats.running_var[0], truth.folded(1)) <= NIST
    sd = helpers.root(truth.folded(1))
    assert helpers.off(float(np.sqrt(stats.running_var[0])), sd, sd) <= NIST


def test_certified_values(certified: Certified) -> None:
    """Within the error of rounding the decimals to doubles."""
    x = np.array([float(text) for text in certified.data])
    stats = bncli.fit(x, batch_size=len(x), momentum="none", ddof=1)
    assert abs(stats.population_mean[0] - float(certified.mean)) <= np.spacing(float(certified.mean))
    sd = float(np.sqrt(stats.running_var[0]))
    assert abs(sd - certified.sd) <= (certified.stored_as_typed + NIST) * certified.sd


def test_the_generated_data_is_the_certified_data(certified: Certified) -> None:
    """Exact decimal arithmetic gives the certified values."""
    values = [Fraction(text) for text in certified.data]
    n = len(values)
    mean = sum(values) / n
    assert mean == Fraction(certified.mean)
    assert sum((v - mean) ** 2 for v in values) / (n - 1) == Fraction(str(certified.sd)) ** 2


@pytest.mark.parametrize("as_type", ["i4", "i8", "f4", "f8"])
def test_numacc1_in_every_type_that_holds_it(as_type: str) -> None:
    stats = bncli.fit(np.array([10000001, 10000003, 10000002], as_type), ddof=1)
    assert (stats.population_mean[0], stats.running_mean[0], stats.running_var[0]) == (10000002, 10000002, 1)
