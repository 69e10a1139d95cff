"""Merging stats files: statistics of separately fitted parts of a data set are combined into those of the whole."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bncli.choices import DEFAULT_MEMORY
from bncli.engine.accumulate import finish
from bncli.engine.options import MergeSpec
from bncli.engine.parameters import affine_parameter
from bncli.engine.parts import Population, Recurrence, Samples
from bncli.engine.portions import joined
from bncli.engine.tree import Fold
from bncli.errors import BnWarning, MismatchError, UsageError, printable
from bncli.formats.address import expand, split
from bncli.numerics.arrays import Floats
from bncli.numerics.layout import feature_axis
from bncli.numerics.moments import Moments, Running
from bncli.stats.conventions import Conventions
from bncli.stats.provenance import provenance
from bncli.stats.record import Stats, load
from bncli.system import atomic

CONVENTIONS = ("momentum", "eps", "ddof", "init")
HINT = "merge only the population statistics with --population-only"
Affine = float | str | Floats | None


def merge(
    stats: Iterable[Stats],
    *,
    population_only: bool = False,
    gamma: Affine = None,
    beta: Affine = None,
    where: Sequence[str] | None = None,
) -> Stats:
    """Combine the statistics of several parts of a data set into those of the whole.

    Parts of one fit (`bn fit --part`), given in any order, give the bytes of that fit; adjacent ones a part again.
    Population statistics of fits of their own merge in any order (Chan, Golub & LeVeque 1983). Running statistics merge as consecutive runs of
    one recurrence, in the order given (`Running.merge`). They equal those of one fit of the whole if every part but the
    last holds whole batches of the same size. Otherwise they are the recurrence over the parts' own batches, `batch_size`
    is 0, and `merge` warns.

    Parameters
    ----------
    stats : Stats of C features each
        With equal feature names, axis and sample shape (imported statistics have no sample shape), equal momentum, eps,
        ddof and init, and the state of their recurrence.
    population_only : bool
        Merge only the population statistics and use them as the running statistics; momentum becomes None. The other
        conventions are those of the first part.
    gamma, beta : number, address or array of shape (C,), optional
        Of the result. By default those of the parts, which must be equal.
    where : sequence of str, optional
        Names of the parts in messages.

    Raises
    ------
    MismatchError
        Naming two parts and what differs, or a part without population statistics.
    UsageError
        When there are no parts, or gamma or beta is not finite.

    Examples
    --------
    >>> from bncli import fit
    >>> x = np.array([[1.0], [5.0], [2.0], [5.0]])
    >>> whole = merge([fit(x[:2], batch_size=2, momentum=0.5), fit(x[2:], batch_size=2, momentum=0.5)])
    >>> whole.population_mean.tolist(), whole.population_var.tolist()
    ([3.25], [3.1875])
    """
    if isinstance(stats, Stats):
        raise UsageError("merge takes several Stats, in a list")
    spec = MergeSpec(population_only=population_only, gamma=gamma, beta=beta)
    gamma, beta = spec.gamma, spec.beta
    parts = list(stats)
    if not parts:
        raise UsageError("there are no statistics to merge")
    if not all(isinstance(part, Stats) for part in parts):
        raise UsageError("merge takes Stats; read their files with bncli.load")
    names = where or [f"part {i}" for i in range(len(parts))]

    def affine() -> dict[str, Floats]:
        return {name: _affine(name, given, parts, names) for name, given in (("gamma", gamma), ("beta", beta))}

    if any(part.part is not None for part in parts):
        if population_only:
            raise UsageError("--population-only is for whole fits: merge the parts of a fit without it first")
        return joined(parts, names, affine)
    first = parts[0]
    known, known_name = next(
        (pair for pair in zip(parts, names, strict=True) if pair[0].sample_shape), (first, names[0])
    )
    for part, name in zip(parts, names, strict=True):
        _check_data(known, part, known_name, name)
        if not population_only:
            _check_recurrence(first, part, names[0], name)
    if any(part.learned is not None for part in parts):
        text = "the learned head, optimizer state and history of a part are not merged, only gamma and beta"
        warnings.warn(text, BnWarning, stacklevel=3)
    scale_and_shift = affine()
    momentum = None if population_only else first.momentum
    conventions = Conventions(momentum, first.eps, first.ddof, first.init, first.axis, first.start)
    if momentum is None and first.init == "like":  # without momentum there is no starting value
        conventions = replace(conventions, init="debias", start=None)
    fold = functools.reduce(lambda before, after: before.join(after, conventions.momentum), map(_fold, parts))
    if population_only:
        recurrence = replace(fold[Recurrence], running=_as_one_batch(fold[Population].moments, first.ddof))
        fold = fold.replace(recurrence)
        _warn_of_conventions(parts, names)
    return finish(
        fold,
        conventions,
        axis=known.axis,
        batch_size=_batch_size(parts, names, warn=conventions.momentum is not None),
        sample_shape=known.sample_shape,
        names=first.names,
        options={k: v for k, v in first.options.items() if all(k in p.options and p.options[k] == v for p in parts)},
        kernel=", ".join(dict.fromkeys(p.kernel for p in parts)),
        provenance=provenance([source for p in parts for source in p.provenance.get("sources", [])]),
        **scale_and_shift,
    )


def merge_files(
    paths: Sequence[str],
    output: str,
    *,
    population_only: bool = False,
    gamma: float | str | None = None,
    beta: float | str | None = None,
    force: bool = False,
) -> tuple[Stats, list[str]]:
    """Merge stats files and store the result; return it and the paths of the files that were merged.

    Raises
    ------
    OutputExistsError, WriteError
        Before anything is merged, where possible.
    InputError
        When a file is missing or not a stats file.
    MismatchError, UsageError
        As `merge`.
    """
    paths = expand(paths)
    read = [*paths, *(split(a)[0] for a in (gamma, beta) if isinstance(a, str))]
    with atomic.replacing(output, force=force, inputs=read) as temporary:
        _warn_of_repeated(paths)
        names = [printable(path) for path in paths]
        stats = merge(map(load, paths), population_only=population_only, gamma=gamma, beta=beta, where=names)
        with open(temporary, "wb") as file:
            file.write(stats.to_bytes())
    return stats, paths


def _fold(part: Stats) -> Fold:
    """Restore what a fit had accumulated at its end."""
    running = _as_one_batch(part.population, part.ddof) if part.running is None else part.running
    recurrence = Recurrence(running, part.num_batches, part.num_left_out)
    return Fold.empty(part.num_features).replace(Population(part.population), recurrence, Samples(part.num_samples))


def _as_one_batch(population: Moments, ddof: int) -> Running:
    """Return the state of a recurrence that folded the whole population as one batch."""
    return Running.of(population[None], ddof)[0]


def _check_data(known: Stats, part: Stats, known_name: str, name: str) -> None:
    """Raise MismatchError when the parts have different features, or one has no population statistics."""
    if not part.population.count.any():
        raise MismatchError(f"{name}: holds no population statistics (it was imported), so it cannot be merged")
    described = [_described(stats, stats.sample_shape or known.sample_shape) for stats in (known, part)]
    for what, one in described[0].items():
        if one != (other := described[1][what]):
            raise MismatchError(
                f"{known_name} and {name} differ in {what}: {one} and {other}; only statistics of the same features merge"
            )
    if known.names and part.names:
        for i, (one, other) in enumerate(zip(known.names, part.names, strict=True)):
            if one != other:
                raise MismatchError(
                    f"{known_name} and {name} differ in the name of feature {i}: {printable(one)} and {printable(other)}; "
                    "only statistics of the same features merge"
                )


def _described(stats: Stats, sample_shape: tuple[int, ...]) -> dict[str, Any]:
    """What must be equal in all parts, by the name that messages use."""
    rank = len(sample_shape) + 1
    return {
        "number of features": stats.num_features,
        "sample shape": sample_shape,
        "axis": feature_axis(rank, stats.axis) if rank > 1 else stats.axis,
        "feature names": "some" if stats.names else "none",
    }


def _check_recurrence(first: Stats, part: Stats, first_name: str, name: str) -> None:
    """Raise MismatchError when the running statistics of one part cannot continue those of another."""
    for convention in (
        CONVENTIONS if first.momentum is not None else CONVENTIONS[:-1]
    ):  # without momentum nothing starts
        one, other = getattr(first, convention), getattr(part, convention)
        if one != other:
            raise MismatchError(
                f"{first_name} and {name} differ in {convention}: {one} and {other}, so their running statistics cannot "
                f"be merged; fit with equal options, or {HINT}"
            )
    if first.start is not None and part.start is not None and first.start.tobytes() != part.start.tobytes():
        raise MismatchError(
            f"{first_name} and {name} started from different statistics (--init like), so their running statistics "
            f"cannot be merged; fit with equal options, or {HINT}"
        )
    if part.momentum is not None and part.running is None:
        raise MismatchError(
            f"{name}: holds no state of the recurrence, so its running statistics cannot be merged; fit again, or {HINT}"
        )


def _affine(what: str, given: Affine, parts: Sequence[Stats], names: Sequence[str]) -> Floats:
    """Gamma or beta of the result: as given, else that of all parts."""
    first: Floats = getattr(parts[0], what)
    if given is not None:
        return affine_parameter(given, len(first), what, DEFAULT_MEMORY)
    for part, name in zip(parts, names, strict=True):
        other = getattr(part, what)
        if (first != other).any():
            i = int(np.flatnonzero(first != other)[0])
            raise MismatchError(
                f"{names[0]} and {name} differ in {what}: {first[i]} and {other[i]} for feature {i}; choose with --{what}"
            )
    return first


def _batch_size(parts: Sequence[Stats], names: Sequence[str], warn: bool) -> int:
    """Return the batch size of the whole; 0 when batches differ in size, with a warning if `warn`."""
    size = parts[0].batch_size
    for i, (part, name) in enumerate(zip(parts, names, strict=True)):
        whole = part.num_samples == size * (part.num_batches + part.num_left_out) or i == len(parts) - 1
        if part.batch_size == size and whole:
            continue
        if warn:
            warnings.warn(
                f"the running statistics are the recurrence over the files' own batches, which are not all of size {size}: "
                f"{name} has {part.num_samples:,} samples in batches of {part.batch_size}. The population statistics "
                "are those of the whole",
                BnWarning,
                stacklevel=4,
            )
        return 0
    return size


def _warn_of_conventions(parts: Sequence[Stats], names: Sequence[str]) -> None:
    """Warn when parts differ in eps, ddof or init, which merging the population does not need."""
    for what in ("eps", "ddof", "init"):
        kept = getattr(parts[0], what)
        others = [
            f"{name} has {getattr(p, what)}" for p, name in zip(parts, names, strict=True) if getattr(p, what) != kept
        ]
        if others:
            more = f" and {len(others) - 1} more differ" if len(others) > 1 else ""
            warnings.warn(f"using {what} {kept} of {names[0]}; {others[0]}{more}", BnWarning, stacklevel=4)


def _warn_of_repeated(paths: Sequence[str]) -> None:
    """Warn when a file is given more than once."""
    real = [os.path.realpath(path) for path in paths]
    for i, path in enumerate(paths):
        if real[i] in real[:i]:
            warnings.warn(f"{printable(path)}: given twice, so its samples are counted twice", BnWarning, stacklevel=4)
