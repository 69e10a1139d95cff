"""Every option that commands share, once; and how the words of an option become values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bncli.errors import UsageError

if TYPE_CHECKING:
    from bncli.engine.apply import ApplySpec
    from bncli.engine.plan import FitSpec

WITHOUT_FILE = ("target", "dataset")  # what may name a path that is in every input
F = TypeVar("F", bound=Callable[..., Any])


def named(ctx: click.Context, param: click.Parameter, value: str | tuple[str, ...] | None) -> Any:
    """Refuse an empty path or address, or one without a file: what an unset variable of a shell gives."""
    for text in (value,) if isinstance(value, str) else value or ():
        if not text:
            raise click.BadParameter("an empty name; give a path", ctx, param)
        if text.startswith("::") and param.name not in WITHOUT_FILE:
            raise click.BadParameter(f"{text!r} names no file before the ::", ctx, param)
    return value


def parse_number(text: str, option: str) -> float | int:
    """A number, kept as an integer when it is written as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise UsageError(f"--{option} {text!r} is not a number")


def parse_momentum(text: str | None) -> Any:
    """A number or "none"; None is not given."""
    return text if text in (None, "none") else parse_number(text, "momentum")


def fit_spec(given: dict[str, Any]) -> FitSpec:
    """FitSpec from the options of `bn fit`."""
    from bncli.engine.plan import FitSpec, number_or_address

    momentum = parse_momentum(given.pop("momentum"))
    gamma, beta = (None if x is None else number_or_address(x) for x in (given.pop("gamma"), given.pop("beta")))
    return FitSpec(momentum=momentum, gamma=gamma, beta=beta, **_parsed(given))


def apply_spec(given: dict[str, Any]) -> ApplySpec:
    """ApplySpec from the options of `bn apply`."""
    from bncli.engine.apply import ApplySpec

    return ApplySpec(**_parsed(given))


def _parsed(given: dict[str, Any]) -> dict[str, Any]:
    """Turn the texts of --rows, --max-memory and --fill-value into values."""
    from bncli.engine.plan import parse_rows, parse_size

    fill = given["fill_value"]
    return given | {
        "rows": parse_rows(given["rows"]) if given["rows"] is not None else (None, None),
        "max_memory": parse_size(given["max_memory"]),
        "fill_value": None if fill is None else parse_number(fill, "fill-value"),
    }


def format_list(verb: str) -> str:
    """The formats of `bn export` or `bn import`, a line each, for the end of the help."""
    from bncli.exchange import FORMATS, formats

    return "\b\nFormats:\n" + "\n".join(f"  {name:<12} {FORMATS[name].description}" for name in formats(verb))


def stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several decorators as one, in the order in which help lists them."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


inputs = click.argument("inputs", callback=named, metavar="INPUT...", nargs=-1, required=True)
stats_file = click.argument("stats", callback=named, metavar="STATS")
dataset = click.option(
    "-d", "--dataset", callback=named, metavar="PATH", help="Dataset in every input that names none."
)
rows = click.option("--rows", metavar="A:B", help="Only these samples: a Python slice of the joined inputs.")
max_memory = click.option(
    "--max-memory", metavar="SIZE", default="128M", show_default=True, help="Most bytes of buffers, such as 64M or 1G."
)
allow_unwritten = click.option(
    "--allow-unwritten", is_flag=True, help="Read HDF5 chunks that were never written as the fill value."
)
allow_virtual = click.option(
    "--allow-virtual", is_flag=True, help="Read virtual HDF5 datasets, from whatever files they name."
)
plugins = click.option(  # heeded before the HDF5 library is loaded: see `bncli.cli.main`
    "--plugins", is_flag=True, expose_value=False, help="Load filter plugins from HDF5_PLUGIN_PATH."
)
workers = click.option("-j", "--workers", type=int, default=0, metavar="N", help="Threads.  [default: all CPUs]")
fill_value = click.option("--fill-value", metavar="V", help="Values equal to V, in the input's type, are missing.")
use = click.option(
    "--use",
    type=click.Choice(["running", "population"]),
    default="running",
    show_default=True,
    help="Which statistics.",
)
force = click.option("-f", "--force", is_flag=True, help="Replace an output that exists.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, with floats that round-trip exactly.")
common = stack(
    click.option("-q", "--quiet", is_flag=True, help="No progress, warnings or summary; errors only."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback with an error."),
)
