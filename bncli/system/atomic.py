"""The one way a file comes into being: a temporary file beside it, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bncli.errors import InputError, OutputExistsError, ResultBesideError, WriteError, printable
from bncli.system import shutdown

SUFFIX = ".tmp"
BEGUN_BYTES = 32 << 20  # that the system is asked to write to disk at a time
MOST_LOCKED = 256  # of the outputs of one run; every lock is an open file
_umask = threading.Lock()  # it can only be read by setting it, and two threads would keep each other's 0


class Outputs:
    """Files that come into being together: each is written beside its place, and all get their names at the end.

    A temporary file is made at once, so that a folder that cannot be written to is found out before computing. Until
    the renaming every output is what it was; after an error, or when the process is stopped, the temporary files are
    gone. A killed process leaves them; the next that writes the same output removes them. Where a file that was not
    there at the start has taken an output's name by the end, and `force` is not given, that output gets a name beside it.

    Parameters
    ----------
    force : bool
        Replace files that exist.
    inputs : sequence of str
        Files that must not be an output.
    final : bool
        The run ends with these files: once they have their names it is not stopped any more.
    """

    def __init__(self, *, force: bool = False, inputs: Sequence[str] = (), final: bool = True) -> None:
        self._force, self._inputs, self._final = force, inputs, final
        self._pending: list[_Pending] = []
        self._swept: dict[str, list[str]] = {}  # folder -> what was in it
        self._watched = shutdown.process.on_stop(self._tidy)

    def add(self, path: str) -> str:
        """Return the path of an empty temporary file that becomes `path`. A symbolic link is kept: its target is replaced.

        Raises
        ------
        OutputExistsError
            When the output exists (without `force`) or is one of the inputs. At the end, as ResultBesideError, when it
            came into being during the run.
        WriteError
            When the folder cannot be written to.
        """
        check_output(path, force=self._force, inputs=self._inputs)
        target = os.path.realpath(path)
        folder, name = os.path.split(target)
        if folder not in self._swept:
            self._swept[folder] = _listed(folder)
        _sweep(folder, name, self._swept[folder])
        try:
            with shutdown.process.lock:
                fd, temporary = _temporary(folder, name)
                self._pending.append(_Pending(path, target, temporary, fd))
        except OSError as error:
            raise _failed(path, error) from None
        if len(self._pending) > MOST_LOCKED:
            self._pending[-1].unlock()
        return temporary

    def __enter__(self) -> Outputs:
        self._watched.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._complete()
            elif isinstance(error, OSError) and self._pending:
                raise _failed(self._pending[-1].path, error) from error
        finally:
            self._tidy()
            self._watched.__exit__(None, None, None)

    def _complete(self) -> None:
        """Bring all to the disk, then rename all, then bring the names to the disk."""
        taken: list[str] = []
        for new in self._pending:
            with _telling(new.path):
                _set_mode(new.temporary, new.target)
                _sync(new.temporary)
                if not self._force and os.path.lexists(new.target):  # it came into being meanwhile
                    new.target = _free_name(new.target, {other.target for other in self._pending})
                    taken.append(
                        f"{printable(new.path)}: was made by another program during the run and was not replaced; "
                        f"the result is in {printable(_beside(new))}"
                    )
        with shutdown.process.lock:
            for place, new in enumerate(self._pending):
                with _telling(new.path, f" ({place} outputs before it are written)" * bool(place)):
                    os.replace(new.temporary, new.target)
                if self._final:
                    shutdown.process.outputs_complete()
        for folder, path in {os.path.dirname(new.target): new.path for new in self._pending}.items():
            try:
                _sync_folder(folder)
            except OSError as error:
                reason = error.strerror or error
                raise WriteError(f"{printable(path)}: is written, but may not outlast a power cut: {reason}") from error
        if taken:
            more = f" (and {len(taken) - 1} more outputs likewise)" if len(taken) > 1 else ""
            raise ResultBesideError(taken[0] + more)

    def _tidy(self) -> None:
        """Remove the temporary files that have not become outputs."""
        for new in self._pending:
            with contextlib.suppress(OSError):
                os.unlink(new.temporary)
            new.unlock()


@dataclass
class _Pending:
    """An output to be: as typed, where it goes, its temporary file, and the descriptor that holds the lock on that."""

    path: str
    target: str
    temporary: str
    fd: int

    def unlock(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def replacing(path: str, *, force: bool = False, inputs: Sequence[str] = ()) -> Iterator[str]:
    """Give the path of an empty temporary file that becomes `path` when the block ends without an error; see `Outputs`."""
    with Outputs(force=force, inputs=inputs) as outputs:
        yield outputs.add(path)


def sweep(path: str) -> None:
    """Remove the temporary files that killed runs left of this output; a live run's are locked, and stay."""
    folder, name = os.path.split(os.path.realpath(path))
    _sweep(folder, name, _listed(folder))


def _listed(folder: str) -> list[str]:
    """What is in a folder; nothing where it may not be looked into."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _sweep(folder: str, name: str, listed: Sequence[str]) -> None:
    left = re.compile(re.escape(_prefix(name)) + r"[a-z0-9_]{8}" + re.escape(SUFFIX))  # as mkstemp names them
    for found in filter(left.fullmatch, listed):
        with contextlib.suppress(OSError):  # live, gone meanwhile, or of a file system without locks
            fd = os.open(os.path.join(folder, found), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(os.path.join(folder, found))
            finally:
                os.close(fd)


def _temporary(folder: str, name: str) -> tuple[int, str]:
    """A new temporary file and its locked descriptor."""
    while True:
        fd, path = tempfile.mkstemp(prefix=_prefix(name), suffix=SUFFIX, dir=folder)
        with contextlib.suppress(OSError):  # a file system without locks: nobody can sweep there either
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else another run took it, just made, for one that was left
            return fd, path
        os.close(fd)


def _prefix(name: str) -> str:
    return f".{name[:80]}.bn-"


def _free_name(target: str, spoken_for: set[str]) -> str:
    """A name beside `target` that no file has, and no other output gets: train.bn.1.h5 for train.bn.h5."""
    stem, suffix = os.path.splitext(target)
    names = (f"{stem}.{i}{suffix}" for i in itertools.count(1))
    return next(name for name in names if name not in spoken_for and not os.path.lexists(name))


def _beside(new: _Pending) -> str:
    """Where an output went that got another name, in the user's words where they lead there."""
    name = os.path.basename(new.target)
    return new.target if os.path.islink(new.path) else os.path.join(os.path.dirname(new.path), name)


def reserve(fd: int, size: int) -> None:
    """Set space aside for `size` bytes, so that a full disk is found out before computing; not all file systems can."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


class Ahead:
    """Has the system write a growing file to disk while it grows, so that there is less to wait for at the end."""

    def __init__(self) -> None:
        self._begun = 0

    def grown(self, fd: int, size: int) -> None:
        """Take note of the file's size; what was added is begun to be written when it is enough."""
        if size - self._begun < BEGUN_BYTES or not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):  # a hint; what fails to be written is told by the sync
            os.posix_fadvise(fd, self._begun, size - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = size


def fill(temporary: str, content: bytes) -> None:
    """Write the whole of a file, into the space that was set aside for it."""
    with open(temporary, "r+b", buffering=0) as file:
        rest = memoryview(content)
        while len(rest):
            rest = rest[file.write(rest) :]
        file.truncate(len(content))


def check_output(path: str, *, force: bool, inputs: Sequence[str] = ()) -> None:
    """Raise OutputExistsError when `path` is an input, or exists and is not to be replaced; WriteError when it cannot be known."""
    try:
        found = _stat(path)
    except OSError as error:
        raise _failed(path, error) from None
    if found is None:
        return
    for source in inputs:
        if _is(found, source):
            raise OutputExistsError(f"{printable(path)}: is also an input ({printable(source)}); give another output")
    if stat.S_ISDIR(found.st_mode):
        raise OutputExistsError(f"{printable(path)}: is a folder; give the name of a file")
    if not stat.S_ISREG(found.st_mode):
        raise OutputExistsError(f"{printable(path)}: exists and is not a regular file; give another output")
    if not force:
        raise OutputExistsError(f"{printable(path)}: exists; replace it with -f/--force or give another name with -o")


def _stat(path: str) -> os.stat_result | None:
    """What a path names; None where there is nothing."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is(found: os.stat_result, source: str) -> bool:
    """Whether an input is this file; not to know must not pass for no."""
    try:
        other = _stat(source)
    except OSError as error:
        raise InputError(f"{printable(source)}: cannot be read: {error.strerror}") from None
    return other is not None and os.path.samestat(found, other)


def write_bytes(path: str, content: bytes, *, force: bool = False, inputs: Sequence[str] = ()) -> None:
    """Write a small file in one piece; raises as `Outputs` does."""
    with replacing(path, force=force, inputs=inputs) as temporary:
        fill(temporary, content)


def read_bytes(path: str, limit: int) -> bytes:
    """Read a small file whole.

    Raises
    ------
    InputError
        When it is missing, unreadable, not a regular file, or larger than `limit` bytes.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{printable(path)}: is not a regular file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, limit) + 1)  # read makes a buffer of the size that it is asked for
    except FileNotFoundError:
        raise InputError(f"{printable(path)}: no such file") from None
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise InputError(f"{printable(path)}: larger than {limit} bytes; this is not a file of the expected kind")
    return content


@contextlib.contextmanager
def _telling(path: str, more: str = "") -> Iterator[None]:
    """Make a WriteError of what fails while a file is completed."""
    try:
        yield
    except OSError as error:
        raise _failed(path, error, more) from error


def _failed(path: str, error: OSError, more: str = "") -> WriteError:
    reason = (error.strerror or str(error)) + more
    cure = "free some space or give" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "give"
    return WriteError(f"{printable(path)}: cannot be written: {reason}; {cure} another place with -o")


def _set_mode(temporary: str, target: str) -> None:
    """Give the new file the mode of the old one, or the one that a plain `open` would (mkstemp's is 0600)."""
    try:
        mode = os.stat(target).st_mode & 0o7777
    except FileNotFoundError:
        with _umask:
            mask = os.umask(0)
            os.umask(mask)
        mode = 0o666 & ~mask
    os.chmod(temporary, mode)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(path: str) -> None:
    try:
        _sync(path)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
