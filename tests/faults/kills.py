"""SIGKILL at random moments of a fit, then --resume, until it is done: the numbers must be those of a quiet run.

    python tests/faults/kills.py 100

kills a hundred times, prints every tenth and ends with 1 at the first number that differs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from bncli.stats import container

# bn with small segments and a checkpoint after each, so that little data gives many moments
EAGER = """
import sys
from bncli.system import shutdown
shutdown.process.watch()  # before NumPy starts threads, as the real entry does
shutdown.process.watch = lambda: None
from bncli.numerics import layout
from bncli.engine import checkpoint
checkpoint.EVERY = checkpoint.SHARE = 0
layout.PENDING_VALUES = 256
sys.argv[0] = "bn"
from bncli.__main__ import main
main()
"""
RUNS = {
    "npy": ["x.npy", "--momentum", "0.99", "--batch-size", "64"],
    "gzip": ["x.h5", "--momentum", "0.9", "--batch-size", "50", "--nan", "omit", "--ddof", "1"],
    "learn": ["y.npy", "--target", "t.npy", "--epochs", "3", "--holdout", "0.1", "--batch-size", "64"],
    "shuffle": ["x.npy", "--shuffle", "--seed", "7", "--batch-size", "64"],
    "two": ["x.npy", "y.npy", "--momentum", "none", "--batch-size", "100", "--rows", "10:"],
}


def make_data(folder: Path) -> None:
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((120_000, 5)) * [1, 3, 10, 1e-3, 0] + [1, 2, 3, 1e4, 0.1]).astype("f4")
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", x[:9_999, ::-1].astype("f8"))
    np.save(folder / "t.npy", (x[:9_999, 4] > x[:9_999, 0]).astype("i4"))
    x[::11, 2] = np.nan
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=(1000, 5), compression="gzip")


def numbers(path: Path) -> dict[str, bytes | str]:
    """All that a stats file holds, as bytes, but where it comes from and when."""
    arrays, attributes = container.unpack(path.read_bytes(), str(path))
    plain = {name: repr(value) for name, value in attributes.items() if name != "provenance"}
    return {name: values.tobytes() for name, values in arrays.items()} | plain


@dataclass
class Killed:
    """How a run went: kills, the ones before anything was kept, and runs that went on from a checkpoint."""

    kills: int = 0
    early: int = 0
    continued: int = 0


def eager(folder: Path, args: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", EAGER, *args], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def fit_killed(folder: Path, run: str, chance: random.Random, most: int) -> Killed:
    """Fit, killed up to `most` times and resumed each time; asserts the numbers and what is left in the folder."""
    args = ["fit", *RUNS[run], "-o", "out.bn.h5", "-f", "-j", str(chance.choice([1, 2]))]
    start = time.monotonic()
    quiet = eager(folder, args)
    said = quiet.communicate()[1]
    assert quiet.returncode == 0, said
    whole, expected = time.monotonic() - start, numbers(folder / "out.bn.h5")
    (folder / "out.bn.h5").unlink()
    before = {p.name for p in folder.iterdir()}
    seen = Killed()
    while True:
        process = eager(folder, [*args, "--resume"])
        if seen.kills < most:
            time.sleep(chance.uniform(0, whole))
            process.send_signal(signal.SIGKILL)
        err = process.communicate()[1].decode()
        seen.continued += "continues from" in err
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        seen.kills += 1
        seen.early += not (folder / "out.bn.h5.checkpoint").exists()
        if (folder / "out.bn.h5").exists():  # killed between the renaming and the end
            assert numbers(folder / "out.bn.h5") == expected
    found = numbers(folder / "out.bn.h5")
    assert found == expected, f"{run}: numbers differ after {seen.kills} kills"
    assert {p.name for p in folder.iterdir()} == before | {"out.bn.h5"}
    (folder / "out.bn.h5").unlink()
    return seen


def main(count: int, seed: int = 1) -> None:
    """Kill until `count` is reached: half of the runs once, half of them again and again."""
    chance, total, results = random.Random(seed), Killed(), 0
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name))
        while total.kills < count:
            seen = fit_killed(Path(name), chance.choice(list(RUNS)), chance, chance.choice([1, 8]))
            total.kills, total.early, total.continued = (
                total.kills + seen.kills,
                total.early + seen.early,
                total.continued + seen.continued,
            )
            results += 1
            print(f"{total.kills} kills, {results} results, all the same", flush=True)
    print(
        f"{total.kills} kills ({total.early} before a checkpoint), {total.continued} runs continued, {results} results the same"
    )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parent.parent.parent))
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
