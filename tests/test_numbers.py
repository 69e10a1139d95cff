"""The numbers that other programs get wrong: a test for every row of 'Numbers' in BAD_INPUT.md.

Data goes through files and, where words or exit codes matter, through the command line.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
from helpers import Array, advised, cut, exact, exact_columns, save_h5, save_npy

import bncli
from bncli import exchange
from bncli.errors import BnWarning, InputError, MismatchError

FLOATS = ("f2", "f4", "f8")


def bn(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a child, as a user does."""
    code = "from bncli.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)


def store(folder: Path, x: Array, kind: str) -> str:
    return save_npy(folder / "x.npy", x) if kind == "npy" else save_h5(folder / "x.h5", x, chunks=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ones_have_mean_1_exactly(tmp_path: Path, dtype: str) -> None:
    """Float32 ones, 2·10^7 × 2: summing in float32 gives 0.8388608."""
    rows = 20_000_000 if dtype == "f4" else 2_000_000
    path = save_npy(tmp_path / "ones.npy", np.ones((rows, 2), dtype))
    with pytest.warns(BnWarning, match="constant"):
        stats = bncli.fit(path, batch_size=65536)
    Path(path).unlink()  # 160 MB
    assert stats.population_mean.tolist() == stats.running_mean.tolist() == [1.0, 1.0]
    assert stats.population_var.tolist() == stats.running_var.tolist() == [0.0, 0.0]
    assert stats.population_count.tolist() == [rows] * 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["npy", "h5"])
def test_squares_that_overflow_the_input_type(tmp_path: Path, dtype: str, kind: str) -> None:
    """Float16 values of 300: their squares are infinite in float16."""
    x = (300 + np.random.default_rng(0).integers(-8, 9, (500, 3))).astype(dtype)
    stats = bncli.fit(store(tmp_path, x, kind), momentum="none")
    helpers.check_moments(stats.population_mean, stats.population_var, exact_columns(x))
    assert (stats.population_var > 10).all()
    huge = x * np.dtype(dtype).type({"f2": 200, "f4": 1e36, "f8": 1e137}[dtype])  # close to the type's largest value
    assert np.isfinite(huge).all()
    stats = bncli.fit(huge, momentum="none")
    helpers.check_moments(stats.population_mean, stats.population_var, exact_columns(huge))


@pytest.mark.parametrize(
    ("dtype", "mean", "sd"), [("f2", 100, 0.1), ("f4", 1e4, 0.1), ("f8", 1e4, 0.1), ("f8", 1e8, 0.1)]
)
def test_large_mean_and_small_spread(tmp_path: Path, dtype: str, mean: float, sd: float) -> None:
    """Float32 with mean 10^4 and sd 0.1: sd 4.0, 0 or a negative variance elsewhere."""
    x = (mean + sd * np.random.default_rng(0).standard_normal((20_000, 3))).astype(dtype)
    stats = bncli.fit(save_npy(tmp_path / "x.npy", x), batch_size=1000)
    helpers.check_moments(stats.population_mean, stats.population_var, exact_columns(x))
    helpers.check_running(stats, cut(x, 1000), 0.9, "debias")
    # to the input's own precision: rounding the values to the type adds spacing² / 12 to the variance
    step = float(np.spacing(np.dtype(dtype).type(mean)))
    np.testing.assert_allclose(stats.population_var, sd**2 + step**2 / 12, rtol=0.03)


@pytest.mark.parametrize("kind", ["npy", "h5"])
def test_mean_1e8_sd_1_in_float64(tmp_path: Path, kind: str) -> None:
    x = 1e8 + np.random.default_rng(0).standard_normal((10_000, 4))
    stats = bncli.fit(store(tmp_path, x, kind))
    helpers.check_moments(stats.population_mean, stats.population_var, exact_columns(x))  # 5e-15
    helpers.check_running(stats, cut(x, 256), 0.9, "debias")


@pytest.mark.parametrize("bad", [[1e200, 2e200, -1e200], [0.0, 1e-170, 2e-170], [1e-200, 2e-200, 3e-200]])
def test_magnitudes_whose_squares_do_not_fit_are_refused(tmp_path: Path, bad: list[float]) -> None:
    x = np.ones((9, 3))
    x[:, 0] = np.arange(9)
    x[:, 1] = bad * 3
    x[:, 2] = -np.arange(9)
    path = save_npy(tmp_path / "huge.npy", x)
    with pytest.raises(InputError, match=r"huge\.npy.*feature 1.*rescale"):
        bncli.fit(path)
    done = bn("fit", path, "-o", tmp_path / "out.bn.h5")
    assert done.returncode == 3
    assert "huge.npy" in done.stderr
    assert "feature 1" in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not (tmp_path / "out.bn.h5").exists()


def test_magnitudes_across_batches_are_refused(tmp_path: Path) -> None:
    """Each batch is constant, so only merging them shows that the spread does not fit."""
    for low, high in ((-1e200, 1e200), (0.0, 1e-170)):
        x = np.repeat([low, high], 4)[:, None]
        with pytest.raises(InputError, match="feature 0"):
            bncli.fit(save_npy(tmp_path / "x.npy", x), batch_size=4)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_smallest_and_largest_values_of_float32_are_no_problem(dtype: str) -> None:
    info = np.finfo("f4")
    for values in ([info.max, -info.max, 0, 1], [info.smallest_subnormal, 0, info.tiny, info.tiny * 3]):
        x = np.array(values, dtype)[:, None]
        stats = bncli.fit(x, eps=0.0)
        helpers.check_moments(stats.population_mean, stats.population_var, exact_columns(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_eps_as_large_as_the_variance_is_told(tmp_path: Path, dtype: str) -> None:
    """Variance 1e-5 with eps 1e-5: the feature comes out with sd 0.7."""
    x = (np.random.default_rng(0).standard_normal((1000, 2)) * [10**-2.5, 1.0]).astype(dtype)
    path = save_npy(tmp_path / "x.npy", x)
    with pytest.warns(BnWarning, match=r"1 feature has a variance so small that eps 1e-05.*: 0;.*smaller --eps"):
        stats = bncli.fit(path, batch_size=1000)
    assert stats.flags() == [["eps"], []]
    y = stats.normalize(x, dtype="f8")
    assert float(y[:, 0].std()) == pytest.approx(0.5**0.5, rel=0.05)
    assert float(y[:, 1].std()) == pytest.approx(1, rel=1e-3)
    assert bncli.fit(path, batch_size=1000, eps=1e-9).flags() == [[], []]  # and no warning
    done = bn("fit", path, "-o", tmp_path / "out.bn.h5")
    assert done.returncode == 0
    assert "eps 1e-05" in done.stderr


@pytest.mark.parametrize("dtype", FLOATS)
def test_constant_in_the_fit_and_varying_in_the_held_out(tmp_path: Path, dtype: str) -> None:
    """Multiplied by 1 / sqrt(eps) = 316: counted, and warned of."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 3)).astype(dtype)
    x[:, 1] = 0.5
    held_out = rng.standard_normal((50, 3)).astype(dtype)
    held_out[:20, 1] = 0.5
    stats_file, out = tmp_path / "s.bn.h5", tmp_path / "y.npy"
    with pytest.warns(BnWarning, match="1 feature is constant: 1"):
        stats = bncli.fit(x, beta=0.25)
    stats.save(str(stats_file))
    done = bn("apply", stats_file, save_npy(tmp_path / "held.npy", held_out), "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert '"varied_where_constant": 30' in done.stdout
    y = np.load(out)
    assert (y[:20, 1] == 0.25).all()  # exactly beta
    assert np.abs(y[20:, 1]).max() > 50
    said = bn("apply", stats_file, tmp_path / "held.npy", "-o", out, "-f")
    assert "bn: warning: 30 values vary where the fitted data was constant" in said.stderr
    assert len(said.stdout.splitlines()) == 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["npy", "h5"])
def test_a_million_times_0_1(tmp_path: Path, dtype: str, kind: str) -> None:
    """np.var gives 1.8e-24, scikit-learn -4.5e-36."""
    x = np.full((1_000_000, 1), 0.1, dtype)
    with pytest.warns(BnWarning, match="constant"):
        stats = bncli.fit(store(tmp_path, x, kind))
    assert stats.population_mean[0] == stats.running_mean[0] == float(np.dtype(dtype).type(0.1))
    assert stats.population_var[0] == stats.running_var[0] == 0
    assert stats.running is not None
    assert stats.running.k.item() == -(-1_000_000 // 256)
    assert (stats.normalize(x[:5]) == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_batch_in_which_one_feature_is_all_nan(tmp_path: Path, dtype: str) -> None:
    """scikit-learn's partial_fit has a NaN variance for ever after."""
    x = np.random.default_rng(0).standard_normal((300, 3)).astype(dtype)
    for start in (0, 100, 200):
        gone = x.copy()
        gone[start : start + 100, 1] = np.nan
        with pytest.warns(BnWarning, match="100 values were missing or left out"):
            stats = bncli.fit(save_npy(tmp_path / "x.npy", gone), nan="omit", batch_size=100, momentum=0.99)
        truth = [exact(column[~np.isnan(column)]) for column in gone.T]
        assert stats.population_count.tolist() == [300, 200, 300]
        helpers.check_moments(stats.population_mean, stats.population_var, truth)
        helpers.check_running(stats, cut(gone, 100), 0.99, "debias")
        with pytest.raises(InputError, match=f"sample {start}, feature 1 is nan"):
            bncli.fit(gone, batch_size=100)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sorted_data(tmp_path: Path, dtype: str) -> None:
    """The average of the batches' variances is 0.02 where the data's is 9: population right, running warned about."""
    x = np.sort(np.random.default_rng(0).normal(0, 3, (4000, 1)).astype(dtype), axis=0)
    path = save_npy(tmp_path / "x.npy", x)
    with pytest.warns(BnWarning, match=r"running statistics of 1 feature differ.*--use population"):
        stats = bncli.fit(path)
    assert stats.flags() == [["drifted"]]
    helpers.check_moments(stats.population_mean, stats.population_var, exact_columns(x))
    assert 8 < stats.population_var[0] < 10
    helpers.check_running(stats, cut(x, 256), 0.9, "debias")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bncli.fit(path, momentum="none").flags() == [[]]
        assert bncli.fit(np.random.default_rng(1).permutation(x), momentum=0.99).flags() == [[]]
    done = bn("fit", path, "-o", tmp_path / "s.bn.h5")
    assert "differ from the population's" in done.stderr


@pytest.mark.parametrize("dtype", FLOATS)
def test_eight_batches_are_debiased(dtype: str) -> None:
    """Momentum 0.9 from zero: 57 % of the mean after 8 batches; by default all of it."""
    x = np.tile(np.array([[4.0], [6.0]], dtype), (8 * 16, 1))
    debiased = bncli.fit(x, batch_size=32)
    assert debiased.num_batches == 8
    assert (debiased.running_mean[0], debiased.running_var[0]) == (5, 1)
    with pytest.warns(BnWarning, match="differ from the population's"):
        zeros = bncli.fit(x, batch_size=32, init="zeros")
    kept = float(1 - Fraction(0.9) ** 8)
    assert 0.56 < kept < 0.58
    assert zeros.running_mean[0] == pytest.approx(5 * kept, rel=1e-14)
    assert zeros.running_var[0] == pytest.approx(kept, rel=1e-14)


def test_output_that_does_not_fit_its_type(tmp_path: Path) -> None:
    """3·10^5 in float16: refused with a count, and nothing is written."""
    x = np.array([[-1.0], [1.0]] * 10)
    stats = bncli.fit(x, gamma=3e5, eps=0.0)
    stats_file, out = str(tmp_path / "s.bn.h5"), tmp_path / "y.npy"
    stats.save(stats_file)
    held_out = np.array([[1.0], [0.0], [-1.0], [0.1], [1.0]], "f2")
    with pytest.raises(MismatchError, match="3 values do not fit float16"):
        stats.normalize(held_out)
    path = save_npy(tmp_path / "x.npy", held_out)
    done = bn("apply", stats_file, path, "-o", out)
    assert done.returncode == 4
    assert "3 values do not fit float16" in done.stderr
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bn.h5", "x.npy"]
    assert bn("apply", stats_file, path, "-o", out, "--dtype", "float32").returncode == 0
    np.testing.assert_array_equal(np.load(out)[[0, 1, 2], 0], np.array([3e5, 0, -3e5], "f4"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_through_hdf5_and_back(tmp_path: Path, dtype: str) -> None:
    """Apply on files gives what the formula gives, in the input's type, and --inverse brings it back."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 4)) * [1, 2, 3, 4] + [0, 5, -5, 9]).astype(dtype)
    with advised("running statistics of"):
        stats = bncli.fit(x, gamma=2.0, beta=0.5)
    stats.save(str(tmp_path / "s.bn.h5"))
    path = save_h5(tmp_path / "x.h5", x)
    assert bn("apply", tmp_path / "s.bn.h5", path, "-o", tmp_path / "y.h5").returncode == 0
    with h5py.File(tmp_path / "y.h5") as file:
        y = file["x"][:]
    assert y.dtype == x.dtype
    one = np.finfo(dtype).eps
    expected = 2.0 * (x.astype("f8") - stats.running_mean) / np.sqrt(stats.running_var + 1e-5) + 0.5
    np.testing.assert_allclose(y, expected, rtol=one, atol=4 * float(np.finfo("f8").eps))
    assert bn("apply", tmp_path / "s.bn.h5", tmp_path / "y.h5", "-o", tmp_path / "b.npy", "--inverse").returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "b.npy"), x, rtol=4 * one, atol=20 * one)


def missing_told(*given: Array | list[Array], **options: Any) -> str:
    """What fit, or merge of several, says of missing values."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BnWarning)
        parts = [bncli.fit(x, nan="omit", momentum="none", **options) for x in given]
        if len(parts) > 1:
            caught.clear()
            bncli.merge(parts)
    return "; ".join(str(w.message) for w in caught if "missing or left out" in str(w.message))


@pytest.mark.parametrize("features", [1, 3])
def test_as_many_missing_in_every_feature(features: int) -> None:
    """The positions less the values, whatever the other features lack."""
    x = np.random.default_rng(0).normal(size=(100, 3))[:, :features]
    x[:40] = np.nan
    count = f"{40 * features} values were missing or left out (of {100 * features}), most in 0"
    assert missing_told(x).startswith(count)
    assert missing_told([x[:60], x[60:]]).startswith(count)  # an iterable of batches
    assert missing_told(x, rows=(20, 100)).startswith(f"{20 * features} values")
    assert missing_told(x, x).startswith(f"{80 * features} values were missing or left out (of {200 * features})")
    assert missing_told(np.where(np.isnan(x), -9, x), fill_value=-9).startswith(count)
    x[50, 0] = np.nan
    assert missing_told(x).startswith(f"{40 * features + 1} values")
    assert not missing_told(np.nan_to_num(x))


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_missing_in_images(axis: int) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3, 4, 5))
    x[:, :, 0, 0] = np.nan
    x[3] = np.nan
    missing = int(np.isnan(x).sum())
    assert missing_told(x, axis=axis).startswith(f"{missing} values were missing or left out (of 1,200)")
    x[:] = np.nan
    x[:2] = np.arange(120).reshape(2, 3, 4, 5)
    assert missing_told(x, axis=axis).startswith("1,080 values were missing")


def test_missing_where_the_number_of_samples_is_not_known(tmp_path: Path) -> None:
    """Counts of another program: at least what the fullest feature has more than the others."""
    columns = {"running_mean": [1.0, 2.0], "running_var": [1.0, 1.0], "population_mean": [1.0, 2.0]}
    np.savez(tmp_path / "s.npz", count=[100, 90], population_var=[1.0, 1.0], momentum=np.nan, **columns)
    stats = exchange.read(str(tmp_path / "s.npz"))
    assert stats.positions is None
    with pytest.warns(BnWarning, match="^at least 20 values were missing or left out, most in 1$"):
        bncli.merge([stats, stats])
