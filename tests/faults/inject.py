"""Breaks the k-th call of one kind that a run makes on files in its folder: with an error, or by ending the process.

Only calls below the folder count, so that k counts what bn does to files and nothing that Python or a library does.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import signal
from collections.abc import Callable
from typing import Any

KINDS = (
    "open", "close", "read", "write", "truncate", "fallocate", "fsync", "chmod", "replace", "unlink", "listdir",
    "stat", "flock", "mkdir", "rmdir",
)  # fmt: skip
ERRORS = ("ENOSPC", "EIO")
KILLS = ("before", "after")  # the call


class Injector:
    """Counts the calls of a kind and breaks the `at`-th.

    Parameters
    ----------
    folder : str
    hit : int
        A descriptor; a byte is written to it when the fault comes.
    kind : str
        One of KINDS.
    at : int
        From 1.
    how : str
        A name of errno, or "before" or "after": SIGKILL at this side of the call. "half" writes half, then ENOSPC.
    """

    def __init__(self, folder: str, hit: int, *, kind: str, at: int, how: str) -> None:
        self.folder, self.hit, self.kind, self.at, self.how = os.path.realpath(folder), hit, kind, at, how
        self.calls = 0
        self.fds: set[int] = set()
        self.write_to = os.write

    def inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return path in self.fds
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def call(self, kind: str, counted: bool, real: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Make the call, unless it is the one to break."""
        self.calls += counted and kind == self.kind
        if not counted or kind != self.kind or self.calls != self.at:
            return real()
        self.at = -1
        self.write_to(self.hit, b"x")
        if self.how in KILLS:
            try:
                if self.how == "after":
                    real()
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        if kind == "close":  # the system lets go of the descriptor also when it reports an error
            real()
        if self.how == "half" and half:
            half()
        number = getattr(errno, "ENOSPC" if self.how == "half" else self.how)
        raise OSError(number, os.strerror(number))

    def install(self) -> None:
        """Put the counters in the place of the functions of os, fcntl and builtins."""
        for kind in ("chmod", "replace", "unlink", "listdir", "stat", "mkdir", "rmdir", "fsync"):
            setattr(os, kind, self._wrapped(kind, getattr(os, kind)))
        os.posix_fallocate = self._wrapped("fallocate", os.posix_fallocate)
        fcntl.flock = self._wrapped("flock", fcntl.flock)
        os.preadv = self._wrapped("read", os.preadv)
        self._wrap_descriptors()
        self._wrap_files()

    def _wrapped(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.call(
            kind, self.inside(args[0] if args else "."), lambda: real(*args, **kwargs)
        )

    def _wrap_descriptors(self) -> None:
        real_open, real_close = os.open, os.close

        def opened(path: Any, *args: Any, **kwargs: Any) -> int:
            counted = self.inside(path)
            fd: int = self.call("open", counted, lambda: real_open(path, *args, **kwargs))
            if counted:
                self.fds.add(fd)
            return fd

        def closed(fd: int) -> None:
            counted = fd in self.fds
            self.fds.discard(fd)
            self.call("close", counted, lambda: real_close(fd))

        os.open, os.close = opened, closed  # type: ignore[assignment]

    def _wrap_files(self) -> None:
        injector, real_open = self, builtins.open

        class Faulty(io.FileIO):
            def write(self, data: Any) -> Any:
                real = super().write
                content = memoryview(data).cast("B")
                return injector.call("write", True, lambda: real(data), lambda: real(content[: len(content) // 2]))

            def readinto(self, out: Any) -> Any:
                real = super().readinto
                return injector.call("read", True, lambda: real(out))

            def truncate(self, size: Any = None) -> Any:
                real = super().truncate
                return injector.call("truncate", True, lambda: real(size))

            def close(self) -> None:
                real, counted = super().close, not self.closed
                injector.fds.discard(self.fileno() if counted else -1)
                injector.call("close", counted, real)

        def opened(path: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, int) or not self.inside(path):
                return real_open(path, mode, buffering, *args, **kwargs)
            raw: Faulty = self.call("open", True, lambda: Faulty(path, mode.replace("b", "").replace("t", "")))
            self.fds.add(raw.fileno())
            if buffering == 0:
                return raw
            writable = raw.readable() and raw.writable() and io.BufferedRandom(raw)
            buffer = writable or (io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw))
            return buffer if "b" in mode else io.TextIOWrapper(buffer, *args, **kwargs)

        builtins.open = opened
