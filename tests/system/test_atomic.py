"""Atomic file writing: an output is old or new and complete; no temporary files stay; inputs are never replaced."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
from pathlib import Path

import pytest
from cli_helpers import contents, temporaries, untouched

from bncli.errors import InputError, OutputExistsError, WriteError
from bncli.system import atomic


def put(path: Path, content: bytes, **options: object) -> None:
    with atomic.replacing(str(path), **options) as temporary, open(temporary, "wb") as file:  # type: ignore[arg-type]
        file.write(content)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_file(tmp_path: Path) -> None:
    put(tmp_path / "a", b"new")
    assert contents(tmp_path) == {"a": b"new"}


def test_the_old_file_stays_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic.replacing(str(path), force=True) as temporary:
        assert os.path.dirname(temporary) == str(tmp_path)
        assert Path(temporary).read_bytes() == b""
        Path(temporary).write_bytes(b"half")
        assert path.read_bytes() == b"old"
    assert contents(tmp_path) == {"a": b"half"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_nothing_changes_after_an_error(tmp_path: Path, error: type[BaseException], old: bytes | None) -> None:
    path = tmp_path / "a"
    if old is not None:
        path.write_bytes(old)

    def fail() -> None:
        with atomic.replacing(str(path), force=True) as temporary:
            Path(temporary).write_bytes(b"half")
            raise error

    with untouched(tmp_path), pytest.raises(error):
        fail()


def test_failure_to_write_is_a_write_error(tmp_path: Path) -> None:
    with (
        untouched(tmp_path),
        pytest.raises(WriteError, match=r"/a: cannot be written: No space left on device"),
        atomic.replacing(str(tmp_path / "a")),
    ):
        raise OSError(28, os.strerror(28))


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_failure_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def broken(*args: object) -> None:
        raise OSError(5, os.strerror(5))

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, step, broken)
    with untouched(tmp_path), pytest.raises(WriteError, match="Input/output error"):
        put(tmp_path / "a", b"new", force=True)


def test_file_and_folder_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def noted_replace(old: str, new: str) -> None:
        steps.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    put(tmp_path / "a", b"new")
    assert steps == ["file", "rename", "folder"]


def test_exists(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with untouched(tmp_path), pytest.raises(OutputExistsError, match=r"/a: exists; .*--force"):
        put(tmp_path / "a", b"new")


def test_output_created_during_the_run(tmp_path: Path) -> None:
    def create_during_the_run() -> None:
        with atomic.replacing(str(tmp_path / "a")):
            (tmp_path / "a").write_bytes(b"another's")

    with pytest.raises(OutputExistsError, match=r"/a: was created by another program .* the result is in .*/a\.1"):
        create_during_the_run()
    assert contents(tmp_path) == {"a": b"another's", "a.1": b""}


def test_results_beside_outputs_created_during_the_run(tmp_path: Path) -> None:
    """Each of several outputs gets its own name or an unused one beside it; no foreign file is replaced."""

    def run() -> None:
        with atomic.Outputs() as outputs:
            for name in ("a.bn.h5", "a.bn.2.h5", "b.bn.h5"):
                Path(outputs.add(str(tmp_path / name))).write_bytes(name.encode())
            (tmp_path / "a.bn.h5").write_bytes(b"another's")
            (tmp_path / "a.bn.1.h5").symlink_to("nowhere")

    with pytest.raises(OutputExistsError, match=r"result is in .*a\.bn\.3\.h5"):
        run()
    found = contents(tmp_path)
    del found["a.bn.1.h5"]
    assert found == {"a.bn.h5": b"another's", "a.bn.2.h5": b"a.bn.2.h5", "a.bn.3.h5": b"a.bn.h5", "b.bn.h5": b"b.bn.h5"}


@pytest.mark.parametrize("how", ["same", "dots", "hard", "symbolic", "link to the input"])
def test_never_an_input(tmp_path: Path, how: str) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"data")
    out, given = tmp_path / "out", source
    if how == "same":
        out = source
    elif how == "dots":
        (tmp_path / "sub").mkdir()
        out = tmp_path / "sub" / ".." / "in"
    elif how == "hard":
        out.hardlink_to(source)
    elif how == "symbolic":
        out.symlink_to("in")
    else:
        out, given = source, tmp_path / "link"
        given.symlink_to("in")
    with untouched(tmp_path), pytest.raises(OutputExistsError, match="also an input"):
        put(out, b"new", force=True, inputs=[str(tmp_path / "none"), str(given)])


def test_symbolic_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to("real/a")
    put(link, b"new", force=True)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert temporaries(tmp_path) == []


def test_dangling_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    put(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("old", [0o600, 0o644, 0o664])
def test_mode_is_that_of_the_old_file(tmp_path: Path, old: int) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(old)
    put(tmp_path / "a", b"new", force=True)
    assert mode(tmp_path / "a") == old


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_of_a_new_file_is_the_usual_one(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        put(tmp_path / "a", b"new")
        (tmp_path / "b").write_bytes(b"plain")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o666 & ~mask


def test_outputs_that_are_not_regular_files(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="is a folder"):
        put(tmp_path, b"", force=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputExistsError, match="not a regular file"):
        put(tmp_path / "pipe", b"", force=True)
    with pytest.raises(OutputExistsError, match="not a regular file"):
        put(Path("/dev/null"), b"", force=True)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No such file or directory"):
        put(tmp_path / "no" / "a", b"")


def test_long_names_have_room_for_the_temporary_one(tmp_path: Path) -> None:
    name = "n" * 255
    put(tmp_path / name, b"new")
    assert contents(tmp_path) == {name: b"new"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    entered = False
    try:
        with pytest.raises(WriteError, match="Permission denied"), atomic.replacing(str(tmp_path / "a")):
            entered = True
    finally:
        tmp_path.chmod(0o700)
    assert not entered


def test_names_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m"
    path.write_bytes(b"old")
    with pytest.raises(OutputExistsError) as caught:
        put(path, b"new")
    assert "a\\x1b[31m: exists" in str(caught.value)


def test_write_and_read_bytes(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    atomic.write_bytes(path, b"12345")
    assert atomic.read_bytes(path, 5) == b"12345"
    with pytest.raises(OutputExistsError):
        atomic.write_bytes(path, b"")
    with pytest.raises(InputError, match="larger than 4 bytes"):
        atomic.read_bytes(path, 4)
    with pytest.raises(InputError, match="no such file"):
        atomic.read_bytes(path + "b", 4)
    with pytest.raises(InputError, match="not a regular file"):
        atomic.read_bytes(str(tmp_path), 4)


# --- temporary files left behind by killed runs


def left_behind(path: Path) -> Path:
    """The temporary file of a process that was killed in the middle of writing `path`."""
    pid = os.fork()
    if not pid:
        with atomic.replacing(str(path), force=True) as temporary:
            Path(temporary).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (found,) = set(temporaries(path.parent))
    return found


def test_the_next_run_removes_files_left_behind(tmp_path: Path) -> None:
    left = left_behind(tmp_path / "a")
    put(tmp_path / "b", b"other")
    assert left.exists()
    put(tmp_path / "a", b"new")
    assert contents(tmp_path) == {"a": b"new", "b": b"other"}


def test_files_of_a_running_process_stay(tmp_path: Path) -> None:
    with atomic.replacing(str(tmp_path / "a"), force=True) as temporary:
        Path(temporary).write_bytes(b"first")
        put(tmp_path / "a", b"second")
        assert contents(tmp_path) == {"a": b"second", os.path.basename(temporary): b"first"}
    assert contents(tmp_path) == {"a": b"first"}


@pytest.mark.parametrize(
    "name", [".a.b.bn-12345678.tmp", ".a.bn-1234567.tmp", ".a.bn-12345678.tmp.gz", "a.tmp", ".a.tmp", ".a.12345678.tmp"]
)
def test_nothing_else_is_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not of this output")
    put(tmp_path / "a", b"new")
    assert contents(tmp_path) == {"a": b"new", name: b"not of this output"}


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"data")
    (tmp_path / ".a.bn-12345678.tmp").symlink_to("precious")
    put(tmp_path / "a", b"new")
    assert (tmp_path / "precious").read_bytes() == b"data"


# --- several outputs, and reserved space


def test_outputs_are_renamed_together(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"old")
    with atomic.Outputs(force=True) as outputs:
        for name in "abc":
            Path(outputs.add(str(tmp_path / name))).write_bytes(b"new")
            assert set(contents(tmp_path)) & {"a", "c"} == set()
    assert contents(tmp_path) == dict.fromkeys("abc", b"new")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_no_output_is_renamed_before_all_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    fsync, calls = os.fsync, iter(range(1, 9))

    def broken(fd: int) -> None:
        if next(calls) == at:
            raise OSError(28, os.strerror(28))
        fsync(fd)

    def write() -> None:
        with atomic.Outputs() as outputs:
            for name in "abc":
                outputs.add(str(tmp_path / name))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(WriteError, match=f"/{'abc'[at - 1]}: cannot be written: No space left on device; free some"):
        write()
    assert contents(tmp_path) == {}


def test_more_outputs_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "MAX_LOCKED", 2)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    with atomic.Outputs() as outputs:
        for i in range(9):
            outputs.add(str(tmp_path / f"{i}"))
        if before:
            assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(contents(tmp_path)) == 9


def test_space_is_reserved_and_released(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        atomic.reserve(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 1 << 20
    atomic.fill(str(path), b"short")
    assert path.read_bytes() == b"short"


@pytest.mark.parametrize(
    ("number", "raised"), [(errno.EOPNOTSUPP, False), (errno.EINVAL, False), (28, True), (27, True)]
)
def test_file_systems_that_cannot_reserve_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    def broken(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with (
        (tmp_path / "a").open("wb") as file,
        pytest.raises(OSError, match=os.strerror(number)) if raised else contextlib.nullcontext(),
    ):
        atomic.reserve(file.fileno(), 99)


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    fsync = os.fsync

    def broken(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(WriteError) if raised else contextlib.nullcontext():
        put(tmp_path / "a", b"new")
    assert contents(tmp_path) == {"a": b"new"}
