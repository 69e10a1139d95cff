"""The command line: the group, and the wall that turns every error into a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import keyword
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import click

from bncli.cli.running import Running
from bncli.errors import BnError, InputError, UsageError, WriteError, printable
from bncli.stats.provenance import COMMAND
from bncli.system import shutdown
from bncli.version import __version__

REPORT = "please report it with the command, the versions and what --debug prints"


class Commands(click.Group):
    """Commands that are imported when they are called, so that each start is light."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = getattr(importlib.import_module(f"bncli.cli.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest a command when there is none of that name."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean 'bn {close[0]}'?" if close else f"there are {', '.join(COMMANDS)}"
            raise UsageError(f"no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


class Closed(io.TextIOBase):
    """Standard output where there is none."""

    def write(self, text: str) -> int:
        """Fail, as writing to a full disk does."""
        raise OSError(errno.EBADF, "it is closed, and there is something to print")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="bn", message="%(prog)s %(version)s")
def cli() -> None:
    """Normalization statistics of arrays that are larger than memory.

    \b
    bn fit train.h5                           mean and variance, in one pass
    bn inspect train.bn.h5                    show them
    bn apply train.bn.h5 new.npy -o out.npy   normalize data in the same way

    Inputs are .npy files and HDF5 datasets, FILE or FILE::/path/in/file.
    """


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run bn and leave the process with one of the exit codes of docs/reliability.md."""
    args = list(sys.argv[1:] if argv is None else argv)
    # closed by the caller: a result that nobody can get is an error, a message is not
    sys.stdout = sys.stdout or Closed()
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    _steady_stdout()
    with _bn_warnings():
        code = _run(args)
    sys.exit(code)


def _run(args: list[str]) -> int:
    """Turn everything that can go wrong into one or two lines and an exit code."""
    running = Running()
    typed = COMMAND.set(("bn", *args))
    try:
        try:
            if asked := os.environ.get("_BN_COMPLETE"):
                from bncli.cli.completion import answer

                answer(cli, asked)
                return 0
            with cli.make_context("bn", args, obj=running) as context:
                cli.invoke(context)
        finally:
            COMMAND.reset(typed)
            sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _said(f"error: {printable(_in_words(error))}", 2, running.debug)
    except (KeyboardInterrupt, click.Abort):  # under another program's main; see `shutdown`
        return _said("interrupted; outputs are as they were", 130, running.debug)
    except BnError as error:
        return _said(f"error: {error}", error.exit_code, running.debug)
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except MemoryError:
        return _said(
            "error: not enough memory; give a smaller file or, where there are these options, --max-memory or --batch-size",
            InputError.exit_code,
            running.debug,
        )
    except OSError as error:
        _forget_stdout()
        return _said(
            f"error: {error.filename or 'standard output'}: {error.strerror or error}",
            WriteError.exit_code,
            running.debug,
        )
    except Exception as error:
        return _said(f"internal error: {type(error).__name__}: {error}; {REPORT}", 70, running.debug)
    return 0


def _in_words(error: click.ClickException) -> str:
    """A usage error of Click in the words of bn."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    see = f"; see '{context.command_path} --help'" if context else ""
    if isinstance(error, click.NoSuchOption):
        import difflib

        if context and context.command is cli and error.option_name in ("--debug", "--plugins"):
            return f"{error.option_name} is an option of the commands; give it after one, as in 'bn ls {error.option_name}'"
        close = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1)
        return f"no option {error.option_name}" + (f"; did you mean {close[0]}?" if close else see)
    if isinstance(error, click.MissingParameter) and error.param:
        names = error.param.make_metavar(context) if isinstance(error.param, click.Argument) and context else ""
        return f"missing {names or '/'.join(error.param.opts)}{see}"
    text = error.format_message().rstrip(".")
    return (text if text[1:2].isupper() else text[:1].lower() + text[1:]) + see


def _said(message: str, code: int, debug: bool) -> int:
    """Print an error on stderr, never more than its own lines, and return the exit code."""
    shutdown.process.block_if_stopping()
    if debug:
        import traceback

        print("\n".join(map(printable, traceback.format_exc().splitlines())), file=sys.stderr)
    lines = [printable(line) for line in message.splitlines()]
    with contextlib.suppress(OSError, ValueError):
        print("bn: " + "\n".join(lines), file=sys.stderr, flush=True)
    return code


def _steady_stdout() -> None:
    """Make stdout complain when not all is written, and not about names that the terminal's encoding lacks."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    raw = sys.stdout.buffer
    if isinstance(raw, io.RawIOBase):  # PYTHONUNBUFFERED: what a short write leaves over would be lost in silence
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), sys.stdout.encoding, write_through=True)
    sys.stdout.reconfigure(errors="backslashreplace")


def _forget_stdout() -> None:
    """Nobody reads stdout any more: keep the interpreter from failing over it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _bn_warnings() -> Iterator[None]:
    """Print bn's own warnings as one line each; other libraries' are for --debug and developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    kind = {"BnWarning": "warning", "BnNote": "note"}.get(category.__name__)
    if kind and not _quiet():
        shutdown.process.block_if_stopping()
        with contextlib.suppress(OSError, ValueError):  # a full log is no reason to lose the result
            print(f"bn: {kind}: {printable(message)}", file=sys.stderr, flush=True)


def _quiet() -> bool:
    context = click.get_current_context(silent=True)
    return bool(context and context.params.get("quiet"))


COMMANDS = {  # in the order of work
    "fit": "Compute normalization statistics in one pass.",
    "inspect": "Show the statistics in a stats file.",
    "apply": "Normalize data with stored statistics.",
    "merge": "Combine several stats files into one.",
    "export": "Write statistics for a framework.",
    "import": "Read statistics of a framework.",
    "ls": "List the arrays in a file.",
    "doctor": "Show environment information.",
    "completion": "Print a script that completes commands in a shell.",
}
