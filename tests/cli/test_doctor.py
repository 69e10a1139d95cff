"""bn doctor: what it finds is what is there, in a pipe, as JSON and on a terminal."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import BN, good, no_controls, on_terminal, plain

import bncli
from bncli.numerics import compiled
from bncli.render import doctor


def found(*args: str, **environment: str) -> dict[str, Any]:
    variables = {k: v for k, v in os.environ.items() if k not in ("HDF5_PLUGIN_PRELOAD", "BN_KERNEL")} | environment
    done = subprocess.run([*BN, "doctor", "--json", *args], env=variables, capture_output=True, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_versions_and_filters_are_those_of_the_libraries() -> None:
    record = found()
    assert record["bncli"] == bncli.__version__
    assert record["python"] == platform.python_version()
    assert (record["numpy"], record["h5py"]) == (np.__version__, h5py.__version__)
    assert record["hdf5"] == ".".join(map(str, h5py.h5.get_libversion()))
    for name, code in (("gzip", 1), ("szip", 4), ("lzf", 32000)):
        assert record["filters"][name] == bool(h5py.h5z.filter_avail(code))
    assert record["filters"]["shuffle"]
    assert 1 <= record["cpus"] <= (os.cpu_count() or 1)


def test_the_kernel_and_why() -> None:
    assert (found()["kernel"] == "c") == (found()["kernel_note"] == "compiled")
    record = found(BN_KERNEL="numpy")
    assert (record["kernel"], record["kernel_note"]) == ("numpy", "BN_KERNEL=numpy asks for it")


def test_a_kernel_that_was_not_built_or_is_of_another_machine(tmp_path: Path) -> None:
    assert compiled._library_of(str(tmp_path))[0] is None
    assert "not built" in compiled._library_of(str(tmp_path))[1]
    (tmp_path / f"_blocks{EXTENSION_SUFFIXES[0]}").write_bytes(b"of another machine")
    assert compiled._library_of(str(tmp_path))[0] is None
    assert "another machine" in compiled._library_of(str(tmp_path))[1]


ROOT = Path(__file__).parents[2]


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A checkout in which no kernel was built, as an installation that is not editable leaves it."""
    shutil.copytree(ROOT / "bncli", tmp_path / "bncli", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def run_in(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python there, as a person would type it: the folder's own package comes first."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BN_KERNEL")} | environment
    return subprocess.run([sys.executable, *args], cwd=folder, env=variables, capture_output=True, text=True)


def test_a_checkout_without_a_kernel_says_so(unbuilt: Path) -> None:
    record = json.loads(run_in(unbuilt, "-m", "bncli", "doctor", "--json").stdout)
    assert record["kernel"] == "numpy"
    assert f"was not built in this folder, {unbuilt}" in record["kernel_note"]
    assert "C compiler" not in record["kernel_note"]
    (unbuilt / "setup.py").unlink()  # then it is an installation
    record = json.loads(run_in(unbuilt, "-m", "bncli", "doctor", "--json").stdout)
    assert "there was no C compiler when bncli was installed" in record["kernel_note"]


def test_the_benchmark_refuses_a_label_that_is_wrong(unbuilt: Path) -> None:
    done = run_in(unbuilt, str(ROOT / "benchmarks" / "run.py"), "--quick", "--only", "start-up of nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("'bn' would run the kernel numpy: the compiled kernel was not built in this folder")
    assert len(done.stderr.splitlines()) == 1


def test_a_kernel_that_is_none_is_refused(unbuilt: Path) -> None:
    done = run_in(unbuilt, "-m", "bncli", "doctor", BN_KERNEL="nunpy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bn: error: BN_KERNEL=nunpy is not one of c, numpy; unset it for the fastest available\n"
    done = run_in(unbuilt, "-m", "bncli", "doctor", BN_KERNEL="c")
    assert done.returncode == 2
    assert "BN_KERNEL=c: the compiled kernel was not built in this folder" in done.stderr


def test_plugins_are_off_unless_asked_for() -> None:
    assert found()["plugins"] is False
    assert found("--plugins")["plugins"] is True


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found()["packages"].keys() == doctor.OPTIONAL.keys()
    monkeypatch.setattr(
        doctor, "OPTIONAL", {"pytest": ("tests", "pytest"), "no-such-package": ("nothing", "'bncli[x]'")}
    )
    lines = good("doctor").out.splitlines()
    assert f"pytest\t{pytest.__version__}\ttests" in lines
    assert "no-such-package\t-\tfor nothing: pip install 'bncli[x]'" in lines


def test_in_a_pipe_and_on_a_terminal() -> None:
    lines = [line.split("\t") for line in good("doctor").out.splitlines()]
    assert lines[0] == ["part", "found", "note"]
    assert ["bncli", bncli.__version__, ""] in lines
    shown = plain(on_terminal(["doctor"], 80).out)
    assert no_controls(shown)
    assert all(len(line) <= 80 for line in shown.splitlines())
    for words in ("kernel", "gzip", sys.version.split()[0]):
        assert words in shown
