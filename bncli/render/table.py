"""Tables: Rich on a terminal, with columns chosen by its width; full-precision TSV or CSV elsewhere."""

from __future__ import annotations

import csv
import fnmatch
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bncli.errors import UsageError, printable
from bncli.render.summary import NOT_FOLDED, batches_in_words, json_text, momentum_in_words, part_in_words, same
from bncli.stats import columns
from bncli.stats.columns import COLUMNS

if TYPE_CHECKING:
    from bncli.formats import Listed
    from bncli.stats.record import Stats

Row = dict[str, Any]
GLANCE = "glance"  # a column that is drawn: title, and ranks as in `columns`
GLANCE_TITLE, GLANCE_READING, GLANCE_ROOM = "mean ± sd, all on one scale", 5, 6
GLANCE_WIDTH = 18
NAME_WIDTH = 24
TERMINAL_ROWS = 100  # the last line says how to see more


def select(stats: Stats, *, features: str | None, sort: str | None, top: int | None) -> tuple[Row, list[Row]]:
    """The record of a stats file, and the rows of the features asked for.

    Raises
    ------
    UsageError
        For a selection that no feature matches, or a key to sort by that is not a column.
    """
    record, rows = stats.as_dict(), columns.rows(stats)
    if features is not None:
        rows = [rows[i] for i in _indices(features, stats)]
    if sort is not None:
        if sort not in COLUMNS:
            raise UsageError(f"--sort {sort!r} is not a column; there are {', '.join(COLUMNS)}")
        rows.sort(key=lambda row: _sort_key(row[sort]), reverse=True)
    record["features"] = [columns.for_json(row) for row in rows[:top]]
    return record, rows[:top]


def show(
    record: Row,
    rows: list[Row],
    path: str,
    formats: list[str],
    field: str | None,
    *,
    chosen_rows: bool,
    kernel: str = "",
) -> None:
    """Print the record the way that was asked for: `formats` holds json, csv or tsv; `field` is of --get."""
    if len(formats) + (field is not None) > 1:
        raise UsageError("--json, --csv, --tsv and --get exclude each other")
    if field is not None:
        sys.stdout.write(_field(record, rows, field))
    elif formats == ["json"]:
        sys.stdout.write(json_text(record) + "\n")
    elif formats or not sys.stdout.isatty():
        delimiter = "," if formats == ["csv"] else "\t"
        sys.stdout.write(
            _delimited([list(COLUMNS), *([_plain(c, row[c]) for c in COLUMNS] for row in rows)], delimiter)
        )
    else:
        _show_table(record, rows, path, chosen_rows, kernel)


def show_listing(listed: list[Listed]) -> None:
    """Print the arrays of a file."""
    header = ["address", "shape", "type", "chunks", "stored", "cannot be fitted"]
    rows = [
        [printable(d.address), _shape(d.shape), d.dtype, _shape(d.chunks) if d.chunks else "", d.compression, d.problem]
        for d in listed
    ]
    if sys.stdout.isatty() and not rows:
        sys.stdout.write("no datasets\n")
    else:
        show_rows(header, rows)


def show_rows(header: list[str], rows: list[list[str]]) -> None:
    """Print rows of printable texts: a table on a terminal, without empty columns, else TSV."""
    if not sys.stdout.isatty():
        sys.stdout.write(_delimited([header, *rows], "\t"))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(header):
        if any(row[i] for row in rows):
            table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in range(len(header)) if any(r[i] for r in rows)))
    _console().print(table)


def aligned(values: Sequence[float | None]) -> list[str]:
    """Numbers of six digits with their points one below the other; nothing is cut.

    >>> aligned([650.249, 0.0963, None])
    ['650.249 ', '  0.0963', '  -     ']
    """
    texts = ["-" if v is None else f"{v:.6g}" for v in values]
    parts = [re.match(r"([^.e]*)(.*)", text) for text in texts]
    heads, tails = [m[1] for m in parts if m], [m[2] for m in parts if m]
    left, right = max(map(len, heads), default=0), max(map(len, tails), default=0)
    return [head.rjust(left) + tail.ljust(right) for head, tail in zip(heads, tails, strict=True)]


@dataclass(frozen=True)
class Glance:
    """Draws mean ± sd of each feature on one scale for all: linear near 0, logarithmic beyond the smallest sd.

    >>> Glance.over([(0.0, 1.0), (6.0, 1.0)]).draw(6.0, 1.0)
    '                ━●'
    """

    low: float
    high: float
    unit: float

    @classmethod
    def over(cls, features: Sequence[tuple[float, float]]) -> Glance:
        """Make the scale that holds all (mean, sd) pairs."""
        unit = min((sd for _, sd in features if sd > 0), default=1.0)
        ends = [_symlog(mean + sign * sd, unit) for mean, sd in features for sign in (-1, 1)]
        return cls(min(ends, default=0.0), max(ends, default=1.0), unit)

    def draw(self, mean: float, sd: float) -> str:
        """A line from mean - sd to mean + sd with a dot at the mean."""
        first, dot, last = (self._place(v) for v in (mean - sd, mean, mean + sd))
        return "".join("●" if i == dot else "━" if first <= i <= last else " " for i in range(GLANCE_WIDTH))

    def _place(self, value: float) -> int:
        share = (_symlog(value, self.unit) - self.low) / ((self.high - self.low) or 1)
        return min(GLANCE_WIDTH - 1, max(0, int(share * GLANCE_WIDTH)))


def _symlog(value: float, unit: float) -> float:
    ratio = abs(value) / unit
    size = math.log1p(ratio) if math.isfinite(ratio) else math.log(abs(value)) - math.log(unit)
    return math.copysign(size, value)


def _show_table(record: Row, rows: list[Row], path: str, chosen_rows: bool, kernel: str) -> None:
    from rich.table import Table
    from rich.text import Text

    console = _console()
    for line in _header(record, path, kernel):
        console.print(Text(line), soft_wrap=False)
    console.print()
    shown = rows if chosen_rows else rows[:TERMINAL_ROWS]
    cells = _cells(shown, console.encoding)
    shown_columns = _fitting(cells, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown_columns:
        right = column in COLUMNS and COLUMNS[column].kind not in ("text", "flags")
        table.add_column(_title(column, cells[column]), justify="right" if right else "left", no_wrap=True)
    for i in range(len(shown)):
        table.add_row(*(Text(cells[column][i]) for column in shown_columns))
    console.print(table)
    for line in _footer(
        len(rows) - len(shown), [_full_title(c) for c in _reading_order(cells) if c not in shown_columns]
    ):
        console.print(Text(line, style="dim"))


def _is_population(record: Row) -> bool:
    """Whether the running statistics are the population's, its variance divided by count - ddof."""
    features, ddof = record["features"], record["ddof"]
    running = [f[name] for name in ("running_mean", "running_var") for f in features]
    variances = [
        None
        if f["population_var"] is None or f["count"] <= ddof
        else f["population_var"] * (f["count"] / (f["count"] - ddof))
        for f in features
    ]
    return same(running, [*(f["population_mean"] for f in features), *variances])


def _header(record: Row, path: str, kernel: str) -> list[str]:
    """What the numbers mean, in words."""
    sources = [s["name"] + (f"::{s['dataset']}" if s["dataset"] else "") for s in record["sources"]]
    features, epochs = record["num_features"], len(record["learning"]["epochs"]) if "learning" in record else 0
    batches = batches_in_words(record["num_samples"], record["num_batches"], record["batch_size"], epochs)
    lines = [
        f"{printable(path)}: {features:,} {'feature' if features == 1 else 'features'} on axis {record['axis']}, {batches}",
        momentum_in_words(record["momentum"], record["ddof"]),
        f"eps {record['eps']:g}, ddof {record['ddof']}, init {record['init']}; "
        f"{record['num_parameters']:,} parameters (gamma and beta of each feature)",
        "apply uses the running statistics, the population's with --use population",
    ]
    if record["momentum"] is None and not _is_population(record):
        lines[1] = NOT_FOLDED
    if "part" in record:
        lines.append(part_in_words(record["part"]))
    if "learning" in record:
        lines.append(_learning(record["learning"]))
    if sources:
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        verb = "imported from" if "format" in record["sources"][0] else "fitted on"
        lines.append(f"{verb} {printable(sources[0])}{more}" + (f", kernel {printable(kernel)}" if kernel else ""))
    return lines


def _learning(learning: Row) -> str:
    found, fixed, epochs = learning["holdout_loss"], learning["holdout_loss_fixed"], learning["epochs"]
    line = f"gamma and beta were learned in {len(epochs):,} epochs: training loss {epochs[-1]['train_loss']:.4g}"
    if found is None:
        return line
    return line + f", held-out loss {found:.4g}" + (f" ({fixed:.4g} with gamma 1, beta 0)" if fixed is not None else "")


def _footer(hidden_rows: int, hidden_columns: list[str]) -> list[str]:
    lines = []
    if hidden_rows:
        lines.append(f"{hidden_rows:,} more features: choose with --features, --sort and --top, or pipe the output")
    if hidden_columns:
        lines.append(f"no room for: {', '.join(hidden_columns)} (--tsv prints everything)")
    return lines


def _cells(rows: list[Row], encoding: str) -> dict[str, list[str]]:
    """The text of every column that is not empty, for a terminal."""
    cells = {}
    for name, column in COLUMNS.items():
        values = [row[name] for row in rows]
        empty = all(value is None for value in values) if column.kind == "count" else not any(values)
        if column.reading and (column.kind not in ("text", "flags", "count") or not empty):
            cells[name] = TEXTS[column.kind](values)
    known = [(row["running_mean"], row["running_sd"]) for row in rows if row["running_mean"] is not None]
    if len(known) > 1 and "utf" in encoding.lower():
        glance = Glance.over(known)
        drawn = (
            glance.draw(row["running_mean"], row["running_sd"]) if row["running_mean"] is not None else ""
            for row in rows
        )
        cells[GLANCE] = list(drawn)
    return cells


def _reading_order(cells: Iterable[str]) -> list[str]:
    ranks = {name: column.reading for name, column in COLUMNS.items()} | {GLANCE: GLANCE_READING}
    return sorted(cells, key=ranks.__getitem__)


def _full_title(column: str) -> str:
    return GLANCE_TITLE if column == GLANCE else COLUMNS[column].title or column


def _fitting(cells: dict[str, list[str]], width: int) -> list[str]:
    """The columns that fit the width, most important first, in the order of reading."""
    from rich.cells import cell_len

    chosen: set[str] = set()
    used = -2  # two spaces between columns
    ranks = {name: column.room for name, column in COLUMNS.items()} | {GLANCE: GLANCE_ROOM}
    for column in sorted(cells, key=ranks.__getitem__):
        need = max(cell_len(text) for text in [*_title(column, cells[column]).split("\n"), *cells[column]]) + 2
        if used + need <= width:
            chosen.add(column)
            used += need
    return _reading_order(column for column in cells if column in chosen)


def _title(column: str, texts: list[str]) -> str:
    """The title, on two lines where that makes the column narrower."""
    title = _full_title(column)
    return (
        title
        if len(title) <= max(map(len, texts), default=0)
        else title.replace(" ", "\n", 1)
        if column != GLANCE
        else "mean ± sd"
    )


def _short(name: str) -> str:
    """A name of at most NAME_WIDTH columns of the terminal; some characters take two."""
    from rich.cells import cell_len, set_cell_size

    return name if cell_len(name) <= NAME_WIDTH else set_cell_size(name, NAME_WIDTH - 1) + "…"


def _indices(text: str, stats: Stats) -> list[int]:
    """Indices for a list of indices, ranges with both ends, and name patterns."""
    found: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        ends = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)  # Python reads no number of thousands of digits
        if ends:
            first, last = int(ends[1]), int(ends[2] or ends[1])
            if not first <= last < stats.num_features:
                raise UsageError(f"--features {part}: features run from 0 to {stats.num_features - 1}")
            found += range(first, last + 1)
            continue
        matches = [i for i, name in enumerate(stats.names or ()) if fnmatch.fnmatchcase(name, part)]
        if not matches:
            known = "; these stats have no feature names" if not stats.names else ""
            raise UsageError(f"--features {part!r} matches no feature{known}")
        found += matches
    return list(dict.fromkeys(found))


def _field(record: Row, rows: list[Row], field: str) -> str:
    if field in COLUMNS:
        return "".join(f"{_plain(field, row[field])}\n" for row in rows)
    if field in record and not isinstance(record[field], (list, dict)):
        value = record[field]
        return f"{'none' if value is None else value}\n"
    known = [*COLUMNS, *(k for k, v in record.items() if not isinstance(v, (list, dict)))]
    raise UsageError(f"--get {field!r}: no such field; there are {', '.join(known)}")


def _sort_key(value: Any) -> tuple[bool, Any]:
    """None (NaN) sorts last when the largest come first; flags sort by how many there are."""
    return (value is not None, len(value) if isinstance(value, list) else value if value is not None else 0)


def _plain(column: str, value: Any) -> str:
    """A value for TSV, CSV and --get: full precision, no control characters."""
    if value is None:
        return "" if COLUMNS[column].kind == "text" else "nan"
    if isinstance(value, list):
        return ";".join(value)
    return repr(value) if isinstance(value, float) else printable(value)


def _delimited(rows: list[list[str]], delimiter: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, emoji=False, markup=False)


TEXTS: dict[str, Callable[[list[Any]], list[str]]] = {  # the texts of a column on a terminal, by its kind
    "number": aligned,
    "count": lambda values: ["-" if value is None else f"{value:,}" for value in values],
    "index": lambda values: [str(value) for value in values],
    "text": lambda values: [_short(printable(value or "")) for value in values],
    "flags": lambda values: [", ".join(value) for value in values],
}
