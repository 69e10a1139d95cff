"""Peak memory stays under 300 MB for files several times larger. The files are sparse: they take no disk."""

from __future__ import annotations

import math
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

LIMIT_MB = 300


def sparse_npy(path: Path, shape: tuple[int, ...], dtype: str, fortran: bool = False) -> None:
    """A .npy file of zeros that takes no space on disk, with a one at its first and last value."""
    dtype_ = np.dtype(dtype)
    with open(path, "wb") as file:
        descr = {"descr": dtype_.str, "fortran_order": fortran, "shape": shape}
        np.lib.format.write_array_header_1_0(file, descr)
        file.write(np.ones((), dtype_).tobytes())
        file.seek((math.prod(shape) - 2) * dtype_.itemsize, 1)
        file.write(np.ones((), dtype_).tobytes())


def peak_mb(*args: str) -> tuple[float, int]:
    """Peak resident size of `bn ARGS` in MB, and its exit code; measured by a process of its own."""
    code = (
        "import resource, subprocess, sys;"
        "done = subprocess.run([sys.executable, '-c', 'from bncli.cli import main; main()', *sys.argv[1:]]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode)"
    )
    out = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    peak, returncode = out.stdout.split()[-2:]
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # bytes there, KiB elsewhere
    return int(peak) * unit / 1e6, int(returncode)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((1_000_000, 256), "<f4", []),
        ((100_000_000, 1), "<f8", []),
        ((2_000, 100_000), "<f4", []),
        ((5_000, 3, 224, 224), "|u1", ["--axis", "1"]),
        ((1_000_000, 256), "<f4", ["--batch-size", "1000000"]),
        ((1_000_000, 256), "<f4", ["--shuffle"]),
        ((1, 2, 10_000, 10_000), "<f4", ["--axis", "1"]),
    ],
    ids=[
        "256 features",
        "one feature",
        "100,000 features",
        "images",
        "one batch of 1 GB",
        "shuffled",
        "one sample of 800 MB",
    ],
)
def test_fit_holds_little_of_a_large_file(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, options: list[str]
) -> None:
    data, out = tmp_path / "x.npy", tmp_path / "x.bn.h5"
    sparse_npy(data, shape, dtype)
    assert data.stat().st_size > 2.4 * LIMIT_MB * 1e6
    peak, code = peak_mb("fit", str(data), "-o", str(out), "-q", *options)
    assert code == 0
    assert peak < LIMIT_MB
    with h5py.File(out) as stats:
        axis = int(options[1]) if options[:1] == ["--axis"] else 1
        mean = stats["population/mean"][()]
        # one value of 1 in the first and in the last feature, zeros elsewhere
        expected = np.zeros(shape[axis])
        n = math.prod(shape) // shape[axis]
        expected[0] += 1 / n
        expected[-1] += 1 / n
        np.testing.assert_allclose(mean, expected, rtol=1e-14)


def test_fortran_order_and_apply_hold_little_of_a_large_file(tmp_path: Path) -> None:
    data, out, norm = tmp_path / "x.npy", tmp_path / "x.bn.h5", tmp_path / "norm.npy"
    sparse_npy(data, (1_000_000, 200), "<f4", fortran=True)
    peak, code = peak_mb("fit", str(data), "-o", str(out), "-q")
    assert code == 0
    assert peak < LIMIT_MB
    peak, code = peak_mb(
        "apply", str(out), str(data), "-o", str(norm), "--use", "population", "--dtype", "float16", "-q"
    )
    assert code == 0
    assert peak < LIMIT_MB
    first = np.load(norm, mmap_mode="r")[0, 0]
    expected = (1 - 1e-6) / math.sqrt(1e-6 * (1 - 1e-6) + 1e-5)  # a one among a million zeros, eps 1e-5
    assert first == pytest.approx(expected, rel=2e-3)  # float16


def constant(file: h5py.File) -> None:
    """A good file whose one chunk takes 64 MB, within the budget."""
    file.create_dataset("x", data=np.zeros((1 << 24, 1), "f4"), chunks=(1 << 24, 1), compression="gzip")


def small(file: h5py.File) -> None:
    file.create_dataset(
        "x", data=np.random.default_rng(1).normal(size=(50_000, 2)), chunks=(5_000, 2), compression="gzip"
    )


def bomb(file: h5py.File) -> None:
    """The same chunk inflates to 1 GB."""
    constant(file)
    stream = zlib.compressobj(9)
    pieces = [stream.compress(bytes(1 << 20)) for _ in range(1 << 10)]
    file["x"].id.write_direct_chunk((0, 0), b"".join([*pieces, stream.flush()]))


def much_is_missing(file: h5py.File) -> None:
    file.create_dataset("x", (10**15, 64), "f4", chunks=(100, 64))


def many_chunks(file: h5py.File) -> None:
    item = file.create_dataset("x", (10**6, 1), "f4", chunks=(1, 1), compression="gzip")
    for i in range(10_000):
        item.id.write_direct_chunk((i, 0), b"x")


@pytest.mark.parametrize(("bad", "good"), [(bomb, constant), (much_is_missing, small), (many_chunks, small)])
def test_files_that_claim_much_take_little(
    tmp_path: Path, bad: Callable[[h5py.File], None], good: Callable[[h5py.File], None]
) -> None:
    """No more than 1.2 times the peak of a good file: of the same chunks, or of much the same size."""
    peaks = {}
    for build, expected in ((good, 0), (bad, 3)):
        path = tmp_path / f"{build.__name__}.h5"
        with h5py.File(path, "w") as file:
            build(file)
        peaks[build], code = peak_mb("fit", str(path), "-o", str(tmp_path / "x.bn.h5"), "-q", "-f")
        assert code == expected
    assert peaks[bad] < 1.2 * peaks[good]
