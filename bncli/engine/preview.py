"""What a fit would do: the inputs and a checkpoint are opened, no value is read (`bn fit --dry-run`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bncli.engine.checkpoint import Checkpointer
from bncli.engine.fit import default_output, files_read, open_inputs
from bncli.engine.learning.setup import Plan, open_target
from bncli.engine.options import FitOptions
from bncli.engine.plan import FitSpec
from bncli.engine.task import Task
from bncli.formats.dataset import Input, Joined
from bncli.stats.conventions import Conventions


@dataclass(frozen=True)
class Preview:
    """What a fit would do.

    Attributes
    ----------
    inputs : list of Input
    shape : tuple of int
        Of the joined samples.
    axis, features : int
    batches, batch_size, last : int
        Number of batches, samples in each, and in the last one.
    conventions : Conventions
    output : str
    checkpoint : str
        What happens to an existing checkpoint, in words; "" where there is none.
    learning : Plan or None
    part : range or None
        The samples of the part that was asked for.
    """

    inputs: list[Input]
    shape: tuple[int, ...]
    axis: int
    features: int
    batches: int
    batch_size: int
    last: int
    conventions: Conventions
    output: str
    checkpoint: str
    learning: Plan | None = None
    part: range | None = None


def preview(addresses: Sequence[str], options: FitOptions, output: str | None, *, resume: bool = False) -> Preview:
    """Open the inputs, and a checkpoint, as a fit would.

    Raises
    ------
    UsageError, InputError, MismatchError, OutputExistsError
        As `fit_to_file`, where no value has to be read for it.
    """
    spec = FitSpec.of(options)
    with open_inputs(addresses, spec) as data:
        task = Task.of(data, spec)
        path = output or default_output(data.inputs[0].address, spec.part)
        checkpointer = Checkpointer(path, task.state_of(), resume=resume, inputs=files_read(data, spec))
        whole, rest = divmod(data.shape[0], spec.batch_size)
        return Preview(
            data.inputs,
            data.shape,
            task.axis,
            task.layout.features,
            whole + bool(rest),
            spec.batch_size,
            rest or spec.batch_size,
            task.conventions,
            path,
            checkpointer.plan,
            _learning(task),
            task.segments().run(task.run()) if spec.part else None,
        )


def _learning(task: Task) -> Plan | None:
    if task.spec.target is None or not isinstance(task.data, Joined):
        return None
    with open_target(task.spec, task.data) as targets:
        return Plan.of(task.spec, task.data, task.layout, targets)
