"""What runs at the other end of an executor: contexts are open as long as a thread computes with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bncli.engine.executors import worker
from bncli.engine.executors.worker import MOST_OPEN, Shipment, forget, run

OPEN: set[str] = set()
STARTED, GO_ON = threading.Event(), threading.Event()


@dataclass(frozen=True)
class Named:
    """A context that says whether it is open."""

    name: str

    def absolute(self) -> Named:
        return self

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[bool], bool]]:
        OPEN.add(self.name)

        def compute(wait: bool) -> bool:
            if wait:
                STARTED.set()
                assert GO_ON.wait(20)
            return self.name in OPEN

        yield compute
        OPEN.discard(self.name)


def test_a_context_is_closed_when_its_last_thread_is_done() -> None:
    worker._contexts.clear()
    first, found = Shipment.of(Named("first")), []
    thread = threading.Thread(target=lambda: found.append(run(first, True, "here")))
    thread.start()
    assert STARTED.wait(20)
    others = [Shipment.of(Named(f"other {i}")) for i in range(MOST_OPEN + 1)]
    assert all(run(other, False, "here") for other in others)
    assert first.token not in worker._contexts
    assert "first" in OPEN
    GO_ON.set()
    thread.join(20)
    assert found == [True]
    assert {f"other {i}" for i in range(1, MOST_OPEN + 1)} == OPEN
    assert run(first, False, "here")  # opened again
    forget(first.token)
    assert "first" not in OPEN
    token = others[-1].token
    others.clear()  # as on a worker whose client let go of it
    assert token not in worker._contexts
    assert not OPEN
