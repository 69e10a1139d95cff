"""A short round of the fuzzer, and what earlier rounds found; a long one is `python tests/fuzz/run.py --count 100000`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bncli

RUN = Path(__file__).parent / "fuzz" / "run.py"
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="its limits need Linux")


def check_round(seed: int, first: int, count: int) -> None:
    """In a process of its own, which forks for every file and so must have no threads."""
    args = ["--seed", str(seed), "--first", str(first), "--count", str(count)]
    done = subprocess.run([sys.executable, RUN, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count:,} files" in done.stdout
    assert " 0 findings" in done.stdout


def test_a_short_round() -> None:
    check_round(seed=0, first=0, count=250)


@pytest.mark.parametrize(("seed", "number"), [(1, 3918), (1, 10391), (1, 14019), (2, 3007), (3, 4895), (41, 115)])
def test_what_was_found_before(seed: int, number: int) -> None:
    """A text that claims 33 MB, a heap without end by overflow, a filter's unknown flags, letters of 67 MB, a bad fill value, an index
    whose size HDF5 could not tell."""
    check_round(seed, number, 1)


def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz import run

    def outcome(code: int, killed: int = 0, err: str = "bn: error: x.npy: damaged\n") -> run.Outcome:
        return run.Outcome(code, killed, b"", err, 0)

    assert run._refusal(outcome(3)) == "refused with exit 3"
    assert run._refusal(outcome(0, err="")) == ""
    for bad in (
        outcome(0, killed=11),
        outcome(70),
        outcome(1),
        outcome(3, err="Traceback (most recent call last):\n"),
        outcome(3, err="bn: error: one\ntwo\nthree\n"),
        outcome(3, err=""),
        outcome(3, err="bn: error: \x1b[31m\n"),
    ):
        assert run._refusal(bad).startswith("FINDING"), bad
    monkeypatch.chdir(tmp_path)
    x = np.arange(12.0).reshape(4, 3)
    np.save("x.npy", x)
    found = {"count": [4] * 3}
    found |= {f"{kind}_mean": x.mean(axis=0).tolist() for kind in ("running", "population")}
    found |= {f"{kind}_var": x.var(axis=0).tolist() for kind in ("running", "population")}
    stats = bncli.fit(x)
    assert run._judge(stats, ["fit", "x.npy"], found) == 0
    with pytest.raises(AssertionError):
        run._judge(stats, ["fit", "x.npy"], found | {"population_mean": [4.5, 5.5, 6.5 + 1e-12]})
    (tmp_path / "x.npy").write_bytes(b"no array")
    assert run._judge(stats, ["fit", "x.npy"], found) == 5
