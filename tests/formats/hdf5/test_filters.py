"""Filters of a chunk, undone by zlib and by libdeflate, compiled and in NumPy: the same bytes, the same refusals."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from bncli.formats.hdf5 import filters as hdf5_filters
from bncli.formats.hdf5.filters import DEFLATE, FLETCHER32, SHUFFLE, Decoder, Filter, encode, shuffle, unshuffle
from bncli.numerics import compiled
from tests import helpers


@pytest.fixture(params=["zlib", "deflate"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which library inflates."""
    name: str = request.param
    monkeypatch.setattr(hdf5_filters, "libdeflate", helpers.peer(name) if name == "deflate" else None)
    return name


def gzip(*more: Filter) -> list[Filter]:
    return [*more, Filter(DEFLATE, 0, (4,), "gzip")]


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("kernel", ["compiled", "numpy"])
def test_shuffle_stores_the_bytes_of_each_place_together(
    size: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "numpy":
        monkeypatch.setattr(compiled, "AVAILABLE", False)
    data = np.random.default_rng(size).integers(0, 256, 100 * size + size // 2, np.uint8)
    whole = data[: 100 * size].tobytes()
    expected = b"".join(whole[k::size] for k in range(size)) + data[100 * size :].tobytes()
    assert shuffle(data, size).tobytes() == expected
    assert unshuffle(np.frombuffer(expected, np.uint8), size).tobytes() == data.tobytes()


def test_what_is_stored_is_what_zlib_inflates(library: str) -> None:
    data = np.random.default_rng(0).integers(0, 4, 5000, np.uint8)
    for level in range(10):
        stored = encode([Filter(DEFLATE, 0, (level,), "gzip")], data)
        assert zlib.decompress(stored) == data.tobytes(), library
        assert (Decoder(gzip(), data.size).decode(np.frombuffer(stored, np.uint8), 0) == data).all()


def test_all_filters_and_back(library: str) -> None:
    data = np.random.default_rng(1).integers(0, 9, 4001, np.uint8)
    filters = gzip(Filter(SHUFFLE, 0, (4,), "shuffle"), Filter(FLETCHER32, 0, (), "fletcher32"))
    stored = np.frombuffer(encode(filters, data), np.uint8)
    assert (Decoder(filters, data.size).decode(stored, 0) == data).all(), library


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (zlib.compress(bytes(127)), "inflates to only 127 of 128"),
        (zlib.compress(bytes(129)), "more than its 128"),
        (zlib.compress(bytes(10**6)), "more than its 128"),
        (zlib.compress(bytes(128))[:-1], "inflates to only|damaged"),
        (zlib.compress(bytes(128))[:-1] + b"?", "damaged"),
        (b"", "inflates to only 0"),
    ],
)
def test_both_libraries_refuse_the_same(library: str, stored: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Decoder(gzip(), 128).decode(np.frombuffer(stored, np.uint8), 0)
