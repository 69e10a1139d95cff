"""bn fit."""

from __future__ import annotations

from typing import Any

import click

from bncli.cli import options
from bncli.errors import UsageError


@click.command(short_help="Compute normalization statistics in one pass.")
@options.inputs
@click.option(
    "-o",
    "--output",
    callback=options.named,
    metavar="STATS",
    help="Stats file.  [default: first input's name with .bn.h5, here]",
)
@options.dataset
@options.rows
@click.option("--momentum", metavar="M|none", help="Weight of the OLD value, 0 <= M < 1.  [default: 0.9]")
@click.option("--eps", type=float, metavar="E", help="Added to the variance when applied.  [default: 1e-5]")
@click.option("--batch-size", type=int, metavar="N", help="Samples per batch.  [default: 256]")
@click.option("--axis", type=int, metavar="K", help="Axis of the features.  [default: -1 for one and two dimensions]")
@click.option(
    "--init",
    type=click.Choice(["debias", "zeros", "unit", "first", "like"]),
    help="Where the running statistics start; like: at those of --like.  [default: debias]",
)
@click.option("--ddof", type=click.IntRange(0, 1), help="1 folds the unbiased variance, as PyTorch.  [default: 0]")
@click.option(
    "--preset",
    type=click.Choice(["torch", "keras", "flax", "onnx", "cs231n"]),
    help="A framework's momentum, eps, ddof, init and axis; options given beside it win.",
)
@click.option(
    "--like",
    callback=options.named,
    metavar="STATS",
    help="Conventions, gamma and beta of another fit, new statistics. For AdaBN or precise BN add --momentum none.",
)
@click.option(
    "--gamma",
    callback=options.named,
    metavar="X",
    help="Scale: a number, an address of C values, or a stats file.  [default: 1]",
)
@click.option(
    "--beta",
    callback=options.named,
    metavar="X",
    help="Shift: a number, an address of C values, or a stats file.  [default: 0]",
)
@click.option(
    "--names",
    callback=options.named,
    metavar="ADDRESS|FILE",
    help="Feature names: a text file, one a line, or FILE.h5::/path.",
)
@click.option(
    "--nan", type=click.Choice(["error", "omit"]), default="error", show_default=True, help="NaN and infinity."
)
@options.fill_value
@click.option(
    "--shuffle/--no-shuffle",
    default=None,
    help="Draw the samples in a seeded order.  [default: only when learning]",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="S", help="Of everything that is drawn.")
@click.option(
    "--target",
    callback=options.named,
    metavar="ADDRESS",
    help="Learn gamma and beta from this; ::/y is in every input.",
)
@click.option("--loss", type=click.Choice(["cross-entropy", "mse"]), help="[default: by the target's type]")
@click.option("--activation", type=click.Choice(["identity", "sigmoid", "tanh", "relu"]), help="[default: by the loss]")
@click.option("--optimizer", type=click.Choice(["adam", "sgd"]), help="[default: adam]")
@click.option("--lr", type=float, metavar="R", help="Learning rate, constant.  [default: one that falls to 0]")
@click.option("--epochs", type=int, metavar="N", help="Passes over the data.  [default: 1,000 steps or more]")
@click.option("--holdout", type=float, metavar="F", help="Fraction of the samples kept out of learning.  [default: 0]")
@options.workers
@options.max_memory
@click.option("--resume", is_flag=True, help="Continue an interrupted run from OUT.checkpoint.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done; read no value, write nothing.")
@options.force
@options.as_json
@options.allow_unwritten
@options.allow_virtual
@options.plugins
@options.common
def fit(
    inputs: tuple[str, ...],
    output: str | None,
    resume: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Compute per-feature statistics of INPUT... in one pass and store them in a small file.

    \b
    running    = M * running + (1 - M) * batch     batch by batch, M = --momentum
    population = mean and variance of every value  always stored beside it

    M is the weight of the OLD value, as in CS231n, Keras and ONNX; PyTorch's momentum is 1 - M.
    With --momentum none the running statistics are the population's, the
    variance divided by count - 1 with --ddof 1.

    \b
    Examples:
      bn fit train.h5                      the only dataset of 2 or more axes
      bn fit train.h5::/x --momentum 0.99  one of several
      bn fit 'part-*.npy' -o all.bn.h5     many files as one data set
      bn fit images.h5 --axis 1            images (N, C, H, W)
      bn fit train.npy --preset torch      what nn.BatchNorm would hold
      bn fit new.npy --like train.bn.h5 --momentum none   AdaBN, precise BN
      bn fit more.npy --like train.bn.h5 --init like      keep training
      bn fit train.h5 --target ::/y --holdout 0.2     learn gamma and beta
    """
    from bncli.engine.fit import fit_to_file, look
    from bncli.render.progress import progress
    from bncli.render.summary import fit_summary, json_text, plan_summary

    spec = options.fit_spec(given)
    if dry_run and as_json:
        raise UsageError("--dry-run has no record to print: leave out --json")
    if dry_run:
        click.echo(plan_summary(look(inputs, spec, output, resume=resume)))
        return
    with progress("fit", quiet) as told:
        stats, path = fit_to_file(inputs, spec, output, force=force, resume=resume, progress=told)
    if as_json:
        click.echo(json_text(stats.as_dict()))
    elif not quiet:
        click.echo(fit_summary(stats, path))
