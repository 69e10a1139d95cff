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
from bncli.errors import InputError
from bncli.exchange.common import KINDS
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
