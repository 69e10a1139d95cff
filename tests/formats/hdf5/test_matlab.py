"""MATLAB's v7.3 files: an empty array is stored as its shape, which is no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import check_refused, good

X = np.random.default_rng(7).normal(size=(50, 6)) + 10


def write(path: Path, mark: str, value: Any, shape: Any = (0, 6), *, data: bool = True) -> None:
    """A file as MATLAB writes it, behind a user block."""
    with h5py.File(path, "w", userblock_size=512) as file:
        if data:
            file.create_dataset("x", data=X).attrs["MATLAB_class"] = np.bytes_("double")
        empty = file.create_dataset("empty", data=np.array(shape, np.uint64))
        empty.attrs["MATLAB_class"] = np.bytes_("double")
        empty.attrs[mark] = value


@pytest.mark.parametrize("mark", ["MATLAB_empty", "OCTAVE_EMPTY_MATRIX"])
@pytest.mark.parametrize("value", [np.uint8(1), np.int32(1), np.array([1], ">i8"), True, 1.0])
@pytest.mark.parametrize("shape", [(0, 6), (0, 0), [[0, 6, 2]]])
def test_an_empty_array_is_refused_and_no_candidate(tmp_path: Path, mark: str, value: Any, shape: Any) -> None:
    """A shape of two axes too, as some programs write it."""
    path, out = tmp_path / "m.mat", tmp_path / "m.bn.h5"
    write(path, mark, value, shape)
    check_refused(
        3,
        ["fit", f"{path}::/empty", "-o", out],
        "m.mat::/empty: is an empty array",
        mark,
        "its shape",
        "name another dataset",
    )
    assert not out.exists()
    good("fit", path, "-o", out)  # what is left is the only candidate
    with h5py.File(out) as file:
        np.testing.assert_allclose(file["population/mean"], X.mean(axis=0), rtol=1e-13)
    problems = {array["address"]: array["problem"] for array in json.loads(good("ls", path, "--json").out)}
    assert problems[f"{path}::/x"] is None
    assert f"an empty array ({mark})" in problems[f"{path}::/empty"]


def test_a_file_of_empty_arrays_alone(tmp_path: Path) -> None:
    write(tmp_path / "m.mat", "MATLAB_empty", np.uint8(1), data=False)
    check_refused(3, ["fit", tmp_path / "m.mat", "-o", tmp_path / "m.bn.h5"], "m.mat: holds no numeric dataset")


@pytest.mark.parametrize("value", [np.uint8(0), False, "no", np.zeros(3)])
def test_an_attribute_that_says_no(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "m.mat", "MATLAB_empty", value, [3, 5])
    good("fit", f"{tmp_path / 'm.mat'}::/empty", "-o", tmp_path / "m.bn.h5")
    with h5py.File(tmp_path / "m.bn.h5") as file:
        assert file["population/mean"][()] == 4
