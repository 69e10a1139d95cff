"""Merging parts gives the whole, against exact rational truth; what cannot be merged is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    ANY_ADVICE,
    STATISTICS,
    Array,
    advised,
    check_moments,
    check_running,
    check_same_bytes,
    cut,
    exact,
    exact_columns,
    splits,
    tables,
)
from hypothesis import given
from hypothesis import strategies as st

import bncli
import bncli.exchange
from bncli import Stats
from bncli.errors import BnWarning, InputError, MismatchError, UsageError

INITS = ["debias", "zeros", "unit", "first"]  # `like` needs statistics to start from: see cli/test_fit
MOMENTA = [0.0, 1e-3, 0.5, 0.9, 0.99, 0.999999999]


def fit(x: Array, **options: Any) -> Stats:
    with advised(*ANY_ADVICE):
        return bncli.fit(x, **options)


def merge(parts: Sequence[Stats], **options: Any) -> Stats:
    with advised(*ANY_ADVICE):
        return bncli.merge(parts, **options)


def part(**options: Any) -> Stats:
    return fit(np.arange(24.0).reshape(8, 3) ** 1.5, **{"batch_size": 4} | options)


def without_state(stats: Stats) -> Stats:
    return replace(stats, running=None)


def check_whole(merged: Stats, whole: Stats) -> None:
    """Assert the counts; numbers are checked against exact truth."""
    for name in (
        "num_samples",
        "num_batches",
        "num_left_out",
        "batch_size",
        "sample_shape",
        "axis",
        "names",
        "options",
    ):
        assert getattr(merged, name) == getattr(whole, name), name
    assert (merged.population.count == whole.population.count).all()
    assert merged.running is not None
    assert whole.running is not None
    assert (merged.running.k[0] == whole.running.k[0]).all()
    assert (merged.running.first == whole.running.first).all()


@given(
    x=tables(),
    batch_size=st.integers(2, 40),
    points=st.data(),
    momentum=st.sampled_from(MOMENTA),
    init=st.sampled_from(INITS),
    ddof=st.integers(0, 1),
)
def test_parts_of_whole_batches_merge_into_the_whole(
    x: Array, batch_size: int, points: st.DataObject, momentum: float, init: str, ddof: int
) -> None:
    options = {"batch_size": batch_size, "momentum": momentum, "init": init, "ddof": ddof}
    x = x[: len(x) - (len(x) % batch_size == 1)]  # a last batch of one sample cannot be fitted by itself
    cuts = [min(p * batch_size, len(x)) for p in points.draw(splits(-(-len(x) // batch_size)))]
    parts = [fit(x[a:b], **options) for a, b in itertools.pairwise(cuts) if b > a]
    merged = merge(parts)
    check_whole(merged, fit(x, **options))
    check_moments(merged.population_mean, merged.population_var, exact_columns(x), STATISTICS)
    check_running(merged, cut(x, batch_size), momentum, init, ddof, STATISTICS)


@given(x=tables(), points=st.data(), seed=st.integers(0, 2**32 - 1))
def test_population_merges_in_any_order_at_any_cut(x: Array, points: st.DataObject, seed: int) -> None:
    cuts = points.draw(splits(len(x)))
    parts = [fit(x[a:b], momentum=0.5) for a, b in itertools.pairwise(cuts) if b - a > 1]
    kept = np.concatenate([x[a:b] for a, b in itertools.pairwise(cuts) if b - a > 1] or [x])
    order = np.random.default_rng(seed).permutation(len(parts))
    merged = merge([parts[i] for i in order] or [fit(x)], population_only=True)
    check_moments(merged.population_mean, merged.population_var, exact_columns(kept), STATISTICS)
    assert merged.momentum is None
    np.testing.assert_array_equal(merged.running_mean, merged.population_mean)
    np.testing.assert_array_equal(merged.running_var, merged.population_var)


@given(x=tables(max_samples=200), points=st.data(), momentum=st.sampled_from(MOMENTA), init=st.sampled_from(INITS))
def test_parts_of_other_sizes_merge_as_the_recurrence_over_their_batches(
    x: Array, points: st.DataObject, momentum: float, init: str
) -> None:
    cuts = points.draw(splits(len(x)))
    pieces = [x[a:b] for a, b in itertools.pairwise(cuts) if b - a > 1] or [x]
    parts = [fit(piece, batch_size=16, momentum=momentum, init=init) for piece in pieces]
    with advised(*ANY_ADVICE, "recurrence over the files' own batches"):
        merged = bncli.merge(parts)
    batches = [batch for piece in pieces for batch in cut(piece, 16)]
    check_running(merged, batches, momentum, init, tolerance=STATISTICS)
    aligned = all(len(piece) % 16 == 0 for piece in pieces[:-1])
    assert merged.batch_size == (16 if aligned else 0)


@given(x=tables(max_samples=120), holes=st.integers(0, 2**32 - 1), momentum=st.sampled_from([None, *MOMENTA]))
def test_missing_values_merge(x: Array, holes: int, momentum: float | None) -> None:
    rng = np.random.default_rng(holes)
    x[rng.random(x.shape) < rng.choice([0.1, 0.8])] = np.nan
    x[: len(x) // 2, 0] = np.nan  # the first feature is missing in the first part
    options = {"batch_size": 2, "nan": "omit", "momentum": "none" if momentum is None else momentum}
    half = len(x) // 4 * 2
    try:
        parts = [fit(piece, **options) for piece in (x[:half], x[half:])]
    except InputError:
        return  # no feature has two values in a batch of this part
    merged = merge(parts)
    truth = [exact(column[~np.isnan(column)]) for column in x.T]
    check_moments(merged.population_mean, merged.population_var, truth, STATISTICS)
    if momentum is not None:
        check_running(merged, cut(x, 2), momentum, "debias", tolerance=STATISTICS)
    else:
        np.testing.assert_array_equal(np.isnan(merged.running_mean), np.isnan(fit(x, **options).running_mean))


def test_far_from_zero_through_files(tmp_path: Path) -> None:
    """A mean of 1e8 standard deviations needs the low words that the files keep, also after a population merge."""
    x = np.random.default_rng(3).normal(1e8, 1, (4096, 2))
    merged = None
    for i, piece in enumerate(np.split(x, 16)):
        fit(piece, batch_size=64).save(str(tmp_path / "part.bn.h5"))
        parts = [bncli.load(str(tmp_path / "part.bn.h5"))]
        if i:
            parts.insert(0, bncli.load(str(tmp_path / "all.bn.h5")))
        merged = merge(parts, population_only=True)
        merged.save(str(tmp_path / "all.bn.h5"))
    assert merged is not None
    check_moments(merged.population_mean, merged.population_var, exact_columns(x), STATISTICS)


def test_one_part_stays_what_it_is() -> None:
    check_same_bytes(merge([part()]), part())


def test_a_part_of_one_batch_and_images() -> None:
    x = np.random.default_rng(0).normal(5, 2, (24, 3, 4, 2))
    options = {"batch_size": 8, "preset": "torch"}
    merged = merge([fit(x[:8], **options), fit(x[8:16], **options), fit(x[16:], **options)])
    check_whole(merged, fit(x, **options))
    batches = [np.moveaxis(b, 1, -1).reshape(-1, 3) for b in np.split(x, 3)]
    check_running(merged, batches, 0.9, "unit", 1, STATISTICS)


def test_constant_stays_constant() -> None:
    merged = merge([fit(np.full((512, 1), 0.1)) for _ in range(5)])
    assert merged.running_mean.tolist() == merged.population_mean.tolist() == [0.1]
    assert merged.running_var.tolist() == merged.population_var.tolist() == [0.0]


def test_momentum_none_needs_no_order_and_no_batches() -> None:
    x = np.random.default_rng(1).normal(size=(50, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = bncli.merge([bncli.fit(p, momentum="none", batch_size=7, ddof=1) for p in (x[30:], x[:30])])
    np.testing.assert_allclose(merged.running_mean, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged.running_var, x.var(axis=0, ddof=1), rtol=1e-13)


def test_merging_merged_parts_that_were_cut_elsewhere_warns_again() -> None:
    x = np.random.default_rng(1).normal(size=(32, 2))
    pieces = [fit(p, batch_size=8, momentum=0.99) for p in (x[:4], x[4:16], x[16:])]
    with advised(*ANY_ADVICE, "own batches"):
        odd = bncli.merge(pieces[:2])
    assert odd.num_samples == 16  # a multiple of 8, yet not two batches of 8
    with pytest.warns(BnWarning, match="own batches"):
        bncli.merge([odd, pieces[2]])


def test_provenance_keeps_all_sources_and_options_what_agrees(tmp_path: Path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.arange(16.0).reshape(8, 2))
    first = fit(str(tmp_path / "a.npy"), rows="0:4")
    merged = merge([first, fit([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")])], population_only=True)
    assert [Path(s["name"]).name for s in merged.provenance["sources"]] == ["a.npy", "a.npy", "b.npy"]
    assert merged.options == {"nan": "error"}
    assert merged.kernel == first.kernel


def test_gamma_and_beta_agree_or_are_given() -> None:
    one, other = part(gamma=2.0, beta=[1.0, 2.0, 3.0]), part(gamma=2.0, beta=[1.0, 2.5, 3.0])
    with pytest.raises(MismatchError, match=r"part 0 and part 1 differ in beta: 2.0 and 2.5 for feature 1.*--beta"):
        bncli.merge([one, other])
    merged = merge([one, other], beta=np.array([7.0, 8.0, 9.0]))
    assert merged.gamma.tolist() == [2.0, 2.0, 2.0]
    assert merged.beta.tolist() == [7.0, 8.0, 9.0]
    with pytest.raises(MismatchError, match="gamma has shape"):
        bncli.merge([one, one], gamma=np.ones(2))
    with pytest.raises(UsageError, match="not finite"):
        bncli.merge([one, one], gamma=float("nan"))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"momentum": 0.5}, "momentum: 0.9 and 0.5"),
        ({"momentum": "none"}, "momentum: 0.9 and None"),
        ({"eps": 1e-3}, "eps: 1e-05 and 0.001"),
        ({"ddof": 1}, "ddof: 0 and 1"),
        ({"init": "unit"}, "init: debias and unit"),
    ],
)
def test_other_recurrences_do_not_merge_but_their_population_does(options: dict[str, Any], what: str) -> None:
    with pytest.raises(MismatchError, match=f"a and b differ in {what}.*--population-only"):
        bncli.merge([part(), part(**options)], where=["a", "b"])
    with advised(*ANY_ADVICE, "using"):
        merged = bncli.merge([part(), part(**options)], population_only=True)
    x = np.arange(24.0).reshape(8, 3) ** 1.5
    np.testing.assert_allclose(merged.running_var, x.var(axis=0), rtol=1e-14)
    assert (merged.momentum, merged.eps, merged.ddof) == (None, 1e-5, 0)


def test_population_only_tells_which_eps_is_kept() -> None:
    with pytest.warns(BnWarning, match=r"using eps 1e-05 of part 0; part 1 has 0.001"):
        bncli.merge([part(), part(eps=1e-3)], population_only=True)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: fit(np.arange(16.0).reshape(8, 2), batch_size=4), "number of features: 3 and 2"),
        (lambda: fit(np.arange(48.0).reshape(8, 3, 2), axis=1), r"sample shape: \(3,\) and \(3, 2\)"),
        (lambda: replace(part(), names=("a", "b", "c")), "feature names: none and some"),
    ],
)
@pytest.mark.parametrize("population_only", [True, False])
def test_other_features_never_merge(other: Any, what: str, population_only: bool) -> None:
    with pytest.raises(MismatchError, match=f"part 0 and part 1 differ in {what}"):
        bncli.merge([part(), other()], population_only=population_only)


def test_other_names_never_merge_and_are_shown_without_controls() -> None:
    one, other = (replace(part(), names=("a", name, "c")) for name in ("b", "\x1b[31m"))
    with pytest.raises(MismatchError, match=r"the name of feature 1: b and \\x1b\[31m"):
        bncli.merge([one, other])


@pytest.mark.parametrize("suffix", [".json", ".csv", ".npz"])
def test_a_sample_shape_that_is_not_known_is_any(tmp_path: Path, suffix: str) -> None:
    """Imported files have a population but no sample shape; parts that have one must agree, in any order."""
    one, two = (fit(x, axis=-2) for x in np.split(np.random.default_rng(2).normal(size=(60, 3, 2)), 2))
    bncli.exchange.write(two, str(tmp_path / f"two{suffix}"))
    back = bncli.exchange.read(str(tmp_path / f"two{suffix}"))
    expected = merge([one, two], population_only=True)
    for parts in ([one, back], [back, one]):
        merged = merge(parts, population_only=True)
        np.testing.assert_allclose(merged.population_var, expected.population_var, rtol=1e-13)
        assert (merged.sample_shape, merged.axis) == ((3, 2), -2)
    assert merge([back, back], population_only=True).sample_shape == ()
    with pytest.raises(MismatchError, match=r"part 1 and part 2 differ in sample shape: \(3, 2\) and \(3,\)"):
        bncli.merge([back, one, part()], population_only=True)
    with pytest.raises(MismatchError, match="part 1 and part 0 differ in axis: 1 and 2"):
        bncli.merge([replace(back, axis=2), one], population_only=True)


def test_init_has_no_meaning_without_momentum() -> None:
    merged = merge([part(momentum="none"), part(momentum="none", init="unit")])
    assert (merged.num_samples, merged.momentum, merged.init) == (16, None, "debias")


def test_axis_is_compared_as_a_place() -> None:
    x = np.arange(16.0).reshape(4, 2, 2)
    with pytest.raises(MismatchError, match="differ in axis: 1 and 2"):
        bncli.merge([fit(x, axis=1), fit(x, axis=-1)])
    assert merge([fit(x, axis=-1, batch_size=4), fit(x, axis=2, batch_size=4)]).axis == -1


def test_statistics_without_state_merge_their_population_alone() -> None:
    with pytest.raises(MismatchError, match=r"part 1: holds no state of the recurrence.*--population-only"):
        bncli.merge([part(), without_state(part())])
    assert merge([part(), without_state(part())], population_only=True).num_samples == 16


def test_imported_statistics_have_nothing_to_merge() -> None:
    imported = Stats(
        np.zeros(3), np.ones(3), np.ones(3), np.zeros(3), bncli.stats.record.Moments.empty(3), sample_shape=(3,)
    )
    for population_only in (False, True):
        with pytest.raises(MismatchError, match="part 1: holds no population"):
            bncli.merge([part(), imported], population_only=population_only)


def test_no_part_is_an_error() -> None:
    with pytest.raises(UsageError, match="no statistics to merge"):
        bncli.merge([])


def test_a_sum_beyond_float64_is_refused() -> None:
    with pytest.raises(InputError, match="too large"):
        merge([fit(np.array([[-1e154], [-1.00001e154]])), fit(np.array([[1e154], [1.00001e154]]))])
