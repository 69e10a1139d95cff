"""Fill values and valid ranges that a dataset declares: counted where they are taken for data, and told with what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import Array, bn, check_refused, good
from helpers import ANY_ADVICE, advised, check_moments, check_same_bytes, exact

import bncli
from bncli.engine import accumulate, checkpoint
from bncli.engine.fit import fit_to_file, make_spec
from bncli.errors import BnWarning
from bncli.formats.hdf5.fills import NETCDF_DEFAULTS

# NC_FILL_* as in "NetCDF Users Guide", Appendix A; what netCDF4.default_fillvals gives too
DEFAULTS = {
    "i2": -32767,
    "u2": 65535,
    "i4": -2147483647,
    "u4": 4294967295,
    "i8": -9223372036854775806,
    "u8": 18446744073709551614,
    "f4": np.float32(9.969209968386869e36),
    "f8": 9.969209968386869e36,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(dtype: str = "f4", rows: int = 50) -> Array:
    return np.random.default_rng(4).normal(280, 10, (rows, 4)).astype(dtype)


def write(path: str, x: Array, *, netcdf: bool = False, **attributes: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("t", data=x).attrs.update(attributes)
        if netcdf:
            file.attrs["_NCProperties"] = np.bytes_("version=2,netcdf=4.9.2,hdf5=1.14.0")


def warned(*args: object) -> list[str]:
    """Warnings of marked values."""
    said = [line.removeprefix("bn: warning: ") for line in good(*args).err.splitlines()]
    return [line for line in said if "taken for data" in line]


def pasted(line: str) -> list[str]:
    """The option that a warning says to type."""
    found = re.search(r"(--fill-value) (\S+)$", line)
    assert found, line
    return [found[1], found[2]]


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "i2", ">i4", "i8", "u1"])
@pytest.mark.parametrize("name", ["_FillValue", "missing_value"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_declared_value(here: Path, dtype: str, name: str, shape: tuple[int, ...]) -> None:
    fill = 200 if dtype == "u1" else -999
    x = np.random.default_rng(4).integers(0, 99, (50, 4)).astype(dtype)
    x[::7, 1] = fill
    write("x.h5", x, **{name: np.full(shape, fill, dtype)})
    (line,) = warned("fit", "x.h5")
    assert line == (
        f"x.h5::/t: 8 values equal {fill} ({name}) and were taken for data; leave them out with --fill-value {fill}"
    )
    assert warned("fit", "x.h5", *pasted(line), "-f") == []
    stats = bncli.load("x.bn.h5")
    check_moments(
        stats.population_mean, stats.population_var, [exact(c[c != fill]) for c in x.T.astype(dtype.strip(">"))]
    )
    assert stats.population_count.tolist() == [50, 42, 50, 50]


@pytest.mark.parametrize("dtype", DEFAULTS)
@pytest.mark.parametrize("mark", ["_NCProperties", "_Netcdf4Dimid", "DIMENSION_LIST"])
def test_the_default_fill_of_netcdf(here: Path, dtype: str, mark: str) -> None:
    x = np.random.default_rng(4).integers(0, 99, (50, 4)).astype(dtype)
    x[:6, 2] = DEFAULTS[dtype]
    write("plain.h5", x)
    write("x.nc", x)
    with h5py.File("x.nc", "a") as file:
        if mark == "DIMENSION_LIST":
            file["time"] = np.arange(50)
            file["time"].make_scale("time")
            file["t"].dims[0].attach_scale(file["time"])
        else:
            (file if mark == "_NCProperties" else file["t"]).attrs[mark] = np.int32(0)
    assert warned("fit", "plain.h5") == []
    (line,) = warned("fit", "x.nc::/t")
    assert f"6 values equal {DEFAULTS[dtype]!s} (netCDF's default fill value)" in line
    assert warned("fit", "x.nc::/t", *pasted(line), "-f") == []
    assert bncli.load("x.bn.h5").population_count.tolist() == [50, 50, 44, 50]
    with h5py.File("x.nc", "a") as file:  # which then is what was never written
        file["t"].attrs["_FillValue"] = np.zeros(1, dtype) + 120
    assert warned("fit", "x.nc::/t", "-f") == []


def test_defaults_are_those_of_netcdf(here: Path) -> None:
    assert {k: np.dtype(k).type(v) for k, v in NETCDF_DEFAULTS.items()} == DEFAULTS
    for dtype, fill in (("i1", -127), ("u1", 255)):  # common data, for which netCDF itself sees no fill
        x = np.full((8, 2), 3, dtype)
        x[2:5] = fill
        write("x.nc", x, netcdf=True)
        assert warned("fit", "x.nc", "-f") == []


def test_nothing_equals_what_is_declared(here: Path) -> None:
    write("x.nc", values(), netcdf=True, _FillValue=np.float32(1e20), missing_value=np.float32(-999), valid_min=0.0)
    assert warned("fit", "x.nc") == []
    assert "declare" not in good("fit", "x.nc", "-f").err


@pytest.mark.parametrize("fill", [np.float32(np.nan), np.float32(np.inf), "-999", [], h5py.Empty("f4"), np.zeros(999)])
def test_declared_as_what_is_no_number(here: Path, fill: Any) -> None:
    x = values()
    x[3, 1] = 0
    write("x.h5", x, missing_value=fill)
    assert warned("fit", "x.h5") == []
    x[3, 1] = np.nan
    write("x.h5", x, _FillValue=fill)
    assert warned("fit", "x.h5", "--nan", "omit", "-f") == []


def test_a_type_that_cannot_hold_what_is_declared(here: Path) -> None:
    write("x.h5", values("i2"), _FillValue=1e20, missing_value=0.5)
    assert warned("fit", "x.h5") == []


def test_declared_in_another_type(here: Path) -> None:
    x = values()
    x[:3, 0] = np.float32(-999.9)
    write("x.h5", x, missing_value=-999.9)  # float64
    (line,) = warned("fit", "x.h5")
    assert pasted(line) == ["--fill-value", "-999.9"]
    assert warned("fit", "x.h5", *pasted(line), "-f") == []


def test_several_values(here: Path) -> None:
    """One option takes one value; the warning says what to do with the others."""
    x = values("i2")
    x[:5, 0], x[7, 1] = -32767, -32766
    write("x.h5", x, _FillValue=np.int16(-32767), missing_value=np.array([-32766, -32767], "i2"), scale_factor=0.01)
    result = good("fit", "x.h5")
    assert "/t has scale_factor: the statistics are of the stored values" in result.err
    (line,) = warned("fit", "x.h5", "-f")
    assert line.startswith("x.h5::/t: 5 values equal -32767 (_FillValue) and 1 value equals -32766 (missing_value)")
    cure = "--fill-value takes one value: in a copy of the data write -32767 for -32766 and give --fill-value -32767"
    assert line.endswith(cure)
    (line,) = warned("fit", "x.h5", "--fill-value", "-32767", "-f")
    assert line == f"x.h5::/t: 1 value equals -32766 (missing_value) and was taken for data; {cure}"
    (line,) = warned("fit", "x.h5", "--fill-value", "-32766", "-f")
    assert "5 values equal -32767" in line
    x[x == -32766] = -32767
    write("x.h5", x, _FillValue=np.int16(-32767), missing_value=np.int16(-32766))
    assert warned("fit", "x.h5", *pasted(cure), "-f") == []


@pytest.mark.parametrize(
    ("declared", "count", "words"),
    [
        ({"valid_range": np.array([200, 350], "f4")}, 5, "5 values are outside 200 to 350 (valid_range)"),
        ({"valid_min": np.float32(200)}, 2, "2 values are outside 200 and above (valid_min)"),
        ({"valid_max": np.array([350], "f4")}, 3, "3 values are outside 350 and below (valid_max)"),
    ],
)
def test_valid_range(here: Path, declared: dict[str, Any], count: int, words: str) -> None:
    x = np.clip(values(), 201, 349)
    x[:2, 1], x[2:5, 2], x[9, 0], x[6, 3] = 100, 400, np.inf, -999
    write("x.h5", x, **declared, missing_value=np.float32(-999))
    first, second = warned("fit", "x.h5", "--nan", "omit")
    assert first.startswith("x.h5::/t: 1 value equals -999 (missing_value)")
    assert second.startswith(f"x.h5::/t: {words}")
    assert second.endswith("; where they are none, make them NaN and give --nan omit")
    assert warned("fit", "x.h5", "--nan", "omit", "--fill-value", "-999", "-f") == [second]
    x[(x < 200) | (x > 350)] = np.nan
    write("x.h5", x, **declared)
    assert warned("fit", "x.h5", "--nan", "omit", "-f") == []


@pytest.mark.parametrize("dtype", ["f2", "f4", "u1", "i2", "u8"])
def test_a_valid_range_wider_than_the_type(here: Path, dtype: str) -> None:
    write("x.h5", np.abs(values("i2") % 100).astype(dtype), valid_min=-1e300, valid_max=1e300)
    assert warned("fit", "x.h5") == []
    write("x.h5", np.full((4, 4), 200, dtype), valid_range=np.array([-70000, 4000000000], "i8"))
    assert warned("fit", "x.h5", "-f") == []


@pytest.mark.parametrize("other", [{"scale_factor": 0.01}, {"_Unsigned": "true"}])
def test_a_valid_range_that_is_not_of_the_stored_values(here: Path, other: dict[str, Any]) -> None:
    write("x.h5", values("i2"), valid_range=np.array([0.0, 2.0]), **other)
    assert warned("fit", "x.h5") == []


def many(path: str, **options: Any) -> Array:
    x = values(rows=1000)
    x[np.random.default_rng(9).random(x.shape) < 0.1] = -999
    with h5py.File(path, "w") as file:
        file.create_dataset("t", data=x, **options).attrs["missing_value"] = np.float32(-999)
    return x


@pytest.mark.parametrize("options", [{}, {"chunks": (37, 3), "compression": "gzip"}, {"chunks": (37, 4)}])
@pytest.mark.parametrize("how", [[], ["--shuffle"], ["-j", "1"], ["-j", "3"], ["--max-memory", "1M"], ["--axis", "1"]])
def test_the_count_is_that_of_the_samples_taken(here: Path, options: dict[str, Any], how: list[str]) -> None:
    x = many("x.h5", **options)
    for size in (3, 16, 256, 1000):
        (line,) = warned("fit", "x.h5", "--batch-size", size, *how, "-f")
        assert f"{np.count_nonzero(x == -999):,} values equal -999" in line
    (line,) = warned("fit", "x.h5", "--rows", "100:-300", *how, "-f")
    assert f"{np.count_nonzero(x[100:-300] == -999):,} values equal -999" in line


def test_bools_and_integers_get_words_that_work(here: Path) -> None:
    with h5py.File("b.h5", "w") as file:
        file["x"] = np.eye(4, dtype=bool)
        file["x"].attrs["_FillValue"] = 1
        file["y"] = np.array([[1, 500], [2, 3]], "i2")
        file["y"].attrs["valid_max"] = np.int16(100)
    said = good("fit", "b.h5::/x", "-q", "-o", "s.bn.h5", "-f").err + good("fit", "b.h5::/x", "-o", "s.bn.h5", "-f").err
    assert "leave them out with --fill-value 1\n" in said
    assert (
        "4 values equal" not in good("fit", "b.h5::/x", "--fill-value", "1", "--nan", "omit", "-o", "s.bn.h5", "-f").err
    )
    assert "in a copy of type float make them NaN" in good("fit", "b.h5::/y", "-o", "s.bn.h5", "-f").err


def test_unsigned_behind_a_signed_type_warns(here: Path) -> None:
    write("x.h5", values("i2"), _Unsigned="true")
    assert "has _Unsigned: the statistics are of the stored values" in good("fit", "x.h5").err


@pytest.mark.parametrize("shape", [(20, 4, 9, 9), (20, 4, 16, 16), (6, 300, 2)])
def test_images(here: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(4).normal(size=shape).astype("f4")
    x[np.random.default_rng(9).random(shape) < 0.1] = 1e20
    write("x.h5", x, _FillValue=np.float32(1e20))
    (line,) = warned("fit", "x.h5", "--axis", "1", "--batch-size", "4")
    assert f"{np.count_nonzero(x == np.float32(1e20)):,} values equal 1e+20" in line


def test_the_statistics_do_not_change_by_being_counted(here: Path) -> None:
    x = many("x.h5")
    with advised(*ANY_ADVICE, "taken for data"):
        check_same_bytes(bncli.fit("x.h5"), bncli.fit(x))


@pytest.mark.parametrize("shuffle", [[], ["--shuffle"]])
@pytest.mark.parametrize("dtype", ["f4", "i2"])
def test_inputs_that_declare_different_things(here: Path, shuffle: list[str], dtype: str) -> None:
    """In each input what it declares itself: 0 is data in the second."""
    x, y, z = values(), values(dtype), values(dtype)
    x[:3], y[5:9], z[1] = 0, 0, 7
    write("x.h5", x, _FillValue=np.float32(0))
    write("y.h5", y)
    write("z.h5", z, missing_value=np.dtype(dtype).type(7))
    (line,) = warned("fit", "x.h5", "y.h5", *shuffle)
    assert "x.h5::/t: 12 values equal 0 (_FillValue)" in line
    (line,) = warned("fit", "y.h5", "x.h5", "z.h5", *shuffle, "--batch-size", "16")
    assert "x.h5::/t: 12 values equal 0 (_FillValue), z.h5::/t: 4 values equal 7 (missing_value) and were" in line
    assert warned("fit", "y.h5", *shuffle, "-f") == []


def test_the_same_declared_in_many_inputs(here: Path) -> None:
    for name in "abc":
        many(f"{name}.h5")
    (line,) = warned("fit", "a.h5", "b.h5", "c.h5")
    assert line.startswith("a.h5::/t and 2 more: ")


def test_the_count_survives_a_resume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = many("x.h5")
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    monkeypatch.setattr(checkpoint, "SHARE", 0)
    monkeypatch.setattr("bncli.numerics.layout.PENDING_VALUES", 64)
    spec = make_spec({"batch_size": 16, "workers": 1})

    def stop(done: int, *rest: Any) -> None:
        if done >= 480:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_to_file(["x.h5"], spec, None, progress=stop)
    seen: list[int] = []
    with pytest.warns(BnWarning) as told:
        fit_to_file(["x.h5"], spec, None, resume=True, progress=lambda done, *rest: seen.append(done))
    assert seen[0] >= 480
    assert any(f"{np.count_nonzero(x == -999):,} values equal -999" in str(w.message) for w in told)


def test_learning(here: Path) -> None:
    """The first epoch's samples are counted, once; the option is refused there, so it is not what is advised."""
    x = many("x.h5")
    with h5py.File("x.h5", "a") as file:
        file["y"] = (np.arange(1000) % 2).astype("i4")
    (line,) = warned("fit", "x.h5::/t", "--target", "::/y", "--epochs", "3")
    assert f"{np.count_nonzero(x == -999):,} values equal -999" in line
    assert line.endswith("; learning needs every value: leave out samples that hold one")


def test_a_value_too_large_to_square(here: Path) -> None:
    x = values("f8")
    x[4, 2] = -np.finfo("f8").max
    write("x.h5", x, missing_value=x[4, 2])
    check_refused(3, ["fit", "x.h5"], "sample 4", "or give --fill-value -1.7976931348623157e+308")
    assert warned("fit", "x.h5", "--fill-value", "-1.7976931348623157e+308") == []


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("suffix", ["h5", "npy"])
def test_apply(here: Path, workers: int, suffix: str) -> None:
    x = many("x.h5", chunks=(37, 4))
    good("fit", "x.h5", "--fill-value", "-999", "-q")
    out = f"out.{suffix}"
    (line,) = warned("apply", "x.bn.h5", "x.h5", "-o", out, "-j", workers)
    count = np.count_nonzero(x == -999)
    assert line == (
        f"x.h5::/t: {count:,} values equal -999 (missing_value) and were taken for data; --fill-value -999 makes them NaN"
    )
    assert warned("apply", "x.bn.h5", "x.h5", "-o", out, "--fill-value", "-999", "-f") == []
    (line,) = warned("apply", "x.bn.h5", "x.h5", "-o", out, "--rows", "10:20", "-f")
    assert f"{np.count_nonzero(x[10:20] == -999)} value" in line
    assert bn("apply", "x.bn.h5", "x.h5", "-o", out, "-q", "-f").err == ""


def test_what_declares_nothing_is_read_as_before(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled kernel, straight from the file."""
    asked: list[bool] = []
    original: Callable[..., Any] = accumulate.Values

    def watching(*args: Any, **named: Any) -> Any:
        asked.append("stored" in named or len(args) > 1)
        return original(*args, **named)

    monkeypatch.setattr(accumulate, "Values", watching)
    for declared in ({}, {"missing_value": np.float32(0)}):
        write("x.h5", values(), **declared)
        good("fit", "x.h5", "-q", "-f")
    assert asked == [True, False]
