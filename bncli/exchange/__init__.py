"""Statistics to and from the files of frameworks: the driver, and the table of formats, one module each.

>>> format_of("model/bn1.ONNX", None, "read", "--from")
'onnx'
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from bncli.errors import UsageError, printable
from bncli.exchange.contract import Content, Exported, ExportOptions, Momentum
from bncli.system import atomic

if TYPE_CHECKING:
    from bncli.stats.record import Stats


@dataclass(frozen=True)
class Format:
    """A format: its module, what it is in one line, what names it, and what it can do.

    Attributes
    ----------
    module : str
        A module with `encode`, `decode` or both; see `bncli.exchange.contract`.
    description : str
    suffixes, read_suffixes : tuple of str
        Of its files, and of those that are only read, or that `decode` knows what to say about.
    verbs : tuple of str
        "write" where the module has `encode`, "read" where it has `decode`.
    options : tuple of str
        Fields of ExportOptions that `encode` takes, besides `use`.
    has_layers : bool
        Whether a file can hold several layers.
    limit : int
        Maximum size in bytes of a file that is read whole.
    """

    module: str
    description: str
    suffixes: tuple[str, ...] = ()
    read_suffixes: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ("write", "read")
    options: tuple[str, ...] = ()
    has_layers: bool = True
    limit: int = 4 << 30


def write(
    stats: Stats,
    path: str,
    format: str | None = None,
    *,
    use: str = "running",
    rank: int | None = None,
    into: str | None = None,
    layer: str | None = None,
    transposed: bool | None = None,
    force: bool = True,
    inputs: Sequence[str] = (),
) -> Exported:
    """Write statistics in a framework's format; without `format` the path's suffix decides.

    Parameters
    ----------
    stats : Stats
    path : str
    format : str, optional
        A key of FORMATS.
    use : "running" or "population"
    rank, into, layer, transposed
        See ExportOptions; None is an option not given.
    force : bool
        Whether an existing output is replaced.
    inputs : sequence of str
        Files that the output must not replace.

    Raises
    ------
    UsageError
        When no format is named, the format does not take an option, or its package is missing.
    MismatchError
        When the numbers do not fit the format.
    OutputExistsError, WriteError
    """
    name = format_of(path, format, "write", "--to")
    inputs = inputs if into is None else [*inputs, into]
    atomic.check_output(path, force=force, inputs=inputs)  # before a slow import
    given = {"rank": rank, "into": into, "layer": layer, "transposed": transposed}
    _check_options(name, given, FORMATS[name].options)
    from bncli.exchange.common import chosen

    source = None if into is None else Content(into, FORMATS[name].limit)
    options = ExportOptions(path, use, rank, source, layer, transposed)
    made = _module(name).encode(chosen(stats, use), options)
    atomic.write_bytes(path, made.content, force=force, inputs=inputs)
    return Exported(name, path, use, stats.num_features, made.settings, made.notes)


def read(
    path: str,
    format: str | None = None,
    *,
    layer: str | None = None,
    eps: float | None = None,
    momentum: Momentum = None,
) -> Stats:
    """Read statistics from a framework's file; without `format` the path's suffix decides.

    Parameters
    ----------
    path : str
    format : str, optional
        A key of FORMATS.
    layer : str, optional
        Which layer, where a file can hold several.
    eps : float, optional
    momentum : float or "none", optional
        Weight of the OLD value; "none": it is not known.

    Raises
    ------
    UsageError
        When no format is named, the layer is ambiguous, or the format's package is missing.
    InputError
        When the file is missing, damaged, hostile, or holds no such layer.
    """
    name = format_of(path, format, "read", "--from")
    _check_options(name, {"layer": layer}, ("layer",) if FORMATS[name].has_layers else ())
    layers = _module(name).decode(Content(path, FORMATS[name].limit))
    from bncli.exchange.common import pick, to_stats

    layers.check(layer)
    found = pick(layers.sizes, layers.likely if layer is None else layer, path, layers.what, layers.also)
    stats: Stats = to_stats(
        path, name, layers.read(found), layer=layers.recorded(found, layer), eps=eps, momentum=momentum
    )
    return stats


def read_to_file(
    path: str,
    output: str,
    format: str | None = None,
    *,
    layer: str | None = None,
    eps: float | None = None,
    momentum: Momentum = None,
    force: bool = False,
) -> Stats:
    """Read statistics from a framework's file and store them as a stats file; raises as `read` and `Stats.save` do."""
    atomic.check_output(output, force=force, inputs=[path])
    stats = read(path, format, layer=layer, eps=eps, momentum=momentum)
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
            f"{printable(path)}: the suffix does not name a format; choose one with {option}: {', '.join(formats(verb))}"
        )
    return given or names[0]


def formats(verb: str) -> list[str]:
    """Names of the formats that have this verb."""
    return [name for name, entry in FORMATS.items() if verb in entry.verbs]


def _module(name: str) -> ModuleType:
    """The module of a format, imported when it is needed."""
    return importlib.import_module(FORMATS[name].module)


def _check_options(name: str, given: Mapping[str, object], taken: Sequence[str]) -> None:
    """Raise UsageError for an option that is given and that the format does not take."""
    for option, value in given.items():
        if value is not None and option not in taken:
            raise UsageError(f"--{option} has no meaning for the format {name}; leave it out")


FORMATS = {
    "torch": Format(
        "bncli.exchange.torch",
        "PyTorch state_dict (.pt, .pth) of nn.BatchNorm1d/2d/3d",
        (".pt", ".pth"),
        (".ckpt", ".bin", ".pth.tar", ".pt.tar", ".pt2"),
    ),
    "safetensors": Format(
        "bncli.exchange.safetensors", "the same keys, with the conventions in the metadata", (".safetensors",)
    ),
    "keras": Format(
        "bncli.exchange.keras",
        "Keras 3 weights (.weights.h5) of one BatchNormalization",
        (".weights.h5",),
        (".h5", ".hdf5", ".keras"),
        limit=16 << 30,
    ),
    "onnx": Format(
        "bncli.exchange.onnx",
        "ONNX model of one BatchNormalization; float32",
        (".onnx",),
        options=("rank",),
        limit=2 << 30,  # protobuf's own
    ),
    "json": Format("bncli.exchange.json", "what 'bn inspect --json' prints", (".json",), has_layers=False),
    "npz": Format("bncli.exchange.npz", "NumPy archive, one array per field", (".npz",)),
    "csv": Format("bncli.exchange.csv", "text table, one column per field", (".csv",), has_layers=False),
    "fold": Format(
        "bncli.exchange.fold",
        "scale and shift, or a layer's weights with them folded in",
        verbs=("write",),
        options=("into", "layer", "transposed"),
        limit=64 << 30,
    ),
}
