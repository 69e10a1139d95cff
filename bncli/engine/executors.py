"""Executors: who computes the tasks of a run. Results come back in the order of the tasks, whoever was faster.

A `Context` holds, as plain values that pickle, what a worker needs: the data set (addresses, not open files), the layout,
the conventions. It reaches each worker once; the worker opens its own files from it. A task is a few numbers. So a thread,
a process and another machine do the same work, and an executor is a few lines that say where:

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
Task = TypeVar("Task", contravariant=True)
Result = TypeVar("Result", covariant=True)

TASKS_PER_WORKER = 2  # in flight: one under way, one that waits, so that no worker idles and results do not pile up


class Context(Protocol[Task, Result]):
    """What every worker needs, as plain values that pickle."""

    def open(self) -> contextlib.AbstractContextManager[Callable[[Task], Result]]:
        """Give one worker its function, with files of its own, which are closed at the end of the block."""


class Pending(Protocol[Result]):
    """A result that is to come: a future of `concurrent.futures`, dask or mpi4py."""

    def result(self) -> Result:
        """Wait for it; raises what the task raised."""

    def cancel(self) -> object:
        """Drop the task if it has not begun."""


class Executor(Protocol):
    """Maps tasks to results, in order, with few tasks in flight.

    When the caller stops early (an error, Ctrl-C), tasks that have not begun are dropped. The first error in the order of
    the tasks is raised, as it was raised in the worker.
    """

    def __call__(self, context: Context[T, R], tasks: Iterable[T], workers: int) -> Iterator[R]:
        """Results of the context's function for each task."""


def available() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def mapped(context: Context[T, R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Results of all tasks, in order, from the executor in use."""
    return EXECUTORS[DEFAULT](context, tasks, workers)


def in_order(submit: Callable[[T], Pending[R]], tasks: Iterable[T], most: int) -> Iterator[R]:
    """Results of submitted tasks, in order; at most `most` are in flight, and no result is held for longer than that."""
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
    """Results of function(task), in order, computed by so many threads; with 0 by the caller's own, as they are asked for.

    At most `most` tasks are in flight. When the caller stops early, tasks that have not begun are dropped.
    """
    if not threads:
        yield from map(function, tasks)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="bn") as pool:
        yield from in_order(lambda task: pool.submit(function, task), tasks, most)


def threads(context: Context[T, R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Threads of this process, each with files of its own. One worker is the caller's own thread."""
    local = threading.local()
    with contextlib.ExitStack() as opened:

        def run(task: T) -> R:
            if not hasattr(local, "function"):
                local.function = opened.enter_context(context.open())
            result: R = local.function(task)
            return result

        yield from in_threads(run, tasks, workers if workers > 1 else 0, TASKS_PER_WORKER * workers)


_worker: Callable[[Any], Any] | None = None  # this process's, where it is a worker
_opened = contextlib.ExitStack()


def open_worker(context: Context[Any, Any]) -> None:
    """Make this process a worker: the initializer of executors that run tasks in other processes."""
    global _worker
    _opened.close()
    _worker = _opened.enter_context(context.open())


def run_task(task: Any) -> Any:
    """The result of a task in a process that `open_worker` made a worker."""
    assert _worker is not None
    return _worker(task)


DEFAULT = "threads"
EXECUTORS: dict[str, Executor] = {"threads": threads}
