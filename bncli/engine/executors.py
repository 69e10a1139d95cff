"""Threads that each take work all the way: read, decode, compute. Results come back in order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from bncli.formats.dataset import DataSet

T = TypeVar("T")
R = TypeVar("R")


def available() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Results of work(task) for each task, in the order of the tasks, computed by `workers` threads.

    At most two tasks per worker are under way or waiting to be taken, so that results never pile up. When the caller
    stops early, tasks not yet begun are dropped.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bn")
    try:
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ahead(work: Callable[[T], R], tasks: Iterable[T], most: int) -> Iterator[R]:
    """Results of work(task) for each task, in order; up to `most` are computed ahead, by one thread. With 0, none is."""
    if not most:
        yield from map(work, tasks)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="bn")
    try:
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Readers:
    """A reader of the data set for each thread that asks for one; all are closed at the end."""

    def __init__(self, data: DataSet, workers: int) -> None:
        self._data, self._workers = data, workers
        self._local = threading.local()
        self._opened: list[DataSet] = []

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *exc: object) -> None:
        for reader in self._opened:
            reader.close()

    def mine(self) -> DataSet:
        """The calling thread's reader."""
        if not hasattr(self._local, "data"):
            self._local.data = self._data.reader(self._workers)
            self._opened.append(self._local.data)
        reader: DataSet = self._local.data
        return reader
