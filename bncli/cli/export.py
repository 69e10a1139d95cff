"""bn export."""

from __future__ import annotations

from typing import Any

import click

from bncli.cli import options


@click.command(short_help="Write statistics for a framework.", epilog=options.format_list("write"))
@options.stats_file
@click.option("--to", "format", metavar="FORMAT", help="One of those below.  [default: what OUT's suffix says]")
@click.option("-o", "--output", callback=options.named, metavar="OUT", required=True, help="The file to write.")
@options.use
@click.option(
    "--rank", type=int, metavar="N", help="onnx: dimensions of the model's input.  [default: the fit's, or 2]"
)
@click.option(
    "--into", callback=options.named, metavar="FILE", help="fold: weights to fold into, .safetensors or .npz."
)
@click.option("--layer", metavar="NAME", help="fold: the layer of FILE before the normalization.")
@click.option(
    "--transposed/--no-transposed",
    default=None,
    help="fold: it is a transposed convolution, or is not.  [default: what fits its shape]",
)
@options.force
@options.as_json
@options.common
def export(stats: str, output: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write the statistics in STATS as a file that a framework loads, with its own names and conventions.

    What the file cannot hold (eps, momentum and the like, in the framework's own words) is said on stderr.

    \b
    Examples:
      bn export train.bn.h5 -o bn1.pt
      bn export train.bn.h5 -o bn1.onnx --rank 4
      bn export train.bn.h5 -o bn1.weights.h5 --use population
      bn export bn1.bn.h5 --to fold --into m.safetensors -o folded.safetensors
    """
    from bncli.exchange import write
    from bncli.render.summary import export_summary, json_text
    from bncli.stats.record import load

    report = write(load(stats), output, inputs=[stats], **given)
    if not quiet:
        click.echo("".join(f"bn: note: {note}\n" for note in report.notes), err=True, nl=False)
    if as_json:
        click.echo(json_text(vars(report)))
    elif not quiet:
        click.echo(export_summary(report))
