"""bn apply, as a person and a script see it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from cli_helpers import bn, check_refused, contents, good, no_controls, save, save_h5, table, untouched

import bncli
from bncli.numerics import batchnorm


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with train.bn.h5, fitted on three features, and x.npy to apply it to."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "train.npy", table(seed=1))
    good("fit", "train.npy", "--gamma", "2", "--beta", "-1")
    save(tmp_path / "x.npy", table(100, seed=2))
    return tmp_path


def expected(x: object, use: str = "running") -> np.ndarray:
    """Test mode written out, apart from bncli's own code."""
    stats = bncli.load("train.bn.h5")
    mean, var = (stats.running_mean, stats.running_var)
    if use == "population":
        train = np.load("train.npy")
        mean, var = train.mean(axis=0), train.var(axis=0)
    return 2 * (np.asarray(x, "f8") - mean) / np.sqrt(var + 1e-5) - 1


def test_apply_is_the_formula(here: Path) -> None:
    result = good("apply", "train.bn.h5", "x.npy", "-o", "y.npy")
    assert result.out == "100 samples normalized with the running statistics: y.npy\n"
    assert result.err == ""
    y = np.load("y.npy")
    np.testing.assert_allclose(y, expected(np.load("x.npy")), rtol=1e-13, atol=1e-13)
    assert y.dtype == np.float64
    stats = bncli.load("train.bn.h5")
    again = batchnorm.normalize(np.load("x.npy"), stats.running_mean, stats.running_var, stats.gamma, stats.beta, 1e-5)
    assert y.tobytes() == again.tobytes()


def test_population_on_request(here: Path) -> None:
    result = good("apply", "train.bn.h5", "x.npy", "-o", "y.npy", "--use", "population")
    assert "population statistics" in result.out
    np.testing.assert_allclose(np.load("y.npy"), expected(np.load("x.npy"), "population"), rtol=1e-12, atol=1e-12)


def test_inverse_brings_back(here: Path) -> None:
    good("apply", "train.bn.h5", "x.npy", "-o", "y.npy")
    result = good("apply", "train.bn.h5", "y.npy", "-o", "back.npy", "--inverse")
    assert "denormalized" in result.out
    np.testing.assert_allclose(np.load("back.npy"), np.load("x.npy"), rtol=1e-12, atol=1e-12)


def test_json_report(here: Path) -> None:
    x = np.load("x.npy")
    x[0, 0], x[1, 1], x[2, 2] = np.nan, -np.inf, -999
    save(here / "x.npy", x)
    report = json.loads(good("apply", "train.bn.h5", "x.npy", "-o", "y.npy", "--fill-value", "-999", "--json").out)
    assert report["outputs"] == ["y.npy"]
    assert (report["samples"], report["values"]) == (100, 300)
    assert (report["non_finite"], report["filled"], report["varied_where_constant"], report["overflowed"]) == (
        2,
        1,
        0,
        0,
    )
    assert np.isnan(np.load("y.npy")[2, 2])


def test_counts_are_said_in_words(here: Path) -> None:
    save(here / "train.npy", np.column_stack([table(100, 2), np.full(100, 7.0)]))
    good("fit", "train.npy", "-f", "-q")
    x = np.column_stack([table(4, 2), [7.0, 7.0, 8.0, np.nan]])
    x[0, 0] = -1
    save(here / "x.npy", x)
    result = good("apply", "train.bn.h5", "x.npy", "-o", "y.npy", "--fill-value", "-1")
    assert "1 value NaN or infinite: passed through" in result.out
    assert "1 value equal to the fill value: now NaN" in result.out
    assert "constant" not in result.out
    assert "bn: warning: 1 value varies where the fitted data was constant: " in result.err
    assert "1/sqrt(eps)" in result.err
    assert np.load("y.npy")[:, 2].tolist()[:2] == [0.0, 0.0]
    np.testing.assert_allclose(np.load("y.npy")[2, 2], 1e-5**-0.5)


def test_quiet(here: Path) -> None:
    result = good("apply", "train.bn.h5", "x.npy", "-o", "y.npy", "-q")
    assert (result.out, result.err) == ("", "")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype(here: Path, dtype: str) -> None:
    good("apply", "train.bn.h5", "x.npy", "-o", "y.npy", "--dtype", dtype)
    y = np.load("y.npy")
    assert y.dtype == dtype
    unit = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(y, expected(np.load("x.npy")), rtol=4 * unit, atol=8 * unit)


def test_integers_become_float32(here: Path) -> None:
    save(here / "x.npy", np.load("x.npy").astype(">i4"))
    good("apply", "train.bn.h5", "x.npy", "-o", "y.npy")
    assert np.load("y.npy").dtype == np.float32


def test_rows(here: Path) -> None:
    good("apply", "train.bn.h5", "x.npy", "-o", "y.npy", "--rows", "10:-80")
    np.testing.assert_allclose(np.load("y.npy"), expected(np.load("x.npy")[10:-80]), rtol=1e-13, atol=1e-13)


def test_values_that_do_not_fit_the_type(here: Path) -> None:
    x = np.load("x.npy")
    x[3:6, 0] = 1e6
    save(here / "x.npy", x)
    with untouched(here):
        check_refused(4, ["apply", "train.bn.h5", "x.npy", "-o", "y.npy", "--dtype", "float16"], "3 values", "float16")
        check_refused(4, ["apply", "train.bn.h5", "x.npy", "-o", "new/", "--dtype", "float16"], "nothing was written")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((10, 4), ["x.npy", "4 features", "the stats have 3"]),
        ((10,), ["x.npy", "1 features"]),
        ((10, 3, 3), ["x.npy", "3 dimensions", "the fitted data had 2", "--axis"]),
    ],
)
def test_data_that_does_not_fit(here: Path, shape: tuple[int, ...], words: list[str]) -> None:
    save(here / "x.npy", np.zeros(shape))
    with untouched(here):
        check_refused(4, ["apply", "train.bn.h5", "x.npy", "-o", "y.npy"], *words)


def test_axis_allows_another_rank(here: Path) -> None:
    x = np.moveaxis(table(40).reshape(5, 8, 3), 2, 1).copy()
    save(here / "x.npy", x)
    good("apply", "train.bn.h5", "x.npy", "-o", "y.npy", "--axis", "1")
    wanted = np.moveaxis(expected(np.moveaxis(x, 1, 2)), 2, 1)
    np.testing.assert_allclose(np.load("y.npy"), wanted, rtol=1e-13, atol=1e-13)


def test_feature_names_that_differ(here: Path) -> None:
    for name, names in (("a.h5", ["p", "q", "r"]), ("b.h5", ["p", "r", "q"])):
        save_h5(here / name, table())
        with h5py.File(name, "a") as file:
            file["x"].attrs["feature_names"] = names
    good("fit", "a.h5")
    with untouched(here):
        check_refused(4, ["apply", "a.bn.h5", "b.h5", "-o", "y.h5"], "b.h5", "feature names", "q", "r")
    good("apply", "a.bn.h5", "a.h5", "-o", "y.h5")
    good("apply", "a.bn.h5", "x.npy", "-o", "y.npy")  # data without names


def test_gamma_of_zero_cannot_be_inverted(here: Path) -> None:
    good("fit", "train.npy", "-f", "--gamma", "0", "-q")
    with untouched(here):
        check_refused(4, ["apply", "train.bn.h5", "x.npy", "-o", "y.npy", "--inverse"], "gamma is 0", "feature 0")


def test_output_exists(here: Path) -> None:
    save(here / "y.npy", np.zeros(3))
    with untouched(here):
        check_refused(5, ["apply", "train.bn.h5", "x.npy", "-o", "y.npy"], "y.npy", "-f/--force")
    good("apply", "train.bn.h5", "x.npy", "-o", "y.npy", "-f")
    assert np.load("y.npy").shape == (100, 3)


@pytest.mark.parametrize("how", ["same", "symbolic", "hard", "folder"])
@pytest.mark.parametrize("what", ["x.npy", "train.bn.h5"])
def test_output_is_the_input_or_the_stats(here: Path, how: str, what: str) -> None:
    out = {"same": what, "folder": "./"}.get(how, "out.npy")
    if how == "symbolic":
        (here / out).symlink_to(what)
    elif how == "hard":
        (here / out).hardlink_to(here / what)
    if how == "folder" and what == "train.bn.h5":
        pytest.skip("an output in a folder is called as the input")
    with untouched(here):
        check_refused(5, ["apply", "train.bn.h5", "x.npy", "-o", out, "-f"], "also an input")


def test_several_inputs_need_a_folder(here: Path) -> None:
    save(here / "z.npy", table(50, seed=3))
    with untouched(here):
        check_refused(2, ["apply", "train.bn.h5", "x.npy", "z.npy", "-o", "y.npy"], "2 inputs", "y.npy/")
    result = good("apply", "train.bn.h5", "x.npy", "z.npy", "-o", "out/")
    assert "150 samples" in result.out
    assert "out/x.npy and 1 more" in result.out
    for name in ("x.npy", "z.npy"):
        np.testing.assert_allclose(np.load(f"out/{name}"), expected(np.load(name)), rtol=1e-13, atol=1e-13)


def test_several_inputs_of_one_name(here: Path) -> None:
    (here / "a").mkdir()
    save(here / "a" / "x.npy", table(5))
    with untouched(here):
        check_refused(2, ["apply", "train.bn.h5", "x.npy", "a/x.npy", "-o", "out/"], "out/x.npy", "two inputs")


def test_one_of_several_fails_and_none_appears(here: Path) -> None:
    x = table(50, seed=3)
    x[7] = 1e300
    save(here / "z.npy", x)
    with untouched(here):
        check_refused(4, ["apply", "train.bn.h5", "x.npy", "z.npy", "-o", "out/", "--dtype", "float32"], "3 values")


def test_folder_that_cannot_be(here: Path) -> None:
    with untouched(here):
        check_refused(74, ["apply", "train.bn.h5", "x.npy", "-o", "no/such/"], "no/such", "folder")
        check_refused(5, ["apply", "train.bn.h5", "x.npy", "-o", "train.npy/"], "train.npy")


def test_address_as_output(here: Path) -> None:
    with untouched(here):
        check_refused(2, ["apply", "train.bn.h5", "x.npy", "-o", "y.h5::/z"], "y.h5::/z")


def test_stats_and_input_swapped(here: Path) -> None:
    with untouched(here):
        check_refused(3, ["apply", "x.npy", "train.bn.h5", "-o", "y.npy"], "x.npy", "not a readable stats file")
    save_h5(here / "x.h5", table())
    check_refused(3, ["apply", "x.h5", "x.npy", "-o", "y.npy"], "x.h5", "not a stats file", "bn fit")


def test_other_datasets_are_mentioned_or_copied(here: Path) -> None:
    with h5py.File("d.h5", "w") as file:
        file["x"] = table(20)
        file["labels"] = np.arange(20)
        file.attrs["title"] = "all of it"
    result = good("apply", "train.bn.h5", "d.h5", "-d", "x", "-o", "y.h5")
    assert "not copied: d.h5::/labels (--copy-others copies them)" in result.out
    result = good("apply", "train.bn.h5", "d.h5", "-d", "x", "-o", "y.h5", "-f", "--copy-others")
    assert "1 other dataset copied" in result.out
    with h5py.File("y.h5") as file:
        np.testing.assert_array_equal(file["labels"], np.arange(20))
        np.testing.assert_allclose(file["x"], expected(table(20)), rtol=1e-13, atol=1e-13)
        assert file.attrs["title"] == "all of it"


def test_copy_others_where_there_is_no_place(here: Path) -> None:
    save_h5(here / "d.h5", table(20))
    with untouched(here):
        for args in (["x.npy", "-o", "y.npy"], ["x.npy", "-o", "y.h5"], ["d.h5", "-o", "y.npy"]):
            result = bn("apply", "train.bn.h5", *args, "--copy-others")
            assert result.code in (2, 3)
            assert "--copy-others" in result.err


def test_names_with_controls_and_markup_are_shown_escaped(here: Path) -> None:
    evil = "\x1b[31m[bold]x"
    with h5py.File("e\x1bvil.h5", "w") as file:
        file[evil] = table(10)
        file["o\x1bther"] = np.arange(3)
        file["o\x1bther"].attrs["a"] = 1
    result = good("apply", "train.bn.h5", "e\x1bvil.h5", "-d", evil, "-o", "y\x1b.h5")
    assert no_controls(result.out)
    for words in ("y\\x1b.h5", "e\\x1bvil.h5::/o\\x1bther"):
        assert words in result.out
    with h5py.File("y\x1b.h5") as file:
        assert list(file) == [evil]


def test_no_temporary_file_is_left(here: Path) -> None:
    before = set(contents(here))
    good("apply", "train.bn.h5", "x.npy", "-o", "y.npy")
    good("apply", "train.bn.h5", "x.npy", "-o", "z.h5")
    assert set(contents(here)) - before == {"y.npy", "z.h5"}


def test_help_has_both_formulas() -> None:
    result = good("apply", "--help")
    assert "y = gamma * (x - mean) / sqrt(var + eps) + beta" in result.out
    assert "x = (y - beta) / gamma * sqrt(var + eps) + mean" in result.out


def test_what_refers_to_other_objects_is_told(here: Path) -> None:
    with h5py.File("d.h5", "w") as file:
        file["x"], file["labels"] = table(20), np.arange(20)
        file["x"].attrs["see"] = file["labels"].ref
        file["out"] = h5py.ExternalLink("other.h5", "/x")
    told = "not kept, since they refer to other objects or files: d.h5::/"
    assert told + "x@see\n" in good("apply", "train.bn.h5", "d.h5::/x", "-o", "y.h5").out
    assert told + "out\n" in good("apply", "train.bn.h5", "d.h5::/x", "-o", "y.h5", "-f", "--copy-others").out
    result = good("apply", "train.bn.h5", "d.h5::/x", "-o", "y.h5", "-f", "--copy-others", "--json")
    assert json.loads(result.out)["dropped"] == ["d.h5::/out"]
