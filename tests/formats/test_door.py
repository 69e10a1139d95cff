"""A format from outside: TOY is all that one needs, and no file of bncli changes.

Listed, fitted, written and applied from the command line: once by a row of the table, once by the entry point of an
installed package.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import check_refused, good
from helpers import check_same_bytes

import bncli
from bncli import formats

TOY = '''
import numpy as np

from bncli.errors import InputError
from bncli.formats import Format, Listed
from bncli.formats.source import RegularFile, Source, check_shape


class ToySource(Source):
    """A line "toy ROWS COLUMNS", then float64 values."""

    def __init__(self, path, options):
        self.address, self.notes, self.files = path, [], [path]
        with open(path, "rb") as file:
            line = file.readline(100)
        self.file_shape = self.shape = check_shape(tuple(map(int, line.split()[1:])), path)
        self.dtype, self.start, self.file = np.dtype("<f8"), len(line), RegularFile(path)
        if self.file.size != self.start + 8 * np.prod(self.shape):
            raise InputError(f"{path}: cut short")

    def read(self, first, out):
        self.file.pread_into(out.view(np.uint8).data, self.start + 8 * first)

    def check_unchanged(self):
        self.file.check_unchanged()

    def close(self):
        self.file.close()


class ToySink:
    dropped = []

    def __init__(self, output):
        self.file = open(output.path, "wb")
        self.file.write(b"toy %d %d\\n" % output.shape)

    def write(self, values):
        self.file.write(values.astype("<f8").tobytes())

    def finish(self):
        self.file.close()

    abandon = finish


class Toy(Format):
    name, suffixes = "toy", (".toy",)

    def knows(self, path):
        return open(path, "rb").read(4) == b"toy "

    def arrays(self, path):
        with self.open(path, None, None) as source:
            return [Listed(path, source.shape, "float64", None, "", "")]

    def open(self, path, array, options):
        return ToySource(path, options)

    def create(self, output):
        return ToySink(output)
'''


def table(rows: int = 700) -> np.ndarray:
    return np.random.default_rng(5).normal(3, 2, (rows, 4))


def toy(path: str, values: np.ndarray) -> None:
    Path(path).write_bytes(b"toy %d %d\n" % values.shape + values.tobytes())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a toy file, a .npy file of the same values, and a module of the format."""
    (tmp_path / "toyformat.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    toy("x.toy", table())
    np.save("x.npy", table())
    good("fit", "x.npy", "-o", "npy.bn.h5")
    return tmp_path


def check_written(expected: str = "npy.out.npy") -> None:
    """Statistics and results are those of the .npy file."""
    check_same_bytes(bncli.load("toy.bn.h5"), bncli.load("npy.bn.h5"))
    good("apply", "npy.bn.h5", "x.npy", "-o", expected)
    head, _, values = Path("out.toy").read_bytes().partition(b"\n")
    assert head == b"toy 700 4"
    assert values == np.load(expected).tobytes()


def test_a_row_of_the_table(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setitem(formats.FORMATS, "toy", "toyformat:Toy")
    assert good("ls", "x.toy").out.splitlines()[1].startswith("x.toy\t700 × 4\tfloat64")
    good("fit", "x.toy", "-o", "toy.bn.h5")
    good("apply", "toy.bn.h5", "x.toy", "-o", "out.toy")
    check_written()
    good("fit", "x.toy", "x.npy", "-o", "both.bn.h5")  # one data set of two formats
    assert bncli.load("both.bn.h5").num_samples == 1400
    good("apply", "toy.bn.h5", "x.toy", "-o", "out.h5")
    Path("x.toy").write_bytes(Path("x.toy").read_bytes()[:-1])
    check_refused(3, ["fit", "x.toy", "-o", "cut.bn.h5"], "x.toy: cut short")
    check_refused(2, ["apply", "toy.bn.h5", "x.npy", "-o", "y.toy", "--copy-others"], "holds nothing else")


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run bn as another process, which finds packages in this folder."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from bncli.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


def install(folder: Path, where: str) -> None:
    info = folder / "toyformat-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toyformat\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bncli.formats]\ntoy = {where}\n")


def test_an_entry_point_of_a_package(here: Path) -> None:
    install(here, "toyformat:Toy")
    for args in (
        ["ls", "x.toy"],
        ["fit", "x.toy", "-o", "toy.bn.h5"],
        ["apply", "toy.bn.h5", "x.toy", "-o", "out.toy"],
    ):
        done = run(here, *args)
        assert done.returncode == 0, done.stderr
    check_written()


def test_an_entry_point_that_cannot_be_loaded_is_named(here: Path) -> None:
    install(here, "toyformat:Nothing")
    assert run(here, "fit", "x.npy", "-o", "y.bn.h5").returncode == 0  # a known format asks no other package
    named = "bn: warning: the format toy of the package toyformat cannot be loaded"
    done = run(here, "fit", "x.toy", "-o", "toy.bn.h5")
    assert done.returncode == 3
    assert named in done.stderr
    assert "x.toy: of no format that bn reads (.npy, HDF5)" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(here, "doctor")
    assert (done.returncode, named in done.stderr) == (0, True)  # the command for a report of it


FAULTS = {
    "raise KeyError('nope')": "the format toy of the package toyformat failed: KeyError",
    "source.dtype = np.dtype(complex)": "values of type complex128 are refused",
    "source.shape = (5,)": "one dimension is read as (N, 1)",
    "source.shape = (0, 3)": "no samples",
    "source.read = lambda first, out: open('/')": "x.toy: cannot be read: Is a directory",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_another_package_is_its_own(here: Path, fault: str) -> None:
    lines = ["import numpy as np", "from toyformat import Toy", "class Faulty(Toy):"]
    lines += ["    def open(self, path, array, options):", "        source = super().open(path, array, options)"]
    (here / "toyfaulty.py").write_text("\n".join([*lines, f"        {fault}", "        return source", ""]))
    install(here, "toyfaulty:Faulty")
    done = run(here, "fit", "x.toy", "-o", "toy.bn.h5")
    assert done.returncode == 3, done.stderr
    assert FAULTS[fault].replace("toyformat", "toyfaulty") in done.stderr
    assert "Traceback" not in done.stderr
    assert not (here / "toy.bn.h5").exists()


def test_doctor_lists_formats_of_other_packages(here: Path) -> None:
    install(here, "toyformat:Toy")
    done = run(here, "doctor")
    assert "format toy\t" in done.stdout, done.stdout
