"""SIGINT, SIGTERM and SIGHUP: a dedicated thread cleans up and ends the process, whatever the other threads are doing.

Signals do not raise exceptions. An exception between any two lines can be lost in a callback, must not unwind through
HDF5, and is delayed while the main thread is inside a library. Instead, cleanup is registered in advance (`on_stop`),
steps that must not be interrupted hold `lock`, and once the outputs are renamed the run may finish (`outputs_complete`).

A signal is sent to the whole process, so there is one `Shutdown` for it, `process`. The entry point of the command line
starts it, and code that writes files registers with it. In a library call, such as `bncli.fit` in a notebook, it is not
started: the signal handling of the host stays in place, and `with` blocks clean up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

GRACE = 1.0  # seconds that a run has to finish once its outputs are renamed
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class Shutdown:
    """Cleanup and exit on a signal.

    Attributes
    ----------
    lock : RLock
        While it is held, the process is not stopped. Hold it briefly.
    orderly : bool
        Whether the process has to end as Python ends one, since a library has something to do then (MPI, multiprocessing).
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.orderly = False
        self._cleanups: list[Callable[[], object]] = []
        self._complete = False

    def watch(self) -> None:
        """Start the thread that waits for signals. Call once, before any other thread is started.

        Threads inherit the signal mask, so only this thread receives the signals. A signal that is ignored at the start
        (by `nohup`, or for background jobs of a script) stays ignored.
        """
        numbers = {n for n in _WORDS if signal.getsignal(n) is not signal.SIG_IGN}
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        threading.Thread(target=self._wait, args=(numbers,), name="bn-signals", daemon=True).start()

    @contextlib.contextmanager
    def on_stop(self, cleanup: Callable[[], object]) -> Iterator[None]:
        """Context manager: call `cleanup`, from another thread, if the process is stopped within the block.

        The last one registered is called first. If it returns a string, that is printed as the state of the outputs.
        """
        with self.lock:
            self._cleanups.append(cleanup)
        try:
            yield
        finally:
            with self.lock:
                self._cleanups.remove(cleanup)

    def outputs_complete(self) -> None:
        """Declare that the outputs are renamed: a signal now gives the run GRACE seconds to finish, and skips cleanup."""
        self._complete = True

    def block_if_stopping(self) -> None:
        """Block once shutdown has begun: errors in other threads are then caused by the removal of their files."""
        with self.lock:
            pass

    def stop(self, number: int) -> NoReturn:
        """Clean up, print one line, and end the process with exit code 128 + the signal number."""
        with self.lock:
            complete = self._complete
        if complete:
            time.sleep(GRACE)  # the run may be blocked by a full pipe that nobody reads, and then cannot finish
            self._end(number, "the outputs are complete")
        with self.lock:  # never released: the process ends
            message = "outputs are as they were"
            for cleanup in reversed(self._cleanups.copy()):
                with contextlib.suppress(Exception):  # continue with the others if one fails
                    result = cleanup()
                    message = result if isinstance(result, str) else message
            self._end(number, message)

    def _wait(self, numbers: set[signal.Signals]) -> None:
        self.stop(signal.sigwait(numbers))

    @staticmethod
    def _end(number: int, message: str) -> NoReturn:
        with contextlib.suppress(OSError):
            os.write(2, f"bn: {_WORDS[signal.Signals(number)]}; {message}\n".encode(errors="backslashreplace"))
        os._exit(128 + number)


process = Shutdown()
