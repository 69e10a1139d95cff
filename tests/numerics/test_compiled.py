"""The compiled kernels: against exact fractions, and bit for bit against NumPy."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest

from bncli.formats.hdf5 import filters as hdf5_filters
from bncli.numerics import compiled
from bncli.numerics.batchnorm import Affine
from bncli.numerics.moments import Moments, Running, reduce_pairs

if not compiled.AVAILABLE and os.environ.get("BN_REQUIRE_PEERS") == "1" and os.environ.get("BN_KERNEL") != "numpy":
    pytest.fail("the compiled kernel was not built", pytrace=False)
pytestmark = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernel was not built")

TYPES = ["f2", "f4", "f8", ">f4", ">i2", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 127, 130, 300])
def test_blocks_of_every_type_and_width(dtype: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    for rows in (1, 2, 7, 16, 50, 128):
        limit = 2 if dtype == "?" else 100
        x = rng.integers(0, limit, (2, rows, columns)).astype(dtype)
        if x.dtype.kind == "f":
            x = (x + rng.standard_normal(x.shape)).astype(dtype)
        mean, low, m2, minimum, maximum = compiled.blocks(x)
        assert (minimum.tolist(), maximum.tolist()) == (x.min(axis=1).tolist(), x.max(axis=1).tolist())
        for g in range(2):
            for c in {0, columns // 2, columns - 1}:
                values = [Fraction(v) for v in x[g, :, c].astype("f8").tolist()]
                exact = sum(values) / rows
                exact_m2 = sum((v - exact) ** 2 for v in values)
                scale = max(abs(exact), Fraction(max(abs(v - exact) for v in values))) or 1
                found = Fraction(mean[g, c]) + Fraction(low[g, c])
                assert abs(found - exact) <= Fraction(1e-15) * scale
                assert abs(Fraction(m2[g, c]) - exact_m2) <= Fraction(4e-15) * exact_m2


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2"])
def test_extreme_integers_are_summed_exactly(dtype: str) -> None:
    limits = np.iinfo(dtype)
    for columns in (1, 5, 16):
        x = np.full((1, 128, columns), limits.min, dtype)
        x[0, 1::2] = limits.max
        mean, low, m2, minimum, maximum = compiled.blocks(x)
        assert {*minimum.ravel(), *maximum.ravel()} == {limits.min, limits.max}
        assert (minimum < maximum).all()
        half = Fraction(int(limits.max) - int(limits.min), 2)
        assert (m2 == float(128 * half**2)).all()
        assert (mean + low == float(Fraction(int(limits.max) + int(limits.min), 2))).all()


def test_merging_gives_the_bits_of_numpy() -> None:
    rng = np.random.default_rng(0)
    for parts in (2, 3, 7, 32, 129):
        m = Moments.empty((parts, 5))
        m.count[...] = rng.integers(0, 4, m.count.shape) * rng.integers(1, 1000, m.count.shape)
        some = m.count > 0
        m.mean[...] = np.where(some, rng.standard_normal(m.mean.shape) * 1e3, 0)
        m.mean_low[...] = m.mean * 1e-17
        m.m2[...] = np.where(some, rng.random(m.m2.shape) * m.count, 0)
        compiled_way = m.reduce()
        numpy_way = reduce_pairs(m, Moments.merge)
        for a, b in zip(compiled_way.arrays(), numpy_way.arrays(), strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1 - 1e-9, None])
@pytest.mark.parametrize("missing", [False, True])
def test_running_merges_as_numpy_does(momentum: float | None, missing: bool) -> None:
    rng = np.random.default_rng(1)
    for parts in (2, 3, 8, 33):
        batches = Moments.empty((parts, 4))
        batches.count[...] = rng.integers(0, 3, (parts, 4)) if missing else 8
        batches.mean[...] = np.where(batches.count > 0, rng.standard_normal((parts, 4)), 0)
        batches.m2[...] = np.where(batches.count > 1, rng.random((parts, 4)), 0)
        run = Running.of(batches, 0)
        found, expected = Running.of_batches(batches, 0, momentum), run.reduce(momentum)
        assert (found.k == expected.k).all()
        assert (found.first == expected.first).all()
        # exp and expm1 of the C library and of NumPy may differ in the last bit
        np.testing.assert_allclose(found.a + found.a_low, expected.a + expected.a_low, rtol=1e-15, atol=1e-15)


def test_environment_selects_numpy() -> None:
    code = "from bncli.numerics import compiled; print(compiled.NAME)"
    environment = os.environ | {"BN_KERNEL": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "numpy\n"


@pytest.mark.parametrize("kind", ["random", "runs", "zeros"])
def test_lzf_decoders_agree_on_valid_and_damaged_data(tmp_path: Path, kind: str) -> None:
    """Chunks that the filter of h5py stored: complete, truncated and with changed bytes."""
    rng = np.random.default_rng(4)
    plain = {
        "random": rng.integers(0, 9, 5000),
        "runs": np.repeat(rng.integers(0, 250, 50), 100),
        "zeros": np.zeros(5000),
    }
    values = plain[kind].astype(np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        item = file.create_dataset("x", data=values, chunks=(5000,), compression="lzf")
        mask, content = item.id.read_direct_chunk((0,))
    assert mask == 0
    stored = np.frombuffer(content, np.uint8)
    for undo in (compiled.unlzf, hdf5_filters._unlzf):
        np.testing.assert_array_equal(undo(stored, values.size), values)
    outcomes = set()
    for _ in range(500):
        damaged = stored[: rng.integers(stored.size) if rng.random() < 0.3 else stored.size].copy()
        if damaged.size:
            damaged[rng.integers(damaged.size, size=2)] = rng.integers(0, 256, 2)
        found = []
        for undo in (compiled.unlzf, hdf5_filters._unlzf):
            try:
                found.append(undo(damaged, values.size).tobytes())
            except ValueError as error:
                found.append(str(error).encode())
        assert found[0] == found[1]
        outcomes.add(found[0][:8])
    assert len(outcomes) > 2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("out", ["f2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(7, 3, 1), (5, 33, 1), (1, 1, 40), (4, 3, 29)])
def test_test_mode_gives_the_bits_of_numpy(
    monkeypatch: pytest.MonkeyPatch, dtype: str, out: str, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2 if dtype == "?" else 100, shape).astype(dtype)
    mean, var, gamma, beta = rng.standard_normal((4, shape[1], 1))
    affine = Affine.of(mean * 30, var**2, gamma, beta, 1e-5)
    for place in (None, 0, x.size // 2, x.size - 1):
        if place is not None and x.dtype.kind != "f":
            break
        for value in (np.nan, np.inf, -np.inf):
            given = x.copy()
            if place is not None:
                given.reshape(-1)[place] = value
            found, finite = affine.columns(given, np.dtype(out))
            with monkeypatch.context() as patch:
                patch.setattr(compiled, "AVAILABLE", False)
                expected, all_finite = affine.columns(given, np.dtype(out))
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected, equal_nan=True)
            assert finite == all_finite == (place is None)


def test_a_result_too_large_for_its_type_is_not_finite() -> None:
    one = np.ones((1, 1))
    affine = Affine.of(0 * one, one, 1e30 * one, 0 * one, 0.0)
    x = np.array([[[1.0, 1e9, 1.0]]])
    assert not affine.columns(x, np.dtype("f4"))[1]
    assert affine.columns(x, np.dtype("f8"))[1]


def test_signatures_are_those_of_the_c_files() -> None:
    """Every function of the library is declared with the types of its C definition."""
    kinds = {"int": "c_int", "int64_t": "c_int64", "size": "c_ssize_t", "double": "c_double", "void": None}
    found = {}
    for path in Path(compiled.__file__).parent.glob("*.c"):
        for result, name, parameters in re.findall(r"^(\w+) (bn_\w+)\(([^)]*)\)\n\{", path.read_text(), re.MULTILINE):
            types = ["_Pointer" if "*" in p else kinds[p.split()[0]] for p in " ".join(parameters.split()).split(", ")]
            found[name] = kinds[result], types
    alias = {name: getattr(ctypes, name) for name in kinds.values() if name} | {"_Pointer": compiled._Pointer}
    assert {
        name: (alias[result] if result else None, [alias[t] for t in types]) for name, (result, types) in found.items()
    } == compiled.SIGNATURES


@pytest.mark.parametrize("path", sorted(Path(compiled.__file__).parent.glob("*.[ch]")), ids=lambda path: path.name)
def test_c_lines_and_functions_are_short(path: Path) -> None:
    lines = [line.rstrip(" \\") for line in path.read_text().splitlines()]
    assert [line for line in path.read_text().splitlines() if len(line) > 120] == []
    starts = [number for number, line in enumerate(lines) if line == "{"]
    ends = [number for number, line in enumerate(lines) if line == "}"]
    assert all(end - start <= 50 for start, end in zip(starts, ends, strict=True))


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiled.SIGNATURES, "bn_of_another_version", (None, []))
    library, note = compiled._library_of(os.path.dirname(compiled.__file__))
    assert library is None
    assert "another version" in note


def test_the_benchmark_names_what_it_measures(tmp_path: Path) -> None:
    """Each label names its own kernel, even if the environment selects NumPy."""
    package = Path(compiled.__file__).parents[1]
    script = Path(__file__).parents[2] / "benchmarks" / "run.py"
    command = [sys.executable, str(script), "--quick", "--only", "no such task"]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "BN_KERNEL": "numpy"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("bn: bncli")
    assert lines[0].endswith(f"kernel c, from {package}")
    assert lines[1].endswith(f"kernel numpy, from {package}")
