"""Every kind of bad input, on the command line: exit code, message, nothing written, nothing else read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bad_files
import h5py
import numpy as np
import pytest
from bad_files import HDF5, NPY, X
from cli_helpers import BN, bn, check_refused, good, save, save_h5, table, untouched

from bncli.engine import accumulate
from bncli.formats.hdf5 import file as hdf5_file
from bncli.formats.hdf5.virtual import Picked

COMMANDS: list[list[str]] = [["fit", "{}"], ["apply", "good.bn.h5", "{}", "-o", "y.npy"]]
opened: list[str] | None = None  # what this process opens, while a test listens


def listen(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None:
        opened.append(os.path.basename(os.fsdecode(args[0])) if isinstance(args[0], (str, bytes)) else "")


sys.addaudithook(listen)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with good stats, in which whatever a bad file may point to is a FIFO: to open one is to hang."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    good("fit", save(folder / "good.npy", table(20, 4)))
    for outside in ("outside.h5", "../outside.h5"):
        os.mkfifo(outside)
    return folder


@contextlib.contextmanager
def nothing_else_read(name: str) -> Iterator[None]:
    """Check that no file but this one (and the good stats) is opened, by Python or, which would hang, by HDF5."""
    global opened
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hung: another file was opened"))
    signal.alarm(30)
    opened = []
    try:
        yield
        stray = {file for file in opened if file.startswith("outside")}
        assert name in opened
        assert stray == set()
    finally:
        opened = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_bad(address: str, words: list[str], commands: list[list[str]] = COMMANDS) -> None:
    """Both commands refuse it, naming the file (and the dataset), in one or two lines; `ls` never fails over it."""
    path = address.partition("::")[0]
    with untouched(Path()), nothing_else_read(path):
        for command in commands:
            check_refused(3, [a.replace("{}", address) for a in command], address, *words)
        listed = bn("ls", path)
        assert listed.code in (0, 3)
        assert listed.code or "::" not in address or f"{path}::" in listed.out or listed.out.count("\n") == 1


@pytest.mark.parametrize("case", NPY)
def test_npy(here: Path, case: str) -> None:
    content, words = NPY[case]
    (here / "x.npy").write_bytes(content)
    check_bad("x.npy", words)


@pytest.mark.parametrize("case", HDF5)
def test_hdf5(here: Path, case: str) -> None:
    build, words = HDF5[case]
    with h5py.File("x.h5", "w") as file:
        build(file)
    check_bad("x.h5::/x", words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("up", "link to another file"),
        ("out/x", "out is a link to another file"),
        ("soft", "out is a link to another file"),
        ("dangling", "leads nowhere"),
        ("circle", "in a circle"),
        ("a", "in a circle"),
    ],
)
def test_links(here: Path, name: str, words: str) -> None:
    """A link may be in the middle of a path, and behind another."""
    with h5py.File("x.h5", "w") as file:
        bad_files.links(file)
    with untouched(here), nothing_else_read("x.h5"):
        for command in COMMANDS:
            check_refused(3, [a.replace("{}", f"x.h5::/{name}") for a in command], f"x.h5::/{name}", words)
        assert good("ls", "x.h5").out.count("x.h5::/") == 1  # what soft and external links lead to is not listed


@pytest.mark.parametrize(
    "options", [{"compression": "gzip"}, {"fletcher32": True}, {"compression": "lzf", "fletcher32": True}]
)
def test_a_flipped_bit_under_a_checksum(here: Path, options: dict[str, Any]) -> None:
    path = save_h5(here / "x.h5", X, chunks=(8, 4), **options)
    with h5py.File(path) as file:
        info = file["x"].id.get_chunk_info_by_coord((8, 0))
    bad_files.flipped(path, info.byte_offset + info.size // 2)
    check_bad("x.h5::/x", ["chunk at (8, 0)", "write or copy the file again"])


@pytest.mark.parametrize("content", [b"", b"hello" * 1000, b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + b"\xff" * 3000])
@pytest.mark.parametrize("address", ["x.h5", "x.h5::/x"])
def test_not_hdf5(here: Path, content: bytes, address: str) -> None:
    (here / "x.h5").write_bytes(content)
    with untouched(here):
        check_refused(3, ["fit", address], "x.h5: ", lines=1)
        check_refused(3, ["ls", "x.h5"], "x.h5: ", lines=1)


@pytest.mark.parametrize("name", ["x.npy", "x.h5"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing", "circle"])
def test_no_regular_file(here: Path, name: str, kind: str) -> None:
    {
        "pipe": lambda: os.mkfifo(name),
        "folder": lambda: os.mkdir(name),
        "device": lambda: os.symlink("/dev/zero", name),
        "nothing": lambda: None,
        "circle": lambda: os.symlink(name, name),
    }[kind]()
    words = {
        "pipe": "not a regular file",
        "folder": "is a folder",
        "device": "not a regular file",
        "nothing": "no such file",
    }
    with nothing_else_read(name):
        for command in COMMANDS:
            check_refused(3, [a.replace("{}", name) for a in command], f"{name}: ", words.get(kind, "cannot be read"))


def test_cut_before_opening(here: Path) -> None:
    whole = save_h5(here / "x.h5", X).read_bytes()
    (here / "x.h5").write_bytes(whole[:-100])
    with untouched(here):
        for command in COMMANDS:
            args = [a.replace("{}", "x.h5::/x") for a in command]
            check_refused(3, args, "x.h5: is cut short", len(whole) - 100, len(whole))


def test_open_for_writing_elsewhere(here: Path) -> None:
    script = "import h5py, sys; f = h5py.File('x.h5', 'w'); f['x'] = [[1.0], [2.0]]; f.flush(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        check_refused(3, ["fit", "x.h5"], "x.h5: is open for writing elsewhere")
        writer.communicate()
    good("fit", "x.h5")


@pytest.mark.parametrize(("number", "refused"), [(5, True), (37, True), (38, False), (95, False)])
def test_locks_that_fail(here: Path, monkeypatch: pytest.MonkeyPatch, number: int, refused: bool) -> None:
    """EIO and ENOLCK are refused with a cure; a file system without locks (ENOSYS, EOPNOTSUPP) is not."""
    save_h5(here / "x.h5", X)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(hdf5_file.fcntl, "flock", fail)
    if not refused:
        good("fit", "x.h5", "-f")
        return
    check_refused(3, ["fit", "x.h5"], "x.h5: cannot be locked", "HDF5_USE_FILE_LOCKING=FALSE")
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")
    good("fit", "x.h5", "-f")


@pytest.mark.parametrize("name", ["x.npy", "x.h5", "z.h5"])
def test_disk_that_fails_to_read(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """EIO at every read, one after the other: an I/O error each time, never 'no such dataset'."""
    save(here / "x.npy", X)
    save_h5(here / "x.h5", X)
    save_h5(here / "z.h5", X, chunks=(8, 4), compression="szip")
    address, read = name if name.endswith("npy") else f"{name}::/x", os.preadv
    for failing in range(1000):
        calls = iter(range(1000))

        def preadv(
            fd: int, buffers: list[Any], offset: int, calls: Iterator[int] = calls, failing: int = failing
        ) -> int:
            if next(calls) == failing:
                raise OSError(5, "Input/output error")
            return read(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setenv("BN_KERNEL", "numpy")
        result = bn("fit", address, "-f", "-j", 1)
        if result.code == 0:
            break
        assert result.code == 3, (failing, result)
        assert "Input/output error" in result.err, (failing, result)
        assert name in result.err
        assert "has no dataset" not in result.err
    assert failing > 2


LIBRARY = """
import os, bncli
from bncli.errors import InputError
read, failing = os.preadv, 0
while True:
    calls = iter(range(1000))
    def preadv(fd, buffers, offset):
        if next(calls) == failing:
            raise OSError(5, "Input/output error")
        return read(fd, buffers, offset)
    os.preadv = preadv
    try:
        bncli.fit("x.h5::/x")
        break
    except InputError as error:
        assert "Input/output error" in str(error), error
        failing += 1
os.preadv = read
print(failing)
"""


def test_a_program_that_met_a_failing_disk_ends_well(here: Path) -> None:
    """HDF5 calls back into Python when it is unloaded, unless it let go of the file; then the process crashed at exit."""
    save_h5(here / "x.h5", X)
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 5


SWMR = """
import sys, h5py, numpy as np
file = h5py.File("w.h5", "w", libver="latest", userblock_size=int(sys.argv[1]))
x = file.create_dataset("x", (0, 4), "f8", maxshape=(None, 4), chunks=(8, 4))
file["other"] = np.ones((3, 3))
file.swmr_mode = True
for rows in range(8, 808, 8):
    x.resize((rows, 4))
    x[-8:] = np.random.default_rng(rows).normal(size=(8, 4))
    x.flush()
print("on", flush=True)
sys.stdin.read()
x.resize((900, 4))
x[808:] = 1
file.close()
"""


@pytest.mark.parametrize("userblock", ["0", "2048"])
def test_a_file_that_is_being_written_for_readers(here: Path, monkeypatch: pytest.MonkeyPatch, userblock: str) -> None:
    """SWMR: its writer holds no lock, so that others may read; what is in the file is in part not written yet."""
    writer = subprocess.Popen([sys.executable, "-c", SWMR, userblock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout
    assert writer.stdout.readline() == b"on\n"
    try:
        for locking in ("TRUE", "FALSE"):
            monkeypatch.setenv("HDF5_USE_FILE_LOCKING", locking)
            for args in (
                ["ls", "w.h5"],
                ["fit", "w.h5"],
                ["fit", "w.h5::/x"],
                ["fit", "good.npy", "--names", "w.h5::/x", "-o", "n.bn.h5"],
                ["apply", "good.bn.h5", "w.h5::/x", "-o", "y.h5"],
            ):
                check_refused(
                    3, args, "w.h5: is open for writing by another process", "run again when", "h5clear -s w.h5"
                )
    finally:
        writer.communicate(b"")
    assert writer.returncode == 0
    assert json.loads(good("fit", "w.h5::/x", "--json", "--allow-unwritten").out)["features"][0]["count"] == 900


def test_the_mark_of_a_writer_that_died(here: Path) -> None:
    """It stays in the superblock; the message names the command that takes it away."""
    with subprocess.Popen([sys.executable, "-c", SWMR, "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        writer.kill()
    check_refused(3, ["fit", "w.h5"], "by another process", "If it has died: h5clear -s w.h5")


def test_user_block_is_fine(here: Path) -> None:
    with h5py.File("x.h5", "w", userblock_size=1024) as file:
        file["x"] = X
    good("fit", "x.h5")


def test_a_damaged_heap_of_texts_does_not_hang(here: Path) -> None:
    """Feature names of variable length lie in a heap; over some damage libhdf5 2.0.0 loops for ever."""
    with h5py.File("x.h5", "w") as file:
        file["x"] = X
        file["x"].attrs["feature_names"] = list("abcd")
        file["names"] = list("abcd")
    content = bytearray((here / "x.h5").read_bytes())
    heaps = [i for i in range(len(content)) if content.startswith(b"GCOL", i)]
    for start in heaps:
        size, place = int.from_bytes(content[start + 8 : start + 16], "little"), start + 16
        while content[place]:  # to the space that is left
            place += 16 + -(-int.from_bytes(content[place + 8 : place + 16], "little") // 8) * 8
        assert place < start + size
        content[place + 8 : place + 16] = bytes(8)
    (here / "x.h5").write_bytes(content)
    with untouched(here), nothing_else_read("x.h5"):
        check_refused(3, ["fit", "x.h5"], "x.h5::/x", "heap of texts is damaged")
        check_refused(
            3,
            ["fit", "good.npy", "--names", "x.h5::/names", "-o", "n.bn.h5"],
            "x.h5::/names",
            "heap of texts is damaged",
        )


# --- what is read only for those who mean it


def virtual_file(path: Path, parts: list[tuple[Any, str, str, tuple[int, ...], Any]], shape: tuple[int, ...]) -> None:
    layout = h5py.VirtualLayout(shape, "f4")
    for place, file, dataset, source_shape, taken in parts:
        layout[place] = h5py.VirtualSource(file, dataset, shape=source_shape)[taken]
    with h5py.File(path, "w") as target:
        target.create_virtual_dataset("x", layout)


@pytest.mark.parametrize(
    "parts",
    [
        [(slice(0, 16), "a.h5", "x", (16, 4), ...), (slice(16, 24), "b.h5", "x", (8, 4), ...)],
        [(slice(0, 24, 2), "c.h5", "x", (12, 4), ...), (slice(1, 24, 2), "d.h5", "x", (12, 4), ...)],
        [(np.s_[:, 0:2], "e.h5", "x", (24, 4), np.s_[:, 2:4]), (np.s_[:, 2:4], "e.h5", "x", (24, 4), np.s_[:, 0:2])],
        [(i, "f.h5", "x", (24, 5), np.s_[23 - i, 1:]) for i in range(24)],
        [(np.s_[:, i], "g.h5", "x", (30, 4), np.s_[3:27, i]) for i in range(4)],
        [(np.s_[::3], "h.h5", "x", (40, 4), np.s_[::5]), (np.s_[1::3], "h.h5", "x", (40, 4), np.s_[1::5]),
         (np.s_[2::3], "h.h5", "x", (40, 4), np.s_[2::5])],
    ],
    ids=["stacked", "interleaved", "columns", "row by row", "column by column", "with gaps"],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"chunks": (5, 3), "compression": "gzip"}])
def test_virtual_datasets_are_read_from_their_sources(here: Path, parts: list[Any], options: dict[str, Any]) -> None:
    """As HDF5 itself reads them; sources lie relative to the virtual file, not to where bn is run."""
    folder = here / "sub"
    folder.mkdir()
    for _, file, _, shape, _ in parts:
        values = np.random.default_rng(len(file) + shape[0] + ord(file[0])).normal(size=shape).astype("f4")
        save_h5(folder / file, values, **options)
    virtual_file(folder / "v.h5", parts, (24, 4))
    with h5py.File(folder / "v.h5") as file:
        expected = file["x"][()]
    assert np.isfinite(expected).all()
    assert (expected != 0).all()
    save(here / "v.npy", expected)
    for size in (4, 256):
        same = [
            good("fit", address, "--batch-size", size, "-f", "--json", "--allow-virtual", "-q").out
            for address in ("sub/v.h5::/x", "v.npy")
        ]
        assert same[0].split('"features"')[1] == same[1].split('"features"')[1]
    good("apply", "good.bn.h5", "sub/v.h5", "-o", "one.npy", "--allow-virtual")
    good("apply", "good.bn.h5", "v.npy", "-o", "two.npy")
    assert (here / "one.npy").read_bytes() == (here / "two.npy").read_bytes()


BAD_SOURCES: dict[str, tuple[Any, list[str]]] = {
    "missing": (lambda: None, ["s.h5: no such file"]),
    "no such dataset": (lambda: save_h5(Path("s.h5"), X, "y"), ["s.h5: has no dataset /x"]),
    "pipe": (lambda: os.mkfifo("s.h5"), ["s.h5: is not a regular file"]),
    "another shape": (lambda: save_h5(Path("s.h5"), X[:8]), ["its source s.h5::/x, float32 of shape (8, 4), does not fit the float32 of shape (16, 4)"]),
    "another type": (lambda: save_h5(Path("s.h5"), X.astype("f8")), ["float64 of shape (16, 4), does not fit the float32"]),
    "not HDF5": (lambda: Path("s.h5").write_text("text" * 200), ["s.h5: not an HDF5 file"]),
    "virtual itself": (lambda: virtual_file(Path("s.h5"), [(..., "t.h5", "x", (16, 4), ...)], (16, 4)), ["s.h5::/x: is virtual"]),
    "unwritten": (lambda: h5py.File("s.h5", "w").create_dataset("x", (16, 4), "f4").file.close(), ["s.h5::/x: was never written"]),
    "external link": (lambda: h5py.File("s.h5", "w").__setitem__("x", h5py.ExternalLink("outside.h5", "/x")), ["link to another file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_sources_that_are_not_what_the_mapping_says(here: Path, case: str) -> None:
    build, words = BAD_SOURCES[case]
    virtual_file(here / "v.h5", [(..., "s.h5", "x", (16, 4), ...)], (16, 4))
    build()
    with untouched(here), nothing_else_read("v.h5"):
        for command in (["fit", "v.h5"], ["apply", "good.bn.h5", "v.h5", "-o", "y.h5"]):
            check_refused(
                3,
                [*command, "--allow-virtual"],
                "v.h5::/x: of its sources" if "shape (" not in words[0] else "v.h5::/x",
                *words,
            )


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (bad_files.virtual(".", "x"), "is virtual"),
        (bad_files.grows, "of a kind that bn does not read"),
        (bad_files.virtual("outside.h5", "x", taken=np.s_[:8]), "not all of it is mapped"),
    ],
    ids=["itself", "grows", "in part"],
)
def test_mappings_that_are_refused(here: Path, build: Any, words: str) -> None:
    with h5py.File("v.h5", "w") as file:
        build(file)
    with untouched(here), nothing_else_read("v.h5"):
        check_refused(3, ["fit", "v.h5", "--allow-virtual"], "v.h5::/x", words)


def test_what_is_not_mapped_is_the_fill_value_for_those_who_mean_it(here: Path) -> None:
    save_h5(here / "s.h5", X)
    virtual_file(here / "v.h5", [(np.s_[:8], "s.h5", "x", (16, 4), np.s_[:8])], (16, 4))
    good("apply", "good.bn.h5", "v.h5", "-o", "v.npy", "--allow-virtual", "--allow-unwritten")
    save(here / "x.npy", np.concatenate([X[:8], np.zeros((8, 4), "f4")]))
    good("apply", "good.bn.h5", "x.npy", "-o", "y.npy")
    assert (here / "v.npy").read_bytes() == (here / "y.npy").read_bytes()


def test_a_source_of_a_virtual_dataset_is_an_input(here: Path) -> None:
    save_h5(here / "s.h5", X)
    virtual_file(here / "v.h5", [(..., "s.h5", "x", (16, 4), ...)], (16, 4))
    with untouched(here):
        check_refused(
            5, ["apply", "good.bn.h5", "v.h5", "-o", "s.h5", "-f", "--allow-virtual"], "s.h5: is also an input"
        )
        check_refused(5, ["fit", "v.h5", "-o", "s.h5", "-f", "--allow-virtual"], "s.h5: is also an input")


def test_picked() -> None:
    for start, stride, count, block in ((0, 1, 1, 5), (2, 3, 4, 1), (1, 5, 3, 2), (0, 4, 2, 4)):
        indices = [start + i * stride + j for i in range(count) for j in range(block)]
        part = Picked(start, stride, count, block)
        assert part.at(0, part.size).tolist() == indices
        assert [part.before(n) for n in range(30)] == [sum(i < n for i in indices) for n in range(30)]


PLUGIN = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void begin(void) { FILE *f = fopen(getenv("SPRUNG"), "w"); if (f) fclose(f); }
"""


def test_plugins_are_off_unless_asked_for(here: Path) -> None:
    """A library in HDF5_PLUGIN_PATH is not even loaded; with --plugins it is (and brings no filter)."""
    (here / "p").mkdir()
    (here / "p.c").write_text(PLUGIN)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", "p/libp.so", "p.c"], check=True)
    except FileNotFoundError:
        pytest.skip("there is no C compiler")
    with h5py.File("x.h5", "w") as file:
        bad_files.with_filter(54321)(file)
    variables = {k: v for k, v in os.environ.items() if k != "HDF5_PLUGIN_PRELOAD"}  # set by runs in this process
    variables |= {"HDF5_PLUGIN_PATH": str(here / "p"), "SPRUNG": str(here / "sprung")}
    for options, sprung in (([], False), (["--plugins"], True)):
        for command in COMMANDS:
            args = [*BN, *(a.replace("{}", "x.h5") for a in command), *options]
            done = subprocess.run(args, env=variables, capture_output=True, text=True)
            assert done.returncode == 3
            assert "54321" in done.stderr
        assert (here / "sprung").exists() == sprung


def test_hdf5plugin_is_taken_where_it_is_installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It registers its filters when it is imported, without HDF5 loading any library by itself."""
    (here / "hdf5plugin.py").write_text("import os; os.mkdir('imported')")
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "hdf5plugin", raising=False)
    save_h5(here / "plain.h5", X, chunks=(8, 4), compression="gzip")
    with h5py.File("x.h5", "w") as file:
        bad_files.with_filter(32015)(file)
    good("fit", "plain.h5")
    assert not (here / "imported").exists()
    check_refused(3, ["fit", "x.h5"], "zstd")
    assert (here / "imported").is_dir()
    monkeypatch.delitem(sys.modules, "hdf5plugin", raising=False)


@pytest.mark.parametrize("options", [{}, {"chunks": (2,)}, {"chunks": (2,), "compression": "gzip"}])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_texts_that_claim_gigabytes(here: Path, options: dict[str, Any], libver: str) -> None:
    """HDF5 makes room for as many bytes as a text of variable length claims, and writes to it, before it looks."""
    with h5py.File("x.h5", "w", libver=libver) as file:
        file["x"] = X
        file["x"].attrs["feature_names"] = [f"feature number {i}" for i in range(4)]
        file.create_dataset("names", data=[f"string of numb{i}" for i in range(4)], **options)
    whole = (here / "x.h5").read_bytes()
    good("apply", "good.bn.h5", "x.h5::/x", "-o", "w.h5", "--copy-others")
    good("fit", "good.npy", "--names", "x.h5::/names", "-o", "w.bn.h5")
    references = [m.start() for m in re.finditer(rb"[\x0f\x10]\0\0\0.{8}[\x01-\x08]\0\0\0", whole, re.DOTALL)]
    refused = 0
    for at in references:
        (here / "x.h5").write_bytes(whole[: at + 3] + b"\x7f" + whole[at + 4 :])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for args in (
            ["fit", "x.h5::/x", "-o", "n.bn.h5"],
            ["fit", "good.npy", "--names", "x.h5::/names", "-o", "n.bn.h5"],
            ["apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "--copy-others"],
        ):
            refused += bn(*args, "-f").code == 3
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + (50 << 10)
    assert refused >= (4 if "compression" in options else 12)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_texts_of_letters_that_claim_gigabytes(here: Path, monkeypatch: pytest.MonkeyPatch, libver: str) -> None:
    """As a damaged type may have it: a letter of 2^30 bytes is what HDF5 makes room for, whatever the heap says."""
    with h5py.File("x.h5", "w", libver=libver) as file:
        file["x"] = X
        file["x"].attrs["feature_names"] = [f"feature number {i}" for i in range(4)]
    good("fit", "x.h5::/x", "-o", "w.bn.h5")
    monkeypatch.setattr(hdf5_file, "element_bytes", lambda kind: 1 << 30)
    check_refused(3, ["fit", "x.h5::/x", "-o", "n.bn.h5"], "its texts claim")


def test_texts_in_compounds_that_claim_gigabytes(here: Path) -> None:
    """In attributes and in datasets; and lists of references, as a dimension has them."""
    kind = np.dtype([("n", "i2"), ("text", h5py.string_dtype()), ("texts", h5py.string_dtype(), (2,))])
    with h5py.File("x.h5", "w", libver="earliest") as file:
        file["x"], file["t"] = X, np.arange(len(X))
        record = np.array([(1, "a text of size 19 .", ["a text of size 19 ,"] * 2)], kind)
        file["records"] = record
        file["x"].attrs.create("records", record)
        file["t"].make_scale("time")
        file["x"].dims[0].attach_scale(file["t"])
    whole = (here / "x.h5").read_bytes()
    good("apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "--copy-others")
    with h5py.File("y.h5") as file:
        assert file["records"][0]["texts"].tolist() == [b"a text of size 19 ,"] * 2
    found = [m.start() + 3 for m in re.finditer(rb"\x13\0\0\0.{8}[\x01-\x08]\0\0\0", whole, re.DOTALL)]
    assert len(found) == 6
    scale = whole.index(
        b"\x17\0\0\0\x08\0\0\0", whole.index(b"DIMENSION_LIST\0")
    )  # the type of a reference, and its size
    for at in [*found, scale + 7]:
        (here / "x.h5").write_bytes(whole[:at] + b"\x7f" + whole[at + 1 :])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        check_refused(3, ["apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "--copy-others", "-f"], "its texts claim")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + (50 << 10)


def test_a_source_of_a_virtual_dataset_that_changes_during_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_h5(here / "s.h5", X)
    virtual_file(here / "v.h5", [(..., "s.h5", "x", (16, 4), ...)], (16, 4))
    original = accumulate.segment_moments

    def touching(*args: Any) -> Any:
        os.utime("s.h5", ns=(1, 1))
        return original(*args)

    monkeypatch.setattr(accumulate, "segment_moments", touching)
    with untouched(here):
        check_refused(3, ["fit", "v.h5", "--allow-virtual"], "s.h5: changed while it was being read")


@pytest.mark.parametrize("member", [False, True])
def test_a_type_of_variable_length_that_is_no_type(here: Path, member: bool) -> None:
    """HDF5 takes one that is neither a sequence nor a text, and copies its values through a null pointer."""
    text = h5py.string_dtype()
    dtype = np.dtype([("name", text), ("n", "i4")]) if member else text
    with h5py.File("x.h5", "w") as file:
        file["x"] = X
        file["names"] = np.array([("a", 1)], dtype) if member else ["a"]
    whole, message = (here / "x.h5").read_bytes(), b"\x19\x01\x01\0\x10\0\0\0"  # class and version, text, UTF-8, size
    good("apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5", "--copy-others")
    assert whole.count(message) == 1
    (here / "x.h5").write_bytes(whole.replace(message, message[:1] + b"\x09" + message[2:]))
    done = subprocess.run(
        [sys.executable, "-m", "bncli", "apply", "good.bn.h5", "x.h5::/x", "-o", "z.h5", "--copy-others"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done
    assert "x.h5: /names cannot be copied (its type of variable length is neither" in done.stderr
    assert not (here / "z.h5").exists()


def test_a_dataset_without_a_dataspace_passes_for_a_named_type(here: Path) -> None:
    """HDF5's copy of one crashes; bn copies the type alone."""
    with h5py.File("x.h5", "w", libver="earliest") as file:
        file["x"] = X
        file["other"] = np.arange(3)
    whole = (here / "x.h5").read_bytes()
    message = re.findall(
        rb"\x01\0.\0.\0\0\0\x01\x01.{6}\x03\0\0\0\0\0\0\0", whole, re.DOTALL
    )  # version 1, one axis of 3
    assert len(message) == 1
    (here / "x.h5").write_bytes(whole.replace(message[0], b"\0" + message[0][1:]))  # as if it were empty
    with h5py.File("x.h5") as file:
        assert isinstance(file["other"], h5py.Datatype)
    done = subprocess.run(
        [sys.executable, "-m", "bncli", "apply", "good.bn.h5", "x.h5::/x", "-o", "z.h5", "--copy-others"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done
    with h5py.File("z.h5") as file:
        assert file["other"].dtype == np.int64


def test_a_damaged_attribute_is_a_fault_of_the_input(here: Path) -> None:
    """Not of the output that takes it over."""
    with h5py.File("x.h5", "w", libver="earliest") as file:
        file["x"] = X
        file["x"].attrs.create("note", "some words", dtype=h5py.string_dtype())
    whole, message = (here / "x.h5").read_bytes(), b"\x19\x01\x01\0\x10\0\0\0"
    good("apply", "good.bn.h5", "x.h5::/x", "-o", "y.h5")
    assert whole.count(message) == 1
    (here / "x.h5").write_bytes(whole.replace(message, message[:1] + b"\x09" + message[2:]))
    check_refused(3, ["apply", "good.bn.h5", "x.h5::/x", "-o", "z.h5"], "x.h5::/x: its attributes cannot be copied")
    assert not (here / "z.h5").exists()
