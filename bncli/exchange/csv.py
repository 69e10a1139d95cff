"""CSV in UTF-8: a row per feature, a column per field in full precision, and the conventions repeated in every row."""

from __future__ import annotations

import contextlib
import csv
import io
import threading
from collections.abc import Iterator
from typing import Any

from bncli.exchange import fields
from bncli.exchange.common import KINDS, checksum, conventions
from bncli.exchange.contract import Content, Encoded, ExportOptions, Layer, Layers
from bncli.stats.columns import exported, read_back
from bncli.stats.container import resembles
from bncli.stats.record import Stats

INDEX = "index"
CHECKSUM = "bncli_sha256"
COUNT = "num_features"  # the last column, so that a cut file shows
NONE = "none"
_limit = threading.Lock()


def encode(stats: Stats, options: ExportOptions) -> Encoded:
    """Write a table whose floats round-trip exactly; NaN is `nan`."""
    columns = exported(stats)
    held = conventions(stats)
    names = stats.names if stats.names and any(stats.names) else None
    digest = checksum({name: columns[name] for name in read_back()}, held, names)
    constant = [digest, *(NONE if value is None else value for value in held.values()), stats.num_features]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerow([*columns, CHECKSUM, *held, COUNT])
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # a bare \r would end a line elsewhere
    writer.writerows([*row, *constant] for row in zip(*(c.tolist() for c in columns.values()), strict=True))
    return Encoded(out.getvalue().encode(), held, fields.use_notes(options.use))


def decode(content: Content) -> Layers:
    """Read a table with the columns running_mean and running_var; every other column may be missing.

    Raises
    ------
    InputError
        When the file is missing, no such table, in another order, or its conventions differ from row to row.
    """
    with content.reading("CSV table of statistics", ValueError, csv.Error):
        text = content.data.decode("utf-8-sig")
        with _long_fields(len(text)):
            columns = _columns(text)
        fields.check_there(columns, content)
        _check_whole(columns, text)
        held = {name: _convention(name, columns[name]) for name in KINDS if name in columns}
        digest = _checksum(columns)
        numbers = {name: [float(text) for text in columns[name]] for name in read_back() if name in columns}
    names = columns.get(fields.NAMES)
    given = names if names and any(names) else None
    return Layers.single(Layer(numbers, held, given, checksum=digest))


@contextlib.contextmanager
def _long_fields(size: int) -> Iterator[None]:
    """Let a field have this many letters: Python's limit of 131,072 is less than a name may have, and one for all threads."""
    with _limit:
        before = csv.field_size_limit()
        csv.field_size_limit(max(size, before))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _columns(text: str) -> dict[str, list[str]]:
    """Texts of every column, by its title."""
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    if len(rows) < 2:
        raise ValueError("it has no row of values")
    titles = rows[0]
    if len(set(titles)) < len(titles):
        raise ValueError("it holds the same column twice")
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(titles):
            raise ValueError(f"row {line} has {len(row)} values, the header {len(titles)}")
    return dict(zip(titles, map(list, zip(*rows[1:], strict=True)), strict=True))


def _check_whole(columns: dict[str, list[str]], text: str) -> None:
    """Raise ValueError where the file declares a number and order of features that it does not have."""
    rows = len(columns["running_mean"])
    if COUNT in columns and (set(columns[COUNT]) != {str(rows)} or not text.endswith("\n")):
        raise ValueError(f"it holds {rows} rows, fewer than {COUNT} declares")
    if columns.get(INDEX, [str(i) for i in range(rows)]) != [str(i) for i in range(rows)]:
        raise ValueError("its rows are not in the order of their index, or not all there")


def _checksum(columns: dict[str, list[str]]) -> str | None:
    """The checksum, where there is a column of it; one that matches nothing where its title is damaged."""
    titles = [title for title in columns if resembles(title, CHECKSUM)]
    return _convention(CHECKSUM, columns.get(CHECKSUM, [""])) if titles else None


def _convention(name: str, texts: list[str]) -> Any:
    """The value that all rows share."""
    if len(set(texts)) > 1:
        raise ValueError(f"{name} differs from row to row")
    return None if name == "momentum" and texts[0] == NONE else KINDS.get(name, str)(texts[0])
