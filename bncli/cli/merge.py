"""bn merge."""

from __future__ import annotations

import click

from bncli.cli import options as opt
from bncli.engine.options import MergeSpec


@opt.command("merge")
@opt.arguments("stats", "STATS...")
@opt.output("Stats file.")
@opt.declared_by(MergeSpec)
@opt.force
@opt.as_json
@opt.quiet("No warnings or summary; errors only.")
@opt.debug
def merge(stats: tuple[str, ...], output: str, options: MergeSpec, force: bool, as_json: bool, quiet: bool) -> None:
    """Merge the statistics of parts of a data set, fitted separately, into those of the whole.

    \b
    population   in any order
    running      as one recurrence, in the order given, from fits of the same
                 momentum, eps, ddof and init; equal to one fit of the whole
                 where every part but the last holds whole batches

    \b
    Examples:
      bn merge monday.bn.h5 tuesday.bn.h5 -o week.bn.h5
      bn merge 'part-*.bn.h5' -o all.bn.h5 --population-only
    """
    from bncli.engine.merge import merge_files
    from bncli.render.summary import json_text, merge_summary

    merged, paths = merge_files(stats, output, force=force, **vars(options))
    if as_json:
        click.echo(json_text(merged.as_dict()))
    elif not quiet:
        click.echo(merge_summary(merged, paths, output))
