"""Threads, processes and dask side by side: `bncli.fit` of one .npy file of float32, two workers each.

    python benchmarks/engines.py [--gib 4] [--rounds 5]

Needs dask.distributed. The scheduler and its workers are started first, and everything is imported: the start of Python is
left out. Dask's workers are processes with nannies on the loopback interface. Prints medians and ratios to threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings

import numpy as np

import bncli


def make(path: str, gib: float) -> None:
    """Write (N, 256) float32, a part at a time."""
    rows = int(gib * 2**30) // 1024
    values = np.random.default_rng(0).standard_normal((1 << 16, 256), np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 256))
    for first in range(0, rows, len(values)):
        out[first : first + len(values)] = values[: rows - first]
    out.flush()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore", bncli.errors.BnWarning)
    from distributed import LocalCluster

    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
    ):
        path = os.path.join(folder, "x.npy")
        make(path, given.gib)
        engines = ("threads", f"dask:{cluster.scheduler_address}", "processes")
        times: dict[str, list[float]] = {on: [] for on in engines}
        for lap in range(given.rounds + 1):
            for on in engines:
                start = time.perf_counter()
                bncli.fit(path, on=on, workers=2)
                if lap:  # the first warms up: workers import bncli, and the file comes into the page cache
                    times[on].append(time.perf_counter() - start)
        print(f"bncli {bncli.__version__}, fit of {given.gib:g} GiB, two workers, medians of {given.rounds} rounds")
        one = statistics.median(times["threads"])
        for on, found in times.items():
            took = statistics.median(found)
            print(f"{on.partition(':')[0]:>10} {took:7.3f} s {took / one:6.2f} x")


if __name__ == "__main__":
    main()
