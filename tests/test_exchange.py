"""What holds for every format alike: damaged files, files of another kind, and packages that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_helpers import NUMBERS, check_package_missing, features
from helpers import peer

from bncli import exchange
from bncli.errors import InputError, UsageError
from bncli.exchange.common import KINDS, pick
from bncli.stats import Stats

PACKAGES = {"torch": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}


@pytest.fixture(params=exchange.formats("read"))
def suffix(request: pytest.FixtureRequest) -> str:
    """The suffix of each format that can be read."""
    if request.param in PACKAGES:
        peer(request.param)
    return exchange.FORMATS[request.param].suffixes[0]


@pytest.mark.filterwarnings("ignore")  # of torch and NumPy over odd bytes
def test_damaged(tmp_path: Path, suffix: str) -> None:
    """A cut file is refused, and a mutated one too, unless everything that is read from it is the same."""
    path = tmp_path / f"x{suffix}"
    exchange.write(replace(features(3), names=("a", "b", "c")), str(path))
    whole = path.read_bytes()
    original = everything(exchange.read(str(path)))
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1, len(whole) - 2}:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            exchange.read(str(path))
    refused = 0
    for mutated in mutations(whole):
        path.write_bytes(mutated)
        try:
            found = exchange.read(str(path))
        except InputError:
            refused += 1
        else:
            assert everything(found) == original
    assert refused > 75


def everything(stats: Stats) -> list[Any]:
    """What a file carries, bit for bit: numbers, conventions and names."""
    arrays = [getattr(stats, name) for name in (*NUMBERS, "population_count", "population_mean", "population_var")]
    return [array.tobytes() for array in arrays] + [repr(getattr(stats, name)) for name in (*KINDS, "names")]


def mutations(whole: bytes, count: int = 150) -> Iterator[bytes]:
    rng = np.random.default_rng(3)
    for _ in range(count):
        changed = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 4)):
            changed[position] = rng.integers(0, 256)
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore")
def test_other_files(tmp_path: Path, suffix: str) -> None:
    """What is no file of the format is refused, with its name."""
    for name, content in {
        "empty": b"",
        "text": b"hello, world\n" * 9,
        "zeros": bytes(4096),
        "ones": b"\xff" * 999,
    }.items():
        path = tmp_path / (name + suffix)
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            exchange.read(str(path))
    (tmp_path / f"folder{suffix}").mkdir()
    for name, words in (("folder", "not a regular file"), ("missing", "no such file")):
        with pytest.raises(InputError, match=words):
            exchange.read(str(tmp_path / (name + suffix)))


@pytest.mark.parametrize("name", PACKAGES)
def test_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    check_package_missing(monkeypatch, name, PACKAGES[name])


def test_many_layers_are_listed_in_part() -> None:
    with pytest.raises(UsageError, match=r"x: holds 103 layers") as error:
        pick({f"layer{i}": 1000 for i in range(103)}, None, "x", "")
    lines = str(error.value).splitlines()
    assert lines[100:] == ["  --layer layer99: 1,000 features", "  and 3 more"]


def test_population_variances_come_back_bit_by_bit(tmp_path: Path) -> None:
    """The file holds m2 / count, rounded; times the count, rounded, and divided again it is the same."""
    count = np.arange(1.0, 3001)
    m2, one = np.random.default_rng(1).uniform(0.1, 9, 3000), np.ones(3000)
    assert (m2 / count * count != m2).any()
    columns = {"running_mean": one, "running_var": one, "population_mean": one, "population_var": m2 / count}
    np.savez(tmp_path / "x.npz", count=count, **columns)
    assert exchange.read(str(tmp_path / "x.npz")).population_var.tolist() == (m2 / count).tolist()


@pytest.mark.parametrize("count", [-1.0, 0.5, 2.0**53 + 2, np.nan])
def test_counts_that_are_none(tmp_path: Path, count: float) -> None:
    one = np.ones(1)
    columns = dict.fromkeys(("running_mean", "running_var", "population_mean", "population_var"), one)
    np.savez(tmp_path / "x.npz", count=one * count, **columns)
    with pytest.raises(InputError, match=r"x\.npz: count holds"):
        exchange.read(str(tmp_path / "x.npz"))
