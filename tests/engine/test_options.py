"""Options given in Python: what is not an option's value is refused before a value is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_npy

import bncli
from bncli.errors import OutputExistsError, UsageError

X = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize("name", ["workers", "seed", "nan", "allow_virtual", "max_memory", "rows"])
def test_none_is_no_value_where_it_is_no_default(name: str) -> None:
    with pytest.raises(UsageError, match="None is not"):
        bncli.fit(X, **{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names", [{"a", "b", "c"}, iter("abc"), {"a": 1, "b": 2, "c": 3}, (n for n in "abc"), b"abc", 5]
)
def test_names_have_an_order_and_can_be_read_twice(names: Any) -> None:
    with pytest.raises(UsageError, match="neither an address nor a sequence of names"):
        bncli.fit(X, names=names)


@pytest.mark.parametrize("names", [["a", "b", "c"], ("a", "b", "c"), np.array(["a", "b", "c"])])
def test_sequences_of_names(names: Any) -> None:
    assert bncli.fit(X, names=names).names == ("a", "b", "c")


@pytest.mark.parametrize("path", [None, 5, "", b"x"])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(UsageError, match="is not the path of a"):
        bncli.fit(X).save(path)
    with pytest.raises(UsageError, match="is not the path of a"):
        bncli.load(path)


def test_apply_in_python_is_the_command(tmp_path: Path) -> None:
    stats = bncli.fit(X)
    stats.save(tmp_path / "s.bn.h5")
    source = save_npy(tmp_path / "x.npy", X)
    done = bncli.apply(stats, source, tmp_path / "y.npy", dtype="float64")
    assert (done.outputs, done.samples) == ([str(tmp_path / "y.npy")], 4)
    assert np.array_equal(np.load(tmp_path / "y.npy"), stats.normalize(X))
    back = bncli.apply(tmp_path / "s.bn.h5", [tmp_path / "y.npy"], str(tmp_path / "back.npy"), inverse=True)
    assert back.values == 12
    assert np.allclose(np.load(tmp_path / "back.npy"), X, rtol=1e-15, atol=1e-14)
    with pytest.raises(UsageError, match="--use 'both' is not one of running, population"):
        bncli.apply(stats, source, tmp_path / "z.npy", use="both")  # type: ignore[arg-type]
    with pytest.raises(OutputExistsError):
        bncli.apply(stats, source, tmp_path / "y.npy")


def test_true_is_no_number() -> None:
    for name in ("eps", "batch_size", "workers", "momentum"):
        with pytest.raises(UsageError, match="True is not a"):
            bncli.fit(X, **{name: True})  # type: ignore[arg-type]
