"""What very large fits cost in the one place through which all results pass, measured, and a run of 30 million segments.

    python benchmarks/scale.py            the table of docs/clusters.md, from constants measured here; half a minute
    python benchmarks/scale.py --run      also 30 million segments of tiny nodes through the real driver; ten minutes

A segment has about 33.5 MB of float32 values at C = 256, so that 1 PB is 30 million of them. The simulated run takes the
tasks from `accumulate.aligned`, computes the nodes of each (of a few real segments, at their own places in the tree), and
hands them through `executors.mapped` and `Tree.add`, as a fit does.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

import bncli
from bncli.engine import accumulate, executors
from bncli.engine.accumulate import fold_segment
from bncli.engine.plan import Segments
from bncli.engine.tree import Fold, Node, Tree
from bncli.formats.dataset import Joined
from bncli.formats.reading import ReadOptions
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Layout
from bncli.stats.conventions import DEFAULTS

SIZES = {"1 TB": 10**12, "100 TB": 10**14, "1 PB": 10**15}
WORKERS = 1000
MOMENTUM = 0.99


def leaf(features: int) -> tuple[Fold, int]:
    """The fold of one real segment, and how many bytes of float32 it stands for."""
    layout = Layout.of((10**9, features), -1)
    cut = Segments.of(layout, 10**9, 256)
    values = np.random.default_rng(0).standard_normal(
        (4 * 256, features), np.float32
    )  # a short segment has as large a fold
    data = Joined(values, ReadOptions())
    found = fold_segment(data, layout, Segments(len(values), 256, 4)[0], Missing(), DEFAULTS)
    return found, cut.at_once * 256 * features * 4


def per_call(function: Callable[[], object], calls: int) -> float:
    """Median seconds of a call, of five rounds."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds)


@dataclass(frozen=True)
class Tiny:
    """A context whose workers do not read: the nodes of a task are joined from copies of one fold."""

    fold: Fold

    def absolute(self) -> Tiny:
        """Nothing is read."""
        return self

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[range], tuple[Node, ...]]]:
        """Give a worker its function."""
        whole: dict[int, Fold] = {0: self.fold}

        def at(level: int) -> Fold:
            if level not in whole:
                whole[level] = at(level - 1).join(at(level - 1), MOMENTUM)
            return whole[level]

        def run(task: range) -> tuple[Node, ...]:
            level = len(task).bit_length() - 1
            if len(task) == 1 << level and task.start % len(task) == 0:
                return (Node(level, task.start >> level, at(level)),)
            tree = Tree(len(self.fold.pack()[0]["population/count"]))
            for number in task:
                tree = tree.add([Node(0, number, self.fold)], MOMENTUM)
            return tree.nodes

        yield run


def table(features: int) -> None:
    """Tasks, bytes to the driver, seconds there and its memory, for each of SIZES."""
    fold, segment_bytes = leaf(features)
    node = Node(0, 0, fold)
    sent = len(pickle.dumps((node,)))
    joining = per_call(lambda: fold.join(fold, MOMENTUM), 200)
    unpacking = per_call(lambda: pickle.loads(pickle.dumps((node,))), 200)
    print(
        f"\nC = {features:,}: a segment of {segment_bytes / 1e6:.1f} MB gives {sent / 1e3:.0f} kB; "
        f"a join takes {joining * 1e6:.0f} µs, packing and unpacking {unpacking * 1e6:.0f} µs"
    )
    print(
        f"{'data':>8} {'segments':>12} {'a task':>8} {'tasks':>10} {'to the driver':>14} {'seconds there':>14} {'memory':>9}"
    )
    for name, size in SIZES.items():
        segments = -(-size // segment_bytes)
        together = accumulate.together(segments, WORKERS)
        tasks = -(-segments // together)
        levels = max(1, int(segments).bit_length())
        waiting = executors.TASKS_PER_WORKER * WORKERS
        memory = sent * (waiting + 2 * levels)
        seconds = tasks * (joining + unpacking)
        print(
            f"{name:>8} {segments:>12,} {together:>8,} {tasks:>10,} {tasks * sent / 1e9:>11.2f} GB "
            f"{seconds:>14.1f} {memory / 1e6:>6.0f} MB"
        )


def run(segments: int) -> None:
    """Hand so many segments through the real driver."""
    fold, _ = leaf(1)
    tree, start = Tree(1), time.perf_counter()
    together = accumulate.together(segments, WORKERS)
    for nodes in executors.mapped(Tiny(fold), lambda _: accumulate.aligned(range(segments), together), 2):
        tree = tree.add(nodes, MOMENTUM)
    found = tree.fold(MOMENTUM)
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"\n{segments:,} segments, {together:,} a task: {took:.1f} s, peak memory {peak:.0f} MB, "
        f"{found.samples:,} samples, {len(tree.nodes)} nodes at the end"
    )
    assert found.samples == segments * fold.samples
    assert tree.stop == segments


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="also hand 30 million segments through the driver")
    given = parser.parse_args()
    print(f"bncli {bncli.__version__}, {WORKERS:,} workers")
    for features in (256, 10_000):
        table(features)
    run(30_000_001 if given.run else 300_001)


if __name__ == "__main__":
    main()
