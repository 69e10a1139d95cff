"""The fault campaign: every call that a run makes on its files fails once, or is where the process is killed.

    python tests/faults/campaign.py          every kind of error and kill, every command; prints how many faults came
    python tests/faults/campaign.py --strace the same from outside, on real system calls, where strace is installed

After an error the output is old (exit 3 or 74) or new (exit 0), and no temporary file is left. After a kill it is old
or new, and the next run ends with 0, the right output and nothing beside it.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import h5py
import numpy as np
from faults.inject import ERRORS, KILLS, KINDS
from faults.kills import numbers
from faults.zygote import Outcome, Zygote

from bncli import exchange
from bncli.errors import InputError

OLD = b"the old one"
PATHS = {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "OPENBLAS_NUM_THREADS": "1"}
FAST = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where a sync takes no time


@dataclass(frozen=True)
class Run:
    """A command whose files are broken: its arguments, its outputs, and settings of the child."""

    args: tuple[str, ...]
    outputs: tuple[str, ...]
    eager: int = 0
    resumed: bool = False  # there is a checkpoint to go on from
    careless: bool = False  # written in place, so that the campaign can be seen to fail


RUNS = {
    "fit": Run(("fit", "x.npy", "-o", "o.bn.h5", "-f"), ("o.bn.h5",)),
    "fit h5": Run(("fit", "x.h5", "-o", "o.bn.h5", "-f"), ("o.bn.h5",)),
    "checkpoint": Run(("fit", "x.npy", "-o", "o.bn.h5", "-f", "--batch-size", "64"), ("o.bn.h5",), eager=32),
    "resume": Run(("fit", "x.npy", "-o", "o.bn.h5", "-f", "--batch-size", "64"), ("o.bn.h5",), eager=32, resumed=True),
    "learn": Run(("fit", "y.npy", "--target", "t.npy", "--epochs", "2", "-o", "o.bn.h5", "-f"), ("o.bn.h5",), eager=32),
    "apply npy": Run(("apply", "s.bn.h5", "x.npy", "-o", "o.npy", "-f"), ("o.npy",)),
    "apply gzip": Run(("apply", "s.bn.h5", "x.h5", "-o", "o.h5", "-f"), ("o.h5",)),
    "apply plain": Run(("apply", "s.bn.h5", "x.npy", "-o", "o.h5", "-f"), ("o.h5",)),
    "apply others": Run(("apply", "s.bn.h5", "others.h5::x", "-o", "o.h5", "-f", "--copy-others"), ("o.h5",)),
    "folder": Run(("apply", "s.bn.h5", "x.npy", "y.npy", "-o", "out/"), ("out/x.npy", "out/y.npy")),
    "merge": Run(("merge", "s.bn.h5", "s.bn.h5", "-o", "o.bn.h5", "-f"), ("o.bn.h5",)),
    "import": Run(("import", "s.npz", "-o", "o.bn.h5", "-f"), ("o.bn.h5",)),
    "npz": Run(("export", "s.bn.h5", "-o", "o.npz", "-f"), ("o.npz",)),
    "csv": Run(("export", "s.bn.h5", "-o", "o.csv", "-f"), ("o.csv",)),
    "json": Run(("export", "s.bn.h5", "-o", "o.json", "-f"), ("o.json",)),
}


def make_data(folder: Path, zygote: Zygote) -> None:
    x = np.random.default_rng(0).standard_normal((1500, 3)).astype("f4")
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", x[:99])
    np.save(folder / "t.npy", (x[:99, 0] > 0).astype("i4"))
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=(100, 3), compression="gzip")
    with h5py.File(folder / "others.h5", "w") as file:
        file["x"], file["z"] = x, np.arange(5000)
    for args in (["fit", "x.npy", "-o", "s.bn.h5"], ["export", "s.bn.h5", "-o", "s.npz"]):
        assert zygote.run(args, folder).code == 0


class Bench:
    """One run in a folder of its own, from the same state every time."""

    def __init__(self, folder: Path, run: Run, zygote: Zygote) -> None:
        self.folder, self.run, self.zygote = folder, run, zygote
        self.settings: dict[str, Any] = {"eager": run.eager, "careless": run.careless}
        self.checkpoint = folder / "o.bn.h5.checkpoint"
        self.kept = self._first_checkpoint() if run.resumed else b""
        self.reset()
        self.inputs = self._contents()
        assert self.attempt(None).code == 0
        self.expected = [meaning(folder / name) for name in run.outputs]
        self.reset()

    def attempt(self, fault: dict[str, Any] | None, *more: str) -> Outcome:
        return self.zygote.run(self.arguments(*more), self.folder, fault, **self.settings)

    def arguments(self, *more: str) -> list[str]:
        more = (*more, *(["--resume"] * self.run.resumed), *(["-j", "1"] * (self.run.args[0] in ("fit", "apply"))))
        return [*self.run.args, *more, "-q"]

    def reset(self) -> None:
        """Bring back the state before the run."""
        for path in self._left():
            path.unlink()
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        self.checkpoint.unlink(missing_ok=True)
        if self.kept:
            self.checkpoint.write_bytes(self.kept)
        for name in self.run.outputs:
            if "/" not in name:
                (self.folder / name).write_bytes(OLD)

    def check_error(self, seen: Outcome, kind: str) -> None:
        """After an error: exit 0 with the new output, else the old one; nothing is left."""
        states = self._states()
        assert seen.code in (0, 3, 74), seen
        assert "Traceback" not in seen.err
        assert "internal error" not in seen.err
        assert seen.err.count("bn: error: ") == (seen.code != 0), seen
        if seen.code == 0:
            assert set(states) == {"new"}, (states, seen)
            assert not self.checkpoint.exists() or kind == "unlink"
        elif "is written, but" in seen.err:  # the folder could not be synced
            assert set(states) == {"new"}, (states, seen)
        elif "before it are written" in seen.err:  # several outputs, and a renaming failed
            assert set(states) == {"old", "new"}, (states, seen)
        else:
            assert set(states) == {"old"}, (states, seen)
        assert not self._left() or kind == "unlink", (self._left(), seen)
        self._check_inputs()

    def check_kill(self, seen: Outcome) -> None:
        """After a kill: old or new; the next run ends well and leaves nothing."""
        assert seen.code == -9, seen
        assert set(self._states()) <= {"old", "new"}
        self._check_inputs()
        again = self.attempt(None, *(["--resume"] if self.run.args[0] == "fit" else ["-f"]))
        assert again.code == 0, again
        assert set(self._states()) == {"new"}
        assert not self._left()
        assert not self.checkpoint.exists()

    def _first_checkpoint(self) -> bytes:
        seen = self.zygote.run(
            [*self.run.args, "-q", "-j", "1"],
            self.folder,
            {"kind": "replace", "at": 4, "how": "before"},
            **self.settings,
        )
        assert seen.code == -9
        return self.checkpoint.read_bytes()

    def _states(self) -> list[str]:
        return [self._state(self.folder / name, new) for name, new in zip(self.run.outputs, self.expected, strict=True)]

    def _state(self, path: Path, new: object) -> str:
        if not path.exists():
            return "old" if "/" in str(path.relative_to(self.folder)) else "gone"
        if path.read_bytes() == OLD:
            return "old"
        try:
            return "new" if meaning(path) == new else "torn"
        except InputError:
            return "unreadable"

    def _left(self) -> list[Path]:
        return [p for p in self.folder.rglob("*") if p.name.endswith(".tmp")]

    def _contents(self) -> dict[str, bytes]:
        outputs = {self.folder / name for name in self.run.outputs} | {self.checkpoint, *self._left()}
        return {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file() and p not in outputs}

    def _check_inputs(self) -> None:
        assert self._contents() == self.inputs


def meaning(path: Path) -> object:
    """What a file says, without the time at which it was written."""
    if path.name.endswith(".bn.h5"):
        return numbers(path)
    if path.suffix in (".npz", ".csv", ".json"):  # a whole one holds every number
        stats = exchange.read(str(path))
        return [getattr(stats, name).tobytes() for name in ("running_mean", "running_var", "gamma", "beta")]
    return path.read_bytes()


def faults(hows: Sequence[str], kinds: Sequence[str] = KINDS) -> Iterator[tuple[str, str]]:
    for kind in kinds:
        for how in hows:
            if how != "half" or kind == "write":
                yield kind, how


def campaign(name: str, folder: Path, zygote: Zygote, hows: Sequence[str], stride: int = 1) -> Counter[str]:
    """Break every `stride`-th call of every kind in every way; returns how many faults came, by kind."""
    bench, count = Bench(folder, RUNS[name], zygote), Counter[str]()
    for kind, how in faults(hows):
        for at in range(1, 100_000, stride):
            seen = bench.attempt({"kind": kind, "at": at, "how": how})
            if not seen.hit:
                bench.reset()
                break
            count[kind] += 1
            judge(bench, seen, name, how, kind, at)
    return count


def judge(bench: Bench, seen: Outcome, name: str, how: str, call: str, at: int) -> None:
    """Assert that what a fault left is as promised, naming the fault where it is not; then begin anew."""
    try:
        if how in KILLS:
            bench.check_kill(seen)
        else:
            bench.check_error(seen, call)
    except AssertionError as error:
        raise AssertionError(f"{name}: {how} at {call} {at}: {seen}\n{error}") from error
    bench.reset()


# system calls in the order in which a run meets them; those that touch the folder are broken
CALLS = (
    "openat", "close", "read", "pread64", "preadv", "flock", "fallocate", "ftruncate", "write", "pwrite64", "chmod", "fsync",
    "rename", "unlink",
)  # fmt: skip


def strace(folder: Path, args: Sequence[str], log: str, *more: str) -> Outcome:
    """Run bn under strace."""
    command = ["strace", "-f", "-y", "-o", log, "-e", f"trace={','.join(CALLS)}", *more, sys.executable, "-m", "bncli"]
    done = subprocess.run([*command, *args], cwd=folder, capture_output=True, text=True, env=os.environ | PATHS)
    code = done.returncode if done.returncode < 128 else -(done.returncode - 128)
    return Outcome(code, done.stdout, done.stderr, hit=True)


def places(folder: Path, args: Sequence[str]) -> dict[str, list[int]]:
    """For every system call, which of those that the main thread makes touch the folder: [3, 5] is its third and fifth."""
    found: dict[str, list[int]] = {name: [] for name in CALLS}
    with tempfile.NamedTemporaryFile("r") as log:
        assert strace(folder, args, log.name).code == 0
        lines = [line.split(maxsplit=1) for line in log]
    main, counts, begun = lines[0][0], Counter[str](), False
    for pid, text in lines:
        name = text.split("(")[0]
        if pid == main and name in found:
            counts[name] += 1
            text = re.sub("AT_FDCWD<[^>]*>", "", text)
            begun = begun or any(
                f'"{arg}"' in text for arg in args
            )  # before the first input Python itself looks around
            if begun and (str(folder) in text or re.search(r'openat\(, "[^/]', text)):
                found[name].append(counts[name])
    return found


def from_outside(name: str, folder: Path, zygote: Zygote, hows: Sequence[str], most: int = 10**6) -> Counter[str]:
    """Break up to `most` real system calls of each kind; returns how many faults came, by kind."""
    bench, count = Bench(folder, RUNS[name], zygote), Counter[str]()
    args = bench.arguments()
    where = places(folder, args)
    bench.reset()
    for call, how in itertools.product(CALLS, hows):
        for at in where[call][:most]:
            effect = "signal=KILL" if how in KILLS else f"error={how}"
            seen = strace(folder, args, os.devnull, "-e", f"inject={call}:{effect}:when={at}")
            count[call] += 1
            judge(bench, seen, name, how, call, at)
    return count


def main() -> None:
    outside = "--strace" in sys.argv
    runs = [run for run in sys.argv[1:] if run in RUNS] or list(RUNS)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=FAST) as name, Zygote() as zygote:
        make_data(Path(name), zygote)
        for run in runs:
            if outside:
                count = from_outside(run, Path(name), zygote, ("EIO", "before")) if not RUNS[run].eager else Counter()
            else:
                count = campaign(run, Path(name), zygote, (*ERRORS, "half", *KILLS))
            total += count
            print(f"{run}: {sum(count.values())} faults: {dict(count)}", flush=True)
    print(f"{sum(total.values()):,} faults: no torn file, no exit of 0 without the new output, nothing left behind")


if __name__ == "__main__":
    main()
