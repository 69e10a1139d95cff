"""Atomic file writing: a temporary file in the same folder, fsync, rename, fsync of the folder."""

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
FLUSH_BYTES = 32 << 20  # new bytes after which the system is asked to write them to disk
MAX_LOCKED = 256  # maximum number of locked temporary files per run; every lock is an open file
_umask = threading.Lock()  # the umask can only be read by setting it; a second thread could read and then keep the 0


class Outputs:
    """Outputs that are replaced together: each is written to a temporary file, and all are renamed at the end.

    Temporary files are created immediately, so that a folder without write permission is detected before computing.
    Outputs are unchanged until they are renamed. After an error, or when the process is stopped, the temporary files are
    removed. A killed process leaves them behind; the next run that writes the same output removes them. If another
    program creates an output during the run, it is not replaced without `force`: the result gets another name in the same folder.

    Parameters
    ----------
    force : bool
        Replace existing files.
    inputs : sequence of str
        Files that must not be outputs.
    final : bool
        These files complete the run: once they are renamed, a signal lets the run finish.
    """

    def __init__(self, *, force: bool = False, inputs: Sequence[str] = (), final: bool = True) -> None:
        self._force, self._inputs, self._final = force, inputs, final
        self._pending: list[_Pending] = []
        self._swept: dict[str, list[str]] = {}  # folder -> its entries
        self._watched = shutdown.process.on_stop(self._tidy)

    def add(self, path: str) -> str:
        """Create an empty temporary file that will become `path`; return its path. A symbolic link is kept, its target replaced.

        Raises
        ------
        OutputExistsError
            When the output exists (without `force`) or is one of the inputs. When the block ends, as ResultBesideError,
            when another program created the output during the run.
        WriteError
            When the temporary file cannot be created.
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
            raise failed(path, error) from None
        if len(self._pending) > MAX_LOCKED:
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
                raise failed(self._pending[-1].path, error) from error
        finally:
            self._tidy()
            self._watched.__exit__(None, None, None)

    def _complete(self) -> None:
        """Sync all files, rename all of them, then sync the folders."""
        taken: list[str] = []
        for new in self._pending:
            with _write_errors(new.path):
                _set_mode(new.temporary, new.target)
                _sync(new.temporary)
                if not self._force and os.path.lexists(new.target):  # created during the run
                    new.target = _free_name(new.target, {other.target for other in self._pending})
                    taken.append(
                        f"{printable(new.path)}: was created by another program during the run and was not replaced; "
                        f"the result is in {printable(_beside(new))}"
                    )
        with shutdown.process.lock:
            for count, new in enumerate(self._pending):
                with _write_errors(new.path, f" ({count} outputs before it were written)" * bool(count)):
                    os.replace(new.temporary, new.target)
                if self._final:
                    shutdown.process.outputs_complete()
        for folder, path in {os.path.dirname(new.target): new.path for new in self._pending}.items():
            try:
                _sync_folder(folder)
            except OSError as error:
                reason = error.strerror or error
                raise WriteError(
                    f"{printable(path)}: is written, but may be lost in a power failure: {reason}"
                ) from error
        if taken:
            more = f" (and {len(taken) - 1} more outputs)" if len(taken) > 1 else ""
            raise ResultBesideError(taken[0] + more)

    def _tidy(self) -> None:
        """Remove the temporary files that were not renamed."""
        for new in self._pending:
            with contextlib.suppress(OSError):
                os.unlink(new.temporary)
            new.unlock()


@dataclass
class _Pending:
    """A pending output: the path as typed, the path to rename to, the temporary file, and the descriptor that locks it."""

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
    """Context manager that returns the path of a temporary file, renamed to `path` if the block succeeds; see `Outputs`."""
    with Outputs(force=force, inputs=inputs) as outputs:
        yield outputs.add(path)


def sweep(path: str) -> None:
    """Remove temporary files of this output that killed runs left behind. Those of running processes are locked and stay."""
    folder, name = os.path.split(os.path.realpath(path))
    _sweep(folder, name, _listed(folder))


def _listed(folder: str) -> list[str]:
    """The entries of a folder; none if it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _sweep(folder: str, name: str, listed: Sequence[str]) -> None:
    left = re.compile(re.escape(_prefix(name)) + r"[a-z0-9_]{8}" + re.escape(SUFFIX))  # as mkstemp names them
    for found in filter(left.fullmatch, listed):
        with contextlib.suppress(OSError):  # in use, already removed, or on a file system without locks
            fd = os.open(os.path.join(folder, found), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(os.path.join(folder, found))
            finally:
                os.close(fd)


def _temporary(folder: str, name: str) -> tuple[int, str]:
    """Create a temporary file; return its locked descriptor and its path."""
    while True:
        fd, path = tempfile.mkstemp(prefix=_prefix(name), suffix=SUFFIX, dir=folder)
        with contextlib.suppress(OSError):  # a file system without locks: then no other run can remove the file either
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else another run removed the new file as left behind before it was locked
            return fd, path
        os.close(fd)


def _prefix(name: str) -> str:
    return f".{name[:80]}.bn-"


def _free_name(target: str, reserved: set[str]) -> str:
    """An unused path next to `target` that no other output uses: train.bn.1.h5 for train.bn.h5."""
    stem, suffix = os.path.splitext(target)
    names = (f"{stem}.{i}{suffix}" for i in itertools.count(1))
    return next(name for name in names if name not in reserved and not os.path.lexists(name))


def _beside(new: _Pending) -> str:
    """The path of an output that got another name, based on the path that the user typed if possible."""
    name = os.path.basename(new.target)
    return new.target if os.path.islink(new.path) else os.path.join(os.path.dirname(new.path), name)


def reserve(fd: int, size: int) -> None:
    """Reserve disk space for `size` bytes, so that a full disk is detected before computing. Not all file systems can.

    Raises
    ------
    OSError
        When there is not enough space.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


class Ahead:
    """Asks the system to write a growing file to disk early, so that the final sync takes less time."""

    def __init__(self) -> None:
        self._flushed = 0

    def grown(self, fd: int, size: int) -> None:
        """Report the size of the file; after FLUSH_BYTES new bytes the system is asked to write them."""
        if size - self._flushed < FLUSH_BYTES or not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):  # only a hint; the sync reports write errors
            os.posix_fadvise(fd, self._flushed, size - self._flushed, os.POSIX_FADV_DONTNEED)
        self._flushed = size


def fill(temporary: str, content: bytes) -> None:
    """Write the content of a file into its reserved space, and release the rest."""
    with open(temporary, "r+b", buffering=0) as file:
        rest = memoryview(content)
        while len(rest):
            rest = rest[file.write(rest) :]
        file.truncate(len(content))


def check_output(path: str, *, force: bool, inputs: Sequence[str] = ()) -> None:
    """Check that an output may be written.

    Raises
    ------
    OutputExistsError
        When `path` is an input or not a regular file, or exists and `force` is not given.
    WriteError, InputError
        When the output, or an input to compare it with, cannot be examined.
    """
    try:
        found = _stat(path)
    except OSError as error:
        raise failed(path, error) from None
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
    """Status of a path; None if it does not exist."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is(found: os.stat_result, source: str) -> bool:
    """Whether an input is this file. An unreadable input raises InputError: it might be the same file."""
    try:
        other = _stat(source)
    except OSError as error:
        raise InputError(f"{printable(source)}: cannot be read: {error.strerror}") from None
    return other is not None and os.path.samestat(found, other)


def write_bytes(path: str, content: bytes, *, force: bool = False, inputs: Sequence[str] = ()) -> None:
    """Write a small file atomically; raises as `Outputs`."""
    with replacing(path, force=force, inputs=inputs) as temporary:
        fill(temporary, content)


def read_bytes(path: str, limit: int) -> bytes:
    """Read all bytes of a small file.

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
            content = file.read(min(size, limit) + 1)  # read allocates as many bytes as requested
    except FileNotFoundError:
        raise InputError(f"{printable(path)}: no such file") from None
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise InputError(f"{printable(path)}: larger than {limit} bytes; not a file of the expected kind")
    return content


@contextlib.contextmanager
def _write_errors(path: str, more: str = "") -> Iterator[None]:
    """Turn an OSError into a WriteError that names the output."""
    try:
        yield
    except OSError as error:
        raise failed(path, error, more) from error


def failed(path: str, error: OSError, more: str = "") -> WriteError:
    """The error for an output that cannot be written."""
    reason = (error.strerror or str(error)) + more
    hint = "free some space or give" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "give"
    return WriteError(f"{printable(path)}: cannot be written: {reason}; {hint} another place with -o")


def _set_mode(temporary: str, target: str) -> None:
    """Set the mode of the existing file, or the mode that `open` would use; mkstemp creates files with mode 0600."""
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
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
