"""A short round of the fuzzer, and what earlier rounds found; a long one is `python tests/fuzz/run.py --count 100000`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("number", [3918, 10391, 14019, 17215])
def test_what_was_found_before(number: int) -> None:
    """A text that claimed 33 MB, a heap without end by overflow, and a filter's unknown flags."""
    check_round(seed=1, first=number, count=1)
