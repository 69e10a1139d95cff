"""Several inputs as one data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import check_refused, save, save_h5, table, untouched
from hypothesis import given
from hypothesis import strategies as st

import bncli
from bncli.errors import BnWarning, InputError, MismatchError, UsageError
from bncli.formats.dataset import Joined
from bncli.formats.fills import fill_in
from bncli.formats.reading import ReadOptions

BUDGET = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_all(addresses: list[str], **options: Any) -> np.ndarray:
    with Joined(addresses, ReadOptions(max_memory=BUDGET, **options)) as data:
        values = data.read(0, data.shape[0] * data.sample_size).copy()
        data.check_unchanged()
        return values.reshape(data.shape)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_any_split_any_rows_any_range(tmp_path: Path, lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    x = np.arange(total * 6, dtype="i4").reshape(total, 2, 3)
    parts = np.split(x, np.cumsum(lengths)[:-1])
    addresses = [str(save(tmp_path / f"{i}.npy", part)) for i, part in enumerate(parts)]
    ends = st.none() | st.integers(-total - 2, total + 2)
    rows = (data.draw(ends), data.draw(ends))
    expected = x[slice(*rows)]
    if not len(expected):
        with pytest.raises(UsageError, match=f"--rows selects none of the {total} samples"):
            Joined(addresses, ReadOptions(rows=rows, max_memory=BUDGET))
        return
    with Joined(addresses, ReadOptions(rows=rows, max_memory=BUDGET)) as joined:
        assert joined.shape == expected.shape
        first = data.draw(st.integers(0, expected.size - 1))
        count = data.draw(st.integers(0, expected.size - first))
        np.testing.assert_array_equal(joined.read(first, count), expected.reshape(-1)[first : first + count])
        address, sample = joined.locate(first)
        found = np.load(address)[sample].reshape(-1)[first % 6]
        assert found == expected.reshape(-1)[first]


def test_formats_and_orders_mix() -> None:
    x = table(90)
    save(Path("a.npy"), np.asfortranarray(x[:20]))
    save_h5(Path("b.h5"), x[20:50], chunks=(7, 2), compression="gzip")
    save(Path("c.npy"), x[50:].astype(">f8"))
    found = read_all(["a.npy", "b.h5", "c.npy"])
    assert found.dtype == np.float64
    assert found.tobytes() == x.tobytes()


def test_types_mix_as_float64() -> None:
    save(Path("a.npy"), np.array([[1, 2]], "u1"))
    save(Path("b.npy"), np.array([[0.1, 3]], "f4"))
    save(Path("c.npy"), np.array([[True, False]]))
    found = read_all(["a.npy", "b.npy", "c.npy"])
    assert found.dtype == np.float64
    assert found.tolist() == [[1, 2], [float(np.float32(0.1)), 3], [1, 0]]


def test_fill_value_is_compared_in_each_inputs_type() -> None:
    save(Path("a.npy"), np.array([[0.1], [0.2], [0.3]], "f4"))
    save(Path("b.npy"), np.array([[0.1], [0.2], [0.4]], "f8"))
    save(Path("c.npy"), np.array([[0], [1]], "i2"))
    with pytest.warns(BnWarning, match=r"^2 values were missing or left out \(of 8\)"):
        stats = bncli.fit(["a.npy", "b.npy", "c.npy"], fill_value=0.1)
    assert stats.population_count.tolist() == [6]
    with pytest.warns(BnWarning, match="^1 value was missing"):
        alone = bncli.fit("a.npy", fill_value=0.1)
    assert alone.population_count.tolist() == [2]


@pytest.mark.parametrize(
    ("dtype", "fill", "expected"),
    [
        ("f4", 0.1, float(np.float32(0.1))),
        ("f4", 1e39, None),
        ("f8", 10**400, None),
        ("f8", 10**20, 1e20),
        ("f2", float("inf"), float("inf")),
        ("i2", 32767.0, 32767),
        ("i2", 32768, None),
        ("i2", 1.5, None),
        ("i2", float("nan"), None),
        ("i8", -(2**63), -(2**63)),
        ("u8", 2**64 - 1, 2**64 - 1),
        ("u8", -1, None),
        ("u8", 10**400, None),
        ("?", 1, 1),
        ("?", 2, None),
    ],
)
def test_fill_in(dtype: str, fill: float, expected: float | None) -> None:
    assert fill_in(np.dtype(dtype), fill) == expected


def test_fill_in_nan() -> None:
    found = fill_in(np.dtype("f4"), float("nan"))
    assert found is not None
    assert np.isnan(found)


def test_inputs_that_disagree() -> None:
    save(Path("a.npy"), np.zeros((5, 3)))
    save(Path("b.npy"), np.zeros((5, 4)))
    with untouched(Path()):
        check_refused(
            4, ["fit", "a.npy", "b.npy"], "a.npy has samples of shape (3,)", "b.npy of (4,)", "every axis but the first"
        )
    save(Path("c.npy"), np.zeros((5, 3, 1)))
    check_refused(4, ["fit", "a.npy", "c.npy"], "differ in shape")


def test_names_that_disagree() -> None:
    for name, names in (("a.h5", ["p", "q", "r"]), ("b.h5", ["p", "q", "s"]), ("c.h5", None)):
        save_h5(Path(name), table(5))
        with h5py.File(name, "a") as file:
            if names:
                file["x"].attrs["feature_names"] = names
    check_refused(4, ["fit", "a.h5", "b.h5"], "feature names", "a.h5", "b.h5")
    assert bncli.fit(["c.h5", "a.h5"]).names == ("p", "q", "r")


def test_one_of_several_is_missing_or_broken() -> None:
    save(Path("a.npy"), table())
    Path("b.npy").write_bytes(b"")
    check_refused(3, ["fit", "a.npy", "c.npy"], "c.npy: no such file")
    check_refused(3, ["fit", "a.npy", "b.npy"], "b.npy: not a .npy file")


@pytest.mark.parametrize("which", ["a.npy", "b.npy", "c.h5"])
@pytest.mark.parametrize("how", ["written", "replaced", "cut", "removed"])
def test_changed_during_the_run(which: str, how: str) -> None:
    """Also an input that was finished with, or not begun."""
    for name in ("a.npy", "b.npy"):
        save(Path(name), table(50))
    save_h5(Path("c.h5"), table(50))

    def change() -> None:
        if how == "written":
            os.utime(which, ns=(1, 1))
        elif how == "cut":
            os.truncate(which, 100)
        else:
            os.rename(which, which + ".old")
            if how == "replaced":
                Path(which).write_bytes(Path(which + ".old").read_bytes())

    def run() -> None:
        with Joined(["a.npy", "b.npy", "c.h5"], ReadOptions(max_memory=BUDGET)) as data:
            data.read(0, 60 * 3)  # in the second file
            change()
            data.read(60 * 3, 90 * 3)
            data.check_unchanged()

    words = "changed while it was being read|cannot be read any more|ends at byte"
    with pytest.raises(InputError, match=f"{which}: ({words})"):
        run()


def test_change_during_a_fit_is_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    from bncli.engine import accumulate

    save(Path("x.npy"), table())
    original = accumulate.segment_moments

    def touching(*args: Any) -> Any:
        os.utime("x.npy", ns=(1, 1))
        return original(*args)

    monkeypatch.setattr(accumulate, "segment_moments", touching)
    with untouched(Path()):
        check_refused(3, ["fit", "x.npy"], "x.npy: changed while it was being read")


@pytest.mark.parametrize("kind", ["npy", "h5"])
def test_a_change_whose_time_was_put_back_is_noticed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Written in place, then given the old time of modification: the time of change tells."""
    from bncli.engine import accumulate

    path = save(Path("x.npy"), table()) if kind == "npy" else save_h5(Path("x.h5"), table())
    original = accumulate.segment_moments

    def writing(*args: Any) -> Any:
        before = os.stat(path)
        with open(path, "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\0" * 8)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(path).st_mtime_ns == before.st_mtime_ns
        return original(*args)

    monkeypatch.setattr(accumulate, "segment_moments", writing)
    check_refused(3, ["fit", path, "-j", "1"], f"{path}: changed while it was being read")
    assert not Path("x.bn.h5").exists()


def test_array_in_memory() -> None:
    x = np.asfortranarray(table(20))
    with Joined(x, ReadOptions(rows=(2, -3), max_memory=BUDGET)) as data:
        assert data.read(0, 45).tobytes() == x[2:-3].tobytes(order="C")
        assert data.locate(0) == ("array", 2)


def test_same_file_twice_counts_twice() -> None:
    save(Path("x.npy"), table(50))
    assert bncli.fit(["x.npy", "x.npy"]).num_samples == 100


def test_shapes_that_differ_only_by_a_missing_axis() -> None:
    save(Path("a.npy"), np.arange(5.0))
    save(Path("b.npy"), np.arange(4.0)[:, None])
    assert bncli.fit(["a.npy", "b.npy"]).num_samples == 9
    with pytest.raises(MismatchError):
        Joined(["a.npy", str(save(Path("c.npy"), np.zeros((2, 2))))], ReadOptions(max_memory=BUDGET))
