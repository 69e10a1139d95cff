"""Executors: they map tasks over workers and return the results in the order of the tasks.

A `Context` holds what a worker needs as plain values that can be pickled: the data set (addresses, not open files), the
layout, the conventions. It is sent to each worker once, and the worker opens its own files. A task is a few numbers. So a
thread, a process and another machine do the same work, and an executor takes a few lines:

    def processes(context, tasks, workers):
        with ProcessPoolExecutor(workers, initializer=open_worker, initargs=(context,)) as pool:
            yield from in_order(lambda task: pool.submit(run_task, task), tasks, TASKS_PER_WORKER * workers)
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

TASKS_PER_WORKER = 2  # in flight: one is computed and one waits, so workers never idle and results do not pile up


class Context(Protocol[T_contra, R_co]):
    """What every worker needs, as plain values that can be pickled."""

    def open(self) -> contextlib.AbstractContextManager[Callable[[T_contra], R_co]]:
        """Open files for one worker and give it the function to call; the files are closed when the block ends."""


class Pending(Protocol[R_co]):
    """A future result, as of `concurrent.futures`, dask or mpi4py."""

    def result(self) -> R_co:
        """Wait for the result, or raise the task's error."""

    def cancel(self) -> object:
        """Drop the task if it has not started."""


class Executor(Protocol):
    """Maps tasks to results, in order, with few tasks in flight.

    If the caller stops early, tasks that have not started are dropped. The error raised is the first in the order of the
    tasks, of the class and with the message that the worker raised.
    """

    def __call__(self, context: Context[T, R], tasks: Iterable[T], workers: int) -> Iterator[R]:
        """Yield the result of the context's function for each task."""


def available() -> int:
    """Count the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def mapped(context: Context[T, R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Yield the results of all tasks, in order, from the default executor."""
    return EXECUTORS[DEFAULT](context, tasks, workers)


def in_order(submit: Callable[[T], Pending[R]], tasks: Iterable[T], most: int) -> Iterator[R]:
    """Submit tasks and yield their results in order; at most `most` tasks are in flight, finished ones included."""
    waiting: deque[Pending[R]] = deque()
    try:
        for task in tasks:
            waiting.append(submit(task))
            if len(waiting) >= most:
                yield waiting.popleft().result()
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
        yield from in_order(lambda task: pool.submit(function, task), tasks, most)


def threads(context: Context[T, R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Use threads of this process, each with its own open files. A single worker is the caller's own thread."""
    local = threading.local()
    with contextlib.ExitStack() as opened:

        def run(task: T) -> R:
            if not hasattr(local, "function"):
                local.function = opened.enter_context(context.open())
            result: R = local.function(task)
            return result

        yield from in_threads(run, tasks, workers if workers > 1 else 0, TASKS_PER_WORKER * workers)


_worker: Callable[[Any], Any] | None = None  # the function of this process, if it is a worker
_opened = contextlib.ExitStack()


def open_worker(context: Context[Any, Any]) -> None:
    """Make this process a worker: for the initializer of executors that run tasks in other processes."""
    global _worker
    _opened.close()
    _worker = _opened.enter_context(context.open())


def run_task(task: Any) -> Any:
    """Compute a task in a process that `open_worker` made a worker."""
    assert _worker is not None
    return _worker(task)


DEFAULT = "threads"
EXECUTORS: dict[str, Executor] = {"threads": threads}
