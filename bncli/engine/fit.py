"""Fitting: inputs are opened and checked, segments folded by the workers, and the result stored."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy.typing as npt

from bncli.choices import DEFAULT_MEMORY, Activation, Init, Loss, Nan, Optimizer, PresetName
from bncli.engine.accumulate import Crew, fold_segment, nodes
from bncli.engine.checkpoint import Arrays, Checkpointer
from bncli.engine.learning.trainer import learn
from bncli.engine.options import UNSET, FitOptions, Unset
from bncli.engine.order import Order
from bncli.engine.parts import ROUNDED, Marked, Rounded
from bncli.engine.plan import FitSpec, Progress, Segment
from bncli.engine.portions import portion
from bncli.engine.task import Setting, Task, source_record
from bncli.engine.tree import Node, Tree
from bncli.errors import BnWarning, InputError, MismatchError, UsageError
from bncli.formats.address import SEPARATOR, address_of, expand, split
from bncli.formats.dataset import DataSet, Joined
from bncli.formats.fills import remarks
from bncli.formats.memory import ArraySource
from bncli.formats.permuted import Permuted
from bncli.formats.reading import ReadOptions
from bncli.numerics.arrays import Array, Floats
from bncli.numerics.kernels import Missing
from bncli.stats.record import Stats
from bncli.system import atomic

ROOM, ROOM_PER_FEATURE = 64 << 10, 256  # largest size of a stats file without long names, in bytes


def fit(
    source: str | os.PathLike[str] | Sequence[str] | Array | Iterable[Array],
    *,
    momentum: float | str | Unset | None = UNSET,
    eps: float | None = None,
    batch_size: int | None = None,
    axis: int | None = None,
    init: Init | None = None,
    ddof: int | None = None,
    preset: PresetName | None = None,
    like: str | Stats | None = None,
    gamma: float | str | Floats | None = None,
    beta: float | str | Floats | None = None,
    dataset: str | None = None,
    rows: tuple[int | None, int | None] | str = (None, None),
    fill_value: float | int | None = None,
    nan: Nan = "error",
    names: str | Sequence[str] | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    target: str | Array | None = None,
    loss: Loss | None = None,
    activation: Activation | None = None,
    optimizer: Optimizer | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    holdout: float | None = None,
    part: tuple[int, int] | str | None = None,
    on: str | None = None,
    workers: int = 0,
    max_memory: int | str = DEFAULT_MEMORY,
    allow_unwritten: bool = False,
    allow_virtual: bool = False,
    progress: Progress | None = None,
) -> Stats:
    """Fit normalization statistics in one pass.

    Parameters
    ----------
    source : address, list of addresses, array, or iterable of arrays
        FILE or FILE::/path; an array (or nested lists of numbers, or an open h5py dataset) with samples along axis 0;
        or an iterable whose items are batches, each folded as it comes.
    momentum : float, "none" or None
        Weight of the old value when a batch is folded, 0 <= m < 1; "none" or None: the running statistics are the
        population's. By default that of `preset` or `like`, else 0.9.
    eps, batch_size, axis, init, ddof, preset, like : optional
        See `bncli.engine.options.FitOptions`; None means from `preset` or `like`, else bn's default.
    gamma, beta : number, address or array of shape (C,), optional
    dataset, rows, fill_value, nan, names, shuffle, seed : optional
        How inputs are read; `rows` is (start, stop) or "A:B".
    target, loss, activation, optimizer, lr, epochs, holdout : optional
        To learn gamma and beta: `target` is an address or an array.
    part : (int, int) or "I/N", optional
        Fit only the I-th of N nearly equal runs of segments: a part, which `merge` joins with the others.
    on : str, optional
        Who computes: "threads", "processes", "dask:ADDRESS" or "mpi"; see docs/merge-and-clusters.md.
    workers : int
        Threads or processes; 0 for all CPUs that the process may use.
    max_memory : int or str
        Bytes of buffers, or a size such as "64M".
    allow_unwritten, allow_virtual : bool
        Read unwritten chunks of HDF5 as the fill value; read virtual datasets.
    progress : function, optional
        Called with the samples done, the number of samples (None when unknown) and the bytes done; when learning also
        with words about the last epoch, and where `on` is given with `workers=`, how many there are.

    Returns
    -------
    Stats

    Raises
    ------
    UsageError, InputError, MismatchError
        With the message that the command line would show.

    Examples
    --------
    >>> import numpy as np
    >>> stats = fit(np.array([[1.0], [5.0], [2.0], [5.0]]), batch_size=2, momentum=0.5)
    >>> stats.population_mean.tolist(), stats.population_var.tolist()
    ([3.25], [3.1875])
    >>> [round(float(m), 6) for m in stats.running_mean]  # (3 + 2 * 3.5) / 3: the newer batch weighs twice as much
    [3.333333]
    """
    given = dict(locals())  # first of all: only the parameters
    del given["source"], given["progress"]
    spec = make_spec(given)
    if isinstance(source, (str, os.PathLike)):
        return fit_files([os.fspath(source)], spec, progress=progress)
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, os.PathLike)) for item in source):
        return fit_files([str(os.fspath(item)) for item in source], spec, progress=progress)
    if (address := address_of(source)) is not None:  # read from its file: in pieces, with its names
        return fit_files([address], spec, progress=progress)
    if isinstance(source, (list, tuple)) and len(source) > 1 and all(getattr(item, "ndim", 0) == 1 for item in source):
        raise UsageError(
            "a list of arrays of one dimension: give numpy.stack(rows) where each is a sample, or numpy.concatenate(batches) "
            "where each holds values of one feature"
        )
    nested = isinstance(source, (list, tuple)) and not any(hasattr(item, "shape") for item in source)
    if nested or hasattr(source, "__array__") or isinstance(source, memoryview):
        array = ArraySource(cast("npt.ArrayLike", source)).array
        data = Joined(array, ReadOptions.of(spec))
        return _fitted(Task.of(permuted(data, spec), spec), progress)
    if isinstance(source, Iterable):
        return _fit_batches(cast("Iterable[Array]", source), spec, progress)
    raise UsageError(
        f"an object of type {type(source).__name__} cannot be fitted: give an address, an array or an iterable of batches"
    )


def make_spec(options: dict[str, Any]) -> FitSpec:
    """FitSpec from the options of `fit`."""
    momentum = options.get("momentum", UNSET)
    if momentum is UNSET or momentum is None:
        momentum = None if momentum is UNSET else "none"  # None is what `Stats.momentum` says
    return FitSpec.of(FitOptions(**options | {"momentum": momentum}))


def open_inputs(addresses: Sequence[str], spec: FitSpec) -> DataSet:
    """Open the inputs as one data set; no value is read."""
    data = Joined(expand(addresses), ReadOptions.of(spec))
    if isinstance(spec.target, str) and spec.target.startswith(SEPARATOR):  # the target was not passed over
        data.inputs = [replace(i, passed_over=max(0, i.passed_over - 1)) for i in data.inputs]
    return permuted(data, spec)


def permuted(data: Joined, spec: FitSpec) -> DataSet:
    """Draw the samples in a seeded order under --shuffle; learning draws its own orders, a new one each epoch."""
    if not spec.shuffle or spec.target is not None:
        return data
    order = Order(data.shape[0], data.sample_size, spec.seed, shuffled=True)
    return Permuted(data, order.indices, order.count, order.window, spec.max_memory)


def fit_files(addresses: Sequence[str], spec: FitSpec, *, progress: Progress | None = None) -> Stats:
    """Fit files; see `fit`."""
    with open_inputs(addresses, spec) as data:
        return _fitted(Task.of(data, spec), progress)


def fit_to_file(
    addresses: Sequence[str],
    options: FitOptions,
    output: str | None,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[Stats, str]:
    """Fit files and store the result; return the Stats and the path of their file.

    A checkpoint next to the output holds what was folded so far; `resume` continues from it.

    Raises
    ------
    OutputExistsError, WriteError
        Before anything is computed, where possible.
    InputError, MismatchError
        When the checkpoint is damaged or belongs to another run; see `Checkpointer`.
    """
    spec = FitSpec.of(options)
    with open_inputs(addresses, spec) as data:
        path, read = output or default_output(data.inputs[0].address, spec.part), files_read(data, spec)
        atomic.check_output(path, force=force, inputs=read)
        task = Task.of(data, spec)
        with (
            Checkpointer(path, task.state_of(), resume=resume, inputs=read) as checkpointer,
            atomic.replacing(path, force=force, inputs=read) as temporary,
        ):
            with open(temporary, "r+b") as file:
                atomic.reserve(file.fileno(), ROOM + ROOM_PER_FEATURE * task.layout.features)
            checkpointer.announce()
            stats = _fitted(task, progress, checkpointer)
            atomic.fill(temporary, stats.to_bytes())
        checkpointer.remove()
    return stats, path


def files_read(data: DataSet, spec: FitSpec) -> list[str]:
    """List every file that a fit reads."""
    others = (spec.gamma, spec.beta, spec.names, spec.like, spec.target)
    return data.files + [split(a)[0] for a in others if isinstance(a, str)]


def default_output(address: str, part: tuple[int, int] | None = None) -> str:
    """Return the first input's stem plus .bn.h5, in the current folder; parts have a number, all of the same length.

    >>> default_output("data/train.h5::/x"), default_output("train.npy", (3, 64))
    ('train.bn.h5', 'train.part-03-of-64.bn.h5')
    """
    stem = os.path.splitext(os.path.basename(split(address)[0]))[0]
    number = f".part-{part[0]:0{len(str(part[1]))}}-of-{part[1]}" if part else ""
    return f"{stem}{number}.bn.h5"


def _fitted(task: Task, progress: Progress | None, checkpointer: Checkpointer | None = None) -> Stats:
    data, spec, learned, part = task.data, task.spec, None, None
    if isinstance(data, Joined) and spec.target is not None:
        conventions, gamma, beta = task.conventions, task.gamma, task.beta
        fold, gamma, beta, learned = learn(data, task.layout, spec, conventions, gamma, beta, progress, checkpointer)
        task = replace(task, gamma=gamma, beta=beta)
    else:
        tree = _folded(task, progress, checkpointer)
        fold = tree.fold(task.conventions.momentum)
        part = portion(task, tree) if spec.part else None
    data.check_unchanged()
    fills = remarks(data, fold[Marked].marked, fill=spec.fill_value, verb="learn" if learned else "fit")
    for note in data.notes + [ROUNDED] * fold[Rounded].rounded + fills:
        warnings.warn(note, BnWarning, stacklevel=3)
    records = [source_record(i) | ({"passed_over": i.passed_over} if i.passed_over else {}) for i in data.inputs]
    return task.record(fold, records, learned, part)


def _folded(task: Task, progress: Progress | None, checkpointer: Checkpointer | None) -> Tree:
    data, conventions, run = task.data, task.conventions, task.run()
    cut, tree = task.segments(), Tree(task.layout.features)
    total = len(cut.run(run))
    if checkpointer and checkpointer.found:
        tree = checkpointer.restore(lambda arrays, attributes: _checked_tree(arrays, attributes, task))
    before = tree.samples
    if progress and before:
        progress(before, total, 0)
    left, crew = range(tree.stop, run.stop) if tree.nodes else run, Crew()
    for found in nodes(data, task.layout, task.spec, conventions, cut, left, crew):
        tree = tree.add(found, conventions.momentum)
        if checkpointer:
            checkpointer.offer(tree.pack, f"the first {tree.samples:,} of {total:,} samples")
        if progress:
            size = (tree.samples - before) * data.sample_size * data.dtype.itemsize
            progress(tree.samples, total, size, **({"workers": crew.workers} if task.spec.on else {}))
    return tree


def _checked_tree(arrays: Arrays, attributes: Mapping[str, Any], task: Task) -> Tree:
    """`Tree.unpack`; raises ValueError too when the nodes are not those of the first segments."""
    tree, cut, run = Tree.unpack(arrays, attributes, task.layout.features), task.segments(), task.run()
    if tree.first != run.start or tree.stop > run.stop or tree.samples != len(cut.run(range(run.start, tree.stop))):
        raise ValueError("the nodes are not those of the first segments")
    return tree


def _fit_batches(batches: Iterable[Array], spec: FitSpec, progress: Progress | None) -> Stats:
    """Fit an iterable of batches, each folded as it comes."""
    if spec.rows != (None, None):
        raise UsageError(
            "rows cannot be selected from an iterable of batches; select them before, or give an array or files"
        )
    if spec.part is not None:
        raise UsageError("an iterable of batches has no parts: which batches there are shows at its end; give files")
    if spec.target is not None:
        raise UsageError(
            "an iterable of batches can be read only once and learning reads the data several times; give an array or files"
        )
    if spec.shuffle:
        raise UsageError(
            "an iterable of batches cannot be shuffled, since each batch is folded as it comes; give an array or files"
        )
    setting: Setting | None = None
    tree = Tree(0)
    for item in batches:
        data = Joined(ArraySource(item).array, ReadOptions.of(spec))
        samples = data.shape[0]
        if setting is None:
            setting = Setting.of_shape(data.shape, None, spec, samples)
            tree = Tree(setting.layout.features)
        elif data.shape[1:] != setting.sample_shape:
            raise MismatchError(
                f"a batch has samples of shape {data.shape[1:]}, earlier batches {setting.sample_shape}"
            )
        missing = Missing(spec.nan == "omit", data.fill)
        part = fold_segment(data, setting.layout, Segment(0, 1, samples), missing, setting.conventions)
        tree = tree.add([Node(0, tree.stop, part)], setting.conventions.momentum)
        if progress:
            progress(tree.samples, None, 0)
    if setting is None:
        raise InputError("there is no batch to fit")
    fold = tree.fold(setting.conventions.momentum)
    if fold[Rounded].rounded:
        warnings.warn(ROUNDED, BnWarning, stacklevel=3)
    return setting.record(fold, [])
