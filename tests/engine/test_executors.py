"""Executors: results in order, few tasks in flight, the first error, and the same bytes for any number of threads."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import h5py
import numpy as np
import pytest

import bncli
from bncli.engine.apply import ApplySpec, apply_files
from bncli.engine.executors import in_order, in_threads
from bncli.engine.order import Order
from bncli.errors import InputError
from bncli.formats.dataset import Joined
from bncli.formats.permuted import Permuted
from bncli.formats.reading import ReadOptions
from bncli.numerics import layout

from helpers import check_same_bytes, save_h5, save_npy  # isort: skip


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many segments that several workers have something to do on little data."""
    monkeypatch.setattr(layout, "PENDING_VALUES", 64)
    monkeypatch.setattr(layout, "PIECE_VALUES", 512)


def test_results_come_in_order_whoever_is_faster() -> None:
    def work(task: int) -> int:
        time.sleep(0.002 * (task % 3 == 0))
        return task * task

    assert list(in_threads(work, range(50), 4, 8)) == [i * i for i in range(50)]


def test_no_more_than_two_tasks_a_worker_wait() -> None:
    begun: list[int] = []
    results = in_threads(lambda task: begun.append(task) or task, range(1000), 3, 6)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) <= 7
    results.close()
    assert threading.active_count() < 50


def test_tasks_that_have_not_begun_are_dropped() -> None:
    pending: list[Future[int]] = []

    def submit(task: int) -> Future[int]:
        pending.append(Future())
        if task < 2:
            pending[-1].set_result(task)
        return pending[-1]

    results = in_order(submit, range(1000), lambda: 4)
    assert [next(results), next(results)] == [0, 1]
    results.close()
    assert [p.cancelled() for p in pending] == [False, False, True, True, True]


@pytest.mark.parametrize("kind", ["npy", "h5", "memory"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_data_set_pickles_without_its_open_files(tmp_path: Path, kind: str, shuffled: bool) -> None:
    x = np.random.default_rng(0).normal(size=(500, 6))
    paths = {"npy": save_npy(tmp_path / "x.npy", x), "h5": save_h5(tmp_path / "x.h5", x, chunks=(70, 4))}
    joined = Joined([paths[kind]] if kind in paths else x, ReadOptions(rows=(3, None), max_memory=1 << 20))
    order = Order(joined.shape[0], joined.sample_size, seed=5, shuffled=True)
    data = Permuted(joined, order.indices, order.count, order.window, 1 << 20) if shuffled else joined
    with data:
        values = data.read(0, 600).copy()  # files are open, buffers are filled
        content = pickle.dumps(data)
        with pickle.loads(content) as other:
            assert other.read(0, 600).tobytes() == values.tobytes()
            assert (other.shape, other.most_readers, other.files) == (data.shape, data.most_readers, data.files)
            other.check_unchanged()
        assert data.read(600, 600).tobytes() != values.tobytes()
    assert kind == "memory" or len(content) < 4000


def test_the_first_error_in_order_is_raised() -> None:
    def work(task: int) -> int:
        if task in (5, 6):
            time.sleep(0.01 * (7 - task))  # the later one fails earlier
            raise InputError(str(task))
        return task

    with pytest.raises(InputError, match="5"):
        list(in_threads(work, range(20), 4, 8))


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("kind", ["npy", "fortran", "chunks", "tall chunks", "two files"])
@pytest.mark.parametrize("nan", ["error", "omit"])
def test_same_bytes_for_any_number_of_workers(tmp_path: Path, kind: str, nan: str) -> None:
    x = np.random.default_rng(0).standard_normal((3000, 5)).astype("f4")
    if nan == "omit":
        x[::7, 2] = np.nan
    sources = [str(tmp_path / "x.npy")]
    if kind == "two files":
        sources = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
        np.save(sources[0], x[:1234])
        np.save(sources[1], x[1234:])
    elif "chunks" in kind:
        sources = [str(tmp_path / "x.h5")]
        with h5py.File(sources[0], "w") as file:
            file.create_dataset("x", data=x, chunks=(1000 if "tall" in kind else 7, 5), compression="gzip")
    else:
        np.save(sources[0], np.asfortranarray(x) if kind == "fortran" else x)
    options = {"batch_size": 16, "nan": nan, "momentum": 0.999}
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one = bncli.fit(sources, workers=1, **options)
        for workers in (2, 3, 8):
            check_same_bytes(one, bncli.fit(sources, workers=workers, **options))


@pytest.mark.usefixtures("small_segments")
def test_a_bad_value_is_named_alike_by_any_number_of_workers() -> None:
    x = np.zeros((3000, 5))
    x[2000, 3] = x[2900, 1] = np.nan
    for workers in (1, 2, 5):
        with pytest.raises(InputError, match="sample 2000, feature 3 is nan"):
            bncli.fit(x, batch_size=16, workers=workers)


@pytest.mark.parametrize("suffix", [".npy", ".h5"])
def test_apply_writes_the_same_file_with_any_number_of_workers(tmp_path: Path, suffix: str) -> None:
    x = np.random.default_rng(0).standard_normal((200_000, 7))
    x[5, 3], x[199_999, 0] = np.nan, np.inf
    source = str(tmp_path / ("x" + suffix))
    if suffix == ".npy":
        np.save(source, x)
    else:
        with h5py.File(source, "w") as file:
            file.create_dataset("x", data=x, chunks=(3000, 4), compression="gzip", compression_opts=1)
    stats = bncli.fit(x[10:1000], momentum="none")
    written = []
    for workers in (1, 2, 5):
        out = str(tmp_path / f"{workers}{suffix}")
        report = apply_files(stats, [source], out, ApplySpec(workers=workers))
        assert report.non_finite == 2
        if suffix == ".npy":
            written.append(np.load(out))
        else:
            with h5py.File(out) as file:
                written.append(file["x"][...])
    assert written[0].tobytes() == written[1].tobytes() == written[2].tobytes()
    expected = (x[:10] - x[10:1000].mean(0)) / np.sqrt(x[10:1000].var(0) + 1e-5)
    np.testing.assert_allclose(written[0][:10], expected, rtol=1e-9, atol=1e-12)
