"""Checkpoints: the state of a long computation, saved next to its output, so that a stopped or killed run can be resumed.

A loop uses a Checkpointer as follows and does not have to handle signals:

    with Checkpointer(output, fingerprint, resume=resume, inputs=paths) as checkpointer, atomic.replacing(output) as temporary:
        state = checkpointer.restore(State.unpack) if checkpointer.found else State.empty()
        for step in steps_after(state):
            state = state.join(step)
            checkpointer.offer(state.pack, f"the first {state.samples} of {total} samples")
        atomic.fill(temporary, state.to_bytes())
    checkpointer.remove()

`offer` costs almost nothing when no checkpoint is due. SIGINT and SIGTERM save the last offered state from another thread
(see `shutdown`), so an offered state must not change afterwards: copy arrays that the loop changes in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from bncli.errors import (
    BnError,
    BnNote,
    BnWarning,
    InputError,
    MismatchError,
    OutputExistsError,
    ResultBesideError,
    printable,
)
from bncli.numerics.arrays import Array
from bncli.stats import container
from bncli.system import atomic, shutdown
from bncli.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self

State = TypeVar("State")
Arrays = Mapping[str, Array]
Packed = tuple[Arrays, Mapping[str, container.Value]]  # a state as named arrays and plain values

SUFFIX = ".checkpoint"
FORMAT = "bncli-checkpoint"
SIGNATURE = b"\x89HDF\r\n\x1a\n\0"
FORMAT_VERSION = 2
EVERY = 10.0  # seconds between checkpoints
SHARE = 20  # writing checkpoints takes at most 1/20 of the time: slow ones are written less often
AT_STOP = 96 << 20  # largest state, in bytes, saved on a signal: the process has to end within a second
SIZE_LIMIT = 16 << 30
NAMED = 3  # differences listed in a message
OWN = ("format", "format_version", "bncli", "fingerprint", "done")
AGAIN = "or start again without --resume"


class Checkpointer:
    """Saves the state of a computation in `OUT.checkpoint`, periodically and when the process is stopped.

    If a checkpoint cannot be written, it warns once and the computation continues without.

    Parameters
    ----------
    output : str
        The file that the computation writes.
    fingerprint : name -> plain value
        What must be equal in the run that resumes: data, options, kernel, versions. The records in its list `inputs`
        (`name`, `size`, …) are compared one by one.
    resume : bool
        Resume from an existing checkpoint.
    inputs : sequence of str
        Files that must never be overwritten.

    Attributes
    ----------
    found : Packed or None
        The state to resume from.
    path : str

    Raises
    ------
    InputError
        When the checkpoint is damaged or of a newer format.
    MismatchError
        When it belongs to a run with other data, options or another kernel; the message names what differs.
    OutputExistsError
        When `OUT.checkpoint` is an input, or not a checkpoint.
    """

    def __init__(
        self, output: str, fingerprint: Mapping[str, Any], *, resume: bool, inputs: Sequence[str] = ()
    ) -> None:
        self.path = output + SUFFIX
        self._fingerprint, self._inputs = as_json(fingerprint), inputs
        self.found: Packed | None = None
        self._kept = ""  # how far the saved state of this run goes, in words
        self._offered: tuple[Callable[[], Packed], str] | None = None
        self._due, self._warned = 0.0, False
        atomic.check_output(self.path, force=True, inputs=inputs)
        there = _read(self.path)
        if there is not None and resume:
            self.found, self._kept = self._loaded(there)
        self._resume, self._there = resume, there is not None

    @property
    def plan(self) -> str:
        """What happens to an existing checkpoint, in words; "" where there is none and none was asked for."""
        where = printable(self.path)
        if self._kept:
            return f"continues from {where}, which keeps {self._kept}"
        if self._resume:
            return f"starts from the beginning: there is no {where}"
        return f"starts from the beginning and replaces {where}; --resume would continue it" * self._there

    def announce(self) -> None:
        """Warn (BnNote) what happens to an existing checkpoint."""
        if self.plan:
            warnings.warn(self.plan, BnNote, stacklevel=3)

    def restore(self, build: Callable[[Arrays, Mapping[str, Any]], State]) -> State:
        """Build a state from the one that was found.

        Raises
        ------
        InputError
            When `build` raises LookupError, TypeError or ValueError: the checkpoint is damaged.
        """
        assert self.found is not None
        try:
            return build(*self.found)
        except (LookupError, TypeError, ValueError):
            raise InputError(self._damaged()) from None

    def offer(self, pack: Callable[[], Packed], done: str) -> None:
        """Offer the current state; it is saved if a checkpoint is due.

        Parameters
        ----------
        pack : function
            Returns the state. It may be called at any time until the next offer, also from another thread.
        done : str
            How far the state goes, in words: "the first 256 of 1,000 samples".
        """
        self._offered = pack, done
        start = time.monotonic()
        if start < self._due:
            return
        try:
            self._save()
        except (BnError, OSError, MemoryError) as error:
            if not self._warned:
                warnings.warn(
                    f"{error or 'not enough memory'}; the run continues without a checkpoint", BnWarning, stacklevel=3
                )
            self._warned = True
        self._wait(time.monotonic() - start)

    def remove(self) -> None:
        """Remove the checkpoint: the output is complete, or resuming would lead to the same failure."""
        self._kept, self._offered = "", None
        try:
            os.unlink(os.path.realpath(self.path))
        except FileNotFoundError:
            pass
        except OSError as error:
            text = f"{printable(self.path)}: cannot be removed: {error.strerror}; it is no longer needed"
            warnings.warn(text, BnWarning, stacklevel=3)
        atomic.sweep(self.path)

    def __enter__(self) -> Self:
        atomic.sweep(self.path)
        self._watched = shutdown.process.on_stop(self._stopped)
        self._watched.__enter__()
        self._wait(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._watched.__exit__(None, None, None)
        if isinstance(error, ResultBesideError):
            self.remove()
        elif isinstance(error, (BnError, OSError)) and self._kept:
            warnings.warn(f"{self._hint()} after fixing the cause", BnNote, stacklevel=3)

    def _wait(self, took: float) -> None:
        self._due = time.monotonic() + max(EVERY, SHARE * took)

    def _stopped(self) -> str | None:
        """Save the last offered state, unless it is too large; return how to resume."""
        with contextlib.suppress(BnError, OSError, MemoryError):  # an earlier checkpoint is still there
            self._save(at_most=AT_STOP)
        return self._hint() if self._kept else None

    def _hint(self) -> str:
        return f"continue with --resume ({printable(self.path)} keeps {self._kept})"

    def _save(self, at_most: int | None = None) -> None:
        offered = self._offered
        if offered is None:
            return
        arrays, attributes = offered[0]()
        if at_most is not None and sum(array.nbytes for array in arrays.values()) > at_most:
            return
        own: dict[str, container.Value] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "bncli": __version__,
            "fingerprint": self._fingerprint,
            "done": offered[1],
        }
        content = container.pack(arrays, {**attributes, **own})
        with atomic.Outputs(force=True, inputs=self._inputs, final=False) as outputs:
            atomic.fill(outputs.add(self.path), content)
        self._kept = offered[1]
        if self._offered is offered:
            self._offered = None

    def _loaded(self, content: bytes) -> tuple[Packed, str]:
        """Return the state of a checkpoint of this run, and how far it goes in words."""
        where = printable(self.path)
        try:
            arrays, attributes = container.unpack(content, self.path)
        except InputError:
            raise InputError(self._damaged()) from None
        version, fingerprint = attributes.get("format_version"), attributes.get("fingerprint")
        if attributes.get("format") != FORMAT or version != FORMAT_VERSION or not isinstance(fingerprint, str):
            raise InputError(
                f"{where}: checkpoint format {version}, written by bn {printable(attributes.get('bncli', '?'))}; "
                f"this bn reads format {FORMAT_VERSION}: {AGAIN.removeprefix('or ') if _is_older(version) else f'upgrade bn, {AGAIN}'}"
            )
        try:
            found = list(differences(json.loads(fingerprint), json.loads(self._fingerprint)))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise InputError(self._damaged()) from None
        if found:
            more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise MismatchError(
                f"{where}: belongs to another run: {'; '.join(found[:NAMED])}{more}. Give the same data and options, {AGAIN}"
            )
        rest = {name: value for name, value in attributes.items() if name not in OWN}
        return (arrays, rest), printable(attributes.get("done"))

    def _damaged(self) -> str:
        return f"{printable(self.path)}: the checkpoint is damaged; remove it, {AGAIN}"


def _is_older(version: object) -> bool:
    return isinstance(version, int) and version < FORMAT_VERSION


def differences(then: Mapping[str, Any], now: Mapping[str, Any], words: str = "{} was {}, is {}") -> Iterator[str]:
    """Describe how two fingerprints differ, in words.

    >>> list(differences({"eps": 1e-5, "inputs": []}, {"eps": 1e-3, "inputs": []}))
    ['eps was 1e-05, is 0.001']
    """
    for name in {**then, **now}:
        one, other = then.get(name), now.get(name)
        if name == "inputs" and one and other and len(one) == len(other):
            for old, new in zip(one, other, strict=True):
                where = printable(new.get("name"))
                yield from (f"{text} ({where})" for text in differences(old, new, words))
        elif name == "inputs" and one != other:
            yield words.format("the number of inputs", len(one or ()), len(other or ()))
        elif name == "times_ns" and one != other:
            yield "the file was modified or replaced"
        elif json.dumps(one) != json.dumps(other):  # as text, so that NaN equals NaN
            yield words.format(name, printable(one), printable(other))


def as_json(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint as text, equal for equal ones."""
    return json.dumps(fingerprint, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """Convert a NumPy number to a Python one, for JSON."""
    return value.item()


def _read(path: str) -> bytes | None:
    """Read a checkpoint; None if there is none."""
    if not os.path.exists(path):
        return None
    content = atomic.read_bytes(path, SIZE_LIMIT)
    # a truncated HDF5 file, maybe ours: the superblock holds the end-of-file address (HDF5 specification, II.A, version 0)
    cut = content.startswith(SIGNATURE) and int.from_bytes(content[40:48], "little") > len(content)
    if content and not cut and FORMAT.encode() not in content:
        raise OutputExistsError(
            f"{printable(path)}: exists and is not a bn checkpoint; move it, or give another output with -o"
        )
    return content
