"""bn apply."""

from __future__ import annotations

from typing import Any

import click

from bncli.cli import options


@click.command(short_help="Normalise data with stored statistics.")
@options.stats_file
@options.inputs
@click.option(
    "-o",
    "--output",
    callback=options.named,
    metavar="OUT",
    required=True,
    help="File, or folder (exists, or ends in /) for several.",
)
@click.option("--inverse", is_flag=True, help="Bring normalised data back.")
@options.use
@click.option("--axis", type=int, metavar="K", help="Axis of the features.  [default: that of the fit]")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "float64"]),
    help="Of the output.  [default: input's, else float32]",
)
@options.fill_value
@click.option("--copy-others", is_flag=True, help="Copy the HDF5 file's other datasets too.")
@options.dataset
@options.rows
@options.workers
@options.max_memory
@options.force
@options.as_json
@options.allow_unwritten
@options.allow_virtual
@options.plugins
@options.common
def apply(stats: str, inputs: tuple[str, ...], output: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Normalise INPUT... with the statistics in STATS (test mode) and write the result to OUT.

    \b
    y = gamma * (x - mean) / sqrt(var + eps) + beta         with --inverse:
    x = (y - beta) / gamma * sqrt(var + eps) + mean

    OUT has the input's format, or that of its suffix (.npy, .h5). It is refused when the features do not fit.

    \b
    Examples:
      bn apply train.bn.h5 heldout.npy -o heldout.norm.npy
      bn apply train.bn.h5 heldout.h5 -o heldout.norm.h5 --copy-others
      bn apply train.bn.h5 'part-*.npy' -o normalised/
      bn apply train.bn.h5 heldout.norm.npy -o back.npy --inverse
    """
    from bncli.engine.apply import apply as apply_stats
    from bncli.render.progress import progress
    from bncli.render.summary import apply_summary, json_text
    from bncli.stats.record import load

    spec = options.apply_spec(given)
    with progress("apply", quiet) as told:
        report = apply_stats(load(stats), inputs, output, spec, told, stats_path=stats)
    if as_json:
        click.echo(json_text({name: value for name, value in vars(report).items() if name != "passed_over"}))
    elif not quiet:
        click.echo(apply_summary(report, spec))
