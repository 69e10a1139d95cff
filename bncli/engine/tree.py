"""What has been accumulated (Fold), and the fixed tree in which the folds of segments are joined.

`Fold.join` is associative on paper, but not in floating point. So the order of joins is fixed: node (level, i) covers the
segments i·2^level to (i + 1)·2^level - 1, or to the last, and is node (level - 1, 2i) joined with node (level - 1, 2i + 1),
or alone where there is no second. Any run of segments is at most 2·log2(n) nodes, whoever computed them and in whatever
order, and the result has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bncli.engine.checkpoint import Arrays, Packed
from bncli.engine.parts import PARTS, Batches, Part, Samples
from bncli.numerics.arrays import Array

P = TypeVar("P", bound=Part)
V = TypeVar("V")


@dataclass(frozen=True)
class Fold:
    """What has been accumulated so far: a part for each name in PARTS.

    Frozen and replaced as a whole, so an interrupted run always holds a complete one.

    Attributes
    ----------
    parts : dict of str to Part
        ``fold[Population]`` is the part of that class.

    Examples
    --------
    >>> from bncli.engine.parts import Population
    >>> Fold.empty(3)[Population].moments.count.tolist()
    [0.0, 0.0, 0.0]
    """

    parts: Mapping[str, Part]

    @classmethod
    def empty(cls, features: int) -> Fold:
        """Nothing accumulated yet, for C features."""
        return cls({name: kind.empty(features) for name, kind in PARTS.items()})

    @classmethod
    def of(cls, batches: Batches, *, again: bool = False) -> Fold:
        """Accumulate consecutive batches.

        With `again` their samples were accumulated in an earlier epoch, so only the parts that continue through all
        epochs are made (see `Part.EACH_EPOCH`).
        """
        return cls({name: kind.of(batches) for name, kind in PARTS.items() if kind.EACH_EPOCH or not again})

    @classmethod
    def unpack(cls, arrays: Arrays, attributes: Mapping[str, Any], features: int) -> Fold:
        """Restore what `pack` returned, for C features.

        Raises
        ------
        LookupError, TypeError, ValueError
            When the arrays or attributes are not those of a Fold of C features.
        """
        names = str(attributes["parts"]).split(",")
        if any(kind.EACH_EPOCH and name not in names for name, kind in PARTS.items()):
            raise LookupError(attributes["parts"])
        return cls({n: PARTS[n].of_arrays(below(arrays, n), below(attributes, n), features) for n in names})

    def pack(self) -> Packed:
        """Return everything as named arrays and plain values; parts that are not there (see `of`) are left out."""
        arrays = {f"{name}/{key}": array for name, part in self.parts.items() for key, array in part.arrays().items()}
        plain = {
            f"{name}/{key}": value for name, part in self.parts.items() for key, value in part.attributes().items()
        }
        return arrays, {"parts": ",".join(self.parts), **plain}

    def join(self, later: Fold, momentum: float | None) -> Fold:
        """Combine with the batches that follow. Parts that `later` does not have (see `of`) stay unchanged."""
        merged = {name: self.parts[name].merge(part, momentum) for name, part in later.parts.items()}
        return Fold({**self.parts, **merged})

    def replace(self, *parts: Part) -> Fold:
        """Return a copy in which these parts replace those of the same class."""
        return Fold(
            {name: next((p for p in parts if isinstance(p, PARTS[name])), old) for name, old in self.parts.items()}
        )

    def __getitem__(self, kind: type[P]) -> P:
        return next(part for part in self.parts.values() if isinstance(part, kind))

    @property
    def samples(self) -> int:
        """Number of samples accumulated."""
        return self[Samples].samples


@dataclass(frozen=True)
class Node:
    """The fold of the segments index·2^level to (index + 1)·2^level - 1, or to the last segment of all."""

    level: int
    index: int
    fold: Fold

    @property
    def first(self) -> int:
        """Its first segment."""
        return self.index << self.level

    @property
    def stop(self) -> int:
        """The segment after its last, were it complete."""
        return self.index + 1 << self.level


@dataclass(frozen=True)
class Tree:
    """The nodes of consecutive segments, each as high as it can be. Frozen and replaced as a whole.

    Attributes
    ----------
    features : int
        C.
    nodes : tuple of Node
        In order, without gaps.

    Examples
    --------
    >>> tree = Tree(1)
    >>> for segment in range(5, 12):
    ...     tree = tree.add([Node(0, segment, Fold.empty(1))], 0.9)
    >>> [(node.level, node.index) for node in tree.nodes]
    [(0, 5), (1, 3), (2, 2)]
    """

    features: int
    nodes: tuple[Node, ...] = ()

    @property
    def first(self) -> int:
        """The first segment; 0 where there is none."""
        return self.nodes[0].first if self.nodes else 0

    @property
    def stop(self) -> int:
        """The segment after the last; 0 where there is none."""
        return self.nodes[-1].stop if self.nodes else 0

    @property
    def samples(self) -> int:
        """Number of samples accumulated."""
        return sum(node.fold.samples for node in self.nodes)

    def add(self, nodes: Iterable[Node], momentum: float | None) -> Tree:
        """Add the nodes that follow, and join those whose sibling is there.

        Raises
        ------
        ValueError
            When a node does not begin where the last one ends.
        """
        stack = list(self.nodes)
        for node in nodes:
            if stack and stack[-1].stop != node.first:
                raise ValueError(f"segment {node.first} does not follow segment {stack[-1].stop - 1}")
            stack.append(node)
            while len(stack) > 1 and stack[-2].level == stack[-1].level and stack[-1].index % 2:
                earlier, later = stack[-2:]
                joined = earlier.fold.join(later.fold, momentum)
                stack[-2:] = [Node(later.level + 1, later.index // 2, joined)]
        return Tree(self.features, tuple(stack))

    def fold(self, momentum: float | None) -> Fold:
        """Everything joined: where the nodes begin at segment 0, the root of the tree."""
        if not self.nodes:
            return Fold.empty(self.features)
        *earlier, last = self.nodes
        fold = last.fold  # alone in each level that has no second
        for node in reversed(earlier):
            fold = node.fold.join(fold, momentum)
        return fold

    def pack(self) -> Packed:
        """Return the nodes as named arrays and plain values."""
        arrays: dict[str, Array] = {}
        attributes: dict[str, Any] = {"nodes": tuple(n for node in self.nodes for n in (node.level, node.index))}
        for i, node in enumerate(self.nodes):
            own, plain = node.fold.pack()
            arrays |= {f"node{i}/{name}": array for name, array in own.items()}
            attributes |= {f"node{i}/{name}": value for name, value in plain.items()}
        return arrays, attributes

    @classmethod
    def unpack(cls, arrays: Arrays, attributes: Mapping[str, Any], features: int) -> Tree:
        """Restore what `pack` returned, for C features.

        Raises
        ------
        LookupError, TypeError, ValueError
            When the arrays or attributes are not those of a Tree of C features.
        """
        flat = [int(n) for n in attributes["nodes"]]
        places = list(zip(flat[::2], flat[1::2], strict=True))
        found = [
            Node(level, index, Fold.unpack(below(arrays, f"node{i}"), below(attributes, f"node{i}"), features))
            for i, (level, index) in enumerate(places)
        ]
        tree = cls(features).add(found, None)
        if tree.nodes != tuple(found) or any(n < 0 for n in flat):
            raise ValueError("nodes overlap, or were not joined")
        return tree


def below(values: Mapping[str, V], name: str) -> dict[str, V]:
    """The values whose names begin with NAME/, by the rest of their names."""
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
