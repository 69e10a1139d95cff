"""bn merge, as a person and a script see it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import check_refused, good, save, table, temporaries, untouched
from helpers import check_same_bytes

import bncli


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Part 1 and 2 of a table of 600 samples, the first of two whole batches; and the whole."""
    monkeypatch.chdir(tmp_path)
    x = table(600)
    for name, values in (("x", x), ("part-1", x[:512]), ("part-2", x[512:])):
        save(tmp_path / f"{name}.npy", values)
        good("fit", f"{name}.npy")
    return tmp_path


def test_parts_are_the_whole(here: Path) -> None:
    result = good("merge", "part-1.bn.h5", "part-2.bn.h5", "-o", "all.bn.h5")
    assert result.err == ""
    assert "2 files merged: 3 features, 600 samples, 3 batches of 256, the last of 88" in result.out
    assert "stats in all.bn.h5" in result.out
    merged, whole = bncli.load("all.bn.h5"), bncli.load("x.bn.h5")
    for name in ("running_mean", "running_var", "population_mean", "population_var"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=5e-15)
    assert [s["name"] for s in merged.provenance["sources"]] == ["part-1.npy", "part-2.npy"]


def test_order_matters_to_the_running_statistics_and_is_said(here: Path) -> None:
    result = good("merge", "part-2.bn.h5", "part-1.bn.h5", "-o", "all.bn.h5")
    assert "own batches" in result.err
    assert "part-2.bn.h5 has 88 samples in batches of 256" in result.err
    assert "600 samples, 3 batches\n" in result.out
    merged, whole = bncli.load("all.bn.h5"), bncli.load("x.bn.h5")
    assert (merged.running_mean != whole.running_mean).all()
    np.testing.assert_allclose(merged.population_var, whole.population_var, rtol=5e-15)
    assert json.loads(good("inspect", "all.bn.h5", "--json").out)["batch_size"] == 0


def test_patterns_expand_in_natural_order(here: Path) -> None:
    for i in (1, 2, 10):
        save(here / f"day-{i}.npy", table(256, seed=i))
        good("fit", f"day-{i}.npy")
    good("merge", "day-*.bn.h5", "-o", "all.bn.h5")
    merged = bncli.load("all.bn.h5")
    assert [s["name"] for s in merged.provenance["sources"]] == ["day-1.npy", "day-2.npy", "day-10.npy"]
    check_refused(3, ["merge", "night-*.bn.h5", "-o", "n.bn.h5"], "no file matches")


def test_json_is_the_record_and_quiet_says_nothing(here: Path) -> None:
    result = good("merge", "part-1.bn.h5", "part-2.bn.h5", "-o", "all.bn.h5", "--json")
    assert json.loads(result.out) == bncli.load("all.bn.h5").as_dict()
    quiet = good("merge", "part-2.bn.h5", "part-1.bn.h5", "-o", "all.bn.h5", "-f", "-q")
    assert (quiet.out, quiet.err) == ("", "")


def test_disagreement_names_both_files_and_the_way_out(here: Path) -> None:
    good("fit", "part-2.npy", "--momentum", "0.99", "-f")
    args = ["merge", "part-1.bn.h5", "part-2.bn.h5", "-o", "all.bn.h5"]
    with untouched(here):
        check_refused(4, args, "part-1.bn.h5 and part-2.bn.h5 differ in momentum: 0.9 and 0.99", "--population-only")
    assert "momentum none" in good(*args, "--population-only").out
    merged, whole = bncli.load("all.bn.h5"), bncli.load("x.bn.h5")
    np.testing.assert_allclose(merged.running_mean, whole.population_mean, rtol=5e-15)
    assert merged.momentum is None
    again = good("merge", "all.bn.h5", "all.bn.h5", "-o", "twice.bn.h5")
    assert "all.bn.h5: given twice" in again.err
    assert bncli.load("twice.bn.h5").num_samples == 1200


@pytest.mark.parametrize("command", ["fit", "merge", "merge --population-only"])
def test_momentum_none_with_ddof_1(here: Path, command: str) -> None:
    """m2 / (count - 1), as numpy.var has it, and every summary says so."""
    x = np.random.default_rng(5).normal(3, 2, (7, 2))
    np.save("few.npy", x)
    good("fit", "few.npy", "--momentum", "none", "--ddof", "1", "--batch-size", "4", "-o", "few.bn.h5")
    said = "the running statistics are the population's, with ddof 1"
    values = x
    if command == "fit":
        assert said in good("fit", "few.npy", "--momentum", "none", "--ddof", "1", "--dry-run", "-f").out
        result = good("fit", "few.npy", "--momentum", "none", "--ddof", "1", "-o", "few.bn.h5", "-f")
    else:
        values = np.concatenate([x, x])
        result = good(*command.split(), "few.bn.h5", "few.bn.h5", "-o", "twice.bn.h5")
    assert said in result.out
    path = "few.bn.h5" if command == "fit" else "twice.bn.h5"
    for use, ddof in (("running", 1), ("population", 0)):
        found = [float(line) for line in good("inspect", path, "--get", f"{use}_var").out.splitlines()]
        np.testing.assert_allclose(found, values.var(axis=0, ddof=ddof), rtol=1e-14)
        good("apply", path, "few.npy", "--use", use, "-o", "y.npy", "-f")
        expected = (x - x.mean(axis=0)) / np.sqrt(values.var(axis=0, ddof=ddof) + 1e-5)
        np.testing.assert_allclose(np.load("y.npy"), expected, rtol=1e-12, atol=1e-14)
    assert bncli.load(path).flags() == [[], []]
    assert "differ from the population's" not in result.err


def test_other_features_are_refused(here: Path) -> None:
    save(here / "wide.npy", table(600, 4))
    good("fit", "wide.npy")
    with untouched(here):
        for option in ([], ["--population-only"]):
            check_refused(
                4, ["merge", "x.bn.h5", "wide.bn.h5", "-o", "n.bn.h5", *option], "x.bn.h5 and wide.bn.h5", "3 and 4"
            )


def test_gamma_and_beta_agree_or_are_given(here: Path) -> None:
    good("fit", "part-2.npy", "--gamma", "2", "-f")
    args = ["merge", "part-1.bn.h5", "part-2.bn.h5", "-o", "all.bn.h5"]
    check_refused(4, args, "differ in gamma: 1.0 and 2.0 for feature 0", "--gamma")
    save(here / "gamma.npy", np.array([1.0, 2.0, 3.0]))
    good(*args, "--gamma", "gamma.npy", "--beta", "-1")
    merged = bncli.load("all.bn.h5")
    assert (merged.gamma.tolist(), merged.beta.tolist()) == ([1.0, 2.0, 3.0], [-1.0, -1.0, -1.0])
    good(*args, "-f", "--gamma", "part-2.bn.h5")  # a stats file gives its own
    assert bncli.load("all.bn.h5").gamma.tolist() == [2.0, 2.0, 2.0]
    check_refused(4, [*args, "-f", "--gamma", "x.npy"], "--gamma x.npy: holds 1800 values")
    check_refused(2, [*args, "-f", "--gamma", "inf"], "--gamma holds a value that is not finite")
    check_refused(5, ["merge", "x.bn.h5", "-o", "gamma.npy", "--gamma", "gamma.npy", "-f"], "is also an input")


def test_output_is_never_an_input_nor_replaced_unasked(here: Path) -> None:
    with untouched(here):
        check_refused(5, ["merge", "x.bn.h5", "part-1.bn.h5", "-o", "part-1.bn.h5", "-f"], "is also an input")
        check_refused(5, ["merge", "part-1.bn.h5", "part-2.bn.h5", "-o", "x.bn.h5"], "-f/--force")
    assert not temporaries(here)


def test_what_is_no_stats_file_is_refused(here: Path) -> None:
    with untouched(here):
        check_refused(
            3,
            ["merge", "x.bn.h5", "x.npy", "-o", "n.bn.h5"],
            "x.npy: not a readable stats file",
            "make one with 'bn fit'",
        )
        check_refused(3, ["merge", "x.bn.h5", "none.bn.h5", "-o", "n.bn.h5"], "none.bn.h5: no such file")
        check_refused(2, ["merge", "-o", "n.bn.h5"], "missing STATS...")
        check_refused(2, ["merge", "x.bn.h5"], "missing -o/--output")


def test_one_file_merges_to_itself(here: Path) -> None:
    assert "1 file merged" in good("merge", "x.bn.h5", "-o", "same.bn.h5").out
    check_same_bytes(bncli.load("same.bn.h5"), bncli.load("x.bn.h5"))
