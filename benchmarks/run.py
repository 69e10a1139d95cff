"""Time bn side by side with peers: python benchmarks/run.py [--quick] [--only NAME]

All programs of a task take turns, for several rounds, on a large and on a small file of the same kind; the small file's
time is subtracted, which removes start-up. Printed are medians and ratios, and how far each population variance is from
the exact one. Data is made in a temporary folder and stays in the page cache. A peer that is not installed is skipped
with a note. The bncli that is measured and its kernel are printed first; a kernel that does not match its label is an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

PYTHON = sys.executable
BN = [PYTHON, "-m", "bncli"]
BATCHES = """
import sys, numpy as np
x = np.load(sys.argv[1], mmap_mode="r")
"""
# each prints its population variance, where it has one, as JSON
NUMPY_LOOP = (
    BATCHES
    + """
r = v = 0.0
axes = tuple(i for i in range(x.ndim) if i != int(sys.argv[2]))
for i in range(0, len(x), 256):
    b = x[i : i + 256]
    r, v = 0.9 * r + 0.1 * b.mean(axes), 0.9 * v + 0.1 * b.var(axes)
"""
)
PARTIAL_FIT = (
    BATCHES
    + """
import json
from sklearn.preprocessing import StandardScaler
s = StandardScaler()
for i in range(0, len(x), 1024):
    s.partial_fit(x[i : i + 1024])
print(json.dumps(s.var_.tolist()))
"""
)
DASK = """
import json, sys, numpy as np, dask.array as da
x = da.from_array(np.load(sys.argv[1], mmap_mode="r"), chunks=(65536, -1))
mean, var = da.compute(x.mean(0), x.var(0))
print(json.dumps(var.tolist()))
"""
TORCH = (
    BATCHES
    + """
import torch
torch.set_num_threads(2)
kind = torch.nn.BatchNorm1d if x.ndim == 2 else torch.nn.BatchNorm2d
layer = kind(x.shape[1]).train()
with torch.no_grad():
    for i in range(0, len(x), 256):
        layer(torch.from_numpy(np.array(x[i : i + 256])).float())
"""
)
H5PY_LOOP = """
import sys, h5py
with h5py.File(sys.argv[1]) as f:
    d, r, v = f["x"], 0.0, 0.0
    for i in range(0, len(d), 256):
        b = d[i : i + 256]
        r, v = 0.9 * r + 0.1 * b.mean(0), 0.9 * v + 0.1 * b.var(0)
"""
# per epoch, with the data in memory
TORCH_TRAINING = """
import sys, h5py, torch
torch.set_num_threads(2)
with h5py.File(sys.argv[1]) as f:
    x, y = torch.from_numpy(f["x"][()]), torch.from_numpy(f["y"][()])
net = torch.nn.Sequential(torch.nn.BatchNorm1d(x.shape[1]), torch.nn.Sigmoid(), torch.nn.Linear(x.shape[1], 10))
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
for epoch in range(int(sys.argv[2])):
    order = torch.randperm(len(x))
    for i in range(0, len(x), 256):
        rows = order[i : i + 256]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
"""
COPY = 'cp "$0" "$0.copy" && sync "$0.copy"'


@dataclass
class Task:
    """One kind of work: its data, the commands that do it (FILE stands for the data), and the one that ratios are to."""

    name: str
    make: Callable[[Path, int], None]
    samples: int
    runners: dict[str, list[str]]
    base: str
    small: int = 16
    suffix: str = ".npy"
    once: tuple[str, ...] = ()  # slow ones, which run in the first round only


def save_npy(shape: tuple[int, ...], dtype: str) -> Callable[[Path, int], None]:
    """Write a .npy file of values about 100 with sd 20; `shape` is that of a sample."""

    def make(path: Path, samples: int) -> None:
        rng = np.random.default_rng(0)
        with open(path, "wb") as file:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (samples, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, samples, 4096):
                count = min(4096, samples - first)
                values = rng.standard_normal((count, *shape), np.float32) * 20 + 100
                file.write(values.clip(0, 255).astype(dtype).tobytes())

    return make


def save_hdf5(chunk_rows: int) -> Callable[[Path, int], None]:
    """Write an HDF5 file of (N, 256) float32, gzip-4 and shuffle."""

    def make(path: Path, samples: int) -> None:
        rng = np.random.default_rng(0)
        with h5py.File(path, "w") as file:
            chunks = (min(chunk_rows, samples), 256)
            dataset = file.create_dataset("x", (samples, 256), "f4", chunks=chunks, compression=4, shuffle=True)
            for first in range(0, samples, 16384):
                count = min(16384, samples - first)
                dataset[first : first + count] = rng.standard_normal((count, 256), np.float32)

    return make


def save_labeled(path: Path, samples: int) -> None:
    """Write an HDF5 file of (N, 256) float32 in 10 classes, x, and their labels, y."""
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=samples)
    centers = rng.standard_normal((10, 256), np.float32) / 4
    with h5py.File(path, "w") as file:
        file["x"] = centers[labels] + rng.standard_normal((samples, 256), np.float32)
        file["y"] = labels


def bn(*options: str, workers: int = 2, kernel: str = "") -> list[str]:
    """A bn fit with this many workers; kernel "numpy" selects the NumPy kernel."""
    prefix = ["env", f"BN_KERNEL={kernel}"] if kernel else []
    return [*prefix, *BN, "fit", "FILE", "-q", "-f", "-o", "OUT.bn.h5", "-j", str(workers), *options]


def peer(code: str, *packages: str, arguments: tuple[str, ...] = ()) -> list[str]:
    """A peer's command, or an empty one where a package is missing."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        print(f"{', '.join(missing)} not installed: skipped", file=sys.stderr)
        return []
    return [PYTHON, "-c", code, "FILE", *arguments]


def tasks(scale: float) -> list[Task]:
    """All tasks; `scale` shrinks the data."""

    def size(samples: int) -> int:
        return max(4096, int(samples * scale))

    both = {"bn -j 2": bn(), "bn -j 1": bn(workers=1), "bn -j 2, NumPy kernel": bn(kernel="numpy")}
    both["bn -j 1, NumPy kernel"] = bn(workers=1, kernel="numpy")
    axis1 = {"bn -j 2": bn("--axis", "1"), "bn -j 2, NumPy kernel": bn("--axis", "1", kernel="numpy")}
    cat = {"cat": ["cat", "FILE"]}
    found = [
        Task(
            "fit (N, 256) float32 .npy",
            save_npy((256,), "f4"),
            size(1 << 20),
            cat
            | both
            | {"torch BatchNorm1d, 2 threads": peer(TORCH, "torch")}
            | {"NumPy loop": peer(NUMPY_LOOP, arguments=("1",))}
            | {"scikit-learn partial_fit": peer(PARTIAL_FIT, "sklearn"), "dask.array": peer(DASK, "dask")},
            "cat",
        ),
        Task("fit (N, 4) float32 .npy", save_npy((4,), "f4"), size(1 << 26), cat | both, "cat"),
        *(
            Task(
                f"fit (N, 3, 64, 64) {dtype} .npy",
                save_npy((3, 64, 64), dtype),
                size(samples),
                axis1 | {"torch BatchNorm2d, 2 threads": peer(TORCH, "torch")},
                "bn -j 2",
                small=8,
            )
            for dtype, samples in (("float32", 20_000), ("uint8", 40_000))
        ),
    ]
    loop = {"h5py and NumPy loop": peer(H5PY_LOOP)}
    for rows, once in ((1024, ()), (16384, tuple(loop))):  # the loop decompresses each large chunk 64 times
        name = f"fit gzip-4 and shuffle, chunks ({rows}, 256)"
        task = Task(name, save_hdf5(rows), size(1 << 19), both | loop, "bn -j 2", small=8, suffix=".h5", once=once)
        found.append(task)
    epochs = 8
    learn = ("--target", "::/y", "--epochs", str(epochs))
    runners = {"bn -j 2": bn(*learn), "bn -j 1": bn(*learn, workers=1)}
    runners["bn -j 2, NumPy kernel"] = bn(*learn, kernel="numpy")
    runners["torch, 2 threads"] = peer(TORCH_TRAINING, "torch", arguments=(str(epochs),))
    name = f"learn from (N, 256) float32 and 10 classes, {epochs} epochs"
    found.append(Task(name, save_labeled, size(1 << 16), runners, "torch, 2 threads", suffix=".h5"))
    apply = [*BN, "apply", "STATS", "FILE", "-q", "-f", "-o", "OUT.npy"]
    runners = {"cp and sync": ["sh", "-c", COPY, "FILE"], "bn apply -j 2": [*apply, "-j", "2"]}
    found.append(Task("apply (N, 256) float32 .npy", save_npy((256,), "f4"), size(1 << 20), runners, "cp and sync"))
    return found


def seconds(command: list[str], path: Path) -> float:
    """Wall time of one run."""
    stats, out = path.with_suffix(".stats"), path.with_name("out")
    words = {"FILE": str(path), "STATS": str(stats), "OUT.npy": f"{out}.npy", "OUT.bn.h5": f"{out}.bn.h5"}
    command = [words.get(word, word) for word in command]
    if str(stats) in command and not stats.exists():
        subprocess.run([*BN, "fit", str(path), "-q", "-o", str(stats)], check=True)
    for earlier in (Path(f"{out}.npy"), Path(f"{path}.copy")):  # freeing its space takes time that is not the command's
        earlier.unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def run(task: Task, rounds: int) -> None:
    """Run one task and print its table."""
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, "large" + task.suffix), Path(folder, "small" + task.suffix)
        task.make(large, task.samples)
        task.make(small, task.samples // task.small)
        os.sync()  # so that no writing of data goes on while commands are timed
        size = large.stat().st_size - small.stat().st_size
        runners = {name: command for name, command in task.runners.items() if command}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for number in range(rounds):
            for name, command in runners.items():
                if not (number and name in task.once):
                    times[name].append(seconds(command, large) - seconds(command, small))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n{task.name}: {size / 2**20:,.0f} MiB on disk, {rounds} rounds")
    print(f"  {'':30}{'seconds':>9}{'GB/s':>8}   time over {task.base}")
    for name, median in medians.items():
        print(f"  {name:30}{median:9.3f}{size / median / 1e9:8.2f}{median / medians[task.base]:10.2f}")


def start_up(rounds: int) -> None:
    """Print how long bn takes to begin."""
    with tempfile.TemporaryDirectory() as folder:
        data, stats = Path(folder, "x.npy"), Path(folder, "x.bn.h5")
        np.save(data, np.random.default_rng(0).standard_normal((1000, 30)))
        subprocess.run([*BN, "fit", str(data), "-q", "-o", str(stats)], check=True)
        pairs = [
            ("bn inspect", [*BN, "inspect", str(stats)], "import numpy, h5py"),
            ("bn --help", [*BN, "--help"], "import click"),
        ]
        print(f"\nstart-up, {3 * rounds} rounds")
        for name, command, imports in pairs:
            other = [PYTHON, "-c", imports]
            ours, theirs = ([seconds(c, data) for _ in range(3 * rounds)] for c in (command, other))
            ratio = statistics.median(ours) / statistics.median(theirs)
            print(f"  {name:30}{statistics.median(ours):9.3f}{ratio:8.2f} times python -c '{imports}'")


def accuracy() -> None:
    """Print how far each population variance is from the exact one, on float32 data with mean 10,000 and sd 0.1."""
    from fractions import Fraction

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.npy")
        x = (np.random.default_rng(0).standard_normal((20_000, 3)) * 0.1 + 1e4).astype(np.float32)
        np.save(path, x)
        exact = []
        for column in x.T.astype(float).tolist():
            values = [Fraction(v) for v in column]
            mean = sum(values) / len(values)
            exact.append(sum((v - mean) ** 2 for v in values) / len(values))
        found = {"NumPy float32 var": x.var(axis=0).tolist()}
        done = subprocess.run([*BN, "fit", str(path), "--json", "-o", f"{folder}/s"], capture_output=True, text=True)
        found["bn"] = [f["population_var"] for f in json.loads(done.stdout)["features"]]
        for name, code, package in (("scikit-learn", PARTIAL_FIT, "sklearn"), ("dask.array", DASK, "dask")):
            if importlib.util.find_spec(package):
                out = subprocess.run([PYTHON, "-c", code, str(path)], capture_output=True, text=True, check=True)
                found[name] = json.loads(out.stdout)
    print("\naccuracy: worst relative error of the variance, float32 with mean 10,000 and sd 0.1")
    for name, values in found.items():
        worst = max(abs(float((Fraction(v) - e) / e)) for v, e in zip(values, exact, strict=True))
        print(f"  {name:30}{worst:9.1e}")


def check_kernels() -> None:
    """Print which bncli is measured; exit where it would compute with another kernel than its label says."""
    where = subprocess.run([PYTHON, "-c", "import bncli; print(bncli.__file__)"], capture_output=True, text=True)
    if where.returncode:
        sys.exit(f"bncli cannot be imported: {where.stderr.strip().splitlines()[-1]}")
    for label, kernel, asked in (("bn", "c", {}), ("bn, NumPy kernel", "numpy", {"BN_KERNEL": "numpy"})):
        environment = {k: v for k, v in os.environ.items() if k != "BN_KERNEL"} | asked
        done = subprocess.run([*BN, "doctor", "--json"], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr.strip())
        found = json.loads(done.stdout)
        if found["kernel"] != kernel:
            sys.exit(f"{label!r} would run the kernel {found['kernel']}: {found['kernel_note']}")
        print(f"{label}: bncli {found['bncli']}, kernel {kernel}, from {Path(where.stdout.strip()).parent}")
    os.environ.pop("BN_KERNEL", None)  # so that every command runs with the kernel that its label names


def main() -> None:
    """Run the tasks asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small data and one round: under a minute, not for judging"
    )
    parser.add_argument("--only", metavar="NAME", default="", help="only the tasks whose name contains this")
    options = parser.parse_args()
    check_kernels()
    rounds = 1 if options.quick else 5
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, NumPy {np.__version__}, h5py {h5py.__version__}")
    for task in tasks(1 / 64 if options.quick else 1):
        if options.only in task.name:
            run(task, rounds)
    if not options.only:
        start_up(rounds)
        accuracy()


if __name__ == "__main__":
    main()
