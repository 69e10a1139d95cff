"""bn doctor: what it finds is what is there, in a pipe, as JSON and on a terminal."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import BN, good, no_controls, on_terminal, plain

import bncli
from bncli import compiled
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


def test_a_kernel_that_was_not_built_or_is_of_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("BN_KERNEL", raising=False)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert compiled._load()[0] is None
    assert "not built" in compiled._load()[1]
    (tmp_path / "k.so").write_bytes(b"of another machine")
    spec = type("Spec", (), {"origin": str(tmp_path / "k.so")})
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: spec)
    assert compiled._load()[0] is None
    assert "another machine" in compiled._load()[1]


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
