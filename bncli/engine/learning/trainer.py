"""The training loop: one optimizer step per batch, and a state to checkpoint after each run of batches."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from bncli.engine.accumulate import statistics
from bncli.engine.checkpoint import Arrays, Checkpointer, Packed
from bncli.engine.executors import available
from bncli.engine.learning.batches import Batch, BatchReader
from bncli.engine.learning.setup import Plan, Setup, open_target
from bncli.engine.plan import FitSpec, Progress
from bncli.engine.tree import Fold, Tree
from bncli.errors import BnWarning, InputError, printable
from bncli.formats.dataset import Joined
from bncli.numerics.arrays import Array, Floats
from bncli.numerics.layout import Layout
from bncli.numerics.learning import LossGradient, ModelState, loss_and_gradient
from bncli.stats.container import is_packed
from bncli.stats.conventions import Conventions
from bncli.stats.learned import Learned
from bncli.stats.record import load


class DivergenceError(InputError):
    """The loss or a parameter is no longer finite."""


class Epoch(NamedTuple):
    """Results of an epoch: mean losses, and the accuracy (share of samples classified correctly); NaN where undefined.

    The training loss of a batch is computed before its step. The accuracy is that of the held-out samples if there are
    any, else that of the training batches.
    """

    train_loss: float
    holdout_loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class TrainingState:
    """The state of a training run. Frozen and replaced after each step, so that an interrupted run has a consistent one.

    Attributes
    ----------
    learned : ModelState
    fixed : ModelState or None
        The baseline with gamma 1 and beta 0; only when samples are held out.
    tree : Tree
        Population statistics of the batches of the first epoch, and running statistics of all batches.
    epoch, batch : int
        Complete epochs, and batches done in the current one.
    loss : float
        Sum of the losses of the samples in the current epoch.
    correct : int
        Samples of the current epoch that were classified correctly.
    history : tuple of Epoch
        The complete epochs.
    """

    learned: ModelState
    fixed: ModelState | None
    tree: Tree
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    correct: int = 0
    history: tuple[Epoch, ...] = ()

    @classmethod
    def begin(cls, setup: Setup) -> TrainingState:
        """The state before the first step."""
        return cls(setup.start, setup.fixed_start, Tree(setup.model.layout.features))

    def pack(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Everything but the tree as named arrays and attributes; the inverse of `unpack`."""
        arrays = {"history": np.array(self.history, np.float64).reshape(-1, len(Epoch._fields))}
        attributes: dict[str, Any] = {name: getattr(self, name) for name in ("epoch", "batch", "loss", "correct")}
        for name, training in (("learned", self.learned), ("fixed", self.fixed)):
            if training is not None:
                packed, plain = training.pack()
                arrays |= {f"{name}/{key}": array for key, array in packed.items()}
                attributes |= {f"{name}_{key}": value for key, value in plain.items()}
        return arrays, attributes

    @classmethod
    def unpack(cls, arrays: Arrays, attributes: Mapping[str, Any], tree: Tree) -> TrainingState:
        """The inverse of `pack`. Raises LookupError or ValueError when parts are missing or inconsistent."""

        def model_state(name: str) -> ModelState:
            own = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
            return ModelState.unpack(own, {"steps": attributes[f"{name}_steps"]})

        return cls(
            model_state("learned"),
            model_state("fixed") if "fixed/values" in arrays else None,
            tree,
            int(attributes["epoch"]),
            int(attributes["batch"]),
            float(attributes["loss"]),
            int(attributes["correct"]),
            tuple(Epoch(*row) for row in arrays["history"].tolist()),
        )

    def samples(self, plan: Plan) -> int:
        """Samples processed in all epochs."""
        return self.epoch * plan.order.count + min(self.batch * plan.batch_size, plan.order.count)

    def parts(self) -> Packed:
        """The whole state as named arrays and attributes, for a checkpoint."""
        (arrays, attributes), (more, counts) = self.pack(), self.tree.pack()
        return {**arrays, **more}, {**attributes, **counts}

    @classmethod
    def of_parts(cls, arrays: Arrays, attributes: Mapping[str, Any], setup: Setup) -> TrainingState:
        """The inverse of `parts`. Raises LookupError, TypeError or ValueError when the parts are not those of this setup."""
        tree = Tree.unpack(arrays, attributes, setup.model.layout.features)
        state = cls.unpack(arrays, attributes, tree)
        if state.learned.values.size != setup.model.size or (state.fixed is None) != (not setup.plan.order.held):
            raise ValueError("the state belongs to another model")
        if state.batch % setup.plan.run and state.batch < setup.plan.batches:
            raise ValueError("the state does not end on a run boundary")
        return state


@dataclass(frozen=True)
class Trainer:
    """Runs the training loop of a setup on its data and targets.

    Attributes
    ----------
    setup : Setup
    data, targets : Joined
    conventions : Conventions
    budget : int
        Buffer memory in bytes.
    threads : int
        With more than one, batches are read ahead in a separate thread.
    """

    setup: Setup
    data: Joined
    targets: Joined
    conventions: Conventions
    budget: int
    threads: int

    def states(self, start: TrainingState | None = None) -> Iterator[TrainingState]:
        """Yield the state after each run of batches and each epoch, continuing from `start`.

        Raises
        ------
        InputError
            When an input value is not finite.
        DivergenceError
            When the loss or a parameter is not finite.
        """
        state, plan = start or TrainingState.begin(self.setup), self.setup.plan
        while state.epoch < plan.epochs:
            for batch in self._reader(state.epoch, state.tree).batches(state.batch):
                state = self._step(state, batch)
                if batch.tree:
                    yield state
            state = self._close(state)
            yield state

    def fixed_loss(self, state: TrainingState) -> float:
        """Held-out loss of the baseline with gamma 1 and beta 0; NaN without held-out samples."""
        return self._evaluate_held_out(state, state.fixed)[0] if state.fixed else math.nan

    def _reader(self, epoch: int | None, tree: Tree) -> BatchReader:
        return BatchReader(
            self.setup, self.data, self.targets, self.conventions, self.budget, self.threads, epoch, tree
        )

    def _step(self, state: TrainingState, batch: Batch) -> TrainingState:
        setup, count = self.setup, len(batch.x)
        if state.batch == setup.plan.batches:
            return replace(state, tree=batch.tree or state.tree, batch=state.batch + 1)
        taken = state.epoch * setup.plan.batches + state.batch
        found = self._loss_and_gradient(state.learned, batch)
        learned = setup.optimizer.step(state.learned, found.gradient, taken)
        if not (math.isfinite(found.loss) and np.isfinite(learned.values).all()):
            raise self._diverged(state, found.loss)
        fixed = state.fixed
        if fixed:
            fixed = setup.head_optimizer.step(fixed, self._loss_and_gradient(fixed, batch).gradient, taken)
        return replace(
            state,
            learned=learned,
            fixed=fixed,
            tree=batch.tree or state.tree,
            batch=state.batch + 1,
            loss=state.loss + found.loss * count,
            correct=state.correct + found.correct,
        )

    def _loss_and_gradient(self, model: ModelState, batch: Batch) -> LossGradient:
        """Loss and gradient in training mode, with the statistics of the batch."""
        with np.errstate(over="ignore", invalid="ignore"):
            return loss_and_gradient(self.setup.model, model.values, batch.x, batch.mean, batch.var, batch.targets)

    def _close(self, state: TrainingState) -> TrainingState:
        """The state at the end of an epoch, with the results added to the history."""
        plan = self.setup.plan
        samples = min(plan.batches * plan.batch_size, plan.order.count)
        holdout_loss, accuracy = math.nan, state.correct / samples
        if plan.order.held:
            holdout_loss, accuracy = self._evaluate_held_out(state, state.learned)
        if self.setup.classes is None:
            accuracy = math.nan
        epoch = Epoch(state.loss / samples, holdout_loss, accuracy)
        return replace(state, epoch=state.epoch + 1, batch=0, loss=0.0, correct=0, history=(*state.history, epoch))

    def _evaluate_held_out(self, state: TrainingState, model: ModelState) -> tuple[float, float]:
        """Loss and accuracy of the held-out samples, in test mode with the running statistics that would be stored."""
        mean, var = statistics(state.tree.fold(self.conventions.momentum), self.conventions)
        held, loss, correct = self.setup.plan.order.held, 0.0, 0
        for batch in self._reader(None, state.tree).batches():
            with np.errstate(over="ignore", invalid="ignore"):
                found = loss_and_gradient(self.setup.model, model.values, batch.x, mean, var, batch.targets)
            if not math.isfinite(found.loss):
                raise DivergenceError(
                    f"the held-out loss after epoch {state.epoch + 1} is {found.loss:g}: values or targets of held-out "
                    "samples are too large; rescale them or leave them out"
                )
            loss, correct = loss + found.loss * len(batch.x), correct + found.correct
        return loss / held, correct / held

    def _diverged(self, state: TrainingState, loss: float) -> DivergenceError:
        where = f"learning diverged: at batch {state.batch + 1} of epoch {state.epoch + 1}"
        if not state.learned.steps and not math.isfinite(loss):
            return DivergenceError(
                f"{where} the loss is {loss:g} before any step: the targets (or --gamma, --beta) are too large; rescale them"
            )
        rate = f"--lr {self.setup.plan.lr:g}" if self.setup.plan.lr else "the default --lr"
        found = "a parameter is not finite" if math.isfinite(loss) else f"the loss is {loss:g}"
        return DivergenceError(
            f"{where} {found}; most likely {rate} is too high (try a tenth of it), or the targets are too large"
        )


def learn(
    data: Joined,
    layout: Layout,
    spec: FitSpec,
    conventions: Conventions,
    gamma: Floats,
    beta: Floats,
    progress: Progress | None,
    checkpointer: Checkpointer | None = None,
) -> tuple[Fold, Floats, Floats, Learned]:
    """Train gamma and beta, starting from the given values, and fold the statistics of the same batches.

    Parameters
    ----------
    gamma, beta : arrays of shape (C,)

    Returns
    -------
    fold : Fold
    gamma, beta : arrays of shape (C,)
    learned : Learned
        The head, the losses, and what a later run continues from.

    Raises
    ------
    UsageError, MismatchError, InputError
        As `Plan.of`, `Setup.of` and `Trainer.states`.
    """
    with open_target(spec, data) as targets:
        plan = Plan.of(spec, data, layout, targets)
        before = spec.reference.learned if spec.reference else None
        setup = Setup.of(plan, layout, targets, conventions.eps, gamma, beta, before, spec.max_memory)
        seen = any(_may_have_seen(plan, spec, learned) for learned in _learned_before(spec))
        if seen and plan.order.held:
            _warn_seen()
        trainer = Trainer(setup, data, targets, conventions, spec.max_memory, spec.workers or available())
        start = state = TrainingState.begin(setup)
        if checkpointer and checkpointer.found:
            start = state = checkpointer.restore(
                lambda arrays, attributes: TrainingState.of_parts(arrays, attributes, setup)
            )
        before_samples, total = start.samples(plan), plan.epochs * plan.order.count
        if progress and before_samples:
            progress(before_samples, total, 0, describe(plan, start))
        try:
            for state in trainer.states(start):
                if checkpointer:
                    checkpointer.offer(
                        state.parts, f"{state.epoch:,} of {plan.epochs:,} epochs and {state.batch:,} batches"
                    )
                if progress:
                    done = state.samples(plan)
                    size = (done - before_samples) * data.sample_size * data.dtype.itemsize
                    progress(done, total, size, describe(plan, state))
        except DivergenceError:
            if checkpointer:
                checkpointer.remove()  # a run that resumed from it would diverge again
            raise
        learned = to_learned(trainer, state)
        learned.settings.update(rows=list(spec.rows), seen=seen)
        targets.check_unchanged()
        data.notes += targets.notes
    parameters = setup.model.split(state.learned.values)
    return state.tree.fold(conventions.momentum), parameters.gamma, parameters.beta, learned


def _learned_before(spec: FitSpec) -> Iterator[Learned]:
    """Yield what earlier runs learned, from the stats files given for gamma, beta and the head."""
    files = [v for v in (spec.gamma, spec.beta) if isinstance(v, str) and os.path.isfile(v) and is_packed(v)]
    for stats in (spec.reference, *map(load, files)):
        if stats and stats.learned:
            yield stats.learned


def _may_have_seen(plan: Plan, spec: FitSpec, before: Learned) -> bool:
    """Whether an earlier run may have trained on samples that are held out now."""
    then, rows = before.settings, list(spec.rows)
    split = {"seed": plan.order.seed, "holdout": plan.order.holdout}
    return then.get("seen", False) or then.get("rows", rows) != rows or any(then.get(k) != v for k, v in split.items())


def _warn_seen() -> None:
    warnings.warn(
        "--like, --gamma or --beta may have been learned from samples that are held out now, so the held-out loss may be "
        "optimistic; use the --holdout, --seed and --rows of that run, or other data",
        BnWarning,
        stacklevel=4,
    )


def describe(plan: Plan, state: TrainingState) -> str:
    """The current epoch and the results of the last complete one, in a short line of text."""
    text = f"epoch {state.epoch}/{plan.epochs}"
    if not state.history:
        return text
    last = state.history[-1]
    text += f": loss {last.train_loss:.3g}"
    if not math.isnan(last.holdout_loss):
        text += f", held-out {last.holdout_loss:.3g}"
    return text if math.isnan(last.accuracy) else f"{text}, {last.accuracy:.1%} right"


def to_learned(trainer: Trainer, state: TrainingState) -> Learned:
    """What a stats file stores about the training, besides gamma and beta."""
    setup, plan = trainer.setup, trainer.setup.plan
    parameters = setup.model.split(state.learned.values)
    train_loss, holdout_loss, accuracy = np.array(state.history, np.float64).T.copy()
    settings = {
        "loss": plan.loss,
        "activation": plan.activation,
        "optimizer": plan.optimizer,
        "lr": plan.lr,
        "steps": state.learned.steps,
        "seed": plan.order.seed,
        "holdout": plan.order.holdout,
        "target": [printable(address) for address in trainer.targets.addresses],
    }
    return Learned(
        parameters.weight,
        parameters.bias,
        state.learned.first,
        state.learned.second,
        np.array(list(state.fixed.pack()[0].values()) if state.fixed else np.empty((0, setup.model.size))),
        train_loss,
        holdout_loss,
        accuracy,
        trainer.fixed_loss(state),
        setup.classes,
        settings,
    )
