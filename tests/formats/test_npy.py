"""The .npy reader and writer: every order, byte order and type, every broken file of BAD_INPUT.md, mutated headers."""

from __future__ import annotations

import io
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bad_files import raw
from cli_helpers import check_refused, no_controls, save, table
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as npformat

from bncli.errors import InputError, UsageError
from bncli.formats.address import open_source
from bncli.formats.npy import NpySink, NpySource, is_npy
from bncli.formats.reading import ReadOptions

BUDGET = 1 << 20
Array = npt.NDArray[Any]
TYPES = ["?", "i1", "u1", *(o + t for o in "<>" for t in ("i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"))]


def values_of(dtype: str, shape: tuple[int, ...]) -> Array:
    """Values all over the range of the type, the extremes among them."""
    kind = np.dtype(dtype)
    rng = np.random.default_rng(3)
    if kind.kind == "b":
        return rng.integers(0, 2, shape).astype(kind)
    if kind.kind == "f":
        x = rng.normal(size=shape).astype(kind)
        x.reshape(-1)[:5] = [np.nan, np.inf, -np.inf, -0.0, np.finfo(kind).max]
        return x
    limits = np.iinfo(kind)
    x = rng.integers(limits.min, limits.max, shape, dtype=kind.newbyteorder("="), endpoint=True).astype(kind)
    x.reshape(-1)[:2] = [limits.min, limits.max]
    return x


def write(tmp_path: Path, content: bytes, name: str = "x.npy") -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def read_all(path: str, max_memory: int = BUDGET) -> Array:
    with NpySource(path, ReadOptions(max_memory=max_memory)) as source:
        out = np.empty(source.shape[0] * source.sample_size, source.dtype)
        source.read(0, out)
        source.check_unchanged()
        return out.reshape(source.shape)


def check_bad(path: str, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        read_all(path)
    message = str(caught.value)
    assert os.path.basename(path) in message
    for word in words:
        assert word in message, message
    assert len(message.splitlines()) == 1
    assert no_controls(message)
    return message


# --- what is right


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_at_any_range(tmp_path: Path, dtype: str, order: str) -> None:
    x = np.asarray(values_of(dtype, (13, 3, 5)), order=order)
    path = str(save(tmp_path / "x.npy", x))
    flat = np.ascontiguousarray(x).reshape(-1)
    with NpySource(path, ReadOptions(max_memory=BUDGET)) as source:
        assert source.shape == (13, 3, 5)
        assert source.dtype == x.dtype.newbyteorder("=")
        assert source.dtype.isnative
        for first, stop in [(0, 195), (0, 1), (194, 195), (14, 16), (7, 130), (50, 50), (15, 30), (100, 195)]:
            out = np.empty(stop - first, source.dtype)
            source.read(first, out)
            np.testing.assert_array_equal(out, flat[first:stop])


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from(TYPES),
    st.booleans(),
    st.data(),
)
def test_any_shape_at_any_range(
    tmp_path: Path, shape: list[int], dtype: str, fortran: bool, data: st.DataObject
) -> None:
    total = int(np.prod(shape))
    x = np.arange(total).astype(dtype).reshape(shape)
    path = str(save(tmp_path / "x.npy", np.asfortranarray(x) if fortran else x))
    first = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(first, total))
    with NpySource(path, ReadOptions(max_memory=BUDGET)) as source:
        out = np.empty(stop - first, source.dtype)
        source.read(first, out)
    np.testing.assert_array_equal(out, x.reshape(-1)[first:stop])


@pytest.mark.parametrize("shape", [(1000, 7), (1000, 2, 3), (3, 1000), (1000, 1), (1, 1000), (1000,)])
def test_fortran_order_in_bands(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A budget that holds a few samples only: bands are read one after the other, from any place."""
    x = np.asfortranarray(np.arange(np.prod(shape), dtype="i4").reshape(shape))
    path = str(save(tmp_path / "x.npy", x))
    sample = 4 * int(np.prod(shape[1:]))
    np.testing.assert_array_equal(read_all(path, max_memory=sample * 2 * 37).reshape(shape), x)
    with NpySource(path, ReadOptions(max_memory=sample * 2)) as source:
        for first in (900, 17, 950, 0):
            out = np.empty(50, source.dtype)
            source.read(first, out)
            np.testing.assert_array_equal(out, x.reshape(-1, order="C")[first : first + 50])


def test_fortran_order_beyond_the_budget_says_what_to_give(tmp_path: Path) -> None:
    x = np.asfortranarray(np.zeros((2, 1000), "f8"))
    path = str(save(tmp_path / "x.npy", x))
    with pytest.raises(UsageError, match=r"x\.npy.*16000 bytes.*--max-memory"):
        read_all(path, max_memory=8000)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions(tmp_path: Path, version: tuple[int, int]) -> None:
    x = np.arange(12, dtype="f4").reshape(4, 3)
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        npformat.write_array(file, x, version=version)
    np.testing.assert_array_equal(read_all(str(path)), x)


def test_header_that_numpy_pads_and_python_2_wrote(tmp_path: Path) -> None:
    data = np.arange(12, dtype="<f4").tobytes()
    padded = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), }" + b" " * 3000 + b"\n"
    np.testing.assert_array_equal(read_all(write(tmp_path, raw(header=padded, data=data))), np.arange(12).reshape(4, 3))


def test_source_knows_itself(tmp_path: Path) -> None:
    path = write(tmp_path, raw())
    assert is_npy(path)
    with open_source(path, ReadOptions(max_memory=BUDGET)) as source:
        assert isinstance(source, NpySource)
        assert (source.address, source.names, source.notes) == (path, None, [])
    source.close()  # a second time


# --- what is refused


def test_messages_give_bytes_expected_and_found(tmp_path: Path) -> None:
    whole = raw()
    check_bad(write(tmp_path, whole[:-5]), f"needs {len(whole)} bytes", f"has {len(whole) - 5}")
    check_bad(write(tmp_path, whole + b"12"), f"ends at byte {len(whole)}", f"at {len(whole) + 2}")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = raw()
    for end in range(len(whole)):
        check_bad(write(tmp_path, whole[:end]))


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trap = str(tmp_path / "sprung")
    save(tmp_path / "x.npy", np.array([[Trap(trap)]], object))
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Trap(trap)))
    for name in ("x.npy", "p.npy"):
        check_refused(3, ["fit", name], name)
        check_refused(3, ["ls", name], name)
    assert not os.path.exists(trap)
    np.load("x.npy", allow_pickle=True)  # the trap does work
    assert os.path.isdir(trap)


def test_header_of_4_gib_takes_no_memory(tmp_path: Path) -> None:
    """The file is sparse; the reader may use 64 MB of addresses more than the interpreter has."""
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        file.write(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
        file.truncate(5 << 30)
    script = (
        "import resource, sys; from bncli.formats.npy import NpySource; from bncli.formats.reading import ReadOptions\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))\n"
        "try: NpySource(sys.argv[1], ReadOptions(max_memory=1 << 20))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("there is no /proc")
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.stdout.startswith("InputError")
    assert "4294967295" in done.stdout
    assert resource.getpagesize() > 0


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    for path, words in ((tmp_path / "pipe.npy", "not a regular file"), (tmp_path / "folder.npy", "a folder")):
        with pytest.raises(InputError, match=words):
            open_source(str(path), ReadOptions(max_memory=BUDGET))
        check_bad(str(path), words)
    check_bad("/dev/zero", "not a regular file")


def test_symbolic_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "x.npy").symlink_to("x.npy")
    check_bad(str(tmp_path / "x.npy"), "cannot be read")


def test_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = str(save(tmp_path / "x.npy", table(100)))
    with NpySource(path, ReadOptions(max_memory=BUDGET)) as source:
        os.truncate(path, 1000)
        with pytest.raises(InputError, match=r"x\.npy: ends at byte 1000.*cut after it was opened"):
            source.read(0, np.empty(300, source.dtype))


@pytest.mark.parametrize("how", ["written", "replaced", "removed", "grown"])
def test_changed_after_it_was_opened(tmp_path: Path, how: str) -> None:
    path = str(save(tmp_path / "x.npy", table(100)))
    with NpySource(path, ReadOptions(max_memory=BUDGET)) as source:
        source.read(0, np.empty(300, source.dtype))
        source.check_unchanged()
        if how == "written":
            with open(path, "r+b") as file:
                file.write(b"\x93")
            os.utime(path, ns=(1, 1))
        elif how == "grown":
            with open(path, "ab") as file:
                file.write(b"\x00")
        else:
            os.rename(path, path + ".old")
            if how == "replaced":
                save(tmp_path / "x.npy", table(100))
        with pytest.raises(InputError, match=r"x\.npy: changed while it was being read"):
            source.check_unchanged()


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), }"
DATA = np.arange(12, dtype="<f4").tobytes()
SNIPPETS = [
    b"(",
    b")",
    b"'",
    b"9",
    b"-",
    b".",
    b"e9",
    b"True",
    b"None",
    b"{",
    b"}",
    b"\x00",
    b"\xff",
    b"|O",
    b">",
    b",",
    b" ",
    b"\\x",
]


@given(
    st.lists(st.tuples(st.integers(0, len(HEADER)), st.integers(0, 4), st.sampled_from(SNIPPETS)), max_size=4),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    st.sampled_from([0, 0, 0, -1, 1, 200]),
)
def test_mutated_headers(
    tmp_path: Path, edits: list[tuple[int, int, bytes]], version: tuple[int, int], longer: int
) -> None:
    """Whatever stands in a header: an InputError, or what numpy reads."""
    header = HEADER
    for at, removed, snippet in edits:
        header = header[:at] + snippet + header[at + removed :]
    content = raw(header=header, data=DATA, version=version, length=max(0, len(header) + longer))
    check_like_numpy(tmp_path, content)


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), min_size=1, max_size=3))
def test_mutated_bytes(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    content = bytearray(raw(header=HEADER.ljust(117) + b"\n", data=DATA))
    for at, value in edits:
        content[at] = value
    check_like_numpy(tmp_path, bytes(content))


def check_like_numpy(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    message, found = "", np.empty(0)
    try:
        found = read_all(path)
    except InputError as error:
        message = str(error)
    assert no_controls(message)
    if message:
        return
    expected = np.load(io.BytesIO(content), allow_pickle=False)
    assert found.dtype == expected.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


# --- writing


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3), (4, 2, 3, 2)])
def test_sink_is_read_by_numpy(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    x = values_of(dtype, shape)
    path = tmp_path / "y.npy"
    path.touch()
    sink = NpySink(str(path), shape, np.dtype(dtype))
    flat = x.reshape(-1)
    for first, stop in ((0, 1), (1, 1), (1, 6), (6, flat.size)):
        sink.write(flat[first:stop])
    sink.finish()
    found = np.load(path)
    assert found.dtype == x.dtype
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, x)
    assert path.read_bytes() == saved(x)


def saved(x: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


def test_sink_of_a_slice_and_after_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"
    sink = NpySink(str(path), (5,), np.dtype("f4"))
    sink.write(np.arange(10, dtype="f4")[::2])
    sink.finish()
    assert np.load(path).tolist() == [0, 2, 4, 6, 8]
    sink = NpySink(str(path), (5,), np.dtype("f4"))
    sink.write(np.zeros(2, "f4"))
    sink.abandon()
    sink.abandon()
