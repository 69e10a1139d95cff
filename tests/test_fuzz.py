"""A short round of the fuzzer, and what earlier rounds found; a long one is `python tests/fuzz/run.py --count 100000`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import bncli

RUN = Path(__file__).parent / "fuzz" / "run.py"
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="its limits need Linux")


def check_round(seed: int, first: int, count: int, kinds: str = "") -> None:
    """In a process of its own, which forks for every file and so must have no threads."""
    args = ["--seed", str(seed), "--first", str(first), "--count", str(count), *(["--kinds", kinds] if kinds else [])]
    done = subprocess.run([sys.executable, RUN, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count:,} files" in done.stdout
    assert " 0 findings" in done.stdout


def test_a_short_round() -> None:
    check_round(seed=0, first=0, count=250)


@pytest.mark.parametrize("kinds", ["texts,same-named,netcdf", "exchange"])
def test_a_short_round_of_other_kinds(kinds: str) -> None:
    check_round(seed=0, first=0, count=100, kinds=kinds)


@pytest.mark.parametrize(("seed", "number"), [(1, 3918), (1, 10391), (1, 14019), (2, 3007), (3, 4895), (41, 115)])
def test_what_was_found_before(seed: int, number: int) -> None:
    """A text that claims 33 MB, a heap without end by overflow, a filter's unknown flags, letters of 67 MB, a bad fill value, an index
    whose size HDF5 could not tell."""
    check_round(seed, number, 1)


def files_of(kind: str) -> list[tuple[str, bytes]]:
    from fuzz import mutations

    return [(original.name, original.content) for original in mutations.originals([kind])]


def test_numbers_of_files_do_not_change_when_kinds_are_added() -> None:
    from fuzz import mutations

    first = [original.name for original in mutations.originals()]
    assert len(first) == 17
    assert first[:2] + first[-2:] == ["f4.npy", "f8.npy", "s.bn.h5", "n.bn.h5"]
    assert {original.kind for original in mutations.originals(mutations.KINDS[:-1])} == {*mutations.KINDS[:-1]}


@pytest.mark.parametrize("kind", ["texts", "same-named", "netcdf"])
def test_a_right_copy_and_a_wrong_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with attributes are read by h5py, and each fault that a copy can have is seen."""
    from fuzz import kinds

    monkeypatch.chdir(tmp_path)
    changed = "g/before" if kind == "same-named" else "g/x"
    for name, content in files_of(kind):
        for path in (name, "copy"):
            Path(path).write_bytes(content)
        with h5py.File("copy", "a") as file:
            for attribute in ("scale_factor", "add_offset", "_FillValue"):
                file["g/x"].attrs.pop(attribute, None)
            assert file["g/x"].shape == (40, 3)
        assert kinds.altered(name, "copy", "g/x", everything=True) == []
        assert kinds.dangling("copy") == []
        with h5py.File("copy", "a") as file:
            attribute = next(a for a in file[changed].attrs if a.startswith("units"))
            file[changed].attrs[attribute] = "of another type"
        assert kinds.altered(name, "copy", "g/x", everything=True) == [f"{changed}@{attribute}"]
        if kind == "netcdf":
            with h5py.File(name) as file, h5py.File("copy", "w") as other:
                file.copy("g/x", other.create_group("g"))
            words = " ".join(kinds.dangling("copy"))
            assert "g/x@DIMENSION_LIST refers to nothing" in words
            assert "g/x@_Netcdf4Coordinates without dimensions" in words
            assert "g/x@_Netcdf4Dimid without dimension" in words
            assert "time is missing" in kinds.altered(name, "copy", "g/x", everything=True)


def test_texts_fill_their_types(tmp_path: Path) -> None:
    """Without a letter to spare, whatever the padding: what netCDF-C, PyTables and MATLAB write."""
    for name, content in files_of("texts"):
        (tmp_path / name).write_bytes(content)
        with h5py.File(tmp_path / name) as file:
            for padding, code in (("nullterm", 0), ("nullpad", 1), ("spacepad", 2)):
                kind = file["g/x"].attrs.get_id(f"utf8_{padding}").get_type()
                assert (kind.get_size(), kind.get_strpad(), kind.get_cset()) == (3, code, h5py.h5t.CSET_UTF8)
        assert content.count("µm".encode()) >= 12


def test_a_lie_is_another_file() -> None:
    from fuzz import kinds

    files = files_of("exchange")
    assert {"e.json", "e.npz", "e.csv", "e.weights.h5"} <= {name for name, _ in files}
    for name, content in files:
        told = {kinds.lied(name, content, np.random.default_rng(seed)) for seed in range(30)}
        assert content not in told
        assert len(told) > 10, name


def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz import run

    def outcome(code: int, killed: int = 0, err: str = "bn: error: x.npy: damaged\n") -> run.Outcome:
        return run.Outcome(code, killed, b"", err, 0)

    assert run._refusal(outcome(3)) == "refused with exit 3"
    assert run._refusal(outcome(0, err="")) == ""
    for bad in (
        outcome(0, killed=11),
        outcome(70),
        outcome(1),
        outcome(3, err="Traceback (most recent call last):\n"),
        outcome(3, err="bn: error: one\ntwo\nthree\n"),
        outcome(3, err=""),
        outcome(3, err="bn: error: \x1b[31m\n"),
    ):
        assert run._refusal(bad).startswith("FINDING"), bad
    monkeypatch.chdir(tmp_path)
    x = np.arange(12.0).reshape(4, 3)
    np.save("x.npy", x)
    found = {"count": [4] * 3}
    found |= {f"{kind}_mean": x.mean(axis=0).tolist() for kind in ("running", "population")}
    found |= {f"{kind}_var": x.var(axis=0).tolist() for kind in ("running", "population")}
    stats = bncli.fit(x)
    assert run._judge(stats, ["fit", "x.npy"], found) == 0
    with pytest.raises(AssertionError):
        run._judge(stats, ["fit", "x.npy"], found | {"population_mean": [4.5, 5.5, 6.5 + 1e-12]})
    (tmp_path / "x.npy").write_bytes(b"no array")
    assert run._judge(stats, ["fit", "x.npy"], found) == 5
