"""Dask: workers of a scheduler that runs already (dask.distributed)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any, Generic

from bncli.engine.executors import Context, Pool, R, T
from bncli.engine.executors.worker import Shipment, place, run, unpacked
from bncli.errors import BnNote, InputError, MismatchError, UsageError, printable

CONNECT = 10.0  # seconds until a scheduler that does not answer is given up
PATIENCE = 30.0  # seconds without a worker until that is said
COUNT_EVERY = 1.0  # seconds between two looks at how many workers there are
FROM_ENVIRONMENT = "DASK_SCHEDULER_ADDRESS"


@contextlib.contextmanager
def dask(context: Context[T, R], workers: int, address: str = "") -> Iterator[Pool[T, R]]:
    """Use the workers of a scheduler: those that are there, and those that come.

    Parameters
    ----------
    address : str
        tcp://HOST:PORT, or a scheduler file. "": of the environment variable DASK_SCHEDULER_ADDRESS.
    """
    cluster: _Cluster[T, R] = _Cluster(context, address)
    with _quiet():
        try:
            yield Pool(cluster.submit, cluster.workers)
        finally:
            cluster.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client from logging a traceback when the scheduler goes away, which bn reports in a line of its own."""
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Cluster(Generic[T, R]):
    def __init__(self, context: Context[T, R], address: str) -> None:
        self._client, self.name = _client(address)
        shipment = Shipment.of(context.absolute())
        self._token, self._numbers = shipment.token, itertools.count()
        # a task, whose result a worker asks another one for; and which is done again where it was lost with a worker
        self._shipment = self._client.submit(_same, shipment, key=f"bn-{shipment.token}", pure=False)
        self._count, self._counted = 0, 0.0
        self._wait_for_workers()
        with contextlib.suppress(ValueError):  # raised where a worker leaves meanwhile
            self._client.replicate([self._shipment])  # else the worker that has it would be given most tasks

    def submit(self, task: T) -> _Task[R]:
        """Hand a task to the scheduler."""
        key = f"bn-{self._token}-{next(self._numbers)}"
        return _Task(self, self._client.submit(_run, self._shipment, task, key=key, pure=False))

    def workers(self) -> int:
        """How many threads the workers have; at least 1, since others may come."""
        if time.monotonic() - self._counted > COUNT_EVERY:
            self._count, self._counted = sum(self._client.nthreads().values()), time.monotonic()
        return max(1, self._count)

    def wait(self, future: Any) -> Any:
        """The result of a future; says so when there has been no worker for a while."""
        import distributed
        from distributed.client import FutureCancelledError

        while True:
            try:
                return future.result(timeout=PATIENCE)
            except TimeoutError:
                self._wait_for_workers()
            except distributed.KilledWorker as error:
                raise InputError(
                    f"the scheduler {self.name} gave up a task after its worker was lost {error.allowed_failures + 1} times: "
                    "see the workers' logs; if memory is short, give a smaller --max-memory, and if workers come and go, a "
                    "larger distributed.scheduler.allowed-failures"
                ) from None
            except FutureCancelledError:
                raise InputError(f"the scheduler {self.name} went away, or dropped the task") from None
            except (ImportError, AttributeError) as error:  # the function or what it needs is not there
                raise MismatchError(
                    f"a worker of {self.name} cannot run bn ({printable(error)}): install bncli {_version()} on all machines, "
                    "the scheduler's too"
                ) from None

    def _wait_for_workers(self) -> None:
        said = False
        while not self._client.nthreads():
            try:
                self._client.wait_for_workers(1, timeout=PATIENCE)
            except TimeoutError:
                if not said:
                    text = f"no worker at {self.name} for {PATIENCE:.0f} s; waiting for one (Ctrl-C ends)"
                    warnings.warn(text, BnNote, stacklevel=2)
                said = True
        self._counted = 0.0

    def close(self) -> None:
        """Let go of the scheduler, which drops what was not done, and the context on the workers."""
        self._client.close(timeout=2)


class _Task(Generic[R]):
    def __init__(self, cluster: _Cluster[Any, R], future: Any) -> None:
        self._cluster, self._future = cluster, future

    def result(self) -> R:
        """Wait for the result."""
        result: R = unpacked(self._cluster.wait(self._future))
        self._future.release()
        return result

    def cancel(self) -> None:
        """Drop it."""
        self._future.release()


def _client(address: str) -> tuple[Any, str]:
    address = address or os.environ.get(FROM_ENVIRONMENT, "")
    if not address:
        raise UsageError(
            f"--on dask: give the scheduler's address or file, --on dask:tcp://HOST:8786, or set {FROM_ENVIRONMENT}"
        )
    is_file = "://" not in address and os.path.exists(address)
    if "://" not in address and not is_file and ":" not in address:
        raise InputError(f"{printable(address)}: no such scheduler file")
    try:
        import distributed
    except ImportError:
        raise UsageError("--on dask needs dask.distributed: pip install 'bncli[dask]'") from None
    where = {"scheduler_file": address} if is_file else {"address": address}
    try:
        connect: Any = distributed.Client
        return connect(**where, timeout=CONNECT, set_as_default=False), printable(address)
    except Exception as error:  # what another package raises over a file that is no scheduler's
        reason = printable(" ".join(str(error).split()))[:120] or type(error).__name__
        raise InputError(f"{printable(address)}: no dask scheduler answers: {reason}") from None


def _same(shipment: Shipment) -> Shipment:
    return shipment


def _run(shipment: Shipment, task: Any) -> Any:
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        state = worker.state.tasks.get(key)
        return state is not None and state.state in ("executing", "long-running")

    return run(shipment, task, f"{worker.address} ({place()})", wanted)


def _version() -> str:
    from bncli.version import __version__

    return __version__
