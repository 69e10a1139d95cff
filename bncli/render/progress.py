"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere, nothing for what is done in a second."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bncli.engine.plan import Progress

from bncli.system import shutdown

APPEARS_AFTER = 1.0  # seconds
LINE_EVERY = 10.0  # seconds between plain lines


@contextlib.contextmanager
def progress(label: str, quiet: bool) -> Iterator[Progress]:
    """Give the function to call with (samples done, samples in all or None, bytes done, what else to say)."""
    if quiet:
        yield lambda done, total, size, note="", *, workers=0: None
    elif sys.stderr.isatty():
        with _Bar(label) as bar:
            yield bar.update
    else:
        yield _Lines(label).update


class _Clock:
    """When the work began, and how much of it had been done before."""

    def __init__(self, label: str) -> None:
        self._label, self._start, self._before = label, time.monotonic(), 0

    def _elapsed(self, done: int, size: int) -> float:
        if not size:  # a resumed run first reports where it starts
            self._before = done
        return time.monotonic() - self._start


class _Lines(_Clock):
    """Plain lines, for logs."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self._next = APPEARS_AFTER

    def update(self, done: int, total: int | None, size: int, note: str = "", /, *, workers: int = 0) -> None:
        elapsed = self._elapsed(done, size)
        if elapsed < self._next:
            return
        self._next = elapsed + LINE_EVERY
        status = _status(done, total, size, elapsed, self._before, note, workers)
        with contextlib.suppress(OSError, ValueError):  # a full log is no reason to lose the result
            print(f"bn {self._label}: {status}", file=sys.stderr, flush=True)


class _Bar(_Clock):
    """A bar that appears after a second and is gone at the end."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self._stack = contextlib.ExitStack()
        self._update: Callable[[int, int | None, str], None] | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def update(self, done: int, total: int | None, size: int, note: str = "", /, *, workers: int = 0) -> None:
        elapsed = self._elapsed(done, size)
        if elapsed < APPEARS_AFTER:
            return
        if self._update is None:
            self._update = self._appear()
        self._update(done, total, _status(done, total, size, elapsed, self._before, note, workers))

    def _appear(self) -> Callable[[int, int | None, str], None]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._stack.enter_context(
            shutdown.process.on_stop(bar.stop)
        )  # a stopped process must not leave the cursor hidden
        task = self._stack.enter_context(bar).add_task(self._label, status="", total=None)
        return lambda done, total, status: bar.update(task, completed=done, total=total, status=status)


def _status(
    done: int, total: int | None, size: int, elapsed: float, before: int = 0, note: str = "", workers: int = 0
) -> str:
    """ "12,000 of 90,000 samples, 1.2 GB/s, 8 s left, 4 workers"; and the note, if there is one."""
    parts = [note or f"{done:,}" + (f" of {total:,}" if total else "") + " samples"]
    if size and not note:
        parts.append(f"{size / elapsed / 1e9:.2f} GB/s")
    if total and done > before:
        parts.append(f"{_duration(elapsed * (total - done) / (done - before))} left")
    if workers:
        parts.append("1 worker" if workers == 1 else f"{workers:,} workers")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """3725 s as "1 h 02 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
