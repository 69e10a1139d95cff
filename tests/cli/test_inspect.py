"""bn inspect, as a person and a script see it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import NUMBER, bn, check_refused, good, no_controls, on_terminal, plain, save, table

import bncli
from bncli.numerics.moments import Moments
from bncli.stats.record import Stats

COLUMNS = [
    *("index", "name", "count", "running_mean", "running_var", "running_sd", "population_mean", "population_var"),
    *("population_sd", "missing", "minimum", "maximum", "gamma", "beta", "scale", "shift", "flags"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x.npy", table(600, 12))
    (tmp_path / "names").write_text("\n".join([f"ankle {i}" for i in range(6)] + [f"wrist {i}" for i in range(6)]))
    good("fit", "x.npy", "--names", "names", "--gamma", "2", "-o", "s.bn.h5")
    return tmp_path


def rows_of(*args: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(good("inspect", "s.bn.h5", *args).out), delimiter="\t"))


def indices(*args: str) -> list[int]:
    return [int(row["index"]) for row in rows_of(*args)]


def test_tsv_in_a_pipe_has_every_column_in_full(here: Path) -> None:
    rows = rows_of()
    stats = bncli.load("s.bn.h5")
    assert list(rows[0]) == COLUMNS
    assert [row["name"] for row in rows] == list(stats.names or ())
    for name in ("running_mean", "running_var", "population_mean", "population_var", "gamma", "beta"):
        assert [float(row[name]) for row in rows] == getattr(stats, name).tolist()
    for row in rows:
        assert float(row["running_sd"]) == math.sqrt(float(row["running_var"]))
        scale = 2 / math.sqrt(float(row["running_var"]) + 1e-5)
        assert float(row["scale"]) == pytest.approx(scale, rel=1e-15)
        assert float(row["shift"]) == pytest.approx(-float(row["running_mean"]) * scale, rel=1e-15)
        assert row["count"] == "600"


def test_csv_and_tsv_are_the_same_rows(here: Path) -> None:
    by_csv = list(csv.DictReader(io.StringIO(good("inspect", "s.bn.h5", "--csv").out)))
    assert by_csv == rows_of("--tsv") == rows_of()


def test_json_is_the_record(here: Path) -> None:
    assert json.loads(good("inspect", "s.bn.h5", "--json").out) == bncli.load("s.bn.h5").as_dict()
    few = json.loads(good("inspect", "s.bn.h5", "--json", "--features", "3,5", "--sort", "running_sd").out)
    assert [f["index"] for f in few["features"]] == [5, 3]
    assert set(few["features"][0]) == set(bncli.load("s.bn.h5").as_dict()["features"][0])
    assert few["num_features"] == 12


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("3", [3]),
        ("3-5", [3, 4, 5]),
        ("5,3,3-4", [5, 3, 4]),
        ("wrist*", [6, 7, 8, 9, 10, 11]),
        ("0, ankle [23] ,*1", [0, 2, 3, 1, 7]),
    ],
)
def test_features(here: Path, chosen: str, expected: list[int]) -> None:
    assert indices("--features", chosen) == expected


@pytest.mark.parametrize(
    "chosen", ["12", "0-12", "5-3", "elbow", "", "-1", "1.5", "\x1b[31m", "9" * 5000, "1-" + "9" * 5000]
)
def test_features_that_are_not_there(here: Path, chosen: str) -> None:
    check_refused(2, ["inspect", "s.bn.h5", f"--features={chosen}"], "--features")


def test_sort_and_top(here: Path) -> None:
    assert indices("--sort", "running_sd", "--top", "3") == [11, 10, 9]
    assert indices("--top", "2") == [0, 1]
    assert indices("--sort", "name", "--top", "1") == [11]
    assert len(indices("--sort", "flags")) == 12
    check_refused(2, ["inspect", "s.bn.h5", "--sort", "size"], "--sort", "running_mean")
    check_refused(2, ["inspect", "s.bn.h5", "--top", "0"], "--top")


def test_get(here: Path) -> None:
    stats = bncli.load("s.bn.h5")
    assert [
        float(v) for v in good("inspect", "s.bn.h5", "--get", "running_mean").out.split()
    ] == stats.running_mean.tolist()
    assert good("inspect", "s.bn.h5", "--get", "name", "--top", "2").out == "ankle 0\nankle 1\n"
    for name in ("momentum", "eps", "num_features", "init", "num_batches"):
        assert good("inspect", "s.bn.h5", "--get", name).out == f"{getattr(stats, name)}\n"
    check_refused(2, ["inspect", "s.bn.h5", "--get", "variance"], "variance", "running_var")
    check_refused(2, ["inspect", "s.bn.h5", "--get", "sources"], "sources")
    check_refused(2, ["inspect", "s.bn.h5", "--get", "eps", "--json"], "exclude")
    check_refused(2, ["inspect", "s.bn.h5", "--csv", "--json"], "exclude")


def test_momentum_none(here: Path) -> None:
    good("fit", "x.npy", "--momentum", "none", "-o", "s.bn.h5", "-f")
    assert good("inspect", "s.bn.h5", "--get", "momentum").out == "none\n"
    assert json.loads(good("inspect", "s.bn.h5", "--json").out)["momentum"] is None
    assert "momentum none: the running statistics are the population's" in plain(
        on_terminal(["inspect", "s.bn.h5"]).out
    )


def test_no_names_are_no_text(here: Path) -> None:
    good("fit", "x.npy", "-o", "s.bn.h5", "-f")
    assert {row["name"] for row in rows_of()} == {""}
    assert good("inspect", "s.bn.h5", "--get", "name", "--top", "2").out == "\n\n"
    check_refused(2, ["inspect", "s.bn.h5", "--features", "ankle*"], "no feature names")


def test_not_a_number_is_nan_in_text_and_null_in_json(here: Path) -> None:
    x = table(50, 2)
    x[:, 1] = np.nan
    save(here / "x.npy", x)
    good("fit", "x.npy", "--nan", "omit", "-o", "s.bn.h5", "-f", "-q")
    row = rows_of()[1]
    assert (row["running_mean"], row["population_var"], row["count"], row["flags"]) == ("nan", "nan", "0", "missing")
    feature = json.loads(good("inspect", "s.bn.h5", "--json").out)["features"][1]
    assert [feature[k] for k in ("running_mean", "running_sd", "scale") if k in feature] == [None, None]
    assert indices("--sort", "running_mean") == [0, 1]


def test_flags_of_imported_statistics(here: Path) -> None:
    c = np.ones(2)
    Stats(c, c, c, 0 * c, Moments.empty(2)).save("s.bn.h5")
    assert [row["flags"] for row in rows_of()] == ["no-population"] * 2
    assert [row["population_mean"] for row in rows_of()] == ["nan"] * 2
    check_refused(4, ["apply", "s.bn.h5", "x.npy", "-o", "y.npy", "--use", "population"], "population")


def test_names_with_controls_markup_tabs_and_quotes(here: Path) -> None:
    names = ("\x1b[31mred", "[bold]b[/bold]", 'a\t"q",\n', "\u202egnp", "変数" * 10, "\x9b2J")
    c = np.arange(1.0, 7)
    Stats(
        c, c, c, c, Moments.empty(6), names=names, provenance={"sources": [{"name": "s\x1b", "dataset": "[d]"}]}
    ).save("s.bn.h5")
    for args in ([], ["--csv"], ["--json"], ["--get", "name"]):
        assert no_controls(good("inspect", "s.bn.h5", *args).out.replace("\t", ""))
    shown = [row["name"] for row in rows_of()]
    assert shown == ["\\x1b[31mred", "[bold]b[/bold]", 'a\\t"q",\\n', "\\u202egnp", "変数" * 10, "\\x9b2J"]
    assert [f["name"] for f in json.loads(good("inspect", "s.bn.h5", "--json").out)["features"]] == list(names)
    assert no_controls(bn("inspect", "s.bn.h5", "--features", "\x1b").err)


@pytest.mark.parametrize("columns", [80, 40, 200])
def test_terminal(here: Path, columns: int) -> None:
    result = on_terminal(["inspect", "s.bn.h5"], columns)
    text = plain(result.out)
    assert result.code == 0
    assert result.err == ""
    words = " ".join(text.split())
    for said in (
        "s.bn.h5: 12 features on axis -1, 600 samples, 3 batches of 256, the last of 88",
        "0.9 weighs the OLD value; PyTorch's momentum is 0.1",
        "eps 1e-05, ddof 0, init debias; 24 parameters",
        "apply uses the running statistics",
        "fitted on x.npy",
    ):
        assert said in words
    assert all(len(line) <= columns for line in text.splitlines())
    running = bncli.load("s.bn.h5").running_mean
    rows = {line.split()[0]: line for line in text.split("\n\n")[1].splitlines()}
    for i, value in enumerate(running.tolist()):
        line = rows[str(i)]
        assert f"{value:.6g}" in NUMBER.findall(line)
        assert "…" not in line


def test_terminal_without_colour(here: Path) -> None:
    assert "\x1b[" in on_terminal(["inspect", "s.bn.h5"]).out
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        out = on_terminal(["inspect", "s.bn.h5"], **{name: value}).out
        assert "\x1b[3" not in out  # a colour
        assert "ankle 0" in out
        assert name != "TERM" or "\x1b" not in out


def test_many_features_are_cut_on_a_terminal_and_said(here: Path) -> None:
    c = np.ones(1234)
    Stats(c, c, c, c, Moments.empty(1234)).save("s.bn.h5")
    text = " ".join(plain(on_terminal(["inspect", "s.bn.h5"]).out).split())
    assert "1,134 more features: choose with --features, --sort and --top, or pipe the output" in text
    assert len(rows_of()) == 1234


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, ["no such file"]),
        (lambda p: p.mkdir(), ["not a regular file"]),
        (lambda p: p.write_bytes(b""), ["not a readable stats file"]),
        (lambda p: p.write_text("hello"), ["not a readable stats file"]),
    ],
)
def test_not_a_stats_file(here: Path, make: object, words: list[str]) -> None:
    make(here / "other")  # type: ignore[operator]
    check_refused(3, ["inspect", "other"], "other", *words)
