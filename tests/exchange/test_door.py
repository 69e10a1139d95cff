"""A framework from outside: two verbs and one row in the table, used from the command line."""

from __future__ import annotations

import configparser
import io
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import bn, good, save

import bncli
from bncli import exchange
from bncli.exchange.contract import Content, Encoded, ExportOptions, Layer, Layers

COLUMNS = ("running_mean", "running_var", "gamma", "beta")


def encode(stats: bncli.Stats, options: ExportOptions) -> Encoded:
    file = configparser.ConfigParser()
    file["bn"] = {name: " ".join(map(repr, getattr(stats, name).tolist())) for name in COLUMNS} | {
        "eps": repr(stats.eps)
    }
    text = io.StringIO()
    file.write(text)
    return Encoded(text.getvalue().encode(), {"eps": stats.eps}, ["a toy holds no momentum"])


def decode(content: Content) -> Layers:
    file = configparser.ConfigParser()
    with content.reading("toy", ValueError, configparser.Error, KeyError):
        file.read_string(content.data.decode())
        sizes = {name: len(file[name]["running_mean"].split()) for name in file.sections()}

    def read(name: str) -> Layer:
        with content.reading("toy", ValueError, KeyError):
            columns = {column: np.array(file[name][column].split(), float) for column in COLUMNS}
            return Layer(columns, {"eps": float(file[name]["eps"])})

    return Layers(sizes, read, what="no section")


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(exchange.FORMATS, "toy", exchange.Format(__name__, "a toy", (".ini",)))
    save(tmp_path / "x.npy", np.random.default_rng(0).random((100, 4)))
    good("fit", "x.npy", "-q")


@pytest.mark.parametrize("args", [["-o", "x.ini"], ["--to", "toy", "-o", "x.txt"]])
def test_round_trip(args: list[str]) -> None:
    assert "bn: note: a toy holds no momentum" in good("export", "x.bn.h5", *args).err
    assert "defaults of toy: momentum 0.9" in good("import", args[-1], "--from", "toy", "-o", "back.bn.h5").err
    one, other = bncli.load("x.bn.h5"), bncli.load("back.bn.h5")
    assert all(getattr(one, name).tolist() == getattr(other, name).tolist() for name in COLUMNS)


def test_refusals() -> None:
    result = bn("export", "x.bn.h5", "-o", "x.ini", "--rank", "3")
    assert (result.code, "--rank has no meaning for the format toy" in result.err) == (2, True)
    good("export", "x.bn.h5", "-o", "x.ini")
    assert bn("export", "x.bn.h5", "-o", "x.ini").code == 5
    assert bn("import", "x.ini", "--layer", "nix", "-o", "y.bn.h5").code == 2
    Path("x.ini").write_text("[bn\nrunning_mean")
    assert bn("import", "x.ini", "-o", "y.bn.h5").code == 3


def test_every_format_has_the_verbs_that_it_claims() -> None:
    for name, row in exchange.FORMATS.items():
        module = exchange._module(name)
        claimed = {"encode": "write" in row.verbs, "decode": "read" in row.verbs}
        assert {verb: hasattr(module, verb) for verb in claimed} == claimed, name
