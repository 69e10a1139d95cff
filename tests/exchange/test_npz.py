"""NumPy's own archives beside `bncli.exchange.npz`; round trips are in exchange/test_json.py."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_helpers import check_no_population, features

from bncli import exchange
from bncli.errors import InputError


def test_numpy_reads_what_was_written(tmp_path: Path) -> None:
    stats = features(3)
    exchange.write(stats, str(tmp_path / "x.npz"))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as archive:
        for name in ("running_mean", "running_var", "gamma", "beta", "population_mean", "population_var"):
            assert archive[name].tolist() == getattr(stats, name).tolist()
        scale, shift = stats.scale_shift()
        assert (archive["scale"].tolist(), archive["shift"].tolist()) == (scale.tolist(), shift.tolist())
        assert (archive["eps"], archive["momentum"], archive["init"]) == (1e-3, 0.97, "debias")
        assert archive["count"].tolist() == [40] * 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_is_read(tmp_path: Path, save: Any) -> None:
    path = str(tmp_path / "x.npz")
    save(path, running_mean=np.array([1, 2], ">f4"), running_var=np.array([3, 4], "i2"), other=np.array("x"))
    stats = exchange.read(path)
    assert (stats.running_mean.tolist(), stats.running_var.tolist()) == ([1, 2], [3, 4])
    assert (stats.gamma.tolist(), stats.beta.tolist()) == ([1, 1], [0, 0])
    assert stats.provenance["imported"]["assumed"] == {
        "momentum": 0.9,
        "eps": 1e-5,
        "ddof": 0,
        "init": "debias",
        "axis": -1,
        "gamma": 1,
        "beta": 0,
    }
    check_no_population(stats)


ONE = np.ones(3)


@pytest.mark.parametrize(
    "arrays",
    [
        {"running_mean": ONE},
        {"running_mean": ONE, "running_var": np.ones(4)},
        {"running_mean": ONE, "running_var": np.ones((3, 1))},
        {"running_mean": np.ones(0), "running_var": np.ones(0)},
        {"running_mean": np.float64(1), "running_var": np.float64(1)},
        {"running_mean": ONE + 1j, "running_var": ONE},
        {"running_mean": ONE, "running_var": -ONE},
        {"running_mean": ONE, "running_var": ONE * np.nan},
        {"running_mean": ONE, "running_var": ONE, "gamma": np.array(["a", "b", "c"])},
        {"running_mean": ONE, "running_var": ONE, "eps": ONE},
        {"running_mean": ONE, "running_var": ONE, "eps": np.array("x")},
        {"running_mean": ONE, "running_var": ONE, "momentum": np.array("x")},
        {"running_mean": ONE, "running_var": ONE, "axis": np.array(0)},
        {"running_mean": ONE, "running_var": ONE, "name": np.array(["a"])},
        {"running_mean": ONE, "running_var": ONE, "name": np.array(3)},
    ],
)
def test_arrays_that_are_no_statistics(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=r"x\.npz"):
        exchange.read(str(tmp_path / "x.npz"))


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


HOSTILE = {
    "pickle": npy(np.array([{}, None, 3], object)),
    "cut": npy(ONE)[:-1],
    "longer": npy(ONE) + b"x",
    "no array": b"hello",
    "empty": b"",
    "a header of 4 GiB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99),
    "brackets": header("(" * 5000),
    "code": header("__import__('os').mkdir('ran')"),
    "10^12 values": header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
    "a negative size": header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n") + bytes(24),
    "version 9": b"\x93NUMPY\x09\x00" + bytes(99),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("running_mean.npy", npy(ONE))
        archive.writestr("running_var.npy", HOSTILE[how])
    with pytest.raises(InputError, match=r"x\.npz"):
        exchange.read("x.npz")
    assert not Path("ran").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_in_another_way(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("running_mean.npy", npy(ONE))
        archive.writestr("running_var.npy", npy(ONE))
    with pytest.raises(InputError, match=r"x\.npz: .*compressed in a way that NumPy does not use"):
        exchange.read(str(tmp_path / "x.npz"))


def test_far_more_values_than_the_file_has_bytes(tmp_path: Path) -> None:
    """Zeros deflate to a thousandth, and statistics take twenty times their size."""
    one, mib = str(tmp_path / "x.npz"), 1 << 17
    for count, fits in ((mib // 2, True), (16 * mib, False)):
        np.savez_compressed(one, running_mean=np.zeros(count), running_var=np.zeros(count))
        if fits:
            assert exchange.read(one).num_features == count
        else:
            with pytest.raises(InputError, match=r"x\.npz: .*larger than \d+ bytes, far more than the file"):
                exchange.read(one)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["running_var.npy", "other.npy", "running_var"])
def test_the_same_name_twice(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.npz"
    exchange.write(features(3), str(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other.npy", npy(ONE))
        archive.writestr(name, npy(ONE))
    with pytest.raises(InputError, match="same name twice"):
        exchange.read(str(path))


def test_names_that_leave_the_folder_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    exchange.write(features(3), str(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../x.npy", npy(ONE))
    assert exchange.read(str(path)).num_features == 3
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
