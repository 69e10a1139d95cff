"""bn apply."""

from __future__ import annotations

import click

from bncli.cli import options as opt
from bncli.engine.options import ApplySpec


@opt.command("apply")
@opt.argument("stats", "STATS")
@opt.arguments("inputs", "INPUT...")
@opt.output("Output file, or folder (it exists, or ends in /) for several.", "OUT")
@opt.declared_by(ApplySpec)
@opt.as_json
@opt.plugins
@opt.quietly
@opt.debug
def apply(stats: str, inputs: tuple[str, ...], output: str, options: ApplySpec, as_json: bool, quiet: bool) -> None:
    """Normalize INPUT... with the statistics in STATS (test mode) and write the result to OUT.

    \b
    y = gamma * (x - mean) / sqrt(var + eps) + beta         with --inverse:
    x = (y - beta) / gamma * sqrt(var + eps) + mean

    OUT has the input's format, or that of its suffix (.npy, .h5). Data whose features differ from those of STATS is
    refused.

    \b
    Examples:
      bn apply train.bn.h5 heldout.npy -o heldout.norm.npy
      bn apply train.bn.h5 heldout.h5 -o heldout.norm.h5 --copy-others
      bn apply train.bn.h5 'part-*.npy' -o normalized/
      bn apply train.bn.h5 heldout.norm.npy -o back.npy --inverse
    """
    from bncli.engine.apply import apply_files
    from bncli.engine.executors.mpi import session
    from bncli.render.progress import progress
    from bncli.render.summary import apply_record, apply_summary, json_text
    from bncli.stats.record import load

    with session(options.on) as served, progress("apply", quiet) as report:
        if served:
            return
        applied = apply_files(load(stats), inputs, output, options, report, stats_path=stats)
    if as_json:
        click.echo(json_text(apply_record(applied)))
    elif not quiet:
        click.echo(apply_summary(applied, options))
