"""bn ls, as a person and a script see it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from cli_helpers import check_refused, good, no_controls, on_terminal, plain, save, save_h5

HEADER = ["address", "shape", "type", "chunks", "stored", "cannot be fitted"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(path: str) -> dict[str, list[str]]:
    lines = [line.split("\t") for line in good("ls", path).out.splitlines()]
    assert lines[0] == HEADER
    return {line[0]: line[1:] for line in lines[1:]}


def test_npy(here: Path) -> None:
    save(here / "x.npy", np.zeros((5, 3), ">f4"))
    save(here / "f.npy", np.asfortranarray(np.zeros((5, 3, 2), "i2")))
    save(here / "v.npy", np.zeros(5))
    assert listed("x.npy") == {"x.npy": ["5 × 3", "float32", "", "", ""]}
    assert listed("f.npy") == {"f.npy": ["5 × 3 × 2", "int16", "", "Fortran order", ""]}
    assert listed("v.npy") == {"v.npy": ["5", "float64", "", "", ""]}


def test_hdf5(here: Path) -> None:
    with h5py.File("d.h5", "w") as file:
        file.create_dataset("g/x", data=np.zeros((50, 3), "f4"), chunks=(10, 3), compression="gzip", shuffle=True)
        file["text"] = ["a", "b"]
        file["c"] = np.zeros((2, 2), complex)
        file["one"] = 1.0
        for i in (10, 9):
            file[f"part{i}"] = np.zeros((2, 2), "u1")
    rows = listed("d.h5")
    assert list(rows) == [f"d.h5::/{n}" for n in ("c", "g/x", "one", "part9", "part10", "text")]
    shape, kind, chunks, stored, problem = rows["d.h5::/g/x"]
    assert (shape, kind, chunks, problem) == ("50 × 3", "float32", "10 × 3", "")
    assert "gzip" in stored
    assert "shuffle" in stored
    for name in ("text", "c", "one"):
        assert rows[f"d.h5::/{name}"][4]
    assert rows["d.h5::/one"][0] == "scalar"
    good("fit", "d.h5::/part9", "-q")  # an address can be typed as it is listed


def odd_types(file: h5py.File) -> dict[str, str]:
    """A dataset of every type that bn does not read, as HDF5 itself has them; returns what bn calls each."""
    h5t = h5py.h5t
    timed = h5t.create(h5t.COMPOUND, 12)
    timed.insert(b"t", 0, h5t.UNIX_D64LE)
    timed.insert(b"v", 8, h5t.IEEE_F32LE)
    colors, odd_float = h5t.enum_create(h5t.STD_I16LE), h5t.IEEE_F32LE.copy()
    colors.enum_insert(b"red", 1)
    odd_float.set_fields(31, 20, 11, 0, 20)
    short = h5t.STD_I32LE.copy()
    short.set_precision(24)
    types = {
        "table": (timed, "compound"),
        "time": (h5t.UNIX_D32BE, "time"),
        "times": (h5t.array_create(h5t.UNIX_D32LE, (3,)), "array type"),
        "lists of times": (h5t.vlen_create(h5t.UNIX_D32LE), "variable-length"),
        "enum": (colors, "enum"),
        "opaque": (h5t.create(h5t.OPAQUE, 5), "opaque"),
        "bits": (h5t.STD_B16LE, "bit field"),
        "ref": (h5t.STD_REF_OBJ, "reference"),
        "region": (h5t.STD_REF_DSETREG, "reference"),
        "float": (odd_float, "float of 32 bits, not IEEE 16, 32 or 64"),
        "int": (short, "integer of 24 bits in 32"),
        "vlen": (h5t.vlen_create(h5t.IEEE_F32LE), "variable-length"),
        "text": (h5t.C_S1, "string"),
    }
    for name, (kind, _) in types.items():
        h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple((5, 4)))
    return {name: words for name, (_, words) in types.items()}


def test_one_array_hides_no_other(here: Path) -> None:
    with h5py.File("d.h5", "w") as file:
        names = odd_types(file)
        file["x"] = np.arange(60.0).reshape(20, 3)
        file["c"] = np.zeros((4, 2), complex)
        file["mask"] = np.zeros((20, 3), bool)
    rows = listed("d.h5")
    assert len(rows) == len(names) + 3
    for name, words in {**names, "c": "complex"}.items():
        assert rows[f"d.h5::/{name}"][1] == words
        assert rows[f"d.h5::/{name}"][4] == words
        check_refused(3, ["fit", f"d.h5::/{name}"], f"d.h5::/{name}: values of type {words} are refused")
    assert rows["d.h5::/x"] == ["20 × 3", "float64", "", "", ""]
    result = check_refused(2, ["fit", "d.h5"], "holds 2 numeric datasets", lines=4)
    assert [line.split()[0] for line in result.err.splitlines()[1:]] == ["d.h5::/mask", "d.h5::/x"]
    with h5py.File("d.h5", "a") as file:
        del file["mask"]
    good("fit", "d.h5")
    good("apply", "d.bn.h5", "d.h5", "-o", "y.h5", "--copy-others")
    with h5py.File("d.h5", "a") as file:
        del file["x"]
    check_refused(
        3, ["fit", "d.h5"], "holds no numeric dataset: /table is a table of columns (compound)", "as one array"
    )


def test_a_damaged_array_hides_no_other(here: Path) -> None:
    with h5py.File("d.h5", "w", libver="latest") as file:
        file["bad"], file["x"] = np.zeros((4, 2), "f4"), np.arange(60.0).reshape(20, 3)
        place = h5py.h5o.get_info(file["bad"].id).addr
    content = bytearray((here / "d.h5").read_bytes())
    content[place + 20] ^= 255  # its header has a checksum
    (here / "d.h5").write_bytes(content)
    rows = listed("d.h5")
    assert rows["d.h5::/x"] == ["20 × 3", "float64", "", "", ""]
    assert rows["d.h5::/bad"][:2] == ["scalar", "unknown"]
    assert rows["d.h5::/bad"][4].startswith("cannot be opened; the file is damaged")
    good("fit", "d.h5::/x")
    check_refused(3, ["fit", "d.h5"], "/bad cannot be opened")  # it may be the one that is meant


def test_an_index_of_pytables_is_no_data(here: Path) -> None:
    """A pandas table is a compound beside /_i_table, the sorted columns: empty where there are few rows."""
    with h5py.File("t.h5", "w") as file:
        file["df/table"] = np.zeros(40, [("index", "i8"), ("a", "f4")])
        for name, shape in (("sorted", (0, 131072)), ("bounds", (0, 127)), ("sortedLR", (131,)), ("full", (2, 16))):
            file[f"df/_i_table/index/{name}"] = np.zeros(shape, "i8")
        file["df/_i_data/x"] = np.arange(12.0).reshape(4, 3)  # of a person
    rows = listed("t.h5")
    assert rows["t.h5::/df/_i_table/index/full"][4] == "part of the index of the table /df/table"
    assert rows["t.h5::/df/_i_data/x"][4] == ""
    good("fit", "t.h5")
    with h5py.File("t.h5", "a") as file:
        del file["df/_i_data"]
    result = check_refused(3, ["fit", "t.h5"], "holds no numeric dataset: /df/table is a table of columns (compound)")
    assert "_i_table" not in result.err


def test_what_is_empty_is_no_candidate(here: Path) -> None:
    with h5py.File("e.h5", "w") as file:
        for n, shape in enumerate([(0, 3), (4, 0), (0,)]):
            file[f"empty{n}"] = np.zeros(shape)
        file["x"] = np.arange(12.0).reshape(4, 3)
    good("fit", "e.h5")
    with h5py.File("e.h5", "a") as file:
        file["y"] = np.zeros((4, 3))
    result = check_refused(2, ["fit", "e.h5"], "holds 2 numeric datasets", lines=4)
    assert "empty" not in result.err
    with h5py.File("e.h5", "a") as file:
        del file["x"], file["y"]
    check_refused(3, ["fit", "e.h5"], "holds only empty datasets")
    with h5py.File("e.h5", "a") as file:
        del file["empty1"], file["empty2"]
    check_refused(3, ["fit", "e.h5"], "e.h5::/empty0: no samples")


def test_no_datasets(here: Path) -> None:
    with h5py.File("e.h5", "w") as file:
        file.create_group("g")
    assert listed("e.h5") == {}
    assert on_terminal(["ls", "e.h5"]).out == "no datasets\n"


@pytest.mark.parametrize("columns", [80, 40])
def test_terminal(here: Path, columns: int) -> None:
    save_h5(here / "d.h5", np.zeros((12345, 67), "f4"), "g/x", chunks=(10, 67))
    out = plain(on_terminal(["ls", "d.h5"], columns).out)
    assert all(len(line) <= columns for line in out.splitlines())
    for words in ("12345 × 67", "10 × 67"):
        assert words in out or columns == 40
    for words in ("d.h5::/g/x", "float32"):
        assert words in out


def test_names_with_controls_and_markup(here: Path) -> None:
    kind = np.dtype([("f\x1b[31m", "f4"), ("b\x9b", "i2")])
    with h5py.File("e\x1b.h5", "w") as file:
        file["\x1b[31m[bold]x[/bold]\t"] = np.zeros((2, 2))
        file["s"] = np.zeros((2, 2), kind)
    result = good("ls", "e\x1b.h5")
    assert no_controls(result.out)
    assert "e\\x1b.h5::/\\x1b[31m[bold]x[/bold]\\t" in result.out
    shown = plain(on_terminal(["ls", "e\x1b.h5"], 200).out)
    assert no_controls(shown)
    assert "[bold]x[/bold]" in shown


def test_what_cannot_be_listed(here: Path) -> None:
    check_refused(3, ["ls", "none.h5"], "none.h5: no such file")
    check_refused(3, ["ls", "."], ".: is a folder")
    (here / "t.h5").write_text("text")
    check_refused(3, ["ls", "t.h5"], "t.h5", "HDF5")
    (here / "t.txt").write_text("text")
    check_refused(3, ["ls", "t.txt"], "t.txt: of no format that bn reads (.npy, HDF5)")
    os.mkfifo("pipe.h5")
    check_refused(3, ["ls", "pipe.h5"], "pipe.h5", "not a regular file")
    check_refused(2, ["ls"], "FILE")


def test_json(here: Path) -> None:
    """The same as the table, as values."""
    with h5py.File("d\x1b.h5", "w") as file:
        file.create_dataset("x", data=np.zeros((50, 3), "f4"), chunks=(10, 3), compression="gzip")
        file["c"] = np.zeros((2, 2), complex)
        file["one"] = 1.0
    result = good("ls", "d\x1b.h5", "--json")
    assert no_controls(result.out)
    listed_, table = json.loads(result.out), listed("d\x1b.h5")
    assert [sorted(array) for array in listed_] == [
        ["address", "chunks", "compression", "dtype", "problem", "shape"]
    ] * 3
    by_address = {array.pop("address"): array for array in listed_}
    assert list(by_address) == [f"d\x1b.h5::/{name}" for name in ("c", "one", "x")]
    x = by_address["d\x1b.h5::/x"]
    with h5py.File("d\x1b.h5") as file:
        assert (tuple(x["shape"]), x["dtype"]) == (file["x"].shape, file["x"].dtype.name)
        assert tuple(x["chunks"]) == file["x"].chunks
    assert "gzip" in x["compression"]
    assert x["problem"] is None
    one = by_address["d\x1b.h5::/one"]
    assert (one["shape"], one["chunks"], one["compression"]) == ([], None, None)
    for name in ("c", "one"):
        assert by_address[f"d\x1b.h5::/{name}"]["problem"] == table[f"d\\x1b.h5::/{name}"][4]
    save(here / "f.npy", np.asfortranarray(np.zeros((5, 3))))
    expected = {"address": "f.npy", "shape": [5, 3], "dtype": "float64", "chunks": None, "problem": None}
    assert json.loads(good("ls", "f.npy", "--json").out) == [expected | {"compression": "Fortran order"}]
