"""Where statistics come from."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import good

import bncli
from bncli.stats.provenance import provenance


def test_python_has_no_command() -> None:
    found = provenance([{"name": "x.npy"}])
    assert found["command"] == []
    assert found["sources"] == [{"name": "x.npy"}]
    assert found["versions"] == {
        "bncli": bncli.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def test_the_command_line_says_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.arange(6.0).reshape(3, 2))
    good("fit", "x.npy", "-o", "s.bn.h5", "-q")
    assert bncli.load("s.bn.h5").provenance["command"] == ["bn", "fit", "x.npy", "-o", "s.bn.h5", "-q"]
    assert provenance([])["command"] == []  # after the command
