"""Processes of this machine. One that is killed is replaced, and its tasks are done again."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from multiprocessing import resource_tracker, util
from typing import Any, Generic

from bncli.engine.executors import Context, Pool, R, T, refuse_address
from bncli.engine.executors.worker import Shipment, place, run, unpacked
from bncli.errors import InputError, UsageError
from bncli.system import shutdown

MOST_DEATHS = 10  # of workers, one after the other, without a result between

_shipment: Shipment | None = None  # of a worker


@contextlib.contextmanager
def processes(context: Context[T, R], workers: int, address: str = "") -> Iterator[Pool[T, R]]:
    """Start processes, and end them with the block or when this process is stopped."""
    refuse_address("processes", address)
    pool: _Restarting[T, R] = _Restarting(context, workers)
    with shutdown.process.on_stop(pool.stop):
        try:
            yield Pool(lambda task: _Task(pool, task), lambda: workers)
        finally:
            pool.close()


class _Restarting(Generic[T, R]):
    """A pool of processes that starts anew after one of them was lost."""

    def __init__(self, context: Context[T, R], workers: int) -> None:
        self._shipment, self._workers = Shipment.of(context), workers
        shutdown.process.orderly = True  # semaphores have to be given back
        self.deaths = 0
        # Python unblocks SIGINT and SIGTERM in the thread that starts the tracker; `Shutdown` needs them blocked in the others
        starter = threading.Thread(target=resource_tracker.ensure_running)
        starter.start()
        starter.join()
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # forking copies the locks of threads that are not copied
        self.executor = ProcessPoolExecutor(self._workers, spawn, initializer=_begin, initargs=(self._shipment,))

    def replace(self, broken: ProcessPoolExecutor) -> None:
        """Start new processes in the place of a broken pool.

        Raises
        ------
        InputError
            When workers were lost again and again.
        """
        shutdown.process.block_if_stopping()  # then nobody starts any more
        if broken is not self.executor:
            return  # somebody did already
        self.deaths += 1
        if any(worker.exitcode == 1 for worker in (broken._processes or {}).values()):
            raise UsageError(
                "a worker process ended as it started. Workers import the program that called bn: put its calls under "
                "if __name__ == '__main__':"
            )
        if self.deaths >= MOST_DEATHS:
            raise InputError(
                f"{self.deaths} worker processes were killed one after the other; if memory is short, give a smaller "
                "--max-memory or fewer workers with -j"
            )
        broken.shutdown(wait=False, cancel_futures=True)
        self._start()

    def kill(self) -> None:
        """End all processes at once."""
        for process in list((self.executor._processes or {}).values()):
            process.kill()

    def stop(self) -> None:
        """End all processes, and give back semaphores, when this process is about to end without doing so."""
        self.kill()
        util._run_finalizers(0)  # type: ignore[attr-defined]

    def close(self) -> None:
        """End the processes; tasks that have begun are not waited for."""
        self.kill()
        self.executor.shutdown(wait=False, cancel_futures=True)


class _Task(Generic[T, R]):
    """A task that is submitted again when its worker is lost."""

    def __init__(self, pool: _Restarting[T, R], task: T) -> None:
        self._pool, self._task = pool, task
        self._submit()

    def _submit(self) -> None:
        while True:
            self._executor = self._pool.executor
            try:
                self._future: Future[Any] = self._executor.submit(_run, self._task)
            except BrokenExecutor:
                self._pool.replace(self._executor)
            else:
                return

    def result(self) -> R:
        """Wait for the result."""
        while True:
            try:
                found: R = unpacked(self._future.result())
            except BrokenExecutor:
                self._pool.replace(self._executor)
                self._submit()
            else:
                self._pool.deaths = 0
                return found

    def cancel(self) -> None:
        """Drop it if it has not started."""
        self._future.cancel()


def _begin(shipment: Shipment) -> None:
    """Make this process a worker, which ends with the process that started it."""
    global _shipment
    _shipment = shipment
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes of a terminal; the first one ends the others
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _run(task: Any) -> Any:
    assert _shipment is not None
    return run(_shipment, task, place())
