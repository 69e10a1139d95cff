"""Samples read in a drawn order: what an array indexed by it would give."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from helpers import Array, save_h5, save_npy
from hypothesis import given, settings
from hypothesis import strategies as st

from bncli.errors import InputError
from bncli.formats.dataset import Joined
from bncli.formats.permuted import Permuted
from bncli.formats.reading import ReadOptions


def drawn_from(data: Joined, indices: Array, window: int, budget: int = 1 << 20) -> Permuted:
    return Permuted(data, lambda first, count: indices[first : first + count], len(indices), window, budget)


def write(folder: Path, x: Array, cuts: list[int]) -> list[str]:
    """x in parts, .npy, its Fortran order and HDF5 with compressed chunks by turns."""
    paths = []
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = x[start:stop]
        if start == stop:
            continue
        if i % 3 == 0:
            paths.append(save_npy(folder / f"{i}.npy", part))
        elif i % 3 == 1:
            paths.append(
                save_h5(folder / f"{i}.h5", part, chunks=(min(3, len(part)), *x.shape[1:]), compression="gzip")
            )
        else:
            paths.append(save_npy(folder / f"{i}.npy", np.asfortranarray(part)))
    return paths


@given(
    st.integers(1, 60),
    st.sampled_from([(1,), (3,), (2, 5), (3000,), (5000,)]),
    st.booleans(),
    st.sampled_from([1, 4, 25, 1000]),
    st.sampled_from([30_000, 100_000, 1 << 24]),
    st.data(),
)
@settings(max_examples=60)
def test_any_slice_of_any_order_from_any_files(
    tmp_path_factory: pytest.TempPathFactory,
    samples: int,
    inner: tuple[int, ...],
    ascending: bool,
    window: int,
    budget: int,
    data: st.DataObject,
) -> None:
    x = np.random.default_rng(0).integers(0, 1 << 30, (samples, *inner)).astype("i8")
    indices = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(samples)[
        : data.draw(st.integers(1, samples))
    ]
    indices = np.sort(indices) if ascending else indices
    cuts = data.draw(helpers.splits(samples))
    paths = write(tmp_path_factory.mktemp("parts"), x, cuts)
    expected = x[indices].reshape(-1)
    with drawn_from(Joined(paths, ReadOptions(max_memory=1 << 20)), indices, window, budget) as whole:
        assert whole.shape == (len(indices), *inner)
        assert whole.dtype == x.dtype
        for reader in (whole, whole.reader(2)):
            for _ in range(3):
                first = data.draw(st.integers(0, len(expected) - 1))
                count = data.draw(st.integers(0, len(expected) - first))
                assert reader.read(first, count).tolist() == expected[first : first + count].tolist()
            assert reader.stored(0, 1) is None
            reader.close()
        address, sample = whole.locate(first)
        starts = dict(zip(paths, (start for start, stop in itertools.pairwise(cuts) if start < stop), strict=True))
        assert starts[address.split("::")[0]] + sample == indices[first // x[0].size]
        whole.check_unchanged()


class Counting(Joined):
    """Remembers what was read."""

    def read(self, first: int, count: int) -> Array:
        self.reads.append((first, count))
        return super().read(first, count)


def counting(x: Array) -> Counting:
    data = Counting(x, ReadOptions(max_memory=1 << 20))
    data.reads = []
    return data


def test_a_window_is_gathered_once_in_ascending_order_with_neighbours_together() -> None:
    x = np.arange(80_000.0).reshape(8, 10_000)
    data = counting(x)
    view = drawn_from(data, np.array([6, 1, 5, 2, 0, 4]), 4, 1 << 24)
    for first in range(0, 40_000, 1000):
        view.read(first, 1000)
    assert data.reads == [(10_000, 20_000), (50_000, 20_000)]
    view.read(40_000, 1000)
    assert data.reads[2:] == [(0, 10_000), (40_000, 10_000)]


def test_small_gaps_are_read_over_and_reads_stay_bounded() -> None:
    data = counting(np.arange(1_200_000.0).reshape(-1, 2))
    kept = np.flatnonzero(np.arange(600_000) % 3)
    view = drawn_from(data, kept, len(kept), 1 << 26)
    assert view.read(0, 2 * len(kept)).tolist() == (kept[:, None] * 2 + [0, 1]).reshape(-1).tolist()
    assert len(data.reads) == 5
    assert max(count for _, count in data.reads) <= 1 << 18


def test_a_sample_that_does_not_fit_is_read_in_pieces() -> None:
    data = counting(np.arange(30_000.0).reshape(3, 10_000))
    view = drawn_from(data, np.array([2, 0]), 1, 100_000)
    assert view.rows_together == 1
    assert view.read(9_990, 20).tolist() == [*range(29_990, 30_000), *range(10)]
    assert data.reads == [(29_990, 10), (0, 10)]


def test_readers_share_the_buffers() -> None:
    x = np.zeros((1000, 100))
    for budget, expected in ((1 << 30, 8), (8 * 2 * 80_000, 8), (3 * 2 * 80_000, 3), (2 * 80_000, 1), (100, 1)):
        view = drawn_from(Joined(x, ReadOptions(max_memory=1 << 30)), np.arange(1000), 100, budget)
        assert min(8, view.most_readers) == expected


def test_inputs_that_change_are_refused(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "x.npy", np.zeros((4, 2)))
    with drawn_from(Joined([path], ReadOptions(max_memory=1 << 20)), np.array([3, 1]), 1) as view:
        view.read(0, 2)
        os.utime(path, ns=(1, 1))
        with pytest.raises(InputError, match="changed"):
            view.check_unchanged()


def test_nothing_of_a_window_is_given_when_reading_it_failed(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "x.npy", np.ones((4, 2)))
    with drawn_from(Joined([path], ReadOptions(max_memory=1 << 20)), np.array([3, 1, 2]), 2) as view:
        view.read(0, 4)
        os.truncate(path, 140)  # in the second sample
        for _ in range(2):
            with pytest.raises(InputError):
                view.read(4, 2)
            with pytest.raises(InputError):
                view.read(0, 4)


def test_a_read_that_fails_is_an_error_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where samples are read straight to their places."""
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((300, 64)))
    monkeypatch.setattr("bncli.numerics.compiled.AVAILABLE", False)  # which reads by itself
    with Joined([str(path)], ReadOptions(max_memory=1 << 24)) as data:
        source = Permuted(data, lambda first, count: np.arange(first, first + count), 300, 300, 1 << 24)

        def fails(fd: int, buffers: Any, offset: int) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(InputError, match=r"x\.npy: reading failed at byte 0: Input/output error"):
            source.read(0, 64 * 300)
