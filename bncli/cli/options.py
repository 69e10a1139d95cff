"""Click's options, made from the declarations; and the options that only the command line has."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from bncli.cli.running import Running
from bncli.engine.declare import ADVANCED, GROUPS, OUTPUT, RUNNING, Option, flag, options_of
from bncli.engine.kinds import FLAG, PATH, named

F = TypeVar("F", bound=Callable[..., Any])
SEPARATOR = "::"
TERM_WIDTH = 25  # of an option in the help; a longer one has a line to itself


class Grouped(click.Option):
    """An option of Click with its declaration, and the heading that the help lists it under."""

    def __init__(self, param_decls: Sequence[str], *, declared: Option, **more: Any) -> None:
        name, self.declared, self.group = param_decls[0], declared, declared.group
        long = param_decls[1] if len(param_decls) > 1 else flag(name)
        help = declared.help + (f"  [default: {declared.usual}]" if declared.usual else "")
        if declared.kind is FLAG:
            more.setdefault("is_flag", True)
            more.setdefault("default", False)
            if more["default"] is None:
                long = f"{long}/--no-{long[2:]}"
        else:
            more["metavar"] = declared.metavar or f"[{'|'.join(declared.allowed)}]"
            more["type"] = Value(long, declared)
        super().__init__([name, *filter(None, [declared.short]), long], help=help, **more)


class Value(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of Click alone
    """Text as the declaration parses, checks and completes it."""

    def __init__(self, name: str, declared: Option) -> None:
        self.name, self.declared = name, declared

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse text; a default is a value already."""
        return self.declared.parse(self.name, value) if isinstance(value, str) else value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Choices, files, and the datasets of a file."""
        if allowed := self.declared.allowed:
            return [CompletionItem(choice) for choice in allowed if choice.startswith(incomplete)]
        return complete_address(incomplete) if self.declared.kind.file else []


class Address(click.ParamType):  # type: ignore[type-arg]
    """A path or address among the arguments."""

    name = "address"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse an empty path, or an address without a file."""
        if problem := named(value):
            what = param.human_readable_name if param else self.name
            raise click.UsageError(f"{what} {value!r}: {problem}", ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files, and the datasets of a file."""
        return complete_address(incomplete)


def complete_address(incomplete: str) -> list[CompletionItem]:
    """Datasets after the :: of a file that holds some, else the shell's own completion of files."""
    path, separator, _ = incomplete.partition(SEPARATOR)
    if not separator:
        return [CompletionItem(incomplete, type="file")]
    try:
        from bncli.formats.listing import listing

        found = [array.address for array in listing(os.path.expanduser(path))]
    except Exception:  # a damaged file completes to nothing, and a shell's prompt is no place for messages
        return []
    addresses = [path + SEPARATOR + address.rpartition(SEPARATOR)[2] for address in found if SEPARATOR in address]
    return [
        CompletionItem(address) for address in addresses if address.startswith(incomplete) and address.isprintable()
    ]


class Command(click.Command):
    """A command whose help lists the options in groups, and whose options are given once."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options under their headings."""
        records: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                records[getattr(param, "group", RUNNING)].append(record)
        for group, rows in records.items():
            if rows:
                first, help = rows[0]
                with formatter.section(group):  # the same columns in every group
                    formatter.write_dl([(first.ljust(TERM_WIDTH), help), *rows[1:]], col_max=TERM_WIDTH)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and refuse an option that takes one value and is given twice."""
        before = list(args)
        try:
            rest = super().parse_args(ctx, args)
            if not ctx.resilient_parsing:
                _refuse_repeated(ctx, self.make_parser(ctx).parse_args(before)[2])
        except Exception:  # before --debug had its turn
            ctx.ensure_object(Running).debug |= "--debug" in itertools.takewhile(lambda arg: arg != "--", before)
            raise
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run, with HDF5's plugins off unless --plugins was given."""
        if not ctx.ensure_object(Running).plugins:
            without_plugins()
        return super().invoke(ctx)


def _refuse_repeated(ctx: click.Context, order: Sequence[click.Parameter]) -> None:
    for param, count in Counter(order).items():
        if not isinstance(param, click.Option) or count == 1 or param.multiple:
            continue
        if not param.is_flag:
            raise click.UsageError(f"{param.opts[-1]} is given {count} times; it takes one value", ctx)
        if param.secondary_opts:
            raise click.UsageError(f"give {param.opts[-1]} or {param.secondary_opts[-1]} once, not both", ctx)


def without_plugins() -> None:
    """Keep HDF5 from loading plugins: it looks at the environment once, when it is loaded itself."""
    os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
    for name in ("HDF5_DRIVER", "HDF5_VOL_CONNECTOR"):  # plugins too; HDF5 crashes over one that it cannot load
        os.environ.pop(name, None)


def command(name: str, **more: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A command of bn."""
    return click.command(name, cls=Command, **more)


def declared_by(spec: type[Any]) -> Callable[[F], F]:
    """Add the options that a dataclass declares; the function gets them as an instance, `options`."""

    def decorate(function: F) -> F:
        own = options_of(spec)

        @functools.wraps(function)
        def run(**given: Any) -> Any:
            chosen = {name: value for name in own if (value := given.pop(name)) is not None}
            return function(options=spec(**chosen), **given)

        for name, declared in reversed(own.items()):
            default = getattr(spec, name, None) if declared.kind is FLAG else None
            click.option(name, cls=Grouped, declared=declared, default=default)(run)
        return run  # type: ignore[return-value]

    return decorate


def only_here(name: str, declared: Option, *flags: str, **more: Any) -> Callable[[F], F]:
    """An option of the command line alone; the function gets it by its name."""
    return click.option(name, *flags, cls=Grouped, declared=declared, **more)


def _note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and param.name:
        setattr(ctx.ensure_object(Running), param.name, True)


def quiet(words: str) -> Callable[[F], F]:
    """The option -q; `words` say what it silences."""
    return only_here("quiet", Option(words, RUNNING, FLAG, short="-q"))


def output(help: str, metavar: str = "STATS", *, required: bool = True) -> Callable[[F], F]:
    """The option -o."""
    declared = Option(help, OUTPUT, PATH, metavar=metavar, check=named, short="-o")
    return only_here("output", declared, required=required)


def arguments(name: str, metavar: str) -> Callable[[F], F]:
    """One or more paths or addresses."""
    return click.argument(name, type=Address(), metavar=metavar, nargs=-1, required=True)


def argument(name: str, metavar: str) -> Callable[[F], F]:
    """One path or address."""
    return click.argument(name, type=Address(), metavar=metavar)


force = only_here("force", Option("Replace an output that exists.", OUTPUT, FLAG, short="-f"))
as_json = only_here("as_json", Option("Print JSON, with floats that round-trip exactly.", OUTPUT, FLAG), "--json")
plugins = only_here(
    "plugins",
    Option("Load filter plugins from HDF5_PLUGIN_PATH.", ADVANCED, FLAG),
    expose_value=False,
    is_eager=True,
    callback=_note,
)
debug = only_here(
    "debug",
    Option("Show a traceback with an error.", RUNNING, FLAG),
    expose_value=False,
    is_eager=True,
    callback=_note,
)
quietly = quiet("No progress, warnings or summary; errors only.")


def format_list(verb: str) -> str:
    """The formats of `bn export` or `bn import`, a line each, for the end of the help."""
    from bncli.exchange import FORMATS, formats

    return "\b\nFormats:\n" + "\n".join(f"  {name:<12} {FORMATS[name].description}" for name in formats(verb))


def notes(lines: Iterable[str]) -> None:
    """Print notes on stderr."""
    click.echo("".join(f"bn: note: {line}\n" for line in lines), err=True, nl=False)
