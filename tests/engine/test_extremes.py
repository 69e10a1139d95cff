"""Minimum, maximum and missing counts against Python's own min, max and len, with both kernels."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import good, save
from helpers import ANY_ADVICE, advised
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import bncli
from bncli.numerics import compiled

TYPES = ["f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


def check(stats: bncli.Stats, columns: list[list[Any]], positions: int) -> None:
    """Compare with the values of each feature that count."""
    for i, values in enumerate(columns):
        least, most = (float(min(values)), float(max(values))) if values else (math.nan, math.nan)
        assert repr(float(stats.minimum[i])) == repr(least + 0.0)  # -0 is 0
        assert repr(float(stats.maximum[i])) == repr(most + 0.0)
        assert stats.missing is not None
        assert stats.missing[i] == positions - len(values)


@pytest.mark.parametrize("kernel", ["c", "numpy"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(300, 1), (300, 3), (77, 40), (9, 300), (5, 2, 16, 11), (40, 3, 5)])
def test_every_type_and_layout(
    kernel: str, dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "c" and not compiled.AVAILABLE:
        pytest.skip("the compiled kernel is not built")
    monkeypatch.setattr(compiled, "AVAILABLE", kernel == "c")
    rng = np.random.default_rng(len(shape))
    x = rng.integers(0, 100, shape).astype(dtype) if dtype[0] != "f" else rng.normal(size=shape).astype(dtype)
    with advised(*ANY_ADVICE):
        stats = bncli.fit(x, batch_size=16, axis=1)
    columns = np.moveaxis(x, 1, 0).reshape(shape[1], -1).tolist()
    check(stats, columns, x.size // shape[1])


@settings(max_examples=60)
@given(
    arrays(np.float64, (23, 3), elements=st.sampled_from([-0.0, 0.0, 1.5, -7.25, 1e300, math.nan, -999.0, math.inf]))
)
def test_what_is_missing_does_not_count(x: np.ndarray) -> None:
    x[:2] = [[1, 2, 3], [4, 5, 6]]  # so that there is a statistic
    x[np.abs(x) > 1e200] = math.nan
    with advised(*ANY_ADVICE):
        stats = bncli.fit(x, batch_size=4, nan="omit", fill_value=-999)
    check(stats, [[v for v in column if math.isfinite(v) and v != -999] for column in x.T.tolist()], len(x))


def test_shown_exported_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = np.array([[1.0, -5.0], [3.0, 7.0], [math.nan, 2.0], [9.0, 0.5]])
    save("a.npy", x[:2])
    save("b.npy", x[2:])
    with advised(*ANY_ADVICE):
        for name in "ab":
            good("fit", f"{name}.npy", "--nan", "omit", "--batch-size", "2", "-q")
    good("merge", "a.bn.h5", "b.bn.h5", "-o", "all.bn.h5", "-q")
    rows = list(csv.DictReader(good("inspect", "all.bn.h5", "--tsv").out.splitlines(), delimiter="\t"))
    assert [(float(r["minimum"]), float(r["maximum"]), int(r["missing"])) for r in rows] == [(1, 9, 1), (-5, 7, 0)]
    for suffix in ("csv", "json", "npz"):
        good("export", "all.bn.h5", "-o", f"all.{suffix}", "-q")
        good("import", f"all.{suffix}", "-o", f"{suffix}.bn.h5", "-q")
        back = bncli.load(f"{suffix}.bn.h5")
        assert (back.minimum.tolist(), back.maximum.tolist()) == ([1, -5], [9, 7])
