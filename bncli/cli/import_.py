"""bn import."""

from __future__ import annotations

from typing import Any

import click

from bncli.cli import options


@click.command("import", short_help="Read statistics of a framework.", epilog=options.format_list("read"))
@click.argument("file", callback=options.named, metavar="FILE")
@click.option("--from", "format", metavar="FORMAT", help="One of those below.  [default: what FILE's suffix says]")
@click.option("--layer", metavar="NAME", help="Which layer of a whole model.  [default: the only one]")
@click.option(
    "--eps", type=float, metavar="E", help="Added to the variance.  [default: the file's, or the framework's]"
)
@click.option(
    "--momentum",
    metavar="M|none",
    help="Weight of the OLD value, or none: it is not known.  [default: the file's, or the framework's]",
)
@click.option("-o", "--output", callback=options.named, metavar="STATS", required=True, help="The stats file to write.")
@options.force
@options.as_json
@options.common
def import_(
    file: str, output: str, momentum: str | None, force: bool, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Read one normalization layer of FILE and store it as a stats file, for bn apply and bn inspect.

    What FILE does not hold (eps, momentum, …) is the framework's default, and said on stderr. Of frameworks there are
    no population statistics.

    \b
    Examples:
      bn import model.pt --layer layer1.0.bn1 -o bn1.bn.h5
      bn import model.weights.h5 --layer norm_3 --eps 1e-3 -o bn3.bn.h5
      bn import model.onnx --layer /bn1/BatchNormalization -o bn1.bn.h5
    """
    from bncli.exchange import read_to_file
    from bncli.render.summary import assumed_in_words, import_summary, json_text

    stats = read_to_file(file, output, force=force, momentum=options.parse_momentum(momentum), **given)
    if not quiet and (words := assumed_in_words(stats)):
        click.echo(f"bn: note: {words}", err=True)
    if as_json:
        click.echo(json_text(stats.as_dict()))
    elif not quiet:
        click.echo(import_summary(stats, output))
