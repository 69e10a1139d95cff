"""Applying stats to data, in test mode or its inverse: source -> normalize -> sink, a piece at a time."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bncli import choices
from bncli.engine.declare import options_of
from bncli.engine.executors import DEFAULT, available, is_here, mapped
from bncli.engine.options import ApplySpec
from bncli.engine.plan import Progress
from bncli.engine.transform import ApplyContext, Counts, PlacedContext, Run, Transform
from bncli.errors import (
    BnNote,
    BnWarning,
    InputError,
    MismatchError,
    OutputExistsError,
    UsageError,
    WriteError,
    printable,
)
from bncli.formats import Format, Output, Place, Sink, format_for, format_of
from bncli.formats.address import SEPARATOR, expand, open_source, split
from bncli.formats.dataset import Input, Joined
from bncli.formats.fills import remarks
from bncli.formats.reading import ReadOptions
from bncli.formats.source import Source
from bncli.numerics.arrays import DType
from bncli.numerics.batchnorm import Affine, output_type
from bncli.numerics.kernels import Missing
from bncli.numerics.layout import Layout
from bncli.stats.record import Stats, load
from bncli.system import atomic, shutdown

FOREIGN = {".npz", ".csv", ".tsv", ".txt", ".json", ".zarr", ".parquet", ".mat", ".pt", ".safetensors", ".onnx"}
PIECE_VALUES = 1 << 18  # read, computed and written at a time: 2 MB of float64
RUNS_TOGETHER = 32  # that a worker of another process writes before it tells
PlacedFor = tuple[Place, str]  # and the name of the output


@dataclass
class Applied:
    """What was written, and counts of values that a user may want to know about.

    Attributes
    ----------
    outputs : list of str
    samples, values, bytes_read : int
    non_finite : int
        NaN and infinite inputs, which pass through.
    filled : int
        Values equal to the fill value, written as NaN.
    varied_where_constant : int
        Values of features that were constant in the fitted data, and that differ from that constant.
    undefined : int
        Values of features without statistics, written as NaN.
    overflowed : int
        Values that do not fit the output's type.
    others : list of str
        Other datasets of the inputs.
    left : list of str
        Those of `others` that could not be copied.
    dropped : list of str
        References to other objects and links to other files, which the output lacks: FILE::/path, or /path@attribute.
    passed_over : dict
        Address -> number of other arrays in the file, for inputs chosen because no dataset was named.
    """

    outputs: list[str] = field(default_factory=list)
    samples: int = 0
    values: int = 0
    bytes_read: int = 0
    non_finite: int = 0
    filled: int = 0
    varied_where_constant: int = 0
    undefined: int = 0
    overflowed: int = 0
    others: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    def add(self, counts: Counter[str]) -> None:
        """Add counts, named like the attributes."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class Job:
    """One input, the output for its result, and the output's format."""

    address: str
    output: str
    format: Format
    axis: int
    shape: tuple[int, ...]  # of the selected samples, as stored
    rows: tuple[int, int]
    dtype: DType
    files: tuple[str, ...]  # every file that is read
    passed_over: int  # number of other arrays in its file, if no dataset was named


def apply(
    stats: Stats | str | os.PathLike[str],
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    axis: int | None = None,
    inverse: bool = False,
    use: choices.Use = "running",
    dtype: choices.FloatType | None = None,
    copy_others: bool = False,
    force: bool = False,
    dataset: str | None = None,
    rows: tuple[int | None, int | None] | str = (None, None),
    fill_value: float | int | None = None,
    on: str | None = None,
    workers: int = 0,
    max_memory: int | str = choices.DEFAULT_MEMORY,
    allow_unwritten: bool = False,
    allow_virtual: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Normalize files with stored statistics (test mode), or undo it. For arrays in memory see `Stats.normalize`.

    Options are named as those of `bn apply`. Outputs appear under their names only when all are complete.

    Parameters
    ----------
    stats : Stats, or the path of a stats file
    source : address, or list of addresses
        FILE or FILE::/path.
    output : path
        A file; or a folder (one that exists, or a name that ends in "/") for one output per input, named like the input.
    axis, inverse, use, dtype, copy_others, force, dataset, rows, fill_value, workers, max_memory : optional
        See `bncli.engine.options.ApplySpec`.
    allow_unwritten, allow_virtual : bool
        Read unwritten chunks of HDF5 as the fill value; read virtual datasets.
    progress : function, optional
        Called with the number of samples done, samples in all, and bytes done.

    Returns
    -------
    Applied
        The outputs, and counts of values that may need a look.

    Raises
    ------
    MismatchError
        When the data does not fit the stats, or values do not fit the output's type. Nothing is written.
    UsageError, InputError, OutputExistsError, WriteError
        With the message that the command line would show.
    """
    given = dict(locals())  # first of all: only the parameters
    options = ApplySpec(**{name: given[name] for name in options_of(ApplySpec)})
    path = None if isinstance(stats, Stats) else os.fspath(stats)
    addresses = [source] if isinstance(source, (str, os.PathLike)) else source
    inputs = [os.fspath(address) for address in addresses]
    found = stats if isinstance(stats, Stats) else load(stats)
    return apply_files(found, inputs, os.fspath(output), options, progress, stats_path=path)


def apply_files(
    stats: Stats,
    inputs: Sequence[str],
    out: str,
    spec: ApplySpec,
    progress: Progress | None = None,
    *,
    stats_path: str | None = None,
) -> Applied:
    """Apply stats to files; see `apply`.

    Parameters
    ----------
    stats : Stats
    inputs : addresses
    out : str
        A file; or a folder (one that exists, or a name that ends in "/") for one output per input, named like the input.
    progress : function, optional
        Called with the number of samples done, samples in all, and bytes done.
    stats_path : str, optional
        File of the stats; it is never overwritten.

    Raises
    ------
    MismatchError
        When the data does not fit the stats, or values do not fit the output's type. Nothing is written.
    UsageError, InputError, OutputExistsError, WriteError
    """
    stats.check_whole(printable(stats_path or "these statistics"))
    mean, var, gamma, beta = (a[:, None] for a in (*stats.statistics(spec.use), stats.gamma, stats.beta))
    affine = Affine.of(mean, var, gamma, beta, stats.eps, inverse=spec.inverse)
    jobs = plan(stats, expand(inputs), out, spec)
    paths = [file for job in jobs for file in job.files] + ([stats_path] if stats_path else [])
    for job in jobs:
        atomic.check_output(job.output, force=spec.force, inputs=paths)
    report, total = Applied(), sum(job.shape[0] for job in jobs)
    with _folder(jobs), atomic.Outputs(force=spec.force, inputs=paths) as outputs:
        for job in jobs:
            _apply_one(stats, affine, job, spec, outputs.add(job.output), report, total, progress)
            report.outputs.append(job.output)
            report.passed_over |= {job.address: job.passed_over} if job.passed_over else {}
        if report.overflowed:
            remedy = "Give a wider --dtype" if jobs[0].dtype.itemsize < 8 else "Rescale the data or gamma"
            raise MismatchError(
                f"{report.overflowed:,} values do not fit {jobs[0].dtype.name}; nothing was written. {remedy}"
            )
        if report.varied_where_constant:
            warnings.warn(_varied(report.varied_where_constant), BnWarning, stacklevel=2)
    return report


def _varied(count: int) -> str:
    values = "1 value varies" if count == 1 else f"{count:,} values vary"
    return (
        f"{values} where the fitted data was constant: multiplied by 1/sqrt(var + eps), which is up to 1/sqrt(eps) "
        "(or by 1 where var and eps are 0)"
    )


def plan(stats: Stats, inputs: Sequence[str], out: str, spec: ApplySpec) -> list[Job]:
    """Open every input and decide where its result goes; no value is read."""
    with Joined(inputs, ReadOptions.of(spec)) as data:
        taken = data.inputs
    into_folder = out.endswith("/") or os.path.isdir(out)
    if SEPARATOR in out and not os.path.exists(out):
        raise UsageError(f"-o {printable(out)}: an output is a file; its dataset is called as in the input")
    if len(taken) > 1 and not into_folder:
        raise UsageError(f"{len(taken)} inputs need a folder for their outputs: -o {printable(out)}/")
    jobs = []
    for entry in taken:
        path, _ = split(entry.address)
        output = os.path.join(out, os.path.basename(path)) if into_folder else out
        with open_source(entry.address, _alone(spec)) as source:
            jobs.append(_job(stats, source, output, _format_of(output, path), entry, spec))
    outputs = [os.path.realpath(job.output) for job in jobs]
    for i, job in enumerate(jobs):
        if outputs[i] in outputs[:i]:
            raise UsageError(f"two inputs have the same output {printable(job.output)}; apply them one by one")
    return jobs


def _format_of(output: str, path: str) -> Format:
    """The format that the output's suffix asks for, else that of the input."""
    if asked := format_for(output):
        return asked
    suffix = os.path.splitext(output)[1].lower()
    if suffix in FOREIGN:
        raise UsageError(f"{printable(output)}: bn apply writes .npy and HDF5 (.h5, .hdf5), not {suffix}")
    return format_of(path)


def _alone(spec: ApplySpec) -> ReadOptions:
    """How one input is read whole and as it is stored."""
    return replace(ReadOptions.of(spec), dataset=None, rows=(None, None), fill_value=None)


def _job(stats: Stats, source: Source, output: str, format: Format, entry: Input, spec: ApplySpec) -> Job:
    axis = stats.check_shape(source.shape, spec.axis, printable(source.address))
    stats.check_names(source.names, printable(source.address))
    shortened = entry.stop - entry.start < source.shape[0]
    if spec.copy_others and shortened and source.is_dimension():
        raise UsageError(
            f"{printable(source.address)}: is a dimension scale: the other datasets would be longer than it; leave out --rows or "
            "--copy-others"
        )
    dtype = np.dtype(spec.dtype) if spec.dtype else output_type(source.dtype)
    rows, shape = (entry.start, entry.stop), (entry.stop - entry.start, *source.file_shape[1:])
    return Job(source.address, output, format, axis, shape, rows, dtype, tuple(source.files), entry.passed_over)


@contextlib.contextmanager
def _folder(jobs: list[Job]) -> Iterator[None]:
    """Create the folder of the outputs if it does not exist; it is removed after an error."""
    folder = os.path.dirname(jobs[0].output)
    if not folder or os.path.isdir(folder):
        yield
        return
    if os.path.lexists(folder):
        raise OutputExistsError(f"{printable(folder)}: exists and is not a folder")

    def remove() -> None:
        with contextlib.suppress(OSError):
            os.rmdir(folder)

    with shutdown.process.on_stop(remove):
        try:
            os.mkdir(folder)
        except OSError as error:
            raise WriteError(f"{printable(folder)}: cannot create the folder: {error.strerror}") from None
        try:
            yield
        except BaseException:
            remove()
            raise


def _apply_one(
    stats: Stats,
    affine: Affine,
    job: Job,
    spec: ApplySpec,
    temporary: str,
    report: Applied,
    total: int,
    progress: Progress | None,
) -> None:
    fill = spec.fill_value
    with Joined([job.address], replace(_alone(spec), rows=job.rows, fill_value=fill)) as data:
        if data.shape[0] != job.shape[0]:
            path = split(job.address)[0]
            raise InputError(f"{printable(path)}: changed while it was being read; run again when nobody writes to it")
        layout = Layout.of(data.shape, job.axis)
        constant = np.flatnonzero(stats.constant) if not spec.inverse else np.empty(0, np.intp)
        only = stats.population_mean[constant]  # its only value in the fitted data
        transform = Transform(affine, layout, job.dtype, constant, only, Missing(False, data.fill))
        sink, place = _open_sink(job, temporary, spec)
        try:
            marked: Counter[int] = Counter()
            for done, (counts, found) in _written(data, transform, _runs(layout, data), sink, place, spec):
                report.add(counts)
                marked.update(found)
                if progress:
                    size = done * data.dtype.itemsize
                    progress(report.samples + done // layout.sample_size, total, report.bytes_read + size)
            data.check_unchanged()
            _others(job, sink, spec, report)
            sink.finish()
            for text in remarks(data, [marked[i] for i in range(len(data.marks))], fill=fill, verb="apply"):
                warnings.warn(text, BnWarning, stacklevel=3)
        except BaseException:
            sink.abandon()
            raise
    report.bytes_read += data.shape[0] * layout.sample_size * data.dtype.itemsize
    report.samples += data.shape[0]
    report.values += data.shape[0] * layout.sample_size


def _runs(layout: Layout, data: Joined) -> list[tuple[int, int]]:
    """Cut the values into runs (first, count) of whole samples; a very large sample is cut into several."""
    total = data.shape[0] * layout.sample_size
    size = max(1, PIECE_VALUES // layout.sample_size) * layout.sample_size
    if layout.sample_size > 8 * PIECE_VALUES:
        size = PIECE_VALUES
    elif data.rows_together > 1:  # one worker decodes a chunk, unless it is too large
        size = max(size, min(data.rows_together * layout.sample_size, 2 * PIECE_VALUES))
        size = size // layout.sample_size * layout.sample_size
    return [(first, min(size, total - first)) for first in range(0, total, size)]


def _written(
    data: Joined, transform: Transform, runs: list[Run], sink: Sink, place: PlacedFor | None, spec: ApplySpec
) -> Iterator[tuple[int, Counts]]:
    """Transform and write all runs, in order; yields how many values are done, and the counts of the last of them."""
    on = spec.on or DEFAULT
    workers = min(spec.workers or available(), data.most_readers, len(runs)) if is_here(on) else 0
    context = ApplyContext(data, workers or 1, transform)
    if place is None:
        results = mapped(context, lambda _: runs, workers, on)
        for (first, count), (values, counts, marked) in zip(runs, results, strict=True):
            sink.write(values)
            yield first + count, (counts, marked)
        return
    tasks = [runs[i : i + RUNS_TOGETHER] for i in range(0, len(runs), RUNS_TOGETHER)]
    placed = PlacedContext(context, *place, sync=not is_here(on))
    for task, found in zip(tasks, mapped(placed, lambda _: tasks, workers, on), strict=True):
        yield sum(task[-1]), found


def _open_sink(job: Job, temporary: str, spec: ApplySpec) -> tuple[Sink, PlacedFor | None]:
    """Make the output; gives where workers of other processes write into it, if they can, and its name."""
    with open_source(job.address, _alone(spec)) as like:
        output = Output(temporary, job.shape, job.dtype, like, spec.max_memory // 4, spec.workers or available())
        sink = job.format.create(output)
    if spec.on in (None, DEFAULT):
        return sink, None
    place = job.format.place(output)
    if place is None:
        text = f"{printable(job.output)}: one process writes {job.format.name} outputs; the workers only compute"
        warnings.warn(text, BnNote, stacklevel=4)
        return sink, None
    return sink, (place, job.output)


def _others(job: Job, sink: Sink, spec: ApplySpec, report: Applied) -> None:
    """Copy the other arrays of the input's file, or note that there are some."""
    path, array = split(job.address)
    format = format_of(path)
    if array is None or not format.several:
        if spec.copy_others:
            raise UsageError(f"--copy-others: {printable(path)} is not an HDF5 file and holds nothing else")
        return
    if not spec.copy_others:  # else they may refer to the copies
        report.dropped += [f"{path}{SEPARATOR}{name}" for name in sink.dropped]
    report.others += [f"{path}{SEPARATOR}{name}" for name in format.others(path, array)]
    if spec.copy_others:
        if job.format is not format:
            raise InputError(
                f"--copy-others: {printable(job.output)} is in the format {job.format.name}, which holds one array; give an .h5 output"
                if not job.format.several
                else f"--copy-others: {printable(job.output)} is in the format {job.format.name}, and {printable(path)} is not; give an output of the same format"
            )
        with open_source(job.address, _alone(spec)) as source:
            left, dropped = sink.copy_others(source)
        report.left += [f"{path}{SEPARATOR}{name}" for name in left]
        report.dropped += [f"{path}{SEPARATOR}{name}" for name in dropped]
