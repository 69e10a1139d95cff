"""Fitting arrays, batches and files, divided in any way, against exact rational truth; and the same bytes."""

from __future__ import annotations

import io
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
from helpers import ANY_ADVICE, Array, advised, check_same_bytes, cut, exact, exact_columns, peer, save_h5, save_npy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import bncli
from bncli import Stats
from bncli.engine import order
from bncli.engine.plan import Segments
from bncli.errors import BnWarning, InputError, MismatchError, UsageError
from bncli.numerics import layout
from bncli.numerics.layout import Layout

INITS = ("debias", "zeros", "unit", "first")
MOMENTA = (0.0, 0.5, 0.9, 0.999, 1 - 1e-9)


def fit(source: Any, **options: Any) -> Stats:
    """Fit data that may drift, be constant or have missing values; the warnings are tested elsewhere."""
    with advised(*ANY_ADVICE):
        return bncli.fit(source, **options)


def check_population(stats: Stats, x: Array, axis: int = -1) -> None:
    truth = exact_columns(x, axis)
    assert stats.population_count.tolist() == [t.count for t in truth]
    helpers.check_moments(stats.population_mean, stats.population_var, truth)


def representable(x: Array, batch_size: int) -> bool:
    """Whether every batch's variance is 0 or has all its digits in float64 (others are refused)."""
    variances = [t.variance * t.count for batch in cut(x, batch_size) for t in exact_columns(batch)]
    return all(v == 0 or v > Fraction(1e-280) for v in variances)


def write_parts(folder: Path, x: Array, cuts: list[int], seed: int = 0) -> list[str]:
    """Write x in parts of various formats, layouts, byte and memory orders; empty parts are skipped."""
    rng = np.random.default_rng(seed)
    paths = []
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        if start == stop:
            continue
        part = x[start:stop]
        kind = int(rng.integers(5))
        if kind == 0:
            paths.append(save_npy(folder / f"p{i}.npy", part))
        elif kind == 1:
            paths.append(save_npy(folder / f"p{i}.npy", np.asfortranarray(part).astype(x.dtype.newbyteorder(">"))))
        else:
            chunks = tuple(int(rng.integers(1, n + 1)) for n in part.shape)
            options = [{}, {"chunks": chunks}, {"chunks": chunks, "compression": "gzip", "shuffle": True}][kind - 2]
            paths.append(save_h5(folder / f"p{i}.h5", part, **options))
    return paths


class TestAgainstExactTruth:
    @given(helpers.tables(), st.sampled_from(helpers.DTYPES), st.integers(2, 150), st.data())
    def test_arrays_of_any_type_in_any_batches(
        self, table: Array, dtype: str, batch_size: int, data: st.DataObject
    ) -> None:
        x = helpers.as_type(table, dtype)
        assume(representable(x, batch_size))
        momentum, init = data.draw(st.sampled_from(MOMENTA)), data.draw(st.sampled_from(INITS))
        ddof = data.draw(st.sampled_from([0, 1]))
        stats = fit(x, batch_size=batch_size, momentum=momentum, init=init, ddof=ddof)
        check_population(stats, x)
        helpers.check_running(stats, cut(x, batch_size), momentum, init, ddof)

    @given(
        st.lists(
            st.floats(1e-140, 1e140) | st.floats(-1e140, -1e-140) | st.just(0.0) | st.floats(-9, 9),
            min_size=2,
            max_size=40,
        ),
        st.integers(2, 40),
    )
    @settings(max_examples=200)
    def test_any_numbers_at_all(self, values: list[float], batch_size: int) -> None:
        x = np.array(values)[:, None]
        x[np.abs(x) < 1e-140] = 0
        truth = exact(x)
        assume(abs(truth.mean) <= 10**8 * helpers.root(truth.variance) or not truth.variance)
        assume(representable(x, batch_size))
        stats = fit(x, batch_size=batch_size)
        check_population(stats, x)
        helpers.check_running(stats, cut(x, batch_size), 0.9, "debias")

    @given(helpers.tables(max_samples=120), st.data())
    def test_batches_of_any_sizes(self, x: Array, data: st.DataObject) -> None:
        cuts = data.draw(helpers.splits(len(x)))
        batches = [x[a:b] for a, b in itertools.pairwise(cuts) if a < b]
        assume(any(len(b) > 1 for b in batches))
        assume(all(representable(b, len(b)) for b in batches))
        momentum, init = data.draw(st.sampled_from(MOMENTA)), data.draw(st.sampled_from(INITS))
        stats = fit(iter(batches), momentum=momentum, init=init)
        check_population(stats, x)
        helpers.check_running(stats, batches, momentum, init)
        assert stats.num_batches == sum(len(b) > 1 for b in batches)
        assert stats.num_samples == len(x)

    @given(helpers.tables(max_samples=90), st.sampled_from(["f2", "f4", "f8", "i4", "u1"]), st.data())
    @settings(max_examples=25)
    def test_files_in_any_division(
        self, tmp_path_factory: pytest.TempPathFactory, table: Array, dtype: str, data: st.DataObject
    ) -> None:
        x = helpers.as_type(table, dtype)
        batch_size = data.draw(st.integers(2, 40))
        assume(representable(x, batch_size))
        cuts = data.draw(helpers.splits(len(x)))
        paths = write_parts(tmp_path_factory.mktemp("parts"), x, cuts, data.draw(st.integers(0, 9)))
        stats = fit(paths, batch_size=batch_size)
        check_population(stats, x)
        helpers.check_running(stats, cut(x, batch_size), 0.9, "debias")
        check_same_bytes(stats, fit(x, batch_size=batch_size))

    @pytest.mark.parametrize(
        ("shape", "axis"), [((30, 3, 4, 5), 1), ((30, 4, 5, 3), -1), ((11, 2, 13, 12), 1), ((20, 6, 7), 2)]
    )
    @pytest.mark.parametrize("batch_size", [1, 4, 7, 256])
    def test_images(self, shape: tuple[int, ...], axis: int, batch_size: int) -> None:
        x = (np.random.default_rng(3).random(shape) * 255).astype("f4") + np.arange(shape[0], dtype="f4").reshape(
            -1, *[1] * (len(shape) - 1)
        )
        stats = fit(x, axis=axis, batch_size=batch_size, momentum=0.5)
        check_population(stats, x, axis)
        batches = [np.moveaxis(b, axis, -1).reshape(-1, shape[axis]) for b in cut(x, batch_size)]
        helpers.check_running(stats, batches, 0.5, "debias")

    @pytest.mark.parametrize("pending", [1, 4, 64])
    @pytest.mark.parametrize("momentum", MOMENTA)
    def test_many_segments(self, monkeypatch: pytest.MonkeyPatch, pending: int, momentum: float) -> None:
        monkeypatch.setattr(layout, "PENDING_VALUES", pending)
        monkeypatch.setattr(layout, "PIECE_VALUES", 50)
        x = np.sort(np.random.default_rng(0).standard_normal((503, 3)) + 1e4, axis=0)
        count = len(Segments.of(Layout.of(x.shape, -1), len(x), 10))
        assert count == {1: 51, 4: 51, 64: 4}[pending]
        stats = fit(x, batch_size=10, momentum=momentum)
        check_population(stats, x)
        helpers.check_running(stats, cut(x, 10), momentum, "debias")
        assert (stats.num_batches, stats.num_samples) == (51, 503)

    @pytest.mark.parametrize("features", [1, 3, 700])
    def test_several_segments_of_the_usual_size(self, features: int) -> None:
        samples = 5 + 9 * (
            5 * layout.PENDING_VALUES // (2 * features)
        )  # a batch has one block, so one result per feature
        found = list(Segments.of(Layout.of((samples, features), -1), samples, 9))
        assert len(found) > 2
        assert sum(s.batches * s.samples for s in found) == samples
        x = np.random.default_rng(0).integers(-100, 100, (samples, features)).astype("i1")
        stats = fit(x, batch_size=9, momentum=0.99999)
        n = len(x)
        total, squares = x.sum(axis=0, dtype="i8"), (x.astype("i8") ** 2).sum(axis=0)  # exact in integers
        for c in range(features):
            truth = helpers.Exact(n, Fraction(int(total[c]), n), Fraction(int(n * squares[c] - total[c] ** 2), n * n))
            assert helpers.mean_error(stats.population_mean[c], truth) <= helpers.STATISTICS
            assert helpers.variance_error(stats.population_var[c], truth.variance) <= helpers.STATISTICS

    @pytest.mark.parametrize("first", [1e6, -1e6, 1e8])
    def test_outlier_as_first_sample(self, first: float) -> None:
        for shift in (0.0, 1e8):
            x = np.random.default_rng(8).standard_normal((3000, 2))
            x[0] = first
            x += shift
            stats = fit(x, batch_size=256)
            check_population(stats, x)
            helpers.check_running(stats, cut(x, 256), 0.9, "debias")

    def test_one_dimension_is_one_feature(self, tmp_path: Path) -> None:
        x = np.arange(10.0)
        for source in (x, save_npy(tmp_path / "x.npy", x), save_h5(tmp_path / "x.h5", x) + "::x"):
            stats = fit(source, batch_size=5)
            check_population(stats, x[:, None])

    @pytest.mark.parametrize("value", [0.1, -1 / 3, 1e140, 1e-140, 1e200, 0.0])
    @pytest.mark.parametrize("momentum", [*MOMENTA, "none"])
    def test_constant_is_exact(self, value: float, momentum: float | str) -> None:
        x = np.full((1003, 2), value)
        inits = ("debias",) if momentum == "none" else ("debias", "first")
        for init in inits:
            with pytest.warns(BnWarning, match="constant"):
                stats = bncli.fit(x, batch_size=10, momentum=momentum, init=init)
            assert stats.running_mean.tolist() == stats.population_mean.tolist() == [value] * 2
            assert stats.running_var.tolist() == stats.population_var.tolist() == [0.0] * 2
            with_beta = bncli.batchnorm.normalize(x, stats.running_mean, stats.running_var, 3.0, 0.7)
            assert (with_beta == 0.7).all()


class TestShuffled:
    """--shuffle: the fit of the samples in the order that `order.Order` draws."""

    @given(
        helpers.tables(max_samples=300),
        st.sampled_from(["f2", "f4", "f8", "i4", "u1"]),
        st.sampled_from([1 << 8, 1 << 9, 1 << 21]),
        st.data(),
    )
    @settings(max_examples=40)
    def test_same_bytes_for_any_files_workers_and_memory(
        self, tmp_path_factory: pytest.TempPathFactory, table: Array, dtype: str, window: int, data: st.DataObject
    ) -> None:
        x = helpers.as_type(table, dtype)
        batch_size, seed = data.draw(st.integers(2, 40)), data.draw(st.integers(0, 2**64 - 1))
        cuts = data.draw(helpers.splits(len(x)))
        paths = write_parts(tmp_path_factory.mktemp("parts"), x, cuts, data.draw(st.integers(0, 9)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(order, "WINDOW_VALUES", window)
            patch.setattr(order, "WINDOW_BLOCKS", 8)
            patch.setattr(layout, "PENDING_VALUES", 64)  # many segments
            drawn = x[order.Order(len(x), x.shape[1], seed, shuffled=True).indices(0, len(x))]
            assume(representable(drawn, batch_size))
            expected = fit(drawn, batch_size=batch_size)
            for workers, memory in ((1, 1 << 27), (2, 1 << 20), (3, 1 << 27)):
                options = {"shuffle": True, "seed": seed, "workers": workers, "max_memory": memory}
                check_same_bytes(fit(paths, batch_size=batch_size, **options), expected)
        helpers.check_running(expected, cut(drawn, batch_size), 0.9, "debias")

    def test_little_memory_gives_the_same_bytes(self, tmp_path: Path) -> None:
        """Windows of 8 samples of 1 MB: all fit, one does, none does."""
        x = np.random.default_rng(0).standard_normal((9, 2, 128, 1024)).astype("f4")
        path = save_npy(tmp_path / "x.npy", x)
        stats = [
            fit(path, axis=1, batch_size=4, shuffle=True, max_memory=memory) for memory in (1 << 20, 3 << 20, 1 << 27)
        ]
        check_same_bytes(stats[0], stats[1])
        check_same_bytes(stats[0], stats[2])
        check_population(stats[0], x, 1)

    def test_sorted_data_gives_the_statistics_of_the_population(self) -> None:
        """0 to 9, a thousand of each, in sorted order: mean 4.5, variance (10² - 1) / 12 = 8.25."""
        x = np.repeat(np.arange(10.0), 1000)[:, None]
        with pytest.warns(BnWarning, match="running statistics of 1 feature differ .* give --shuffle"):
            lying = bncli.fit(x, batch_size=250)
        assert lying.population_var.tolist() == [8.25]
        assert lying.running_var[0] < 0.1  # most batches hold one value
        # a debiased running statistic weighs 40 batches by w: sum(w²) = (1 - m) / (1 + m) · (1 + m^40) / (1 - m^40)
        spread = math.sqrt(0.1 / 1.9 * (1 + 0.9**40) / (1 - 0.9**40))
        # a batch of n draws: the mean has sd sqrt(var / n), the variance var · sqrt((kurtosis - 1) / n); (n - 1) / n of it
        kurtosis = float(((np.arange(10) - 4.5) ** 4).mean()) / 8.25**2
        for seed in range(5):
            stats = bncli.fit(x, batch_size=250, shuffle=True, seed=seed)  # no warning
            assert abs(stats.running_mean[0] - 4.5) < 5 * spread * math.sqrt(8.25 / 250)
            assert abs(stats.running_var[0] / 8.25 - 249 / 250) < 5 * spread * math.sqrt((kurtosis - 1) / 250)
            assert stats.population_mean.tolist() == [4.5]
            assert stats.options == {"nan": "error", "shuffle": True, "seed": seed}

    def test_bad_values_are_named_where_they_lie(self, tmp_path: Path) -> None:
        x = np.ones((50, 3)) * np.arange(50)[:, None]
        x[37, 2] = np.nan
        paths = [save_npy(tmp_path / "a.npy", x[:30]), save_npy(tmp_path / "b.npy", x[30:])]
        with pytest.raises(InputError, match=r"b\.npy: sample 7, feature 2 is nan"):
            bncli.fit(paths, shuffle=True, seed=3)

    def test_rows_come_first(self) -> None:
        x = np.random.default_rng(0).standard_normal((500, 2))
        one = fit(x, rows=(100, 400), shuffle=True, batch_size=32)
        check_same_bytes(one, fit(x[100:400], shuffle=True, batch_size=32))

    def test_refusals(self) -> None:
        x = np.eye(4)
        with pytest.raises(UsageError, match="iterable of batches"):
            bncli.fit(iter([x, x]), shuffle=True)
        for seed in (-1, 2**64):
            with pytest.raises(UsageError, match="--seed"):
                bncli.fit(x, seed=seed)
        with pytest.raises(UsageError, match="seed"):
            bncli.fit(x, seed=1.5)
        for share in (-0.1, 1, math.nan):
            with pytest.raises(UsageError, match="0 <= F < 1"):
                bncli.fit(x, holdout=share)
        with pytest.raises(UsageError, match="--target"):
            bncli.fit(x, holdout=0.5)


class TestSameBytes:
    def reference(self, dtype: str = "f4") -> tuple[Array, dict[str, Any]]:
        rng = np.random.default_rng(11)
        x = helpers.as_type(
            rng.standard_normal((1000, 7)) * [1, 2, 3, 1e3, 1e-2, 5, 9] + [0, 1, 9, 1e4, 0, 5, 0], dtype
        )
        return x, {"batch_size": 37, "momentum": 0.95}

    @pytest.mark.parametrize("dtype", helpers.DTYPES)
    def test_orders_in_memory_and_on_disk(self, tmp_path: Path, dtype: str) -> None:
        x, options = self.reference(dtype)
        one = fit(x, **options)
        swapped = x.astype(x.dtype.newbyteorder(">"))
        others = [np.asfortranarray(x), swapped, np.asfortranarray(swapped), x.repeat(2, axis=1)[:, ::2], x[::-1][::-1]]
        for i, other in enumerate(others):
            check_same_bytes(one, fit(other, **options))
            check_same_bytes(one, fit(save_npy(tmp_path / f"{i}.npy", other), **options))
        check_same_bytes(one, fit(save_h5(tmp_path / "big.h5", swapped), **options))

    @pytest.mark.parametrize("cuts", [[1], [500], [37], [36, 38], [1, 2, 3, 4], [999], [100, 101, 740]])
    def test_one_file_or_several(self, tmp_path: Path, cuts: list[int]) -> None:
        x, options = self.reference()
        for seed in range(3):
            folder = tmp_path / str(seed)
            folder.mkdir()
            paths = write_parts(folder, x, [0, *cuts, 1000], seed)
            assert len(paths) == len(cuts) + 1
            check_same_bytes(fit(x, **options), fit(paths, **options))

    @pytest.mark.parametrize("chunks", [None, (1, 7), (1000, 1), (1000, 7), (64, 3), (37, 2), (333, 7), (7, 5)])
    @pytest.mark.parametrize(
        "filters", [{}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"fletcher32": True}]
    )
    def test_chunks_and_compression(
        self, tmp_path: Path, chunks: tuple[int, int] | None, filters: dict[str, Any]
    ) -> None:
        x, options = self.reference()
        if chunks is None and filters:
            chunks = (100, 7)
        path = save_h5(tmp_path / "x.h5", x, chunks=chunks, **filters)
        check_same_bytes(fit(x, **options), fit(path, **options))

    @pytest.mark.parametrize("memory", ["1M", "2M", "16M", "1G"])
    def test_any_memory(self, tmp_path: Path, memory: str) -> None:
        x = np.random.default_rng(0).standard_normal((6000, 60)).astype("f4")  # 1.4 MB
        one = fit(x, batch_size=100)
        for path in (
            save_npy(tmp_path / "c.npy", x),
            save_npy(tmp_path / "f.npy", np.asfortranarray(x)),
            save_h5(tmp_path / "a.h5", x, chunks=(6000, 1)),
            save_h5(tmp_path / "b.h5", x, chunks=(1000, 60), compression="gzip"),
        ):
            check_same_bytes(one, fit(path, batch_size=100, max_memory=memory))

    @pytest.mark.parametrize("axis", [1, 2, 3])
    @pytest.mark.parametrize("batch_size", [1, 5, 64])
    def test_images(self, tmp_path: Path, axis: int, batch_size: int) -> None:
        x = np.random.default_rng(0).integers(0, 255, (50, 3, 11, 12)).astype("u1")
        one = fit(x, axis=axis, batch_size=batch_size)
        paths = write_parts(tmp_path, x, [0, 3, 20, 21, 50], seed=axis)
        check_same_bytes(one, fit(paths, axis=axis, batch_size=batch_size))
        check_same_bytes(one, fit(np.asfortranarray(x), axis=axis, batch_size=batch_size))
        check_same_bytes(
            one, fit(save_h5(tmp_path / "x.h5", x, chunks=(7, 2, 3, 12)), axis=axis, batch_size=batch_size)
        )

    def test_types_that_hold_the_same_numbers(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).integers(0, 100, (400, 3))
        small = fit(x.astype("u1"), batch_size=30)  # the compiled kernel sums narrow integers as integers
        for dtype in ("i1", "u2", "i2"):
            check_same_bytes(small, fit(x.astype(dtype), batch_size=30))
        one = fit(x.astype("f8"), batch_size=30)
        for dtype in ("i4", "u4", "i8", "u8", "f2", "f4"):
            check_same_bytes(one, fit(x.astype(dtype), batch_size=30))
        mixed = [
            save_npy(tmp_path / f"{d}.npy", p.astype(d))
            for d, p in zip(("i8", "f2", "f8"), np.array_split(x, 3), strict=True)
        ]
        check_same_bytes(one, fit(mixed, batch_size=30))

    def test_batches_are_what_a_batch_size_makes(self) -> None:
        """Batch by batch agrees with the truth, not in the bits: a segment's batches are folded as a tree."""
        x, options = self.reference()
        stats = fit(cut(x, 37), momentum=0.95)
        helpers.check_running(stats, cut(x, 37), 0.95, "debias")
        whole = fit(x, **options)
        np.testing.assert_allclose(stats.running_mean, whole.running_mean, rtol=1e-13)

    def test_missing_values(self, tmp_path: Path) -> None:
        x, options = self.reference()
        x[np.random.default_rng(0).random(x.shape) < 0.2] = np.nan
        one = fit(x, nan="omit", **options)
        check_same_bytes(one, fit(write_parts(tmp_path, x, [0, 100, 333, 1000]), nan="omit", **options))
        filled = np.where(np.isnan(x), np.float32(-999), x)
        check_same_bytes(one, fit(np.asfortranarray(filled), fill_value=-999, **options))

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        x, options = self.reference()
        stats = fit(x, **options)
        path = str(tmp_path / "s.bn.h5")
        stats.save(path)
        check_same_bytes(stats, bncli.load(path))


class TestRows:
    @pytest.mark.parametrize("rows", ["10:90", "0:100", ":-7", "-50:", "33:34", "55:1000", "90:92"])
    def test_a_slice_of_the_joined_inputs(self, tmp_path: Path, rows: str) -> None:
        x = np.random.default_rng(0).standard_normal((100, 2))
        start, stop = (int(v) if v else None for v in rows.split(":"))
        part = x[start:stop]
        paths = write_parts(tmp_path, x, [0, 33, 34, 80, 100])
        if len(part) == 1:
            with pytest.raises(InputError, match="two values"):
                fit(paths, rows=rows)
            return
        for source in (paths, x):
            check_same_bytes(fit(part, batch_size=9), fit(source, rows=rows, batch_size=9))
            check_same_bytes(fit(part, batch_size=9), fit(source, rows=(start, stop), batch_size=9))

    def test_nothing_left(self) -> None:
        with pytest.raises(UsageError, match="selects none"):
            bncli.fit(np.eye(3), rows="5:")


class TestSmallBatches:
    def test_last_short_batch_counts_as_a_batch(self) -> None:
        x = np.array([[1.0], [3.0], [5.0], [9.0], [0.0], [4.0], [20.0], [22.0]])
        stats = fit(x, batch_size=3, momentum=0.5)
        assert (stats.num_batches, stats.num_left_out) == (3, 0)
        helpers.check_running(stats, cut(x, 3), 0.5, "debias")

    @pytest.mark.parametrize("init", INITS)
    def test_last_batch_of_one_is_left_out_of_the_running_statistics_only(self, init: str) -> None:
        x = np.array([[1.0], [3.0], [5.0], [9.0], [1000.0]])
        with pytest.warns(BnWarning) as caught:
            stats = bncli.fit(x, batch_size=2, momentum=0.5, init=init)
        assert sum("left out" in str(w.message) for w in caught) == 1
        assert (stats.num_batches, stats.num_left_out, stats.num_samples) == (2, 1, 5)
        assert stats.running is not None
        assert stats.running.k.max() == 2
        check_population(stats, x)
        helpers.check_running(stats, [x[:2], x[2:4]], 0.5, init)

    def test_one_image_is_a_batch(self) -> None:
        x = np.random.default_rng(0).random((3, 2, 4, 4))
        stats = fit(x, axis=1, batch_size=1, momentum=0.3)
        assert stats.num_batches == 3
        helpers.check_running(stats, [np.moveaxis(b, 1, -1).reshape(-1, 2) for b in cut(x, 1)], 0.3, "debias")

    def test_every_batch_of_one_is_a_usage_error(self) -> None:
        with pytest.raises(UsageError, match="batch-size 1"):
            bncli.fit(np.eye(5), batch_size=1)

    def test_one_sample_is_not_enough(self) -> None:
        for source in (np.ones((1, 4)), [np.ones((1, 4)), np.ones((1, 4))]):
            with pytest.raises(InputError, match="two values"):
                bncli.fit(source)


class TestMissing:
    @given(helpers.tables(max_samples=100), st.sampled_from(["f2", "f4", "f8"]), st.integers(2, 30), st.data())
    def test_omit_is_per_feature(self, table: Array, dtype: str, batch_size: int, data: st.DataObject) -> None:
        x = helpers.as_type(table, dtype)
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        x[rng.random(x.shape) < data.draw(st.sampled_from([0.05, 0.5, 0.9]))] = np.nan
        first = rng.integers(len(x))
        x[first : first + batch_size, 0] = np.nan  # a feature that misses whole batches
        batches = cut(x, batch_size)
        present = [(~np.isnan(b)).sum(axis=0) for b in batches]
        assume(any((p >= 2).any() for p in present))
        truth = [exact(column[~np.isnan(column)]) for column in x.T]
        variances = [exact(v[~np.isnan(v)]) for b in batches for v in b.T]
        assume(all(t.variance == 0 or t.variance > Fraction(1e-280) for t in variances))
        momentum, init = data.draw(st.sampled_from(MOMENTA)), data.draw(st.sampled_from(INITS))
        stored = np.where(rng.random(x.shape) < 0.5, x, np.where(np.isnan(x), np.inf, x)).astype(dtype)
        stats = fit(stored, nan="omit", batch_size=batch_size, momentum=momentum, init=init)
        assert stats.population_count.tolist() == [t.count for t in truth]
        helpers.check_moments(stats.population_mean, stats.population_var, truth)
        helpers.check_running(stats, batches, momentum, init)
        assert stats.running is not None
        assert (
            np.broadcast_to(stats.running.k, (1, x.shape[1]))[0].tolist()
            == (np.array(present) >= 2).sum(axis=0).tolist()
        )
        assert stats.num_batches == sum((p >= 2).any() for p in present)

    def test_a_feature_without_any_value(self) -> None:
        x = np.array([[1.0, np.nan], [2.0, np.inf], [4.0, -np.inf]])
        with pytest.warns(BnWarning, match="no batch with two values"):
            stats = bncli.fit(x, nan="omit")
        assert np.isnan(
            [stats.running_mean[1], stats.running_var[1], stats.population_mean[1], stats.population_var[1]]
        ).all()
        assert stats.flags() == [[], ["missing"]]
        assert stats.population_count.tolist() == [3, 0]
        assert np.isnan(stats.normalize(np.ones((2, 2)))[:, 1]).all()
        assert stats.as_dict()["features"][1]["running_mean"] is None

    def test_error_names_sample_and_feature(self, tmp_path: Path) -> None:
        x = np.ones((10, 3), "f4")
        x[7, 2] = np.nan
        with pytest.raises(InputError, match=r"sample 7, feature 2 is nan.*--nan omit"):
            bncli.fit(x)
        paths = [save_npy(tmp_path / "a.npy", x[:5]), save_npy(tmp_path / "b.npy", x[5:])]
        with pytest.raises(InputError, match=r"b\.npy: sample 2, feature 2 is nan"):
            bncli.fit(paths)
        x[7, 2] = -np.inf
        with pytest.raises(InputError, match="feature 2 is -inf"):
            bncli.fit(x)

    @pytest.mark.parametrize(
        ("dtype", "fill"),
        [
            ("u1", 255),
            ("i2", -999),
            ("i8", -(2**53)),
            ("f2", 0.1),
            ("f4", 0.1),
            ("f8", 0.1),
            ("f4", 1e20),
            ("f4", float("nan")),
            ("?", 1),
            ("f8", float("inf")),
        ],
    )
    def test_fill_value_is_compared_in_the_inputs_type(self, dtype: str, fill: float) -> None:
        x = np.random.default_rng(0).integers(0, 100, (300, 3)).astype(dtype)
        if dtype == "?":
            x[:] = False
        gone = np.random.default_rng(1).random(x.shape) < 0.3
        x[gone] = np.dtype(dtype).type(fill)
        stats = fit(x, fill_value=fill, batch_size=64)
        truth = [exact(column[~g]) for column, g in zip(x.T, gone.T, strict=True)]
        assert stats.population_count.tolist() == [t.count for t in truth]
        helpers.check_moments(stats.population_mean, stats.population_var, truth)

    @pytest.mark.parametrize(
        ("dtype", "fill"),
        [
            ("u1", -1),
            ("u1", 256),
            ("u1", 0.5),
            ("i4", 1e30),
            ("i4", 10**30),
            ("i8", 2**63),
            ("f2", 1e6),
            ("f2", 10**30),
            ("f8", 10**400),
            ("i4", float("nan")),
            ("?", 2),
        ],
    )
    def test_fill_value_that_the_type_cannot_hold_matches_nothing(self, dtype: str, fill: float) -> None:
        x = np.arange(600).reshape(200, 3).astype(dtype)
        check_same_bytes(fit(x), fit(x, fill_value=fill))

    def test_fill_value_in_inputs_of_different_types(self, tmp_path: Path) -> None:
        """0.1 is float32(0.1) in one file and float64(0.1) in the other, and neither in the third."""
        f4 = np.array([[0.1], [2.0], [3.0], [5.0]], "f4")
        f8 = np.array([[0.1], [float(np.float32(0.1))], [7.0]], "f8")
        i2 = np.array([[0], [1]], "i2")
        paths = [save_npy(tmp_path / f"{n}.npy", x) for n, x in (("f4", f4), ("f8", f8), ("i2", i2))]
        stats = fit(paths, fill_value=0.1)
        truth = exact([2.0, 3.0, 5.0, float(np.float32(0.1)), 7.0, 0.0, 1.0])
        assert stats.population_count.tolist() == [7]
        helpers.check_moments(stats.population_mean, stats.population_var, [truth])

    def test_nan_as_fill_is_left_out_and_infinity_still_refused(self) -> None:
        x = np.array([[1.0], [np.nan], [4.0]])
        assert fit(x, fill_value=float("nan")).population_mean.tolist() == [2.5]
        with pytest.raises(InputError, match="sample 1, feature 0 is inf"):
            bncli.fit(np.array([[1.0], [np.inf], [np.nan]]), fill_value=float("nan"))

    def test_fill_value_in_batches(self) -> None:
        stats = fit([np.array([[1.0], [-9.0], [4.0]]), np.array([[-9], [7], [8]], "i2")], fill_value=-9)
        assert stats.population_count.tolist() == [4]
        assert stats.population_mean.tolist() == [5.0]


class TestConventions:
    @pytest.mark.parametrize("ddof", [0, 1])
    @pytest.mark.parametrize("init", INITS)
    def test_ddof_and_init(self, ddof: int, init: str) -> None:
        x = np.random.default_rng(0).standard_normal((55, 3)) + 2
        stats = fit(x, batch_size=10, momentum=0.8, ddof=ddof, init=init)
        helpers.check_running(stats, cut(x, 10), 0.8, init, ddof)
        check_population(stats, x)  # always ddof 0

    @pytest.mark.parametrize("ddof", [0, 1])
    def test_momentum_none_is_the_population(self, ddof: int) -> None:
        x = np.sort(np.random.default_rng(0).standard_normal((55, 3)), axis=0)
        stats = bncli.fit(x, batch_size=10, momentum="none", ddof=ddof)
        truth = exact_columns(x)
        assert stats.momentum is None
        assert stats.running_mean.tolist() == stats.population_mean.tolist()
        for c, t in enumerate(truth):
            assert helpers.mean_error(stats.running_mean[c], t) <= helpers.STATISTICS
            assert helpers.variance_error(stats.running_var[c], t.folded(ddof)) <= helpers.STATISTICS

    def test_defaults(self) -> None:
        stats = fit(np.random.default_rng(0).random((1000, 2)))
        found = (stats.momentum, stats.eps, stats.batch_size, stats.init, stats.ddof, stats.axis)
        assert found == (0.9, 1e-5, 256, "debias", 0, -1)
        assert stats.num_batches == 4
        assert stats.num_parameters == 4

    @pytest.mark.parametrize("name", sorted(helpers.PRESETS))
    def test_presets_are_those_of_the_contract(self, name: str) -> None:
        expected = helpers.PRESETS[name]
        x = np.random.default_rng(0).random((64, 3, 4))
        stats = fit(x, preset=name, batch_size=20)
        momentum, _eps, ddof, init, axis = expected
        assert (stats.momentum, stats.eps, stats.ddof, stats.init, stats.axis) == expected
        batches = [np.moveaxis(b, axis, -1).reshape(-1, x.shape[axis]) for b in cut(x, 20)]
        helpers.check_running(stats, batches, momentum, init, ddof)
        other = fit(x, preset=name, batch_size=20, momentum=0.75, eps=0.5, ddof=1 - ddof, init="first", axis=2)
        assert (other.momentum, other.eps, other.ddof, other.init, other.axis) == (0.75, 0.5, 1 - ddof, "first", 2)

    def test_gamma_and_beta(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).random((64, 3))
        stats = fit(x, gamma=2.5, beta=-1.0)
        assert (stats.gamma.tolist(), stats.beta.tolist()) == ([2.5] * 3, [-1.0] * 3)
        gamma = save_npy(tmp_path / "gamma.npy", np.array([1.0, 2.0, 3.0], "f4"))
        beta = save_h5(tmp_path / "beta.h5", np.array([[4], [5], [6]])) + "::x"
        stats = fit(x, gamma=gamma, beta=beta)
        assert (stats.gamma.tolist(), stats.beta.tolist()) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
        y = stats.normalize(x, use="population")
        np.testing.assert_allclose(y.mean(axis=0), [4, 5, 6], rtol=1e-13)
        np.testing.assert_allclose(stats.denormalize(y, use="population"), x, rtol=1e-13)
        with pytest.raises(MismatchError, match="gamma"):
            bncli.fit(np.eye(2), gamma=gamma)

    @pytest.mark.parametrize(
        "options",
        [{"momentum": 1.0}, {"momentum": -0.1}, {"momentum": float("nan")}, {"eps": -1.0}, {"eps": float("inf")}, {"ddof": 2},
         {"init": "ones"}, {"preset": "caffe"}, {"batch_size": 0}, {"nan": "drop"}, {"axis": 0}, {"rows": "1"},
         {"gamma": float("nan")}, {"max_memory": "1K"}],
    )  # fmt: skip
    def test_options_without_meaning(self, options: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            bncli.fit(np.eye(4), **options)

    def test_a_name_that_is_none_of_an_option(self) -> None:
        with pytest.raises(TypeError, match="momentun"):
            bncli.fit(np.eye(4), momentun=0.9)


class TestInputs:
    def test_integers_beyond_float64_warn(self) -> None:
        for value, dtype in ((2**53 + 1, "i8"), (-(2**53) - 1, "i8"), (2**64 - 1, "u8")):
            x = np.array([[value], [3], [5]], dtype)
            for source in (x, [x]):
                with pytest.warns(BnWarning, match="2\\^53"):
                    bncli.fit(source)
        bncli.fit(np.array([[2**53], [2**53 - 1], [5]], "i8"))  # all exact: no warning

    def test_batches_that_differ_in_shape(self) -> None:
        with pytest.raises(MismatchError, match="samples of shape"):
            bncli.fit([np.ones((4, 3)), np.ones((4, 2))])

    def test_rows_of_an_iterable_are_refused_not_ignored(self) -> None:
        with pytest.raises(UsageError, match="rows"):
            bncli.fit(iter([np.eye(3)]), rows="1:")

    def test_no_batches(self) -> None:
        with pytest.raises(InputError, match="no batch"):
            bncli.fit(iter(()))

    def test_files_that_differ_in_shape(self, tmp_path: Path) -> None:
        paths = [save_npy(tmp_path / "a.npy", np.ones((4, 3))), save_npy(tmp_path / "b.npy", np.ones((4, 2)))]
        with pytest.raises(MismatchError, match="differ in shape"):
            bncli.fit(paths)

    @pytest.mark.parametrize("dtype", ["c8", "O", "U3", "M8[s]", "m8[s]", "V4"])
    def test_other_types_are_refused(self, dtype: str) -> None:
        with pytest.raises(InputError, match="refused"):
            bncli.fit(np.zeros((4, 2), dtype))

    def test_more_than_two_dimensions_need_an_axis(self) -> None:
        with pytest.raises(UsageError, match=r"--axis 1: 3 features \(NCHW\)"):
            bncli.fit(np.ones((2, 3, 4, 5)))

    def test_progress_is_told_in_samples(self) -> None:
        told: list[tuple[int, int | None, int]] = []
        fit(np.random.default_rng(0).random((1000, 2)), progress=lambda *a: told.append(a))
        assert told[-1] == (1000, 1000, 16000)
        assert [t[0] for t in told] == sorted(t[0] for t in told)


class TestWhatPythonUsersPass:
    def test_nested_lists_are_one_array(self) -> None:
        stats = fit([[1.0, 2.0], [3.0, 6.0]])
        assert stats.population_mean.tolist() == [2.0, 4.0]

    def test_a_list_of_rows_or_of_batches_is_not_guessed(self) -> None:
        x = np.arange(12.0).reshape(4, 3)
        with pytest.raises(UsageError, match=r"numpy\.stack\(rows\)"):
            fit(list(x))
        assert fit(np.stack(list(x))).population_mean.tolist() == [4.5, 5.5, 6.5]
        assert fit(iter([x[0], x[1]])).population_mean.tolist() == [2.5]

    def test_a_memoryview_is_an_array(self) -> None:
        assert fit(memoryview(np.array([[1.0, 2.0], [3.0, 6.0]]))).population_mean.tolist() == [2.0, 4.0]

    def test_momentum_none_means_none(self) -> None:
        stats = fit(np.array([[1.0], [3.0], [8.0]]), momentum=None, batch_size=2)
        assert stats.momentum is None
        assert stats.running_mean.tolist() == [4.0]

    def test_masked_arrays_are_refused(self) -> None:
        masked = np.ma.masked_greater(np.arange(6.0).reshape(3, 2), 3)
        with pytest.raises(InputError, match="masked"):
            fit(masked)
        with pytest.raises(InputError, match="masked"):
            fit(np.arange(6.0).reshape(3, 2)).normalize(masked)

    def test_an_open_dataset_is_read_as_its_file(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).standard_normal((40, 2))
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file.create_dataset("group/x", data=x).attrs["feature_names"] = ["a", "b"]
        with h5py.File(tmp_path / "x.h5") as file:
            stats = fit(file["group/x"])
        assert stats.names == ("a", "b")
        assert stats.num_samples == 40

    def test_a_dataset_whose_name_leads_to_another_file_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, scale in (("one", 1.0), ("two", 1000.0)):
            (tmp_path / name).mkdir()
            save_h5(tmp_path / name / "x.h5", np.arange(12.0).reshape(6, 2) * scale)
        monkeypatch.chdir(tmp_path / "one")
        with h5py.File("x.h5") as file:
            monkeypatch.chdir(tmp_path / "two")
            with pytest.raises(InputError, match="working directory changed"):
                fit(file["x"])
            monkeypatch.chdir(tmp_path)
            with pytest.raises(InputError, match="full path"):
                fit(file["x"])
        with h5py.File(tmp_path / "one" / "x.h5") as file:
            (tmp_path / "two" / "x.h5").replace(tmp_path / "one" / "x.h5")
            with pytest.raises(InputError, match="the file was replaced"):
                fit(file["x"])

    @pytest.mark.parametrize("kind", ["BytesIO", "core", "anonymous"])
    def test_a_dataset_without_a_file_is_refused_and_its_values_are_taken(self, tmp_path: Path, kind: str) -> None:
        place: Any = io.BytesIO() if kind == "BytesIO" else tmp_path / "x.h5"
        options = {"driver": "core", "backing_store": False} if kind == "core" else {}
        x = np.arange(12.0).reshape(6, 2)
        with h5py.File(place, "w", **options) as file:
            dataset = file.create_dataset(None if kind == "anonymous" else "x", data=x)
            with pytest.raises(UsageError, match=r"dataset\[\.\.\.\]"):
                fit(dataset)
            assert fit(dataset[...]).population_mean.tolist() == [5.0, 6.0]

    def test_closed_and_cast_datasets_and_what_holds_them(self, tmp_path: Path) -> None:
        x = np.arange(12.0).reshape(6, 2)
        with h5py.File(save_h5(tmp_path / "x.h5", x)) as file:
            dataset, cast_view = file["x"], file["x"].astype("f4")
            assert fit(cast_view).population_mean.tolist() == [5.0, 6.0]
            with pytest.raises(UsageError, match="h5py File; give one of its datasets"):
                fit(file)
        with pytest.raises(UsageError, match="closed"):
            fit(dataset)
        with pytest.raises(InputError, match="array of numbers"):
            fit(cast_view)

    def test_ragged_lists_and_odd_objects_are_refused(self) -> None:
        class Broken:
            def __array__(self, *_: object, **__: object) -> Array:
                raise RuntimeError("no\narray")

        for source in ([[1.0, 2.0], [3.0]], Broken()):
            with pytest.raises(InputError, match="cannot be converted to an array of numbers"):
                fit(source)
        for source in ([["x", "y"]], [[1, 2], [3]], [[1 + 2j, 0]]):
            with pytest.raises(InputError):
                fit(np.arange(6.0).reshape(3, 2)).normalize(source)

    @pytest.mark.parametrize(
        "options",
        [
            {"batch_size": np.int64(2), "axis": np.int8(-1), "ddof": np.int32(1)},
            {"shuffle": np.True_, "seed": np.int32(3)},
            {"fill_value": np.float32(3)},
            {"fill_value": np.uint8(3)},
            {"momentum": np.float32(0.5), "eps": np.float16(0.5)},
            {"rows": (np.int64(0), np.uint8(4))},
            {"max_memory": np.uint64(1 << 24), "workers": np.int16(1)},
        ],
    )
    def test_numpy_scalars_are_the_numbers_they_are(self, tmp_path: Path, options: dict[str, Any]) -> None:
        x = np.arange(16.0).reshape(8, 2) % 5
        plain = {k: tuple(map(int, v)) if isinstance(v, tuple) else v.item() for k, v in options.items()}
        with advised(*ANY_ADVICE):
            stats, expected = fit(x, **options), fit(x, **plain)
        check_same_bytes(stats, expected)
        assert stats.options == expected.options
        stats.save(str(tmp_path / "s.bn.h5"))
        assert bncli.load(str(tmp_path / "s.bn.h5")).options == json.loads(json.dumps(expected.options))

    @pytest.mark.parametrize("rows", [(0, 10, 2), (0, 600, -1), (1.5, None), (0,), 5, "0:4:2", (0, "4")])
    def test_rows_that_are_no_range_are_refused(self, rows: Any) -> None:
        with pytest.raises(UsageError, match="rows"):
            fit(np.arange(20.0).reshape(10, 2), rows=rows)

    def test_names_and_gamma_in_python_s_own_types(self) -> None:
        stats = fit(np.arange(6.0).reshape(3, 2), names=["a", "b"], gamma="2", beta=np.array([1.0, 2.0]))
        assert stats.names == ("a", "b")
        assert stats.gamma.tolist() == [2.0, 2.0]
        assert stats.beta.tolist() == [1.0, 2.0]

    def test_one_dimension_goes_through(self) -> None:
        x = np.array([1.0, 2.0, 6.0])
        stats = fit(x, eps=0.0)
        y = stats.normalize(x)
        assert y.shape == (3,)
        np.testing.assert_allclose(stats.denormalize(y), x, rtol=1e-15)

    @pytest.mark.parametrize(
        "options",
        [
            {"eps": "1e-3"},
            {"batch_size": 2.5},
            {"axis": "1"},
            {"rows": slice(0, 2)},
            {"momentum": "abc"},
            {"fill_value": "1"},
            {"batch_size": 10**30},
            {"names": 5},
            {"names": ["a", None]},
            {"names": b"ab"},
            {"dataset": 5},
            {"init": 3},
            {"preset": ["torch"]},
            {"like": 3},
        ],
    )
    def test_options_of_the_wrong_kind_are_usage_errors(self, options: dict[str, object]) -> None:
        with pytest.raises(UsageError):
            fit(np.arange(6.0).reshape(3, 2), **options)

    def test_axes_and_parts_of_the_wrong_kind_are_usage_errors(self) -> None:
        x = np.arange(6.0).reshape(3, 2)
        for call in (lambda: fit(x).normalize(x, axis="1"), lambda: bncli.batchnorm.forward(x, 1, 0, axis=1.5)):  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="not an integer"):
                call()
        with pytest.raises(UsageError, match=r"bncli\.load"):
            bncli.merge(["x.bn.h5"])  # type: ignore[list-item]

    @pytest.mark.parametrize("gamma", [np.array(["a"]), [object()], 1 + 2j, [[1.0], [2.0, 3.0]]])
    def test_a_gamma_that_is_no_number_is_refused(self, gamma: Any) -> None:
        with pytest.raises(InputError, match="gamma"):
            fit(np.arange(6.0).reshape(3, 2), gamma=gamma)


@pytest.mark.peer
def test_tensors_that_require_grad_and_bfloat16() -> None:
    torch = peer("torch")
    x = torch.arange(12.0).reshape(6, 2)
    for tensor in (x.clone().requires_grad_(), x.bfloat16(), [x[:3].requires_grad_(), x[3:]]):
        assert fit(tensor, batch_size=3).population_mean.tolist() == [5.0, 6.0]
    stats = fit(x, eps=0.5)
    y = torch.nn.functional.batch_norm(x.double(), None, None, training=True, eps=0.5).numpy()
    np.testing.assert_allclose(stats.normalize(x.double().requires_grad_()), y, rtol=1e-14)
    assert fit(torch._neg_view(-x)).population_mean.tolist() == [5.0, 6.0]
    assert fit((x + 1j * x).conj().imag).population_mean.tolist() == [-5.0, -6.0]
    with pytest.raises(InputError, match="complex64"):
        fit(x.to(torch.complex64))


@pytest.mark.parametrize("workers", [1, 2])
def test_integers_that_are_one_number_in_float64(workers: int) -> None:
    """Timestamps in ns: within a block they round to one float64, and the spread is between the blocks."""
    near = 1_700_000_000_000_000_000 + np.arange(256) % 50
    for x in (near, np.concatenate([near, near + 10**12 * np.arange(256)])):
        with advised(*ANY_ADVICE, "beyond 2"):
            stats = bncli.fit(x[:, None], batch_size=64, workers=workers)
        truth = exact(x.astype(np.float64))
        assert stats.population_mean[0] == float(truth.mean)
        assert stats.population_var[0] == pytest.approx(float(truth.variance), rel=1e-14)


@pytest.mark.parametrize("options", [{}, {"target": np.arange(400) % 2, "shuffle": False}, {"shuffle": True}])
def test_a_value_too_large_to_square_is_named(tmp_path: Path, options: dict[str, Any]) -> None:
    x = np.random.default_rng(0).standard_normal((400, 3))
    x[250, 1] = -1e200
    paths = write_parts(tmp_path, x, [0, 200, 400])
    with advised(*ANY_ADVICE), pytest.raises(InputError, match=r"feature 1 has magnitude 1e\+200") as caught:
        bncli.fit(paths, batch_size=32, **options)
    assert str(caught.value).startswith(paths[1])
    assert ": sample 50, feature 1 has" in str(caught.value)


def test_values_too_close_to_square_are_named() -> None:
    x = np.tile([[1e-200, 1.0], [2e-200, 3.0]], (20, 1))
    with advised(*ANY_ADVICE), pytest.raises(InputError, match=r"feature 0: its values near sample 0 are too close"):
        bncli.fit(x, batch_size=8)
