"""MPI: under mpiexec, rank 0 hands tasks to the other ranks (mpi4py.futures)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic

from bncli.engine.executors import Context, Pool, R, T
from bncli.engine.executors.worker import Shipment, place, run, unpacked
from bncli.errors import UsageError
from bncli.system import shutdown

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # environment variables: number of ranks, of Open MPI and MPICH
PATIENCE = 10.0  # seconds that a rank that is stopped waits for the first

_pool: Any = None  # of rank 0, while the other ranks serve
_shipment: Shipment | None = None  # of a worker


@contextlib.contextmanager
def session(on: str | None = "mpi", *, part: bool = False) -> Iterator[bool]:
    """For the entry point of a command: gives whether this process only served another one, and has nothing else to do.

    Under mpiexec all ranks run the same command. The block of the first is its work; the others serve until it ends.
    Without `--on mpi` there is nothing to do.

    Raises
    ------
    UsageError
        When mpi4py is missing, or there is one rank alone; without `--on` when there are several that would each do
        everything (`part`: that each has a part of its own).
    """
    global _pool
    ranks = next((int(n) for name in SIZES if (n := os.environ.get(name, "")).isdecimal()), 1)
    if on is None and not part and ranks > 1:
        raise UsageError(
            f"{ranks} processes under mpiexec would each do all the work: give --on mpi, or --on threads where each has work of its own"
        )
    if on != "mpi":
        yield False
        return
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor, MPIPoolExecutor, _core
    except ImportError as error:
        raise UsageError(f"--on mpi needs mpi4py and an MPI library ({error}): pip install 'bncli[mpi]'") from None
    if MPI.COMM_WORLD.Get_size() < 2:
        raise UsageError("--on mpi runs under mpiexec, one rank more than workers: mpiexec -n 3 bn fit ... --on mpi")
    # `python -m mpi4py.futures` has made workers of the other ranks already
    shared = getattr(_core, "SharedPool", None) is not None
    shutdown.process.orderly = True  # MPI has to be finalized
    with contextlib.ExitStack() as stack:
        if MPI.COMM_WORLD.Get_rank():
            stack.enter_context(shutdown.process.on_stop(_wait_for_first))
        pool = stack.enter_context(MPIPoolExecutor() if shared else MPICommExecutor(MPI.COMM_WORLD, root=0))
        _pool = pool
        try:
            yield pool is None
        finally:
            _pool = None


def _wait_for_first() -> None:
    """Let the first rank save its checkpoint: mpiexec, stopped itself, stops all ranks, and kills them when one ends."""
    time.sleep(PATIENCE)


@contextlib.contextmanager
def mpi(context: Context[T, R], workers: int, address: str = "") -> Iterator[Pool[T, R]]:
    """Use the other ranks. A lost rank ends all, as MPI has it; --resume continues."""
    if address:
        raise UsageError(f"--on mpi:{address}: mpi takes no address; its workers are the ranks of mpiexec")
    with contextlib.ExitStack() as stack:
        if _pool is None:
            stack.enter_context(session())
        pool, shipment = _pool, Shipment.of(context)
        yield Pool(lambda task: _Task(pool, shipment, task), lambda: pool.num_workers)


@dataclass(frozen=True)
class _Unknown:
    """A worker has not got the context yet."""


class _Task(Generic[T, R]):
    """A task that goes out by the context's name, and once more with the context where that is not known."""

    def __init__(self, pool: Any, shipment: Shipment, task: T) -> None:
        self._pool, self._shipment, self._task = pool, shipment, task
        self._future = pool.submit(_run, shipment.token, task)

    def result(self) -> R:
        """Wait for the result."""
        found = self._future.result()
        if isinstance(found, _Unknown):
            found = self._pool.submit(_run_shipped, self._shipment, self._task).result()
        result: R = unpacked(found)
        return result

    def cancel(self) -> None:
        """Drop it if it has not started."""
        self._future.cancel()


def _run(token: str, task: Any) -> Any:
    return run(_shipment, task, _rank()) if _shipment and _shipment.token == token else _Unknown()


def _run_shipped(shipment: Shipment, task: Any) -> Any:
    global _shipment
    _shipment = shipment
    return run(shipment, task, _rank())


def _rank() -> str:
    from mpi4py import MPI

    return f"rank {MPI.COMM_WORLD.Get_rank()} ({place()})"
