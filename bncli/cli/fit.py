"""bn fit."""

from __future__ import annotations

import click

from bncli.cli import options as opt
from bncli.engine.declare import RUNNING, Option
from bncli.engine.kinds import FLAG
from bncli.engine.options import FitOptions
from bncli.errors import UsageError


@opt.command("fit")
@opt.arguments("inputs", "INPUT...")
@opt.output("Stats file.  [default: first input's name with .bn.h5, here]", required=False)
@opt.declared_by(FitOptions)
@opt.only_here("resume", Option("Continue an interrupted run from OUT.checkpoint.", RUNNING, FLAG))
@opt.only_here("dry_run", Option("Show what would be done; read no value, write nothing.", RUNNING, FLAG, short="-n"))
@opt.force
@opt.as_json
@opt.plugins
@opt.quietly
@opt.debug
def fit(
    inputs: tuple[str, ...],
    output: str | None,
    options: FitOptions,
    resume: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compute per-feature statistics of INPUT... in one pass and store them in a small file.

    \b
    running    = M * running + (1 - M) * batch     batch by batch, M = --momentum
    population = mean and variance of every value  always stored as well

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
      bn fit train.h5 --target ::/y --holdout 0.2         learn gamma and beta
    """
    from bncli.engine.executors.mpi import session
    from bncli.engine.fit import fit_to_file
    from bncli.engine.preview import preview
    from bncli.render.progress import progress
    from bncli.render.summary import fit_summary, json_text, plan_summary

    if dry_run and as_json:
        raise UsageError("--dry-run has no record to print: leave out --json")
    if dry_run:
        click.echo(plan_summary(preview(inputs, options, output, resume=resume)))
        return
    with session(options.on, part=options.part is not None) as served, progress("fit", quiet) as report:
        if served:
            return
        stats, path = fit_to_file(inputs, options, output, force=force, resume=resume, progress=report)
    if as_json:
        click.echo(json_text(stats.as_dict()))
    elif not quiet:
        click.echo(fit_summary(stats, path))
