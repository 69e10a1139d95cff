"""The training setup: the target, and everything that follows from options, data and target before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bncli.engine.order import Order
from bncli.engine.plan import FitSpec
from bncli.errors import InputError, MismatchError, UsageError, printable
from bncli.formats.address import SEPARATOR, expand, split
from bncli.formats.dataset import Joined
from bncli.formats.memory import ArraySource
from bncli.formats.permuted import Permuted
from bncli.formats.reading import ReadOptions
from bncli.numerics.arrays import Array, Floats
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Layout, Values
from bncli.numerics.learning import CHUNK_VALUES, Model, ModelState, Optimizer, Parameters
from bncli.stats.learned import Learned

STEPS = 1000  # the default number of epochs gives at least this many
RATES = {"adam": 0.01, "sgd": 0.1}  # default learning rates; see `_rates`
DISTILLING_RATE = 0.02
MOST_CLASSES = 1 << 16
RUN_VALUES, RUN_BATCHES = 1 << 19, 8  # maximum size of a run; long runs need fewer calls per batch
PIECE_VALUES = 1 << 18  # target values read at a time


def open_target(spec: FitSpec, data: Joined) -> Joined:
    """Open the target for the same samples as the data, without reading values.

    Raises
    ------
    MismatchError
        When data and target differ in their number of samples, or labels have several types.
    InputError, UsageError
        As `Joined`.
    """
    target, own = spec.target, isinstance(spec.target, str) and spec.target.startswith(SEPARATOR)
    addresses: Sequence[str] | Array
    if not isinstance(target, str):
        addresses = ArraySource(target).array
    elif not target.lstrip(":/"):
        raise UsageError(f"--target {target!r} names no dataset; name one, as in ::/y")
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
                f"--target {printable(other)} holds {length:,} samples, {printable(address)} {samples:,}; the numbers must match"
            )
    if spec.loss != "mse":
        _check_types(targets)
    return targets


def _check_types(targets: Joined) -> None:
    """Raise MismatchError when labels have several types: they would be read as float64, as numbers to predict."""
    first = targets.inputs[0]
    for other in targets.inputs[1:]:
        if other.dtype != first.dtype and {"b", "i", "u"} & {first.dtype.kind, other.dtype.kind}:
            raise MismatchError(
                f"--target {printable(first.address)} holds {first.dtype}, {printable(other.address)} {other.dtype}; labels "
                "must have one type; if they are numbers to predict, use --loss mse"
            )


@dataclass(frozen=True)
class Plan:
    """The training plan: what options and shapes determine before any value is read.

    Attributes
    ----------
    loss, activation, optimizer : str
        See `numerics.learning`.
    outputs : int
        Numbers to predict; 0 for distillation; -1 for classes, whose number is not yet known.
    order : Order
        Which samples are held out, and the order of the others.
    batch_size, batches : int
        Samples per batch (the last may be smaller), and batches per epoch to train on.
    run : int
        Batches that are read and folded together; depends only on batch size and sample shape.
    epochs : int
    lr : float or None
        The learning rate; None for the default rates, which decay to 0.
    sample_bytes : int
        Size of a sample and its target.
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
        """Optimizer steps in all epochs."""
        return self.epochs * self.batches

    @classmethod
    def of(cls, spec: FitSpec, data: Joined, layout: Layout, targets: Joined) -> Plan:
        """Make a plan from the options and the shapes and types of data and target.

        Raises
        ------
        UsageError, MismatchError, InputError
            When options, data and target do not fit together.
        """
        loss, outputs = _loss_and_outputs(spec, data, targets)
        if spec.activation not in (None, "identity") and not outputs:
            raise UsageError(
                f"--activation {spec.activation}: a target with the shape of the data is compared with y itself; omit --activation"
            )
        before = spec.reference.learned.settings if spec.reference and spec.reference.learned else {}
        usual = {"optimizer": "adam", "activation": "sigmoid" if loss == "cross-entropy" else "identity"}
        usual |= {name: before[name] for name in usual if before.get("loss") == loss}
        order = Order(data.shape[0], data.sample_size, spec.seed, spec.holdout or 0.0, spec.shuffled)
        if spec.holdout and not order.held:
            raise UsageError(
                f"--holdout {spec.holdout} of {data.shape[0]:,} samples holds out no sample; use a larger fraction"
            )
        whole, rest = divmod(order.count, spec.batch_size)
        batches = whole + (rest * layout.values_per_sample >= 2)
        if not batches:
            raise InputError(
                f"{order.count} of {data.shape[0]} samples are left to train on; a batch needs at least two values per feature"
            )
        sample_bytes = sum(d.sample_size * d.dtype.itemsize for d in (data, targets))
        fewest = outputs if outputs >= 0 else 2  # `Setup.of` checks again once the classes are known
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
    """Batches that are read and folded together; depends only on batch size and sample shape."""
    at_most = min(RUN_BATCHES, layout.batches_at_once(batch_size), RUN_VALUES // (batch_size * layout.sample_size))
    return max(1, at_most)


@dataclass(frozen=True, eq=False)
class Setup:
    """A plan with everything that was read for it.

    Attributes
    ----------
    plan : Plan
    model : Model
    classes : shape (K,) or None
        The labels in ascending order.
    optimizer, head_optimizer : Optimizer
        For all parameters, and for the head alone (gamma and beta fixed at 1 and 0).
    start : ModelState
    fixed_start : ModelState or None
        The baseline with gamma 1 and beta 0; None when no samples are held out, or an earlier run had no baseline.
    """

    plan: Plan
    model: Model
    classes: Array | None
    optimizer: Optimizer
    head_optimizer: Optimizer
    start: ModelState
    fixed_start: ModelState | None

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
    ) -> Setup:
        """Read the classes, and the targets of the first batch if the learning rates depend on them.

        Parameters
        ----------
        before : Learned, optional
            What an earlier run learned, to continue from.
        budget : int
            Buffer memory in bytes.

        Raises
        ------
        UsageError
            When a batch and the head do not fit in the buffer memory.
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

    def encode(self, values: Array) -> Array:
        """Targets in the form that `loss_and_gradient` takes: labels become class indices."""
        if self.classes is None:
            return values
        labels = values.reshape(-1)
        indices = np.searchsorted(self.classes, labels).clip(max=len(self.classes) - 1)
        if (self.classes[indices] != labels).any():
            raise InputError("--target: the input changed while it was read: it has new labels")
        return indices


def find_classes(targets: Joined) -> Array:
    """The distinct labels of all samples, in ascending order.

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
                "if they are numbers to predict, use --loss mse"
            )
    if len(found) == 1:
        raise InputError(
            f"--target {printable(targets.addresses[0])}: every label is {found[0]}; nothing can be learned"
        )
    return found


def _loss_and_outputs(spec: FitSpec, data: Joined, targets: Joined) -> tuple[str, int]:
    """The loss, and the number of outputs as in `Plan`."""
    where, shape = f"--target {printable(targets.addresses[0])}", targets.shape
    if targets.dtype.kind in "biu" and spec.loss != "mse":
        if shape[1:] != (1,):
            raise MismatchError(
                f"{where}: integers are class labels, one per sample, but the shape is {shape}; "
                "if they are numbers to predict, use --loss mse"
            )
        return "cross-entropy", -1
    if spec.loss == "cross-entropy":
        raise UsageError(f"--loss cross-entropy needs integer labels; {where} holds {targets.dtype.name}")
    if shape == data.shape:
        return "mse", 0
    if len(shape) == 2:
        return "mse", shape[1]
    raise MismatchError(f"{where}: shape {shape} is neither (N,) nor (N, K), nor that of the data, {data.shape}")


def _check_memory(batch_size: int, sample_bytes: int, budget: int, layout: Layout, outputs: int) -> None:
    """Raise UsageError when a batch, the batches read ahead and work arrays exceed half of the buffer memory.

    Beside the batches there are five arrays of a chunk (its values or outputs) or ten of a sample, and about twenty
    vectors of all parameters: two model states, their learning rates and gradients, and temporaries of a step.
    """
    size = 2 * layout.features + outputs * (layout.features + 1)
    beside = 8 * (max(5 * CHUNK_VALUES, 10 * layout.sample_size, 5 * outputs) + 20 * size)
    most = (budget // 2 - beside) // (4 * sample_bytes)
    if batch_size <= most:
        return
    if most < 2:
        needed = -(-2 * (8 * sample_bytes + beside) >> 20)
        head = f" and a head of {outputs:,} outputs" if outputs > 2 else ""
        raise UsageError(f"two samples{head} do not fit in --max-memory; training needs at least {needed}M here")
    raise UsageError(f"--batch-size {batch_size}: the batch does not fit in --max-memory; {most} does")


def _rates(plan: Plan, model: Model, targets: Joined, gamma: Floats, beta: Floats, budget: int) -> Floats:
    """The learning rate of each parameter, of shape (P,).

    The length of an Adam step is about the learning rate, whatever the gradient. So its default is scaled to what it moves:
    to the targets of the first batch for a head that predicts numbers, and for gamma and beta in distillation.
    """
    if plan.lr:
        return np.full(model.size, plan.lr)
    rate = RATES[plan.optimizer]
    one = np.ones(1)
    if plan.loss == "cross-entropy":
        return np.full(model.size, rate)
    if plan.optimizer == "sgd":  # the gradient of mse is divided by the number of features
        return np.full(model.size, rate / 10 if model.outputs else DISTILLING_RATE * model.layout.features)
    mean, var = _first_targets(plan, model, targets, budget)
    unit = np.hypot(np.sqrt(var), mean)
    if model.outputs:
        unit = np.where(unit > 0, unit, 1)
        return rate * model.join(Parameters(one, one, unit[:, None], unit))
    return DISTILLING_RATE * model.join(Parameters(np.sqrt(var) + np.abs(gamma), unit + np.abs(beta), one, one))


def _first_targets(plan: Plan, model: Model, targets: Joined, budget: int) -> tuple[Floats, Floats]:
    """Mean and variance of the targets of the first batch, of shape (K,), or (C,) in distillation."""
    count = min(plan.batch_size, plan.order.count)
    layout = model.layout if not model.outputs else Layout(1, model.outputs, 1)
    first = Permuted(targets, plan.order.indices, count, plan.order.window, budget)
    moments = layout.moments(Values(first.read), 1, count, Missing())
    return moments.mean[0], moments.variance()[0]


def _start(
    plan: Plan, model: Model, classes: Array | None, gamma: Floats, beta: Floats, before: Learned | None
) -> ModelState:
    """The given gamma and beta with a head of zeros, or the final state of an earlier run.

    A head of zeros needs no random initialization to break symmetry, since the outputs differ in their targets. At the
    first step it makes the gradients of gamma and beta 0.
    """
    zeros = np.zeros(1)
    if before is None:
        return ModelState.begin(model.join(Parameters(gamma, beta, zeros[:, None], zeros)))
    if before.weight.shape[0] != model.outputs:
        raise MismatchError(
            f"the head of --like has {before.weight.shape[0]} outputs, the target needs {model.outputs}"
        )
    kept = before.classes
    if (classes is None or kept is None) and classes is not kept:
        raise MismatchError(
            "one of --like and the target has classes, the other numbers; both must be of the same kind"
        )
    if classes is not None and kept is not None and not np.array_equal(classes, kept):
        raise MismatchError("the classes of --like differ from those of the target")
    values = model.join(Parameters(gamma, beta, before.weight, before.bias))
    return _continued(plan, before, np.array([values, before.first, before.second]))


def _fixed_start(plan: Plan, model: Model, before: Learned | None) -> ModelState | None:
    """Gamma 1, beta 0 and a head of zeros, or the baseline of an earlier run; None when that has none."""
    zeros = np.zeros(1)
    if before is None:
        return ModelState.begin(model.join(Parameters(np.ones(1), zeros, zeros[:, None], zeros)))
    return _continued(plan, before, before.fixed) if len(before.fixed) else None


def _continued(plan: Plan, before: Learned, parts: Floats) -> ModelState:
    """A model state from its parameters and moments; a change of optimizer discards the moments."""
    if before.settings["optimizer"] != plan.optimizer:
        return ModelState.begin(parts[0])
    values, first, second = parts
    return ModelState(values, first, second, before.settings["steps"])
