"""What is to be learned: the target beside the data, and all that follows from the options before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.engine.order import Order
from bncli.engine.plan import FitSpec
from bncli.errors import InputError, MismatchError, UsageError, printable
from bncli.formats.address import SEPARATOR, expand, split
from bncli.formats.dataset import Joined
from bncli.formats.memory import ArraySource
from bncli.formats.permuted import Drawn
from bncli.formats.reading import ReadOptions
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Layout, Values
from bncli.numerics.learning import CHUNK_VALUES, Model, Optimizer, Parameters, Training
from bncli.stats.learned import Learned

STEPS = 1000  # the fewest that the default number of epochs gives
RATES = {"adam": 0.01, "sgd": 0.1}  # where --lr does not say; see `_rates`
DISTILLING_RATE = 0.02
MOST_CLASSES = 1 << 16
RUN_VALUES, RUN_BATCHES = 1 << 19, 8  # most that are read and folded together, which takes fewer calls for each
PIECE_VALUES = 1 << 18  # of the target, read at a time

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def open_target(spec: FitSpec, data: Joined) -> Joined:
    """The target over the same samples as the data; no value is read.

    Raises
    ------
    MismatchError
        When it holds another number of samples, or integers in one file and another type in the next.
    InputError, UsageError
        As `Joined`.
    """
    target, own = spec.target, isinstance(spec.target, str) and spec.target.startswith(SEPARATOR)
    addresses: Sequence[str] | Array
    if not isinstance(target, str):
        addresses = ArraySource(target).array
    elif not target.lstrip(":/"):
        raise UsageError(f"--target {target!r} names no dataset; say which: ::/y")
    elif own:
        addresses = [split(address)[0] + target for address in data.addresses]
    else:
        addresses = expand([target])
    options = replace(ReadOptions.of(spec), dataset=None, fill_value=None)
    targets = Joined(addresses, options)
    pairs = zip(data.addresses, data.lengths, targets.addresses, targets.lengths, strict=True) if own else ()
    for address, samples, other, length in [
        *pairs,
        ("the data", sum(data.lengths), targets.addresses[0], sum(targets.lengths)),
    ]:
        if samples != length:
            raise MismatchError(
                f"--target {printable(other)} holds {length:,} samples, {printable(address)} {samples:,}; one for each is needed"
            )
    if spec.loss != "mse":
        _check_types(targets)
    return targets


def _check_types(targets: Joined) -> None:
    """Raise MismatchError where labels would become numbers: inputs of several types are read as float64."""
    first = targets.inputs[0]
    for other in targets.inputs[1:]:
        if other.dtype != first.dtype and {"b", "i", "u"} & {first.dtype.kind, other.dtype.kind}:
            raise MismatchError(
                f"--target {printable(first.address)} holds {first.dtype}, {printable(other.address)} {other.dtype}; labels "
                "have to be of one type; if they are numbers to predict, say --loss mse"
            )


@dataclass(frozen=True)
class Plan:
    """What is known of a lesson before a value is read.

    Attributes
    ----------
    loss, activation, optimizer : str
        See `numerics.learning`.
    outputs : int
        Numbers to predict; 0 for distillation, and -1 for classes, which are yet to be found.
    order : Order
        Which samples are held out, and in what order the others come.
    batch_size, batches : int
        Samples in each batch but the last, and batches that are trained in an epoch.
    run : int
        Batches that are read and folded together. It follows from batch size and sample shape alone.
    epochs : int
    lr : float or None
        The learning rate; None for the default's, which falls to 0.
    sample_bytes : int
        Of a sample and its target.
    """

    loss: str
    activation: str
    optimizer: str
    outputs: int
    order: Order
    batch_size: int
    batches: int
    run: int
    epochs: int
    lr: float | None
    sample_bytes: int

    @property
    def steps(self) -> int:
        """Of the optimiser, in all epochs."""
        return self.epochs * self.batches

    @classmethod
    def of(cls, spec: FitSpec, data: Joined, layout: Layout, targets: Joined) -> Plan:
        """Raise UsageError, MismatchError or InputError where the options, data and target do not go together."""
        loss, outputs = _loss_and_outputs(spec, data, targets)
        if spec.activation not in (None, "identity") and not outputs:
            raise UsageError(
                f"--activation {spec.activation}: a target of the data's own shape is compared with y itself"
            )
        before = spec.reference.learned.settings if spec.reference and spec.reference.learned else {}
        usual = {"optimizer": "adam", "activation": "sigmoid" if loss == "cross-entropy" else "identity"}
        usual |= {name: before[name] for name in usual if before.get("loss") == loss}
        order = Order(data.shape[0], data.sample_size, spec.seed, spec.holdout or 0.0, spec.shuffled)
        if spec.holdout and not order.held:
            raise UsageError(f"--holdout {spec.holdout} of {data.shape[0]:,} samples keeps none out")
        whole, rest = divmod(order.count, spec.batch_size)
        batches = whole + (rest * layout.values_per_sample >= 2)
        if not batches:
            raise InputError(
                f"{order.count} of {data.shape[0]} samples are left to learn from; a batch needs two values"
            )
        sample_bytes = sum(d.sample_size * d.dtype.itemsize for d in (data, targets))
        fewest = outputs if outputs >= 0 else 2  # `Lesson.of` looks again with the classes that there are
        _check_memory(spec.batch_size, sample_bytes, spec.max_memory, layout, fewest)
        return cls(
            loss,
            spec.activation or usual["activation"] if outputs else "identity",
            spec.optimizer or usual["optimizer"],
            outputs,
            order,
            spec.batch_size,
            batches,
            _run(spec.batch_size, layout),
            spec.epochs or -(-STEPS // batches),
            spec.lr,
            sample_bytes,
        )


def _run(batch_size: int, layout: Layout) -> int:
    """How many batches are read and folded together: from batch size and sample shape alone."""
    at_most = min(RUN_BATCHES, layout.batches_at_once(batch_size), RUN_VALUES // (batch_size * layout.sample_size))
    return max(1, at_most)


@dataclass(frozen=True, eq=False)
class Lesson:
    """A plan with all that was read for it.

    Attributes
    ----------
    plan : Plan
    model : Model
    classes : shape (K,) or None
        The labels, ascending.
    optimizer, head_optimizer : Optimizer
        For all parameters, and for the head alone: gamma 1 and beta 0 stay what they are.
    start : Training
    fixed_start : Training or None
        Of the comparison with gamma 1 and beta 0; None where nothing is held out, or an earlier run made none.
    """

    plan: Plan
    model: Model
    classes: Array | None
    optimizer: Optimizer
    head_optimizer: Optimizer
    start: Training
    fixed_start: Training | None

    @classmethod
    def of(
        cls,
        plan: Plan,
        layout: Layout,
        targets: Joined,
        eps: float,
        gamma: Floats,
        beta: Floats,
        before: Learned | None,
        budget: int,
    ) -> Lesson:
        """Read the classes, and the first batch's targets where the learning rates depend on them.

        Parameters
        ----------
        before : Learned, optional
            What an earlier run learned, to be continued.
        budget : int
            Bytes of buffers.

        Raises
        ------
        UsageError
            When a batch does not fit them with a head of as many classes as there are.
        """
        classes = find_classes(targets) if plan.outputs < 0 else None
        outputs = plan.outputs if classes is None else len(classes)
        _check_memory(plan.batch_size, plan.sample_bytes, budget, layout, outputs)
        model = Model(layout, outputs, plan.activation, plan.loss, eps)
        rates = _rates(plan, model, targets, gamma, beta, budget)
        decay = 0 if plan.lr else plan.steps
        head_rates = model.join(model.split(rates)._replace(gamma=np.zeros(1), beta=np.zeros(1)))
        whole, head = (Optimizer(plan.optimizer, r, decay) for r in (rates, head_rates))
        start = _start(plan, model, classes, gamma, beta, before)
        fixed = _fixed_start(plan, model, before) if plan.order.held else None
        return cls(plan, model, classes, whole, head, start, fixed)

    def goals(self, values: Array) -> Array:
        """Targets as `loss_and_gradient` takes them: labels become their places among the classes."""
        if self.classes is None:
            return values
        labels = values.reshape(-1)
        places = np.searchsorted(self.classes, labels).clip(max=len(self.classes) - 1)
        if (self.classes[places] != labels).any():
            raise InputError("--target: a label that was not there before; the file changed while it was being read")
        return places


def find_classes(targets: Joined) -> Array:
    """The distinct labels, ascending, of all samples.

    Raises
    ------
    InputError
        When there is only one, or more than MOST_CLASSES.
    """
    found = np.empty(0, targets.dtype)
    for first in range(0, targets.shape[0], PIECE_VALUES):
        values = targets.read(first, min(PIECE_VALUES, targets.shape[0] - first))
        found = np.union1d(found, values)
        if len(found) > MOST_CLASSES:
            raise InputError(
                f"--target {printable(targets.addresses[0])}: more than {MOST_CLASSES:,} different labels; "
                "if they are numbers to predict, say --loss mse"
            )
    if len(found) == 1:
        raise InputError(
            f"--target {printable(targets.addresses[0])}: every label is {found[0]}; nothing can be learned"
        )
    return found


def _loss_and_outputs(spec: FitSpec, data: Joined, targets: Joined) -> tuple[str, int]:
    """The loss, and the outputs as in `Plan`."""
    where, shape = f"--target {printable(targets.addresses[0])}", targets.shape
    if targets.dtype.kind in "biu" and spec.loss != "mse":
        if shape[1:] != (1,):
            raise MismatchError(
                f"{where}: integers are labels, one for each sample, and these have the shape {shape}; "
                "if they are numbers to predict, say --loss mse"
            )
        return "cross-entropy", -1
    if spec.loss == "cross-entropy":
        raise UsageError(f"--loss cross-entropy needs integer labels; {where} holds {targets.dtype.name}")
    if shape == data.shape:
        return "mse", 0
    if len(shape) == 2:
        return "mse", shape[1]
    raise MismatchError(f"{where}: shape {shape} is neither (N,) nor (N, K), nor the data's own {data.shape}")


def _check_memory(batch_size: int, sample_bytes: int, budget: int, layout: Layout, outputs: int) -> None:
    """Raise UsageError when a batch, with those read ahead and the arrays to compute with, takes more than half the buffers.

    Beside the batches are five arrays of a chunk, of its values or outputs, or ten of a sample, and about twenty vectors of
    all parameters: two trainings, their rates and gradients, and what a step makes.
    """
    size = 2 * layout.features + outputs * (layout.features + 1)
    beside = 8 * (max(5 * CHUNK_VALUES, 10 * layout.sample_size, 5 * outputs) + 20 * size)
    most = (budget // 2 - beside) // (4 * sample_bytes)
    if batch_size <= most:
        return
    if most < 2:
        needed = -(-2 * (8 * sample_bytes + beside) >> 20)
        head = f" and a head of {outputs:,} outputs" if outputs > 2 else ""
        raise UsageError(f"two samples{head} do not fit --max-memory; learning needs at least {needed}M here")
    raise UsageError(f"--batch-size {batch_size}: such a batch does not fit --max-memory; {most} does")


def _rates(plan: Plan, model: Model, targets: Joined, gamma: Floats, beta: Floats, budget: int) -> Floats:
    """The learning rate of each parameter, of shape (P,).

    Adam's steps are as long as the rate whatever the gradient, so its default is in the unit of what it moves: the
    target's, as the first batch shows it, for a head that predicts numbers, and for gamma and beta in distillation.
    """
    if plan.lr:
        return np.full(model.size, plan.lr)
    rate = RATES[plan.optimizer]
    one = np.ones(1)
    if plan.loss == "cross-entropy":
        return np.full(model.size, rate)
    if plan.optimizer == "sgd":  # mse is a mean over features, and so is its gradient
        return np.full(model.size, rate / 10 if model.outputs else DISTILLING_RATE * model.layout.features)
    mean, var = _first_targets(plan, model, targets, budget)
    unit = np.hypot(np.sqrt(var), mean)
    if model.outputs:
        unit = np.where(unit > 0, unit, 1)
        return rate * model.join(Parameters(one, one, unit[:, None], unit))
    return DISTILLING_RATE * model.join(Parameters(np.sqrt(var) + np.abs(gamma), unit + np.abs(beta), one, one))


def _first_targets(plan: Plan, model: Model, targets: Joined, budget: int) -> tuple[Floats, Floats]:
    """Mean and variance of the first batch's targets, per output, or per feature in distillation."""
    count = min(plan.batch_size, plan.order.count)
    layout = model.layout if not model.outputs else Layout(1, model.outputs, 1)
    first = Drawn(targets, plan.order.indices, count, plan.order.window, budget)
    moments = layout.moments(Values(first.read), 1, count, Missing())
    return moments.mean[0], moments.variance()[0]


def _start(
    plan: Plan, model: Model, classes: Array | None, gamma: Floats, beta: Floats, before: Learned | None
) -> Training:
    """Gamma and beta as given and a head of zeros, or everything as an earlier run left it.

    The head's zeros are no tie to break, as the outputs differ in their targets; at the very first step they keep the
    gradient of gamma and beta at 0.
    """
    zeros = np.zeros(1)
    if before is None:
        return Training.begin(model.join(Parameters(gamma, beta, zeros[:, None], zeros)))
    if before.weight.shape[0] != model.outputs:
        raise MismatchError(
            f"the head of --like has {before.weight.shape[0]} outputs, the target asks for {model.outputs}"
        )
    kept = before.classes
    if (classes is None or kept is None) and classes is not kept:
        raise MismatchError("one of --like and the target has classes, the other has numbers")
    if classes is not None and kept is not None and not np.array_equal(classes, kept):
        raise MismatchError("the classes of --like are not those of the target")
    values = model.join(Parameters(gamma, beta, before.weight, before.bias))
    return _continued(plan, before, np.array([values, before.first, before.second]))


def _fixed_start(plan: Plan, model: Model, before: Learned | None) -> Training | None:
    """Gamma 1, beta 0 and a head of zeros, or everything as an earlier run left it; None where it left nothing."""
    zeros = np.zeros(1)
    if before is None:
        return Training.begin(model.join(Parameters(np.ones(1), zeros, zeros[:, None], zeros)))
    return _continued(plan, before, before.fixed) if len(before.fixed) else None


def _continued(plan: Plan, before: Learned, parts: Floats) -> Training:
    """A training from its values and moments; another optimizer starts without moments."""
    if before.settings["optimizer"] != plan.optimizer:
        return Training.begin(parts[0])
    values, first, second = parts
    return Training(values, first, second, before.settings["steps"])
