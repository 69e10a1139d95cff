"""bn export, as a person and a script see it; and the examples of its page, run."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import bn, check_refused, good, no_controls, save, table, temporaries, untouched
from exchange_helpers import check_agrees, check_package_missing, features
from helpers import peer

import bncli
from bncli import exchange

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with s.bn.h5, fitted on images of three channels."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x.npy", table(600).reshape(40, 3, 3, 5))
    good("fit", "x.npy", "--axis", "1", "--eps", "1e-3", "-o", "s.bn.h5", "-q")
    return tmp_path


@pytest.mark.parametrize("out", ["o.json", "o.npz", "o.csv", "o.weights.h5", "O.JSON"])
def test_suffix_says_the_format(here: Path, out: str) -> None:
    result = good("export", "s.bn.h5", "-o", out)
    name = exchange.format_of(out, None, "write", "--to")
    assert result.out == f"3 features, running statistics, as {name} in {out}\n"
    assert exchange.read(out).running_mean.tolist() == bncli.load("s.bn.h5").running_mean.tolist()
    assert temporaries(here) == []


def test_to_wins_over_the_suffix(here: Path) -> None:
    good("export", "s.bn.h5", "--to", "csv", "-o", "o.json")
    assert Path("o.json").read_text().startswith("index,running_mean,running_var")


def test_what_the_file_does_not_hold_is_said_on_stderr(here: Path) -> None:
    result = good("export", "s.bn.h5", "-o", "o.weights.h5")
    for words in ("axis=1, momentum=0.9, epsilon=0.001", "ddof 0", "float64"):
        assert words in result.err
    assert all(line.startswith("bn: note: ") for line in result.err.splitlines())
    assert "s.bn.h5" not in result.err
    assert good("export", "s.bn.h5", "-o", "o.json").err == ""  # holds everything


def test_json_report(here: Path) -> None:
    result = good("export", "s.bn.h5", "-o", "o.weights.h5", "--json", "--use", "population")
    report = json.loads(result.out)
    assert (report["format"], report["output"], report["use"]) == ("keras", "o.weights.h5", "population")
    assert report["num_features"] == 3
    assert report["settings"] == {"axis": 1, "momentum": 0.9, "epsilon": 1e-3}
    assert result.err == "".join(f"bn: note: {note}\n" for note in report["notes"])
    assert exchange.read("o.weights.h5").running_var.tolist() == bncli.load("s.bn.h5").population_var.tolist()


def test_quiet(here: Path) -> None:
    result = good("export", "s.bn.h5", "-o", "o.weights.h5", "-q")
    assert (result.out, result.err) == ("", "")


def test_output_exists(here: Path) -> None:
    save(here / "o.npz.npy", np.zeros(3)).rename("o.npz")
    with untouched(here):
        check_refused(5, ["export", "s.bn.h5", "-o", "o.npz"], "o.npz", "-f/--force")
        check_refused(5, ["export", "s.bn.h5", "--to", "json", "-o", "s.bn.h5", "-f"], "also an input")
        check_refused(74, ["export", "s.bn.h5", "-o", "no/o.npz"], "no/o.npz")
    good("export", "s.bn.h5", "-o", "o.npz", "-f")
    assert exchange.read("o.npz").num_features == 3


def test_usage(here: Path) -> None:
    with untouched(here):
        check_refused(2, ["export", "s.bn.h5", "-o", "o.bin"], "o.bin", "--to", "torch", "onnx", "csv")
        check_refused(2, ["export", "s.bn.h5", "-o", "o.h5"], "o.h5", "--to")
        check_refused(2, ["export", "s.bn.h5", "--to", "caffe", "-o", "o.bin"], "caffe", "torch")
        check_refused(2, ["export", "s.bn.h5", "-o", "o.json", "--rank", "4"], "--rank", "json")
        check_refused(2, ["export", "s.bn.h5", "-o", "o.csv", "--layer", "a"], "--layer", "csv")
        check_refused(2, ["export", "s.bn.h5", "-o", "o.npz", "--into", "x.npz"], "--into", "npz")
        check_refused(2, ["export", "s.bn.h5", "-o", "o.npz", "--use", "best"], "--use")
        assert bn("export", "s.bn.h5").code == 2
    check_refused(3, ["export", "x.npy", "-o", "o.json"], "x.npy", "not a readable stats file")


def test_imported_statistics_have_no_population(here: Path) -> None:
    good("export", "s.bn.h5", "-o", "o.weights.h5")
    good("import", "o.weights.h5", "-o", "i.bn.h5")
    with untouched(here):
        check_refused(4, ["export", "i.bn.h5", "-o", "o.json", "--use", "population"], "population")


def test_help_lists_every_format() -> None:
    for command, verb in (("export", "write"), ("import", "read")):
        lines = good(command, "--help").out.splitlines()
        for name in exchange.formats(verb):
            description = exchange.FORMATS[name].description
            assert [line for line in lines if line.split()[:1] == [name] and line.endswith(description)], name
    assert "fold" not in exchange.formats("read")


def test_every_format_is_on_its_page_and_has_its_verbs() -> None:
    section = page()
    for name, entry in exchange.FORMATS.items():
        assert f"| `{name}` |" in section
        module = importlib.import_module(entry.module)
        assert [
            verb for verb in ("write", "read") if hasattr(module, {"write": "encode", "read": "decode"}[verb])
        ] == sorted(entry.verbs, reverse=True)


@pytest.mark.parametrize(("name", "suffix"), [("torch", ".pt"), ("onnx", ".onnx"), ("safetensors", ".safetensors")])
def test_package_missing(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str) -> None:
    check_package_missing(monkeypatch, name, suffix)
    with untouched(here):
        check_refused(2, ["export", "s.bn.h5", "-o", f"o{suffix}"], f"pip install 'bncli[{name}]'")


def test_names_with_controls_are_shown_escaped(here: Path) -> None:
    features(3).save("s\x1b.bn.h5")
    result = good("export", "s\x1b.bn.h5", "-o", "o\x1b.npz")
    assert "o\\x1b.npz" in result.out
    assert no_controls(result.out)


def page() -> str:
    return (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")


@pytest.mark.peer
@pytest.mark.parametrize("title", ["PyTorch", "ONNX"])
def test_the_example_on_the_page_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str
) -> None:
    """Run the commands and the code as they stand there (tests/test_docs.py compares what they print)."""
    peer("torch" if title == "PyTorch" else "onnxruntime")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "sample_data", "sample_data")
    good("fit", "sample_data/images.h5", "--axis", "1", "-o", "images.bn.h5", "-q")
    section = re.search(rf"\n## {title}\n(.*?)\n## ", page(), re.DOTALL)
    assert section
    code = re.search(r"```python\n(.*?)```", section[1], re.DOTALL)
    assert code
    commands = re.findall(r"^\$ bn (export .*)$", section[1][: code.start()], re.MULTILINE)
    assert commands
    for command in commands:
        good(*command.split(), "-f")
    found: dict[str, Any] = {}
    exec(compile(code[1], title, "exec"), found)
    x = np.load("sample_data/images_heldout.npy").astype(np.float32)
    check_agrees(found["y"], bncli.load("images.bn.h5"), x)


def test_starts_light() -> None:
    """Modules of formats load no framework."""
    modules = ", ".join(entry.module for entry in exchange.FORMATS.values())
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "bncli.exchange.torch" in loaded
    assert not {"torch", "onnx", "safetensors", "keras", "sklearn"} & set(loaded)
