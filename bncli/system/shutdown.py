"""SIGINT, SIGTERM and SIGHUP: a dedicated thread cleans up and ends the process, whatever the other threads are doing.

No exception is raised: one raised between any two lines can be lost in a callback, must not unwind through HDF5, and waits
for as long as the main thread is inside a library. So cleanup is registered in advance (`on_stop`), steps that must not be
interrupted hold `lock`, and once the outputs have their names the rest of the run may finish (`outputs_complete`).

Signals belong to the process, and one arrives without knowing which run it is for. So there is one `Shutdown`, `process`,
that the entry point starts and whatever writes files registers with. As a library (`bncli.fit` in a notebook) nothing
starts it: the host's own signal handling stays, and `with` blocks clean up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

GRACE = 1.0  # seconds that a run has to end by itself once its outputs have their names
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class Shutdown:
    """What happens when the process is told to stop.

    Attributes
    ----------
    lock : RLock
        Its holder is not stopped. Hold it briefly.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._cleanups: list[Callable[[], object]] = []
        self._complete = False

    def watch(self) -> None:
        """Start the thread that waits for the signals. To be called once, before any other thread is started.

        Threads inherit the mask, so the signals reach this thread alone. A signal that was ignored at the start (by
        `nohup`, or in the background of a script) stays ignored.
        """
        numbers = {n for n in _WORDS if signal.getsignal(n) is not signal.SIG_IGN}
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        threading.Thread(target=self._wait, args=(numbers,), name="bn-signals", daemon=True).start()

    @contextlib.contextmanager
    def on_stop(self, cleanup: Callable[[], object]) -> Iterator[None]:
        """Have `cleanup` called, from another thread, when the process is stopped within the block.

        The last one registered is called first. A text that it returns replaces the one printed about the outputs.
        """
        with self.lock:
            self._cleanups.append(cleanup)
        try:
            yield
        finally:
            with self.lock:
                self._cleanups.remove(cleanup)

    def outputs_complete(self) -> None:
        """The outputs have their names: from now on a stopped run has GRACE seconds to finish, and nothing is removed."""
        self._complete = True

    def block_if_stopping(self) -> None:
        """Block once shutdown has begun: an error that another thread meets now comes from files that cleanup removed."""
        with self.lock:
            pass

    def stop(self, number: int) -> NoReturn:
        """Clean up, print one line, and end the process with 128 and the signal's number."""
        with self.lock:
            complete = self._complete
        if complete:
            time.sleep(GRACE)  # the reader of a full pipe may be gone: the run cannot end by itself then
            self._end(number, "the outputs are complete")
        with self.lock:  # never released: the process ends
            message = "outputs are as they were"
            for cleanup in reversed(self._cleanups.copy()):
                with contextlib.suppress(Exception):  # one that fails does not keep the others from running
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
