"""bn inspect."""

from __future__ import annotations

import click

from bncli.cli import options


@click.command(short_help="Show what a stats file holds.")
@options.stats_file
@options.as_json
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, full precision.")
@click.option("--tsv", "as_tsv", is_flag=True, help="Print TSV, full precision; what a pipe gets anyway.")
@click.option("--features", metavar="LIST", help="Only these: indices from 0, ranges with both ends, name patterns.")
@click.option("--sort", metavar="KEY", help="Largest first, by a column such as running_sd or population_mean.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the first N rows.")
@click.option("--get", "field", metavar="FIELD", help="Print one field, a value a line.")
@options.common
def inspect(
    stats: str,
    as_json: bool,
    as_csv: bool,
    as_tsv: bool,
    features: str | None,
    sort: str | None,
    top: int | None,
    field: str | None,
    quiet: bool,
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
