"""Several threads at once: each gets the same result as alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import check_same_bytes, save_h5, save_npy

import bncli
from bncli import exchange
from bncli.engine.apply import ApplySpec, apply_files
from bncli.stats.record import Stats

THREADS, TIMES = 4, 12
X = np.arange(24.0).reshape(12, 2)
Call = Callable[[Stats, Path], object]


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    """Switch between threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def save(stats: Stats, folder: Path) -> object:
    stats.save(str(folder / "x.bn.h5"))
    return bncli.load(str(folder / "x.bn.h5")).to_bytes()


def keras(stats: Stats, folder: Path) -> object:
    exchange.write(stats, str(folder / "x.weights.h5"))
    return (folder / "x.weights.h5").read_bytes(), exchange.read(str(folder / "x.weights.h5")).running_mean.tolist()


def others(stats: Stats, folder: Path) -> object:
    found = []
    for suffix in (".json", ".csv", ".npz"):
        exchange.write(stats, str(folder / f"x{suffix}"))
        found.append(exchange.read(str(folder / f"x{suffix}")).running_mean.tolist())
    return found


def fit_hdf5(stats: Stats, folder: Path) -> object:
    return bncli.fit(save_h5(folder / "x.h5", X, chunks=(3, 2), compression="gzip")).running_mean.tolist()


def fit_npy(stats: Stats, folder: Path) -> object:
    return bncli.fit(save_npy(folder / "x.npy", X)).running_mean.tolist()


def apply_hdf5(stats: Stats, folder: Path) -> object:
    path = save_h5(folder / "x.h5", X, chunks=(3, 2), compression="gzip")
    apply_files(stats, [path], str(folder / "y.h5"), ApplySpec(force=True))
    return (folder / "y.h5").read_bytes()


@pytest.mark.parametrize("call", [save, keras, others, fit_hdf5, fit_npy, apply_hdf5])
def test_threads_do_what_one_does_alone(tmp_path: Path, call: Call) -> None:
    stats = bncli.fit(X, momentum="none")
    folders = [tmp_path / str(i) for i in range(THREADS + 1)]
    for folder in folders:
        folder.mkdir()
    alone = call(stats, folders[-1])
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(lambda folder: [call(stats, folder) for _ in range(TIMES)], folders[:-1]))
    assert all(one == alone for several in found for one in several)


def test_the_same_file_from_several_threads_is_whole_at_any_moment(tmp_path: Path) -> None:
    stats = bncli.fit(X)
    with ThreadPoolExecutor(THREADS) as threads:
        for back in threads.map(lambda _: (save(stats, tmp_path), bncli.load(str(tmp_path / "x.bn.h5")))[1], range(40)):
            check_same_bytes(back, stats)


def test_the_mask_of_new_files_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With time for another thread between the two calls that reading the mask takes."""
    stats, umask = bncli.fit(X), os.umask
    before = umask(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: (umask(mask), time.sleep(0.01))[0])
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda i: stats.save(str(tmp_path / f"{i}.bn.h5")), range(2 * THREADS)))
        assert {os.stat(path).st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
        assert umask(0o027) == 0o027
    finally:
        umask(before)
