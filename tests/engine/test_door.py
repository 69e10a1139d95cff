"""An executor and a part added from outside, without touching bncli, and used from the command line."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cli_helpers import bn, check_refused, good, save, save_h5
from helpers import check_same_bytes

import bncli
from bncli.engine import checkpoint, executors, parts
from bncli.engine.executors import Context, Pool, R, T, open_worker, run_task
from bncli.engine.parts import Batches, Part
from bncli.engine.tree import Fold, Tree
from bncli.errors import InputError
from bncli.stats import container

X = np.random.default_rng(0).normal(3, 2, (12_000, 200)).astype("f4")  # several segments
OPTIONS = ("--batch-size", 8, "-j", 2, "-q")
calls: list[tuple[int, str]] = []


@contextlib.contextmanager
def toy_pool(context: Context[T, R], workers: int, address: str = "") -> Iterator[Pool[T, R]]:
    calls.append((workers, address))
    spawn = multiprocessing.get_context("spawn")  # new interpreters: all they know was pickled
    with ProcessPoolExecutor(workers, spawn, initializer=open_worker, initargs=(context,)) as pool:
        yield Pool(lambda task: pool.submit(run_task, task), lambda: workers)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)
    calls.clear()
    monkeypatch.setitem(executors.EXECUTORS, "toy", toy_pool)
    return monkeypatch


@pytest.mark.parametrize("kind", ["npy", "h5", "files of two types", "shuffle", "omit"])
def test_same_bytes_as_threads(toy: pytest.MonkeyPatch, kind: str) -> None:
    x, args = X.copy(), ["x.npy"]
    if kind == "h5":
        save_h5(Path("x.h5"), x, chunks=(700, 150), compression="lzf")
        args = ["x.h5"]
    elif kind == "files of two types":
        save(Path("a.npy"), x[:5_111])
        save(Path("b.npy"), x[5_111:].astype("f8"))
        args = ["a.npy", "b.npy"]
    elif kind == "omit":
        x[::7, 2] = np.nan
        args += ["--nan", "omit"]
    elif kind == "shuffle":
        args += ["--shuffle", "--seed", "3"]
    save(Path("x.npy"), x)
    good("fit", *args, *OPTIONS, "-o", "threads.bn.h5")
    good("fit", *args, *OPTIONS, "-o", "processes.bn.h5", "--on", "toy:somewhere")
    assert calls == [(2, "somewhere")]
    check_same_bytes(bncli.load("threads.bn.h5"), bncli.load("processes.bn.h5"))


def test_an_error_arrives_as_it_was_raised(toy: pytest.MonkeyPatch) -> None:
    x = X.copy()
    x[9_000, 3] = np.nan
    save(Path("x.npy"), x)
    here = bn("fit", "x.npy", *OPTIONS)
    assert bn("fit", "x.npy", *OPTIONS, "--on", "toy") == here
    assert (here.code, len(here.err.splitlines())) == (3, 1)
    assert "x.npy: sample 9000, feature 3 is nan" in here.err
    assert calls == [(2, "")]


def test_an_array_in_memory_and_apply(toy: pytest.MonkeyPatch) -> None:
    save(Path("x.npy"), X)
    one = bncli.fit(X, batch_size=8, momentum=0.999, workers=2)
    one.save("x.bn.h5")
    good("apply", "x.bn.h5", "x.npy", "-o", "threads.npy", "-j", 2, "-q")
    check_same_bytes(one, bncli.fit(X, batch_size=8, momentum=0.999, workers=2, on="toy"))
    good("apply", "x.bn.h5", "x.npy", "-o", "processes.npy", "-j", 2, "-q", "--on", "toy")
    assert calls == [(2, ""), (2, "")]
    assert Path("threads.npy").read_bytes() == Path("processes.npy").read_bytes()


@dataclass(frozen=True)
class Zeros(Part):
    """The number of zeros of each feature."""

    zeros: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, features: int) -> Zeros:
        return cls(np.zeros(features, np.int64))

    @classmethod
    def of(cls, batches: Batches) -> Zeros:
        found = np.zeros(batches.layout.features, np.int64)
        for first, values in batches.values():
            found += np.bincount(batches.features(first + np.flatnonzero(values == 0)), minlength=len(found))
        return cls(found)

    def merge(self, later: Zeros, momentum: float | None) -> Zeros:
        return Zeros(self.zeros + later.zeros)


def test_a_part_reaches_checkpoints_and_survives_resume(toy: pytest.MonkeyPatch) -> None:
    x = X.copy()
    x[::5, 3] = x[::7, 150] = 0
    save(Path("x.npy"), x)
    toy.setitem(parts.PARTS, "zeros", Zeros)
    toy.setattr(checkpoint, "EVERY", 0)
    toy.setattr(checkpoint, "SHARE", 0)
    kept: list[tuple[int, list[int]]] = []
    offer = checkpoint.Checkpointer.offer

    def stopping(checkpointer: checkpoint.Checkpointer, pack: Callable[[], checkpoint.Packed], done: str) -> None:
        offer(checkpointer, pack, done)
        tree = Tree.unpack(*container.unpack(Path("x.bn.h5.checkpoint").read_bytes(), "c"), features=X.shape[1])
        zeros = sum(node.fold[Zeros].zeros for node in tree.nodes)
        kept.append((tree.samples, list(zeros)))
        if len(kept) == 2:
            raise InputError("stopped")

    toy.setattr(checkpoint.Checkpointer, "offer", stopping)
    check_refused(3, ["fit", "x.npy", *OPTIONS], "stopped")
    good("fit", "x.npy", *OPTIONS, "--resume")
    assert len(kept) == len({samples for samples, _ in kept}) > 3  # the second run continued after the second segment
    for samples, zeros in kept:
        assert zeros == (x[:samples] == 0).sum(0).tolist()
    assert kept[-1][0] == len(x)


@dataclass(frozen=True)
class Clashing(Part):
    """A plain number of a name that another part has too."""

    samples: int = 0

    @classmethod
    def of(cls, batches: Batches) -> Clashing:
        return cls(7)

    def merge(self, later: Clashing, momentum: float | None) -> Clashing:
        return later


def test_parts_may_have_numbers_of_one_name(toy: pytest.MonkeyPatch) -> None:
    toy.setitem(parts.PARTS, "clashing", Clashing)
    fold = Fold.empty(2).replace(parts.Samples(1000), Clashing(7))
    back = Fold.unpack(*fold.pack(), features=2)
    assert (back.samples, back[Clashing].samples) == (1000, 7)
