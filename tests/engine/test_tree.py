"""The tree: the same bits for any grouping and order of arrival, and as exact as the contract says."""

from __future__ import annotations

import random
from fractions import Fraction

import helpers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bncli
from bncli.engine.parts import Population, Recurrence, Samples
from bncli.engine.plan import Segment, Segments
from bncli.engine.tree import Fold, Node, Tree
from bncli.numerics import layout
from bncli.numerics.layout import Layout
from bncli.numerics.moments import Moments, Running

FEATURES = 3


def leaf(number: int, seed: int) -> Fold:
    """The fold of a segment of a few batches of four values, of which some have none of a feature."""
    rng = np.random.default_rng([seed, number])
    batches = Moments.empty((int(rng.integers(1, 6)), FEATURES))
    batches.count[...] = rng.integers(0, 5, batches.count.shape)
    batches.mean[...] = np.where(batches.count, rng.normal(1e3, 1, batches.count.shape), 0)
    batches.m2[...] = np.where(batches.count > 1, rng.uniform(0, 9, batches.count.shape), 0)
    recurrence = Recurrence(Running.of_batches(batches, 0, 0.99), len(batches.count), 0)
    return Fold.empty(FEATURES).replace(Population(batches.reduce()), recurrence, Samples(4 * len(batches.count)))


def bits(fold: Fold) -> dict[str, object]:
    arrays, plain = fold.pack()
    return {name: array.tobytes() for name, array in arrays.items()} | plain


def by_definition(leaves: list[Fold], level: int, index: int) -> Fold | None:
    """Node (level, index) is (level - 1, 2 index) joined with (level - 1, 2 index + 1), or alone where there is no second."""
    if not level:
        return leaves[index] if index < len(leaves) else None
    one, two = (by_definition(leaves, level - 1, 2 * index + i) for i in (0, 1))
    return one.join(two, 0.99) if one and two else one


@given(st.integers(1, 70), st.integers(0, 99), st.randoms(use_true_random=False))
def test_any_grouping_in_any_order_is_the_tree_of_the_definition(count: int, seed: int, chance: random.Random) -> None:
    leaves = [leaf(i, seed) for i in range(count)]
    truth = by_definition(leaves, count.bit_length() + 1, 0)
    assert truth is not None
    cuts = sorted(chance.sample(range(1, count), min(count - 1, chance.randint(0, 12))))
    runs = [range(a, b) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    chance.shuffle(runs)  # computed in any order
    trees = [Tree(FEATURES).add([Node(0, i, leaves[i]) for i in run], 0.99) for run in runs]
    for tree in trees:
        assert len(tree.nodes) <= 2 * max(1, (tree.stop - tree.first).bit_length())
    while len(trees) > 1:  # neighbors are joined in any order
        trees.sort(key=lambda tree: tree.first)
        at = chance.randrange(len(trees) - 1)
        trees[at : at + 2] = [trees[at].add(trees[at + 1].nodes, 0.99)]
    assert bits(trees[0].fold(0.99)) == bits(truth)
    assert trees[0].samples == truth.samples


def test_a_gap_or_an_overlap_is_refused() -> None:
    tree = Tree(FEATURES).add([Node(0, 0, leaf(0, 0)), Node(0, 1, leaf(1, 0))], 0.9)
    for number in (0, 1, 3):
        with pytest.raises(ValueError, match=f"segment {number} does not follow segment 1"):
            tree.add([Node(0, number, leaf(2, 0))], 0.9)


@given(st.integers(0, 40), st.integers(0, 99))
def test_packed_and_unpacked(count: int, seed: int) -> None:
    tree = Tree(FEATURES).add([Node(0, i, leaf(i, seed)) for i in range(count)], 0.9)
    back = Tree.unpack(*tree.pack(), features=FEATURES)
    assert [(n.level, n.index, bits(n.fold)) for n in back.nodes] == [
        (n.level, n.index, bits(n.fold)) for n in tree.nodes
    ]


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 40))
def test_segments_by_number(samples: int, batch_size: int, at_once: int) -> None:
    """As a loop over the batches cuts them."""
    batches = [(first, min(batch_size, samples - first)) for first in range(0, samples, batch_size)]
    expected: list[Segment] = []
    for i, (first, size) in enumerate(batches):
        if i % at_once == 0 or size < batch_size:
            expected.append(Segment(first, 0, size))
        expected[-1] = Segment(expected[-1].first, expected[-1].batches + 1, size)
    found = Segments(samples, batch_size, at_once)
    assert list(found) == expected
    assert len(found) == len(expected)
    assert found.run(range(len(found))) == range(samples)


@pytest.mark.parametrize("count", [1, 2, 3, 600, 5000])
@pytest.mark.parametrize("momentum", [0.9, 0.999, None])
def test_against_exact_fractions(monkeypatch: pytest.MonkeyPatch, count: int, momentum: float | None) -> None:
    """Sorted values far from 0, in up to 5,000 segments."""
    monkeypatch.setattr(layout, "PENDING_VALUES", 1)
    x = np.sort(np.random.default_rng(count).normal(1e8, 1, (4 * count, 1)), axis=0)
    assert len(Segments.of(Layout.of(x.shape, -1), len(x), 4)) == count
    with helpers.advised(*helpers.ANY_ADVICE):
        stats = bncli.fit(x, batch_size=4, momentum=momentum)
    truth = [helpers.exact(x[:, 0].tolist())]
    helpers.check_moments(stats.population_mean, stats.population_var, truth)
    if momentum is not None:
        helpers.check_running(stats, helpers.cut(x, 4), momentum, "debias")
    assert isinstance(truth[0].mean, Fraction)
