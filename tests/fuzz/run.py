"""Damage valid files in seeded ways and run bn on each, in a child with limits on memory and time.

    python tests/fuzz/run.py --count 100000 --seed 1
    python tests/fuzz/run.py --count 1500 --seed 1 --kinds texts,same-named,netcdf,exchange,torch

Allowed are the right numbers, or a refusal with a documented exit code in one or two lines. Right are the numbers of
the original; where bn accepts a damaged file and finds others, right is what another reader (NumPy, h5py) finds in
the same bytes, computed in exact fractions. A header that was changed into another valid header is another file: that
cannot be told from its bytes. In stats files no other number is right, nor in stored values that are under a checksum.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers
from fuzz import kinds
from fuzz.mutations import ATTRIBUTE_KINDS, FIRST_KINDS, KINDS, Original, mutated, originals

import bncli
from bncli import cli

for module in Path(bncli.__file__).parent.rglob("*.py"):  # loaded once, not in every child
    if module.stem not in ("__main__", "__init__", "onnx"):
        importlib.import_module(
            ".".join(("bncli", *module.relative_to(Path(bncli.__file__).parent).with_suffix("").parts))
        )

DOCUMENTED = {0, 2, 3, 4, 5, 74}  # 70 is a bug
CPU_SECONDS, WALL_SECONDS = 4, 60
ADDRESS_BYTES = 1 << 30  # more than a child has when it begins
BUDGET_KB = 16 << 10  # --max-memory
COMMANDS = {
    "npy": (["fit", "{}", "--json"], ["fit", "{}", "--json"], ["apply", "good.bn.h5", "{}", "-o", "out.npy"], ["ls", "{}"]),
    "hdf5": (["fit", "{}", "--json"], ["fit", "{}::/g/x", "--json"], ["fit", "{}::/g/x", "--json", "--names", "{}::/g/names"],
             ["apply", "good.bn.h5", "{}::/g/x", "-o", "out.npy"], ["apply", "good.bn.h5", "{}::/g/x", "-o", "out.h5", "--copy-others"],
             ["ls", "{}"]),
    "stats": (["inspect", "{}", "--json"], ["apply", "{}", "good.npy", "-o", "out.npy"],
              ["merge", "{}", "{}", "-o", "out.bn.h5"], ["export", "{}", "-o", "out.json"]),
}  # fmt: skip
WITH_OTHERS = ["apply", "good.bn.h5", "{}::/g/x", "-o", "out.h5", "--copy-others"]
COMMANDS |= dict.fromkeys(ATTRIBUTE_KINDS, (*COMMANDS["hdf5"], WITH_OTHERS, WITH_OTHERS[:-1]))
COMMANDS |= dict.fromkeys(("exchange", "torch"), (["import", "{}", "-o", "out.bn.h5"],))


@dataclass
class Outcome:
    """How a child ended."""

    code: int
    signal: int
    out: bytes
    err: str
    peak_kb: int


@dataclass
class Report:
    """What was seen: counts by kind of file and outcome, and findings, of which there should be none."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    peak_kb: int = 0


def forked(work: Callable[[], int]) -> Outcome:
    """Run something in a copy of this process, with limits; its output goes to files in memory."""
    out, err = os.memfd_create("out"), os.memfd_create("err")
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_BYTES,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(WALL_SECONDS)
            code = work()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    texts = [_drained(fd) for fd in (out, err)]
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Outcome(
        os.waitstatus_to_exitcode(status), killed, texts[0], texts[1].decode(errors="replace"), usage.ru_maxrss
    )


def _drained(fd: int) -> bytes:
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return content


def bn(args: list[str]) -> Outcome:
    """Run bn in a child."""
    return forked(
        lambda: cli.main(
            [*args, *(["-j", "1", "--max-memory", f"{BUDGET_KB}K"] if args[0] in ("fit", "apply") else [])]
        )
    )


class Fuzzer:
    """Runs bn over damaged files in a folder of its own, which must be the current one."""

    def __init__(self, chosen: Collection[str] = FIRST_KINDS) -> None:
        self.originals = originals(chosen)
        x = np.random.default_rng(3).normal(size=(40, 3))
        self.good_stats = bncli.fit(x, batch_size=16)
        self.good_stats.save("good.bn.h5", force=True)
        np.save("good.npy", x)
        self.right: dict[tuple[str, ...], tuple[Any, str]] = {}
        self.good_kb = 0

    def one(self, seed: int, number: int, report: Report) -> None:
        """Damage one file, run one command, and judge."""
        rng = np.random.default_rng([seed, number])
        original = self.originals[int(rng.integers(len(self.originals)))]
        command = COMMANDS[original.kind][int(rng.integers(len(COMMANDS[original.kind])))]
        alike = [o for o in self.originals if o.kind == original.kind or {o.kind, original.kind} <= {*FIRST_KINDS}]
        content, values_only = mutated(original, alike, rng)
        right, wrong = self._right(original, command, report)
        args = self._written(original.name, content, command)
        outcome = bn(args)
        report.peak_kb = max(report.peak_kb, outcome.peak_kb)
        verdict = _refusal(outcome)
        if outcome.peak_kb > 1.2 * self.good_kb + BUDGET_KB:
            verdict = f"FINDING: {outcome.peak_kb} KB of memory, {self.good_kb} for a good file"
        if not verdict:
            found = _result(args, outcome)
            verdict = "the same numbers"
            if wrong:
                verdict = "not judged, since the file is a finding before it is damaged"
            elif found != right:
                verdict = self._other_numbers(original, args, found, values_only)
            elif original.kind in ATTRIBUTE_KINDS and (problem := _copied_wrongly(args, damaged=True)):
                verdict = f"FINDING: {problem}"
        if verdict.startswith("FINDING"):
            report.findings.append(f"{number}: {' '.join(args)}: {verdict}")
            Path(f"finding-{number}-{original.name}").write_bytes(content)
        report.counts[original.kind, verdict.split(":")[0]] += 1

    def _right(self, original: Original, command: list[str], report: Report) -> tuple[Any, str]:
        """What the command gives for the original, and what is wrong with that, found out once."""
        key = (original.name, *command)
        if key not in self.right:
            args = self._written(original.name, original.content, command)
            outcome = bn(args)
            self.good_kb = max(self.good_kb, outcome.peak_kb)
            result, wrong = None, f"exit {outcome.code}: {outcome.err[-400:]}" * bool(outcome.code)
            if not wrong:
                result = _result(args, outcome)
                wrong = _copied_wrongly(args, damaged=False) if original.kind in ATTRIBUTE_KINDS else ""
            if wrong:
                report.findings.append(f"undamaged: {' '.join(args)}: {wrong}")
                Path(f"finding-undamaged-{original.name}").write_bytes(original.content)
            self.right[key] = result, wrong
        return self.right[key]

    def _written(self, name: str, content: bytes, command: list[str]) -> list[str]:
        Path(name).write_bytes(content)
        for left in ("out.npy", "out.h5", "out.bn.h5", "out.json"):
            Path(left).unlink(missing_ok=True)
        args = [a.replace("{}", name) for a in command]
        return [*args, "-o", "out.bn.h5"] if args[0] == "fit" else args

    def _other_numbers(self, original: Original, args: list[str], found: Any, values_only: bool) -> str:
        if original.kind == "stats":
            return "FINDING: a damaged stats file was taken, and gave another result"
        if args[0] == "ls":
            return "listed otherwise"
        if original.kind in ("exchange", "torch"):
            if original.name.endswith((".onnx", ".weights.h5")):
                return "other numbers, in a format without a checksum"
            return "FINDING: a damaged file, or one that lies, was taken, and gave other numbers"
        if values_only and original.checked:
            return "FINDING: damage under a checksum was not seen"
        judged = forked(lambda: _judge(self.good_stats, args, found))
        if judged.signal:
            return "not judged, since the other reader died"
        if judged.code == 5:
            return "not judged, since the other reader refused or contradicts itself"
        if judged.code:
            return f"FINDING: not the numbers of another reader: {judged.err[-300:]}"
        return "another valid file, read rightly"


def _refusal(outcome: Outcome) -> str:
    """How bn refused, "" when it did not."""
    if outcome.signal:
        return f"FINDING: ended by signal {outcome.signal}"
    if outcome.code not in DOCUMENTED or "Traceback" in outcome.err:
        return f"FINDING: exit {outcome.code}: {outcome.err[-400:]}"
    said = [line for line in outcome.err.splitlines() if line and not line.startswith(("bn: warning", "Usage", "Try"))]
    listed = [line for line in said if line.startswith("  ")]
    if outcome.code and not 1 <= len(said) - len(listed) <= 2:
        return f"FINDING: exit {outcome.code} in {len(said)} lines: {outcome.err[-400:]}"
    if any(not (c.isprintable() or c in "\n\t") for c in outcome.err):
        return f"FINDING: control characters: {outcome.err[-400:]!r}"
    return f"refused with exit {outcome.code}" if outcome.code else ""


def _result(args: list[str], outcome: Outcome) -> Any:
    """The numbers that came out, in a form that can be compared."""
    if args[0] == "fit":
        record = json.loads(outcome.out)
        keys = ("population_mean", "population_var", "running_mean", "running_var", "count")
        return {key: [f[key] for f in record["features"]] for key in keys} | {"of": record["sources"][0]["dataset"]}
    if args[0] == "apply" and "out.h5" in args:
        with h5py.File("out.h5", "r") as file:  # written by bn, after it refused what is broken
            return file["g/x"][()].tobytes()
    if args[0] == "import":
        stats = bncli.load("out.bn.h5")
        return [getattr(stats, name).tobytes() for name in ("running_mean", "running_var", "gamma", "beta")]
    if args[0] in ("apply", "merge"):
        return _numbers(args[args.index("-o") + 1])
    return Path("out.json").read_bytes() if args[0] == "export" else outcome.out


def _copied_wrongly(args: list[str], *, damaged: bool) -> str:
    """What a person who opens the copy finds wrong with it, in a child since HDF5 may crash over the damaged file."""
    if "out.h5" not in args:
        return ""

    def look() -> int:
        source, everything, problems = args[2].partition("::")[0], "--copy-others" in args, list[str]()
        try:
            there = kinds.dangling(source) if everything and damaged else []  # damage is copied as it is
            problems += [problem for problem in kinds.dangling("out.h5") if problem not in there]
            problems += kinds.altered(source, "out.h5", "g/x", everything=everything)
        except Exception as error:  # of what h5py itself cannot read
            problems += [f"the copy cannot be compared: {error}"] * (not damaged)
        print("; ".join(problems), file=sys.stderr)
        return 0

    return forked(look).err.strip()[-400:]


def _numbers(path: str) -> Any:
    if path.endswith(".npy"):
        return np.load(path).tobytes()
    stats = bncli.load(path)
    return helpers.bits(stats) | {"gamma": stats.gamma.tobytes(), "beta": stats.beta.tobytes()}


def _judge(stats: bncli.Stats, args: list[str], found: Any) -> int:
    """0 when the numbers are those of another reader, 5 when that refuses the file or contradicts itself."""
    path, _, dataset = args[1 if args[0] == "fit" else 2].partition("::")
    try:
        if path.endswith(".npy"):
            x = np.load(path, allow_pickle=False)
        else:
            with h5py.File(path, "r") as file:
                item = file[dataset or found["of"]]
                if item.chunks and _contradicts_itself(item.id):
                    return 5
                x = item[()]
    except Exception:
        return 5
    x = x.reshape(len(x), -1) if x.ndim == 1 else x
    if args[0] == "fit":
        truth = helpers.exact_columns(x)
        helpers.check_moments(np.array(found["population_mean"]), np.array(found["population_var"]), truth)
        assert found["count"] == [t.count for t in truth]
        if len(x) <= 256:  # one batch
            helpers.check_moments(np.array(found["running_mean"]), np.array(found["running_var"]), truth)
        return 0
    expected = (x - stats.running_mean) / np.sqrt(stats.running_var + stats.eps)
    dtype = x.dtype.newbyteorder("=") if x.dtype.kind == "f" else np.dtype("f4")
    result = np.frombuffer(found, dtype).reshape(x.shape)
    np.testing.assert_allclose(
        result, expected, rtol=4 * float(np.finfo(dtype).eps), atol=1e-12 if dtype != "f2" else 1e-7
    )
    return 0


def _contradicts_itself(item: Any) -> bool:
    """Whether HDF5 lists chunks that it does not find by their place, and would silently read as the fill value."""
    listed = [item.get_chunk_info(i) for i in range(item.get_num_chunks())]
    return any(len(item.read_direct_chunk(chunk.chunk_offset)[1]) != chunk.size for chunk in listed)


def fuzz(
    count: int,
    seed: int,
    first: int = 0,
    told: Callable[[int, Report], None] | None = None,
    chosen: Collection[str] = FIRST_KINDS,
) -> Report:
    """Run `count` damaged files in the current folder."""
    report, fuzzer = Report(), Fuzzer(chosen)
    with contextlib.suppress(KeyboardInterrupt):  # a long round may be ended early, and still reports
        for number in range(first, first + count):
            fuzzer.one(seed, number, report)
            if told:
                told(number - first + 1, report)
    return report


def summary(report: Report, seconds: float) -> str:
    """Counts by kind of file and outcome."""
    total = sum(report.counts.values())
    lines = [
        f"{total:,} files in {seconds:.0f} s, peak {report.peak_kb / 1024:.0f} MB, {len(report.findings)} findings"
    ]
    lines += [f"  {kind:<10} {verdict:<64} {n:>8,}" for (kind, verdict), n in sorted(report.counts.items())]
    return "\n".join([*lines, *report.findings])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to run one again")
    parser.add_argument("--keep", metavar="FOLDER", help="where to work, and to leave the files that were findings")
    parser.add_argument("--kinds", default=",".join(FIRST_KINDS), help=f"comma-separated, of {', '.join(KINDS)}")
    given = parser.parse_args()
    chosen = given.kinds.split(",")
    if set(chosen) - {*KINDS}:
        parser.error(f"--kinds: there are {', '.join(KINDS)}")
    start = time.monotonic()

    def told(done: int, report: Report) -> None:
        if done % 1000 == 0:
            print(f"{done:,} files, {time.monotonic() - start:.0f} s, {len(report.findings)} findings", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or scratch
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
        report = fuzz(given.count, given.seed, given.first, told, chosen)
    print(summary(report, time.monotonic() - start))
    return bool(report.findings)


if __name__ == "__main__":
    sys.exit(main())
