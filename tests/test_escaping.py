"""Names from files and of files, wherever a person sees them: no control characters, no escape codes, no markup."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import Result, bn, no_controls, on_terminal, plain, save, table
from helpers import peer

from bncli.errors import printable

# a name, and how it is shown
NAMES = {
    "escape code": ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
    "markup": ("[bold]x[red][link=evil]", "[bold]x[red][link=evil]"),
    "line": ("a\nbn: error: b\r", "a\\nbn: error: b\\r"),
    "right to left": ("\u202egnp.x\u2066", "\\u202egnp.x\\u2066"),
    "8-bit control": ("\x9b2J\x85\x7f", "\\x9b2J\\x85\\x7f"),
    "not UTF-8": ("\udcff\udc1b", "\\udcff\\udc1b"),
    "formatting": ("{0} %s {x!r}", "{0} %s {x!r}"),
}
FILES = {"h5": "f{}.h5", "npy": "f{}.npy", "stats": "s{}.bn.h5"}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return NAMES[str(request.param)][0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, str]:
    """Files of which every name is this one: a table, an array, stats, and their datasets, features and attributes."""
    monkeypatch.chdir(tmp_path)
    evil = name if name.isprintable() or "\udcff" not in name else "\udcff"
    paths = {kind: pattern.replace("{}", evil) for kind, pattern in FILES.items()}
    x = table(40, 2)
    raw = evil.encode("utf-8", "surrogateescape")
    with h5py.File(os.fsencode(paths["h5"]), "w") as file:
        for place in (raw + b"1", raw + b"2/" + raw):
            space, links = h5py.h5s.create_simple((40, 2)), h5py.h5p.create(h5py.h5p.LINK_CREATE)
            links.set_create_intermediate_group(True)
            item = h5py.h5d.create(file.id, place, h5py.h5t.IEEE_F64LE, space, lcpl=links)
            item.write(h5py.h5s.ALL, h5py.h5s.ALL, x)
            h5py.Dataset(item).attrs["columns"] = np.array([raw + b"0", raw + b"1"])
        file.attrs["a" if "\udcff" in evil else evil] = 1
    save(Path(paths["npy"]), np.where(np.arange(80).reshape(40, 2) == 7, np.nan, x))
    result = bn("fit", f"{paths['h5']}::/{evil}1", "-o", paths["stats"])
    check_shown(result, evil, code=0)
    return paths | {"name": evil}


def check_shown(result: Result, name: str, *, code: int | None = None, terminal: bool = False) -> None:
    """Nothing raw on either stream; markup and formatting stand as they are."""
    assert code is None or result.code == code, result
    assert result.code in (0, 2, 3, 4, 5), result
    for text in (plain(result.out) if terminal else result.out, result.err):
        assert no_controls(text), repr(text)
        assert "\nbn: error: b" not in text
    assert "Traceback" not in result.err


def test_shown_as() -> None:
    for name, shown in NAMES.values():
        assert printable(name) == shown


def test_every_command(here: dict[str, str]) -> None:
    name, h5, npy, stats = here["name"], here["h5"], here["npy"], here["stats"]
    shown = printable(name)
    runs: list[tuple[list[str], int, bool]] = [
        (["fit", h5], 2, True),  # lists the candidates
        (["fit", f"{h5}::/{name}2"], 2, True),
        (["fit", f"{h5}::/nothing{name}"], 3, True),
        (["fit", f"{h5}::/{name}1", "--dry-run"], 0, True),
        (["fit", f"{h5}::/{name}1", "-o", stats], 5, True),
        (["fit", f"{h5}::/{name}1", "-o", "j.bn.h5", "--json"], 0, False),
        (["fit", f"{h5}::/{name}1", "--names", f"{h5}::/{name}1", "-o", "n.bn.h5"], 3, True),
        (["fit", f"{h5}::/{name}1", "--gamma", name, "-o", "n.bn.h5"], 3, True),
        (["fit", npy, "-o", "n.bn.h5"], 3, True),  # a NaN
        (["fit", npy, "--nan", "omit", "-o", f"{name}.bn.h5"], 0, True),
        (["fit", f"missing{name}.npy"], 3, True),
        (["fit", npy, "--fill-value", name, "-o", "n.bn.h5"], 2, True),
        (["fit", npy, "--rows", name], 2, True),
        (["fit", npy, "--init", name], 2, True),
        (["fit", npy, f"--{name}"], 2, False),
        (["apply", stats, f"{h5}::/{name}1", "-o", f"o{name}.h5"], 0, True),
        (["apply", stats, f"{h5}::/{name}1", "-o", f"c{name}.h5", "--copy-others"], 0, True),
        (["apply", stats, f"{h5}::/{name}2/{name}", "-o", f"p{name}.npy", "--json"], 0, False),
        (["apply", stats, npy, "-o", f"q{name}.npy"], 0, True),
        (["apply", h5, npy, "-o", "z.npy"], 3, True),
        (["apply", stats, npy, "-o", stats, "-f"], 5, True),
        (["inspect", stats], 0, True),
        (["inspect", stats, "--csv"], 0, True),
        (["inspect", stats, "--json"], 0, False),
        (["inspect", stats, "--get", "name"], 0, True),
        (["inspect", stats, "--get", name], 2, False),
        (["inspect", stats, "--features", name], 2, False),
        (["inspect", stats, "--sort", name], 2, False),
        (["inspect", h5], 3, True),
        (["ls", h5], 0, True),
        (["ls", npy], 0, True),
        (["ls", f"missing{name}"], 3, True),
        (["merge", stats, stats, "-o", f"m{name}.bn.h5"], 0, True),
        (["merge", stats, h5, "-o", "z.bn.h5"], 3, True),
        (["export", stats, "-o", f"e{name}.json"], 0, True),
        (["export", stats, "-o", f"e{name}.csv"], 0, True),
        (["export", stats, "-o", f"e{name}.npz"], 0, True),
        (["export", stats, "-o", f"e{name}.weights.h5"], 0, True),
        (["export", stats, "-o", f"e.{name}"], 2, True),
        (["import", f"e{name}.json", "-o", f"i{name}.bn.h5"], 0, True),
        (["import", f"e{name}.csv", "-o", f"k{name}.bn.h5"], 0, True),
        (["import", f"e{name}.weights.h5", "--layer", name, "-o", "z.bn.h5"], 2, True),
        (["import", h5, "--from", "keras", "-o", "z.bn.h5"], 3, True),
        ([name], 2, False),
    ]  # fmt: skip
    for args, code, says in runs:
        result = bn(*args)
        check_shown(result, name, code=code)
        text = (result.out + result.err).replace("\ufffd", shown)  # what bytes in an attribute that are no UTF-8 become
        assert not says or shown in text, (args, result)
        if "--json" in args:
            json.loads(result.out)


@pytest.mark.parametrize("name", ["escape code", "markup", "line"], indirect=True)
def test_on_a_terminal(here: dict[str, str]) -> None:
    name, shown = here["name"], printable(here["name"])
    for args in (["inspect", here["stats"]], ["ls", here["h5"]]):
        result = on_terminal(args, 200)
        check_shown(result, name, code=0, terminal=True)
        codes = {c for c in result.out.split("\x1b")[1:] if not c.startswith(("[0m", "[1m", "[2m", "[1;", "[2;"))}
        assert codes == set()  # bold and dim are bn's own
        assert shown in plain(result.out)


def test_layers_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    safetensors: Any = peer("safetensors.numpy")
    monkeypatch.chdir(tmp_path)
    layer = name.replace("\udcff\udc1b", "x")
    one = np.ones(2)
    tensors = {f"{layer}{i}.{key}": one for i in "12" for key in ("weight", "bias", "running_mean", "running_var")}
    safetensors.save_file(tensors, "m.safetensors")
    for args, code in ((["--layer", "nothing"], 2), ([], 2), (["--layer", f"{layer}1"], 0)):
        result = bn("import", "m.safetensors", "-o", "m.bn.h5", *args)
        check_shown(result, layer, code=code)
        assert printable(layer) in result.out + result.err


def test_what_click_and_debug_print(here: dict[str, str]) -> None:
    name = here["name"]
    result = bn("fit", f"{here['h5']}::/nothing{name}", "--debug")
    assert "Traceback" in result.err
    assert no_controls(result.err)
