"""Parts of one fit (`bn fit --part I/N`): what each keeps, and how `bn merge` joins them to the bytes of one fit."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from bncli.engine.accumulate import finish
from bncli.engine.checkpoint import NAMED, as_json, differences
from bncli.engine.parts import ROUNDED, Marked, Rounded
from bncli.engine.task import Task
from bncli.engine.tree import Fold, Tree
from bncli.errors import BnWarning, InputError, MismatchError
from bncli.numerics.arrays import Floats
from bncli.stats.conventions import Conventions
from bncli.stats.portion import Portion, named
from bncli.stats.provenance import provenance
from bncli.stats.record import Stats


def portion(task: Task, tree: Tree) -> Portion:
    """What a part keeps of its run of segments."""
    run, part = task.run(), task.spec.part
    arrays, plain = tree.pack()
    fingerprint = json.loads(as_json(task.fingerprint()))
    return Portion(run.start, run.stop, len(task.segments()), (part,) if part else (), fingerprint, arrays, plain)


def joined(parts: Sequence[Stats], names: Sequence[str], affine: Callable[[], dict[str, Floats]]) -> Stats:
    """Join parts of one fit: all of them to the statistics of the whole, adjacent ones to a part again.

    Parameters
    ----------
    parts : Stats of parts, in any order
    names : sequence of str
        Of the parts, for messages.
    affine : function
        Gives gamma and beta of the result; called when the parts are known to belong together.

    Raises
    ------
    MismatchError
        Naming a part that is missing between others, doubled, or of another run.
    InputError
        When a part is damaged.
    """
    portions = [_portion(part, name) for part, name in zip(parts, names, strict=True)]
    for one, name in zip(portions[1:], names[1:], strict=True):
        words = differences(portions[0].fingerprint, one.fingerprint, "{} is {} and {}")
        if found := list(itertools.islice(words, NAMED)):
            raise MismatchError(f"{names[0]} and {name} are parts of different runs: {'; '.join(found)}")
    ordered = sorted(zip(portions, names, strict=True), key=lambda pair: (pair[0].first, pair[0].stop, pair[0].parts))
    _check_apart(ordered)
    scale_and_shift = affine()
    first, conventions, tree = parts[0], _conventions(parts[0]), Tree(parts[0].num_features)
    for one, name in ordered:
        tree = tree.add(_tree(one, first.num_features, name).nodes, conventions.momentum)
    whole = _united([one for one, _ in ordered], tree)
    left = _left(whole)
    if left:
        warnings.warn(f"the result is a part again; still to merge: {', '.join(left)}", BnWarning, stacklevel=4)
    fold = tree.fold(conventions.momentum)
    for text in _remarks(fold):
        warnings.warn(text, BnWarning, stacklevel=4)
    return finish(
        fold,
        conventions,
        axis=first.axis,
        batch_size=first.batch_size,
        sample_shape=first.sample_shape,
        names=first.names,
        options=first.options,
        kernel=first.kernel,
        provenance=provenance(first.provenance.get("sources", [])),
        part=whole if left else None,
        **scale_and_shift,
    )


def _remarks(fold: Fold) -> list[str]:
    """What the fits of the parts said of their data, and jobs may not have shown."""
    marked = sum(fold[Marked].marked)
    taken = f"{marked:,} values that the inputs declare missing were taken for data; each part's fit says which"
    return [ROUNDED] * fold[Rounded].rounded + [taken] * bool(marked)


def _portion(part: Stats, name: str) -> Portion:
    if part.part is None:
        raise MismatchError(
            f"{name}: is not a part of a fit, as the others are; merge parts with parts of the same run"
        )
    return part.part


def _check_apart(ordered: Sequence[tuple[Portion, str]]) -> None:
    """Raise MismatchError where a part is given twice, or one between two others is missing."""
    seen: dict[tuple[int, int], str] = {}
    for one, name in ordered:
        for part in one.parts:
            if part in seen:
                raise MismatchError(f"{named((part,))} is in {seen[part]} and in {name}; give each part once")
            seen[part] = name
    holding = [(one, name) for one, name in ordered if one.stop > one.first]  # more parts than segments: some are empty
    for (one, name), (other, other_name) in itertools.pairwise(holding):
        if other.first < one.stop:
            raise MismatchError(
                f"{name} ({one}) and {other_name} ({other}) hold the same segments; give each part once"
            )
        if other.first > one.stop:
            left = _missing(one, range(one.stop, other.first))
            raise MismatchError(f"missing between {name} ({one}) and {other_name} ({other}): {left}; merge it too")


def _left(whole: Portion) -> list[str]:
    """What is still to be merged, in words; nothing where the statistics are those of the whole fit."""
    ends = [range(whole.first), range(whole.stop, whole.total)]
    if any(ends):
        return [_missing(whole, segments) for segments in ends if segments]
    if len({of for _, of in whole.parts}) > 1:
        return []
    of = whole.parts[-1][1]
    numbers = [0, *(number for number, _ in whole.parts), of + 1]
    gaps = [(low + 1, high - 1) for low, high in itertools.pairwise(numbers) if high - low > 1]
    return [f"{_span(*gap, of)} (without segments)" for gap in gaps]


def _missing(portion: Portion, segments: range) -> str:
    """Which parts hold these segments, in words; how many parts there are is that of the portion."""
    of = portion.parts[-1][1]
    # segment s is in part I where I - 1 < of * (s + 1) / total <= I
    first, last = (-(-of * (s + 1) // portion.total) for s in (segments.start, segments.stop - 1))
    return f"{_span(first, last, of)} (segments {segments.start:,} to {segments.stop - 1:,} of {portion.total:,})"


def _span(first: int, last: int, of: int) -> str:
    return f"part {first} of {of}" if first == last else f"parts {first}-{last} of {of}"


def _tree(portion: Portion, features: int, name: str) -> Tree:
    try:
        tree = Tree.unpack(portion.arrays, portion.plain, features)
        held = range(tree.first, tree.stop) if tree.nodes else range(0)
        if held != range(portion.first, portion.stop):
            raise ValueError("its nodes are not those of its segments")
        return tree
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{name}: the part is damaged ({error}); fit it again") from None


def _united(ordered: Sequence[Portion], tree: Tree) -> Portion:
    arrays, plain = tree.pack()
    parts = tuple(sorted((part for one in ordered for part in one.parts), key=lambda part: (part[1], part[0])))
    stop = max(one.stop for one in ordered)
    first = min((one.first for one in ordered if one.stop > one.first), default=ordered[0].first)
    return replace(ordered[0], first=first, stop=max(first, stop), parts=parts, arrays=arrays, plain=plain)


def _conventions(stats: Stats) -> Conventions:
    return Conventions(stats.momentum, stats.eps, stats.ddof, stats.init, stats.axis, stats.start)
