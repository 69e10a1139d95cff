"""What runs in another process: a worker is checked, opens the context that was sent to it, and computes tasks.

Errors of bn travel as values: whoever carries them, nothing takes them for a lost worker and tries again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bncli.engine.executors import Context, PerThread
from bncli.errors import BnError, ChangedError, MismatchError, printable
from bncli.numerics import compiled
from bncli.version import __version__


def versions() -> dict[str, str]:
    """What has to be the same in every worker, since the numbers depend on it."""
    return {"bn": __version__, "numpy": np.__version__, "kernel": compiled.NAME, "byte order": sys.byteorder}


@dataclass(frozen=True)
class Shipment:
    """A context on its way to workers.

    Attributes
    ----------
    token : str
        Names it.
    versions : dict
        Of the process that sent it.
    content : bytes
        The context, pickled: it is looked into when the versions are known to be the same.
    """

    token: str
    versions: dict[str, str]
    content: bytes

    @classmethod
    def of(cls, context: Context[Any, Any]) -> Shipment:
        """Pack a context."""
        return cls(uuid.uuid4().hex, versions(), pickle.dumps(context))


@dataclass(frozen=True)
class Failed:
    """An error of bn, as a value."""

    error: BnError


class DroppedError(Exception):
    """Nobody waits for the result of this task any more."""


class _Opened:
    """A context that this worker has opened, and how many of its threads compute with it now."""

    def __init__(self, shipment: Shipment) -> None:
        self.function: PerThread[Any, Any] = PerThread(pickle.loads(shipment.content))
        self.users, self._dropped = 0, False

    def drop(self) -> None:
        """Close its files as soon as no thread computes: a kernel reads by descriptor, which may be another file's then."""
        self._dropped = True
        self.close_if_idle()

    def close_if_idle(self) -> None:
        """Close the files of a context that was dropped, when its last thread is done."""
        if self._dropped and not self.users:
            with contextlib.suppress(Exception):
                self.function.close()


MOST_OPEN = 4  # contexts that a worker keeps open: several runs may share it

_lock = threading.RLock()  # a shipment may be collected at any time
_contexts: dict[str, _Opened] = {}  # by the shipment's token, the oldest first
_wanted = threading.local()


def run(shipment: Shipment, task: Any, where: str, wanted: Callable[[], bool] = lambda: True) -> Any:
    """Compute a task with the context of a shipment; return the result, or `Failed`.

    Parameters
    ----------
    shipment : Shipment
    task : whatever the context takes
    where : str
        The name of this worker, for messages.
    wanted : function
        Whether somebody still waits for the result.
    """
    _wanted.function = wanted
    try:
        with _in_use(shipment, where) as function:
            return function(task)
    except ChangedError as error:
        return Failed(MismatchError(f"the worker {where} sees another file: {error}"))
    except BnError as error:
        return Failed(error)
    finally:
        del _wanted.function


def check_wanted() -> None:
    """Raise DroppedError where nobody waits for the task that this thread computes; long tasks call it now and then."""
    if not getattr(_wanted, "function", lambda: True)():
        raise DroppedError


def forget(token: str) -> None:
    """Close the files of a context that is not needed any more."""
    with _lock:
        if token in _contexts:
            _contexts.pop(token).drop()


@contextlib.contextmanager
def _in_use(shipment: Shipment, where: str) -> Iterator[PerThread[Any, Any]]:
    """The function of a context, opened where it is new here; its files stay open within the block."""
    with _lock:
        opened = _contexts.get(shipment.token) or _opened(shipment, where)
        opened.users += 1
    try:
        yield opened.function
    finally:
        with _lock:
            opened.users -= 1
            opened.close_if_idle()


def _opened(shipment: Shipment, where: str) -> _Opened:
    here = versions()
    for name, there in shipment.versions.items():
        if here[name] != there:
            raise MismatchError(
                f"the worker {where} has {name} {here[name]}, this process {there}: the numbers would differ; use the "
                "same on all machines"
            )
    if len(_contexts) >= MOST_OPEN:
        forget(next(iter(_contexts)))
    _contexts[shipment.token] = opened = _Opened(shipment)
    weakref.finalize(shipment, forget, shipment.token)  # when the process that sent it lets go of it
    return opened


def unpacked(value: Any) -> Any:
    """What a worker returned; raises the error that it packed, with paths as they are from this folder."""
    if isinstance(value, Failed):
        folder = printable(os.path.join(os.getcwd(), ""))
        raise type(value.error)(str(value.error).replace(folder, ""))
    return value


def place() -> str:
    """Machine and process, in words, for messages."""
    import platform

    return f"{printable(platform.node())}, process {os.getpid()}"
