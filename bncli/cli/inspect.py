"""bn inspect."""

from __future__ import annotations

from bncli.cli import options as opt
from bncli.engine.declare import OUTPUT, STATISTICS, Option
from bncli.engine.kinds import FLAG, TEXT, WHOLE, at_least


@opt.command("inspect")
@opt.argument("stats", "STATS")
@opt.only_here(
    "features",
    Option("Only these: indices from 0, ranges with both ends, name patterns.", STATISTICS, TEXT, "LIST"),
)
@opt.only_here(
    "sort", Option("Largest first, by a column such as running_sd or population_mean.", STATISTICS, TEXT, "KEY")
)
@opt.only_here("top", Option("Only the first N rows.", STATISTICS, WHOLE, "N", check=at_least(1, "at least 1")))
@opt.as_json
@opt.only_here("as_csv", Option("Print CSV, full precision.", OUTPUT, FLAG), "--csv")
@opt.only_here("as_tsv", Option("Print TSV, full precision; the default when piped.", OUTPUT, FLAG), "--tsv")
@opt.only_here("field", Option("Print one field, a value a line.", OUTPUT, TEXT, "FIELD"), "--get")
@opt.debug
def inspect(
    stats: str,
    features: str | None,
    sort: str | None,
    top: int | None,
    as_json: bool,
    as_csv: bool,
    as_tsv: bool,
    field: str | None,
) -> None:
    """Show the statistics in STATS: a table on a terminal, TSV in a pipe.

    \b
    Examples:
      bn inspect train.bn.h5
      bn inspect train.bn.h5 --sort running_sd --top 5
      bn inspect train.bn.h5 --features 3,'ankle*',10-20
      bn inspect train.bn.h5 --get running_mean
    """
    from bncli.render import table
    from bncli.stats.record import load

    loaded = load(stats)
    record, rows = table.select(loaded, features=features, sort=sort, top=top)
    chosen = [name for name, given in (("json", as_json), ("csv", as_csv), ("tsv", as_tsv)) if given]
    table.show(record, rows, stats, chosen, field, chosen_rows=bool(features or top), kernel=loaded.kernel)
