"""What commands print when they are done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bncli.errors import printable

if TYPE_CHECKING:  # `bn inspect` shows a record without loading what makes one
    from bncli.engine.apply import Applied
    from bncli.engine.learning.setup import Plan
    from bncli.engine.options import ApplySpec
    from bncli.engine.preview import Preview
    from bncli.exchange.contract import Exported
    from bncli.stats.learned import Learned
    from bncli.stats.record import Stats

NOT_FOLDED = "momentum none: how the running statistics were folded is not known"

MOST_CHOSEN = 3  # lines about datasets that were taken unasked


def json_text(record: dict[str, Any] | list[dict[str, Any]]) -> str:
    """JSON on one line; floats keep every digit, NaN never occurs, and names are in ASCII, control characters too."""
    return json.dumps(record, allow_nan=False)


def fit_summary(stats: Stats, path: str) -> str:
    """Features, samples, batches, what was learned, and where the stats went."""
    learned = f"{learned_in_words(stats.learned)}\n" if stats.learned else ""
    sources = stats.provenance.get("sources", [])
    chosen = chosen_in_words({f"{s['name']}::{s['dataset']}": s["passed_over"] for s in sources if "passed_over" in s})
    like = [like_in_words(stats.init)] if "like" in stats.options and stats.momentum is not None else []
    momentum = momentum_in_words(stats.momentum, stats.ddof)
    part = [part_in_words(stats.part.as_dict())] if stats.part else []
    return "\n".join([_seen(stats), *chosen, momentum, *like, *part, f"{learned}stats in {printable(path)}"])


def part_in_words(part: dict[str, Any]) -> str:
    """Which part of a fit statistics are of, from its JSON."""
    first, stop = part["segments"]
    segments = f"segments {first:,} to {stop - 1:,}" if first < stop else "no segment"
    return f"part {', '.join(part['parts'])} of a fit: {segments} of {part['num_segments']:,}; bn merge joins all parts"


def chosen_in_words(passed_over: dict[str, int]) -> list[str]:
    """What was taken of files that hold other arrays too, without being asked for: address -> how many others."""
    lines = []
    for address, count in list(passed_over.items())[:MOST_CHOSEN]:
        path, _, dataset = map(printable, address.rpartition("::"))
        lines.append(
            f"dataset {dataset} ({_count(count, 'other array')} passed over; bn ls {path} lists {'it' if count == 1 else 'them'})"
        )
    more = len(passed_over) - len(lines)
    return lines + [f"and {_count(more, 'more file')} of which one array was taken"] * bool(more)


def merge_summary(stats: Stats, paths: Sequence[str], path: str) -> str:
    """What was merged, and where the result went."""
    return f"{_count(len(paths), 'file')} merged: {fit_summary(stats, path)}"


def export_summary(report: Exported) -> str:
    """What was written, and where."""
    return f"{_count(report.num_features, 'feature')}, {report.use} statistics, as {report.format} in {printable(report.output)}"


def import_summary(stats: Stats, path: str) -> str:
    """What was read, what is not known of it, and where the stats went."""
    imported = stats.provenance["imported"]
    layer = f" of {printable(imported['layer'])}" if imported["layer"] else ""
    population = "" if stats.population.count.any() else "; no population statistics"
    ran = [*stats.running_mean.tolist(), *stats.running_var.tolist()]
    if stats.momentum is None and not same(
        ran, [*stats.population_mean.tolist(), *stats.population.variance(stats.ddof).tolist()]
    ):
        return (
            f"{_count(stats.num_features, 'feature')}{layer} imported from {printable(imported['file'])}{population}\n"
            f"{NOT_FOLDED}\nstats in {printable(path)}"
        )
    return (
        f"{_count(stats.num_features, 'feature')}{layer} imported from {printable(imported['file'])}{population}\n"
        f"{momentum_in_words(stats.momentum, stats.ddof)}\nstats in {printable(path)}"
    )


def same(running: Iterable[float | None], population: Iterable[float | None]) -> bool:
    """Whether running statistics are the population's, where there are any: imported ones without a momentum need not be."""
    known = [(r, p) for r, p in zip(running, population, strict=True) if r is not None and r == r]
    return bool(known) and all(p is not None and math.isclose(r, p, rel_tol=1e-9) for r, p in known)


def assumed_in_words(stats: Stats) -> str:
    """What an imported file did not hold, and what was taken instead; "" when it held everything."""
    imported = stats.provenance["imported"]
    assumed = imported["assumed"]
    if not assumed:
        return ""
    values = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in assumed.items()
    )
    say = " and ".join(f"--{name}" for name in ("eps", "momentum") if name in assumed)
    return f"not in the file, so the defaults of {imported['format']}: {values}" + (
        f"; say otherwise with {say}" if say else ""
    )


def _seen(stats: Stats) -> str:
    """Features, samples and batches of a fit."""
    epochs = len(stats.learned.train_loss) if stats.learned else 0
    batches = batches_in_words(stats.num_samples, stats.num_batches, stats.batch_size, epochs)
    return f"{_count(stats.num_features, 'feature')}, {batches}"


def batches_in_words(samples: int, batches: int, size: int, epochs: int = 0) -> str:
    """ "600 samples, 3 batches of 256, the last of 88"; without the batches' size where that is not one (0)."""
    counts = f"{_count(samples, 'sample')}, {_count(batches, 'batch', 'batches')}"
    if not size or not samples:
        return counts
    if epochs:
        return f"{counts} of {size} in {_count(epochs, 'epoch')}"
    rest = samples % size
    last = f", the last of {rest}" if rest and samples > size else ""
    return f"{counts} of {min(size, samples)}{last}"


def momentum_in_words(momentum: float | None, ddof: int = 0) -> str:
    """The recurrence with its numbers, and what PyTorch calls them."""
    if momentum is None:
        divided = f", with ddof {ddof}: the variance is m2 / (count - {ddof})" if ddof else ""
        return f"momentum none: the running statistics are the population's{divided}"
    new = f"{1 - momentum:.6g}"
    return (
        f"momentum {momentum:g}: running = {momentum:g} * running + {new} * batch "
        f"({momentum:g} weighs the OLD value; PyTorch's momentum is {new})"
    )


def like_in_words(init: str) -> str:
    """Where statistics fitted with --like start, and how to get those of AdaBN and precise BN."""
    start = {"like": "at the running statistics of --like", "debias": "afresh"}.get(init, f"at --init {init}")
    return f"the running statistics start {start}; AdaBN and precise BN use --momentum none"


def learned_in_words(learned: Learned) -> str:
    """What learning gamma and beta came to, and whether it helped."""
    settings = learned.settings
    head = f", {_count(len(learned.bias), 'class', 'classes')}" if learned.classes is not None else ""
    lines = [
        f"gamma and beta learned with {settings['optimizer']} ({settings['loss']}, {settings['activation']}{head}): "
        f"training loss {learned.train_loss[-1]:.4g}" + _accuracy(learned, held_out=False)
    ]
    if not settings["holdout"]:
        return lines[0] + "; no sample was held out, so its loss on new data is unknown (--holdout 0.2)"
    found, fixed = float(learned.holdout_loss[-1]), learned.holdout_loss_fixed
    text = f"held-out loss {found:.4g}{_accuracy(learned, held_out=True)}; "
    if not len(learned.fixed):
        return "\n".join([*lines, text + "the run before held nothing out, so there is nothing to compare with"])
    lines.append(text + f"with gamma 1, beta 0 and a head trained for as long {fixed:.4g}")
    if fixed <= found:
        lines.append(
            "learning gamma and beta did not help: on the samples held out it is no better than gamma 1, beta 0"
        )
    return "\n".join(lines)


def _accuracy(learned: Learned, *, held_out: bool) -> str:
    if learned.classes is None or held_out != bool(learned.settings["holdout"]):
        return ""
    return f", {learned.accuracy[-1]:.1%} right"


def plan_in_words(plan: Plan) -> str:
    """What would be learned, from what and how."""
    goal = {0: "a target of the data's own shape", -1: "labels"}.get(plan.outputs, _count(plan.outputs, "number"))
    held = f"{_count(plan.order.held, 'sample')} held out" if plan.order.held else "none held out"
    rate = f"lr {plan.lr:g}" if plan.lr else "the default lr"
    return (
        f"gamma and beta would be learned from {goal} ({plan.loss}, {plan.activation}): "
        f"{_count(plan.epochs, 'epoch')} of {_count(plan.batches, 'batch', 'batches')}, {plan.optimizer} with {rate}, {held}"
    )


def plan_summary(preview: Preview) -> str:
    """What a fit would do."""
    lines = [
        f"{printable(i.address)}: samples {i.start} to {i.stop} of {i.shape[0]}, {i.shape} {i.dtype.name}"
        for i in preview.inputs
    ]
    last = f", the last of {preview.last}" if preview.last != preview.batch_size else ""
    return "\n".join(
        [
            *lines,
            *chosen_in_words({i.address: i.passed_over for i in preview.inputs if i.passed_over}),
            f"{_count(preview.features, 'feature')} on axis {preview.axis}, {_count(preview.shape[0], 'sample')}, "
            f"{_count(preview.batches, 'batch', 'batches')} of {preview.batch_size}{last}",
            *([f"the part: samples {preview.part.start} to {preview.part.stop}"] if preview.part is not None else []),
            momentum_in_words(preview.conventions.momentum, preview.conventions.ddof),
            *([plan_in_words(preview.learning)] if preview.learning else []),
            *filter(None, [preview.checkpoint]),
            f"would write {printable(preview.output)} (dry run: nothing was read or written)",
        ]
    )


def apply_record(report: Applied) -> dict[str, Any]:
    """For JSON."""
    return {name: value for name, value in vars(report).items() if name != "passed_over"}


def apply_summary(report: Applied, spec: ApplySpec) -> str:
    """What was written, then a line for each remark."""
    verb = "denormalized" if spec.inverse else "normalized"
    shown = printable(report.outputs[0]) + (f" and {len(report.outputs) - 1} more" if len(report.outputs) > 1 else "")
    lines = [f"{_count(report.samples, 'sample')} {verb} with the {spec.use} statistics: {shown}"]
    lines += chosen_in_words(report.passed_over)
    if report.non_finite:
        lines.append(f"{_count(report.non_finite, 'value')} NaN or infinite: passed through")
    if report.filled:
        lines.append(f"{_count(report.filled, 'value')} equal to the fill value: now NaN")
    if report.undefined:
        lines.append(
            f"{_count(report.undefined, 'value')} of features without statistics (missing in the fit): now NaN"
        )
    if report.others and not spec.copy_others:
        lines.append(f"not copied: {_list(report.others)} (--copy-others copies them)")
    elif report.others:
        lines.append(f"{_count(len(report.others) - len(report.left), 'other dataset')} copied")
    if report.left:
        lines.append(f"not copied, since their values are in other files: {_list(report.left)}")
    if report.dropped:
        lines.append(f"not kept, since they refer to other objects or files: {_list(report.dropped)}")
    return "\n".join(lines)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(printable(name) for name in names[:3]) + more
