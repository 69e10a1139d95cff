"""bn ls, as a person and a script see it."""

from __future__ import annotations

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
    check_refused(3, ["ls", "t.txt"], "t.txt: neither a .npy nor an HDF5 file")
    os.mkfifo("pipe.h5")
    check_refused(3, ["ls", "pipe.h5"], "pipe.h5", "not a regular file")
    check_refused(2, ["ls"], "FILE")
