"""Axes as features and batches cut into blocks: every path through the layout, against exact rational numbers."""

from __future__ import annotations

import itertools
import math

import helpers
import numpy as np
import pytest
from helpers import Array, exact
from hypothesis import given
from hypothesis import strategies as st

from bncli.errors import UsageError
from bncli.numerics import layout as layout_module
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Layout, Values, feature_axis
from bncli.numerics.moments import Moments


def moments_of(x: Array, axis: int, batches: int, missing: Missing | None = None) -> Moments:
    """Moments of shape (batches, C) of an array cut into equal batches."""
    flat = np.ascontiguousarray(x).reshape(-1)
    found = Layout.of(x.shape, axis)
    return found.moments(
        Values(lambda first, count: flat[first : first + count]), batches, len(x) // batches, missing or Missing()
    )


def check_layout(x: Array, axis: int, batches: int) -> None:
    found = moments_of(x, axis, batches)
    size = len(x) // batches
    for b in range(batches):
        truth = helpers.exact_columns(x[b * size : (b + 1) * size], axis)
        assert found.count[b].tolist() == [t.count for t in truth]
        helpers.check_moments(found.mean[b], found.variance()[b], truth)


class TestShapes:
    @pytest.mark.parametrize(
        ("shape", "axis", "expected"),
        [
            ((10, 4), -1, (1, 4, 1)),
            ((10, 4), 1, (1, 4, 1)),
            ((10, 3, 5, 7), 1, (1, 3, 35)),
            ((10, 3, 5, 7), 2, (3, 5, 7)),
            ((10, 3, 5, 7), -1, (15, 7, 1)),
            ((10, 3, 5, 7), -3, (1, 3, 35)),
        ],
    )
    def test_rows_features_positions(self, shape: tuple[int, ...], axis: int, expected: tuple[int, ...]) -> None:
        found = Layout.of(shape, axis)
        assert (found.rows_per_sample, found.features, found.positions) == expected
        assert found.sample_size == math.prod(shape[1:])
        assert found.row_size == expected[1] * expected[2]
        assert found.values_per_sample == math.prod(shape[1:]) // expected[1]

    def test_axes_that_do_not_exist(self) -> None:
        for axis in (0, -4):
            with pytest.raises(UsageError, match="axis 0 counts the samples"):
                feature_axis(4, axis)
        for axis in (4, -5):
            with pytest.raises(UsageError, match="does not exist"):
                feature_axis(4, axis)


class TestMoments:
    @given(st.data())
    def test_any_shape_axis_and_number_of_batches(self, data: st.DataObject) -> None:
        rank = data.draw(st.integers(2, 5))
        inner = data.draw(st.tuples(*(st.integers(1, 6 if rank > 3 else 20) for _ in range(rank - 1))))
        axis = data.draw(st.integers(1, rank - 1))
        batches, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        x = rng.standard_normal((batches * size, *inner)) + data.draw(st.sampled_from([0.0, 1e8]))
        check_layout(x, axis, batches)

    @pytest.mark.parametrize("positions", [127, 128, 129, 131, 256, 300, 1000])
    @pytest.mark.parametrize("batches", [1, 3])
    def test_images_whose_positions_fill_blocks(self, positions: int, batches: int) -> None:
        x = np.random.default_rng(0).standard_normal((6, 2, positions)) + 50
        check_layout(x, 1, batches)
        check_layout(np.stack([x, x + 1], axis=1), 2, batches)  # two rows per sample

    @pytest.mark.parametrize("samples", [127, 128, 129, 130, 200, 257, 300, 513])
    def test_batches_that_do_not_divide_into_blocks(self, samples: int) -> None:
        rng = np.random.default_rng(0)
        check_layout(rng.standard_normal((samples, 3)) + 7, -1, 1)
        check_layout(rng.standard_normal((2 * samples, 3)) + 7, -1, 2)
        check_layout(rng.standard_normal((samples, 2, 3)), -1, 1)

    @pytest.mark.parametrize("shape", [(5, 30), (5, 10, 3), (4, 2, 5, 3), (3, 2, 200), (300, 2)])
    @pytest.mark.parametrize(("wide", "piece", "pending"), [(8, 8, 8), (20, 7, 16), (1 << 21, 16, 2), (64, 64, 1)])
    def test_small_pieces_take_every_path(
        self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], wide: int, piece: int, pending: int
    ) -> None:
        """Rows wider than WIDE_VALUES, pieces smaller than a block, results merged before the batch ends."""
        monkeypatch.setattr(layout_module, "WIDE_VALUES", wide)
        monkeypatch.setattr(layout_module, "PIECE_VALUES", piece)
        monkeypatch.setattr(layout_module, "PENDING_VALUES", pending)
        x = np.random.default_rng(1).standard_normal(shape) + 3
        for axis in range(1, len(shape)):
            check_layout(x, axis, 1)

    @pytest.mark.parametrize("axis", [1, 2, 3])
    def test_missing_values_per_feature(self, axis: int) -> None:
        rng = np.random.default_rng(4)
        x = rng.standard_normal((40, 3, 4, 5))
        x[rng.random(x.shape) < 0.3] = np.nan
        x[(slice(None),) * axis + (0,)] = np.inf  # one feature has no finite value
        found = moments_of(x, axis, 2, Missing(omit=True))
        for b in range(2):
            by_feature = np.moveaxis(x[b * 20 : b * 20 + 20], axis, 0).reshape(x.shape[axis], -1)
            truth = [exact(v[np.isfinite(v)]) for v in by_feature]
            assert found.count[b].tolist() == [t.count for t in truth]
            assert truth[0].count == 0
            helpers.check_moments(found.mean[b, 1:], found.variance()[b, 1:], truth[1:])

    def test_reads_each_value_once_in_order_and_in_bounded_pieces(self) -> None:
        x = np.random.default_rng(0).standard_normal((3000, 97)).reshape(-1)
        asked: list[tuple[int, int]] = []

        def read(first: int, count: int) -> Array:
            asked.append((first, count))
            return x[first : first + count]

        Layout.of((3000, 97), -1).moments(Values(read), 1, 3000, Missing())
        assert asked[0][0] == 0
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(asked))
        assert sum(n for _, n in asked) == x.size
        assert max(n for _, n in asked) <= 2 * layout_module.PIECE_VALUES


class TestSegments:
    @pytest.mark.parametrize("shape", [(1, 1), (9, 10), (9, 70_000), (9, 3, 64, 64), (9, 64, 64, 3)])
    @pytest.mark.parametrize("batch_size", [1, 2, 256, 100_000])
    def test_a_segment_is_at_least_one_batch_and_keeps_results_bounded(
        self, shape: tuple[int, ...], batch_size: int
    ) -> None:
        found = Layout.of(shape, 1 if len(shape) == 4 else -1)
        batches = found.batches_at_once(batch_size)
        assert batches >= 1
        assert batches == 1 or batches * found.features <= layout_module.PENDING_VALUES
        assert batches == Layout.of((1, *shape[1:]), 1 if len(shape) == 4 else -1).batches_at_once(batch_size)
