"""The order of samples: which are held out, and a seeded, streaming shuffle of the others.

Index arithmetic only, in memory that does not grow with the number of samples. All random numbers are hashes (splitmix64) of
the seed and of what is drawn, not of NumPy's generators, whose streams may change between versions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

WINDOW_VALUES = 1 << 21  # largest window, in values: 16 MB of float64
WINDOW_SAMPLES = 1 << 18  # largest window, in samples: their indices take memory too
WINDOW_BLOCKS = 512  # blocks in a window: the mean of 512 draws is within 0.1 sd of the truth 39 times in 40
STRETCH = 64  # consecutive samples of which the exact fraction is held out
STRETCHES_AT_ONCE = 1 << 12
HELD, TURN, BLOCKS, WINDOW = range(4)  # first number of a key: what its hashes decide

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Order:
    """The order in which samples are drawn, and which are held out.

    Attributes
    ----------
    samples : int
        N, the number of samples in the data set.
    values : int
        Values per sample. Window and block sizes depend only on it, not on files, chunks, workers or memory.
    seed : int
        0 to 2^64 - 1.
    holdout : float
        0 <= F < 1. floor(F·N) samples are held out, F taken as the decimal number it is printed as (0.3 is 3/10). Each run
        of 64 samples contributes its share, so the fraction holds locally; which of the 64 depends on their indices and the
        seed.
    shuffled : bool
        Draw the kept samples in a seeded order: consecutive samples form blocks, the blocks are permuted, consecutive
        blocks form windows, and the samples in each window are permuted. Data of at most one and a half windows is
        permuted completely. If False, samples keep their order.

    Examples
    --------
    >>> order = Order(10, values=1, holdout=0.3, shuffled=True)
    >>> sorted([*order.indices(0, order.count).tolist(), *order.held_out(0, order.held).tolist()])
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    samples: int
    values: int
    seed: int = 0
    holdout: float = 0.0
    shuffled: bool = False

    @cached_property
    def held(self) -> int:
        """Number of samples held out."""
        return self._before(self.samples, held=True)

    @property
    def count(self) -> int:
        """Number of samples kept."""
        return self.samples - self.held

    @property
    def window(self) -> int:
        """Samples per window; the last window has between half and one and a half times as many."""
        return max(1, min(WINDOW_SAMPLES, WINDOW_VALUES // self.values))

    @property
    def block(self) -> int:
        """Samples per block: consecutive samples that go to the same window."""
        return max(1, self.window // WINDOW_BLOCKS)

    def indices(self, first: int, count: int, epoch: int = 0) -> Indices:
        """Return the sample indices at positions first to first + count, of shape (count,). Each epoch has another order."""
        if not self.shuffled:
            return self._find([(first, count)], held=False)
        parts = [np.empty(0, np.int64)]
        while count:
            number = min(first // self.window, self._windows - 1)
            start = number * self.window
            stop = self.count if number == self._windows - 1 else start + self.window
            taken = min(count, stop - first)
            drawn = permutation(stop - start, _key(WINDOW, self.seed, epoch, number))[first - start :][:taken]
            parts.append(self._slots(start, stop, epoch)[drawn])
            first, count = first + taken, count - taken
        return np.concatenate(parts)

    def held_out(self, first: int, count: int) -> Indices:
        """Return the indices of held-out samples number first to first + count, ascending, of shape (count,)."""
        return self._find([(first, count)], held=True)

    @cached_property
    def _share(self) -> Fraction:
        return Fraction(str(float(self.holdout)))

    @property
    def _windows(self) -> int:
        return max(1, (2 * self.count + self.window) // (2 * self.window))

    def _slots(self, start: int, stop: int, epoch: int) -> Indices:
        """Return the sample indices in slots start to stop: whole blocks in a random order, then the last, shorter block.

        Blocks are cut after rotating the samples by a random offset, so that any sample can be in the shorter block.
        """
        whole = self.count // self.block
        blocks = np.arange(start // self.block, -(-stop // self.block), dtype=np.uint64)
        moved = swap_or_not(blocks, whole, _key(BLOCKS, self.seed, epoch)).astype(np.int64)
        positions = (moved[:, None] * self.block + np.arange(self.block)).reshape(-1)
        turn = int(_key(TURN, self.seed, epoch)[0]) % self.count
        positions = (positions[start % self.block :][: stop - start] + turn) % self.count
        if not self.held:
            return positions
        cuts = np.flatnonzero(np.diff(positions) != 1) + 1
        firsts = positions[np.append(0, cuts)].tolist()
        counts = np.diff(np.concatenate([[0], cuts, [len(positions)]])).tolist()
        return self._find(zip(firsts, counts, strict=True), held=False)

    def _find(self, runs: Iterable[tuple[int, int]], *, held: bool) -> Indices:
        """Return the sample indices of runs (first, count), counted among the held-out or among the kept samples."""
        if not self.held:
            return np.concatenate([np.arange(first, first + count) for first, count in runs])
        stretches = [np.empty(0, np.int64)]
        taken: list[tuple[int, int]] = []
        found = 0
        for first, count in runs:
            low, high = self._stretch(first, held=held), self._stretch(first + count - 1, held=held) + 1
            before = self._before(low * STRETCH, held=held)
            taken.append((found + first - before, count))
            found += self._before(high * STRETCH, held=held) - before
            stretches.append(np.arange(low, high))
        all_stretches = np.concatenate(stretches)
        parts = range(0, len(all_stretches), STRETCHES_AT_ONCE)
        members = [self._members(all_stretches[i : i + STRETCHES_AT_ONCE], held=held) for i in parts]
        all_found = np.concatenate([np.empty(0, np.int64), *members])
        return np.concatenate([all_found[start : start + count] for start, count in taken])

    def _members(self, stretches: Indices, *, held: bool) -> Indices:
        """Return the held-out, or kept, sample indices of some stretches: the smallest hashes of each are held out."""
        indices = stretches[:, None] * STRETCH + np.arange(STRETCH)
        there = indices < self.samples
        drawn = np.where(there, hashes(_key(HELD, self.seed), indices.astype(np.uint64)), ~np.uint64(0))
        before = np.array([[self._before(i * STRETCH, held=True) for i in (b, b + 1)] for b in stretches.tolist()])
        number = before[:, 1] - before[:, 0]
        largest = np.sort(drawn, axis=1)[np.arange(len(number)), number - 1]  # hash among those held out
        out = (drawn <= largest[:, None]) & (number > 0)[:, None]
        found: Indices = indices[(out == held) & there]
        return found

    def _before(self, samples: int, *, held: bool) -> int:
        """Count the held-out, or kept, samples among the first `samples`; exact for whole stretches."""
        samples = min(samples, self.samples)
        out = self._share.numerator * samples // self._share.denominator
        return out if held else samples - out

    def _stretch(self, number: int, *, held: bool) -> int:
        """Find the stretch of the number-th held-out, or kept, sample: the last with at most that many before it."""
        share = self._share
        if held:
            return ((number + 1) * share.denominator - 1) // (share.numerator * STRETCH)
        return number * share.denominator // ((share.denominator - share.numerator) * STRETCH)


def swap_or_not(numbers: Keys, size: int, key: Keys) -> Keys:
    """Permute 0 to size - 1 without storing the permutation; numbers from `size` on stay unchanged.

    The swap-or-not shuffle of Hoang, Morris & Rogaway (2012), arXiv 1208.1176: in each round every number x has a partner,
    k - x modulo size, and a hash of the pair decides whether they swap. It works for any size. With 32 rounds plus three
    per bit of the size, their bound puts the distance from a random permutation below 1e-5 for a few queried positions.
    """
    if size < 2:
        return numbers
    rounds = 32 + 3 * size.bit_length()
    drawn = hashes(key, np.arange(2 * rounds, dtype=np.uint64)).reshape(rounds, 2)
    x, length = numbers[numbers < size], np.uint64(size)
    for k, salt in zip(drawn[:, 0] % length, drawn[:, 1], strict=True):
        partner = np.where(x <= k, k - x, k + length - x)
        swapped = _mixed(np.maximum(x, partner) ^ salt) >> np.uint64(63) == 1
        x = np.where(swapped, partner, x)
    moved = numbers.copy()
    moved[numbers < size] = x
    return moved


def permutation(size: int, key: Keys) -> Indices:
    """Return a permutation of 0 to size - 1, size <= 2^32: the numbers sorted by the upper bits of their hashes."""
    bits = np.uint64((size - 1).bit_length())
    numbers = np.arange(size, dtype=np.uint64)
    order = hashes(key, numbers) >> bits << bits | numbers  # sorting hash and number as one integer beats argsort
    order.sort()
    return (order & (np.uint64(1) << bits) - np.uint64(1)).astype(np.int64)


def _key(*numbers: int) -> Keys:
    """Hash non-negative integers to a key, of shape (1,)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _mixed((key ^ np.uint64(number)) + _GOLDEN)
    return key


def hashes(key: Keys, numbers: Keys) -> Keys:
    """Return outputs number `numbers` of a splitmix64 generator that starts at `key`; different numbers differ."""
    return _mixed(key + numbers * _GOLDEN)


def _mixed(z: Keys) -> Keys:
    """Finalizer of splitmix64 (Steele, Lea & Flood 2014, with Stafford's constants), a bijection of 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
