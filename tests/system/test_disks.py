"""Full and read-only disks: exit 74 with a one-line error, the old output intact and no temporary file.

The tests use a small tmpfs if root may mount one, so that HDF5 writes to a file system that is really full, and a limit on
the size of files otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from cli_helpers import contents, good, save, save_h5, table, temporaries
from faults.kills import EAGER
from faults.zygote import Outcome, Zygote
from helpers import ANY_ADVICE, advised, check_same_bytes

import bncli

OUTPUTS = {
    "npy": ["apply", "s.bn.h5", "x.npy", "-o", "{}/y.npy", "-f"],
    "npy to h5": ["apply", "s.bn.h5", "x.npy", "-o", "{}/y.h5", "-f"],
    "contiguous": ["apply", "s.bn.h5", "plain.h5", "-o", "{}/y.h5", "-f"],
    "chunks": ["apply", "s.bn.h5", "chunks.h5", "-o", "{}/y.h5", "-f"],
    "gzip": ["apply", "s.bn.h5", "gzip.h5", "-o", "{}/y.h5", "-f"],
    "lzf": ["apply", "s.bn.h5", "lzf.h5", "-o", "{}/y.h5", "-f"],
    "others": ["apply", "s.bn.h5", "others.h5::x", "-o", "{}/y.h5", "-f", "--copy-others"],
    "fit": ["fit", "wide.npy", "-o", "{}/w.bn.h5", "-f"],
    "merge": ["merge", "w.bn.h5", "w.bn.h5", "-o", "{}/w.bn.h5", "-f"],
    "import": ["import", "w.npz", "-o", "{}/w.bn.h5", "-f"],
    "export": ["export", "w.bn.h5", "-o", "{}/w.json", "-f"],
    "npz": ["export", "w.bn.h5", "-o", "{}/w.npz", "-f"],
    "csv": ["export", "w.bn.h5", "-o", "{}/w.csv", "-f"],
}
SIZES = (
    16,
    48,
    100,
    200,
    400,
)  # KB of 480 KB of data: writing fails in the header, the values, the index or the tail


def wide(rows: int, columns: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(1).standard_normal((rows, columns))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    x = np.random.default_rng(0).standard_normal((20_000, 3))
    save(folder / "x.npy", x)
    save_h5(folder / "plain.h5", x)
    save_h5(folder / "chunks.h5", x, chunks=(50, 3))
    save_h5(folder / "gzip.h5", x, chunks=(50, 3), compression="gzip")
    save_h5(folder / "lzf.h5", x, chunks=(50, 3), compression="lzf")
    with h5py.File(folder / "others.h5", "w") as file:
        file["x"], file["y"], file["more/z"] = x[:100], x[:10_000], np.arange(9)
    save(folder / "wide.npy", wide(4, 5000))
    good("fit", folder / "x.npy", "-o", folder / "s.bn.h5", "-q")
    good("fit", folder / "wide.npy", "-o", folder / "w.bn.h5", "-q")
    good("export", folder / "w.bn.h5", "-o", folder / "w.npz", "-q")
    return folder


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder with a small file system mounted, which is unmounted at the end."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "bn-test", tmp_path]).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def limits(args: list[str], folder: Path) -> list[str]:
    return [a.format(folder) for a in args]


def check_full(result: Outcome, folder: Path, out: str, words: str) -> bool:
    """Assert that a run succeeded, or failed with exit 74 and changed nothing; return whether it failed."""
    assert temporaries(folder) == []
    if result.code == 0:
        assert contents(folder)[out] != b"the old one"
        return False
    assert result.code == 74, result
    assert [line for line in result.err.splitlines() if "note:" not in line and "warning:" not in line] == [
        f"bn: error: {folder}/{out}: cannot be written: {words}; free some space or give another place with -o"
    ]
    assert contents(folder) == {out: b"the old one"}
    return True


@pytest.mark.parametrize("name", OUTPUTS)
def test_file_system_that_fills(data: Path, mounted: Path, zygote: Zygote, name: str) -> None:
    args = limits(OUTPUTS[name], mounted)
    out = os.path.basename(args[args.index("-o") + 1])
    full = 0
    for size in SIZES:
        subprocess.run(["mount", "-o", f"remount,size={size}k", mounted], check=True)
        (mounted / out).write_bytes(b"the old one")
        full += check_full(zygote.run([*args, "-q"], data), mounted, out, "No space left on device")
        (mounted / out).unlink()
    assert full >= 1
    subprocess.run(["mount", "-o", "remount,size=10m", mounted], check=True)
    assert zygote.run([*args, "-q"], data).code == 0
    check_whole(name, data, mounted / out, zygote)


def check_whole(name: str, data: Path, path: Path, zygote: Zygote) -> None:
    """Assert that the output equals one written to another file."""
    other = path.parent / ("other" + "".join(path.suffixes[-2:] if path.name.endswith(".bn.h5") else path.suffixes))
    args = [a.format(path.parent) for a in OUTPUTS[name]]
    args[args.index("-o") + 1] = str(other)
    assert zygote.run([*args, "-q"], data).code == 0
    if path.name.endswith(".bn.h5"):
        one, two = bncli.load(str(path)), bncli.load(str(other))
        assert one.running_mean.tobytes() == two.running_mean.tobytes()
    elif path.suffix == ".h5":
        with h5py.File(path) as one_file, h5py.File(other) as two_file:
            names: list[str] = []
            one_file.visit(names.append)
            for dataset in names:
                if isinstance(one_file[dataset], h5py.Dataset):
                    assert one_file[dataset][...].tobytes() == two_file[dataset][...].tobytes()
    else:
        assert len(path.read_bytes()) == len(other.read_bytes())


@pytest.mark.parametrize("name", OUTPUTS)
def test_limit_on_the_size_of_files(data: Path, tmp_path: Path, zygote: Zygote, name: str) -> None:
    """SIGXFSZ would end the process, but Python ignores it, so exceeding the limit is an OSError."""
    args = limits(OUTPUTS[name], tmp_path)
    out = os.path.basename(args[args.index("-o") + 1])
    full = 0
    for size in SIZES[:3]:
        (tmp_path / out).write_bytes(b"the old one")
        result = zygote.run([*args, "-q"], data, limit=size << 10)
        full += check_full(result, tmp_path, out, "File too large")
    assert full >= 1


@pytest.mark.parametrize("name", ["fit", "npy", "contiguous"])
def test_a_full_disk_is_detected_before_computing(data: Path, mounted: Path, zygote: Zygote, name: str) -> None:
    """The run fails before it reads a value that it would refuse."""
    x = table(20_000, 3) if name != "fit" else wide(4, 5000)
    x[-1, -1] = 1e300
    save(data / "bad.npy", x)
    save_h5(data / "bad.h5", x)
    subprocess.run(["mount", "-o", "remount,size=40k", mounted], check=True)
    source = "bad.h5" if name == "contiguous" else "bad.npy"
    args = ["fit", source, "-o", f"{mounted}/o.bn.h5"]
    if name != "fit":
        args = ["apply", "s.bn.h5", source, "-o", f"{mounted}/o{source[3:]}", "--dtype", "float32"]
    result = zygote.run(args, data)
    assert (result.code, "No space left" in result.err) == (74, True), result
    assert contents(mounted) == {}


def test_fit_continues_without_space_for_a_checkpoint(data: Path, mounted: Path) -> None:
    """The space of the output was reserved, so it can still be written."""
    save(data / "long.npy", wide(3000, 1000))
    subprocess.run(["mount", "-o", "remount,size=400k", mounted], check=True)
    args = ["fit", "long.npy", "-o", f"{mounted}/o.bn.h5", "--batch-size", "16"]
    done = subprocess.run([sys.executable, "-c", EAGER, *args], cwd=data, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("continues without a checkpoint") == 1
    assert contents(mounted).keys() == {"o.bn.h5"}
    with advised(*ANY_ADVICE), pytest.MonkeyPatch.context() as patch:
        patch.setattr("bncli.numerics.layout.PENDING_VALUES", 256)
        check_same_bytes(bncli.load(f"{mounted}/o.bn.h5"), bncli.fit(str(data / "long.npy"), batch_size=16))


@pytest.mark.parametrize("name", OUTPUTS)
def test_read_only_file_system(data: Path, mounted: Path, zygote: Zygote, name: str) -> None:
    args = limits(OUTPUTS[name], mounted)
    out = os.path.basename(args[args.index("-o") + 1])
    (mounted / out).write_bytes(b"the old one")
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    result = zygote.run(args, data)
    assert result.code == 74
    assert f"{out}: cannot be written: Read-only file system; give another place with -o" in result.err
    assert contents(mounted) == {out: b"the old one"}


def test_size_of_hdf5_outputs(data: Path, tmp_path: Path, zygote: Zygote) -> None:
    """Reserved space that was not used is released."""
    for name in ("npy to h5", "contiguous", "chunks"):
        assert zygote.run(limits(OUTPUTS[name], tmp_path), data).code == 0
        size = (tmp_path / "y.h5").stat().st_size
        assert 480_000 < size < 480_000 * 1.2
        with h5py.File(tmp_path / "y.h5") as file:
            assert next(iter(file.values())).shape == (20_000, 3)
