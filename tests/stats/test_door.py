"""A column from outside: one row in the table of columns, and everything that shows or writes columns has it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import good, save

import bncli
from bncli.stats import columns
from bncli.stats.columns import Column


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Adds the column `cv`; returns its values. Before that, exported files that lack it."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x.npy", np.random.default_rng(0).random((100, 4)) * [1, 9, 3, 2] + [1, 5, 9, 2])
    good("fit", "x.npy", "-q")
    for suffix in ("csv", "npz", "json"):
        good("export", "x.bn.h5", "-o", f"old.{suffix}", "-q")
    cv = Column(
        lambda stats: np.sqrt(stats.population_var) / np.abs(stats.population_mean), "Coefficient of variation."
    )
    monkeypatch.setitem(columns.COLUMNS, "cv", cv)
    return cv.of(bncli.load("x.bn.h5")).tolist()  # type: ignore[union-attr]


def test_inspect_shows_it(toy: list[float]) -> None:
    rows = list(csv.DictReader(good("inspect", "x.bn.h5", "--tsv").out.splitlines(), delimiter="\t"))
    assert [float(row["cv"]) for row in rows] == toy
    assert [f["cv"] for f in json.loads(good("inspect", "x.bn.h5", "--json").out)["features"]] == toy
    assert [float(line) for line in good("inspect", "x.bn.h5", "--get", "cv").out.split()] == toy
    largest = good("inspect", "x.bn.h5", "--sort", "cv", "--get", "cv").out.split()
    assert [float(line) for line in largest] == sorted(toy, reverse=True)
    assert "| `cv` | Coefficient of variation. |" in columns.reference()


@pytest.mark.parametrize("suffix", ["csv", "npz", "json"])
def test_exported_files_hold_it_and_older_ones_are_read(toy: list[float], suffix: str) -> None:
    good("export", "x.bn.h5", "-o", f"new.{suffix}", "-q")
    if suffix == "npz":
        found = np.load("new.npz")["cv"].tolist()
    elif suffix == "csv":
        with open("new.csv", newline="", encoding="utf-8") as file:
            found = [float(row["cv"]) for row in csv.DictReader(file)]
    else:
        with open("new.json", encoding="utf-8") as file:
            found = [feature["cv"] for feature in json.load(file)["features"]]
    assert found == toy
    for age in ("old", "new"):
        good("import", f"{age}.{suffix}", "-o", f"{age}.{suffix}.bn.h5", "-q")
        back = bncli.load(f"{age}.{suffix}.bn.h5")
        assert back.running_mean.tolist() == bncli.load("x.bn.h5").running_mean.tolist()


@pytest.mark.parametrize("suffix", ["csv", "npz", "json"])
def test_texts_and_gaps_are_exported(toy: list[float], monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    of_text, of_gap = [str(value) for value in toy], [None, *toy[1:]]
    monkeypatch.setitem(columns.COLUMNS, "text", Column(lambda stats: of_text, "A text.", kind="text", exported=13))
    monkeypatch.setitem(columns.COLUMNS, "gap", Column(lambda stats: of_gap, "A gap.", exported=14))
    good("export", "x.bn.h5", "-o", f"new.{suffix}", "-q")
    if suffix == "npz":
        found = np.load("new.npz")
        assert found["text"].tolist() == of_text
        assert np.isnan(found["gap"][0])
        assert found["gap"][1:].tolist() == toy[1:]
