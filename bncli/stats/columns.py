"""Per-feature columns, one row each: what `bn inspect` shows, JSON carries, and .csv and .npz files hold.

A column is added by one row of COLUMNS. Order in TSV and JSON is the order of the rows; `reading`, `room` and `exported`
are ranks for the other places (0: not there), equal ones in the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bncli.numerics.arrays import Array

if TYPE_CHECKING:
    from bncli.stats.record import Stats

END = 100  # a rank behind those that are given
Value = float | int | str | list[str] | None  # of one feature; None is NaN, infinity or no name


@dataclass(frozen=True)
class Column:
    """One number, count or text per feature.

    Attributes
    ----------
    of : function
        Reads it off a Stats: an array of shape (C,), or a list of C values.
    meaning : str
        One line for the documentation.
    title : str
        Heading on a terminal; "" is the name.
    kind : "number", "count", "index", "text" or "flags"
        How it is printed.
    json : bool
        Whether `bn inspect --json` and .json files carry it.
    reading, room : int
        On a terminal: its place from the left, and how early it gets a part of the width.
    exported : int
        Its place in .csv and .npz files.
    npz : bool
        Whether .npz files carry it too, which have no need of an index.
    read : bool
        Whether an import reads it back.
    absent : int or None
        What an import assumes where the file has no such column; None: it stays unknown.
    since : int
        The version of the JSON that first has it; files of older ones lack it.
    """

    of: Callable[[Stats], Array | Sequence[Value]]
    meaning: str
    title: str = ""
    kind: str = "number"
    json: bool = True
    reading: int = END
    room: int = END
    exported: int = END
    npz: bool = True
    read: bool = False
    absent: int | None = None
    since: int = 1

    def values(self, stats: Stats) -> list[Value]:
        """Plain values: None for a number that JSON has no way to write."""
        found = self.of(stats)
        plain: list[Any] = found.tolist() if isinstance(found, np.ndarray) else list(found)
        return [None if isinstance(v, float) and not math.isfinite(v) else v for v in plain]


def rows(stats: Stats) -> list[dict[str, Value]]:
    """The values of every column, a dictionary per feature."""
    columns = [column.values(stats) for column in COLUMNS.values()]
    return [dict(zip(COLUMNS, feature, strict=True)) for feature in zip(*columns, strict=True)]


def for_json(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a feature that JSON carries."""
    return {name: value for name, value in row.items() if COLUMNS[name].json}


def exported(stats: Stats) -> dict[str, Array]:
    """Columns of .csv and .npz files, arrays of shape (C,); names only where there are some.

    Raises
    ------
    MismatchError
        When a scale or shift does not fit a float64.
    """
    stats.scale_shift()
    names = sorted((n for n in COLUMNS if COLUMNS[n].exported), key=lambda n: COLUMNS[n].exported)
    found = {name: COLUMNS[name].of(stats) for name in names if name != "name" or stats.names}
    return {n: v if isinstance(v, np.ndarray) else _array(v, COLUMNS[n].kind) for n, v in found.items()}


def _array(values: Sequence[Value], kind: str) -> Array:
    """A list as an array that every format can hold: texts, "" where there is none; numbers, NaN where there is none."""
    if kind == "text":
        return np.array(["" if v is None else str(v) for v in values], object)
    return np.array([math.nan if v is None else v for v in values])


def read_back(version: int | None = None) -> tuple[str, ...]:
    """Names of the columns that an import reads; those that files of this version of the JSON have, where it is given."""
    columns = COLUMNS.items()
    ranked = sorted(columns, key=lambda item: item[1].exported)
    return tuple(n for n, column in ranked if column.read and (version is None or column.since <= version))


def assumed(names: Sequence[str]) -> dict[str, int]:
    """What an import assumes for the columns that are not among the names of a file's."""
    return {n: column.absent for n, column in COLUMNS.items() if column.absent is not None and n not in names}


def reference() -> str:
    """The columns as a table in Markdown, for the documentation."""
    lines = [f"| `{name}` | {column.meaning} |" for name, column in COLUMNS.items()]
    return "\n".join(["| column | meaning |", "|---|---|", *lines]) + "\n"


COLUMNS: dict[str, Column] = {
    "index": Column(
        lambda stats: range(stats.num_features), "Zero-based index of the feature.",
        "#", "index", reading=1, room=1, exported=1, npz=False,
    ),
    "name": Column(
        lambda stats: stats.names or [None] * stats.num_features, "Feature name, where the data has names.",
        "feature", "text", reading=2, room=5, exported=2,
    ),
    "count": Column(
        lambda stats: stats.population_count, "Values seen.", kind="count", reading=8, room=9, exported=5, read=True,
    ),
    "running_mean": Column(
        lambda stats: stats.running_mean, "Mean, folded batch by batch with the momentum.",
        "running mean", reading=3, room=2, exported=3, read=True,
    ),
    "running_var": Column(
        lambda stats: stats.running_var, "Variance, folded batch by batch with the momentum.",
        reading=0, exported=4, read=True,
    ),
    "running_sd": Column(
        lambda stats: np.sqrt(stats.running_var), "Square root of `running_var`.",
        "running sd", json=False, reading=4, room=3, exported=0,
    ),
    "population_mean": Column(
        lambda stats: stats.population_mean, "Mean of every value seen.",
        "population mean", reading=6, room=7, exported=6, read=True,
    ),
    "population_var": Column(
        lambda stats: stats.population_var, "Variance (ddof 0) of every value seen.",
        reading=0, exported=7, read=True,
    ),
    "population_sd": Column(
        lambda stats: np.sqrt(stats.population_var), "Square root of `population_var`.",
        "population sd", json=False, reading=7, room=8, exported=0,
    ),
    "missing": Column(
        lambda stats: [None] * stats.num_features if stats.missing is None else stats.missing,
        "Values that were missing or left out.", kind="count", reading=8, room=14, exported=7, since=2,
    ),
    "minimum": Column(
        lambda stats: stats.minimum, "Least of every value seen.", reading=8, room=15, exported=7, read=True, since=2,
    ),
    "maximum": Column(
        lambda stats: stats.maximum, "Largest of every value seen.", reading=8, room=16, exported=7, read=True, since=2,
    ),
    "gamma": Column(
        lambda stats: stats.gamma, "Learned scale of the normalized values.",
        reading=9, room=12, exported=8, read=True, absent=1,
    ),
    "beta": Column(
        lambda stats: stats.beta, "Learned shift of the normalized values.",
        reading=10, room=13, exported=9, read=True, absent=0,
    ),
    "scale": Column(
        lambda stats: stats.line()[0], "Test mode as one y = scale · x + shift.",
        reading=11, room=10, exported=10,
    ),
    "shift": Column(
        lambda stats: stats.line()[1], "Test mode as one y = scale · x + shift.",
        reading=12, room=11, exported=11,
    ),
    "flags": Column(
        lambda stats: stats.flags(), "Of `constant`, `drifted`, `missing`, `eps`, `no-population`.",
        kind="flags", reading=END + 1, room=4, exported=0,
    ),
}  # fmt: skip
