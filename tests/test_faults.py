"""Files that fail under a run, and kills in the middle: a part of what `python tests/faults/campaign.py` does in full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.campaign import FAST, RUNS, Run, campaign, from_outside, make_data
from faults.inject import KINDS
from faults.zygote import Zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.fixture(scope="module")
def here(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """On a file system in memory where there is one: thousands of syncs take their time elsewhere."""
    folder = Path(FAST) / f"bn-faults-{os.getpid()}" if FAST else tmp_path_factory.mktemp("faults")
    folder.mkdir(exist_ok=True)
    make_data(folder, zygote)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", RUNS)
def test_errors(here: Path, zygote: Zygote, name: str) -> None:
    how = ("EIO", "ENOSPC")[list(RUNS).index(name) % 2]
    count = campaign(name, here, zygote, (how,), stride=8)
    assert set(count) >= {"open", "close", "write", "fsync", "chmod", "replace", "unlink", "stat", "flock"}
    assert sum(count.values()) >= 10


@pytest.mark.parametrize("name", RUNS)
def test_half_writes(here: Path, zygote: Zygote, name: str) -> None:
    assert campaign(name, here, zygote, ("half",), stride=4)["write"] >= 1


@pytest.mark.parametrize("name", RUNS)
def test_kills(here: Path, zygote: Zygote, name: str) -> None:
    how = ("before", "after")[list(RUNS).index(name) % 2]
    count = campaign(name, here, zygote, (how,), stride=21)
    assert sum(count.values()) >= 10


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("name", "how"), [("fit", "EIO"), ("apply plain", "before")])
def test_real_system_calls(here: Path, zygote: Zygote, name: str, how: str) -> None:
    """The first of each kind; `python tests/faults/campaign.py --strace` breaks them all."""
    if subprocess.run(["strace", "-o", os.devnull, "true"]).returncode:
        pytest.skip("strace may not trace here")
    count = from_outside(name, here, zygote, (how,), most=1)
    assert set(count) >= {"openat", "close", "fsync", "rename", "write", "fallocate"}


def test_the_harness_notices(here: Path, zygote: Zygote) -> None:
    """An output that is written in its place is torn by half a write: the campaign must say so."""
    torn = Run(("fit", "x.npy", "-o", "o.bn.h5", "-f"), ("o.bn.h5",), careless=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNS, "torn", torn)
        with pytest.raises(AssertionError, match=r"torn|unreadable"):
            campaign("torn", here, zygote, ("half",))
    assert set(KINDS) >= {"write", "fsync", "replace", "open", "close"}
