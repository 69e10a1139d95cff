"""The order of samples: each exactly once, the same in any slices, evenly spread, in little memory."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncli.engine import order as engine_order
from bncli.engine.order import STRETCH, Order, hashes, permutation, swap_or_not

SHARES = (0.0, 0.001, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.9, 0.999)
VALUES = (
    1,
    1 << 10,
    1 << 14,
    1 << 18,
    1 << 30,
)  # windows of 2^18, 2048, 128, 8 and 1 samples, in blocks of 512, 4 and 1


@st.composite
def orders(draw: st.DrawFn) -> Order:
    values = draw(st.sampled_from(VALUES))
    return Order(
        draw(st.integers(1, min(5000, 30 * Order(1, values).window))),
        values,
        draw(st.integers(0, 2**64 - 1)),
        draw(st.sampled_from(SHARES)),
        draw(st.booleans()),
    )


def check_even(counts: Sequence[int], expected: float) -> None:
    """Assert by chi-square: its mean is the degrees of freedom k, its variance 2k; six standard deviations are allowed."""
    freedom = len(counts) - 1
    chi_square = sum((count - expected) ** 2 for count in counts) / expected
    assert chi_square <= freedom + 6 * math.sqrt(2 * freedom), chi_square


def drawn(order: Order, epoch: int = 0) -> list[int]:
    found = order.indices(0, order.count, epoch)
    assert found.dtype == np.int64
    return found.tolist()


class TestOrder:
    @given(orders())
    def test_kept_and_held_out_are_all_samples_once(self, order: Order) -> None:
        held = order.held_out(0, order.held).tolist()
        assert held == sorted(held)
        assert order.held == math.floor(Fraction(str(order.holdout)) * order.samples)
        assert sorted(drawn(order) + held) == list(range(order.samples))
        if not order.shuffled:
            assert drawn(order) == sorted(drawn(order))

    @given(orders(), st.data())
    def test_any_slice_is_that_of_the_whole(self, order: Order, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, order.count))
        count = data.draw(st.integers(0, order.count - first))
        epoch = data.draw(st.integers(0, 3))
        assert order.indices(first, count, epoch).tolist() == drawn(order, epoch)[first : first + count]
        first = data.draw(st.integers(0, order.held))
        count = data.draw(st.integers(0, order.held - first))
        held = order.held_out(0, order.held).tolist()
        assert order.held_out(first, count).tolist() == held[first : first + count]

    @given(orders())
    def test_the_fraction_is_exact_before_every_stretch(self, order: Order) -> None:
        held = order.held_out(0, order.held)
        for stop in range(0, order.samples, STRETCH):
            assert np.searchsorted(held, stop) == math.floor(Fraction(str(order.holdout)) * stop)

    @given(orders(), st.integers(0, 1000))
    def test_who_is_held_out_does_not_depend_on_order_or_on_what_follows(self, order: Order, more: int) -> None:
        longer = Order(order.samples + more, 5, order.seed, order.holdout, not order.shuffled)
        whole = order.samples // STRETCH * STRETCH
        one, other = (o.held_out(0, o.held) for o in (order, longer))
        assert one[one < whole].tolist() == other[other < whole].tolist()

    def test_decimals_are_taken_as_written(self) -> None:
        """The float 0.3 is a little less than 3/10: of 10 samples it would hold out 2."""
        assert Order(10, 1, holdout=0.3).held == 3
        assert Order(1000, 1, holdout=0.007).held == 7
        assert Order(10**15, 1, holdout=1e-9).held == 10**6

    def test_epochs_and_seeds_differ(self) -> None:
        for values in VALUES:
            found = [drawn(Order(100, values, seed, 0.1, True), epoch) for seed in range(3) for epoch in range(3)]
            assert len({tuple(o) for o in found}) == 9
            assert {tuple(sorted(found[i])) for i in range(3)} == {tuple(sorted(found[0]))}  # one seed, one hold-out

    def test_data_of_one_window_is_permuted_evenly(self) -> None:
        """All 120 orders of 5 samples, over seeds and over epochs."""
        for found in (
            (tuple(drawn(Order(5, 1, seed, shuffled=True))) for seed in range(1920)),
            (tuple(drawn(Order(5, 1, 7, shuffled=True), epoch)) for epoch in range(1920)),
        ):
            counts = Counter(found)
            check_even([counts[p] for p in itertools.permutations(range(5))], 16)

    @pytest.mark.parametrize(("samples", "values"), [(5003, 1 << 10), (300, 1 << 15), (20, 1 << 19)])
    def test_every_sample_comes_anywhere(self, samples: int, values: int) -> None:
        """Several windows, blocks of several samples, a shorter last one: where single samples lie, over the seeds."""
        seeds, parts = 300, 10
        places = {sample: [0] * parts for sample in (0, samples // 2, samples - 1)}
        for seed in range(seeds):
            order = np.array(drawn(Order(samples, values, seed, shuffled=True)))
            for sample, counts in places.items():
                counts[int(np.flatnonzero(order == sample)[0]) * parts // samples] += 1
        for counts in places.values():
            check_even(counts, seeds / parts)

    def test_every_window_holds_samples_of_everywhere(self) -> None:
        order = Order(50_000, 1 << 8, 3, shuffled=True)
        assert order.window == 8192
        for first in range(0, order.count - order.window, order.window):
            tenths = np.bincount(order.indices(first, order.window) * 10 // order.samples, minlength=10)
            # 512 blocks of 16; a tenth of them is 51, with a standard deviation of less than sqrt(51)
            assert (np.abs(tenths - 819.2) < 5 * 16 * math.sqrt(51)).all()

    def test_neighbors_in_a_window_are_permuted(self) -> None:
        order = np.array(drawn(Order(50_000, 1 << 8, 3, shuffled=True)))
        # of 16 samples of a block in a window of 8192, one in 8192 / 15 has a neighbor of its block after it
        together = int((order[1:] // 16 == order[:-1] // 16).sum())
        assert together < 50_000 * 15 / 8192 + 6 * math.sqrt(50_000 * 15 / 8192)

    def test_every_sample_of_a_stretch_is_held_out_as_often(self) -> None:
        seeds, share = 600, 0.25
        counts = Counter(
            i for seed in range(seeds) for i in Order(2 * STRETCH, 1, seed, share).held_out(0, 32).tolist()
        )
        check_even([counts[i] for i in range(2 * STRETCH)], seeds * share)

    @pytest.mark.parametrize("holdout", [0.0, 0.3, 0.9])
    @pytest.mark.parametrize("values", [1, 256, 12288])
    def test_memory_does_not_grow_with_the_samples(self, holdout: float, values: int) -> None:
        order = Order(10**12, values, 1, holdout, True)
        order.indices(0, 1)
        tracemalloc.start()
        found = order.indices(order.count // 2, 10_000)
        held = order.held_out(order.held // 2, min(1000, order.held))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6
        assert len(np.unique(found)) == 10_000
        assert not set(found.tolist()) & set(held.tolist())
        assert 0 <= found.min() < found.max() < 10**12
        assert (np.diff(held) > 0).all()


class TestPermutations:
    @given(st.integers(0, 3000), st.integers(0, 2**64 - 1), st.integers(0, 20))
    def test_swap_or_not_permutes_and_leaves_the_rest(self, size: int, key: int, rest: int) -> None:
        numbers = np.arange(size + rest, dtype=np.uint64)
        moved = swap_or_not(numbers, size, np.array([key], np.uint64)).tolist()
        assert sorted(moved[:size]) == list(range(size))
        assert moved[size:] == list(range(size, size + rest))
        assert numbers.tolist() == list(range(size + rest))

    @pytest.mark.parametrize("size", [2, 3, 4, 5])
    def test_swap_or_not_is_even_for_small_sizes(self, size: int) -> None:
        each = 20
        keys = range(each * math.factorial(size))
        numbers = np.arange(size, dtype=np.uint64)
        found = Counter(tuple(swap_or_not(numbers, size, np.array([key], np.uint64)).tolist()) for key in keys)
        check_even([found[p] for p in itertools.permutations(range(size))], each)

    def test_swap_or_not_spreads_pairs(self) -> None:
        """Where two neighbors go, jointly: 5 by 5 places of 1000."""
        size, keys = 1000, 1500
        cells: Counter[tuple[int, int]] = Counter()
        for key in range(keys):
            a, b = swap_or_not(np.arange(499, 501, dtype=np.uint64), size, np.array([key], np.uint64)).tolist()
            cells[a * 5 // size, b * 5 // size] += 1
        check_even([cells[i, j] for i in range(5) for j in range(5)], keys / 25)

    @given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
    def test_permutation(self, size: int, key: int) -> None:
        assert sorted(permutation(size, np.array([key], np.uint64)).tolist()) == list(range(size))

    def test_hashes_are_splitmix64(self) -> None:
        """The first outputs for the seed 1234567, as published with other implementations."""
        found = hashes(np.array([1234567], np.uint64), np.arange(1, 6, dtype=np.uint64))
        assert found.tolist() == [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ]


def test_sizes_follow_from_the_sample_alone() -> None:
    for values in (1, 30, 4096, 1 << 22):
        sizes = {
            (o.window, o.block)
            for o in (Order(n, values, s, f, True) for n in (5, 10**9) for s in (0, 1) for f in (0, 0.5))
        }
        assert len(sizes) == 1
        window, block = sizes.pop()
        assert window * values <= max(values, engine_order.WINDOW_VALUES)
        assert 1 <= block <= window
