"""bn export."""

from __future__ import annotations

from typing import Any

import click

from bncli import choices
from bncli.cli import options as opt
from bncli.engine.declare import INPUT, OUTPUT, STATISTICS, Option
from bncli.engine.kinds import CHOICE, FLAG, PATH, TEXT, WHOLE, named
from bncli.exchange import formats


@opt.command("export", epilog=opt.format_list("write"))
@opt.argument("stats", "STATS")
@opt.output("The file to write.", "OUT")
@opt.only_here(
    "format",
    Option(
        "Output format (listed below).",
        OUTPUT,
        CHOICE,
        "FORMAT",
        lambda: formats("write"),
        usual="by OUT's suffix",
    ),
    "--to",
)
@opt.only_here(
    "use", Option("Which statistics.", STATISTICS, CHOICE, choices=choices.USES, usual="running"), default="running"
)
@opt.only_here("rank", Option("onnx: dimensions of the model's input.", OUTPUT, WHOLE, "N", usual="the fit's, or 2"))
@opt.only_here("into", Option("fold: weights to fold into, .safetensors or .npz.", INPUT, PATH, "FILE", check=named))
@opt.only_here("layer", Option("fold: the layer of FILE before the normalization.", INPUT, TEXT, "NAME"))
@opt.only_here(
    "transposed",
    Option("fold: whether it is a transposed convolution.", INPUT, FLAG, usual="what fits its shape"),
    default=None,
)
@opt.force
@opt.as_json
@opt.quiet("No notes or summary; errors only.")
@opt.debug
def export(stats: str, output: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write the statistics in STATS as a file that a framework loads, with its own names and conventions.

    Notes on stderr say what the file cannot hold (eps, momentum and the like), in the framework's own words.

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
    opt.notes([] if quiet else report.notes)
    if as_json:
        click.echo(json_text(vars(report)))
    elif not quiet:
        click.echo(export_summary(report))
