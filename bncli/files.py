"""The one way a file comes into being: a temporary file beside it, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Sequence

from bncli.errors import InputError, OutputExistsError, WriteError, printable


@contextlib.contextmanager
def replacing(path: str, *, force: bool = False, inputs: Sequence[str] = ()) -> Iterator[str]:
    """Give the path of an empty temporary file that becomes `path` when the block ends without an error.

    The temporary file is made at once, so that a folder that cannot be written to is found out before computing.
    Until the rename `path` is what it was; after an error the temporary file is gone.

    Parameters
    ----------
    path : str
        The output. A symbolic link is kept: what it points to is replaced.
    force : bool
        Replace a file that exists.
    inputs : sequence of str
        Files that must not be the output.

    Raises
    ------
    OutputExistsError
        When the output exists (without `force`) or is one of the inputs.
    WriteError
        When the folder cannot be written to, or the file cannot be completed.
    """
    check_output(path, force=force, inputs=inputs)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{name[:80]}.", suffix=".tmp", dir=folder)
    except OSError as error:
        raise _failed(path, error) from None
    try:
        os.close(fd)
        yield temporary
        _set_mode(temporary, target)
        _sync(temporary)
        if not force:
            check_output(path, force=False, inputs=inputs)  # it may have come into being meanwhile
        os.replace(temporary, target)
        _sync(folder)
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def check_output(path: str, *, force: bool, inputs: Sequence[str] = ()) -> None:
    """Raise OutputExistsError when `path` is an input, or exists and is not to be replaced."""
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise OutputExistsError(f"{printable(path)}: is also an input ({printable(source)}); give another output")
    if os.path.isdir(path):
        raise OutputExistsError(f"{printable(path)}: is a folder; give the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputExistsError(f"{printable(path)}: exists and is not a regular file; give another output")
    if os.path.lexists(path) and os.path.exists(path) and not force:
        raise OutputExistsError(f"{printable(path)}: exists; replace it with -f/--force or give another name with -o")


def write_bytes(path: str, content: bytes, *, force: bool = False, inputs: Sequence[str] = ()) -> None:
    """Write a small file in one piece; raises as `replacing` does."""
    with replacing(path, force=force, inputs=inputs) as temporary, open(temporary, "wb") as file:
        file.write(content)


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


def _failed(path: str, error: OSError) -> WriteError:
    reason = error.strerror or str(error)
    cure = "free some space or give" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "give"
    return WriteError(f"{printable(path)}: cannot be written: {reason}; {cure} another place with -o")


def _set_mode(temporary: str, target: str) -> None:
    """Give the new file the mode of the old one, or the one that a plain `open` would (mkstemp's is 0600)."""
    try:
        mode = os.stat(target).st_mode & 0o7777
    except FileNotFoundError:
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
