"""SIGINT and SIGTERM: a thread that waits for them tidies up and ends the process, whatever the others are doing.

No exception is raised: one that comes between any two lines can be lost in a callback, must not unwind through HDF5, and
waits for as long as the main thread is inside a library. What has to be undone is said beforehand (`tidied`), what must
not be cut in two holds `held`, and once the outputs have their names the little that is left is let finish (`pass_by`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

held = threading.RLock()  # who has it is not stopped
GRACE = 1.0  # seconds that a run has to end by itself once its outputs have their names
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
_tidying: list[Callable[[], object]] = []
_too_late = False


def watch() -> None:
    """Let a thread of its own wait for the signals. Called once, before any other thread is started."""
    numbers = {n for n in _WORDS if signal.getsignal(n) is not signal.SIG_IGN}  # in the background of a script, say
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    threading.Thread(target=_wait, args=(numbers,), name="bn-signals", daemon=True).start()


@contextlib.contextmanager
def tidied(tidy: Callable[[], object]) -> Iterator[None]:
    """Have `tidy` called, from another thread, when the process is stopped within the block; a text it returns is said.

    What was entered last is called first.
    """
    with held:
        _tidying.append(tidy)
    try:
        yield
    finally:
        with held:
            _tidying.remove(tidy)


def pass_by() -> None:
    """From now on the outputs have their names: a run that is stopped may do the little that is left, for GRACE seconds."""
    global _too_late
    _too_late = True


def hold_back() -> None:
    """Wait for ever when the process is being stopped: what another thread has to say now is about files taken away."""
    with held:
        pass


def _wait(numbers: set[signal.Signals]) -> None:
    while True:
        _stop(signal.sigwait(numbers))


def _stop(number: int) -> None:
    """Tidy up, say so, and end the process with 128 and the signal's number."""
    with held:
        complete = _too_late
    if complete:
        time.sleep(GRACE)  # who reads what is printed may have stopped reading
        _end(number, "the outputs are complete")
    with held:
        said = "outputs are as they were"
        for tidy in reversed(_tidying.copy()):
            with contextlib.suppress(Exception):  # the others still have their turn
                told = tidy()
                said = told if isinstance(told, str) else said
        _end(number, said)


def _end(number: int, said: str) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"bn: {_WORDS[signal.Signals(number)]}; {said}\n".encode(errors="backslashreplace"))
    os._exit(128 + number)
