"""bn import."""

from __future__ import annotations

from typing import Any

import click

from bncli.cli import options as opt
from bncli.engine.declare import INPUT, STATISTICS, Option
from bncli.engine.kinds import CHOICE, MOMENTUM, NUMBER, TEXT
from bncli.exchange import formats


@opt.command("import", epilog=opt.format_list("read"))
@opt.argument("file", "FILE")
@opt.only_here(
    "format",
    Option(
        "Format of FILE (listed below).",
        INPUT,
        CHOICE,
        "FORMAT",
        lambda: formats("read"),
        usual="by FILE's suffix",
    ),
    "--from",
)
@opt.only_here("layer", Option("Which layer of a whole model.", INPUT, TEXT, "NAME", usual="the only one"))
@opt.only_here(
    "eps",
    Option("Added to the variance when applied.", STATISTICS, NUMBER, "E", usual="the file's, or the framework's"),
)
@opt.only_here(
    "momentum",
    Option(
        "Weight of the OLD value, or none: it is not known.",
        STATISTICS,
        MOMENTUM,
        "M|none",
        usual="the file's, or the framework's",
    ),
)
@opt.output("The stats file to write.")
@opt.force
@opt.as_json
@opt.quiet("No notes, warnings or summary; errors only.")
@opt.debug
def import_(file: str, output: str, force: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Read one normalization layer of FILE and store it as a stats file, for bn apply and bn inspect.

    What FILE does not hold (eps, momentum, …) is the framework's default, with a note on stderr. Files of
    frameworks hold no population statistics.

    \b
    Examples:
      bn import model.pt --layer layer1.0.bn1 -o bn1.bn.h5
      bn import model.weights.h5 --layer norm_3 --eps 1e-3 -o bn3.bn.h5
      bn import model.onnx --layer /bn1/BatchNormalization -o bn1.bn.h5
    """
    from bncli.exchange import read_to_file
    from bncli.render.summary import assumed_in_words, import_summary, json_text

    stats = read_to_file(file, output, force=force, **given)
    opt.notes([] if quiet else filter(None, [assumed_in_words(stats)]))
    if as_json:
        click.echo(json_text(stats.as_dict()))
    elif not quiet:
        click.echo(import_summary(stats, output))
