"""The loop of learning: each batch takes one step, and what has been learned is kept after each run of them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bncli.engine.accumulate import Fold, statistics
from bncli.engine.checkpoint import Arrays, Checkpointer, Packed
from bncli.engine.executors import available
from bncli.engine.learning.batches import Batch, Reader
from bncli.engine.learning.setup import Lesson, Plan, open_target
from bncli.engine.plan import FitSpec, Progress
from bncli.errors import BnWarning, InputError, printable
from bncli.formats.dataset import Joined
from bncli.numerics.layout import Layout
from bncli.numerics.learning import LossGradient, Training, loss_and_gradient
from bncli.stats.container import is_packed
from bncli.stats.conventions import Conventions
from bncli.stats.learned import Learned
from bncli.stats.record import load

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class DivergenceError(InputError):
    """A loss or a parameter is not finite any more."""


class Epoch(NamedTuple):
    """What an epoch came to: mean losses, and the share of classes that were right; NaN where there is none.

    The training loss is that of each batch before its step. The accuracy is that of the samples held out, where there are
    some, else that of the batches.
    """

    train_loss: float
    holdout_loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Course:
    """All that a run of learning has come to. Frozen and replaced after each step: an interrupted run holds a whole one.

    Attributes
    ----------
    learned : Training
    fixed : Training or None
        The comparison with gamma 1 and beta 0, where samples are held out.
    fold : Fold
        The population of the first epoch's batches, the running statistics of all.
    epoch, batch : int
        Epochs that are complete, and batches of the one that is not.
    loss : float
        Sum of the losses of this epoch's samples.
    correct : int
        Of this epoch's samples, those whose class was right.
    history : tuple of Epoch
    """

    learned: Training
    fixed: Training | None
    fold: Fold
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    correct: int = 0
    history: tuple[Epoch, ...] = ()

    @classmethod
    def begin(cls, lesson: Lesson) -> Course:
        """Nothing learned yet."""
        fold = Fold.empty(lesson.model.layout.features)
        return cls(lesson.start, lesson.fixed_start, fold)

    def pack(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Named arrays and attributes of everything but the fold, from which `unpack` makes the same course."""
        arrays = {"history": np.array(self.history, np.float64).reshape(-1, len(Epoch._fields))}
        attributes: dict[str, Any] = {name: getattr(self, name) for name in ("epoch", "batch", "loss", "correct")}
        for name, training in (("learned", self.learned), ("fixed", self.fixed)):
            if training is not None:
                packed, plain = training.pack()
                arrays |= {f"{name}/{key}": array for key, array in packed.items()}
                attributes |= {f"{name}_{key}": value for key, value in plain.items()}
        return arrays, attributes

    @classmethod
    def unpack(cls, arrays: Arrays, attributes: Mapping[str, Any], fold: Fold) -> Course:
        """The course that was packed. Raises LookupError or ValueError where parts are missing or do not fit."""

        def training(name: str) -> Training:
            own = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
            return Training.unpack(own, {"steps": attributes[f"{name}_steps"]})

        return cls(
            training("learned"),
            training("fixed") if "fixed/values" in arrays else None,
            fold,
            int(attributes["epoch"]),
            int(attributes["batch"]),
            float(attributes["loss"]),
            int(attributes["correct"]),
            tuple(Epoch(*row) for row in arrays["history"].tolist()),
        )

    def samples(self, plan: Plan) -> int:
        """Samples that were gone over, in all epochs."""
        return self.epoch * plan.order.count + min(self.batch * plan.batch_size, plan.order.count)

    def parts(self) -> Packed:
        """Everything, for a checkpoint."""
        (arrays, attributes), (more, counts) = self.pack(), self.fold.pack()
        return {**arrays, **more}, {**attributes, **counts}

    @classmethod
    def of_parts(cls, arrays: Arrays, attributes: Mapping[str, Any], lesson: Lesson) -> Course:
        """What `parts` gave; raises LookupError, TypeError or ValueError when it is something else."""
        fold = Fold.unpack(arrays, attributes, lesson.model.layout.features)
        course = cls.unpack(arrays, attributes, fold)
        if course.learned.values.size != lesson.model.size or (course.fixed is None) != (not lesson.plan.order.held):
            raise ValueError("of another model")
        if course.batch % lesson.plan.run and course.batch < lesson.plan.batches:
            raise ValueError("in the middle of a run")
        return course


@dataclass(frozen=True)
class Classroom:
    """A lesson with the data and the target that it reads.

    Attributes
    ----------
    lesson : Lesson
    data, targets : Joined
    conventions : Conventions
    budget : int
        Bytes of buffers.
    threads : int
        With more than one the next batches are read while one is learned from.
    """

    lesson: Lesson
    data: Joined
    targets: Joined
    conventions: Conventions
    budget: int
    threads: int

    def courses(self, start: Course | None = None) -> Iterator[Course]:
        """The course after each run of batches and each epoch, from `start` on to the end.

        Raises
        ------
        InputError
            Where a value is not finite.
        DivergenceError
            Where the loss is not.
        """
        course, plan = start or Course.begin(self.lesson), self.lesson.plan
        while course.epoch < plan.epochs:
            for batch in self._reader(course.epoch, course.fold).batches(course.batch):
                course = self._step(course, batch)
                if batch.fold:
                    yield course
            course = self._close(course)
            yield course

    def fixed_loss(self, course: Course) -> float:
        """Held-out loss of the head that was trained with gamma 1 and beta 0; NaN without a hold-out."""
        return self._examine(course, course.fixed)[0] if course.fixed else math.nan

    def _reader(self, epoch: int | None, fold: Fold) -> Reader:
        return Reader(self.lesson, self.data, self.targets, self.conventions, self.budget, self.threads, epoch, fold)

    def _step(self, course: Course, batch: Batch) -> Course:
        lesson, count = self.lesson, len(batch.x)
        if course.batch == lesson.plan.batches:
            return replace(course, fold=batch.fold or course.fold, batch=course.batch + 1)
        taken = course.epoch * lesson.plan.batches + course.batch
        found = self._evaluate(course.learned, batch)
        learned = lesson.optimizer.step(course.learned, found.gradient, taken)
        if not (math.isfinite(found.loss) and np.isfinite(learned.values).all()):
            raise self._diverged(course, found.loss)
        fixed = course.fixed
        if fixed:
            fixed = lesson.head_optimizer.step(fixed, self._evaluate(fixed, batch).gradient, taken)
        return replace(
            course,
            learned=learned,
            fixed=fixed,
            fold=batch.fold or course.fold,
            batch=course.batch + 1,
            loss=course.loss + found.loss * count,
            correct=course.correct + found.correct,
        )

    def _evaluate(self, training: Training, batch: Batch) -> LossGradient:
        """In training mode: with the batch's own statistics."""
        with np.errstate(over="ignore", invalid="ignore"):
            return loss_and_gradient(self.lesson.model, training.values, batch.x, batch.mean, batch.var, batch.goals)

    def _close(self, course: Course) -> Course:
        """The course at the end of an epoch, with what it came to."""
        plan = self.lesson.plan
        samples = min(plan.batches * plan.batch_size, plan.order.count)
        holdout_loss, accuracy = math.nan, course.correct / samples
        if plan.order.held:
            holdout_loss, accuracy = self._examine(course, course.learned)
        if self.lesson.classes is None:
            accuracy = math.nan
        epoch = Epoch(course.loss / samples, holdout_loss, accuracy)
        return replace(course, epoch=course.epoch + 1, batch=0, loss=0.0, correct=0, history=(*course.history, epoch))

    def _examine(self, course: Course, training: Training) -> tuple[float, float]:
        """Loss and accuracy of the samples held out, in test mode with the running statistics as they would be stored."""
        mean, var = statistics(course.fold, self.conventions)
        held, loss, correct = self.lesson.plan.order.held, 0.0, 0
        for batch in self._reader(None, course.fold).batches():
            with np.errstate(over="ignore", invalid="ignore"):
                found = loss_and_gradient(self.lesson.model, training.values, batch.x, mean, var, batch.goals)
            if not math.isfinite(found.loss):
                raise DivergenceError(
                    f"the held-out loss after epoch {course.epoch + 1} is {found.loss:g}: among the samples held out, values or "
                    "targets are too large; rescale them or leave them out"
                )
            loss, correct = loss + found.loss * len(batch.x), correct + found.correct
        return loss / held, correct / held

    def _diverged(self, course: Course, loss: float) -> DivergenceError:
        where = f"learning diverged: at batch {course.batch + 1} of epoch {course.epoch + 1}"
        if not course.learned.steps and not math.isfinite(loss):
            return DivergenceError(
                f"{where} the loss is {loss:g} before any step: the targets (or --gamma, --beta) are too large; rescale them"
            )
        rate = f"--lr {self.lesson.plan.lr:g}" if self.lesson.plan.lr else "the default --lr"
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
    """Learn gamma and beta from where they are, and fold the statistics of the same batches.

    Returns
    -------
    fold, gamma, beta, learned

    Raises
    ------
    UsageError, MismatchError, InputError
        As `Plan.of`, `Lesson.of` and `Classroom.courses`.
    """
    with open_target(spec, data) as targets:
        plan = Plan.of(spec, data, layout, targets)
        before = spec.reference.learned if spec.reference else None
        lesson = Lesson.of(plan, layout, targets, conventions.eps, gamma, beta, before, spec.max_memory)
        seen = any(_may_have_seen(plan, spec, learned) for learned in _taught_before(spec))
        if seen and plan.order.held:
            _tell_seen()
        room = Classroom(lesson, data, targets, conventions, spec.max_memory, spec.workers or available())
        start = course = Course.begin(lesson)
        if checkpointer and checkpointer.found:
            start = course = checkpointer.restore(
                lambda arrays, attributes: Course.of_parts(arrays, attributes, lesson)
            )
        before_samples, total = start.samples(plan), plan.epochs * plan.order.count
        if progress and before_samples:
            progress(before_samples, total, 0, in_words(plan, start))
        try:
            for course in room.courses(start):
                if checkpointer:
                    checkpointer.offer(
                        course.parts, f"{course.epoch:,} of {plan.epochs:,} epochs and {course.batch:,} batches"
                    )
                if progress:
                    done = course.samples(plan)
                    size = (done - before_samples) * data.sample_size * data.dtype.itemsize
                    progress(done, total, size, in_words(plan, course))
        except DivergenceError:
            if checkpointer:
                checkpointer.remove()  # whoever went on from it would come to the same
            raise
        learned = record(room, course)
        learned.settings.update(rows=list(spec.rows), seen=seen)
        targets.check_unchanged()
        data.notes += targets.notes
    parameters = lesson.model.split(course.learned.values)
    return course.fold, parameters.gamma, parameters.beta, learned


def _taught_before(spec: FitSpec) -> Iterator[Learned]:
    """What gamma, beta and the head may have been learned by before, in runs whose stats files are given."""
    files = [v for v in (spec.gamma, spec.beta) if isinstance(v, str) and os.path.isfile(v) and is_packed(v)]
    for stats in (spec.reference, *map(load, files)):
        if stats and stats.learned:
            yield stats.learned


def _may_have_seen(plan: Plan, spec: FitSpec, before: Learned) -> bool:
    """Whether samples that are held out now may be among those that were learned from before, in any earlier run."""
    then, rows = before.settings, list(spec.rows)
    drawn = {"seed": plan.order.seed, "holdout": plan.order.holdout}
    return then.get("seen", False) or then.get("rows", rows) != rows or any(then.get(k) != v for k, v in drawn.items())


def _tell_seen() -> None:
    warnings.warn(
        "what --like, --gamma or --beta learned may come from samples that are held out now, and the held-out loss then says too "
        "little: give the --holdout, --seed and --rows of that run, or other data",
        BnWarning,
        stacklevel=4,
    )


def in_words(plan: Plan, course: Course) -> str:
    """The last epoch that is complete, and what it came to, in few columns."""
    told = f"epoch {course.epoch}/{plan.epochs}"
    if not course.history:
        return told
    last = course.history[-1]
    told += f": loss {last.train_loss:.3g}"
    if not math.isnan(last.holdout_loss):
        told += f", held-out {last.holdout_loss:.3g}"
    return told if math.isnan(last.accuracy) else f"{told}, {last.accuracy:.1%} right"


def record(room: Classroom, course: Course) -> Learned:
    """What is kept of a course beside gamma and beta."""
    lesson, plan = room.lesson, room.lesson.plan
    parameters = lesson.model.split(course.learned.values)
    train_loss, holdout_loss, accuracy = np.array(course.history, np.float64).T.copy()
    settings = {
        "loss": plan.loss,
        "activation": plan.activation,
        "optimizer": plan.optimizer,
        "lr": plan.lr,
        "steps": course.learned.steps,
        "seed": plan.order.seed,
        "holdout": plan.order.holdout,
        "target": [printable(address) for address in room.targets.addresses],
    }
    return Learned(
        parameters.weight,
        parameters.bias,
        course.learned.first,
        course.learned.second,
        np.array(list(course.fixed.pack()[0].values()) if course.fixed else np.empty((0, lesson.model.size))),
        train_loss,
        holdout_loss,
        accuracy,
        room.fixed_loss(course),
        lesson.classes,
        settings,
    )
