"""Statistics to and from the files of frameworks; one module per format, each with `write` and, where it can, `read`.

>>> format_of("model/bn1.ONNX", None, "read", "--from")
'onnx'
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bncli.errors import UsageError, printable
from bncli.system import atomic

if TYPE_CHECKING:
    from bncli.exchange.common import Exported
    from bncli.stats.record import Stats


@dataclass(frozen=True)
class Format:
    """A format: its module under `bncli.exchange`, what it is in one line, what names it, and what it can do."""

    module: str
    description: str
    suffixes: tuple[str, ...] = ()
    read_suffixes: tuple[str, ...] = ()  # of files that are only read, or that `read` knows what to say about
    verbs: tuple[str, ...] = ("write", "read")


def write(stats: Stats, path: str, format: str | None = None, **options: Any) -> Exported:
    """Write statistics in a framework's format; without `format` the path's suffix says it.

    Parameters
    ----------
    stats : Stats
    path : str
    format : str, optional
        A key of FORMATS.
    options
        Those of the format's own `write`: use, force, inputs, and rank, into, layer or transposed. None is an option not given.

    Raises
    ------
    UsageError
        When no format is named, the format does not take an option, or its package is missing.
    MismatchError
        When the numbers do not fit the format.
    OutputExistsError, WriteError
    """
    name = format_of(path, format, "write", "--to")
    atomic.check_output(
        path, force=options.get("force", True), inputs=options.get("inputs", ())
    )  # before a slow import
    exported: Exported = _call(name, "write", options)(stats, path)
    return exported


def read(path: str, format: str | None = None, **options: Any) -> Stats:
    """Read statistics from a framework's file; without `format` the path's suffix says it.

    Parameters
    ----------
    path : str
    format : str, optional
        A key of FORMATS.
    options
        eps, momentum (weight of the OLD value, or "none": it is not known), and layer where a file can hold several. None is an option not given.

    Raises
    ------
    UsageError
        When no format is named, the layer is ambiguous, or the format's package is missing.
    InputError
        When the file is missing, damaged, hostile, or holds no such layer.
    """
    name = format_of(path, format, "read", "--from")
    stats: Stats = _call(name, "read", options)(path)
    return stats


def read_to_file(path: str, output: str, format: str | None = None, *, force: bool = False, **options: Any) -> Stats:
    """Read statistics from a framework's file and store them as a stats file; raises as `read` and `Stats.save` do."""
    atomic.check_output(output, force=force, inputs=[path])
    stats = read(path, format, **options)
    atomic.write_bytes(output, stats.to_bytes(), force=force, inputs=[path])
    return stats


def format_of(path: str, given: str | None, verb: str, option: str) -> str:
    """The format named, else the one whose suffix the path has."""
    if given is not None and given not in formats(verb):
        raise UsageError(f"{option} {given!r} is not one of {', '.join(formats(verb))}")
    entries = {name: FORMATS[name] for name in formats(verb)}
    by_suffix = {s: n for n, e in entries.items() for s in (*e.suffixes, *(e.read_suffixes if verb == "read" else ()))}
    names = [name for suffix, name in by_suffix.items() if path.lower().endswith(suffix)]
    if given is None and not names:
        raise UsageError(
            f"{printable(path)}: its suffix names no format; say one with {option}: {', '.join(formats(verb))}"
        )
    return given or names[0]


def formats(verb: str) -> list[str]:
    """Names of the formats that have this verb."""
    return [name for name, entry in FORMATS.items() if verb in entry.verbs]


def _call(name: str, verb: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The verb of a format with its options filled in; an option that it does not take is an error, not ignored."""
    function = getattr(importlib.import_module(f"bncli.exchange.{FORMATS[name].module}"), verb)
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in inspect.signature(function).parameters:
            raise UsageError(f"--{option} has no meaning for the format {name}; leave it out")
    return lambda *args: function(*args, **given)


FORMATS = {
    "torch": Format(
        "torch",
        "PyTorch state_dict (.pt, .pth) of nn.BatchNorm1d/2d/3d",
        (".pt", ".pth"),
        (".ckpt", ".bin", ".pth.tar", ".pt.tar", ".pt2"),
    ),
    "safetensors": Format("safetensors", "the same keys, with the conventions in the metadata", (".safetensors",)),
    "keras": Format(
        "keras", "Keras 3 weights (.weights.h5) of one BatchNormalization", (".weights.h5",), (".h5", ".hdf5", ".keras")
    ),
    "onnx": Format("onnx", "ONNX model of one BatchNormalization; float32", (".onnx",)),
    "json": Format("json", "what 'bn inspect --json' prints", (".json",)),
    "npz": Format("npz", "NumPy archive, one array per field", (".npz",)),
    "csv": Format("csv", "text table, one column per field", (".csv",)),
    "fold": Format("fold", "scale and shift, or a layer's weights with them folded in", verbs=("write",)),
}
