"""bn fit, as a person and a script see it."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
from cli_helpers import bn, check_refused, contents, good, no_controls, save, save_h5, table, untouched
from helpers import PRESETS, advised, check_same_bytes, cut, exact

import bncli
from bncli.engine.options import FitOptions
from bncli.engine.plan import FitSpec
from bncli.errors import BnWarning


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_default_output_is_stem_in_the_current_folder(here: Path) -> None:
    (here / "data").mkdir()
    save(here / "data" / "train.v2.npy", table())
    result = good("fit", "data/train.v2.npy")
    assert "stats in train.v2.bn.h5" in result.out
    assert (here / "train.v2.bn.h5").is_file()


def test_summary_on_stdout_nothing_on_stderr(here: Path) -> None:
    save(here / "x.npy", table(600))
    result = good("fit", "x.npy")
    assert result.err == ""
    assert "3 features, 600 samples, 3 batches of 256, the last of 88" in result.out
    assert "0.9 * running + 0.1 * batch" in result.out
    assert "PyTorch's momentum is 0.1" in result.out


def test_numbers_are_numpys(here: Path) -> None:
    x = table(512)
    save(here / "x.npy", x)
    good("fit", "x.npy", "--momentum", "none")
    stats = bncli.load("x.bn.h5")
    np.testing.assert_allclose(stats.running_mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(stats.running_var, x.var(axis=0), rtol=1e-13)


def test_running_is_the_recurrence_of_its_init(here: Path) -> None:
    x = table(300)
    save(here / "x.npy", x)
    good("fit", "x.npy", "--momentum", "0.6", "--batch-size", "100", "--init", "unit", "--ddof", "1")
    mean, var = np.zeros(3), np.ones(3)
    for batch in np.split(x, 3):
        mean = 0.6 * mean + 0.4 * batch.mean(axis=0)
        var = 0.6 * var + 0.4 * batch.var(axis=0, ddof=1)
    stats = bncli.load("x.bn.h5")
    np.testing.assert_allclose(stats.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(stats.running_var, var, rtol=1e-13)


def test_json_is_the_record_and_nothing_else(here: Path) -> None:
    save(here / "x.npy", table())
    record = json.loads(good("fit", "x.npy", "--json").out)
    assert record == bncli.load("x.bn.h5").as_dict()
    assert record["sources"][0]["name"] == "x.npy"


def test_quiet_says_nothing_at_all(here: Path) -> None:
    x = np.ones((20, 2))
    save(here / "x.npy", x)
    loud, quiet = bn("fit", "x.npy"), bn("fit", "x.npy", "-f", "-q")
    assert "bn: warning: 2 features are constant: 0, 1" in loud.err
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_quiet_still_says_errors(here: Path) -> None:
    check_refused(3, ["fit", "-q", "none.npy"], "none.npy: no such file")


def test_dry_run_reads_and_writes_nothing(here: Path) -> None:
    values = table()
    values[5, 1] = np.nan  # a fit would stop here
    save(here / "x.npy", values)
    with untouched(here):
        result = good("fit", "x.npy", "-n", "--rows", "10:-10")
    for words in ("samples 10 to 590 of 600", "580 samples", "3 batches of 256, the last of 68", "would write x.bn.h5"):
        assert words in result.out


def test_output_exists(here: Path) -> None:
    save(here / "x.npy", table())
    good("fit", "x.npy")
    with untouched(here):
        check_refused(5, ["fit", "x.npy"], "x.bn.h5", "-f/--force", "-o")
    good("fit", "x.npy", "-f", "--momentum", "0.5")
    assert bncli.load("x.bn.h5").momentum == 0.5


@pytest.mark.parametrize("how", ["same", "symbolic", "hard"])
def test_output_is_an_input(here: Path, how: str) -> None:
    save_h5(here / "x.h5", table())
    if how == "symbolic":
        (here / "out.h5").symlink_to("x.h5")
    elif how == "hard":
        (here / "out.h5").hardlink_to(here / "x.h5")
    out = "x.h5" if how == "same" else "out.h5"
    with untouched(here):
        check_refused(5, ["fit", "x.h5", "-o", out, "-f"], out, "also an input")


@pytest.mark.parametrize("option", ["--gamma", "--beta", "--names"])
def test_output_is_a_file_of_an_option(here: Path, option: str) -> None:
    save(here / "x.npy", table())
    if option == "--names":
        (here / "side").write_text("a\nb\nc\n")
    else:
        with (here / "side").open("wb") as file:
            np.save(file, np.ones(3))
    with untouched(here):
        check_refused(5, ["fit", "x.npy", option, "side", "-o", "side", "-f"], "side", "also an input")


def test_failed_fit_leaves_the_old_file(here: Path) -> None:
    good("fit", save(here / "x.npy", table()))
    values = table()
    values[417, 2] = np.inf
    save(here / "y.npy", values)
    with untouched(here):
        check_refused(
            3, ["fit", "y.npy", "-o", "x.bn.h5", "-f"], "y.npy", "sample 417", "feature 2", "inf", "--nan omit"
        )


def test_names_from_text_file_attribute_and_dataset(here: Path) -> None:
    save(here / "x.npy", table())
    (here / "names.txt").write_text("\ufefflength\nwidth [cm]\nähre\n", encoding="utf-8")
    good("fit", "x.npy", "--names", "names.txt")
    assert bncli.load("x.bn.h5").names == ("length", "width [cm]", "ähre")
    with h5py.File("y.h5", "w") as file:
        file["x"] = table()
        file["x"].attrs["feature_names"] = ["p", "q", "r"]
        file["n"] = ["u", "v", "w"]
    good("fit", "y.h5")
    assert bncli.load("y.bn.h5").names == ("p", "q", "r")
    good("fit", "y.h5", "-f", "--names", "y.h5::/n")
    assert bncli.load("y.bn.h5").names == ("u", "v", "w")


def test_names_that_do_not_fit(here: Path) -> None:
    save(here / "x.npy", table())
    (here / "names.txt").write_text("a\nb\n")
    check_refused(4, ["fit", "x.npy", "--names", "names.txt"], "names.txt", "2 names for 3 features")
    (here / "latin.txt").write_bytes(b"a\nb\n\xe9\n")
    check_refused(3, ["fit", "x.npy", "--names", "latin.txt"], "latin.txt", "UTF-8")
    save_h5(here / "n.h5", np.arange(3.0))
    check_refused(2, ["fit", "x.npy", "--names", "n.h5"], "n.h5::/")
    assert not (here / "x.bn.h5").exists()


def test_gamma_and_beta_as_number_and_address(here: Path) -> None:
    save(here / "x.npy", table())
    save_h5(here / "g.h5", np.array([1.5, 2.5, -3.5], ">f4"), "gamma")
    good("fit", "x.npy", "--gamma", "g.h5::/gamma", "--beta", "-0.25")
    stats = bncli.load("x.bn.h5")
    assert stats.gamma.tolist() == [1.5, 2.5, -3.5]
    assert stats.beta.tolist() == [-0.25] * 3


def trained(path: str, gamma: list[float], beta: list[float]) -> bncli.Stats:
    """A stats file of features that have these parameters."""
    stats = bncli.fit(table(50, len(gamma)), gamma=np.array(gamma), beta=np.array(beta))
    stats.save(path)
    return stats


def test_gamma_and_beta_of_a_stats_file(here: Path) -> None:
    save(here / "x.npy", table())
    trained("trained.bn.h5", [1.5, 2.5, -3.5], [0.1, 0.2, 0.3])
    good("fit", "x.npy", "--gamma", "trained.bn.h5")
    assert bncli.load("x.bn.h5").gamma.tolist() == [1.5, 2.5, -3.5]
    assert bncli.load("x.bn.h5").beta.tolist() == [0, 0, 0]
    with h5py.File("trained.bn.h5") as ours, h5py.File("copy.h5", "w") as copy:  # another tool's: without the seal
        for name in ours:
            ours.copy(name, copy)
        copy.attrs.update(ours.attrs)
    good("fit", "x.npy", "--beta", "copy.h5", "--gamma", "copy.h5::/beta", "-f")
    assert bncli.load("x.bn.h5").beta.tolist() == [0.1, 0.2, 0.3]
    assert bncli.load("x.bn.h5").gamma.tolist() == [0.1, 0.2, 0.3]
    check_refused(5, ["fit", "x.npy", "--beta", "copy.h5", "-o", "copy.h5", "-f"], "copy.h5", "also an input")


def test_a_stats_file_whose_parameters_cannot_be_taken(here: Path) -> None:
    save(here / "x.npy", table())
    trained("trained.bn.h5", [1.5, 2.5], [0, 0])
    for option in ("--gamma", "--beta"):
        check_refused(
            4, ["fit", "x.npy", option, "trained.bn.h5"], f"{option} trained.bn.h5", "2 features", "3 features"
        )
    image = bytearray((here / "trained.bn.h5").read_bytes())
    image[len(image) // 2] ^= 1
    (here / "damaged.bn.h5").write_bytes(image)
    check_refused(3, ["fit", "x.npy", "--gamma", "damaged.bn.h5"], "damaged.bn.h5", "damaged")
    with h5py.File("copy.h5", "w") as copy, h5py.File("trained.bn.h5") as ours:
        copy["gamma"] = np.ones(3)
        copy.attrs["digest"] = ours.attrs["digest"]
    check_refused(3, ["fit", "x.npy", "--gamma", "copy.h5"], "copy.h5", "digest")
    assert not (here / "x.bn.h5").exists()


def test_like_gives_conventions_gamma_and_beta_but_no_statistics(here: Path) -> None:
    save(here / "old.npy", table(seed=1))
    x = table(seed=2) * 3 + 1
    save(here / "new.npy", x)
    save(here / "g.npy", np.array([1.5, 2.5, -3.5]))
    conventions = ["--momentum", "0.7", "--eps", "1e-3", "--ddof", "1", "--batch-size", "100"]
    good("fit", "old.npy", *conventions, "--init", "unit", "--gamma", "g.npy", "--beta", "0.5")
    good("fit", "new.npy", "--like", "old.bn.h5")  # new statistics start afresh
    good("fit", "new.npy", *conventions, "--gamma", "g.npy", "--beta", "0.5", "-o", "expected.bn.h5")
    found, expected = bncli.load("new.bn.h5"), bncli.load("expected.bn.h5")
    check_same_bytes(found, expected)
    for name in ("momentum", "eps", "ddof", "init", "axis", "batch_size"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.gamma.tolist() == [1.5, 2.5, -3.5]
    assert found.beta.tolist() == [0.5] * 3
    assert found.options["like"] == "old.bn.h5"
    for like in ("old.bn.h5", Path("old.bn.h5"), bncli.load("old.bn.h5")):
        with advised("running statistics"):
            in_memory = bncli.fit(x, like=like)
        check_same_bytes(in_memory, expected)
        assert in_memory.gamma.tolist() == [1.5, 2.5, -3.5]


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--momentum", "none"], "momentum", None),
        (["--eps", "0.5"], "eps", 0.5),
        (["--ddof", "0"], "ddof", 0),
        (["--init", "zeros"], "init", "zeros"),
        (["--batch-size", "64"], "batch_size", 64),
        (["--gamma", "2"], "gamma", [2.0] * 3),
        (["--beta", "0"], "beta", [0.0] * 3),
    ],
)
def test_options_beside_like_win(here: Path, args: list[str], name: str, value: object) -> None:
    save(here / "x.npy", table())
    conventions = ["--momentum", "0.7", "--eps", "1e-3", "--ddof", "1", "--init", "unit", "--batch-size", "100"]
    good("fit", "x.npy", *conventions, "--gamma", "3", "--beta", "4", "-o", "old.bn.h5")
    bn("fit", "x.npy", "--like", "old.bn.h5", *args)
    old, new = bncli.load("old.bn.h5"), bncli.load("x.bn.h5")
    for field in ("momentum", "eps", "ddof", "init", "batch_size", "gamma", "beta"):
        kept, found = (np.asarray(getattr(s, field)).tolist() for s in (old, new))
        kept = "debias" if field == "init" else kept
        assert found == (value if field == name else kept), field


def test_init_like_goes_on_from_the_statistics_of_the_other_fit(here: Path) -> None:
    """The recurrence in exact fractions, one batch after the other, from the other fit's statistics."""
    old, new = table(seed=1), table(seed=2) * 3 + 1
    save(here / "old.npy", old)
    save(here / "new.npy", new)
    good("fit", "old.npy", "--momentum", "0.75", "--batch-size", "100")
    text = good("fit", "new.npy", "--like", "old.bn.h5", "--init", "like").out
    assert "start at the running statistics of --like; AdaBN and precise BN use --momentum none" in text
    before, after = bncli.load("old.bn.h5"), bncli.load("new.bn.h5")
    assert after.init == "like"
    for c in range(3):
        mean, var = Fraction(before.running_mean[c]), Fraction(before.running_var[c])
        for batch in cut(new, 100):
            truth = exact(batch[:, c])
            mean, var = (
                Fraction(3, 4) * r + Fraction(1, 4) * s for r, s in ((mean, truth.mean), (var, truth.variance))
            )
        assert after.running_mean[c] == pytest.approx(float(mean), rel=1e-14)
        assert after.running_var[c] == pytest.approx(float(var), rel=1e-14)


def test_features_that_start_afresh_are_named(here: Path) -> None:
    save(here / "new.npy", table(seed=2))
    x = table(seed=1)
    x[:, 1] = np.nan
    save(here / "old.npy", x)
    good("fit", "old.npy", "--nan", "omit", "-q")
    said = good("fit", "new.npy", "--like", "old.bn.h5", "--init", "like").err
    assert "--like has no running statistics of 1 of 3 features (feature 1 is the first)" in said
    found, alone = bncli.load("new.bn.h5"), bncli.fit(table(seed=2))
    assert found.running_mean[1] == alone.running_mean[1]
    assert found.running_mean[0] != alone.running_mean[0]


def test_parts_that_start_alike_merge(here: Path) -> None:
    save(here / "old.npy", table(seed=1))
    save(here / "new.npy", table(seed=2))
    good("fit", "old.npy", "--batch-size", "100")
    like = ["--like", "old.bn.h5", "--init", "like"]
    good("fit", "new.npy", *like, "-o", "whole.bn.h5", "-q")
    for name, rows in (("a", ":300"), ("b", "300:")):
        good("fit", "new.npy", *like, "--rows", rows, "-o", f"{name}.bn.h5", "-q")
    good("merge", "a.bn.h5", "b.bn.h5", "-o", "merged.bn.h5", "-q")
    whole, merged = bncli.load("whole.bn.h5"), bncli.load("merged.bn.h5")
    np.testing.assert_allclose(merged.running_mean, whole.running_mean, rtol=1e-14)
    np.testing.assert_allclose(merged.running_var, whole.running_var, rtol=1e-14)
    good("merge", "--population-only", "a.bn.h5", "b.bn.h5", "-o", "population.bn.h5", "-q")
    population = bncli.load("population.bn.h5")
    np.testing.assert_allclose(population.running_mean, table(seed=2).mean(axis=0), rtol=1e-13)
    assert population.init == "debias"
    good("fit", "new.npy", "-o", "other.bn.h5", "-q")
    good("fit", "new.npy", "--like", "other.bn.h5", "--init", "like", "-o", "c.bn.h5", "-q")
    check_refused(4, ["merge", "a.bn.h5", "c.bn.h5", "-o", "no.bn.h5"], "started from different statistics")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--init", "like"], "give --like STATS"),
        (["--init", "like", "--like", "x.bn.h5", "--momentum", "none"], "give --momentum M"),
    ],
)
def test_init_like_needs_statistics_and_a_momentum(here: Path, args: list[str], words: str) -> None:
    save(here / "x.npy", table())
    good("fit", "x.npy")
    check_refused(2, ["fit", "x.npy", *args, "-o", "y.bn.h5"], words)


def test_like_fits_the_data_or_is_refused(here: Path) -> None:
    images = np.random.default_rng(0).random((20, 3, 4, 5))
    save(here / "images.npy", images)
    save(here / "table.npy", table())
    save(here / "wide.npy", table(columns=4))
    good("fit", "images.npy", "--axis", "1")
    good("fit", "table.npy")
    check_refused(4, ["fit", "wide.npy", "--like", "table.bn.h5"], "4 features", "the stats have 3")
    check_refused(
        4, ["fit", "table.npy", "--like", "images.bn.h5", "-f"], "2 dimensions", "the fitted data had 4", "--axis"
    )
    good("fit", "table.npy", "--like", "images.bn.h5", "--axis", "1", "-f")
    good("fit", "images.npy", "--like", "images.bn.h5", "-o", "again.bn.h5")
    assert bncli.load("again.bn.h5").axis == 1
    for name, names in (("p", ["a", "b", "c"]), ("q", ["a", "x", "c"]), ("none", None)):
        with h5py.File(f"{name}.h5", "w") as file:
            file["x"] = table()
            if names:
                file["x"].attrs["feature_names"] = names
    good("fit", "p.h5")
    check_refused(4, ["fit", "q.h5", "--like", "p.bn.h5"], "feature names", "b in the stats", "x in the data")
    good("fit", "none.h5", "--like", "p.bn.h5")
    (here / "names.txt").write_text("a\nb\nc\n")
    good("fit", "q.h5", "--like", "p.bn.h5", "--names", "names.txt")


def test_like_is_an_input_and_excludes_presets(here: Path) -> None:
    save(here / "x.npy", table())
    good("fit", "x.npy")
    with untouched(here):
        check_refused(5, ["fit", "x.npy", "--like", "x.bn.h5", "-f"], "x.bn.h5", "also an input")
        check_refused(2, ["fit", "x.npy", "--like", "x.bn.h5", "--preset", "torch"], "--preset and --like", "with it")
        check_refused(3, ["fit", "x.npy", "--like", "none.bn.h5"], "none.bn.h5", "no such file")
        check_refused(3, ["fit", "x.npy", "--like", "x.npy"], "x.npy", "not a readable stats file")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--gamma", "nan"], 2, ["--gamma", "not finite"]),
        (["--gamma", "g.npy"], 4, ["--gamma", "g.npy", "2 values", "3 features"]),
        (["--beta", "none.npy"], 3, ["none.npy", "no such file"]),
        (["--momentum", "1"], 2, ["momentum", "0 <= m < 1", "PyTorch"]),
        (["--momentum", "nan"], 2, ["momentum"]),
        (["--momentum", "half"], 2, ["--momentum", "half"]),
        (["--eps", "-1"], 2, ["eps", "-1"]),
        (["--eps", "inf"], 2, ["eps"]),
        (["--ddof", "2"], 2, ["--ddof"]),
        (["--init", "ones"], 2, ["--init", "debias"]),
        (["--preset", "tf"], 2, ["--preset", "keras"]),
        (["--batch-size", "0"], 2, ["--batch-size 0"]),
        (["--seed", "-1"], 2, ["--seed -1"]),
        (["--batch-size", "1"], 2, ["--batch-size 1", "2 or more"]),
        (["--axis", "0"], 2, ["axis 0", "samples"]),
        (["--rows", "5"], 2, ["--rows", "A:B"]),
        (["--rows", "9:3"], 2, ["--rows", "selects none"]),
        (["--max-memory", "lots"], 2, ["lots", "128M"]),
        (["--max-memory", "10K"], 2, ["--max-memory", "1M"]),
        (["--fill-value", "x"], 2, ["--fill-value", "'x'"]),
        (["--momentun", "0.5"], 2, ["--momentun", "--momentum"]),
        (["-d", "y"], 3, []),
        (["-o", "no/such/folder/x.bn.h5"], 74, ["no/such/folder/x.bn.h5", "No such file or directory"]),
        (["-o", "."], 5, [".: is a folder"]),
        (["-o", "/dev/null"], 5, ["/dev/null", "not a regular file"]),
    ],
)
def test_what_an_option_cannot_be(here: Path, args: list[str], code: int, words: list[str]) -> None:
    save_h5(here / "x.h5", table())
    save(here / "g.npy", np.ones(2))
    with untouched(here):
        check_refused(code, ["fit", "x.h5", *args], *words)


def test_axis_must_be_given_for_images(here: Path) -> None:
    save(here / "images.npy", np.zeros((4, 3, 32, 30), "u1"))
    result = check_refused(2, ["fit", "images.npy"], "--axis 1: 3 features (NCHW)", "--axis -1: 30 features", lines=4)
    assert "--axis 2: 32 features" in result.err


def test_images_by_channel(here: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8)).astype("u1")
    save(here / "images.npy", x)
    good("fit", "images.npy", "--axis", "1")
    stats = bncli.load("images.bn.h5")
    np.testing.assert_allclose(stats.population_mean, x.mean(axis=(0, 2, 3), dtype="f8"), rtol=1e-14)
    assert stats.population_count.tolist() == [40 * 64] * 3


@pytest.mark.parametrize(("preset", "expected"), PRESETS.items())
def test_presets_and_options_beside_them(here: Path, preset: str, expected: tuple[object, ...]) -> None:
    save(here / "x.npy", table())
    good("fit", "x.npy", "--preset", preset, "-q")
    stats = bncli.load("x.bn.h5")
    assert (stats.momentum, stats.eps, stats.ddof, stats.init, stats.axis) == expected
    good("fit", "x.npy", "--preset", preset, "--momentum", "0.25", "--init", "first", "-f", "-q")
    stats = bncli.load("x.bn.h5")
    assert (stats.momentum, stats.eps, stats.ddof, stats.init) == (0.25, expected[1], expected[2], "first")


def test_sorted_data_is_shuffled_on_request(here: Path) -> None:
    save(here / "x.npy", np.repeat(np.arange(10.0), 1000)[:, None])
    assert "for sorted data give --shuffle" in good("fit", "x.npy", "-o", "sorted.bn.h5").err
    result = good("fit", "x.npy", "--shuffle", "--seed", "4")
    assert result.err == ""
    assert "1 feature, 10,000 samples, 40 batches of 256" in result.out
    stats = bncli.load("x.bn.h5")
    assert stats.options["shuffle"] is True
    assert stats.options["seed"] == 4
    assert abs(stats.running_var[0] - 8.25) < 0.25 * 8.25
    assert bncli.load("sorted.bn.h5").running_var[0] < 0.1
    assert "40 batches" in good("fit", "x.npy", "--shuffle", "-n").out
    good("fit", "x.npy", "--shuffle", "-o", "other.bn.h5")
    assert bncli.load("other.bn.h5").running_mean != stats.running_mean


def test_ambiguous_dataset_lists_what_to_type(here: Path) -> None:
    with h5py.File("x.h5", "w") as file:
        file["a/train"] = table()
        file["b"] = table(5, 2, "f4")
        file["label"] = np.arange(600)
    result = check_refused(2, ["fit", "x.h5"], "x.h5::/a/train", "x.h5::/b", lines=5)
    assert "(600, 3)" in result.err or "600 × 3" in result.err
    good("fit", "x.h5::/a/train")
    good("fit", "x.h5", "-d", "b", "-f")


def test_wrong_names_suggest_the_right_ones(here: Path) -> None:
    save_h5(here / "train.h5", table(), "features")
    check_refused(3, ["fit", "trian.h5"], "trian.h5: no such file", "did you mean train.h5?")
    check_refused(3, ["fit", "train.h5::/feature"], "/feature", "/features")
    check_refused(2, ["fti", "train.h5"], "did you mean 'bn fit'?")
    check_refused(3, ["fit", "part-*.npy"], "part-*.npy", "no file matches")
    save(here / "x.npy", table())
    check_refused(3, ["fit", "x.npy::/x"], "x.npy", "leave out ::/x")


def test_missing_values(here: Path) -> None:
    x = table(100)
    x[3, 0] = np.nan
    x[7, 0] = np.inf
    x[8, 1] = -999
    save(here / "x.npy", x)
    result = good("fit", "x.npy", "--nan", "omit", "--fill-value", "-999")
    stats = bncli.load("x.bn.h5")
    assert stats.population_count.tolist() == [98, 99, 100]
    np.testing.assert_allclose(stats.population_mean[0], np.delete(x[:, 0], [3, 7]).mean(), rtol=1e-14)
    np.testing.assert_allclose(stats.population_mean[1], np.delete(x[:, 1], 8).mean(), rtol=1e-14)
    assert "3 values were missing" in result.err


@pytest.mark.parametrize("dtype", ["f2", "f8", "i2", "u8", "?"])
@pytest.mark.parametrize("fill", ["1" + "0" * 20, "1" + "0" * 400, "1e300", "-1e999", "nan", "0.5"])
def test_fill_value_that_the_type_cannot_hold(here: Path, dtype: str, fill: str) -> None:
    save(here / "x.npy", np.array([[0, 1], [1, 0], [1, 1]], dtype))
    good("fit", "x.npy", "--fill-value", fill, "-q")
    assert bncli.load("x.bn.h5").population_count.tolist() == [3, 3]


@pytest.mark.parametrize("kind", ["chunked", "fortran", "virtual"])
def test_the_memory_that_a_refusal_names_is_enough(here: Path, kind: str) -> None:
    """Readers share the buffers, and --shuffle takes half of them: what one reader needs is not what does."""
    x = np.random.default_rng(0).standard_normal((9000, 33)).astype("f4")
    options = ["--shuffle"]
    if kind == "fortran":
        path = save(here / "x.npy", np.asfortranarray(np.tile(x.reshape(9, 33000), 3)))
    else:
        path = save_h5(here / "x.h5", x, chunks=(7618, 22), compression="lzf")
    if kind == "virtual":
        layout = h5py.VirtualLayout(x.shape, "f4")
        layout[:] = h5py.VirtualSource("x.h5", "x", x.shape)
        path = here / "v.h5"
        with h5py.File(path, "w") as file:
            file.create_virtual_dataset("x", layout)
        options.append("--allow-virtual")
    refused = bn("fit", path.name, *options, "--max-memory", "1M", "-o", "s.bn.h5", "-q")
    assert refused.code == 3 or (refused.code == 2 and kind == "fortran")
    named = re.search(r"give --max-memory (\d+M)", refused.err)
    assert named
    assert named[1] != "1M"
    good("fit", path.name, *options, "--max-memory", named[1], "-o", "s.bn.h5", "-q")


def test_an_output_that_appears_during_a_fit_is_kept_and_so_is_the_result(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bncli.engine import accumulate

    save(here / "x.npy", table())
    good("fit", "x.npy", "-o", "expected.bn.h5", "-q")
    original = accumulate.segment_moments

    def appearing(*args: object) -> object:
        (here / "x.bn.h5").write_bytes(b"another's")
        return original(*args)

    monkeypatch.setattr(accumulate, "segment_moments", appearing)
    check_refused(5, ["fit", "x.npy", "-q"], "x.bn.h5: was created by another program", "the result is in x.bn.1.h5")
    assert (here / "x.bn.h5").read_bytes() == b"another's"
    check_same_bytes(bncli.load("x.bn.1.h5"), bncli.load("expected.bn.h5"))
    assert sorted(p.name for p in here.iterdir()) == ["expected.bn.h5", "x.bn.1.h5", "x.bn.h5", "x.npy"]


def test_no_feature_with_two_values(here: Path) -> None:
    save(here / "x.npy", table(1))
    with untouched(here):
        check_refused(3, ["fit", "x.npy"], "a variance needs at least two")


def test_last_batch_of_one_is_left_out_and_told(here: Path) -> None:
    save(here / "x.npy", table(257))
    result = good("fit", "x.npy")
    assert "a batch with fewer than two values per feature left out" in result.err
    stats = bncli.load("x.bn.h5")
    assert (stats.num_batches, stats.num_left_out, stats.population_count.tolist()) == (1, 1, [257] * 3)


def test_warnings_name_the_feature_and_the_cure(here: Path) -> None:
    x = np.column_stack([np.linspace(0, 100, 2000), np.full(2000, 0.1), np.resize([1e-4, -1e-4], 2000)])
    save(here / "sorted.npy", x)
    (here / "names").write_text("ramp\nflat\ntiny\n")
    result = good("fit", "sorted.npy", "--names", "names")
    lines = result.err.splitlines()
    assert all(line.startswith("bn: warning: ") for line in lines)
    drift, constant, eps = lines
    assert "0 (ramp)" in drift
    assert "--use population" in drift
    assert "1 (flat)" in constant
    assert "2 (tiny)" in eps
    assert "--eps" in eps
    stats = bncli.load("sorted.bn.h5")
    assert (stats.population_mean[1], stats.population_var[1]) == (0.1, 0.0)
    assert stats.flags() == [["drifted"], ["constant"], ["eps"]]


def test_scale_beyond_float64_is_null_in_json(here: Path) -> None:
    save(here / "x.npy", np.full((4, 1), 0.5))
    record = json.loads(good("fit", "x.npy", "--gamma", "1e308", "--json", "-q").out)
    assert record["features"][0]["scale"] is None  # 1e308 / sqrt(1e-5)
    assert record["features"][0]["gamma"] == 1e308


def test_several_files_are_one_data_set(here: Path) -> None:
    x = table(500)
    for i, part in enumerate(np.split(x, [3, 260])):
        save(here / f"part-{8 + i}.npy", part)  # part-10 sorts after part-9
    save(here / "whole.npy", x)
    good("fit", "part-*.npy", "-o", "parts.bn.h5")
    good("fit", "whole.npy")
    parts, whole = bncli.load("parts.bn.h5"), bncli.load("whole.bn.h5")
    assert parts.running_mean.tobytes() == whole.running_mean.tobytes()
    assert parts.running_var.tobytes() == whole.running_var.tobytes()
    assert parts.population.m2.tobytes() == whole.population.m2.tobytes()
    assert [s["name"] for s in parts.provenance["sources"]] == ["part-8.npy", "part-9.npy", "part-10.npy"]


def test_names_with_controls_and_markup_are_shown_escaped(here: Path) -> None:
    evil = "\x1b[31m[bold]x[/bold]\r\x9b"
    x = table(20, 2)
    x[3, 1] = np.nan
    with h5py.File("e\x1b[2Jvil.h5", "w") as file:
        file[evil] = x
        file[evil].attrs["columns"] = [evil + "0", evil + "1"]
    result = bn("fit", "e\x1b[2Jvil.h5")
    assert result.code == 3
    assert no_controls(result.err)
    for words in ("e\\x1b[2Jvil.h5", "\\x1b[31m[bold]x[/bold]\\r\\x9b1", "sample 3, feature 1"):
        assert words in result.err
    for args in (["--dry-run"], ["--nan", "omit"], ["--nan", "omit", "-f", "--json"]):
        result = good("fit", "e\x1b[2Jvil.h5", *args)
        assert no_controls(result.out)
        assert no_controls(result.err)
    assert json.loads(result.out)["features"][0]["name"] == evil + "0"


def test_file_name_that_is_not_utf8(here: Path) -> None:
    name = b"\xff.npy".decode("utf-8", "surrogateescape")
    save(here / name, table())
    record = json.loads(good("fit", name, "--json").out)
    assert record["sources"][0]["name"] == name
    assert "\\udcff.bn.h5" in good("fit", name, "-f").out


def test_no_temporary_file_is_left(here: Path) -> None:
    save(here / "x.npy", table())
    good("fit", "x.npy")
    assert sorted(contents(here)) == ["x.bn.h5", "x.npy"]


def test_help_names_the_recurrence_and_torch() -> None:
    result = good("fit", "--help")
    assert "M * running + (1 - M) * batch" in result.out
    assert "weight of the OLD value" in result.out
    assert "PyTorch's momentum is 1 - M" in " ".join(result.out.split())


def test_examples_in_help_stand_on_their_own_lines() -> None:
    for command in ("fit", "apply", "inspect", "ls"):
        lines = good(command, "--help").out.splitlines()
        start = lines.index("  Examples:") if "  Examples:" in lines else lines.index("  Example:")
        assert lines[start + 1].startswith(f"    bn {command} ")
        assert not any("\\b" in line or "\b" in line for line in lines)
    assert any(line.startswith("  bn apply train.bn.h5 new.npy") for line in good("--help").out.splitlines())


def test_a_dry_run_prints_no_record(here: Path) -> None:
    save(here / "x.npy", table())
    with untouched(here):
        check_refused(2, ["fit", "x.npy", "-n", "--json"], "leave out --json")


@pytest.mark.parametrize(
    "args", [["fit", "x.npy"], ["apply", "s.bn.h5", "x.npy"], ["merge", "s.bn.h5"], ["export", "s.bn.h5"]]
)
def test_an_empty_output_is_a_mistake(here: Path, args: list[str]) -> None:
    """As an unset variable of a shell gives it: the default output is not what was meant."""
    save(here / "x.npy", table())
    good("fit", "x.npy", "-o", "s.bn.h5")
    with untouched(here):
        check_refused(2, [*args, "-o", "", "-f"], "an empty name; give a path", lines=4)


def test_a_momentum_that_may_be_pytorchs(here: Path) -> None:
    """With PyTorch's preset 0.1 is likely meant as there: 1 - 0.1 weighs the old value."""
    save(here / "x.npy", table(40))
    said = good("fit", "x.npy", "--preset", "torch", "--momentum", "0.1", "-f").err
    assert "bn: warning: momentum 0.1 is the weight of the OLD value here, so that each batch replaces 90% of" in said
    assert "if PyTorch's momentum=0.1 is meant, type --momentum 0.9\n" in said
    for options in (["--preset", "torch"], ["--preset", "torch", "--momentum", "0.9"], ["--momentum", "0.1"]):
        assert "OLD value here" not in good("fit", "x.npy", "-f", *options).err
    assert "OLD value here" not in good("fit", "x.npy", "-f", "--preset", "keras", "--momentum", "0.1").err
    with pytest.warns(BnWarning, match=r"type --momentum 0\.95"):
        FitSpec.of(FitOptions(preset="torch", momentum=0.05))


EMPTY = [
    ["fit", "x.npy", "--gamma", ""],
    ["fit", "x.npy", "--beta", ""],
    ["fit", "x.npy", "--names", ""],
    ["fit", "x.npy", "-d", ""],
    ["fit", "x.npy", "--like", ""],
    ["fit", "x.npy", "--target", ""],
    ["fit", ""],
    ["fit", "x.npy", ""],
    ["fit", "::/x"],
    ["fit", "x.npy", "--gamma", "::/g"],
    ["apply", "", "x.npy", "-o", "y.npy"],
    ["apply", "x.bn.h5", "", "-o", "y.npy"],
    ["apply", "x.bn.h5", "x.npy", "-o", "y.npy", "-d", ""],
    ["inspect", ""],
    ["merge", "", "-o", "m.bn.h5"],
    ["merge", "x.bn.h5", "-o", "m.bn.h5", "--gamma", ""],
    ["export", "", "-o", "y.json"],
    ["export", "x.bn.h5", "-o", "y.npz", "--to", "fold", "--into", ""],
    ["import", "", "-o", "m.bn.h5"],
    ["ls", ""],
]


@pytest.mark.parametrize("args", EMPTY, ids=" ".join)
def test_an_empty_path_is_a_usage_error(here: Path, args: list[str]) -> None:
    save(here / "x.npy", table(40))
    good("fit", "x.npy", "-f")
    with untouched(here):
        check_refused(
            2,
            args,
            "no file before the ::" if any(a.startswith("::") for a in args) else "an empty name; give a path",
            lines=1,
        )


@pytest.mark.parametrize("eps", ["-0.0", "-0"])
def test_an_eps_of_minus_zero_is_zero(here: Path, eps: str) -> None:
    save(here / "x.npy", table(40))
    record = json.loads(good("fit", "x.npy", "-f", "--eps", eps, "--json").out)
    assert math.copysign(1, record["eps"]) == math.copysign(1, bncli.load("x.bn.h5").eps) == 1
