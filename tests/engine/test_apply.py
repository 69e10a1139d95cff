"""apply: the values of batchnorm.normalize, in the right place, format and type; or no output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from cli_helpers import contents, save, save_h5, temporaries, untouched

import bncli
import bncli.stats.warnings
from bncli.engine import apply as engine
from bncli.engine.apply import Applied, ApplySpec, apply_files
from bncli.errors import BnWarning, InputError, MismatchError, UsageError
from bncli.numerics import batchnorm
from bncli.numerics.moments import Moments
from bncli.stats.record import Stats

Array = npt.NDArray[Any]
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stats_of(features: int = 3, sample_shape: tuple[int, ...] | None = None, axis: int = -1, **changes: Any) -> Stats:
    ramp = np.arange(1.0, features + 1)
    population = Moments.without_extremes(0 * ramp + 10, ramp / 3, 0 * ramp, ramp * 5, 0 * ramp)
    return Stats(
        changes.pop("running_mean", ramp / 2),
        changes.pop("running_var", ramp / 7),
        ramp / 5,
        -ramp,
        changes.pop("population", population),
        axis=axis,
        sample_shape=(features,) if sample_shape is None else sample_shape,
        **changes,
    )


def run(stats: Stats, inputs: list[str], out: str, **options: Any) -> Applied:
    return apply_files(stats, inputs, out, ApplySpec(**options))


def normal(stats: Stats, x: Array, axis: int = -1, dtype: str | None = None, use: str = "running") -> Array:
    mean, var = stats.statistics(use)
    return batchnorm.normalize(x, mean, var, stats.gamma, stats.beta, stats.eps, axis, dtype)


def check_equal(found: Array, expected: Array) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_axis_is_batchnorms(axis: int, order: str) -> None:
    x = np.asarray(RNG.normal(size=(11, 3, 4, 5)).astype("f4"), order=order)
    save(Path("x.npy"), x)
    stats = stats_of(x.shape[axis], x.shape[1:], axis)
    run(stats, ["x.npy"], "y.npy")
    check_equal(np.load("y.npy"), normal(stats, x, axis))
    run(stats, ["x.npy"], "p.npy", use="population", dtype="float64")
    check_equal(np.load("p.npy"), normal(stats, x, axis, "f8", "population"))


@pytest.mark.parametrize("dtype", ["?", "i1", ">u2", "<i8", "f2", ">f4", "f8"])
def test_types(dtype: str) -> None:
    x = RNG.integers(0, 2, (50, 3)).astype(dtype)
    save(Path("x.npy"), x)
    run(stats_of(), ["x.npy"], "y.npy")
    found = np.load("y.npy")
    assert found.dtype == (np.dtype(dtype).newbyteorder("=") if "f" in dtype else np.float32)
    check_equal(found, normal(stats_of(), x))


def test_one_dimension_stays_one() -> None:
    x = RNG.normal(size=20)
    save(Path("x.npy"), x)
    run(stats_of(1), ["x.npy"], "y.npy")
    check_equal(np.load("y.npy"), normal(stats_of(1), x[:, None])[:, 0])


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a few samples, of one, and of a part of a row."""
    x = RNG.normal(size=(37, 6, 5))
    save(Path("x.npy"), x)
    for axis in (1, 2):
        stats = stats_of(x.shape[axis], x.shape[1:], axis)
        for values in (1 << 20, 100, 7, 3, 1):
            monkeypatch.setattr(engine, "PIECE_VALUES", values)
            run(stats, ["x.npy"], "y.npy", force=True)
            check_equal(np.load("y.npy"), normal(stats, x, axis))


def test_constant_features_are_counted_in_parts_of_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = stats_of(6, running_mean=np.full(6, 0.1), running_var=np.zeros(6), population=Moments.without_extremes(
        np.full(6, 4.0), np.full(6, 0.1), np.zeros(6), np.array([0.0, 1, 0, 1, 0, 0]), np.zeros(6)))  # fmt: skip
    x = np.full((10, 6), 0.1)
    x[:, 1] = 7
    x[3, 2], x[4, 5], x[5, 0] = 0.2, -1, np.nan
    save(Path("x.npy"), x)
    for values in (1 << 20, 6, 1):
        monkeypatch.setattr(engine, "PIECE_VALUES", values)
        with pytest.warns(BnWarning, match="2 values vary where the fitted data was constant"):
            report = run(stats, ["x.npy"], "y.npy", force=True)
        assert (report.varied_where_constant, report.non_finite) == (2, 1)
        y = np.load("y.npy")
        assert (y[np.arange(6), [2, 0, 4, 4, 0, 0]][[0, 1, 2, 3, 4]] == stats.beta[[2, 0, 4, 4, 0]]).all()
        np.testing.assert_allclose(y[3, 2], 3 / 5 * 0.1 / np.sqrt(1e-5) - 3)


@pytest.mark.parametrize("kind", ["npy", "h5"])
def test_inverse_brings_back(kind: str) -> None:
    x = RNG.normal(size=(40, 3))
    save(Path("x.npy"), x)
    stats = stats_of()
    run(stats, ["x.npy"], f"y.{kind}")
    run(stats, [f"y.{kind}"], "back.npy", inverse=True)
    np.testing.assert_allclose(np.load("back.npy"), x, rtol=1e-12, atol=1e-13)


def test_npy_to_hdf5_and_back() -> None:
    x = RNG.normal(size=(40, 3)).astype("f4")
    save(Path("x.npy"), x)
    run(stats_of(), ["x.npy"], "y.h5")
    with h5py.File("y.h5") as file:
        assert list(file) == ["data"]
        check_equal(file["data"][:], normal(stats_of(), x))
    save_h5(Path("x.h5"), x)
    run(stats_of(), ["x.h5"], "y.npy")
    check_equal(np.load("y.npy"), normal(stats_of(), x))


def test_suffix_decides_else_the_inputs_format() -> None:
    x = RNG.normal(size=(4, 3))
    save(Path("x.npy"), x)
    save_h5(Path("x.h5"), x)
    for out in ("a.hdf5", "a.HDF", "a.h5"):
        run(stats_of(), ["x.npy"], out)
        assert h5py.is_hdf5(out)
    run(stats_of(), ["x.h5"], "b.dat")
    assert h5py.is_hdf5("b.dat")
    run(stats_of(), ["x.npy"], "c.dat")
    check_equal(np.load("c.dat"), normal(stats_of(), x))


def test_hdf5_keeps_path_attributes_chunks_and_compression() -> None:
    x = RNG.normal(size=(100, 3)).astype("f4")
    with h5py.File("x.h5", "w") as file:
        item = file.create_dataset(
            "deep/er/x", data=x, chunks=(16, 2), compression="gzip", compression_opts=7, shuffle=True, fletcher32=True,
            maxshape=(None, 3),
        )  # fmt: skip
        item.attrs["units"] = "cm"
        item.attrs["feature_names"] = ["p", "q", "r"]
        item.attrs["limits"] = np.array([1.5, 2.5])
        item.attrs["scale_factor"], item.attrs["add_offset"], item.attrs["_FillValue"] = 0.1, 3.0, -9.0
    run(stats_of(), ["x.h5::/deep/er/x"], "y.h5")
    with h5py.File("y.h5") as file:
        item = file["deep/er/x"]
        check_equal(item[:], normal(stats_of(), x))
        assert (item.chunks, item.compression, item.compression_opts) == ((16, 2), "gzip", 7)
        assert (item.shuffle, item.fletcher32, item.maxshape) == (True, True, (None, 3))
        assert set(item.attrs) == {"units", "feature_names", "limits"}
        assert item.attrs["units"] == "cm"
        assert item.attrs["limits"].tolist() == [1.5, 2.5]
        assert list(item.attrs["feature_names"]) == ["p", "q", "r"]


def test_folder_several_inputs_and_rows() -> None:
    parts = [RNG.normal(size=(n, 3)) for n in (5, 6, 7)]
    for i, part in enumerate(parts):
        save(Path(f"part-{i + 9}.npy"), part)
    told: list[tuple[int, int | None]] = []
    report = apply_files(
        stats_of(),
        ["part-*.npy"],
        "out/",
        ApplySpec(rows=(3, -2)),
        lambda done, total, size: told.append((done, total)),
    )
    assert report.outputs == ["out/part-9.npy", "out/part-10.npy", "out/part-11.npy"]
    assert (report.samples, report.values) == (13, 39)
    assert told == [(2, 13), (8, 13), (13, 13)]
    for i, rows in enumerate((slice(3, None), slice(None), slice(0, 5))):
        check_equal(np.load(f"out/part-{i + 9}.npy"), normal(stats_of(), parts[i][rows]))
    report = run(stats_of(), ["part-*.npy"], "out", rows=(0, 3), force=True)  # the folder exists; one input is left
    assert report.outputs == ["out/part-9.npy"]


def test_fill_value_non_finite_and_counts() -> None:
    x = RNG.normal(size=(30, 3)).astype("f4")
    x[0, 0], x[1, 1], x[2, 2], x[3, 0] = np.nan, np.inf, -np.inf, np.float32(0.1)
    save(Path("x.npy"), x)
    report = run(stats_of(), ["x.npy"], "y.npy", fill_value=0.1)
    assert (report.non_finite, report.filled, report.overflowed) == (3, 1, 0)
    expected = normal(stats_of(), x)
    expected[3, 0] = np.nan
    np.testing.assert_array_equal(np.load("y.npy"), expected)
    save(Path("i.npy"), np.array([[1, -999, 3]], "i2"))
    report = run(stats_of(), ["i.npy"], "z.npy", fill_value=-999)
    assert np.isnan(np.load("z.npy")).tolist() == [[False, True, False]]


def test_missing_features_give_nan() -> None:
    mean = np.array([1, np.nan, 2])
    stats = stats_of(running_mean=mean, running_var=np.abs(mean))
    save(Path("x.npy"), np.ones((4, 3)))
    report = run(stats, ["x.npy"], "y.npy")
    assert np.isnan(np.load("y.npy")).all(axis=0).tolist() == [False, True, False]
    assert report.non_finite == 0


@pytest.mark.parametrize("out", ["y.npy", "y.h5", "new/"])
def test_overflow_is_counted_and_refused(here: Path, out: str) -> None:
    x = RNG.normal(size=(30, 3))
    x[4:7, 1] = 1e39
    x[9, 1] = np.inf  # passes through: infinite before
    save(Path("x.npy"), x)
    with untouched(here), pytest.raises(MismatchError, match=r"3 values do not fit float32.*--dtype"):
        run(stats_of(), ["x.npy"], out, dtype="float32")


@pytest.mark.parametrize(
    ("shape", "stats", "options", "words"),
    [
        ((5, 4), {}, {}, "4 features"),
        ((5, 3, 3), {}, {}, "3 dimensions"),
        ((5, 3), {"features": 3, "sample_shape": (3, 2, 2), "axis": 1}, {}, "2 dimensions"),
    ],
)
def test_what_does_not_fit(here: Path, shape: tuple[int, ...], stats: Any, options: Any, words: str) -> None:
    save(Path("x.npy"), np.zeros(shape))
    with untouched(here), pytest.raises(MismatchError, match=words):
        run(stats_of(**stats), ["x.npy"], "y.npy", **options)


def test_imported_stats_know_no_rank() -> None:
    stats = stats_of(3, (), 1, population=Moments.empty(3))
    for shape in ((5, 3), (5, 3, 2), (5, 3, 2, 2)):
        x = RNG.normal(size=shape)
        save(Path("x.npy"), x)
        run(stats, ["x.npy"], "y.npy", force=True)
        check_equal(np.load("y.npy"), normal(stats, x, 1))
    with pytest.raises(MismatchError, match="population"):
        run(stats, ["x.npy"], "z.npy", use="population")


def test_copy_others(here: Path) -> None:
    x = RNG.normal(size=(20, 3))
    with h5py.File("x.h5", "w") as file:
        file["g/x"] = x
        file.create_dataset("g/mask", data=np.arange(20) % 2 == 0, chunks=(5,), compression="lzf")
        file["labels"] = ["a", "b"]
        file["alias"] = file["g/x"]
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/secret")
        file.attrs["title"], file["g"].attrs["note"] = "t", 3
    save_h5(Path("other.h5"), np.ones(3), "secret")
    report = run(stats_of(), ["x.h5::/g/x"], "plain.h5")
    assert sorted(report.others) == ["x.h5::/g/mask", "x.h5::/labels"]
    with h5py.File("plain.h5") as file:
        assert list(file) == ["g"]
        assert list(file["g"]) == ["x"]
    report = run(stats_of(), ["x.h5::/g/x"], "y.h5", copy_others=True)
    assert report.left == []
    with h5py.File("y.h5") as file:
        check_equal(file["g/x"][:], normal(stats_of(), x))
        assert file["g/mask"].compression == "lzf"
        np.testing.assert_array_equal(file["g/mask"], np.arange(20) % 2 == 0)
        assert [v.decode() for v in file["labels"][:]] == ["a", "b"]
        check_equal(file["alias"][:], normal(stats_of(), x))  # not the old values under another name
        assert (file.attrs["title"], file["g"].attrs["note"]) == ("t", 3)
        assert "elsewhere" not in file


def test_two_inputs_one_output() -> None:
    save_h5(Path("x.h5"), np.zeros((5, 3)), "a")
    with h5py.File("x.h5", "a") as file:
        file["b"] = np.zeros((5, 3))
    Path("out").mkdir()
    with pytest.raises(UsageError, match=r"out/x\.h5"):
        run(stats_of(), ["x.h5::a", "x.h5::b"], "out")


@pytest.mark.parametrize("how", ["shorter", "longer", "touched"])
def test_an_input_that_changes_before_its_turn(here: Path, how: str) -> None:
    """Inputs are opened for checks before the first is read; one that changed in between is refused."""
    save(Path("a.npy"), np.zeros((5, 3)))
    save(Path("b.npy"), np.zeros((5, 3)))

    def change(done: int, total: int | None, size: int) -> None:
        if done <= 5:
            save(Path("b.npy"), np.zeros(({"shorter": 4, "longer": 6}.get(how, 5), 3)))
            os.utime("b.npy", ns=(1, 1))

    if how == "shorter":
        with pytest.raises(InputError, match=r"b\.npy: changed"):
            apply_files(stats_of(), ["a.npy", "b.npy"], "out/", ApplySpec(), change)
        assert sorted(contents(here)) == ["a.npy", "b.npy"]
    else:
        apply_files(stats_of(), ["a.npy", "b.npy"], "out/", ApplySpec(), change)
        assert np.load("out/b.npy").shape == (5, 3)


def test_an_input_that_changes_while_it_is_read(here: Path) -> None:
    save(Path("a.npy"), np.zeros((5, 3)))

    def change(done: int, total: int | None, size: int) -> None:
        os.utime("a.npy", ns=(1, os.stat("a.npy").st_mtime_ns - 1))

    for out in ("y.npy", "y.h5"):
        with pytest.raises(InputError, match=r"a\.npy: changed while it was being read"):
            apply_files(stats_of(), ["a.npy"], out, ApplySpec(), change)
    assert sorted(contents(here)) == ["a.npy"]


@pytest.mark.parametrize("out", ["y.npy", "y.h5", "out/"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_nothing_is_left_after_any_error(here: Path, out: str, error: type[BaseException]) -> None:
    save(Path("a.npy"), np.zeros((5, 3)))
    save(Path("b.npy"), np.zeros((5, 3)))

    def fail(done: int, total: int | None, size: int) -> None:
        if done == (10 if out == "out/" else 5):
            raise error

    with untouched(here), pytest.raises(error):
        apply_files(stats_of(), ["a.npy", "b.npy"] if out == "out/" else ["a.npy"], out, ApplySpec(), fail)
    assert temporaries(here) == []


def test_an_axis_that_does_not_exist_is_a_usage_error(here: Path) -> None:
    np.save("x.npy", np.ones((5, 3)))
    with pytest.raises(UsageError, match="axis 2 does not exist"):
        apply_files(stats_of(), ["x.npy"], "y.npy", ApplySpec(axis=2))
    assert not Path("y.npy").exists()


def test_a_constant_is_compared_with_what_the_fitted_data_held(here: Path) -> None:
    """Not with the running mean, which an init of unit leaves elsewhere."""
    x = np.random.default_rng(0).standard_normal((100, 2))
    x[:, 1] = 5.0
    np.save("x.npy", x)
    with pytest.warns(bncli.errors.BnWarning):
        stats = bncli.fit("x.npy", preset="torch", axis=-1)
    assert stats.running_mean[1] != 5
    assert run(stats, ["x.npy"], "same.npy").varied_where_constant == 0
    x[3, 1] = 6
    np.save("other.npy", x)
    with pytest.warns(BnWarning, match="1 value varies where the fitted data was constant"):
        assert run(stats, ["other.npy"], "y.npy").varied_where_constant == 1


def test_features_without_statistics_are_counted(here: Path) -> None:
    x = np.random.default_rng(0).standard_normal((50, 3))
    x[:, 1] = np.nan
    np.save("x.npy", x)
    with pytest.warns(bncli.errors.BnWarning):
        stats = bncli.fit("x.npy", nan="omit")
    x[:, 1] = 1
    np.save("y.npy", x)
    report = run(stats, ["y.npy"], "z.npy")
    assert (report.undefined, report.non_finite) == (50, 0)
    assert np.isnan(np.load("z.npy")).sum() == 50


def test_a_chunk_that_fit_takes_apply_takes_too(here: Path) -> None:
    x = np.random.default_rng(0).standard_normal((40_000, 12))
    save_h5(Path("x.h5"), x, chunks=(40_000, 12), compression="gzip", compression_opts=1)
    stats = bncli.fit("x.h5", max_memory="4M")
    run(stats, ["x.h5"], "y.h5", max_memory=4 << 20)
    with h5py.File("y.h5") as file:
        np.testing.assert_array_equal(file["x"][...], stats.normalize(x))


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".zarr"])
def test_a_format_that_bn_does_not_write_is_refused(here: Path, suffix: str) -> None:
    np.save("x.npy", np.ones((5, 3)))
    with pytest.raises(UsageError, match=suffix):
        apply_files(stats_of(), ["x.npy"], "y" + suffix, ApplySpec())
    assert not Path("y" + suffix).exists()
