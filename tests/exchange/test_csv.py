"""CSV as Python's own reader sees it, and as people and `bn inspect` write it; round trips are in exchange/test_json.py."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import good
from exchange_helpers import check_no_population, check_same_numbers, features

from bncli import exchange
from bncli.errors import InputError


def test_columns(tmp_path: Path) -> None:
    stats = features(3)
    exchange.write(stats, str(tmp_path / "x.csv"))
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == ["0", "1", "2"]
    scale, shift = stats.scale_shift()
    for name, expected in (("running_mean", stats.running_mean), ("scale", scale), ("shift", shift)):
        assert [float(row[name]) for row in rows] == expected.tolist()
    assert {(row["eps"], row["momentum"], row["ddof"], row["num_features"]) for row in rows} == {
        ("0.001", "0.97", "0", "3")
    }


def test_names_of_any_characters(tmp_path: Path) -> None:
    names = ("a\rb", 'c"\r\n,', "\n")
    exchange.write(replace(features(3), names=names), str(tmp_path / "x.csv"))
    assert exchange.read(str(tmp_path / "x.csv")).names == names


def test_what_inspect_prints_is_read(tmp_path: Path) -> None:
    stats = features(3)
    stats.save(str(tmp_path / "s.bn.h5"))
    (tmp_path / "x.csv").write_text(good("inspect", tmp_path / "s.bn.h5", "--csv").out)
    back = exchange.read(str(tmp_path / "x.csv"), eps=1e-3)
    check_same_numbers(stats, back)
    assert back.population_var.tolist() == stats.population_var.tolist()


def test_what_people_write_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\ufeffrunning_var,running_mean,comment\r\n4,1e3,a\r\n9,-2,b", newline="")
    stats = exchange.read(str(tmp_path / "x.csv"))
    assert (stats.running_mean.tolist(), stats.running_var.tolist()) == ([1000, -2], [4, 9])
    assert (stats.eps, stats.momentum, stats.names) == (1e-5, 0.9, None)
    check_no_population(stats)


@pytest.mark.parametrize(
    "text",
    [
        "running_mean,running_var\n",
        "running_mean\n1\n",
        "mean,var\n1,2\n",
        "running_mean,running_var\n1\n",
        "running_mean,running_var\n1,2,3\n",
        "running_mean,running_var\n1,x\n",
        "running_mean,running_var\n1,\n",
        "running_mean,running_var\n1,-2\n",
        "running_mean,running_var\n1,inf\n",
        "running_mean,running_var\nnan,1\n",
        "running_mean,running_mean,running_var\n1,1,1\n",
        "running_mean,running_var,eps\n1,1,1e-5\n1,1,1e-3\n",
        "running_mean,running_var,eps\n1,1,none\n",
        "running_mean,running_var,ddof\n1,1,0.5\n",
        "running_mean,running_var,axis\n1,1,0\n",
        "index,running_mean,running_var\n1,1,1\n0,1,1\n",
        "index,running_mean,running_var\n0,1,1\n2,1,1\n",
        "running_mean,running_var,num_features\n1,1,2\n",
        'running_mean,running_var\n"1,1\n',
    ],
)
def test_tables_that_are_no_statistics(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=r"x\.csv"):
        exchange.read(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("count", [1, 3])
def test_cut_anywhere(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.csv"
    exchange.write(features(count), str(path))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            exchange.read(str(path))


def test_the_checksum(tmp_path: Path) -> None:
    """A damaged one is no missing one; without its column a table is believed."""
    path = tmp_path / "x.csv"
    exchange.write(features(3), str(path))
    text = path.read_text()
    for i in range(len("bncli_sha256")):
        title = "bncli_sha256"[:i] + "#" + "bncli_sha256"[i + 1 :]
        path.write_text(text.replace("bncli_sha256", title))
        with pytest.raises(InputError, match=r"x\.csv: damaged: its values do not match its checksum"):
            exchange.read(str(path))
    for old, new in (("0.001", "0.002"), ("debias", "zeros"), ("momentum", "momemtum"), (",gamma,", ",gamna,")):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=r"x\.csv: damaged: .*take the checksum out"):
            exchange.read(str(path))
    rows = [row.split(",") for row in text.splitlines()]
    column = rows[0].index("bncli_sha256")
    path.write_text(
        "".join(",".join(row[:column] + row[column + 1 :]) + "\n" for row in rows).replace("0.001", "0.002")
    )
    assert exchange.read(str(path)).eps == 0.002
