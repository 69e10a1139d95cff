"""Executors: they map tasks over workers and return the results in the order of the tasks.

A `Context` holds what a worker needs as plain values that can be pickled: the data set (addresses, not open files), the
layout, the conventions. It is sent to each worker once, and the worker opens its own files. A task is a few numbers. So a
thread, a process and another machine do the same work, and an executor takes a few lines:

    @contextlib.contextmanager
    def processes(context, workers, address=""):
        with ProcessPoolExecutor(workers, initializer=open_worker, initargs=(context,)) as pool:
            yield Pool(lambda task: pool.submit(run_task, task), lambda: workers)

and a row of EXECUTORS. `worker` is what runs at the other end, for executors that leave this process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from bncli.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

TASKS_PER_WORKER = 2  # in flight: one is computed and one waits, so workers never idle and results do not pile up


class Context(Protocol[T_contra, R_co]):
    """What every worker needs, as plain values that can be pickled."""

    def open(self) -> contextlib.AbstractContextManager[Callable[[T_contra], R_co]]:
        """Open files for one worker and give it the function to call; the files are closed when the block ends."""

    def absolute(self) -> Context[T_contra, R_co]:
        """The same with absolute paths, for workers in another working folder."""


class Pending(Protocol[R_co]):
    """A future result, as of `concurrent.futures`, dask or mpi4py."""

    def result(self) -> R_co:
        """Wait for the result, or raise the task's error."""

    def cancel(self) -> object:
        """Drop the task if it has not started."""


@dataclass(frozen=True)
class Pool(Generic[T, R]):
    """Workers that have been given a context.

    Attributes
    ----------
    submit : function
        Gives a task to a worker. A task whose worker is lost is done again.
    workers : function
        How many tasks can be computed at once, now.
    """

    submit: Callable[[T], Pending[R]]
    workers: Callable[[], int]


class Executor(Protocol):
    """Gives a context to workers."""

    def __call__(
        self, context: Context[T, R], workers: int, address: str = ""
    ) -> contextlib.AbstractContextManager[Pool[T, R]]:
        """Yield the workers.

        Parameters
        ----------
        context : Context
        workers : int
            How many, where the executor starts them.
        address : str
            Of those that run already: what follows the executor's name in --on.
        """


def available() -> int:
    """Count the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_here(on: str) -> bool:
    """Whether the workers share the CPUs and the memory of this process, so that there should not be more than CPUs."""
    return on.partition(":")[0] not in ELSEWHERE


def mapped(
    context: Context[T, R],
    cut: Callable[[int], Iterable[T]],
    workers: int,
    on: str = "",
    watch: Callable[[int], object] = lambda workers: None,
) -> Iterator[R]:
    """Yield the results of all tasks, in order, with few tasks in flight.

    If the caller stops early, tasks that have not started are dropped. The error raised is the first in the order of the
    tasks, of the class and with the message that the worker raised.

    Parameters
    ----------
    context : Context
    cut : function
        Gives the tasks for so many workers.
    workers : int
        How many to start, where the executor starts them.
    on : str
        The option --on: an executor's name, and perhaps ":" and an address.
    watch : function
        Told how many workers there are, before each result.
    """
    name, _, address = (on or DEFAULT).partition(":")
    with executor(name)(context, workers, address) as pool:
        for result in in_order(pool.submit, cut(pool.workers()), lambda: TASKS_PER_WORKER * pool.workers()):
            watch(pool.workers())
            yield result


def executor(name: str) -> Executor:
    """The executor of this name, loaded when it is asked for."""
    found = EXECUTORS[name]
    if not isinstance(found, str):
        return found
    module, _, function = found.partition(":")
    return cast("Executor", getattr(importlib.import_module(module), function))


def in_order(submit: Callable[[T], Pending[R]], tasks: Iterable[T], most: Callable[[], int]) -> Iterator[R]:
    """Submit tasks and yield their results in order; at most `most()` tasks are in flight, finished ones included."""
    waiting: deque[Pending[R]] = deque()
    try:
        for task in tasks:
            while len(waiting) >= max(1, most()):
                yield waiting.popleft().result()
            waiting.append(submit(task))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for pending in waiting:
            pending.cancel()


def in_threads(function: Callable[[T], R], tasks: Iterable[T], threads: int, most: int) -> Iterator[R]:
    """Yield function(task) for each task, in order, computed by a pool of threads, or by the caller's own for 0 threads.

    At most `most` tasks are in flight. If the caller stops early, tasks that have not started are dropped.
    """
    if not threads:
        yield from map(function, tasks)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="bn") as pool:
        yield from in_order(lambda task: pool.submit(function, task), tasks, lambda: most)


class PerThread(Generic[T, R]):
    """The function of a context, opened once in each thread that calls it; `close` closes all."""

    def __init__(self, context: Context[T, R]) -> None:
        self._context, self._local, self._opened = context, threading.local(), contextlib.ExitStack()
        self._lock = threading.Lock()

    def __call__(self, task: T) -> R:
        """Compute a task in the calling thread."""
        if not hasattr(self._local, "function"):
            function = (opened := self._context.open()).__enter__()
            with self._lock:
                self._opened.push(opened)
            self._local.function = function
        result: R = self._local.function(task)
        return result

    def close(self) -> None:
        """Close what the threads opened, when none of them computes any more."""
        self._opened.close()


@contextlib.contextmanager
def threads(context: Context[T, R], workers: int, address: str = "") -> Iterator[Pool[T, R]]:
    """Use threads of this process, each with its own open files. A single worker is the caller's own thread."""
    refuse_address("threads", address)
    function = PerThread(context)
    with contextlib.closing(function):
        if workers < 2:
            yield Pool(lambda task: _Now(function, task), lambda: 1)
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="bn") as pool:
            yield Pool(lambda task: pool.submit(function, task), lambda: workers)


def refuse_address(name: str, address: str) -> None:
    """Raise UsageError where an executor that takes no address is given one."""
    if address:
        raise UsageError(f"--on {name}:{address}: {name} takes no address; -j says how many workers")


class _Now(Generic[T, R]):
    """A task that is computed when its result is asked for."""

    def __init__(self, function: Callable[[T], R], task: T) -> None:
        self._function, self._task = function, task

    def result(self) -> R:
        """Compute."""
        return self._function(self._task)

    def cancel(self) -> None:
        """Nothing has started."""


_worker: PerThread[Any, Any] | None = None  # of this process, if it is a worker


def open_worker(context: Context[Any, Any]) -> None:
    """Make this process a worker: for the initializer of executors that run tasks in other processes."""
    global _worker
    _worker = PerThread(context)


def run_task(task: Any) -> Any:
    """Compute a task in a process that `open_worker` made a worker."""
    assert _worker is not None
    return _worker(task)


DEFAULT = "threads"
EXECUTORS: dict[str, Executor | str] = {
    "threads": threads,
    "processes": "bncli.engine.executors.processes:processes",
    "dask": "bncli.engine.executors.dask:dask",
    "mpi": "bncli.engine.executors.mpi:mpi",
}
ELSEWHERE = ("dask", "mpi")  # their workers may be on other machines
