"""bn merge."""

from __future__ import annotations

import click

from bncli.cli import options


@click.command(short_help="Make one stats file of several.")
@click.argument("stats", callback=options.named, metavar="STATS...", nargs=-1, required=True)
@click.option("-o", "--output", callback=options.named, metavar="STATS", required=True, help="Stats file.")
@click.option("--population-only", is_flag=True, help="Merge the population; the running statistics become it.")
@click.option(
    "--gamma",
    callback=options.named,
    metavar="X",
    help="Scale: a number, an address of C values, or a stats file.  [default: the files']",
)
@click.option(
    "--beta",
    callback=options.named,
    metavar="X",
    help="Shift: a number, an address of C values, or a stats file.  [default: the files']",
)
@options.force
@options.as_json
@options.common
def merge(
    stats: tuple[str, ...],
    output: str,
    population_only: bool,
    gamma: str | None,
    beta: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge the statistics of parts of a data set, fitted apart, into those of the whole.

    \b
    population   whatever the order
    running      as one recurrence, in the order given, from fits of the same
                 momentum, eps, ddof and init; that of one fit of the whole
                 where every part but the last holds whole batches

    \b
    Examples:
      bn merge monday.bn.h5 tuesday.bn.h5 -o week.bn.h5
      bn merge 'part-*.bn.h5' -o all.bn.h5 --population-only
    """
    from bncli.engine.merge import merge_files
    from bncli.engine.plan import number_or_address
    from bncli.render.summary import json_text, merge_summary

    given = {name: None if x is None else number_or_address(x) for name, x in (("gamma", gamma), ("beta", beta))}
    merged, paths = merge_files(stats, output, population_only=population_only, force=force, **given)
    if as_json:
        click.echo(json_text(merged.as_dict()))
    elif not quiet:
        click.echo(merge_summary(merged, paths, output))
