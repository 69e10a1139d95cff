"""Time bn side by side with peers: python benchmarks/run.py [--quick]

Every contestant runs on a small and on a large file of the same kind, in turn for several rounds; start-up is taken out
by subtracting the small file's time. Printed are medians, the rate, and the ratio to `cat FILE > /dev/null`. The files are
float32 of shape (N, 256) with mean 3 and sd 1, written to a temporary folder, and stay in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FEATURES = 256
NUMPY_LOOP = """
import sys, numpy as np
x, r, v = np.load(sys.argv[1], mmap_mode="r"), 0, 0
for i in range(0, len(x), 256):
    b = x[i : i + 256]
    r, v = 0.9 * r + 0.1 * b.mean(0), 0.9 * v + 0.1 * b.var(0)
"""
PARTIAL_FIT = """
import sys, numpy as np
from sklearn.preprocessing import StandardScaler
x, s = np.load(sys.argv[1], mmap_mode="r"), StandardScaler()
for i in range(0, len(x), 1024):
    s.partial_fit(x[i : i + 1024])
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def contestants(out: Path) -> dict[str, list[str]]:
    """Name -> command; the file's name is appended."""
    python = sys.executable
    found = {
        "cat": ["cat"],
        "bn fit": [python, "-c", "from bncli.cli import main; main()", "fit", "-q", "-f", "-o", str(out)],
        "NumPy loop (the origin's)": [python, "-c", NUMPY_LOOP],
    }
    try:
        import sklearn  # noqa: F401 - only whether it is there

        found["scikit-learn partial_fit"] = [python, "-c", PARTIAL_FIT]
    except ImportError:
        print("scikit-learn is not installed: left out", file=sys.stderr)
    return found


def write_data(path: Path, samples: int) -> None:
    """A .npy file of normal values."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (samples, FEATURES)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, samples, 1 << 16):
            count = min(1 << 16, samples - first)
            file.write((rng.standard_normal((count, FEATURES), np.float32) + 3).tobytes())


def seconds(command: list[str], path: Path) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL, env=os.environ | ONE_THREAD)
    return time.perf_counter() - start


def main() -> None:
    """Make the data, run everybody in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller files and fewer rounds: under a minute")
    quick = parser.parse_args().quick
    samples, rounds = (1 << 17, 3) if quick else (1 << 20, 7)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small.npy"), Path(folder, "large.npy")
        write_data(small, samples // 16)
        write_data(large, samples)
        size = large.stat().st_size - small.stat().st_size
        runners = contestants(Path(folder, "out.bn.h5"))
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, command in runners.items():
                times[name].append(seconds(command, large) - seconds(command, small))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"float32 .npy of {size / 2**30:.2f} GiB in the page cache, one thread each, {rounds} rounds\n")
    print(f"{'':28}{'seconds':>9}{'GB/s':>8}{'× cat':>8}")
    for name, median in medians.items():
        print(f"{name:28}{median:9.3f}{size / median / 1e9:8.2f}{median / medians['cat']:8.1f}")


if __name__ == "__main__":
    main()
